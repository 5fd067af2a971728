"""eigs and modes: values, multiplicities and true residuals in the space's own inner product."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import OPERATORS, assert_close, eager_library, factor, library, matrix, parameters, space

import kpflow_dyn as kp
from kpflow_dyn._arrays import Random, to_numpy
from kpflow_dyn.solvers import BlockLanczos

__all__ = ["eager_library", "library"]

ITERATIVE = BlockLanczos(dense=0)


def dense(op: kp.Operator) -> np.ndarray:
    return op.to_scipy() @ np.eye(op.domain.size)


def check(found: kp.Modes, op: kp.Operator, k: int, tol: float = 1e-6) -> None:
    """Values by dense eigh; vectors orthonormal in the space; residuals the true ones."""
    expected = np.linalg.eigvalsh(dense(op))[::-1]
    norm = np.abs(expected).max()
    assert np.abs(to_numpy(found.values) - expected[:k]).max() <= tol * norm
    assert tuple(found.vectors.shape) == (k, *op.domain.shape)
    xp, inner = op.domain.xp, op.domain.inner
    pairs = inner(found.vectors[:, None] + xp.zeros_like(found.vectors)[None], found.vectors[None])
    assert np.abs(to_numpy(pairs) - np.eye(k)).max() < 1e-9
    values = op.domain.xp.asarray(found.values, dtype=op.domain.dtype).reshape((k, 1, 1, 1))
    rest = op.mv(found.vectors) - values * found.vectors
    true = to_numpy(inner(rest, rest)) ** 0.5 / norm
    np.testing.assert_allclose(to_numpy(found.residuals), true, rtol=1e-2, atol=1e-13)
    assert true.max() <= tol and to_numpy(found.converged).all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [5, 40])
def test_pairs_of_a_gram_operator_from_either_side(library, size, weighted):
    op = kp.GramOperator(factor(space(library, weighted=weighted), parameters(library, size=size)))
    check(kp.eigs(op, 4), op, 4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [300, 900])
def test_pairs_by_iteration(eager_library, size, weighted):
    state = space(eager_library, shape=(4, 6, 25), weighted=weighted)
    J = factor(state, parameters(eager_library, size=size))
    decay = kp.MatrixOperator(np.diag(np.arange(1.0, 601) ** -0.5), *[space(shape=(4, 6, 25))] * 2).matrix
    matrix = state.xp.asarray(decay, dtype=state.dtype) @ J.matrix
    op = kp.GramOperator(kp.MatrixOperator(matrix, J.domain, state))
    found = kp.eigs(op, 12, ITERATIVE)
    check(found, op, 12)
    assert found.applications < size


def test_an_untrained_network_has_every_eigenvalue_once_for_each_unit():
    rows, units = 30, 40
    V = np.random.default_rng(0).standard_normal((rows, 6))
    state = kp.Space(("trial", "time", "unit"), (5, 6, units), np.zeros(1))
    theta = kp.Space(("parameter",), (units * 6,), np.zeros(1))
    J = kp.Operator(
        theta,
        state,
        lambda w: np.einsum("rd,pud->pru", V, w.reshape(-1, units, 6)).reshape(-1, 5, 6, units),
        lambda q: np.einsum("rd,pru->pud", V, q.reshape(-1, rows, units)).reshape(-1, units * 6),
    )
    op = kp.GramOperator(J)
    for alg in (ITERATIVE, BlockLanczos()):
        found = kp.eigs(op, 100, alg)
        expected = np.repeat(np.linalg.eigvalsh(V @ V.T)[::-1][:3], units)[:100]
        np.testing.assert_allclose(found.values, expected, rtol=1e-9)
        check(found, op, 100)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [20, 900])
def test_deflation_gives_the_next_pairs_and_a_warm_start_those_of_a_nearby_operator(eager_library, size, weighted):
    """From either side of J: deflation is of the states, whatever side the iteration runs on."""
    state = space(eager_library, shape=(4, 6, 15), weighted=weighted)
    op = kp.GramOperator(factor(state, parameters(eager_library, size=size)))
    values = np.linalg.eigvalsh(dense(op))[::-1]
    first = kp.eigs(op, 5)
    then = kp.eigs(op, 4, deflate=first.vectors + 0.0)
    np.testing.assert_allclose(to_numpy(then.values), values[5:9], rtol=1e-5)
    overlap = state.inner(then.vectors[:, None] + 0 * first.vectors[None], first.vectors[None])
    assert float(abs(overlap).max()) < 1e-9
    mixed = state.normal(3, Random(2))  # no eigenvectors: the part of A orthogonal to them
    rows = np.linalg.qr(to_numpy(state.to_euclidean(mixed)).reshape(3, -1).T)[0]
    projector = np.eye(state.size) - rows @ rows.T
    expected = np.linalg.eigvalsh(projector @ dense(op) @ projector)[::-1][:4]
    np.testing.assert_allclose(to_numpy(kp.eigs(op, 4, deflate=mixed).values), expected, rtol=1e-5)
    again = kp.eigs(op, 5, ITERATIVE, start=first.vectors)
    np.testing.assert_allclose(to_numpy(again.values), values[:5], rtol=1e-6)


def test_all_eigenvalues_with_their_multiplicities(library):
    state = space(library, weighted=True)
    for size in (5, 40):
        op = kp.GramOperator(factor(state, parameters(library, size=size)))
        expected = np.linalg.eigvalsh(dense(op))[::-1]
        found = to_numpy(kp.eigenvalues(op))
        assert found.shape == (24,)
        assert_close(found, expected)
    with pytest.raises(ValueError, match="eigenvalues needs a symmetric operator"):
        kp.eigenvalues(OPERATORS["matrix"](state, parameters(library)))


def test_dense_is_a_choice_of_algorithm():
    op = kp.GramOperator(factor(space(), parameters(size=20)))
    check(kp.eigs(op, 15, kp.solvers.Dense()), op, 15)
    assert kp.eigs(op, 15, kp.solvers.Dense()).applications < 60


@pytest.mark.parametrize("size", [5, 40])
def test_more_pairs_than_the_rank_are_completed_with_null_vectors(size):
    state, theta = space(), parameters(size=size)
    J = matrix(state, theta)
    J[:, 2:] = 0
    op = kp.GramOperator(kp.MatrixOperator(J, theta, state))
    found = kp.eigs(op, 5)
    check(found, op, 5)
    assert np.abs(found.values[2:]).max() < 1e-12


def test_zero_operator_and_one_dimension():
    zero = kp.GramOperator(kp.MatrixOperator(np.zeros((24, 5)), parameters(), space()))
    found = kp.eigs(zero, 3)
    assert not found.values.any() and not found.residuals.any() and found.converged.all()
    assert_close(found.space.inner(found.vectors, found.vectors), np.ones(3))
    point = kp.Space((), (), np.zeros(1))
    assert kp.eigs(kp.MatrixOperator(np.array([[2.0]]), point, point), 1).values == pytest.approx([2.0])


@pytest.mark.parametrize("weighted", [False, True])
def test_a_product_that_is_symmetric_need_not_be_flagged(weighted):
    op = OPERATORS["product"](space(weighted=weighted), parameters())
    assert not op.symmetric
    check(kp.eigs(op, 4), op, 4)


def test_an_indefinite_operator_gives_its_algebraically_largest():
    state = space()
    A = matrix(state, state)
    op = kp.MatrixOperator(A + A.T, state, state)
    check(kp.eigs(op, 24), op, 24)
    values = np.linalg.eigvalsh(A + A.T)
    np.testing.assert_allclose(kp.eigs(op, 3, which="SA").values, values[:3], rtol=1e-10)
    np.testing.assert_allclose(kp.eigs(op, 3, which="LM").values, values[np.argsort(-abs(values))][:3], rtol=1e-10)


def test_the_smallest_of_a_gram_operator_are_those_of_all_states():
    op = kp.GramOperator(factor(space(), parameters(size=5)))
    assert abs(kp.eigs(op, 8, which="SA").values).max() < 1e-10


def test_asymmetric_operators_are_refused_with_advice():
    state, theta = space(), parameters()
    with pytest.raises(ValueError, match=r"symmetric operator.*op @ op\.T"):
        kp.eigs(OPERATORS["callables"](state, theta), 2)
    with pytest.raises(ValueError, match=r"from a space to itself.*op @ op\.T"):
        kp.eigs(factor(state, theta), 2)
    with pytest.raises(ValueError, match="not symmetric"):
        A = matrix(state, state)
        kp.eigs(kp.MatrixOperator(A, state, state, symmetric=True), 2)
    with pytest.raises(ValueError, match=r"symmetric operator.*op @ op\.T"):
        kp.modes(OPERATORS["matrix"](state, theta), "time", k=2)


@pytest.mark.parametrize("k", [0, -2, 6, 2.5])
def test_an_impossible_k_is_refused(k):
    op = kp.GramOperator(factor(space(), parameters()))
    with pytest.raises(ValueError, match="rank 5 at most; expected 1 <= k <= 5"):
        kp.eigs(op, k)
    with pytest.raises(ValueError, match="rank 3 at most"):
        kp.modes(op, "time", k=4)


def test_what_does_not_converge_is_flagged():
    state = space(shape=(4, 6, 25))
    op = kp.GramOperator(factor(state, parameters(size=550)))
    with pytest.warns(UserWarning, match="did not reach the residual"):
        found = kp.eigs(op, 10, BlockLanczos(dense=0, maxiter=2))
    assert not found.converged.any() and found.residuals.min() > 1e-6


def test_progress_seed_and_labels():
    state = space(shape=(4, 6, 25))
    op = kp.GramOperator(factor(state, parameters(size=550)))
    seen = []
    found = kp.eigs(op, 3, ITERATIVE, seed=1, callback=lambda calls, residuals: seen.append((calls, residuals.max())))
    assert len(seen) > 1 and seen[-1][1] <= 1e-6
    again = kp.eigs(op, 3, ITERATIVE, seed=Random(1))
    assert (found.vectors == again.vectors).all()
    data = found.to_xarray()
    assert data.vectors.dims == ("mode", "trial", "time", "unit") and data.sizes["mode"] == 3
    assert_close(data.eigenvalues.values, found.values)
    assert data.converged.values.all() and data.attrs["applications"] == found.applications
    with pytest.raises(ValueError, match=r"kp\.trace"):
        _ = found.explained


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("axis", ["trial", "time", "unit"])
def test_modes_are_those_of_the_partial_trace(library, axis, weighted):
    op = kp.GramOperator(factor(space(library, weighted=weighted), parameters(library)))
    reduced = kp.partial_trace(op, keep=axis)
    found = kp.modes(op, axis, k=2)
    expected = np.linalg.eigvalsh(dense(reduced))[::-1]
    assert_close(found.values, expected[:2])
    assert_close(found.explained, expected[:2] / kp.trace(op).value)
    assert found.space.axes == (axis,) and float(to_numpy(found.residuals).max()) < 1e-12
    inner = found.space.inner(found.vectors[:, None] + 0 * found.vectors[None], found.vectors[None])
    assert_close(inner, np.eye(2))
    values = op.domain.xp.asarray(found.values, dtype=op.domain.dtype)
    assert_close(reduced.mv(found.vectors), values[:, None] * found.vectors)
    assert_close(kp.modes(reduced, axis, k=2).values, found.values)
    assert "total" in found.to_xarray().attrs


def test_sampled_modes_approach_the_exact_ones():
    op = kp.GramOperator(factor(space(shape=(2, 3, 20)), parameters(size=150)))
    exact = kp.modes(op, "time", k=3)
    near, far = (kp.modes(op, "time", k=3, samples=samples, seed=1) for samples in (4000, 40))
    errors = [np.abs(found.values / exact.values - 1).max() for found in (near, far)]
    assert errors[0] < 0.1 and errors[0] < errors[1]
    assert near.applications == 24 + 2000 and exact.stderr is None
    assert_close(near.to_xarray()["stderr"].values, near.stderr)


def test_values_of_sampled_modes_are_what_these_modes_carry(eager_library):
    state = space(eager_library, shape=(4, 12, 10))
    op = kp.GramOperator(kp.Operator(state, state, lambda q: q, lambda q: q))
    runs = [kp.modes(op, "time", k=12, samples=20, seed=seed) for seed in range(100)]  # of 40 times the identity
    values, bars = (np.array([to_numpy(getattr(run, what)) for run in runs]) for what in ("values", "stderr"))
    assert np.abs((values.mean(0) - 40) / values.std(0) * 10).max() < 4
    assert (np.mean(np.abs(values - 40) <= 1.96 * bars, axis=0) > 0.85).all()
    kernel = kp.partial_trace(op, "time", samples=20)
    assert float(to_numpy(kp.modes(kernel, "time", k=12).values).sum()) == pytest.approx(kp.trace(kernel).value)
    assert np.linalg.eigvalsh(to_numpy(kernel.matrix))[-1] > 40 * 1.1
    assert runs[0].converged.all()
