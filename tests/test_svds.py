"""Singular triplets against dense decompositions, in the inner products of both spaces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import svds as scipy_svds
from synthetic import eager_library, factor, library, parameters, space

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn.solvers import BlockLanczos

__all__ = ["eager_library", "library"]

ITERATIVE = BlockLanczos(block=6, dense=0)


def rows(values, space) -> np.ndarray:
    return to_numpy(space.to_euclidean(values)).reshape(len(values), -1)


def check(found: kp.SingularModes, op: kp.Operator, k: int, tol: float = 1e-6) -> None:
    """Values by a dense decomposition, orthonormal vectors, and the true residuals of both equations."""
    left, right, values = rows(found.left, op.codomain), rows(found.right, op.domain), to_numpy(found.values)
    expected = np.linalg.svd(rows(op.mv(op.domain.from_euclidean(eye(op.domain))), op.codomain).T)[1]
    assert np.abs(values - expected[:k]).max() <= tol * expected[0]
    for vectors in (left, right):
        assert np.abs(vectors @ vectors.T - np.eye(k)).max() < 1e-9
    forward = rows(op.mv(found.right), op.codomain) - values[:, None] * left
    backward = rows(op.T.mv(found.left), op.domain) - values[:, None] * right
    true = np.sqrt((forward**2).sum(1) + (backward**2).sum(1)) / expected[0]
    np.testing.assert_allclose(to_numpy(found.residuals), true, rtol=1e-2, atol=1e-12)
    assert true.max() <= tol and to_numpy(found.converged).all()


def eye(space):
    return space.xp.asarray(np.eye(space.size), dtype=space.dtype).reshape((space.size, *space.shape))


@pytest.mark.parametrize("alg", [None, ITERATIVE], ids=["dense", "iterative"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [5, 150])
def test_from_either_side(eager_library, size, weighted, alg):
    """More states than parameters, and the other way round; the adjoint has the same triplets, exchanged."""
    J = factor(space(eager_library, weighted=weighted), parameters(eager_library, size=size))
    check(kp.svds(J, 4, alg), J, 4)
    check(kp.svds(J.T, 4, alg), J.T, 4)


@pytest.mark.parametrize("size", [5, 150])
def test_the_axes_of_the_vectors_are_named(size: int) -> None:
    cell = torch.nn.RNNCell(2, 3).double()
    J = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.zeros(4, size // 5, 2).double()))).J
    shown = repr(kp.svds(J, 2))
    sizes = "".join(f", {name} {n}" for name, n in zip(J.codomain.axes, J.codomain.shape, strict=True))
    assert f"[mode 2{sizes}]" in shown and f"[mode 2, {J.domain.axes[0]} {J.domain.shape[0]}]" in shown


def test_small_values_are_as_accurate_as_asked_for():
    """A residual of 1e-6 s_1 needs squares solved to 1e-6 s_1 s_k: the first pass alone leaves 1e-3."""
    random = np.random.default_rng(0)
    u, v = (np.linalg.qr(random.standard_normal((n, 300)))[0] for n in (500, 300))
    spaces = [kp.Space((name,), (n,), np.zeros(1)) for name, n in (("in", 300), ("out", 500))]
    op = kp.MatrixOperator(u * 10.0 ** -np.linspace(0, 6, 300) @ v.T, *spaces)
    check(kp.svds(op, 150, BlockLanczos(dense=0)), op, 150)


def test_of_a_network_against_scipy():
    """Of P, which is not symmetric, and of J, where s^2 are the eigenvalues of the NTK."""
    torch.manual_seed(0)
    x = torch.randn(3, 7, 2, dtype=torch.float64)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(2, 5).double(), x)))
    for op in (flow.P, flow.J):
        expected = np.sort(scipy_svds(op.to_scipy(), 6)[1])[::-1]
        np.testing.assert_allclose(to_numpy(kp.svds(op, 6, ITERATIVE).values), expected, rtol=1e-8)
    found = kp.svds(flow.J, 4)
    np.testing.assert_allclose(to_numpy(found.values) ** 2, to_numpy(kp.eigs(flow.ntk, 4).values), rtol=1e-10)
    changes = flow.as_parameters(found.right)
    assert {name: tuple(change.shape) for name, change in changes.items()} == {
        name: (4, *value.shape) for name, value in flow.parameters.items()
    }


@pytest.mark.parametrize("alg", [None, ITERATIVE], ids=["dense", "iterative"])
@pytest.mark.parametrize("rank", [0, 2])
def test_more_triplets_than_the_rank(rank, alg):
    random = np.random.default_rng(1)
    spaces = [kp.Space((name,), (n,), np.zeros(1)) for name, n in (("in", 30), ("out", 50))]
    op = kp.MatrixOperator(random.standard_normal((50, rank)) @ random.standard_normal((rank, 30)), *spaces)
    found = kp.svds(op, 4, alg)
    assert (found.values[rank:] < 1e-7 * max(found.values[0], 1)).all()
    assert np.abs(found.left @ found.left.T - np.eye(4)).max() < 1e-9
    assert found.converged.all()


@pytest.mark.parametrize("k", [0, 31, 2.0])
def test_an_impossible_k_is_refused(k):
    spaces = [kp.Space((name,), (n,), np.zeros(1)) for name, n in (("in", 30), ("out", 50))]
    with pytest.raises(ValueError, match="expected 1 <= k <= 30"):
        kp.svds(kp.MatrixOperator(np.ones((50, 30)), *spaces), k)


def test_what_does_not_converge_is_flagged():
    random = np.random.default_rng(2)
    spaces = [kp.Space((name,), (n,), np.zeros(1)) for name, n in (("in", 300), ("out", 400))]
    op = kp.MatrixOperator(random.standard_normal((400, 300)), *spaces)
    with pytest.warns(UserWarning, match=r"singular triplets did not reach the residual 1e-06.*raise maxiter"):
        found = kp.svds(op, 5, BlockLanczos(maxiter=2, dense=0))
    assert not found.converged.all()
