"""Stochastic differential equations: a drift, a diffusion, and the Brownian paths that drive them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array
from kpflow_dyn._arrays.complex_numbers import is_complex
from kpflow_dyn._backend import backend_for
from kpflow_dyn._problems.checks import check_forward_times, check_inputs, check_plain_start, jumps_of
from kpflow_dyn._problems.problems import OverTimes, Problem

SDE_TYPES = ("ito", "stratonovich")


@dataclass(frozen=True)
class SDEProblem(OverTimes, Problem):
    """A stochastic differential equation dz = f(t, z[, x]) dt + g(t, z[, x]) dW from z(t_0) = z0, on given noise.

    The Brownian paths W are data, like inputs: the solution on them is a differentiable function of the parameters, and
    its NTK is that of the path. `mean_ntk` is the mean over paths.

    Args:
        f: the drift. In torch an nn.Module called on all trials at once, f(t, z [trial, unit]) or f(t, z, x_t [trial,
            input]), giving [trial, unit]; in JAX a callable pytree, called on one trial. Or a module with methods `f`
            and `g` as torchsde has them, in both frameworks, whose `sde_type` is read; or in JAX diffrax's
            MultiTerm(ODETerm(drift), ControlTerm(diffusion, path)): then g is None.
        g: the diffusion, called as f. It gives [trial, unit] for diagonal noise, one dW for each unit, or
            [trial, unit, noise] for any other; in JAX without the trials. Weights that f and g share count once.
        z0: the start [trial, unit], a torch tensor or a jax array, which decides the framework.
        t: an increasing grid of times at which the state is wanted, t_0 among them; or a span (t0, t1), with the state
            after each of the `steps` that `solve` is given.
        x: inputs that do not jump: None, samples or a callable, as those of an `ODEProblem`.
        brownian: the paths. An int is a seed: the increments are the same numbers in both frameworks. Or increments
            dW [trial, step, noise]; or a pair (times [n], W [trial, n, noise]) whose times hold the ends of all steps;
            or what gives increments: torchsde's BrownianInterval of size (trial, noise), any callable bm(ta, tb), or
            diffrax's VirtualBrownianTree of shape (trial, noise), or a list of trees of shape (noise,), one for each
            trial. Where there are several paths, [trial, path, ...] in arrays, and trial x path in the place of trial
            elsewhere, the paths of one trial next to each other.
        sde_type: "ito" or "stratonovich"; None for that of the module, or else "ito".
        paths: how many paths each trial has. The solution has trial x path trials, those of one next to each other.

    Raises:
        TypeError, ValueError: a start, times or inputs of a wrong type, or that do not fit together; a complex start;
            inputs that jump.
    Source: Kloeden, Platen, Numerical Solution of Stochastic Differential Equations, 1992; torchsde (Li et al.,
        arXiv:2001.01328).

    >>> import torch, kpflow_dyn as kp
    >>> drift, diffusion = kp.models.MLPField(3, 8), kp.models.MLPField(3, 8)
    >>> problem = kp.SDEProblem(drift, diffusion, torch.randn(2, 3), [0.0, 0.5, 1.0], brownian=1, paths=4)
    >>> kp.solve(problem, "euler", steps=0.1).state.shape
    torch.Size([8, 3, 3])
    """

    f: Any
    g: Any = None
    z0: Array = None  # type: ignore[assignment]
    t: Any = None
    x: Any = None
    brownian: Any = 0
    sde_type: str | None = None
    paths: int = 1
    pair: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.z0 is None or self.t is None:
            raise TypeError("an SDEProblem needs z0 [trial, unit] and times t: SDEProblem(f, g, z0, t)")
        backend, t = backend_for(self.z0, "z0", "[trial, unit]", self.f), check_forward_times(self.t)
        if is_complex(self.z0):
            raise TypeError("z0 is complex; give an SDE its real and imaginary parts side by side on the units")
        z0 = check_plain_start(self.z0, backend)
        x = check_inputs(self.x, z0, t, backend)
        if callable(x) and len(jumps_of(x)):
            raise ValueError("x jumps, and the steps of an SDE take it from both of their ends; give samples of it")
        if not isinstance(self.paths, int) or isinstance(self.paths, bool) or self.paths < 1:
            raise ValueError(f"paths is {self.paths!r}, expected how many Brownian paths each trial has, 1 or more")
        pair, brownian = backend.models.drift_and_diffusion(self.f, self.g)
        sde_type = self.sde_type or getattr(self.f, "sde_type", "ito")
        if sde_type not in SDE_TYPES:
            raise ValueError(f"sde_type is {sde_type!r}, expected 'ito' or 'stratonovich'")
        given = self.brownian if brownian is None else brownian
        self._set(backend=backend, t=t, z0=z0, x=x, pair=pair, sde_type=sde_type, brownian=given)

    @property
    def model(self) -> Any:
        """Drift and diffusion together, as `.f` and `.g`."""
        return self.pair

    def with_model(self, model: Any) -> "SDEProblem":
        """The same problem of another drift and diffusion together."""
        return self.remake(f=model, g=None)

    @property
    def trials(self) -> np.ndarray:
        """The trial that each trial of the solution is a path of [trial * path]."""
        return np.repeat(np.arange(len(self.z0)), self.paths)
