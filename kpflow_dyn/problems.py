"""Problems: a model together with its inputs and its start, posed before anything is computed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn.arrays import Array, is_jax_array, is_torch_array
from kpflow_dyn.inputs import check_inputs, check_start, check_times


@dataclass(frozen=True)
class DiscreteProblem:
    """A recurrent model z_t = cell(x_t, z_{t-1}), whose state is S = (z_1, ..., z_T) [trial, time, unit].

    Args:
        cell: torch's nn.RNN, nn.GRU or nn.LSTM with any number of layers, one of their Cells, or any nn.Module called
            as `cell(x_t, z)` with x_t [trial, input] and z [trial, unit] (or a tuple of such), giving the next z. Its
            trials must not influence each other. In JAX an equinox cell or any other callable pytree, called on one
            trial: x_t [input] and z [unit].
        x: inputs [trial, time, input], whatever the layer's `batch_first` says: a torch tensor or a jax array.
        z0: the state before the first step: [trial, unit]; [unit] for all trials; or torch's own h_0
            [layer, trial, unit] or (h_0, c_0). Zeros when None. The unit axis holds all layers' h one after another,
            then all layers' c.

    Example:
        >>> import torch
        >>> import kpflow_dyn as kp
        >>> problem = kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.zeros(2, 5, 3))
        >>> tuple(kp.solve(problem).state.shape)
        (2, 5, 8)
    """

    cell: Any
    x: Array
    z0: Any = None

    def __post_init__(self) -> None:
        if is_torch_array(self.x):
            from kpflow_dyn.torch_backend.checks import check_input

            check_input(self.x)
        elif is_jax_array(self.x) or isinstance(self.x, np.ndarray):
            from kpflow_dyn.jax_backend.checks import as_jax, check_input

            x = as_jax(self.x, "x", "[trial, time, input]")
            check_input(x)
            object.__setattr__(self, "x", x)
        else:
            raise TypeError(f"x is {type(self.x).__name__}, expected a torch tensor or jax array [trial, time, input]")

    def remake(self, **changes: Any) -> DiscreteProblem:
        """A copy with some fields replaced: `problem.remake(z0=...)`."""
        unknown = set(changes) - {field.name for field in dataclasses.fields(self)}
        if unknown:
            raise TypeError(f"remake got {sorted(unknown)}, expected some of cell, x, z0")
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class ODEProblem:
    """A model in continuous time, z' = f(t, z) or z' = f(t, z, x(t)) from z(t_0) = z0, for each trial.

    Args:
        f: in torch an nn.Module called on all trials at once, f(t, z [trial, unit]) or f(t, z, x_t [trial, input]) with
            t a 0-dim tensor, giving z' [trial, unit]; its trials must not influence each other. In JAX a pytree that is
            callable (an equinox module, `jax.tree_util.Partial(function, parameters)`), called on one trial as
            f(t, z [unit]) or f(t, z, x_t [input]), giving z' [unit].
        z0: the state at the first time [trial, unit], a torch tensor or a jax array, which decides the framework.
        t: an increasing grid of times, on which the state is wanted; or exactly two numbers (t0, t1), a span, for which
            the times are chosen by the solver (Gauss points of its steps).
        x: inputs: None; samples [trial, time, input] on the grid t; a pair (times [n], samples [trial, n, input]) whose
            times cover those of t; or a callable of t that gives [trial, input], or [input] for all trials, made of the
            framework's own functions. Samples are interpolated linearly in between, and held outside of their times.

    Raises:
        TypeError, ValueError: for a start, times or inputs that are no such thing or do not fit together.

    Example:
        >>> import torch
        >>> import kpflow_dyn as kp
        >>> class Decay(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.rate = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        ...     def forward(self, t, z):
        ...         return -self.rate * z
        >>> start = torch.ones(2, 1, dtype=torch.float64)
        >>> solution = kp.solve(kp.ODEProblem(Decay(), start, [0.0, 0.5, 1.0]))
        >>> tuple(solution.state.shape), round(float(solution.state[0, -1, 0]), 4)
        ((2, 3, 1), 0.3679)
    """

    f: Any
    z0: Array
    t: Any
    x: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "t", check_times(self.t))
        object.__setattr__(self, "z0", check_start(self.z0, self.f))
        object.__setattr__(self, "x", check_inputs(self.x, self.z0, self.t))

    @property
    def is_span(self) -> bool:
        """Whether t is a span (t0, t1) rather than a grid."""
        return len(self.t) == 2

    def remake(self, **changes: Any) -> ODEProblem:
        """A copy with some fields replaced: `problem.remake(z0=...)`."""
        unknown = set(changes) - {field.name for field in dataclasses.fields(self)}
        if unknown:
            raise TypeError(f"remake got {sorted(unknown)}, expected some of f, z0, t, x")
        return dataclasses.replace(self, **changes)
