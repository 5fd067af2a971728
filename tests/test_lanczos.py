"""Block Lanczos against dense eigh and scipy: values, multiplicities, true residuals, counts, breakdown, bad input."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from conftest import cases
from scipy.sparse.linalg import LinearOperator, eigsh
from synthetic import LIBRARIES, as_array, library, spectra

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._arrays.dots import gram, to_double
from kpflow_dyn.solvers import BlockLanczos, Dense, FastestBlock
from kpflow_dyn.solvers._certify import CHECKS
from kpflow_dyn.solvers._orthogonalise import combine, descending_eigh, orthonormalise

__all__ = ["library"]

N = 600
ITERATIVE = BlockLanczos(block=16, dense=0)
SEEDS = 40  # spectra with repeated eigenvalues


def diagonal(values, like="numpy", dtype="float64"):
    entries = as_array(like, values, dtype)
    return (lambda rows: rows * entries), entries


def dense_symmetric(values, seed=0):
    """A matrix with this spectrum and no special eigenvectors."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))
    return (q * values) @ q.T


def check(pairs, matrix, k, tol=1e-6):
    """Values, orthonormality and residuals against the dense matrix, and the counts of applications."""
    values, vectors = to_numpy(pairs.values), to_numpy(pairs.vectors).astype(float)
    expected = np.linalg.eigvalsh(matrix)[::-1]
    norm = max(np.abs(expected).max(), 1e-300)
    assert np.abs(values - expected[:k]).max() <= tol * norm
    assert (np.diff(values) <= 0).all()
    assert np.abs(vectors @ vectors.T - np.eye(k)).max() < 1e-10
    true = np.linalg.norm(vectors @ matrix - values[:, None] * vectors, axis=1) / norm
    np.testing.assert_allclose(to_numpy(pairs.residuals), true, rtol=1e-2, atol=1e-14)
    assert to_numpy(pairs.converged).all() and true.max() <= tol
    assert pairs.calls <= pairs.applications


@pytest.mark.parametrize("block", [1, 5, 16])
@pytest.mark.parametrize("name", ["power", "exponential", "flat"])
def test_leading_pairs_of_known_spectra(name, block):
    matrix = dense_symmetric(spectra(N)[name])
    check(BlockLanczos(block=block, dense=0).solve(lambda x: x @ matrix, N, 20, like=matrix), matrix, 20)


@pytest.mark.parametrize("block", [None, 1, 2, 16])
@pytest.mark.parametrize("k", [10, 50, 110])
@pytest.mark.parametrize("seed", cases(range(3), {0}))
def test_repeated_eigenvalues_keep_their_multiplicity(k, seed, block):
    apply, like = diagonal(np.kron(np.exp(-np.arange(15) / 3), np.ones(40)))
    pairs = BlockLanczos(block, dense=0).solve(apply, N, k, like=like, seed=seed)
    check(pairs, np.diag(like), k)


def test_a_gram_matrix_times_the_identity_of_many_units():
    V = np.random.default_rng(0).standard_normal((30, 7))
    matrix = np.kron(V @ V.T, np.eye(64))  # an untrained network without recurrence: every eigenvalue 64 times
    pairs = BlockLanczos().solve(lambda x: x @ matrix, len(matrix), 100, like=matrix)
    expected = np.repeat(np.linalg.eigvalsh(V @ V.T)[::-1], 64)[:100]
    np.testing.assert_allclose(pairs.values, expected, rtol=1e-9)


def test_a_single_start_row_given_by_the_caller_finds_a_repeated_eigenvalue():
    apply, like = diagonal(np.r_[2.0, 2.0, 2.0, np.linspace(1, 0, N - 3)])
    pairs = ITERATIVE.solve(apply, N, 4, like=like, start=np.ones((1, N)))
    np.testing.assert_allclose(pairs.values, [2, 2, 2, 1], atol=1e-9)


def test_a_start_blind_to_the_leading_vector_does_not_miss_it():
    apply, like = diagonal(np.r_[5.0, np.linspace(1, 0, N - 1)])
    start = np.eye(N)[1:5]
    assert ITERATIVE.solve(apply, N, 2, like=like, start=start).values[0] == pytest.approx(5.0)


def test_a_warm_start_saves_steps():
    apply, like = diagonal(spectra(N)["power"])
    cold = ITERATIVE.solve(apply, N, 10, like=like)
    nearby, _ = diagonal(spectra(N)["power"] * (1 + 1e-4 * np.random.default_rng(0).standard_normal(N)))
    steps: dict[str, list[float]] = {"warm": [], "fresh": []}
    warm, fresh = (
        BlockLanczos(dense=0, block=10).solve(
            nearby, N, 10, like=like, start=start, callback=lambda calls, r, name=name: steps[name].append(r.max())
        )
        for name, start in (("warm", cold.vectors), ("fresh", None))
    )
    assert len(steps["warm"]) < len(steps["fresh"])
    np.testing.assert_allclose(warm.values, fresh.values, rtol=1e-9)


@pytest.mark.parametrize(("k", "block", "most"), [(10, 8, 140), (10, 16, 210), (50, 8, 330), (50, 16, 420)])
def test_applications_stay_near_those_of_an_unrestarted_run(k, block, most):
    """On i^-1/2, like an RNN's kernel; without restart they are 122, 186, 290 and 370, and scipy's 48 and 154."""
    n = 4000
    apply, like = diagonal(np.arange(1, n + 1) ** -0.5)
    pairs = BlockLanczos(block=block).solve(apply, n, k, like=like)
    assert pairs.applications <= most and to_numpy(pairs.converged).all()


def test_long_vectors_take_few_more_applications_than_scipy_without_a_certificate():
    """Two random rows take turns: they need what one needs, and a few more; the certificate takes k at most."""
    n, k = 40_000, 20
    root = np.arange(1, n + 1) ** -0.5
    scipys: list[int] = []
    operator = LinearOperator((n, n), matvec=lambda v: scipys.append(1) or root**2 * v, dtype=np.float64)
    eigsh(operator, k, which="LA", tol=1e-6, v0=np.random.default_rng(0).standard_normal(n))
    steps: list[int] = []
    found = BlockLanczos().solve_product(
        lambda rows: rows * root, lambda rows: rows * root, n, k, like=root, squared=True,
        callback=lambda calls, _r: steps.append(calls),
    )  # fmt: skip
    assert to_numpy(found.converged).all()
    np.testing.assert_allclose(found.values**2, root[:k] ** 2, rtol=0, atol=1e-6)
    assert found.applications <= 1.15 * len(scipys), (found.applications, len(scipys))
    assert found.applications - steps[-1] <= k, (found.applications, steps[-1])


@pytest.mark.parametrize("seed", range(4))
def test_two_long_rows_in_turns_find_both_copies(seed):
    """Also of the last wanted eigenvalue, whose second copy stands behind others for longest."""
    n, k, random = 40_000, 12, np.random.default_rng(seed)
    values = np.arange(1, n + 1.0) ** -1.0
    twice = k - 1 - random.integers(3)
    values[-1] = values[twice]
    found = BlockLanczos().solve(lambda rows: rows * values, n, k, like=values, seed=seed)
    np.testing.assert_allclose(found.values, np.sort(values)[::-1][:k], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_that_two_values_agree_costs_at_most_as_many_applications_as_there_are_pairs(dtype):
    """A few steps from one row show that there is no third, as the basis knows many pairs behind the wanted ones."""
    n, k = 40_000, 20
    values = (np.arange(1, n + 1.0) ** -0.5).astype(dtype)
    values[5] = values[4]
    steps: list[int] = []
    found = BlockLanczos(2).solve(
        lambda rows: rows * values, n, k, like=values, callback=lambda calls, _r: steps.append(calls)
    )
    np.testing.assert_allclose(found.values, values[:k], rtol=0, atol=2e-6)
    assert found.calls - steps[-1] <= k + 2, (found.calls, steps[-1])
    values[-1] = values[4]
    found = BlockLanczos(2).solve(lambda rows: rows * values, n, k, like=values)
    np.testing.assert_allclose(found.values, np.sort(values)[::-1][:k], rtol=0, atol=2e-6)


def test_agrees_with_scipy_on_an_indefinite_operator():
    values = np.linspace(-2, 1, N)
    matrix = dense_symmetric(values)
    pairs = BlockLanczos(dense=0, tol=1e-8).solve(lambda x: x @ matrix, N, 5, like=matrix)
    oracle = eigsh(LinearOperator((N, N), matvec=lambda x: matrix @ x, dtype=float), 5, which="LA", v0=np.ones(N))[0]
    np.testing.assert_allclose(pairs.values, np.sort(oracle)[::-1], atol=1e-8)
    assert float(pairs.residuals.max()) <= 1e-8


ENDS = {"LA": lambda v: -v, "SA": lambda v: v, "LM": lambda v: -abs(v)}


@pytest.mark.parametrize("dense", [0, 1000])
@pytest.mark.parametrize("which", ENDS)
def test_either_end_or_both(which, dense):
    values = np.concatenate(
        [np.linspace(-3, -1, 20) ** 3, np.random.default_rng(0).uniform(-0.5, 0.5, 560), np.arange(20)]
    )
    matrix = dense_symmetric(values)
    pairs = BlockLanczos(block=4, dense=dense).solve(lambda x: x @ matrix, N, 12, like=matrix, which=which)
    expected = values[np.argsort(ENDS[which](values))][:12]
    np.testing.assert_allclose(pairs.values, expected, atol=1e-6 * 27)
    assert pairs.converged.all()
    rest = pairs.vectors @ matrix - pairs.values[:, None] * pairs.vectors
    assert np.linalg.norm(rest, axis=1).max() < 1e-6 * 27


def test_copies_on_both_sides_of_zero_are_all_found():
    """Of +2 and -2, each twenty times, in turn the largest in magnitude; one start row finds one copy of each."""
    apply, like = diagonal(np.concatenate([2 * np.ones(20), -2 * np.ones(20), np.linspace(-1, 1, N - 40)]))
    pairs = BlockLanczos(block=1, dense=0).solve(apply, N, 40, like=like, which="LM")
    np.testing.assert_allclose(np.sort(pairs.values), np.repeat([-2.0, 2.0], 20), atol=1e-6)


def clustered(random, n):
    """Eigenvalues that lie dense, on one or both sides of zero, and up to four repeated ones at or near the ends."""
    values = [
        random.uniform(-1, 1, n),
        np.linspace(-1, 1, n),
        random.standard_normal(n) / 3,
        random.uniform(0, 1, n),
        np.arange(1, n + 1) ** -0.5 * random.choice([-1, 1], n),
    ][random.integers(5)]
    leading, signs = np.sort(np.abs(values))[::-1], [-1, 1] if values.min() < 0 else [1]
    for _ in range(random.integers(1, 5)):
        value = leading[random.integers(12)] * random.uniform(0.9, 1.1)
        copies = random.integers(2, 13) if random.random() < 0.8 else random.integers(13, 100)
        values[random.choice(n, copies, replace=False)] = random.choice(signs) * value
    return values


def assert_all_found_or_warned(seed, most=16, library="numpy", dtype="float64", tol=2e-6):
    """With a random block and k, at a random end, of a spectrum with repeated values."""
    random = np.random.default_rng(seed)
    values = clustered(random, 400)
    k, which, block = int(random.integers(3, most)), [*ENDS][random.integers(3)], int(random.choice([1, 2, 4]))
    apply, like = diagonal(values, library, dtype)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pairs = BlockLanczos(block, dense=0).solve(apply, 400, k, like=like, which=which, seed=seed)
    expected = np.sort(ENDS[which](values))[:k]
    off = np.abs(ENDS[which](to_numpy(pairs.values)) - expected).max() / np.abs(values).max()
    assert off <= tol or said, f"seed {seed}, block {block}, {which}, k = {k}: off by {off:.1e}, and no warning"
    return bool(said)


def test_repeated_eigenvalues_among_dense_ones_are_found_or_a_warning_says_so():
    """A value behind the wanted ones that converged early does not show that no copy before it was missed."""
    warned = [assert_all_found_or_warned(seed) for seed in range(SEEDS)]
    assert sum(warned) < SEEDS / 5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_repeated_eigenvalues_are_found_in_many_draws(library, dtype):
    first, number = (1000, 100) if library != "jax" else (0, 10)
    for seed in range(first, first + number):
        assert_all_found_or_warned(seed, 40 if library != "jax" else 16, library, dtype, 4e-6)


def test_repeated_singular_values_among_dense_ones():
    random = np.random.default_rng(0)
    s = np.sort(np.r_[np.repeat([1.0, 0.95, 0.9], [7, 3, 12]), random.uniform(0, 0.97, 378)])[::-1]
    turn = np.linalg.qr(random.standard_normal((400, 400)))[0]
    for k in (6, 9, 25):
        found = BlockLanczos(2, dense=0).solve_product(
            lambda rows: rows * s @ turn, lambda rows: rows @ turn.T * s, 400, k, like=s
        )
        np.testing.assert_allclose(found.values, s[:k], rtol=1e-5)


def test_where_maxiter_ends_the_search_a_warning_says_that_copies_may_be_missing():
    """All pairs have converged by then, and only new rows would show that there are no more of them."""
    apply, like = diagonal(np.linspace(1, 0, N))
    calls: list[int] = []
    BlockLanczos(block=1, dense=0).solve(apply, N, 3, like=like, callback=lambda done, _r: calls.append(done))
    few = BlockLanczos(block=1, dense=0, maxiter=calls[-1] + 3)
    with pytest.warns(UserWarning, match="calls did not show whether more copies are missing; give a larger block"):
        pairs = few.solve(apply, N, 3, like=like)
    assert pairs.converged.all()


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("solver", [ITERATIVE, BlockLanczos(dense=N), Dense()], ids=["iterative", "small", "dense"])
def test_pairs_orthogonal_to_known_ones_are_the_next(solver, which):
    """Zeros stand for what was taken out in (1 - U U^T) A (1 - U U^T), and must not come up as eigenvalues."""
    values = np.concatenate([np.linspace(-3, -1, 300), np.linspace(1, 2, N - 300) ** 2])
    matrix = dense_symmetric(values)
    first = solver.solve(lambda x: x @ matrix, N, 6, like=matrix, which=which)
    then = solver.solve(lambda x: x @ matrix, N, 6, like=matrix, which=which, deflate=first.vectors)
    expected = values[np.argsort(ENDS[which](values))]
    np.testing.assert_allclose(then.values, expected[6:12], atol=1e-5)
    assert np.abs(then.vectors @ first.vectors.T).max() < 1e-10
    with pytest.raises(ValueError, match=r"dimension 594; expected 1 <= k <= 594"):
        solver.solve(lambda x: x @ matrix, N, N - 5, like=matrix, deflate=first.vectors)
    with pytest.raises(ValueError, match=r"deflate has shape \(600,\), expected rows \[d, 600\]"):
        solver.solve(lambda x: x @ matrix, N, 2, like=matrix, deflate=np.ones(N))


def test_the_block_is_the_one_that_promises_to_be_fastest(monkeypatch):
    """Calls that cost the same whatever they hold want large blocks, rows that cost the same each want small ones."""
    apply, like = diagonal(spectra(N)["power"])
    found = {}
    for name, price in {"calls": lambda rows: 1.0, "rows": float}.items():
        clock, blocks = [0.0], []

        def timed(rows, price=price, clock=clock, blocks=blocks):
            clock[0] += price(rows.shape[0])
            blocks.append(rows.shape[0])
            return apply(rows)

        monkeypatch.setattr("kpflow_dyn.solvers._block.time.perf_counter", lambda clock=clock: clock[0])
        solver = BlockLanczos(block=FastestBlock(), dense=0)
        first, again = (solver.solve(timed, N, 20, like=like) for _ in range(2))
        assert (first.vectors == again.vectors).all() and again.applications == first.applications
        found[name] = blocks[-again.calls]
    assert found == {"calls": 64, "rows": 2}


def test_the_default_block_hangs_on_no_clock(monkeypatch):
    """Small for long vectors and larger for short ones, and the same whatever calls take."""

    def no_clock() -> float:
        raise AssertionError("the clock was read")

    monkeypatch.setattr("kpflow_dyn.solvers._block.time.perf_counter", no_clock)
    found = {}
    for n in (N, 5_000, 50_000):
        blocks: list[int] = []

        def counted(rows, blocks=blocks):
            blocks.append(rows.shape[0])
            return rows * np.exp(-np.arange(rows.shape[1]))

        BlockLanczos(dense=0).solve(counted, n, 3, like=np.zeros(1))
        found[n] = blocks[0]
    assert found == {N: 16, 5_000: 4, 50_000: 2}


@pytest.mark.parametrize("noise", [1e-9, 1e-4])
def test_claims_that_do_not_hold_are_replaced_by_true_residuals(noise):
    """An operator that is off by a little at each call, in a way that no recurrence can know."""
    values, random = spectra(N)["power"], np.random.default_rng(0)

    def apply(rows):
        wrong = random.standard_normal(rows.shape) / N**0.5
        return rows * values + noise * np.linalg.norm(rows, axis=1, keepdims=True) * wrong

    with warnings.catch_warnings(action="ignore"):
        pairs = BlockLanczos(block=8, dense=0, maxiter=100).solve(apply, N, 10, like=values)
    true = np.linalg.norm(pairs.vectors * values - pairs.values[:, None] * pairs.vectors, axis=1)
    assert (pairs.converged == (pairs.residuals <= 1e-6)).all() and pairs.converged.all() == (noise < 1e-6)
    assert (pairs.residuals > 0.3 * noise).all() and (pairs.residuals >= 0.5 * true).all()


def test_the_claims_cost_a_few_applications_only():
    apply, like = diagonal(spectra(N)["exponential"])
    seen: list[int] = []
    pairs = BlockLanczos(block=4, dense=0).solve(apply, N, 20, like=like, callback=lambda calls, _r: seen.append(calls))
    assert pairs.applications == 4 * seen[-1] + CHECKS
    check(pairs, np.diag(like), 20)


def test_triplets_of_a_product_and_eigenpairs_of_its_other_side():
    random = np.random.default_rng(5)
    L = random.standard_normal((300, 280)) * np.exp(-np.arange(280) / 15)
    u, s, vt = np.linalg.svd(L)
    for solver in (BlockLanczos(block=4, dense=0), Dense()):
        for squared in (False, True):
            found = solver.solve_product(lambda w: w @ L.T, lambda q: q @ L, 280, 12, like=L, squared=squared)
            np.testing.assert_allclose(found.values, s[:12], rtol=1e-6)
            assert np.abs(np.abs(np.sum(found.left * u.T[:12], 1)) - 1).max() < 1e-6
            assert np.abs(np.abs(np.sum(found.right * vt[:12], 1)) - 1).max() < 1e-6
            back = found.left @ L - found.values[:, None] * found.right
            forward = found.right @ L.T - found.values[:, None] * found.left
            true = np.sqrt((back**2).sum(1) + (forward**2).sum(1)) / s[0]
            if squared:
                true = (
                    np.linalg.norm(found.left @ L @ L.T - found.values[:, None] ** 2 * found.left, axis=1) / s[0] ** 2
                )
            np.testing.assert_allclose(found.residuals, true, rtol=1e-2, atol=1e-13)
            assert found.converged.all()


def test_dense_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="dimension 30000 would be needed, 7 GiB; the largest dimension is 20000"):
        Dense().solve(lambda rows: rows, 30_000, 2, like=np.zeros(1))


def test_an_unknown_end_is_refused():
    apply, like = diagonal(np.ones(N))
    with pytest.raises(ValueError, match="which is 'SM', expected one of LA, SA, LM"):
        ITERATIVE.solve(apply, N, 2, like=like, which="SM")


@pytest.mark.parametrize("block", [1, 16])
def test_zero_operator(block):
    apply, like = diagonal(np.zeros(N))
    check(BlockLanczos(block=block, dense=0).solve(apply, N, 20, like=like), np.diag(like), 20)


@pytest.mark.parametrize("rank", [1, 3, 30])
@pytest.mark.parametrize("k", [5, 60])
def test_rank_below_k(rank, k):
    apply, like = diagonal(np.r_[np.linspace(3, 1, rank), np.zeros(N - rank)])
    check(ITERATIVE.solve(apply, N, k, like=like), np.diag(like), k)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (7, 7), (300, 300), (300, 290)])
def test_small_dimensions_and_all_pairs(n, k):
    matrix = dense_symmetric(np.arange(n) - 1.0)
    check(BlockLanczos().solve(lambda x: x @ matrix, n, k, like=matrix), matrix, k)


@pytest.mark.parametrize("dense", [0, 1000])
def test_float32_reaches_its_floor_and_says_so(dense):
    values = spectra(N)["repeated"]
    matrix = dense_symmetric(values).astype("float32")
    pairs = BlockLanczos(dense=dense).solve(lambda x: x @ matrix, N, 20, like=matrix)
    assert np.abs(pairs.values - values[:20]).max() < 1e-6 and pairs.vectors.dtype == np.float32
    assert pairs.values.dtype == np.float64 and pairs.converged.all()
    wide = pairs.vectors.astype(float)
    true = np.linalg.norm(wide @ matrix - pairs.values[:, None] * wide, axis=1)
    assert np.abs(true - pairs.residuals).max() < 5e-7
    with pytest.warns(UserWarning, match="did not reach the residual 1e-09"):
        beyond = BlockLanczos(dense=dense, tol=1e-9).solve(lambda x: x @ matrix, N, 20, like=matrix)
    assert not beyond.converged.all()


def test_what_does_not_converge_is_flagged():
    apply, like = diagonal(np.linspace(1, 0.99, N))
    with pytest.warns(UserWarning, match=r"of 20 eigenpairs did not reach .* raise maxiter"):
        pairs = BlockLanczos(dense=0, maxiter=3).solve(apply, N, 20, like=like)
    assert not pairs.converged.all() and pairs.values.shape == (20,)
    assert (pairs.converged == (pairs.residuals <= 1e-6)).all()


def test_same_seed_same_result_and_progress_is_reported():
    apply, like = diagonal(spectra(N)["power"])
    seen: list[tuple[int, np.ndarray]] = []
    first = ITERATIVE.solve(apply, N, 5, like=like, seed=1, callback=lambda calls, r: seen.append((calls, r)))
    again, other = (ITERATIVE.solve(apply, N, 5, like=like, seed=seed) for seed in (1, 2))
    assert (first.vectors == again.vectors).all() and (first.vectors != other.vectors).any()
    assert [calls for calls, _ in seen] == list(range(seen[0][0], seen[0][0] + len(seen)))
    assert all(r.shape == (5,) for _, r in seen) and seen[-1][1].max() <= 1e-6 < seen[0][1].max()


def test_counts_are_what_the_operator_saw():
    rows_seen: list[int] = []
    values = spectra(N)["power"]

    def apply(rows):
        rows_seen.append(rows.shape[0])
        return rows * values

    for solver in (ITERATIVE, BlockLanczos(dense=N)):
        rows_seen.clear()
        pairs = solver.solve(apply, N, 7, like=values)
        assert (pairs.applications, pairs.calls) == (sum(rows_seen), len(rows_seen))


def test_every_library_takes_the_same_steps(library):
    values, start = spectra(N)["power"], np.random.default_rng(0).standard_normal((8, N))
    histories = []
    for name in ("numpy", library):
        apply, like = diagonal(values, name)
        history: list[np.ndarray] = []
        solver = BlockLanczos(block=8, dense=0)
        pairs = solver.solve(
            apply, N, 4, like=like, start=as_array(name, start), callback=lambda _, r, h=history: h.append(r)
        )
        assert type(pairs.vectors) is type(like) and pairs.vectors.dtype == like.dtype
        histories.append(np.array(history))
    assert np.abs(histories[0] - histories[1]).max() < 1e-10


@pytest.mark.skipif("jax" not in LIBRARIES, reason="jax is not installed")
def test_jax_without_float64_still_solves_the_small_problem_in_float64():
    apply, like = diagonal(spectra(N)["power"], "jax", "float32")
    pairs = ITERATIVE.solve(apply, N, 5, like=like)
    assert pairs.values.dtype == np.float64 and str(pairs.vectors.dtype) == "float32"
    np.testing.assert_allclose(pairs.values, spectra(N)["power"][:5], atol=3e-7)


@pytest.mark.parametrize("dense", [0, 1000])
def test_bad_operators_are_refused(dense):
    solver, like = BlockLanczos(dense=dense), np.zeros(1)
    generic = np.random.default_rng(0).standard_normal((N, N))
    with pytest.raises(ValueError, match="not symmetric"):
        solver.solve(lambda x: x @ generic, N, 3, like=like)
    with pytest.raises(ValueError, match="NaN or inf in call 1"):
        solver.solve(lambda x: x * np.nan, N, 3, like=like)
    with pytest.raises(ValueError, match="keep the shape"):
        solver.solve(lambda x: x[:, :5], N, 3, like=like)
    with pytest.raises(ValueError, match="keep the shape and the dtype"):
        solver.solve(lambda x: x.astype("float32"), N, 3, like=like)


def test_a_nan_that_comes_late_is_refused():
    calls = []

    def apply(rows):
        calls.append(None)
        return rows * (spectra(N)["power"] if len(calls) < 4 else np.inf)

    with pytest.raises(ValueError, match="call 4"):
        ITERATIVE.solve(apply, N, 10, like=np.zeros(1))


@pytest.mark.parametrize("k", [0, -1, N + 1])
def test_an_impossible_k_is_refused(k):
    with pytest.raises(ValueError, match="1 <= k <= 600"):
        BlockLanczos().solve(lambda x: x, N, k, like=np.zeros(1))


def test_bad_options_are_refused():
    for bad in ({"block": 0}, {"tol": 0.0}, {"tol": 2.0}, {"maxiter": 0}):
        with pytest.raises(ValueError, match="expected block >= 1"):
            BlockLanczos(**bad)
    with pytest.raises(ValueError, match="give at least 37"):
        BlockLanczos(block=16, columns=30).solve(lambda x: x, N, 5, like=np.zeros(1))
    with pytest.raises(ValueError, match=r"expected rows \[b, 600\]"):
        BlockLanczos().solve(lambda x: x, N, 5, like=np.zeros(1), start=np.ones(N))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("condition", [1e0, 1e12])
def test_orthonormalise_splits_rows_into_known_and_new(library, dtype, condition):
    rng = np.random.default_rng(0)
    eps = np.finfo(dtype).eps
    basis, _c, _r = orthonormalise(as_array(library, rng.standard_normal((6, 80)), dtype), [], 0.0)
    rows = (np.logspace(0, -np.log10(condition), 5)[:, None] * rng.standard_normal((5, 80))) + 1
    w = as_array(library, rows, dtype)
    q, c, r = orthonormalise(w, [basis], 4 * float(eps) * 10)
    both = to_numpy(gram(q, q)), to_numpy(gram(q, basis))
    assert np.abs(both[0] - np.eye(q.shape[0])).max() < 20 * eps and np.abs(both[1]).max() < 20 * eps
    rebuilt = to_numpy(combine(c, [basis])) + to_numpy(combine(r, [q]))
    assert np.abs(rebuilt - to_numpy(w)).max() < 200 * eps
    assert to_numpy(to_double(w)).dtype == np.float64


def test_orthonormalise_needs_its_second_pass():
    rng = np.random.default_rng(0)
    basis, _c, _r = orthonormalise(rng.standard_normal((6, 80)), [], 0.0)
    w = rng.standard_normal((4, 6)) @ basis + 1e-8 * rng.standard_normal((4, 80))
    q, _c, _r = orthonormalise(w, [basis], 1e-14)
    assert np.abs(q @ basis.T).max() < 1e-15


def test_a_decomposition_that_does_not_converge_is_taken_in_the_other_order(monkeypatch):
    """As happens to some matrices with many equal eigenvalues: LAPACK then decomposes the same with rows reversed."""
    matrix, eigh = dense_symmetric(np.arange(8.0)), np.linalg.eigh

    def fails_on_this_order(given):
        if np.allclose(given, matrix):
            raise np.linalg.LinAlgError("Eigenvalues did not converge")
        return eigh(given)

    monkeypatch.setattr(np.linalg, "eigh", fails_on_this_order)
    values, vectors = descending_eigh(matrix)
    np.testing.assert_allclose(values, np.arange(8)[::-1], atol=1e-12)
    np.testing.assert_allclose(matrix @ vectors, vectors * values, atol=1e-12)


def test_orthonormalise_drops_dependent_rows():
    rows = np.random.default_rng(0).standard_normal((3, 40))
    w = np.concatenate([rows, rows[:2] + rows[1:], np.zeros((1, 40))])
    q, _c, r = orthonormalise(w, [], 1e-12)
    assert q.shape == (3, 40)
    np.testing.assert_allclose(r @ q, w, atol=1e-12)


@pytest.mark.parametrize("seed", [12549, 11638, 10271])
def test_values_that_almost_agree_are_not_missed(seed: int) -> None:
    """From one row, values some 50 tolerances apart, though Ritz vectors may hold a little of a missing one."""
    rng, n = np.random.default_rng(seed), 400
    copies, k = int(rng.integers(2, 11)), int(rng.integers(1, 13))
    apart, before = [1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 0][rng.integers(6)], int(rng.integers(0, 4))
    rest = 0.9 ** np.arange(1, n - before - copies + 1)
    values = rng.permutation(np.concatenate([1 + rng.random(before), 1 + apart * np.arange(copies), rest]))
    found = BlockLanczos(block=1, dense=0).solve(lambda rows: rows * values, n, k, like=values[None], seed=seed)
    np.testing.assert_allclose(found.values, np.sort(values)[::-1][:k], atol=5e-6)
