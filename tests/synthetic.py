"""Small operators with known dense matrices, on every array library that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np
import pytest

import kpflow_dyn as kp
from kpflow_dyn._arrays import Array, to_numpy

LIBRARIES = ["numpy", *(name for name in ("torch", "jax") if importlib.util.find_spec(name))]
TOLERANCE = {"float32": 1e-4, "float64": 1e-12}


def as_array(library: str, a: np.ndarray, dtype: str = "float64") -> Array:
    """A numpy array in another library."""
    if library == "torch":
        import torch

        return torch.as_tensor(np.array(a, dtype=dtype))
    if library == "jax":
        import jax.numpy

        return jax.numpy.asarray(a, dtype=dtype)
    return np.array(a, dtype=dtype)


@pytest.fixture(params=LIBRARIES)
def library(request):
    if request.param != "jax":
        yield request.param
        return
    import jax

    with jax.enable_x64(True):
        yield "jax"


@pytest.fixture(params=[name for name in LIBRARIES if name != "jax"])
def eager_library(request):
    """Libraries that need no compilation, for the long products of cases."""
    return request.param


def assert_close(got: Array, expected: Array, dtype: str = "float64") -> None:
    got, expected = to_numpy(got), to_numpy(expected)
    np.testing.assert_allclose(
        got, expected, rtol=0, atol=TOLERANCE[dtype] * max(1.0, float(np.abs(expected).max(initial=0)))
    )


def space(library: str = "numpy", dtype: str = "float64", shape=(2, 3, 4), weighted: bool = False) -> kp.Space:
    """A space [trial, time, unit], plain or with quadrature weights along time."""
    weights = as_array(library, np.linspace(0.5, 1.5, shape[1])[:, None], dtype) if weighted else None
    return kp.Space(("trial", "time", "unit"), shape, as_array(library, np.zeros(1), dtype), weights)


def parameters(library: str = "numpy", dtype: str = "float64", size: int = 5) -> kp.Space:
    return kp.Space(("parameter",), (size,), as_array(library, np.zeros(1), dtype))


def matrix(rows: kp.Space, columns: kp.Space, seed: int = 0) -> Array:
    return kp._arrays.Random(seed).normal((rows.size, columns.size), rows.like)


def factor(state: kp.Space, theta: kp.Space, seed: int = 0) -> kp.MatrixOperator:
    """A generic J: theta -> state."""
    return kp.MatrixOperator(matrix(state, theta, seed), theta, state)


def _general(state: kp.Space, theta: kp.Space) -> kp.Operator:
    return kp.MatrixOperator(matrix(state, state), state, state)


def _gram(state: kp.Space, theta: kp.Space) -> kp.Operator:
    return kp.GramOperator(factor(state, theta))


def _propagator(state: kp.Space, theta: kp.Space) -> kp.Operator:
    """A running sum over time, as two callables."""
    xp = state.xp
    weights = 1.0 if state.measure is None else state.measure

    def forward(q: Array) -> Array:
        return xp.cumulative_sum(q, axis=2)

    def backward(q: Array) -> Array:
        return xp.flip(xp.cumulative_sum(xp.flip(weights * q, axis=2), axis=2), axis=2) / weights

    return kp.Operator(state, state, forward, backward)


OPERATORS: dict[str, Callable[[kp.Space, kp.Space], kp.Operator]] = {
    "matrix": _general,
    "factor": factor,
    "gram": _gram,
    "callables": _propagator,
    "adjoint": lambda state, theta: factor(state, theta).T,
    "product": lambda state, theta: _propagator(state, theta) @ _gram(state, theta) @ _propagator(state, theta).T,
    "sum": lambda state, theta: _general(state, theta) + _gram(state, theta),
    "difference": lambda state, theta: _gram(state, theta) - _general(state, theta),
    "scaled": lambda state, theta: 2.5 * _general(state, theta),
    "negative gram": lambda state, theta: -_gram(state, theta),
    "marginal": lambda state, theta: kp.marginal(_general(state, theta), keep=("trial", "unit")),
    "partial trace": lambda state, theta: kp.partial_trace(_general(state, theta), keep="time"),
}


def diagonal(values: np.ndarray, library: str = "numpy", dtype: str = "float64") -> kp.GramOperator:
    """A positive semi-definite operator with this spectrum, as J J* with J its diagonal root."""
    line = kp.Space(("state",), (len(values),), as_array(library, np.zeros(1), dtype))
    root = as_array(library, np.sqrt(values), dtype)
    return kp.GramOperator(kp.Operator(line, line, lambda q: root * q, None))


def spectra(n: int) -> dict[str, np.ndarray]:
    """Spectra that a solver or an estimator must be right on."""
    i = np.arange(1, n + 1)
    return {
        "power": i**-2.0,
        "exponential": np.exp(-i / 10),
        "flat": np.ones(n),
        "repeated": np.repeat(np.exp(-np.arange(n // 40 + 1) / 3), 40)[:n],
    }


def with_trials_apart(state: kp.Space, theta: kp.Space, seed: int = 0) -> kp.GramOperator:
    """J J* on [trial, ...] with each trial's own J_b, which are alike."""
    blocks = 0.3 * matrix(state, theta, seed).reshape((state.shape[0], -1, theta.size))
    return _of_blocks(state, theta, blocks + 3 * blocks[:1])


def spread_over_trials(state: kp.Space, values: np.ndarray, seed: int = 0) -> kp.GramOperator:
    """J J* on [trial, ...] with this spectrum; eigenvectors are anywhere, and each trial's own J_b is known."""
    theta = kp.Space(("parameter",), (len(values),), state.like)
    left, right = (np.linalg.qr(to_numpy(matrix(rows, theta, seed + i)))[0] for i, rows in enumerate((state, theta)))
    J = state.xp.asarray((left * np.sqrt(values)) @ right.T, dtype=state.dtype)
    return _of_blocks(state, theta, J.reshape((state.shape[0], -1, theta.size)))


def _of_blocks(state: kp.Space, theta: kp.Space, blocks: Array) -> kp.GramOperator:
    xp, trials = state.xp, state.shape[0]
    J = kp.MatrixOperator(blocks.reshape((state.size, theta.size)), theta, state)
    own = kp.Space(("trial", "parameter"), (trials, theta.size), state.like)

    def forward(w: Array) -> Array:
        return (w[:, :, None, :] @ xp.permute_dims(blocks, (0, 2, 1))[None])[:, :, 0].reshape((-1, *state.shape))

    def backward(q: Array) -> Array:
        weighted = q if state.measure is None else q * state.measure
        return (weighted.reshape((-1, trials, 1, blocks.shape[1])) @ blocks[None])[:, :, 0]

    return kp.GramOperator(J, None, kp.Operator(own, state, forward, backward))


def check_apart(op: kp.GramOperator) -> None:
    """`apart` has the blocks of the operator that lie within trials, and nothing between them."""
    assert op.apart is not None and kp.check_adjoint(op.apart, seed=3) < 1e-12
    trials, size = op.domain.shape[0], op.domain.size // op.domain.shape[0]
    inside = np.kron(np.eye(trials), np.ones((size, size))) * to_numpy(op.dense())
    found = to_numpy((op.apart @ op.apart.T).dense())
    assert np.abs(found - inside).max() < 1e-10 * np.abs(inside).max()
