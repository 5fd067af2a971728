"""The flow of what counts, against dense R A R, autograd through shorter trials, and the numbers of these matrices."""

from __future__ import annotations

import functools

import jax_registry
import numpy as np
import pytest
import registry
import test_jax_ode_flow
import test_ode_flow
import torch
from synthetic import check_apart
from torch.func import functional_call, jacrev

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._flows.flow import ODEFlow

pytestmark = pytest.mark.usefixtures("x64")

SOLUTIONS = {
    "rnn": lambda: kp.solve(registry.MODELS["rnn_cell"].problem(True)),
    "gru": lambda: kp.solve(registry.MODELS["gru_cell"].problem(True)),
    "lstm": lambda: kp.solve(registry.MODELS["lstm_cell"].problem(True)),
    "tied": lambda: kp.solve(registry.MODELS["tied"].problem(True)),
    "computed": lambda: kp.solve(registry.MODELS["computed_weight"].problem(True)),
    "ode": lambda: kp.solve(test_ode_flow.FIELDS["driven_rk4"].problem(), "rk4"),
    "ode_inside": lambda: kp.solve(
        test_ode_flow.FIELDS["driven_given_steps"].problem(), "dopri5", steps=np.linspace(0, 1, 4)
    ),
    "jax_gru": lambda: kp.solve(jax_registry.MODELS["gru"].problem(True)),
    "jax_lstm": lambda: kp.solve(jax_registry.MODELS["lstm"].problem(True)),
    "jax_ode": lambda: kp.solve(test_jax_ode_flow.FIELDS["heun_given_steps"].problem(), steps=test_jax_ode_flow.GRID),
}
KINDS = ("padding", "gaps")


@functools.cache
def flow_of(name: str) -> kp.Flow:
    return kp.linearize(SOLUTIONS[name](), measure=kp.Measure(trial=[1.0, 0.5]))


def mask_of(flow: kp.Flow, kind: str) -> np.ndarray:
    """Two trials, of which the first ends early; or where steps on the way do not count."""
    times = flow.ntk.domain.shape[1]
    mask = np.ones((2, times), bool)
    mask[0, 2:] = False
    if kind == "gaps":
        mask[0, 0] = mask[1, 1] = mask[1, -1] = False
    return mask


def dense(op: kp.Operator) -> np.ndarray:
    return to_numpy(op.dense())


def ones(op_axis: int, mask: np.ndarray) -> np.ndarray:
    """The diagonal of R, or of E, on vectors of this size."""
    return np.repeat(mask.reshape(-1), op_axis // mask.size).astype(float)


def until_last(mask: np.ndarray) -> np.ndarray:
    return np.array([[row[i:].any() for i in range(len(row))] for row in mask])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOLUTIONS)
def test_operators_are_those_of_dense_masks(name: str, kind: str) -> None:
    flow = flow_of(name)
    mask = mask_of(flow, kind)
    found, E = flow.where(mask), until_last(mask)
    n, sites = flow.ntk.domain.size, flow.core.domain.size
    R, kicks, outputs = ones(n, mask)[:, None], ones(n, E)[:, None], ones(sites, E)[:, None]
    expected = {
        "J": R * dense(flow.J),
        "ntk": R * dense(flow.ntk) * R.T,
        "P": R * dense(flow.P) * kicks.T,
        "K": kicks * dense(flow.K) * kicks.T,
        "B": kicks * dense(flow.B) * outputs.T,
        "core": outputs * dense(flow.core) * outputs.T,
    }
    for name, matrix in expected.items():
        op = getattr(found, name)
        np.testing.assert_allclose(dense(op), matrix, atol=1e-12 * np.abs(matrix).max())
        assert kp.check_adjoint(op) < 1e-12
    whole = R * dense(flow.P @ flow.K @ flow.P.T) * R.T
    np.testing.assert_allclose(dense(found.P @ found.K @ found.P.T), whole, atol=1e-10 * np.abs(whole).max())
    if found.ntk.apart is not None:
        check_apart(found.ntk)
    assert type(found) is type(flow) and (found.mask == mask).all()
    assert found.ntk.domain.dimension == R.sum() and found.K.domain.dimension == kicks.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gru", "lstm", "computed", "ode", "ode_inside", "jax_gru", "jax_ode"])
def test_the_kernel_of_steps_is_made_of_what_is_kicked(name: str, kind: str) -> None:
    flow = flow_of(name)
    steps = flow.where(mask_of(flow, kind)).nodal
    whole = dense(steps.ntk)
    np.testing.assert_allclose(dense(steps.P @ steps.K @ steps.P.T), whole, atol=1e-10 * np.abs(whole).max())
    assert np.abs(whole).max() > 0 and 0 < steps.ntk.domain.dimension < steps.ntk.domain.size
    if kind == "padding":
        R = np.diag(ones(steps.P.domain.size, steps.mask))
        np.testing.assert_allclose(dense(steps.P.inv @ steps.P), R, atol=1e-12)


@pytest.mark.parametrize("name", ["ode", "ode_inside"])
def test_steps_of_a_solver_count_that_lead_to_times_that_do(name: str) -> None:
    flow = flow_of(name)
    assert isinstance(flow, ODEFlow)
    mask = mask_of(flow, "padding")
    last = np.asarray(flow.solution.t)[[1, -1]]
    begins = flow.solution.steps.t  # [trial, step]
    np.testing.assert_array_equal(flow.where(mask).nodal.mask, begins < last[:, None] - 1e-9)


def padded() -> tuple[torch.nn.Module, torch.Tensor, np.ndarray, np.ndarray]:
    """A cell, inputs of three trials with garbage behind their ends, where they count, and the kernel by autograd."""
    torch.manual_seed(0)
    cell, lengths = torch.nn.GRUCell(2, 4).double(), (3, 6, 4)
    x = torch.randn(3, 6, 2, dtype=torch.float64)
    mask = np.arange(6) < np.array(lengths)[:, None]

    def states(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        """All states up to the ends of the trials, one after another, trial by trial."""
        rows = []
        for trial, length in enumerate(lengths):
            z = torch.zeros(1, 4, dtype=torch.float64)
            for step in range(length):
                z = functional_call(cell, parameters, (x[trial : trial + 1, step], z))
                rows.append(z[0])
        return torch.stack(rows)

    J = jacrev(states)(dict(cell.named_parameters()))
    rows = torch.cat([part.reshape(sum(lengths) * 4, -1) for part in J.values()], 1).detach().numpy()
    return cell, 100 * x.clone().masked_fill_(torch.from_numpy(mask)[..., None], 0) + x, mask, rows @ rows.T


def test_what_lies_behind_the_end_of_a_trial_is_as_if_it_were_not_there() -> None:
    cell, x, mask, kernel = padded()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).where(mask)
    values = np.linalg.eigvalsh(kernel)[::-1]
    assert kp.trace(flow.ntk).value == pytest.approx(np.trace(kernel), rel=1e-12)
    assert kp.effective_rank(flow.ntk).value == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-12)
    np.testing.assert_allclose(kp.eigenvalues(flow.ntk), values, atol=1e-12 * values[0])
    full = np.zeros((3, 6, 4, 3, 6, 4))
    full[np.ix_(*[range(n) for n in full.shape])] = 0
    index = np.argwhere(np.repeat(mask[..., None], 4, -1))
    full[tuple(index.T[:, :, None]) + tuple(index.T[:, None, :])] = kernel
    for axis, sums in {"time": "btnbsn->ts", "unit": "btnbtm->nm", "trial": "btnctn->bc"}.items():
        np.testing.assert_allclose(dense(kp.partial_trace(flow.ntk, axis)), np.einsum(sums, full), atol=1e-12)
    found = kp.contributions(flow)
    assert sum(part.value for part in found.values()) == pytest.approx(np.trace(kernel))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["rnn", "lstm", "jax_gru", "ode"])
def test_numbers_count_the_entries_that_count(name: str, kind: str) -> None:
    flow = flow_of(name)
    flow = flow.where(mask_of(flow, kind))
    assert flow.mask is not None
    weights = (
        1.0 if flow.ntk.domain.measure is None else np.broadcast_to(flow.ntk.domain.measure, flow.ntk.domain.shape)
    )
    kept = np.flatnonzero(ones(flow.ntk.domain.size, flow.mask))
    root = np.broadcast_to(weights, flow.ntk.domain.shape).reshape(-1)[kept] ** 0.5
    A = root[:, None] * dense(flow.ntk)[np.ix_(kept, kept)] / root
    values = np.linalg.eigvalsh((A + A.T) / 2)[::-1]
    k = min(len(kept), flow.J.domain.size)
    for which, few in {"LA": values[:3], "SA": values[::-1][:3]}.items():
        found = kp.eigs(flow.ntk, 3, kp.solvers.Dense(), which=which)
        np.testing.assert_allclose(found.values, few, atol=1e-10 * values[0])
        assert not to_numpy(found.vectors)[:, ~flow.mask].any()
    np.testing.assert_allclose(kp.eigs(flow.ntk, 2).values, values[:2], rtol=1e-6)
    np.testing.assert_allclose(kp.eigenvalues(flow.ntk), values, atol=1e-10 * values[0])
    with pytest.raises(ValueError, match=f"rank {k} at most"):
        kp.eigs(flow.ntk, k + 1)
    again = kp.eigs(flow.ntk, 1, start=found.vectors, deflate=kp.eigs(flow.ntk, 1).vectors)
    np.testing.assert_allclose(again.values, values[1:2], rtol=1e-6)
    counted = kp.spectral_density(flow.ntk, k=1, probes=40).count()
    assert abs(counted.value - len(kept)) < 4 * counted.stderr + 1e-6
    modes = kp.modes(flow.ntk, "time", k=int(flow.mask.any(0).sum()))
    assert not to_numpy(modes.vectors)[:, ~flow.mask.any(0)].any()
    core = np.trace(dense(flow.core))
    assert kp.trace(flow.core).value == pytest.approx(core) and flow.core.spectrum() is not None
    summary = kp.summary(flow, k=2)
    assert summary.ntk.trace.value == pytest.approx(values.sum())
    assert summary.core.trace.value == pytest.approx(core)
    assert (
        len(summary.temporal.values) == flow.mask.any(0).sum() and len(summary.trial.values) == flow.mask.any(1).sum()
    )


def test_sampled_numbers_agree_with_dense_ones() -> None:
    torch.manual_seed(1)
    problem = kp.DiscreteProblem(torch.nn.GRUCell(2, 16).double(), torch.randn(6, 9, 2, dtype=torch.float64))
    flow = kp.linearize(kp.solve(problem)).where(np.arange(9) < np.array([[4], [9], [6], [5], [7], [3]]))
    A = dense(flow.ntk).reshape(flow.ntk.domain.shape * 2)
    traces = {"time": np.einsum("btnbsn->ts", A), "trial": np.einsum("btnctn->bc", A)}
    for axis, matrix in traces.items():
        found = kp.partial_trace(flow.ntk, axis, samples=200, seed=3)
        assert np.abs(to_numpy(found.matrix) - matrix).max() < 5 * to_numpy(found.stderr).max()
        rank, true = kp.effective_rank(found), np.trace(matrix) ** 2 / (matrix**2).sum()
        assert abs(rank.value - true) < 4 * rank.stderr
    summary = kp.summary(flow, k=4, samples=100, seed=2)
    whole = summary.ntk.trace
    assert whole.stderr > 0 and abs(whole.value - np.trace(traces["time"])) < 4 * whole.stderr


def test_averages_are_over_what_counts() -> None:
    flow = flow_of("gru")
    flow = flow.where(mask_of(flow, "gaps"))
    space = flow.ntk.domain
    A, weights = dense(flow.ntk).reshape(space.shape * 2), flow.mask * np.array([[1.0], [0.5]])
    for axis, sums in {"time": "bt,btnBTN->tT", "trial": "bt,btnBTN->bB"}.items():
        total = weights.sum(0 if axis == "time" else 1)[:, None] * space.shape[2]
        found = kp.marginal(flow.ntk, axis)
        expected = np.einsum(sums, weights, A) / np.where(total > 0, total, 1)
        np.testing.assert_allclose(dense(found), expected, atol=1e-12)
        assert kp.check_adjoint(found) < 1e-12


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("name", ["gru", "jax_gru"])
def test_outputs_of_what_counts(name: str, learn: bool) -> None:
    flow, rng = flow_of(name), np.random.default_rng(0)
    mask, C = mask_of(flow, "gaps"), rng.standard_normal((3, flow.ntk.domain.shape[2]))
    found, whole = flow.where(mask).output(C, learn), flow.output(C, learn)
    R = ones(whole.ntk.domain.size, mask)[:, None]
    np.testing.assert_allclose(dense(found.ntk), R * dense(whole.ntk) * R.T, atol=1e-12)
    check_apart(found.ntk)
    assert found.ntk.domain.dimension == 3 * mask.sum()


def test_a_flow_can_be_changed_before_and_after() -> None:
    flow = flow_of("gru")
    first, second = mask_of(flow, "padding"), mask_of(flow, "gaps")
    both = dense(flow.where(first & second).K)
    np.testing.assert_array_equal(dense(flow.where(first).where(second).K), both)
    np.testing.assert_array_equal(dense(flow.where(second).where(first).K), both)
    assert flow.where(np.ones_like(first)) is flow and flow.mask is None
    for change in (lambda flow: flow.only(["weight_hh"]), lambda flow: flow.truncate(1e-2)):
        a, b = change(flow.where(first)), change(flow).where(first)
        np.testing.assert_allclose(dense(a.ntk), dense(b.ntk), rtol=0, atol=2e-2 * np.abs(dense(b.ntk)).max())
        assert (a.mask == first).all() and a.ntk.domain.dimension == b.ntk.domain.dimension
    whole = dense(flow.ntk)
    cut = flow.where(first).truncate(1e-2)
    R = ones(len(whole), first)[:, None]
    off = np.linalg.norm(R * whole * R.T - dense(cut.ntk), 2)
    assert cut.truncation is not None and off <= cut.truncation.bound * np.linalg.norm(R * whole * R.T, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_learning_rules_of_what_counts(kind: str) -> None:
    flow = flow_of("gru")
    mask, rules = mask_of(flow, kind), kp.learning_rules
    found, R = flow.where(mask), ones(flow.ntk.domain.size, mask_of(flow, kind))[:, None]
    for rule in (lambda f: rules.truncated_bptt(f, 1), lambda f: rules.feedback_alignment(f, seed=1)):
        expected = R * dense(rule(flow)) * R.T
        np.testing.assert_allclose(dense(rule(found)), expected, atol=1e-12 * np.abs(expected).max())
        assert kp.check_adjoint(rule(found)) < 1e-12


def test_tokens_of_a_network_that_count() -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True).double().eval()
    flow = kp.linearize(kp.solve(kp.StaticProblem(layer, torch.randn(2, 5, 4, dtype=torch.float64), state="")))
    mask = np.arange(5) < np.array([[3], [5]])
    found, R = flow.where(mask), ones(flow.ntk.domain.size, mask)[:, None]
    np.testing.assert_allclose(dense(found.ntk), R * dense(flow.ntk) * R.T, atol=1e-12)
    np.testing.assert_allclose(dense(found.P @ found.K @ found.P.T), dense(found.ntk), atol=1e-12)
    assert found.ntk.domain.dimension == 4 * 8


@pytest.mark.parametrize(
    "mask", [np.ones((2, 3), bool), np.zeros((2, 4), bool), np.full((2, 4), 0.5), np.ones(4, bool)]
)
def test_masks_that_do_not_fit_are_refused(mask: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected booleans \[trial, time\] = \[2, 4\], True somewhere"):
        flow_of("gru").where(mask)
