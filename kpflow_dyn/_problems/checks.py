"""What goes into a problem, checked: rows of data, and an ODE's times, start and inputs."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, concretely, finite_rows, is_finite, like_numpy, to_numpy
from kpflow_dyn._arrays.complex_numbers import in_halves, is_complex
from kpflow_dyn._backend import Backend, backend_for, backend_of


def check_times(t: Any, name: str = "t") -> np.ndarray:
    """The times, a grid or a span (t0, t1), as float64: one row of at least two finite, increasing numbers."""
    try:
        times = np.array(to_numpy(t), np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} is {type(t).__name__}, expected numbers: a grid of times or a span (t0, t1)"
        ) from error
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"{name} has shape {times.shape}, expected a grid of times [time] or a span (t0, t1)")
    if not np.isfinite(times).all():
        raise ValueError(f"{name} holds {times[~np.isfinite(times)][0]}; times must be finite")
    if len(late := np.flatnonzero(np.diff(times) <= 0)):
        n = int(late[0])
        backward = name == "t" and len(late) == len(times) - 1 and times[-1] < times[0]
        raise ValueError(
            f"{name}[{n + 1}] = {times[n + 1]} does not come after {name}[{n}] = {times[n]}; times must increase "
            f"(np.unique sorts them and drops repeated ones){_BACKWARD if backward else ''}"
        )
    return times


_BACKWARD = (
    ". If time is to run backward from t[0], where the state is z0, go forward in s = t[0] - t: the field is then "
    "g(s, z) = -f(t[0] - s, z), the times are t[0] - t, the inputs x(t[0] - s)"
)


def check_start(z0: Any, backend: Backend) -> Array:
    """The start [trial, unit] as an array of the backend, of finite float32 or float64."""
    z0 = in_halves(backend.data.as_floats(z0, "z0", "[trial, unit]"))
    if z0.ndim != 2:
        raise ValueError(f"z0 has shape {tuple(z0.shape)}, expected [trial, unit]; one trial is z0[None]")
    if 0 in z0.shape:
        raise ValueError(f"z0 has shape {tuple(z0.shape)} [trial, unit]: a solve needs at least one of each")
    if str(z0.dtype).removeprefix("torch.") not in ("float32", "float64"):
        raise TypeError(f"z0 is {z0.dtype}, expected float32 or float64")
    if not is_finite(z0):
        raise ValueError("z0 holds NaN or inf; clean the data")
    return z0


def check_sequence(x: Array) -> None:
    """Raise unless x is finite and [trial, time, input] with no empty axis."""
    if x.ndim != 3:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected [trial, time, input]; add the missing axis with x[None]"
        )
    if is_complex(x):
        raise TypeError(
            f"x is {x.dtype}; give its real and imaginary parts side by side on the last axis, and put them together "
            "in the cell"
        )
    if 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} [trial, time, input]: an analysis needs at least one of each")
    check_finite(x, "x")


def check_finite(values: Array, what: str, advice: str = "clean the data or look at the weights") -> None:
    """Raise for NaN or inf in data [trial, time, unit], naming the first time and a trial."""
    with concretely(values):  # a problem may be posed inside of a jit whose model alone is traced
        bad = ~finite_rows(values)
    if bad.any():
        time = int(np.flatnonzero(bad.any(0))[0])
        trial = int(np.flatnonzero(bad[:, time])[0])
        raise ValueError(f"{what} holds NaN or inf, first at step {time} (trial {trial}); {advice}")


def cell_start(sizes: Sequence[int | None], x: Array, z0: Any, as_part: Callable[[Any], Array]) -> Array:
    """z0 [trial, unit] of inputs x, the parts of a state of these sizes side by side; zeros when None.

    Raises:
        TypeError, ValueError: for parts that `as_part` refuses, or that do not fit x or each other.
    """
    units = None if None in sizes else sum(size or 0 for size in sizes)
    if z0 is None and units is None:
        raise ValueError("the cell has no hidden_size attribute, so its state size is unknown; pass z0 [trial, unit]")
    xp = array_namespace(x)
    with concretely(x):
        given = [np.zeros((len(x), units or 0))] if z0 is None else z0 if isinstance(z0, tuple | list) else [z0]
        parts = [like_numpy(given[0], x)] if z0 is None else [in_halves(as_part(part)) for part in given]
        if len({tuple(part.shape[:-1]) for part in parts}) > 1:
            shapes = [tuple(part.shape) for part in parts]
            raise ValueError(f"the parts of z0 have shapes {shapes}; they must have the same trials")
        start = parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1)
        start = xp.broadcast_to(start, (len(x), *start.shape)) if start.ndim == 1 else start
        expected = len(x), start.shape[-1] if units is None else units
        if tuple(start.shape) != expected:
            raise ValueError(
                f"z0 has shape {tuple(start.shape)}, expected [trial, unit] = {list(expected)} as x has {len(x)} trials"
            )
        if start.dtype != x.dtype:
            raise TypeError(f"z0 is {start.dtype}, x is {x.dtype}; they must agree")
        if not is_finite(start):
            raise ValueError("z0 holds NaN or inf")
    return start


def check_width(cell: Any, x: Array) -> None:
    """Raise where a cell says that it takes another number of input channels."""
    width = getattr(cell, "input_size", None)
    if isinstance(width, int) and x.shape[-1] != width:
        raise ValueError(f"x has {x.shape[-1]} input channels, but the cell takes {width}; x is [trial, time, input]")


def check_rows(x: Any, what: str, axes: str) -> Array:
    """Data of torch or JAX, finite floats or integers; numpy arrays become those of JAX."""
    x = check_argument(x, what, axes, backend_for(x, what, axes))
    if not is_finite(x):
        raise ValueError(f"{what} holds NaN or inf; clean the data")
    return x


def check_argument(x: Any, what: str, axes: str, backend: Backend) -> Array:
    """The same where infinite entries have a meaning, as in masks that are added to scores."""
    x = backend.data.as_rows(x, what, axes)
    if x.ndim < 1 or 0 in x.shape:
        raise ValueError(f"{what} has shape {tuple(x.shape)}, expected {axes} with at least one of each")
    if not bool((x == x).all()):
        raise ValueError(f"{what} holds NaN; clean the data")
    return x


def check_inputs(x: Any, z0: Array, t: np.ndarray, backend: Backend) -> Any:
    """The inputs: None, a callable, samples on t, or (times, samples) that cover it; samples fit the start."""
    refuse_foreign_event(x)
    if x is None or callable(x):
        jumps_of(x)
        return x
    if isinstance(x, tuple | list):
        if len(x) != 2:
            raise ValueError(f"x is a {type(x).__name__} of {len(x)} parts, expected (times [n], samples)")
        times, samples = check_times(x[0], "x's times"), _check_samples(x[1], z0, backend)
        if times[0] > t[0] or times[-1] < t[-1]:
            raise ValueError(
                f"the times of x reach from {times[0]} to {times[-1]}, which does not cover the horizon from {t[0]} to "
                f"{t[-1]}; bring longer samples or a shorter t"
            )
    elif len(t) == 2:
        raise ValueError("x are samples on a span (t0, t1), so their times are unknown; pass x=(times, samples)")
    else:
        times, samples = t, _check_samples(x, z0, backend)
    if samples.shape[1] != len(times):
        raise ValueError(
            f"x has {samples.shape[1]} samples for {len(times)} times; samples on the grid t are [trial, time, input], "
            "others come as x=(times, samples)"
        )
    return (times, samples) if isinstance(x, tuple | list) else samples


def refuse_foreign_event(value: Any) -> None:
    """Raise a TypeError that names ours where this is an event of diffrax."""
    if hasattr(value, "cond_fn"):
        raise TypeError(
            "a diffrax.Event ends a solve. Here events are part of the model, which goes on behind them: pose "
            "kp.ODEProblem(kp.models.Hybrid(f, kp.models.Event(condition, reset, direction=...)), z0, t), with "
            "condition(t, z) a number that crosses zero, and read solution.events"
        )


def jumps_of(x: Any) -> np.ndarray:
    """The times at which a callable input says that it jumps, `x.jumps`, in their order; none where it does not."""
    given = getattr(x, "jumps", ())
    try:
        jumps = np.array(to_numpy(given), np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"x.jumps is {type(given).__name__}, expected the times at which x jumps [n]") from error
    if jumps.ndim != 1 or not np.isfinite(jumps).all():
        raise ValueError(f"x.jumps is {given}, expected the times at which x jumps [n], all finite")
    return np.unique(jumps)


def _check_samples(samples: Any, z0: Array, backend: Backend) -> Array:
    if backend_of(samples) not in (None, backend):
        raise TypeError(f"x is {type(samples).__name__} but z0 is {type(z0).__name__}; use one framework")
    samples = backend.data.as_floats(samples, "x", "[trial, time, input]")
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
