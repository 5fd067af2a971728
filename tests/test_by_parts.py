"""K of a recurrent cell is a direct sum over its units: which ones, its spectrum, its moments."""

import numpy as np
import pytest
import torch

import kpflow_dyn as kp
from kpflow_dyn._arrays import Random, to_numpy
from kpflow_dyn._spaces.parts import Parts
from kpflow_dyn._spaces.rows import euclidean_matrix
from kpflow_dyn.solvers import BlockLanczos
from kpflow_dyn.solvers._counted import Counted
from kpflow_dyn.solvers._direct_sum import Bases, MomentsOfParts, leading_of

jax = pytest.importorskip("jax")
eqx = pytest.importorskip("equinox")

TRIALS, TIMES, INPUTS = 4, 7, 3
LANCZOS = BlockLanczos(tol=1e-8, dense=1)


def torch_flow(cell, **options):
    torch.manual_seed(0)
    return kp.linearize(
        kp.solve(kp.DiscreteProblem(cell.double(), torch.randn(TRIALS, TIMES, INPUTS).double())), **options
    )


def jax_flow(cell):
    x = jax.random.normal(jax.random.key(1), (TRIALS, TIMES, INPUTS))
    return kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))


class Ring(torch.nn.Module):
    """Its units share one weight each with two neighbours."""

    def __init__(self, units):
        super().__init__()
        self.hidden_size, self.a = units, torch.nn.Parameter(torch.randn(units))
        self.b = torch.nn.Linear(INPUTS, units)

    def forward(self, x, h):
        return torch.tanh(self.a * h + self.a.roll(1) * h.roll(1, -1) + self.b(x))


class Dale(torch.nn.Module):
    """Its units excite or inhibit, each with a time constant of its own."""

    def __init__(self, units):
        super().__init__()
        self.hidden_size = units
        self.w, self.a = torch.nn.Parameter(torch.randn(units, units)), torch.nn.Parameter(torch.rand(units))
        self.register_buffer("sign", torch.tensor([1.0, -1.0]).repeat(units)[:units].double())
        self.b = torch.nn.Linear(INPUTS, units)

    def forward(self, x, h):
        return (1 - self.a) * h + self.a * torch.tanh(h @ (self.w.abs() * self.sign).T + self.b(x))


CELLS = {
    "rnn": (lambda: torch_flow(torch.nn.RNNCell(INPUTS, 6)), 6),
    "gru": (lambda: torch_flow(torch.nn.GRUCell(INPUTS, 6)), 6),
    "lstm": (lambda: torch_flow(torch.nn.LSTM(INPUTS, 6, batch_first=True)), 6),
    "some parameters": (lambda: torch_flow(torch.nn.GRUCell(INPUTS, 6), params=["weight_hh"]), 6),
    "two layers": (lambda: torch_flow(torch.nn.GRU(INPUTS, 6, 2, batch_first=True)), None),
    "shared weights": (lambda: torch_flow(Ring(6)), None),
    "computed weights": (lambda: torch_flow(Dale(6)), 6),
    "jax gru": (lambda: jax_flow(eqx.nn.GRUCell(INPUTS, 6, key=jax.random.key(0))), 6),
    "jax lstm": (lambda: jax_flow(eqx.nn.LSTMCell(INPUTS, 6, key=jax.random.key(0))), 6),
}


def dense(K):
    return to_numpy(K.dense()).astype(np.float64)


@pytest.mark.parametrize("name", CELLS)
def test_units_with_weights_of_their_own(name):
    make, parts = CELLS[name]
    K = make().K
    found = K.direct_sum
    assert (found and found.count) == parts
    units = np.arange(K.domain.size) % K.domain.shape[-1]
    if parts is None:  # units that no weight joins would be parts
        matrix = dense(K) != 0
        assert matrix[units[:, None] != units].any()
        return
    apart = units[:, None] % parts != units % parts
    assert not dense(K)[apart].any()
    owned = to_numpy(K.factor.dense()).astype(np.float64)[:, found.of_domain.order].reshape(len(units), parts, -1)
    for part in range(parts):
        assert not owned[units % parts != part][:, part].any()


@pytest.mark.parametrize("name", [name for name, (_, parts) in CELLS.items() if parts])
def test_its_leading_pairs(name):
    K = CELLS[name][0]().K
    tol = 1e-8 if K.domain.like.dtype in (torch.float64, np.float64) else 1e-5
    found = kp.eigs(K, 9, BlockLanczos(tol=tol, dense=1))
    values, matrix = to_numpy(found.values), dense(K)
    assert np.allclose(values, np.linalg.eigvalsh(matrix)[::-1][:9], rtol=0, atol=2 * tol * values[0])
    rows = to_numpy(found.vectors).reshape(9, -1).astype(np.float64)
    assert np.allclose(rows @ rows.T, np.eye(9), atol=10 * tol)
    left = np.linalg.norm(rows @ matrix - values[:, None] * rows, axis=1) / values[0]
    assert (left <= 1.1 * tol).all() and to_numpy(found.converged).all()


def test_few_applications_where_units_are_alike():
    flow = torch_flow(torch.nn.RNN(INPUTS, 40, batch_first=True))
    parts, alg = kp.eigs(flow.K, 8, LANCZOS), BlockLanczos(tol=1e-8, dense=1)
    space, apply = flow.K.domain, lambda rows: flow.K.mv(rows.reshape(-1, *flow.K.domain.shape)).reshape(rows.shape)
    whole = alg.solve(apply, space.size, 8, like=space.like)
    assert np.allclose(parts.values, whole.values, rtol=1e-7)
    assert parts.applications < whole.applications / 4


def test_where_only_some_steps_count():
    mask = np.ones((TRIALS, TIMES), bool)
    mask[1, 4:] = mask[2, 2:] = False
    K = torch_flow(torch.nn.GRUCell(INPUTS, 6)).where(mask).K
    assert K.direct_sum is not None
    found = kp.eigs(K, 5, LANCZOS)
    assert np.allclose(found.values, np.linalg.eigvalsh(dense(K))[::-1][:5])
    assert kp.effective_rank(K, rtol=0.01).value == pytest.approx(
        np.trace(dense(K)) ** 2 / np.sum(dense(K) ** 2), rel=0.05
    )


def test_of_an_ode():
    torch.manual_seed(0)
    problem = kp.ODEProblem(kp.models.CTRNNField(6).double(), torch.randn(TRIALS, 6).double(), np.linspace(0, 1, 5))
    K = kp.linearize(kp.solve(problem)).K
    assert K.direct_sum.count == 6
    found = kp.eigs(K, 5, LANCZOS)
    assert np.allclose(found.values, np.linalg.eigvalsh(to_numpy(euclidean_matrix(K)))[::-1][:5])


def test_units_that_never_fire():
    """Weights that reach no kick belong to any part."""
    cell = torch.nn.RNNCell(INPUTS, 6, nonlinearity="relu")
    with torch.no_grad():
        cell.bias_ih[2] = -100.0
    K = torch_flow(cell).K
    assert K.direct_sum.of_domain is not None
    found = kp.eigs(K, 4, LANCZOS)
    assert np.allclose(found.values, np.linalg.eigvalsh(dense(K))[::-1][:4])


def matrices(parts, size, spectrum, rng):
    """A direct sum as one matrix [n, n], its coordinates in turns, and the spectrum of each part."""
    order = np.arange(parts * size).reshape(size, parts).T.ravel()
    whole = np.zeros((parts * size, parts * size))
    for i in range(parts):
        q, _ = np.linalg.qr(rng.normal(size=(size, size)))
        here = order[i * size : (i + 1) * size]
        whole[np.ix_(here, here)] = (q * spectrum(i)) @ q.T
    return whole, Parts(parts, order)


def bases(matrix, parts, seed):
    return Bases(Counted(lambda rows: rows @ matrix), parts, Random(seed), np.zeros(1), room=1000)


def test_more_pairs_than_the_rank():
    """Two of the units fire: behind their values zeros follow, not copies of them."""
    cell = torch.nn.RNNCell(INPUTS, 24, nonlinearity="relu")
    with torch.no_grad():
        cell.bias_ih[2:] = -100.0
        cell.weight_hh.zero_()
        cell.weight_ih[:2].abs_()
    for dtype, tol in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        problem = kp.DiscreteProblem(cell.to(dtype), torch.ones(TRIALS, 1, INPUTS, dtype=dtype))
        K = kp.linearize(kp.solve(problem)).K
        found = kp.eigs(K, 5, BlockLanczos(tol=tol, dense=1))
        values = to_numpy(found.values)
        assert np.allclose(values, np.linalg.eigvalsh(dense(K))[::-1][:5], atol=1e-5 * values[0])
        rows = to_numpy(found.vectors).reshape(5, -1)
        assert np.allclose(rows @ rows.T, np.eye(5), atol=1e-5)


def test_a_value_that_a_slow_part_hides():
    """Parts of rank one are done at once, while the largest value is that of another, beside a bulk of its own."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        bulk = np.concatenate([[1.5], np.linspace(0, 0.6, 199)])
        matrix, parts = matrices(6, 200, lambda i, b=bulk: b if i == 2 else np.eye(200)[0], rng)
        found = leading_of(bases(matrix, parts, seed), 1, 1e-8, 1000)
        assert found.values[0] == pytest.approx(1.5)


@pytest.mark.parametrize("copies", [1, 2, 3, 5])
def test_copies_within_a_part(copies):
    decay = 0.6 ** np.arange(30)

    def spectrum(i):
        return np.where(np.arange(30) < copies, 1.1, decay) if i == 3 else decay * (1 + 0.01 * i)

    matrix, parts = matrices(8, 30, spectrum, np.random.default_rng(0))
    found = leading_of(bases(matrix, parts, 0), 6, 1e-7, 1000)
    assert np.allclose(found.values, np.linalg.eigvalsh(matrix)[::-1][:6], atol=1e-6)


def test_moments_cover_the_truth():
    rng = np.random.default_rng(1)
    matrix, parts = matrices(6, 60, lambda i: 1 / (1 + np.arange(60.0)) * (1 + 0.1 * i), rng)
    truth = np.array([np.trace(matrix), np.linalg.norm(matrix), np.trace(matrix) ** 2 / np.sum(matrix**2)])
    inside, relative = [], []
    for seed in range(200):
        found = MomentsOfParts(bases(matrix, parts, seed), only_trace=False)(16)
        each = (found.trace, found.norm, found.effective_rank)
        inside.append([abs(e.value - t) < 1.96 * e.stderr for e, t in zip(each, truth, strict=True)])
        relative.append([(e.value - t) / t for e, t in zip(each, truth, strict=True)])
    assert (np.mean(inside, 0) > 0.9).all() and (np.mean(inside, 0) < 1).all()
    assert (abs(np.mean(relative, 0)) < 4 * np.std(relative, 0) / 200**0.5 + 1e-4).all()


def test_bars_fall_as_fast_as_the_rest():
    """To ten times less takes few applications more, not a hundred times as many."""
    K = torch_flow(torch.nn.RNN(INPUTS, 64, batch_first=True)).K
    coarse, fine = (kp.effective_rank(K, rtol=rtol) for rtol in (1e-2, 1e-6))
    assert fine.applications <= 8 * coarse.applications
    assert fine.value == pytest.approx(np.trace(dense(K)) ** 2 / np.sum(dense(K) ** 2), rel=4e-6)
    trace = kp.trace(K, rtol=1e-6)
    assert trace.value == pytest.approx(np.trace(dense(K)), rel=4e-6)


def test_moments_of_what_the_bases_hold_are_exact():
    matrix, parts = matrices(
        5, 40, lambda i: np.where(np.arange(40) < 6, 1.0 + i + np.arange(40), 0.0), np.random.default_rng(2)
    )
    found = MomentsOfParts(bases(matrix, parts, 0), only_trace=False)(24)
    assert found.trace.value == pytest.approx(np.trace(matrix), rel=1e-10)
    assert found.norm.value == pytest.approx(np.linalg.norm(matrix), rel=1e-10)
