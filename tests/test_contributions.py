"""How much each parameter contributes, and flows of some parameters only, against the columns of dense Jacobians."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import cases
from synthetic import check_apart
from test_metric import SOLUTIONS, assert_close, dense, flow_of, is_jax, kronecker, sizes

import kpflow_dyn as kp
from kpflow_dyn._flows.flow import preconditioned

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module", params=cases([*SOLUTIONS], {"torch_gru", "torch_ode"}))
def flow(request: pytest.FixtureRequest, x64: None) -> kp.Flow:
    return flow_of(request.param)


def columns(flow: kp.Flow, names: list[str]) -> np.ndarray:
    """Which columns of J belong to these parameters."""
    return np.repeat([name in names for name in flow.parameters], sizes(flow))


def test_parts_are_the_squared_columns_and_add_up_to_the_trace(flow: kp.Flow) -> None:
    J, found = dense(flow.J.T).T, kp.contributions(flow)
    for name, part in found.items():
        assert part.stderr == 0
        assert part.value == pytest.approx((J[:, columns(flow, [name])] ** 2).sum(), rel=1e-10, abs=1e-12)
    assert list(found) == list(flow.parameters)
    assert sum(part.value for part in found.values()) == pytest.approx(found.total.value, rel=1e-14)
    assert found.total.value == pytest.approx((J**2).sum(), rel=1e-12)


def test_by_rows_where_the_states_are_fewer() -> None:
    torch.manual_seed(0)
    cell, x = torch.nn.RNNCell(3, 9).double(), torch.randn(1, 3, 3, dtype=torch.float64)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)), measure=kp.Measure(time=[0.2, 1.0, 2.0]))
    J, found = dense(flow.J), kp.contributions(flow)
    assert flow.J.codomain.size < flow.J.domain.size
    for name, part in found.items():
        assert part.value == pytest.approx((J[:, columns(flow, [name])] ** 2).sum(), rel=1e-12)


def test_estimates_cover_and_add_up() -> None:
    flow = flow_of("torch_gru")
    exact, misses = kp.contributions(flow), 0
    for seed in range(20):
        found = kp.contributions(flow, samples=12, seed=seed)
        assert sum(part.value for part in found.values()) == pytest.approx(found.total.value, rel=1e-12)
        misses += sum(abs(found[name].value - exact[name].value) > 1.96 * found[name].stderr for name in exact)
    assert 0 < misses < 0.12 * 20 * len(exact)
    assert found == kp.contributions(flow, samples=12, seed=19)


def test_with_a_metric_they_are_those_of_its_root(flow: kp.Flow) -> None:
    metric, inverse = kronecker(flow)
    found = kp.contributions(preconditioned(flow, metric.preconditioner(flow.parameters)))
    J = dense(flow.J.T).T
    for name, part in found.items():
        here = columns(flow, [name])
        expected = np.trace(J[:, here] @ inverse[np.ix_(here, here)] @ J[:, here].T)
        assert part.value == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_some_parameters_only(flow: kp.Flow) -> None:
    names = list(flow.parameters)[::2]
    here, part = columns(flow, names), flow.only(names)
    J, kick, V = (dense(op.T).T[:, here] for op in (flow.J, flow.K.factor, flow.core.factor))
    assert list(part.parameters) == names
    assert_close(dense(part.J.T).T, J)
    assert_close(dense(part.ntk), J @ J.T)
    assert_close(dense(part.K), kick @ kick.T)
    assert_close(dense(part.core), V @ V.T)
    if not is_jax(flow):
        assert kp.check_adjoint(part.J) < 1e-12
        check_apart(part.ntk)


@pytest.mark.parametrize("name", cases(["torch_rnn", "torch_gru", "torch_ode"], {"torch_rnn", "torch_gru"}))
def test_it_is_the_flow_that_was_linearized_for_them(name: str) -> None:
    """Sites, spectrum, steps and parameters as with params= of linearize."""
    whole = flow_of(name)
    solution = whole.solution
    names = [name for name in whole.parameters if "weight" in name][-2:]
    part, alone = whole.only(lambda name: name in names), kp.linearize(solution, params=names)
    assert sorted(site.name for site in part.sites) == sorted(site.name for site in alone.sites)
    assert list(part.parameters) == list(alone.parameters)
    found, expected = (np.sort(np.repeat(*flow.core.spectrum())) for flow in (part, alone))
    assert_close(found, expected)
    assert_close(dense(part.nodal.ntk), dense(alone.nodal.ntk))
    for site in part.sites:  # entries number the weights of the part
        values = torch.cat([value.reshape(-1) for value in part.parameters.values()])
        assert torch.equal(values[torch.from_numpy(site.entries)], site.weight)
    again, name = part.only(names[0]), names[0]
    assert_close(dense(again.ntk), dense(kp.linearize(solution, params=name).ntk))


def test_only_after_a_metric() -> None:
    plain = flow_of("torch_gru")
    metric, inverse = kronecker(plain)
    name = list(plain.parameters)[1]
    here, J = columns(plain, [name]), dense(plain.J)
    flow = preconditioned(plain, metric.preconditioner(plain.parameters)).only(name)
    assert_close(dense(flow.ntk), J[:, here] @ inverse[np.ix_(here, here)] @ J[:, here].T)
    assert_close(dense(flow.J), J[:, here])
    assert kp.contributions(flow)[name].value == pytest.approx(np.trace(dense(flow.ntk)))
    rated = preconditioned(plain, kp.LearningRates(0.25).preconditioner(plain.parameters)).only(name)
    assert_close(np.repeat(*rated.core.spectrum()), 0.25 * np.repeat(*plain.only(name).core.spectrum()))


def test_some_entries_only() -> None:
    """As of one attention head: rows of one weight, and entries of another that are no whole columns."""
    flow = flow_of("torch_gru")
    first, second = list(flow.parameters)[:2]
    masks = {name: torch.zeros_like(flow.parameters[name], dtype=torch.bool) for name in (first, second)}
    masks[first][2:5], masks[second][0, 1], masks[second][3, 2] = True, True, True
    part = flow.only(masks)
    every = [masks.get(name, torch.zeros_like(p, dtype=torch.bool)).ravel() for name, p in flow.parameters.items()]
    here = torch.cat(every).numpy()
    J, kick = dense(flow.J)[:, here], dense(flow.K.factor)[:, here]
    assert_close(dense(part.ntk), J @ J.T)
    assert_close(dense(part.K), kick @ kick.T)
    assert_close(np.trace(dense(part.core)), kp.trace(part.core).value)


def test_bad_requests() -> None:
    flow = flow_of("torch_rnn")
    with pytest.raises(ValueError, match=r"bias_hh is bool\[1\], expected bool\[\d\]"):
        flow.only({"bias_hh": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match="all False"):
        flow.only({"bias_hh": torch.zeros_like(flow.parameters["bias_hh"], dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"unknown parameters \['weight'\]; the model has weight_ih"):
        flow.only("weight")
    with pytest.raises(ValueError, match="no parameter learns"):
        flow.only([])
    with pytest.raises(ValueError, match="some parameters only"):
        flow.only("bias_hh").truncate()
    with pytest.raises(ValueError, match=r"take \.only of the whole"):
        flow.truncate().only("bias_hh")
    with pytest.raises(ValueError, match="at least 8"):
        kp.contributions(flow, samples=3)


def test_a_parameter_that_enters_nowhere_contributes_nothing() -> None:
    class Idle(torch.nn.Module):
        hidden_size = 3

        def __init__(self) -> None:
            super().__init__()
            self.U, self.idle = torch.nn.Linear(2, 3), torch.nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.U(x) + z)

    flow = kp.linearize(kp.solve(kp.DiscreteProblem(Idle(), torch.ones(2, 3, 2))))
    assert kp.contributions(flow)["idle"].value == 0
    part = flow.only("idle")
    assert part.sites == [] and len(part.core.spectrum()[0]) == 0
    assert float(part.ntk.dense().abs().max()) == 0
