"""The Hessian of a loss in its outputs, in the finest blocks that hold all of it, and its square root.

Of a sum over trials and times it is a block [out, out] for each of them. Of a loss that couples times, as one of a mean
over them, it is a block for each trial, and of one that couples trials a single block.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kpflow_dyn._arrays import Array, Random, Rows, array_namespace, eps_of, like_numpy, to_numpy
from kpflow_dyn._arrays.memory import bytes_of
from kpflow_dyn._backend import backend_for
from kpflow_dyn._learning.losses import OutputLoss
from kpflow_dyn._spaces.operators import DENSE_BYTES
from kpflow_dyn._spaces.space import Space

ROUND_OFF = 1e-12  # curvatures below this part of the largest are zero


@dataclass(frozen=True, eq=False)
class Curvature:
    """h^{1/2} and its pseudo-inverse, symmetric blocks [block, m, m] with block m = n, and e = grad L as a row [1, n].

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
        ValueError: a loss that is not convex in the outputs, has no curvature there, or couples more of them than fit
            in a matrix.
    """
    derivatives = backend_for(y, "y", "[trial, time, out]").objectives.Derivatives(
        lambda rows, _scheme: loss(space.from_euclidean(rows.reshape(space.shape)))
    )
    at = space.to_euclidean(y).reshape((-1,))
    (value, gradient), blocks = derivatives.gradient(at, None), _blocks(derivatives.hessian(at, None), y, space)
    if not blocks.any():
        raise ValueError(
            f"the loss is {value:.3g} and has no curvature in these outputs, as where it is linear in them (a mean "
            "absolute error), or does not hang on them: its errors have no rates; take `forecast` or `gradient_flow`"
        )
    values, vectors = np.linalg.eigh(blocks.astype(float))
    if loss.name == "own" and values.min() < -(eps_of(y) ** 0.5) * values.max():
        raise ValueError(
            "the loss is not convex in the outputs, so that no metric of theirs has its curvature; take `forecast`, "
            "which needs none"
        )
    kept = values > max(ROUND_OFF, eps_of(y)) * values.max()
    safe = np.where(kept, values, 1.0)
    root, inverse = ((vectors * np.where(kept, safe**p, 0)[:, None]) @ vectors.swapaxes(1, 2) for p in (0.5, -0.5))
    return Curvature(gradient[None], like_numpy(root, y), like_numpy(inverse, y))


def _blocks(hessian: Rows, y: Array, space: Space) -> np.ndarray:
    """The Hessian [block, m, m]: m are the outputs of a place, or else of a trial, or else all."""
    trial = Random(0).normal((1, space.size), y)
    image = to_numpy(hessian(trial))
    for size in np.cumprod(space.shape[::-1]).tolist():
        _check_room(size, space, y)
        ones = like_numpy(np.tile(np.eye(size), (1, space.size // size)), y)  # [m, n]: one output, in every block
        blocks = np.moveaxis(to_numpy(hessian(ones)).reshape((size, -1, size)), 0, 1)
        coupled = np.abs(image - to_numpy(_applied(like_numpy(blocks.copy(), y), trial))).max()
        if coupled <= 10 * eps_of(y) ** 0.5 * np.abs(blocks).max():
            return blocks
    raise ValueError(
        "the second derivative of the loss in these outputs is not symmetric, holds NaN, or is lost in round-off; look "
        "at the loss where the outputs are now, or take float64"
    )


def _check_room(size: int, space: Space, y: Array) -> None:
    if size > space.shape[-1] and (needed := bytes_of(space.size * size, y)) > DENSE_BYTES:
        raise ValueError(
            f"the loss couples outputs of several times or trials, {size} at once, and its Hessian would take "
            f"{needed / 2**30:.1f} GiB; take fewer trials, `forecast`, which needs no Hessian, or a mean over trials "
            "and times"
        )


def _applied(blocks: Array, rows: Array) -> Array:
    at_places = rows.reshape((len(rows), *blocks.shape[:1], 1, blocks.shape[-1]))
    return array_namespace(rows).matmul(at_places, blocks).reshape(rows.shape)
