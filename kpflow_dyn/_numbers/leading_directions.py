"""Shares of a change of the states in leading directions: of the core, of the NTK, and of controls that know neither.

A change X [row, unit], its rows being trials and times (or tokens), has the share |U^T X|^2 / |X|^2 in the span of
orthonormal columns U [row, k], which leave all units free; and <u, X>^2 / |X|^2, summed over k directions u, in
directions of whole states. Both are taken in coordinates where the inner product of the states is plain.

The controls choose their directions without knowing the network:

    constant      the same at all times: first one for all trials alike, then those of single trials
    cosines       cos(pi f tau), f = 0, 1, ..., in all trials alike, tau in (0, 1) the part of the time that passed
    own cosines   the same for single trials: all of f = 0, then all of f = 1, ...
    random        random directions

Where a control has several directions to choose from alike, its share is the mean over random ones of them. Directions
of whole states let each of these stand for random patterns over the units.
"""

from __future__ import annotations

import math

import numpy as np

from kpflow_dyn._arrays import Array, like_numpy, to_numpy
from kpflow_dyn._flows.sites import WeightSite
from kpflow_dyn._numbers.reductions import as_matrices
from kpflow_dyn._spaces.space import Space

DATA_AXES = ("trial", "time", "token")
NULL = 1e-6  # of the largest eigenvalue, below which a direction counts as one that is not there


def rows_of(states: Array, space: Space, rows: tuple[str, ...]) -> np.ndarray:
    """States [*space.shape] as [row, all other axes], in coordinates where the inner product is plain; float64."""
    flat = space.to_euclidean(space.counted(states)).reshape((1, -1))
    return to_numpy(as_matrices(flat, space, space.positions(rows)))[0].astype(np.float64)


def at_unit_size(X: np.ndarray) -> np.ndarray:
    """X over its largest entry, so that squares stay in range."""
    return X / (np.abs(X).max(initial=0) or 1.0)


def variables(sites: list[WeightSite], space: Space, rows: tuple[str, ...]) -> np.ndarray | None:
    """What the weights see: sqrt(m) V of each, side by side [row, column]; None where none has the data's rows."""
    data = space.keep(tuple(axis for axis in space.axes if axis in DATA_AXES))
    found = [each for site in sites if (each := _columns(site, data)) is not None]
    if not found:
        return None
    V = np.concatenate(found, -1)
    block = like_numpy(np.ascontiguousarray(np.moveaxis(V, -1, 0)), space.like)  # [column, *data.shape]
    turned = to_numpy(
        as_matrices(data.to_euclidean(data.counted(block)).reshape((len(block), -1)), data, data.positions(rows))
    )
    return turned.transpose(1, 0, 2).reshape(turned.shape[1], -1)


def _columns(site: WeightSite, data: Space) -> np.ndarray | None:
    """sqrt(m) V [*data.shape, column] of a site; a one for a bias that lies on other rows, None for other data."""
    if site.kind in ("opaque", "lookup"):
        return None
    inputs = to_numpy(site.inputs).astype(np.float64)
    if inputs.shape[: len(data.shape)] == data.shape:
        return site.multiplicity**0.5 * inputs.reshape((*data.shape, -1))
    if site.kind == "scale" and (inputs == 1).all():
        return np.ones((*data.shape, 1))
    return None


def leading(V: np.ndarray) -> np.ndarray:
    """The left singular vectors U [row, k] of V, the leading ones first, up to 1e-6 of the largest eigenvalue."""
    U, s, _ = np.linalg.svd(V, full_matrices=False)
    return U[:, : int((s > NULL**0.5 * s[:1]).sum())]


def shares(U: np.ndarray, X: np.ndarray, most: int) -> np.ndarray:
    """The share of X [row, unit] in the first 1, ..., `most` columns of U [row, k], or in all where there are fewer."""
    X = at_unit_size(X)
    return _cumulated(((U.T @ X) ** 2).sum(1) / (X**2).sum(), most)[1:]


def control_shares(X: np.ndarray, measure: np.ndarray, most: int) -> dict[str, np.ndarray]:
    """Of each control the share of X [row, unit] in its first 1, ..., `most` directions; measure [trial, time]."""
    return {name: found[1:] for name, found in _controls(X, measure, most).items()}


def control_shares_of_states(X: np.ndarray, measure: np.ndarray, most: int) -> dict[str, np.ndarray]:
    """The same for directions of whole states."""
    among = np.arange(1, most + 1) / X.shape[1]
    found = _controls(X, measure, math.ceil(among[-1]))
    return {name: np.interp(among, np.arange(len(each)), each) for name, each in found.items()}


def _controls(X: np.ndarray, measure: np.ndarray, most: int) -> dict[str, np.ndarray]:
    """Shares in the first 0, 1, ..., `most` directions."""
    X, (trials, times) = at_unit_size(X), measure.shape
    total, root = (X**2).sum(), np.sqrt(measure)
    passed = (measure.cumsum(1) - measure / 2) / np.maximum(measure.sum(1, keepdims=True), 1e-300)
    waves = root[..., None] * np.cos(np.pi * passed[..., None] * np.arange(min(times, most)))  # [trial, time, f]
    alike = np.linalg.qr(waves.reshape(trials * times, -1))[0]
    single = np.linalg.qr(waves)[0]
    of_alike = ((alike.T @ X) ** 2).sum(1) / total
    of_single = (np.matmul(single.transpose(0, 2, 1), X.reshape(trials, times, -1)) ** 2).sum((0, 2)) / total
    rest = np.full(trials - 1, (of_single[0] - of_alike[0]) / max(trials - 1, 1))
    found = {
        "constant": np.append(of_alike[:1], rest),
        "cosines": of_alike,
        "own cosines": np.repeat(of_single / trials, trials),
        "random": np.full(most, 1 / len(X)),
    }
    return {name: _cumulated(each, most) for name, each in found.items()}


def _cumulated(parts: np.ndarray, most: int) -> np.ndarray:
    """The sums of the first 0, 1, ..., `most` parts."""
    return np.cumsum(np.append(0.0, np.pad(parts[:most], (0, max(0, most - len(parts))))))
