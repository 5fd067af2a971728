"""The increments of Brownian paths along steps: drawn from a seed, or of paths that are given."""

from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, is_array, like_numpy, to_numpy
from kpflow_dyn._problems.checks import check_times
from kpflow_dyn._problems.stochastic import SDEProblem
from kpflow_dyn._shown import type_name


def increments(problem: SDEProblem, ends: np.ndarray, noise: int) -> Array:
    """dW [trial, step, noise] of the steps that end at these times, the first of which has length zero."""
    source: Any = problem.brownian
    trials = len(problem.trials)
    if isinstance(source, int | np.integer) and not isinstance(source, bool):
        if source < 0:
            raise ValueError(f"brownian is {source}, expected a seed that is no negative number")
        normal = np.random.default_rng(int(source)).standard_normal((trials, len(ends) - 1, noise))
        found = np.sqrt(np.diff(ends))[:, None] * normal
    elif isinstance(source, tuple) and len(source) == 2:
        found = _of_path(problem, *source, ends, noise)
    elif is_array(source):
        if str(getattr(source, "dtype", "")).startswith("key"):
            raise TypeError(
                "brownian is a key of jax.random; give an int, or diffrax's VirtualBrownianTree of that key"
            )
        found = _samples(problem, to_numpy(source), len(ends) - 1, noise, "increments dW", "step")
    else:
        found = _called(problem, source, ends, noise)
    if not np.isfinite(found).all():
        raise ValueError("the Brownian increments hold NaN or inf; look at " + problem.source)
    return like_numpy(np.concatenate([np.zeros((trials, 1, noise)), found], 1), problem.z0)


def _of_path(problem: SDEProblem, times: Any, path: Any, ends: np.ndarray, noise: int) -> np.ndarray:
    known = check_times(times, "the times of brownian")
    W = _samples(problem, to_numpy(path), len(known), noise, "the path W", "time")
    right = np.minimum(np.searchsorted(known, ends), len(known) - 1)
    left = np.maximum(right - 1, 0)
    nearest = np.where(ends - known[left] < known[right] - ends, left, right)
    if (missing := abs(known[nearest] - ends) > 1e-9 * max(abs(ends).max(), ends[-1] - ends[0])).any():
        raise ValueError(
            f"the Brownian path has no sample at t = {ends[missing][0]:.6g}, where a step ends, and a line between two "
            "samples is no Brownian path; give steps= whose ends are among its times, or a path with more of them"
        )
    return np.diff(W[:, nearest], axis=1)


def _samples(problem: SDEProblem, values: np.ndarray, count: int, noise: int, what: str, axis: str) -> np.ndarray:
    """Values [trial, n, noise], or [trial, path, n, noise], as the former."""
    trials, paths = len(problem.z0), problem.paths
    expected = (trials, paths, count, noise) if values.ndim == 4 else (trials * paths, count, noise)
    if values.shape != expected or (values.ndim == 3 and paths > 1):
        axes = f"[trial, path, {axis}, noise]" if paths > 1 else f"[trial, {axis}, noise]"
        wanted = [trials, paths, count, noise] if paths > 1 else [trials, count, noise]
        raise ValueError(f"{what} of brownian has shape {list(values.shape)}, expected {axes} = {wanted}")
    return values.astype(np.float64).reshape(trials * paths, count, noise)


def _called(problem: SDEProblem, source: Any, ends: np.ndarray, noise: int) -> np.ndarray:
    """The increments that an object, or one for each trial, gives for pairs of times."""
    trials, data, like = len(problem.trials), problem.backend.data, problem.z0
    each = source if isinstance(source, list) else [source]
    if not all(callable(getattr(one, "evaluate", one)) for one in each):
        raise TypeError(
            f"{problem.source} is {type_name(source)}, expected a seed, increments [trial, step, noise], a pair "
            "(times, path), a callable bm(ta, tb) such as torchsde's BrownianInterval, or diffrax's VirtualBrownianTree"
        )
    if _is_mapped(source):
        of_each = problem.backend.transforms.vmap(lambda path: data.increments(path.evaluate, ends, like))
        values = to_numpy(of_each(source))
    else:
        found = [to_numpy(data.increments(getattr(one, "evaluate", one), ends, like)) for one in each]  # [step, ...]
        alone = isinstance(source, list) or (trials == 1 and found[0].ndim == 2)
        values = np.stack(found) if alone else np.moveaxis(found[0], 0, 1)
    if values.shape != (trials, len(ends) - 1, noise):
        got = [*values.shape[:1], *values.shape[2:]]
        axes, paths = ("[trial x path, noise]", problem.paths) if problem.paths > 1 else ("[trial, noise]", 1)
        each_one = f"; {paths} paths for each of {len(problem.z0)} trials are meant, side by side" if paths > 1 else ""
        raise ValueError(f"{problem.source} gives increments {got}, expected {axes} = {[trials, noise]}{each_one}")
    return values.astype(np.float64)


def _is_mapped(source: Any) -> bool:
    """Whether it is a tree of diffrax for each trial, made by jax.vmap over their keys."""
    key: Any = getattr(source, "key", None)
    return hasattr(key, "ndim") and hasattr(source, "evaluate") and key.ndim > (not str(key.dtype).startswith("key"))
