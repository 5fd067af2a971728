"""What goes into a problem, checked: rows of data, and an ODE's times, start and inputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kpflow_dyn._arrays import (
    Array,
    array_namespace,
    concretely,
    finite_rows,
    is_array,
    is_finite,
    like_numpy,
    to_numpy,
)
from kpflow_dyn._arrays.complex_numbers import in_halves, is_complex
from kpflow_dyn._backend import Backend, backend_for, backend_of
from kpflow_dyn._problems.layouts import Layout, layout_of
from kpflow_dyn._shown import type_name


def check_times(t: Any, name: str = "t", advice: str = "") -> np.ndarray:
    """The times, a grid or a span (t0, t1), as float64: one row of at least two finite, increasing numbers."""
    try:
        times = np.array(to_numpy(t), np.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} is {type_name(t)}, expected numbers: a grid of times or a span (t0, t1)") from error
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"{name} has shape {times.shape}, expected a grid of times [time] or a span (t0, t1)")
    if not np.isfinite(times).all():
        raise ValueError(f"{name} holds {times[~np.isfinite(times)][0]}; times must be finite")
    if len(late := np.flatnonzero(np.diff(times) <= 0)):
        n = int(late[0])
        raise ValueError(
            f"{name}[{n + 1}] = {times[n + 1]} does not come after {name}[{n}] = {times[n]}; times must increase "
            f"(np.unique sorts them and drops repeated ones){advice}"
        )
    return times


def check_directed_times(t: Any) -> tuple[np.ndarray, bool]:
    """The times of an ODE as `check_times` has them, and whether they run backward: then they are those of -t."""
    try:
        times = np.array(to_numpy(t), np.float64)
    except (TypeError, ValueError):
        return check_times(t), False
    backward = times.ndim == 1 and len(times) > 1 and bool((np.diff(times) < 0).all())
    return check_times(-times if backward else times, advice="; or all decrease, for time backward"), backward


def check_forward_times(t: Any) -> np.ndarray:
    """The times of an equation that has no way back."""
    times, backward = check_directed_times(t)
    if backward:
        raise ValueError("the times t decrease, and an equation with noise or delays goes forward in time alone")
    return times


def laid_out_start(z0: Any, backend: Backend, order: int = 1) -> tuple[Layout, Array]:
    """The start [trial, unit] as an array of the backend, of finite float32 or float64, and how its parts lie there."""
    if is_array(z0) and z0.ndim < 2:
        raise ValueError(f"z0 has shape {tuple(z0.shape)}, expected [trial, unit]; one trial is z0[None]")
    layout, z0 = _laid_out(z0, backend)
    if order == 2:
        _check_pair(layout)
    if 0 in z0.shape:
        raise ValueError(f"z0 has shape {tuple(z0.shape)} [trial, unit]: a solve needs at least one of each")
    if str(z0.dtype).removeprefix("torch.") not in ("float32", "float64"):
        raise TypeError(f"z0 is {z0.dtype}, expected float32 or float64")
    if not is_finite(z0):
        raise ValueError("z0 holds NaN or inf; clean the data")
    return layout, z0


def check_real(layout: Layout, what: str, who: str) -> None:
    """Raise where a state has complex parts."""
    if any(layout.complexes):
        raise TypeError(f"{what} is complex; give {who} its real and imaginary parts side by side on the units")


def _laid_out(z0: Any, backend: Backend) -> tuple[Layout, Array]:
    found: list[Array] = []

    def as_part(leaf: Any) -> Array:
        found.append(part := backend.data.as_floats(leaf, "z0", "[trial, ...], or a pytree of such"))
        return part

    laid_out = layout_of(z0, backend.data.flattened, as_part)
    if len({str(part.dtype).replace("complex128", "float64").replace("complex64", "float32") for part in found}) > 1:
        raise TypeError(f"the parts of z0 are {', '.join(str(part.dtype) for part in found)}; they must agree")
    return laid_out


def _check_pair(layout: Layout) -> None:
    """Raise unless a state is a pair of two states of one form."""
    half, rest = divmod(len(layout.shapes), 2)
    alike = all(parts[:half] == parts[half:] for parts in (layout.shapes, layout.complexes))
    pair = layout.structure.unflatten(range(len(layout.shapes)))
    if rest or not alike or not isinstance(pair, tuple) or len(pair) != 2:
        raise ValueError(
            f"z0 is {layout}; of an equation of second order it is the pair (z, z') of position and velocity, both of "
            "one form"
        )


def check_sequence(x: Array) -> None:
    """Raise unless x is finite and [trial, time, input] with a trial and a time; width 0 is no input."""
    if x.ndim != 3:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected [trial, time, input]; add the missing axis with x[None]"
        )
    if is_complex(x):
        raise TypeError(
            f"x is {x.dtype}; give its real and imaginary parts side by side on the last axis, and put them together "
            "in the cell"
        )
    if 0 in x.shape[:2]:
        raise ValueError(f"x has shape {tuple(x.shape)} [trial, time, input]: an analysis needs a trial and a time")
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


def check_rows(x: Any, what: str, axes: str, model: Any = None) -> Array:
    """Data of a framework, finite floats or integers; numpy arrays become those of JAX, if the model is not torch's."""
    x = check_argument(x, what, axes, backend_for(x, what, axes, model))
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
    if isinstance(x, int | float | Mapping):
        raise TypeError(
            f"x is {type_name(x)}, expected inputs: samples [trial, time, input], (times, samples) or a function "
            "of t; constants of f are args="
        )
    if isinstance(x, tuple | list):
        if len(x) != 2:
            raise ValueError(f"x is a {type_name(x)} of {len(x)} parts, expected (times [n], samples)")
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
        raise TypeError(f"x.jumps is {type_name(given)}, expected the times at which x jumps [n]") from error
    if jumps.ndim != 1 or not np.isfinite(jumps).all():
        raise ValueError(f"x.jumps is {given}, expected the times at which x jumps [n], all finite")
    return np.unique(jumps)


def _check_samples(samples: Any, z0: Array, backend: Backend) -> Array:
    if backend_of(samples) not in (None, backend):
        raise TypeError(f"x is {type_name(samples)} but z0 is {type_name(z0)}; use one framework")
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
