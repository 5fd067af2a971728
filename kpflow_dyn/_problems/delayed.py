"""Delay differential equations: a field that also sees the state at earlier times, and the history before t0."""

from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from kpflow_dyn._arrays import Array, is_array, like_numpy, to_numpy
from kpflow_dyn._backend import backend_of, backend_of_state
from kpflow_dyn._problems.checks import check_forward_times, check_inputs, check_real, jumps_of
from kpflow_dyn._problems.forms import DelayedForm, Form, arguments_for
from kpflow_dyn._problems.problems import OverTimes


@dataclass(frozen=True, repr=False)
class DDEProblem(OverTimes):
    """A delay differential equation z'(t) = f(t, z(t), (z(t - tau_1), z(t - tau_2), ...)[, x(t)]).

    Args:
        f: in torch an nn.Module called on all trials at once, f(t, z [trial, unit], delayed) with `delayed` a tuple of
            states [trial, unit], one for each delay in their order; or f(t, z, delayed, x_t [trial, input]). In JAX a
            callable pytree, called on one trial.
        history: z(t) for t <= t0: a constant state [trial, unit], or a callable of t that gives [trial, unit], smooth,
            made of the framework's own functions. z(t0) is the start. Or such states as an array or a pytree of arrays
            [trial, ...], as those of an `ODEProblem`: then f gets and gives this form, delayed states too. A constant
            history may learn, by `.learn_start()` or `encoder`; a callable is data. With an encoder its data.
        t: an increasing grid of times at which the state is wanted, t0 first; or a span (t0, t1), with the state after
            each of the `steps` that `solve` is given.
        delays: tau_1, tau_2, ..., positive numbers in the units of t; a number for one.
        x: inputs that do not jump: None, samples or a callable, as those of an `ODEProblem`.
        args: constants of all trials, the last argument of f, as those of an `ODEProblem`.
        encoder: a model that gives the constant history, as that of an `ODEProblem` gives its start.

    Raises:
        TypeError, ValueError: a history, times, delays or inputs of a wrong type, or that do not fit together; delays
            that are no constants, as those that depend on the state or that learn.
    Source: Bellen, Zennaro, Numerical Methods for Delay Differential Equations, 2003.

    >>> import torch, kpflow_dyn as kp
    >>> class Feedback(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(3, 3)
    ...     def forward(self, t, z, delayed):
    ...         return torch.tanh(self.layer(delayed[0])) - z
    >>> problem = kp.DDEProblem(Feedback(), torch.ones(2, 3), [0.0, 0.5, 1.0], delays=0.4)
    >>> kp.solve(problem, "rk4", steps=0.1).state.shape
    torch.Size([2, 3, 3])
    """

    f: Any
    history: Any
    t: Any
    delays: Any
    x: Any = None
    args: Any = field(default=None, kw_only=True)
    encoder: Any = field(default=None, kw_only=True)
    z0: Array = field(init=False, repr=False, compare=False)
    encoded: Any = field(init=False, repr=False, compare=False, default=None)
    form: Form = field(init=False, repr=False, compare=False)
    given_as = "history"
    instead_of_jumps = "a control that acts late is kp.models.ClosedLoop(..., every=dt, delay=tau), in a kp.ODEProblem"

    def __post_init__(self) -> None:
        self._take_data(self.x)
        t, delays, start = check_forward_times(self.t), _checked(self.delays), self.history
        if self.varies:
            if self.encoder is not None:
                raise ValueError(
                    "the history is a function of time, and what learns is a constant one: pass it, or the data that "
                    "the encoder gives it from, as history="
                )
            start = start(like_numpy(np.asarray(t[0]), _first_parameter(self.f)))
        self._set(backend=backend_of_state(start, self.f))
        layout, z0 = self._laid_out(start)
        check_real(layout, "the history", "a DDE")
        x, models = check_inputs(self.x, z0, t, self.backend), self.backend.models
        if callable(x) and len(jumps_of(x)):
            raise ValueError("x jumps, and delayed states would have kinks that the steps do not know; give samples")
        form, f = DelayedForm(layout), models.field_of(self.f)
        arguments = arguments_for(models.function_of(f), self.args, ["t", "z", "delayed", *["x_t"] * (x is not None)])
        f = f if form.is_plain and not arguments else models.in_form(f, form, arguments)
        self._set(f=f, t=t, delays=delays, x=x, z0=z0, form=form)

    @property
    def varies(self) -> bool:
        """Whether the history is a function of time."""
        return callable(self.history)

    @property
    def start_given(self) -> Any:
        if not self.varies:
            return super().start_given
        times = self.t[0] - np.array([0.0, *self.delays])
        return self.history, [self.history(like_numpy(t, self.z0)) for t in times]

    def learn_start(self) -> Self:
        if self.varies:
            raise ValueError("the history is a function of time, which does not learn; a constant one does: history=z0")
        return super().learn_start()

    def _given(self, changes: dict[str, Any]) -> dict[str, Any]:
        given = {} if self.varies else super()._given(changes)
        return given | {"f": self.backend.models.field_of(self.f)}

    def before(self, times: np.ndarray) -> np.ndarray:
        """The history at times [n], [trial, n, unit]."""
        if not self.varies:
            return np.repeat(to_numpy(self.z0)[:, None], len(times), axis=1)
        found = [self._at(t) for t in times]
        return np.stack(found, 1) if found else np.zeros((len(self.z0), 0, self.z0.shape[1]))

    def _at(self, t: float) -> np.ndarray:
        return to_numpy(self.form.layout.join(self.history(like_numpy(np.asarray(t), self.z0)), "the history"))


def _first_parameter(f: Any) -> Any:
    """An array that f holds, which says what framework a callable history belongs to."""
    backend = backend_of(f)
    if backend is None or not (found := backend.models.parameters_of(f)):
        raise TypeError("f holds no parameters, so there is nothing to learn; pass an nn.Module or an equinox module")
    return next(iter(found.values()))


def _checked(delays: Any) -> tuple[float, ...]:
    """The delays as numbers."""
    given = delays if isinstance(delays, tuple | list) or (is_array(delays) and np.ndim(delays)) else [delays]
    if any(callable(delay) for delay in given):
        raise TypeError(
            "a delay is a function, and delays that depend on the state or on time are not supported; give "
            "constant numbers"
        )
    if any(getattr(delay, "requires_grad", False) for delay in given):
        raise TypeError("a delay requires a gradient, and delays that learn are not supported; give constant numbers")
    try:
        found = tuple(float(delay) for delay in given)
    except (TypeError, ValueError) as error:
        raise TypeError(f"delays is {delays!r}, expected positive numbers tau_1, tau_2, ...") from error
    if not found or not all(0 < delay < float("inf") for delay in found):
        raise ValueError(
            f"delays is {delays!r}, expected one or more positive, finite numbers; what is not delayed is z"
        )
    return found
