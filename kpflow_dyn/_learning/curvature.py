"""The Hessian of a loss in its outputs, one block [out, out] for each trial and time, and its square root."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, eps_of, like_numpy, to_numpy
from kpflow_dyn._backend import backend_for
from kpflow_dyn._learning.losses import OutputLoss
from kpflow_dyn._spaces.space import Space

ROUND_OFF = 1e-12  # curvatures below this part of the largest are zero


@dataclass(frozen=True, eq=False)
class Curvature:
    """h^{1/2} and its pseudo-inverse, symmetric blocks [place, out, out], and e = grad L as a row [1, n].

    All in coordinates of the outputs where their inner product is the plain one.
    """

    gradient: Array
    root: Array
    inverse: Array

    def rooted(self, rows: Array) -> Array:
        """h^{1/2} on rows [b, n]."""
        return _applied(self.root, rows)

    def divided(self, rows: Array) -> Array:
        """h^{-1/2} on rows [b, n], zero where h is."""
        return _applied(self.inverse, rows)


def curvature(loss: OutputLoss, y: Array, space: Space) -> Curvature:
    """Of a loss of these outputs.

    Raises:
        ValueError: a loss that couples trials or times, or is not convex in the outputs.
    """
    derivatives = backend_for(y, "y", "[trial, time, out]").objectives.Derivatives(
        lambda rows, _scheme: loss(space.from_euclidean(rows.reshape(space.shape)))
    )
    _value, gradient, hessian = derivatives.both(space.to_euclidean(y).reshape((-1,)), None)
    out = space.shape[-1]
    ones = np.tile(np.eye(out), (1, space.size // out))  # [out, n]: one output, everywhere
    blocks = np.moveaxis(to_numpy(hessian(like_numpy(ones, y))).reshape((out, -1, out)), 0, 1)
    trial = Random(0).normal((1, space.size), y)
    _check_apart(to_numpy(hessian(trial) - _applied(like_numpy(blocks.copy(), y), trial)), blocks, eps_of(y))
    values, vectors = np.linalg.eigh(blocks.astype(float))
    if values.min() < -(eps_of(y) ** 0.5) * values.max():
        raise ValueError("the loss is not convex in the outputs, so that no metric of theirs has its curvature")
    kept = values > max(ROUND_OFF, eps_of(y)) * values.max()
    safe = np.where(kept, values, 1.0)
    root, inverse = ((vectors * np.where(kept, safe**p, 0)[:, None]) @ vectors.swapaxes(1, 2) for p in (0.5, -0.5))
    return Curvature(gradient[None], like_numpy(root, y), like_numpy(inverse, y))


def _check_apart(difference: np.ndarray, blocks: np.ndarray, eps: float) -> None:
    if np.abs(difference).max() > 10 * eps**0.5 * np.abs(blocks).max():
        raise ValueError(
            "the loss couples outputs of several trials or times, so that there is no learnability of single targets; "
            "take `forecast`, or a mean over trials and times"
        )


def _applied(blocks: Array, rows: Array) -> Array:
    at_places = rows.reshape((len(rows), *blocks.shape[:1], 1, blocks.shape[-1]))
    return array_namespace(rows).matmul(at_places, blocks).reshape(rows.shape)
