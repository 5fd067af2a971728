"""What learning can do at each time, as matrices over the units: the blocks of the NTK on its diagonal."""

from __future__ import annotations

import numpy as np

from kpflow_dyn._arrays import Array, Random, like_numpy, to_numpy
from kpflow_dyn._flows.flow import Flow

EXACT = 2048  # parameters up to which J is taken column by column
SAMPLES = 512  # random changes of the parameters in their place
BLOCK = 64  # columns at once


def learnable_gramian(flow: Flow, units: int, seed: int = 0) -> np.ndarray:
    """G(t) = J_t J_t^T of each trial [trial, time, unit, unit]: where a change of the parameters moves the state at t.

    Exact by the columns of J, or of many parameters the mean over random changes.
    """
    size = flow.J.domain.size
    exact = size <= EXACT
    count, total = size if exact else SAMPLES, 0.0
    random, rows = Random(seed), _evenly(count)
    for start in range(0, count, rows):
        changes = np.eye(rows, size, start) if exact else to_numpy(random.normal((rows, size), flow.J.domain.like))
        moved = to_numpy(flow.J.mv(like_numpy(changes, flow.J.domain.like)))[..., :units].astype(float)
        total = total + np.einsum("pbtu,pbtv->btuv", moved, moved)
    return np.asarray(total) / (1 if exact else count)


def sensitivity(flow: Flow, covector: np.ndarray) -> np.ndarray:
    """What each time contributes to a gradient, (D_theta of the step or field)^T covector [time, parameter].

    The covector is [trial, time, unit]; trials are added up.
    """
    domain, rows = flow.K.domain, _evenly(covector.shape[1])
    found = []
    measure = None if domain.measure is None else to_numpy(domain.measure)
    for start in range(0, covector.shape[1], rows):
        times = np.arange(start, min(start + rows, covector.shape[1]))
        block = np.zeros((rows, *covector.shape))
        block[np.arange(len(times)), :, times] = np.swapaxes(covector[:, times], 0, 1)
        pulled = to_numpy(flow.K.factor.T.mv(like_numpy(block, domain.like)))[: len(times)].astype(float)
        found.append(pulled if measure is None else pulled / _weights(measure, covector.shape)[times, None])
    return np.concatenate(found)


def _evenly(count: int) -> int:
    """The length of blocks that are all as long, as JAX compiles for each length; the last may end in zeros."""
    return -(-count // -(-count // BLOCK))


def _weights(measure: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The quadrature weight of each time."""
    return np.broadcast_to(measure, shape)[0, :, 0].astype(float)


def share(G: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Which part of tr G lies in orthonormal directions [..., unit, k]; NaN where G is zero."""
    inside = np.einsum("...uk,...uv,...vk->...", directions, G, directions)
    whole = np.trace(G, axis1=-2, axis2=-1)
    return np.divide(inside, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def leading(G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [..., mode] and eigenvectors [..., unit, mode], descending."""
    values, vectors = np.linalg.eigh(G)
    return values[..., ::-1].copy(), vectors[..., ::-1].copy()


def by_parameter(flow: Flow, rows: Array) -> dict[str, np.ndarray]:
    """Rows [..., p] cut into the parts of each parameter."""
    ends = np.cumsum(list(flow.parts.values()))
    return dict(zip(flow.parts, np.split(np.asarray(rows), ends[:-1], axis=-1), strict=True))
