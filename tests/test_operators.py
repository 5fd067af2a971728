"""The algebra of operators and spaces: adjoints, compositions, dense and scipy forms, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import eigsh, svds
from synthetic import LIBRARIES, OPERATORS, as_array, assert_close, eager_library, factor, library, parameters, space

import kpflow_dyn as kp
from kpflow_dyn._arrays import Random, to_numpy
from kpflow_dyn._spaces.rows import is_symmetric

__all__ = ["eager_library", "library"]


def both_spaces(library, dtype="float64", weighted=False):
    return space(library, dtype, weighted=weighted), parameters(library, dtype)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_adjoint_is_the_adjoint_in_the_inner_products(eager_library, name, weighted):
    op = OPERATORS[name](*both_spaces(eager_library, weighted=weighted))
    assert kp.check_adjoint(op) < 1e-12
    assert kp.check_adjoint(op.T) < 1e-12


@pytest.mark.parametrize("name", OPERATORS)
def test_mv_is_the_dense_matrix(eager_library, name):
    op = OPERATORS[name](*both_spaces(eager_library, weighted=True))
    q = op.domain.normal(3, Random(1))
    expected = q.reshape((3, -1)) @ op.dense().T
    assert_close(op.mv(q).reshape((3, -1)), expected)
    assert_close(op.mv(q[1]).reshape(-1), expected[1])
    assert_close(op.mv(q[:, None])[2, 0].reshape(-1), expected[2])


@pytest.mark.parametrize("name", OPERATORS)
def test_the_adjoint_of_the_adjoint_is_the_operator(name):
    op = OPERATORS[name](*both_spaces("numpy", weighted=True))
    assert_close(op.T.T.dense(), op.dense())


@pytest.mark.parametrize("name", ["callables", "marginal"])
def test_operators_act_on_every_library(library, name):
    op = OPERATORS[name](*both_spaces(library, weighted=True))
    assert kp.check_adjoint(op) < 1e-12
    q = op.domain.normal(2, Random(1))
    assert_close(op.mv(q).reshape((2, -1)), q.reshape((2, -1)) @ op.dense().T)


def test_composition_sum_and_scalar_are_those_of_the_matrices(library):
    state, theta = both_spaces(library, weighted=True)
    a, b = OPERATORS["matrix"](state, theta), OPERATORS["gram"](state, theta)
    assert_close((a @ b).dense(), a.dense() @ b.dense())
    assert_close((a + b).dense(), a.dense() + b.dense())
    assert_close((a - b).dense(), a.dense() - b.dense())
    assert_close((np.float64(3) * a).dense(), 3 * a.dense())
    assert (b + b).symmetric and (2 * b).symmetric and not (a + b).symmetric


def test_scipy_form_has_the_operators_own_spectrum(library):
    state, theta = both_spaces(library, weighted=True)
    gram, J = OPERATORS["gram"](state, theta), factor(state, theta)
    matrix = to_numpy(gram.dense())
    assert np.abs(matrix - matrix.T).max() > 0.1  # symmetric in the weighted inner product only
    form = gram.to_scipy()
    as_matrix = form @ np.eye(state.size)
    assert_close(as_matrix, as_matrix.T)
    expected = np.sort(np.linalg.eigvals(matrix).real)[::-1][:3]
    assert_close(np.sort(eigsh(form, 3, v0=np.ones(state.size))[0])[::-1], expected)
    assert_close(np.sort(svds(J.to_scipy(), 3, v0=np.ones(theta.size))[1])[::-1] ** 2, expected)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 3),
    size=st.integers(1, 6),
    probes=st.lists(st.integers(0, 3), max_size=2),
    dtype=st.sampled_from(["float32", "float64"]),
    weighted=st.booleans(),
    library=st.sampled_from([name for name in LIBRARIES if name != "jax"]),
    name=st.sampled_from(sorted(OPERATORS)),
)
def test_any_shape_any_probes_and_either_dtype(shape, size, probes, dtype, weighted, library, name):
    op = OPERATORS[name](space(library, dtype, shape, weighted), parameters(library, dtype, size))
    count = int(np.prod(probes, dtype=int))
    q = op.domain.normal(count, Random(2)).reshape((*probes, *op.domain.shape))
    image = op.mv(q)
    assert tuple(image.shape) == (*probes, *op.codomain.shape) and image.dtype == q.dtype
    assert_close(image.reshape((count, op.codomain.size)), q.reshape((count, op.domain.size)) @ op.dense().T, dtype)
    assert kp.check_adjoint(op) < (1e-3 if dtype == "float32" else 1e-11)


def test_a_vector_that_does_not_fit_is_refused(library):
    op = OPERATORS["matrix"](*both_spaces(library))
    q = op.domain.normal(1, Random(0))
    with pytest.raises(ValueError, match=r"expected \[\.\.\., trial, time, unit\] = \[\.\.\., 2, 3, 4\]"):
        op.mv(q[..., :3])
    with pytest.raises(ValueError, match="shape"):
        op.mv(q[0, 0])
    with pytest.raises(TypeError, match="float32"):
        op.mv(as_array(library, to_numpy(q), "float32"))
    other = next(name for name in LIBRARIES if name != library)
    with pytest.raises(TypeError, match="expected"):
        op.mv(as_array(other, to_numpy(q)))


def test_operators_that_do_not_fit_are_refused():
    state, theta = both_spaces("numpy")
    J, gram = factor(state, theta), OPERATORS["gram"](state, theta)
    with pytest.raises(ValueError, match="cannot compose"):
        J @ gram
    with pytest.raises(ValueError, match="cannot add"):
        J + gram
    with pytest.raises(TypeError, match="@ composes"):
        J @ np.ones(5)
    with pytest.raises(TypeError, match="only a real scalar"):
        J * gram
    with pytest.raises(ValueError, match="cannot compose"):
        gram @ OPERATORS["gram"](space(dtype="float32"), parameters(dtype="float32"))
    with pytest.raises(ValueError, match="expected"):
        kp.MatrixOperator(np.ones((3, 3)), theta, state)


def test_a_dense_matrix_that_would_not_fit_is_refused():
    line = kp.Space(("unit",), (200_000,), np.zeros(1))
    with pytest.raises(ValueError, match="GiB; use eigs"):
        kp.Operator(line, line, lambda q: q, None).dense()


@pytest.mark.parametrize(("axes", "shape"), [(("a",), (2, 3)), (("a", "a"), (2, 3)), (("a", "b"), (2, 0))])
def test_a_space_without_a_name_or_entry_for_each_axis_is_refused(axes, shape):
    with pytest.raises(ValueError, match="Space"):
        kp.Space(axes, shape, np.zeros(1))


def test_euclidean_coordinates_turn_the_inner_product_into_the_plain_one(library):
    state = space(library, weighted=True)
    a, b = state.normal(2, Random(0)), state.normal(2, Random(1))
    plain = (state.to_euclidean(a) * state.to_euclidean(b)).reshape((2, -1)).sum(1)
    assert_close(state.inner(a, b), plain)
    assert_close(state.from_euclidean(state.to_euclidean(a)), a)


def test_normal_coordinates_have_unit_variance_whatever_the_measure():
    state = space(weighted=True)
    draws = state.to_euclidean(state.normal(4000, Random(0))).reshape(4000, -1)
    assert np.abs(np.cov(draws.T) - np.eye(state.size)).max() < 0.12


def test_kept_axes_keep_their_measure(library):
    state = space(library, weighted=True)
    assert_close(state.keep(("time",)).measure, np.linspace(0.5, 1.5, 3))
    assert state.keep(("trial",)).measure is None and state.keep(()).size == 1
    kept = state.keep(("unit", "time"))
    assert kept.axes == ("time", "unit") and kept.shape == (3, 4)
    assert_close(kept.measure * as_array(library, np.ones((3, 4))), np.linspace(0.5, 1.5, 3)[:, None] * np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"expected distinct names out of \('trial', 'time', 'unit'\)"):
        state.keep(("neuron",))


def test_random_streams_repeat_and_differ(library):
    like = as_array(library, np.zeros(1))
    first, again, other = (to_numpy(Random(seed).normal((50,), like)) for seed in (3, 3, 4))
    assert (first == again).all() and np.abs(first - other).min() > 0
    stream = Random(3)
    assert np.abs(to_numpy(stream.normal((50,), like)) - to_numpy(stream.normal((50,), like))).min() > 0
    third = to_numpy(Random(stream).normal((50,), like))
    assert np.abs(third - first).min() > 0 and np.abs(third - to_numpy(stream.normal((50,), like))).min() > 0
    with pytest.raises(TypeError, match="seed"):
        Random(0.5)


def test_symmetry_is_not_met_by_chance() -> None:
    """A propagator is the identity and a little below it: one pair of random vectors in some hundred finds no fault."""
    matrix = (np.eye(60) + 0.02 * np.tril(np.random.default_rng(0).standard_normal((60, 60)), -1)).astype("float32")
    unit = kp.Space(("unit",), (60,), np.zeros(1, "float32"))
    lower, even = (
        kp.Operator(unit, unit, lambda q, a=a: q @ a.T, lambda q, a=a: q @ a) for a in (matrix, matrix @ matrix.T)
    )
    assert not any(is_symmetric(lower, Random(seed)) for seed in range(2000))
    assert all(is_symmetric(even, Random(seed)) for seed in range(50))
