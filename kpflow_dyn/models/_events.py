"""What happens to the state of a hybrid model, and when."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from kpflow_dyn._problems.checks import check_times
from kpflow_dyn._problems.translations import refuse_unknown
from kpflow_dyn._shown import type_name


@dataclass(frozen=True, eq=False)
class Event:
    """A jump of the state, z <- reset(t, z), where a condition crosses zero, or at given times.

        z <- reset(t, z)    where condition(t, z) = 0, or at given times

    Condition and reset are called as the flow is: with the state in its form, with x_t if the problem has inputs, and
    then with args if it has these, (t, z, x_t, args). For an equation of second order this is (t, z, z', x_t, args).

    The event changes only what `reset` changes. `reset` is called on the state before the jump. Other packages call it:
    `diffrax.Event` and torchdiffeq's `odeint_event` (which end a solve there), SciML's ContinuousCallback (of a
    condition) and DiscreteCallback or PeriodicCallback (at given times), solve_ivp's events.

    Args:
        condition: (t, z, ...) -> c: in torch c [trial] of z [trial, unit], in JAX c [] of z [unit]. The event is where
            c crosses zero. None for given times. It may have parameters.
        reset: (t, z, ...) -> z, the whole state in its form; for second order the pair (z, z'). Modules of torch, and
            pytrees of JAX, learn.
        direction: 1 if c crosses from below to above, -1 from above to below, 0 for both; or, as in diffrax, True,
            False and None for these. The direction is that in which a solve meets the crossing. If time runs backward,
            c is seen as time decreases, as in scipy.
        at: given times [n], in the unit of t.
        every: the time between events. The first event is at t0 + offset. If time runs backward, it is at t0 - offset,
            and the other events are before it.
        offset: the time from t0 to the first event.

    Raises:
        TypeError, ValueError: no reset; not exactly one of condition, at and every; or numbers that are not times.
    Source: Hybrid systems and their derivatives: Kong, Payne, Zhu, Johnson, "Saltation matrices: the essential tool for
        linearizing hybrid dynamical systems", arXiv:2306.06862.

    Example as `Hybrid`.
    """

    condition: Callable[..., Any] | None = None
    reset: Callable[..., Any] | None = None
    direction: int | bool | None = 0
    at: Sequence[float] | None = None
    every: float | None = None
    offset: float = 0.0

    def __new__(cls, *_args: Any, **given: Any) -> Self:
        """Raise for names that it does not know, by what these are called here."""
        refuse_unknown(given, [field.name for field in fields(cls)], cls.__name__, cls.__name__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.condition, self.at, self.every)) != 1:
            raise ValueError(
                "an event has just one of condition (a function of t and z that crosses zero), at (times) and every (a "
                "time)"
            )
        if not callable(self.reset) or not (self.condition is None or callable(self.condition)):
            got = {name: getattr(self, name) for name in ("reset", "condition")}
            named = [f"{name} is {None if value is None else type_name(value)}" for name, value in got.items()]
            raise TypeError(
                f"{' and '.join(named)}, expected functions of (t, z), or (t, z, x) "
                "where there are inputs; a reset that changes nothing is lambda t, z: z"
            )
        object.__setattr__(self, "direction", _direction(self.direction))
        if self.every is not None and not (np.isfinite(self.every) and self.every > 0 and np.isfinite(self.offset)):
            raise ValueError(f"every = {self.every} and offset = {self.offset}, expected a positive time and a time")
        if self.at is not None:
            times = np.atleast_1d(np.asarray(self.at, np.float64))
            given = tuple((check_times(times) if len(times) > 1 else times).tolist())
            object.__setattr__(self, "at", given)

    def times(self, t0: float, end: float) -> np.ndarray:
        """The given times from t0 to the end [n], these included, in this order."""
        return given_times(self.at, self.every, self.offset, t0, end)


def _direction(given: Any) -> int:
    """The direction as 1, -1 or 0."""
    if given is None:
        return 0
    if isinstance(given, bool | np.bool_):
        return 1 if given else -1
    if not isinstance(given, int | np.integer) or given not in (-1, 0, 1):
        raise ValueError(
            f"direction is {given!r}, expected 1 or True (from below), -1 or False (from above), 0 or None (both)"
        )
    return int(given)


def given_times(at: Any, every: float | None, offset: float, t0: float, end: float) -> np.ndarray:
    """The times of an event from t0 to the end [n], these included, in this order."""
    if end < t0:
        return -given_times(None if at is None else -np.asarray(at)[::-1], every, offset, -t0, -end)
    if every is None:
        times = np.asarray(() if at is None else at, np.float64)
    else:
        count = int(np.floor((end - t0 - offset) / every + 1e-9)) + 1
        times = t0 + offset + every * np.arange(max(count, 0))
    same = 1e-12 * max(abs(t0), abs(end))
    return np.clip(times[(times >= t0 - same) & (times <= end + same)], t0, end)
