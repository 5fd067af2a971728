"""A loss of outputs as a parabola at each trial and time, with its value and its slope, and its minimum at the least
loss that there is, in the directions and proportions of its own Hessian h:

    L = |f|^2 / 2        e = grad_y L = h^{1/2} f

For the squared error this is exact everywhere. For other losses it splits the loss at any one y into parts, as those of
orthogonal parts of f add up; how y moves is another matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kpflow_dyn._arrays import Array, like_numpy, to_numpy
from kpflow_dyn._backend import backend_for
from kpflow_dyn._learning.losses import OutputLoss
from kpflow_dyn._spaces.space import Space


@dataclass(frozen=True, eq=False)
class Parabola:
    """f [trial, time, out], and h^{1/2} at each place [trial time, out, out], where inner products are plain."""

    f: np.ndarray
    root: np.ndarray


def parabola(values: Array, loss: OutputLoss, space: Space) -> Parabola:
    """Of a loss about these outputs of a space."""
    w = np.ones(1) if space.measure is None else to_numpy(space.measure).astype(np.float64)
    y = to_numpy(values).astype(np.float64)
    of = {"squared_error": _of_squares, "cross_entropy": _of_classes}.get(loss.name)
    f, root = _of_function(values, loss, space) if of is None else of(y, loss)
    return Parabola(f, root / np.broadcast_to(w, y.shape).reshape((len(root), -1, 1)) ** 0.5)


def probabilities(loss: OutputLoss, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of the classes [trial, time, out], zeros where nothing counts, and weights [trial, time]."""
    target, m = (to_numpy(array) for array in (loss.target, loss.mask))
    if target.shape != shape:
        target = target.reshape(shape[:-1])[..., None] == np.arange(shape[-1])
    return target.astype(np.float64), m.astype(np.float64).reshape(shape[:-1])


def by_place(root: Array, rows: Array) -> Array:
    """Rows [b, trial time out] with this matrix applied at each place."""
    shaped = rows.reshape((len(rows), *root.shape[:1], 1, root.shape[-1]))
    return (shaped @ root).reshape((len(rows), -1))


def _of_squares(y: np.ndarray, loss: OutputLoss) -> tuple[np.ndarray, np.ndarray]:
    """Of sum m (y - target)^2 / Z: f and h^{1/2} in y."""
    target, m = (to_numpy(array).astype(np.float64) for array in (loss.target, loss.mask))
    root = np.broadcast_to((2 * m / m.sum()) ** 0.5, y.shape)
    return root * (y - target), root.reshape((-1, 1, y.shape[-1])) * np.eye(y.shape[-1])


def _of_classes(y: np.ndarray, loss: OutputLoss) -> tuple[np.ndarray, np.ndarray]:
    """Of sum m KL / Z, with h = (diag p - p p^T) m / Z times what makes the parabola as high as the loss."""
    p = np.exp(y - y.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    target, m = probabilities(loss, y.shape)
    m = (m / m.sum())[..., None]
    values, vectors = np.linalg.eigh(p[..., None] * np.eye(y.shape[-1]) - p[..., None] * p[..., None, :])
    roots = np.where(values > 1e-14, values, 0) ** 0.5
    error = np.einsum("...ij,...i->...j", vectors, p - target)
    along = np.where(roots > 0, error / np.where(roots > 0, roots, 1), 0)
    logs = np.log(np.maximum(p, 1e-300))
    least = np.where(target > 0, target * np.log(np.where(target > 0, target, 1)), 0).sum(-1)
    height = np.maximum(least - (target * logs).sum(-1), 0)  # of the loss over its least
    energy = (along**2).sum(-1) / 2
    scale = np.where((height > 0) & (energy > 0), (energy / np.where(height > 0, height, 1)) ** 0.5, 1)[..., None]
    f = m**0.5 * np.einsum("...ij,...j->...i", vectors, along) / scale
    root = np.einsum("...ij,...j,...kj->...ik", vectors, roots * scale * m**0.5, vectors)
    return f, root.reshape((-1, *root.shape[-2:]))


def _of_function(y: Array, loss: OutputLoss, space: Space) -> tuple[np.ndarray, np.ndarray]:
    """Of any loss: one parabola for all outputs, with its minimum at zero."""
    derivatives = backend_for(y, "y", "[trial, time, out]").objectives.Derivatives
    of_rows = derivatives(lambda rows, _scheme: loss(rows.reshape(tuple(y.shape))))
    value, gradient = of_rows.gradient(y.reshape((-1,)), None)
    if not value >= 0:
        raise ValueError(f"the loss is {value:.3g}; to speak of half of it, it must be positive, and 0 at its least")
    e = to_numpy(gradient).astype(np.float64).reshape(tuple(y.shape)) if value else np.zeros(tuple(y.shape))
    scale = (np.square(e).sum() / (2 * value or 1.0)) ** 0.5
    roots = scale * np.broadcast_to(np.eye(y.shape[-1]), (e.size // y.shape[-1], y.shape[-1], y.shape[-1]))
    return to_numpy(space.counted(space.placed(like_numpy(e, y)))) / (scale or 1.0), roots
