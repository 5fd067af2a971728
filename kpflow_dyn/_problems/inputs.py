"""The inputs x(t) of an ODE at any time, where they are not smooth, and the ODE of some of its trials."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, eps_of, like_numpy, side_by_side, take_at, to_numpy
from kpflow_dyn._backend import Backend
from kpflow_dyn._problems.checks import jumps_of
from kpflow_dyn._problems.problems import ODEProblem


class Driven(Protocol):
    """A problem with inputs x(t): an ODE, an SDE or a DDE."""

    @property
    def backend(self) -> Backend: ...
    @property
    def z0(self) -> Array: ...
    @property
    def t(self) -> Any: ...
    @property
    def x(self) -> Any: ...


def input_at(times: Array, samples: Array, t: Array, trial: Any = slice(None)) -> Array:
    """x(t) [trial, input], or one trial's [input], between samples [trial, n, input] at times [n]; t may be traced."""
    xp = array_namespace(samples)
    left = xp.clip(xp.searchsorted(times, t, side="right") - 1, 0, times.shape[0] - 2)
    along = xp.clip((t - times[left]) / (times[left + 1] - times[left]), 0, 1)
    return samples[trial, left] + along * (samples[trial, left + 1] - samples[trial, left])


def sampled(problem: Driven) -> tuple[np.ndarray, Array] | None:
    """The inputs' samples as (times [n], samples [trial, n, input]); None for callables and where there are none."""
    if problem.x is None or callable(problem.x):
        return None
    return problem.x if isinstance(problem.x, tuple) else (problem.t, problem.x)


def stops_of(problem: Driven) -> np.ndarray:
    """The times between t0 and the end at which a step should end, as the inputs x(t) are not smooth there [n].

    An error estimate does not see what happens between the stages of a step: a short pulse, for one. Samples bend at
    their times, all but those at which x goes on in a straight line for all trials; a callable jumps at its `jumps`.

    Args:
        problem: z' = f(t, z), which has no such times, or z' = f(t, z, x(t)).

    Raises:
        TypeError, ValueError: `jumps` that are no finite times [n].

    >>> import torch, kpflow_dyn as kp
    >>> pulse = torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0]).reshape(1, 6, 1)
    >>> start, times = torch.zeros(1, 8), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    >>> kp.ode.stops_of(kp.ODEProblem(kp.models.CTRNNField(8, 1), start, times, pulse))
    array([0.2, 0.3, 0.4])
    """
    found, (t0, end) = sampled(problem), problem.t[[0, -1]]
    times = jumps_of(problem.x) if found is None else _bends(*found)
    same = 4 * eps_of(problem.z0) * max(abs(t0), abs(end))  # as far as the dtype can tell
    return times[(times > t0 + same) & (times < end - same)]


def jumps_within(problem: ODEProblem) -> np.ndarray:
    """Those of the stops at which x(t) jumps, so that a step must take it from its own side [n]."""
    return stops_of(problem) if callable(problem.x) else np.zeros(0)


def _bends(times: np.ndarray, samples: Array) -> np.ndarray:
    """The inner times at which samples [trial, n, input] are not on the line through their neighbours."""
    x = to_numpy(samples).astype(np.float64)
    before, here, after = x[:, :-2], x[:, 1:-1], x[:, 2:]
    along = ((times[1:-1] - times[:-2]) / (times[2:] - times[:-2]))[:, None]
    round_off = 4 * eps_of(samples) * np.maximum(abs(before), abs(after))
    return times[1:-1][(abs(here - before - along * (after - before)) > round_off).any((0, 2))]


def input_function(problem: ODEProblem) -> Callable[[Array], Array] | None:
    """x(t) [trial, input] of a 0-dim t, its samples copied; None for a problem without inputs."""
    if problem.x is None:
        return None
    trials, found = len(problem.z0), sampled(problem)
    if found is None:
        return lambda t: _for_each(problem.x(t), trials)
    known, samples = found[0], array_namespace(found[1]).asarray(found[1], copy=True)
    times = like_numpy(known, samples)
    return lambda t: input_at(times, samples, t)


def _for_each(x: Array, trials: int) -> Array:
    """[trial, input] of a callable's [trial, input] or [input]."""
    return array_namespace(x).broadcast_to(x, (trials, x.shape[-1]))


def inputs_at(problem: Driven, times: np.ndarray) -> Array | None:
    """The inputs x [trial, n, input] at times [trial, n] of each trial, None for a problem without any."""
    if problem.x is None:
        return None
    found = sampled(problem)
    if found is None:
        return problem.backend.data.inputs_at(problem.x, times, problem.z0)
    known, samples = found
    left = np.clip(np.searchsorted(known, times, side="right") - 1, 0, len(known) - 2)
    along = np.clip((times - known[left]) / (known[left + 1] - known[left]), 0, 1)
    before, after = (take_at(samples[None], places)[0] for places in (left, left + 1))
    return before + like_numpy(along[..., None], samples) * (after - before)


def time_rows(problem: ODEProblem, times: np.ndarray) -> Array:
    """Rows [t, x(t)] at times [trial, n]."""
    rows, x = like_numpy(times[..., None].copy(), problem.z0), inputs_at(problem, times)
    return rows if x is None else side_by_side([rows, x], axes=2)


def input_slopes(problem: ODEProblem, times: np.ndarray) -> Array:
    """dx/dt [trial, n, input] at times [trial, n] of each trial; where it jumps, of what comes after."""
    found = sampled(problem)
    if found is None:
        x, data = problem.x, problem.backend.data
        jvp = problem.backend.transforms.jvp
        return data.inputs_at(lambda t: jvp(x, (t,), (0 * t + 1,))[1], times, problem.z0)
    known, samples = found
    left = np.clip(np.searchsorted(known, times, side="right") - 1, 0, len(known) - 2)
    before, after = (take_at(samples[None], places)[0] for places in (left, left + 1))
    inside = (times >= known[0]) & (times < known[-1])
    return like_numpy((inside / (known[left + 1] - known[left]))[..., None], samples) * (after - before)


def input_width(problem: Driven) -> int | None:
    """How many input channels there are, None for a problem without any."""
    if callable(x := problem.x):
        first: Any = x(like_numpy(np.asarray(problem.t[0]), problem.z0))
        return first.shape[-1]
    found = sampled(problem)
    return None if found is None else found[1].shape[-1]


def input_row(x: Array, trial: Any) -> Array:
    """One trial's x_t [input], of a callable's [trial, input] or [input]."""
    return x[trial] if x.ndim == 2 else x


@dataclass(frozen=True, eq=False)
class _OfTrials:
    """A callable input, of some of its trials."""

    of: Callable[[Array], Array]
    trials: np.ndarray

    @property
    def jumps(self) -> np.ndarray:
        return jumps_of(self.of)

    def __call__(self, t: Array) -> Array:
        return input_row(self.of(t), self.trials)


def take_trials(problem: ODEProblem, trials: np.ndarray) -> ODEProblem:
    """The problem of some of the trials."""
    if callable(problem.x):
        x = _OfTrials(problem.x, trials)
    elif isinstance(problem.x, tuple):
        x = (problem.x[0], problem.x[1][trials])
    else:
        x = None if problem.x is None else problem.x[trials]
    encoded = None if problem.encoded is None else problem.encoded[trials]
    return problem.with_parts(z0=problem.z0[trials], x=x, encoded=encoded)
