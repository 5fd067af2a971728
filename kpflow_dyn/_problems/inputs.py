"""What goes into an ODE: its times, its start and its inputs x(t), checked, and x read at any time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import (
    Array,
    array_namespace,
    is_jax_array,
    is_torch_array,
    is_torch_module,
    like_numpy,
    take_at,
    to_numpy,
)

if TYPE_CHECKING:
    from kpflow_dyn._problems.problems import ODEProblem


def check_times(t: Any) -> np.ndarray:
    """The times as a float64 numpy array: a grid, or a span (t0, t1).

    Raises:
        TypeError, ValueError: unless they are one row of at least two finite, increasing numbers.
    """
    try:
        times = np.array(to_numpy(t), np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"t is {type(t).__name__}, expected numbers: a grid of times or a span (t0, t1)") from error
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"t has shape {times.shape}, expected a grid of times [time] or a span (t0, t1)")
    if not np.isfinite(times).all():
        raise ValueError(f"t holds {times[~np.isfinite(times)][0]}; times must be finite")
    late = np.flatnonzero(np.diff(times) <= 0)
    if len(late):
        n = int(late[0])
        raise ValueError(
            f"t[{n + 1}] = {times[n + 1]} does not come after t[{n}] = {times[n]}; times must increase (np.unique "
            "sorts them and drops repeated ones)"
        )
    return times


def check_start(z0: Any, f: Any) -> Array:
    """The start [trial, unit] as an array of its framework.

    Raises:
        TypeError, ValueError: for another rank, an empty axis, a dtype that is not float32 or float64, NaN or inf.
    """
    z0 = _as_array(z0, f, "z0", "[trial, unit]")
    if z0.ndim != 2:
        raise ValueError(f"z0 has shape {tuple(z0.shape)}, expected [trial, unit]; one trial is z0[None]")
    if 0 in z0.shape:
        raise ValueError(f"z0 has shape {tuple(z0.shape)} [trial, unit]: a solve needs at least one of each")
    if str(z0.dtype).removeprefix("torch.") not in ("float32", "float64"):
        raise TypeError(f"z0 is {z0.dtype}, expected float32 or float64")
    if not _is_finite(z0):
        raise ValueError("z0 holds NaN or inf; clean the data")
    return z0


def check_rows(x: Any, what: str, axes: str) -> Array:
    """Floats or integers of torch or JAX; numpy arrays become jax arrays.

    Raises:
        TypeError, ValueError: other types, complex numbers, an empty axis, NaN or inf.
    """
    if not is_torch_array(x):
        if not (is_jax_array(x) or isinstance(x, np.ndarray)):
            raise TypeError(f"{what} is {type(x).__name__}, expected a torch tensor or a jax array {axes}")
        import jax.numpy as jnp

        from kpflow_dyn._arrays.sharding import by_trials
        from kpflow_dyn._jax.checks import as_jax

        x = as_jax(x, what, axes) if jnp.issubdtype(x.dtype, np.floating) else by_trials(jnp.asarray(x))
    if x.ndim < 1 or 0 in x.shape:
        raise ValueError(f"{what} has shape {tuple(x.shape)}, expected {axes} with at least one of each")
    if "complex" in str(x.dtype):
        raise TypeError(f"{what} is {x.dtype}; write complex numbers as pairs of real ones")
    if not _is_finite(x):
        raise ValueError(f"{what} holds NaN or inf; clean the data")
    return x


def _is_finite(a: Array) -> bool:
    return bool(array_namespace(a).isfinite(a).all())


def _as_array(a: Any, like: Any, what: str, axes: str) -> Array:
    """Torch and jax arrays as they are, numpy arrays as jax ones where the problem is one of JAX."""
    if is_torch_array(a):
        return a
    of_jax = isinstance(a, np.ndarray) and not (is_torch_array(like) or is_torch_module(like))
    if not (is_jax_array(a) or of_jax):
        raise TypeError(f"{what} is {type(a).__name__}, expected a torch tensor or a jax array {axes}")
    from kpflow_dyn._jax.checks import as_jax

    return as_jax(a, what, axes)


def check_inputs(x: Any, z0: Array, t: np.ndarray) -> Any:
    """The inputs: None, a callable, samples on t, or (times, samples).

    Raises:
        TypeError, ValueError: for samples of other trials, rank, dtype, framework or length than the problem's, or
            with times that do not cover the problem's.
    """
    if x is None or callable(x):
        return x
    if isinstance(x, tuple | list):
        if len(x) != 2:
            raise ValueError(f"x is a {type(x).__name__} of {len(x)} parts, expected (times [n], samples)")
        times, samples = check_times(x[0]), _check_samples(x[1], z0)
        if times[0] > t[0] or times[-1] < t[-1]:
            raise ValueError(
                f"the times of x reach from {times[0]} to {times[-1]}, which does not cover the horizon from {t[0]} to "
                f"{t[-1]}; bring longer samples or a shorter t"
            )
    elif len(t) == 2:
        raise ValueError("x are samples on a span (t0, t1), so their times are unknown; pass x=(times, samples)")
    else:
        times, samples = t, _check_samples(x, z0)
    if samples.shape[1] != len(times):
        raise ValueError(
            f"x has {samples.shape[1]} samples for {len(times)} times; samples on the grid t are [trial, time, input], "
            "others come as x=(times, samples)"
        )
    return (times, samples) if isinstance(x, tuple | list) else samples


def _check_samples(samples: Any, z0: Array) -> Array:
    samples = _as_array(samples, z0, "x", "[trial, time, input]")
    if is_torch_array(samples) != is_torch_array(z0):
        raise TypeError(f"x is {type(samples).__name__} but z0 is {type(z0).__name__}; use one framework")
    if samples.ndim != 3 or samples.shape[0] != z0.shape[0] or 0 in samples.shape:
        raise ValueError(
            f"x has shape {tuple(samples.shape)}, expected samples [trial, time, input] of {z0.shape[0]} trials, as z0 "
            "has"
        )
    if samples.dtype != z0.dtype:
        raise TypeError(f"x is {samples.dtype} but z0 is {z0.dtype}; they must agree")
    bad = np.argwhere(~np.isfinite(to_numpy(samples)))
    if len(bad):
        raise ValueError(f"x holds NaN or inf, first at sample {bad[0][1]} (trial {bad[0][0]}); clean the data")
    return samples


def input_at(times: Array, samples: Array, t: Array, trial: Any = slice(None)) -> Array:
    """x(t) [trial, input] between samples [trial, n, input] at times [n]; t and trial may be traced.

    Args:
        times: of the samples, an array of their framework and dtype.
        samples: the inputs.
        t: a 0-dim array.
        trial: one trial's number, for its x(t) [input] alone.
    """
    xp = array_namespace(samples)
    left = xp.clip(xp.searchsorted(times, t, side="right") - 1, 0, times.shape[0] - 2)
    along = xp.clip((t - times[left]) / (times[left + 1] - times[left]), 0, 1)
    return samples[trial, left] + along * (samples[trial, left + 1] - samples[trial, left])


def sampled(problem: ODEProblem) -> tuple[np.ndarray, Array] | None:
    """The inputs' samples as (times [n], samples [trial, n, input]); None for callables and where there are none."""
    if problem.x is None or callable(problem.x):
        return None
    return problem.x if isinstance(problem.x, tuple) else (problem.t, problem.x)


def inputs_at(problem: ODEProblem, times: np.ndarray) -> Array | None:
    """The inputs x [trial, n, input] at times [trial, n] of each trial, None for a problem without any."""
    if problem.x is None:
        return None
    if callable(problem.x):
        return _called_at(problem, times)
    found = sampled(problem)
    assert found is not None
    known, samples = found
    left = np.clip(np.searchsorted(known, times, side="right") - 1, 0, len(known) - 2)
    along = np.clip((times - known[left]) / (known[left + 1] - known[left]), 0, 1)
    before, after = (take_at(samples[None], places)[0] for places in (left, left + 1))
    return before + like_numpy(along[..., None], samples) * (after - before)


def input_width(problem: ODEProblem) -> int | None:
    """How many input channels there are, None for a problem without any."""
    x = inputs_at(problem, np.full((len(problem.z0), 1), problem.t[0]))
    return None if x is None else x.shape[-1]


def _called_at(problem: ODEProblem, times: np.ndarray) -> Array:
    """x(t) at each time, called once where all trials share their times."""
    trials, shared = len(times), (times == times[:1]).all()
    if is_jax_array(problem.z0):
        import jax
        import jax.numpy as jnp

        at = jax.vmap(jax.vmap(lambda t, trial: input_row(problem.x(t), trial), (0, None)))
        return at(jnp.asarray(times, problem.z0.dtype), jnp.arange(trials))
    import torch

    rows = torch.as_tensor(np.ascontiguousarray(times), dtype=problem.z0.dtype, device=problem.z0.device)
    if shared:
        return torch.stack([problem.x(t).expand(trials, -1) for t in rows[0]], 1)
    return torch.stack([torch.stack([input_row(problem.x(t), i) for t in row]) for i, row in enumerate(rows)])


def input_row(x: Array, trial: Any) -> Array:
    """One trial's x_t [input], of a callable's [trial, input] or [input]."""
    return x[trial] if x.ndim == 2 else x


def check_called_input(x: Any, z0: Array) -> None:
    """Raise unless what a callable x gave at t0 is [trial, input] or [input], finite, in the dtype of z0."""
    same_kind = is_torch_array(x) == is_torch_array(z0) and (is_torch_array(x) or is_jax_array(x))
    if not same_kind:
        raise TypeError(f"x(t) is {type(x).__name__}, expected {type(z0).__name__} [trial, input] or [input]")
    if tuple(x.shape[:-1]) not in ((), (z0.shape[0],)) or x.ndim == 0 or 0 in x.shape:
        raise ValueError(
            f"x(t) has shape {tuple(x.shape)}, expected [trial, input] of {z0.shape[0]} trials, or [input] for all"
        )
    if x.dtype != z0.dtype:
        raise TypeError(f"x(t) is {x.dtype} but z0 is {z0.dtype}; they must agree")
    if not np.isfinite(to_numpy(x)).all():
        raise ValueError("x(t) holds NaN or inf at t0; look at its values")


class RowsOf:
    """A callable x, restricted to some trials."""

    def __init__(self, x: Any, trials: np.ndarray) -> None:
        self.x, self.trials = x, trials

    def __call__(self, t: Array) -> Array:
        """Its values at t."""
        return input_row(self.x(t), self.trials)


def take_trials(problem: ODEProblem, trials: np.ndarray) -> ODEProblem:
    """The problem of some of the trials."""
    if callable(problem.x):
        x = RowsOf(problem.x, trials)
    elif isinstance(problem.x, tuple):
        x = (problem.x[0], problem.x[1][trials])
    else:
        x = None if problem.x is None else problem.x[trials]
    return problem.remake(z0=problem.z0[trials], x=x)


def step_times(problem: ODEProblem, steps: Any, adaptive: bool, max_steps: int, method: str) -> np.ndarray | None:
    """The times between which the solver must step, from t0 to the end; None where it chooses itself.

    Raises:
        TypeError, ValueError: steps that are no increasing times from t0 to the end, or too many of them.
    """
    t0, end = problem.t[0], problem.t[-1]
    if steps is None and not adaptive and problem.is_span:
        raise ValueError(
            f"{method} does not choose its steps; on a span pass steps= (a length, or the times to step to), or give a "
            "grid t"
        )
    if steps is None:
        times = None if adaptive else problem.t
    elif isinstance(steps, int | float | np.number) and not isinstance(steps, bool):
        times = _on_grid(_constant_steps(t0, end, float(steps), max_steps), problem.t)
    else:
        times = _on_grid(_given_steps(t0, end, steps), problem.t)
    if times is not None:
        _check_count(len(times) - 1, max_steps)
    return times


def _check_count(count: float, max_steps: int) -> None:
    if count > max_steps:
        raise ValueError(f"steps asks for {count:.0f} steps, more than max_steps = {max_steps}; raise max_steps")


def _constant_steps(t0: float, end: float, length: float, max_steps: int) -> np.ndarray:
    if not (np.isfinite(length) and length > 0):
        raise ValueError(f"steps = {length}, expected a positive length")
    count = max(np.ceil((end - t0) / length - 1e-9), 1.0)
    _check_count(count, max_steps)
    return np.append(t0 + length * np.arange(int(count)), end)


def _on_grid(times: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The times; those that equal a time of the grid up to round-off are replaced by it."""
    right = np.clip(np.searchsorted(grid, times), 1, len(grid) - 1)
    nearest = np.where(times - grid[right - 1] < grid[right] - times, grid[right - 1], grid[right])
    return np.where(np.abs(times - nearest) <= _round_off(grid), nearest, times)


def _round_off(grid: np.ndarray) -> float:
    return 1e-13 * float(np.abs(grid).max())


def _given_steps(t0: float, end: float, steps: Any) -> np.ndarray:
    try:
        times = check_times(steps)
    except (TypeError, ValueError) as error:
        raise type(error)(f"steps must be None, a length or increasing times: {error}") from error
    if np.abs(times[[0, -1]] - [t0, end]).max() > _round_off(np.array([t0, end])):
        raise ValueError(
            f"steps reach from {times[0]} to {times[-1]}, expected from t0 = {t0} to the last time {end}; add them"
        )
    return times
