"""Stochastic differential equations: a drift, a diffusion, and the Brownian paths that drive them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array
from kpflow_dyn._backend import backend_of_state
from kpflow_dyn._problems.checks import check_forward_times, check_inputs, check_real, jumps_of
from kpflow_dyn._problems.forms import DiffusionForm, Form, arguments_for
from kpflow_dyn._problems.problems import OverTimes
from kpflow_dyn._shown import type_name

SDE_TYPES = ("ito", "stratonovich")


@dataclass(frozen=True, repr=False)
class SDEProblem(OverTimes):
    """A stochastic differential equation dz = f(t, z[, x]) dt + g(t, z[, x]) dW from z(t_0) = z0, on given noise.

    The Brownian paths W are data, like inputs: the solution on them is a differentiable function of the parameters, and
    its NTK is that of the path. `mean_ntk` is the mean over paths.

    Args:
        f: the drift. In torch an nn.Module called on all trials at once, f(t, z [trial, unit]) or f(t, z, x_t [trial,
            input]), giving [trial, unit]; in JAX a callable pytree, called on one trial. Or a module with methods `f`
            and `g` as torchsde has them, in both frameworks, whose `sde_type` is read; or in JAX diffrax's
            MultiTerm(ODETerm(drift), ControlTerm(diffusion, path)): then g is None, SDEProblem(sde, None, z0, t), and
            the path is the term's, unless that is None.
        g: the diffusion, called as f. It gives [trial, unit] for diagonal noise, one dW for each unit, or
            [trial, unit, noise] for any other; in JAX without the trials. Weights that f and g share count once.
        z0: the start [trial, unit], a torch tensor or a jax array, which decides the framework. Or an array or a pytree
            of arrays [trial, ...], as that of an `ODEProblem`: then f gives this form, and g gives it too, with one dW
            for each number, or with an axis of noise behind each array. With an encoder its data.
        t: an increasing grid of times at which the state is wanted, t_0 among them; or a span (t0, t1), with the state
            after each of the `steps` that `solve` is given.
        x: inputs that do not jump: None, samples or a callable, as those of an `ODEProblem`.
        brownian: the paths; None for the path of a ControlTerm, or else the seed 0. An int is a seed: the increments
            are the same numbers in both frameworks. Or increments dW [trial, step, noise]; or a pair (times [n],
            W [trial, n, noise]) whose times hold the ends of all steps; or what gives increments: torchsde's
            BrownianInterval of size (trial, noise), any callable bm(ta, tb), or
            diffrax's VirtualBrownianTree of shape (trial, noise), or a list of trees of shape (noise,), one for each
            trial. Where there are several paths, [trial, path, ...] in arrays, and trial x path in the place of trial
            elsewhere, the paths of one trial next to each other.
        sde_type: "ito" or "stratonovich"; None for that of the module, or else "ito".
        paths: how many paths each trial has. The solution has trial x path trials, those of one next to each other.
        args: constants of all trials, the last argument of f and of g, as those of an `ODEProblem`.
        encoder: a model that gives the start, as that of an `ODEProblem`; all paths of a trial start there. The
            parameters of f and g then have `sde.` in front.

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
    brownian: Any = None
    sde_type: str | None = None
    paths: int = 1
    args: Any = field(default=None, kw_only=True)
    encoder: Any = field(default=None, kw_only=True)
    encoded: Any = field(init=False, repr=False, compare=False, default=None)
    form: Form = field(init=False, repr=False, compare=False)
    pair: Any = field(init=False, repr=False, compare=False)
    instead_of_jumps = (
        "pose kp.ODEProblem(hybrid, z0, t, x) with the noise as its input x: as a force in the flow, or as kicks in an "
        "event of its own, kp.models.Event(reset=lambda t, z, x: z + g(z) * x, every=dt), by samples x of variance dt"
    )

    def __post_init__(self) -> None:
        self._take_data(self.x)
        if self.g is not None and not callable(self.g):
            raise TypeError(
                f"g is {type_name(self.g)}, expected the diffusion; of an sde with methods f and g leave its place "
                "empty: SDEProblem(sde, None, y0, ts)"
            )
        if self.z0 is None or self.t is None:
            raise TypeError("an SDEProblem needs z0 [trial, unit] and times t: SDEProblem(f, g, z0, t)")
        self._set(backend=backend_of_state(self.z0, self.f))
        t, (layout, z0) = check_forward_times(self.t), self._laid_out(self.z0)
        check_real(layout, "z0", "an SDE")
        x = check_inputs(self.x, z0, t, self.backend)
        if callable(x) and len(jumps_of(x)):
            raise ValueError("x jumps, and the steps of an SDE take it from both of their ends; give samples of it")
        if not isinstance(self.paths, int) or isinstance(self.paths, bool) or self.paths < 1:
            raise ValueError(f"paths is {self.paths!r}, expected how many Brownian paths each trial has, 1 or more")
        models = self.backend.models
        pair, path = models.drift_and_diffusion(self.f, self.g)
        sde_type = self.sde_type or getattr(self.f, "sde_type", "ito")
        if sde_type not in SDE_TYPES:
            raise ValueError(f"sde_type is {sde_type!r}, expected 'ito' or 'stratonovich'")
        given = ["t", "z", *["x_t"] * (x is not None)]
        of_drift, of_noise = (arguments_for(models.function_of(part), self.args, given) for part in (pair.f, pair.g))
        if not layout.is_plain or of_drift or of_noise:
            pair = models.pair_in_form(pair, (Form(layout), DiffusionForm(layout)), (of_drift, of_noise))
        brownian = self.brownian if path is None else self._path_of_term(path)
        brownian = 0 if brownian is None else brownian
        self._set(t=t, z0=z0, x=x, form=Form(layout), pair=pair, sde_type=sde_type, brownian=brownian)

    def _path_of_term(self, path: Any) -> Any:
        if self.brownian is None or self.brownian is path:
            return path
        raise ValueError(
            "the ControlTerm has a path, and brownian= is given beside it; leave one out: ControlTerm(g, None) with "
            "brownian=, or the term alone"
        )

    @property
    def source(self) -> str:
        """Where the paths come from, in words."""
        path = self.backend.models.drift_and_diffusion(self.f, self.g)[1]
        return "brownian" if path is None else "the path of the ControlTerm"

    def remake(self, **changes: Any) -> "SDEProblem":
        if "brownian" in changes and "f" not in changes:  # in the place of the path of a ControlTerm
            changes = self._holding(self.pair) | changes
        return super().remake(**changes)

    @property
    def of_states(self) -> Any:
        """Drift and diffusion together, as `.f` and `.g`."""
        return self.pair

    @property
    def model_name(self) -> str:
        return "sde"

    def _holding(self, of_states: Any) -> dict[str, Any]:
        return {"f": of_states, "g": None}

    @property
    def trials(self) -> np.ndarray:
        """The trial that each trial of the solution is a path of [trial * path]."""
        return np.repeat(np.arange(len(self.z0)), self.paths)
