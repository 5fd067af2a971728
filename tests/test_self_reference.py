"""The self-referential bias against projections by hand of real gradient steps of the user's own model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import network_registry
import numpy as np
import pytest
import torch
from scipy.fft import dct
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._learning.self_reference import BASES
from kpflow_dyn._numbers.leading_directions import control_shares, control_shares_of_states
from kpflow_dyn.models import CTRNNField, to_jax

TRIALS, TIMES, UNITS = 5, 9, 7


def setting() -> tuple[nn.RNN, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    cell, readout = nn.RNN(2, UNITS, batch_first=True).double(), nn.Linear(UNITS, 2).double()
    x, target = (torch.randn(TRIALS, TIMES, 2, dtype=torch.float64) for _ in range(2))
    return cell, readout, x, target


def flow_of(cell: nn.Module, x: Tensor) -> kp.Flow:
    return kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))


def descended(cell: nn.RNN, readout: nn.Linear, x: Tensor, loss: Any, steps: int, lr: float) -> Tensor:
    """The change of the states by torch's own SGD."""
    cell, readout = copy.deepcopy(cell), copy.deepcopy(readout)
    before = cell(x)[0].detach()
    optimizer = torch.optim.SGD([*cell.parameters(), *readout.parameters()], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(readout(cell(x)[0])).backward()
        optimizer.step()
    return cell(x)[0].detach() - before


def share(U: np.ndarray, X: np.ndarray) -> float:
    return float(np.linalg.norm(np.linalg.qr(U)[0].T @ X) ** 2 / np.linalg.norm(X) ** 2)


def test_shares_are_those_of_real_steps_in_the_modes_by_hand() -> None:
    cell, readout, x, target = setting()
    found = kp.self_reference(flow_of(cell, x), target, readout=readout, steps=(1, 3), lr=0.05, k=4)
    assert found.changes == ("1 step", "3 steps") and found.lr == 0.05 and found.rows == TRIALS * TIMES
    states = cell(x)[0].detach()
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
    V = torch.cat([before, x, torch.ones(TRIALS, TIMES, 2)], -1).reshape(TRIALS * TIMES, -1).numpy()
    core = np.linalg.svd(V)[0]
    J = to_numpy(flow_of(cell, x).J.dense()).reshape(TRIALS * TIMES, UNITS, -1)
    of_rows = np.linalg.eigh(np.einsum("aip,bip->ab", J, J))[1][:, ::-1]
    of_states = np.linalg.svd(J.reshape(TRIALS * TIMES * UNITS, -1))[0]
    for number, steps in enumerate((1, 3)):
        change = descended(cell, readout, x, lambda y: nn.functional.mse_loss(y, target), steps, 0.05)
        X = change.reshape(TRIALS * TIMES, -1).numpy()
        for k in (1, 4, 7):
            at = dict(zip(BASES, found.share[number, :, k - 1], strict=True))
            assert at["core"] == pytest.approx(share(core[:, :k], X), abs=1e-9)
            assert at["NTK"] == pytest.approx(share(of_rows[:, :k], X), abs=1e-9)
            whole = share(of_states[:, :k], X.reshape(-1, 1))
            assert found.state_share[number, 1, k - 1] == pytest.approx(whole, abs=1e-3)
        assert found.size[number] == pytest.approx(np.linalg.norm(X) / float(states.norm()))
        assert found.outside[number, 0] == pytest.approx(1 - share(core[:, : np.linalg.matrix_rank(V)], X), abs=1e-9)


def test_controls_are_averages_over_what_they_may_choose() -> None:
    """All of it against random rotations, and where nothing is left to choose against the projection itself."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(3, 8, 2)).cumsum(1)
    flat, total = X.reshape(24, 2), (X**2).sum()
    found = control_shares(flat, np.ones((3, 8)), 24)
    waves = np.asarray(dct(X, axis=1, norm="ortho"))
    alike = (waves.sum(0) ** 2).sum(-1) / 3 / total
    np.testing.assert_allclose(found["cosines"][:8], alike.cumsum())
    np.testing.assert_allclose(found["cosines"][8:], alike.sum())
    single = (waves**2).sum((0, 2)) / total
    np.testing.assert_allclose(found["own cosines"][2::3], single.cumsum())
    np.testing.assert_allclose(found["constant"][[0, 2, 20]], [alike[0], single[0], single[0]])
    np.testing.assert_allclose(found["random"], np.arange(1, 25) / 24)
    patterns = [np.linalg.qr(rng.normal(size=(3, 3)))[0][:, 0] for _ in range(4000)]
    mean = np.mean([((np.ones(8) / 8**0.5 @ np.einsum("b,btn->tn", q, X)) ** 2).sum() / total for q in patterns])
    assert found["own cosines"][0] == pytest.approx(mean, rel=0.05)
    of_states = control_shares_of_states(flat, np.ones((3, 8)), 4)
    np.testing.assert_allclose(of_states["cosines"][[1, 3]], alike.cumsum()[:2])
    np.testing.assert_allclose(of_states["random"], np.arange(1, 5) / 48)


def test_what_is_alike_in_all_trials_cannot_learn_to_differ() -> None:
    """The same inputs in all trials: V, the change and what is reached are alike in all, whatever the target is."""
    cell, readout, x, target = setting()
    x = x[:1].expand(TRIALS, -1, -1).clone()
    found = kp.self_reference(flow_of(cell, x), target, readout=readout, k=TIMES)
    dataset = found.to_xarray()
    np.testing.assert_allclose(dataset.share.sel(basis=["core", "NTK", "cosines"], directions=TIMES), 1, atol=1e-6)
    y = readout(cell(x)[0]).detach()
    e = y - target
    differs = ((e - e.mean(0)) ** 2).sum((0, 1)) / (e**2).sum((0, 1))
    for number in range(2):
        outside = dataset.outside.sel(component=f"output {number}")
        np.testing.assert_allclose(outside, float(differs[number]), atol=1e-6)
    whole = float(((e - e.mean(0)) ** 2).sum() / (e**2).sum())
    np.testing.assert_allclose(dataset.outside.sel(component="error"), whole, atol=1e-6)
    np.testing.assert_allclose(dataset.outside.sel(component=["1 step", "10 steps"]), 0, atol=1e-4)
    assert "about as much in a control" in found.verdict()


def test_the_bias_is_said_to_be_there_only_beyond_controls() -> None:
    """A change along activity that is neither slow nor alike in all trials; one that is noise; one that is constant."""
    cell, _readout, x, _target = setting()
    flow = flow_of(cell, x)
    V = flow.sites[0].inputs
    along = V @ torch.randn(V.shape[-1], UNITS, dtype=torch.float64)
    changes = {"along": along, "noise": torch.randn_like(along), "constant": torch.ones_like(along)}
    found = kp.self_reference(flow, change=changes, k=5)
    assert found.changes == tuple(changes) and np.isnan(found.lr)
    assert found.verdict(0).startswith("along: most of the change lies in the core's modes, beyond all controls")
    assert found.verdict(1).startswith("noise: most of the change lies outside of the core's modes")
    assert found.verdict(2).startswith("constant: most of the change lies in the core's modes, but about as much in")
    tiny = kp.self_reference(flow, change=1e-200 * along, k=5)
    np.testing.assert_allclose(tiny.share[0], found.share[0])
    assert 0 < tiny.size[0] < 1e-190
    assert found.components == found.changes and found.outside[0, 0] < 1e-9 < found.outside[1, 0]
    assert all(found.verdict(number) in str(found) for number in range(3))


def test_any_loss(x64: None) -> None:
    cell, readout, x, _target = setting()
    classes = torch.randint(2, (TRIALS, TIMES))
    classes[0, :3] = -100
    flow = flow_of(cell, x)

    def entropy(y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(y.reshape(-1, 2), classes.reshape(-1))

    def check(found: kp.SelfReference, loss: Any, steps: int = 2) -> None:
        X = descended(cell, readout, x, loss, steps, 0.1)
        expected = kp.self_reference(flow, change=X, k=4)
        np.testing.assert_allclose(found.share, expected.share, atol=1e-9)

    how: dict[str, Any] = {"readout": readout, "steps": (2,), "lr": 0.1, "k": 4}
    check(kp.self_reference(flow, classes, loss="cross_entropy", **how), entropy)
    check(kp.self_reference(flow, loss=lambda y: (y**4).mean(), **how), lambda y: (y**4).mean())
    learnt = kp.self_reference(flow.output(readout, learn=True), classes, loss="cross_entropy", steps=(2,), lr=0.1, k=4)
    check(learnt, entropy)
    mask, target = torch.rand(TRIALS, TIMES) > 0.5, torch.randn(TRIALS, TIMES, 2, dtype=torch.float64)
    target[~mask] = torch.nan
    masked = kp.self_reference(flow, target, mask=mask, **how)
    check(masked, lambda y: ((y - target)[mask] ** 2).mean())
    assert np.isfinite(masked.outside).all()
    fixed = kp.self_reference(flow, classes, loss="cross_entropy", learn=False, **how)
    assert np.abs(fixed.share - learnt.share).max() > 1e-6


def test_models_recordings_and_solutions_are_changes(tmp_path: Path) -> None:
    cell, readout, x, target = setting()
    other, record = copy.deepcopy(cell), kp.Recorder(tmp_path)
    flow, values = flow_of(cell, x), {name: p.clone() for name, p in cell.named_parameters()}
    record(0, other, 1.0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    record(7, other, 0.5)
    dS = other(x)[0].detach() - cell(x)[0].detach()
    solution = kp.solve(kp.DiscreteProblem(other, x))
    given = {"model": other, "solution": solution, "flow": kp.linearize(solution), "array": dS, "numpy": dS.numpy()}
    found = kp.self_reference(flow, change=given, k=3)
    np.testing.assert_allclose(found.share, np.broadcast_to(found.share[3], found.share.shape), atol=1e-12)
    recorded = kp.self_reference(flow, target, readout=readout, change=tmp_path, k=3)
    assert recorded.changes == ("step 7",) and recorded.components == ("step 7", "error", "output 0", "output 1")
    np.testing.assert_allclose(recorded.share[0], found.share[3], atol=1e-12)
    assert kp.self_reference(flow, change=kp.Recorder.read(tmp_path), k=3).changes == ("step 7",)
    kp.self_reference(flow, target, readout=readout, k=3)
    assert all(torch.equal(p, values[name]) and p.grad is None for name, p in cell.named_parameters())


def test_both_frameworks_agree(x64: None) -> None:
    cell, readout, x, target = setting()
    how: dict[str, Any] = {"steps": (3,), "k": 4}
    of_torch = kp.self_reference(flow_of(cell, x), target, readout=readout, **how)
    twin, linear = to_jax(nn_cell(cell)), to_jax(readout)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(twin, jnp.asarray(x.numpy()))))
    of_jax = kp.self_reference(flow, jnp.asarray(target.numpy()), readout=linear, **how)
    assert of_jax.lr == pytest.approx(of_torch.lr, rel=1e-8)
    np.testing.assert_allclose(of_jax.share, of_torch.share, atol=1e-8)
    np.testing.assert_allclose(of_jax.outside, of_torch.outside, atol=1e-6)


def nn_cell(cell: nn.RNN) -> nn.RNNCell:
    found = nn.RNNCell(2, UNITS).double()
    found.load_state_dict({name.removesuffix("_l0"): value for name, value in cell.state_dict().items()})
    return found


def test_rows_of_an_ode_count_by_their_measure() -> None:
    torch.manual_seed(0)
    t = np.array([0.0, 0.1, 0.15, 0.5, 0.9, 1.0])
    problem = kp.ODEProblem(CTRNNField(4).double(), torch.randn(3, 4, dtype=torch.float64), t)
    flow = kp.linearize(kp.solve(problem, "rk4"))
    dS = torch.randn(3, 6, 4, dtype=torch.float64)
    found = kp.self_reference(flow, change=dS, k=5, rows="time")
    w = np.append(np.diff(t) / 2, 0) + np.append(0, np.diff(t) / 2)
    X = (w**0.5)[:, None] * dS.numpy().transpose(1, 0, 2).reshape(6, -1)
    V = np.concatenate(
        [(w**0.5)[:, None] * to_numpy(s.inputs).transpose(1, 0, 2).reshape(6, -1) for s in flow.sites], 1
    )
    assert found.axes == ("time",) and found.rows == 6
    core = np.linalg.svd(V)[0]
    np.testing.assert_allclose(found.share[0, 0, :4], [share(core[:, :k], X) for k in range(1, 5)], atol=1e-9)
    assert found.share[0, 2, 0] == pytest.approx(share((w**0.5)[:, None], X))
    assert found.share[0, 2:, -1].max() <= 1 + 1e-12
    stepped = kp.self_reference(flow, torch.zeros_like(dS), steps=(1,), k=3)
    kernel = kp.modes(flow.ntk, "time").vectors
    assert stepped.changes == ("1 step",) and stepped.share[0, 1, -1] > 0.5 and kernel.shape[1] == 6


@pytest.mark.parametrize(("name", "axes"), [("mlp", ("trial",)), ("encoder", ("trial", "token"))])
def test_networks(name: str, axes: tuple[str, ...]) -> None:
    """A step of gradient descent on the states themselves, by autograd through the network."""
    case = network_registry.TORCH[name]
    solution = kp.solve(case.torch_problem(case.state))
    flow = kp.linearize(solution)
    target = torch.randn_like(solution.state)
    found = kp.self_reference(flow, target, steps=(1,), lr=1e-6, k=4)
    assert found.axes == axes and found.rows == np.prod(
        [flow.ntk.domain.shape[flow.ntk.domain.axes.index(a)] for a in axes]
    )
    predicted = flow.ntk.mv(target - solution.state)
    expected = kp.self_reference(flow, change=predicted, k=4)
    np.testing.assert_allclose(found.share, expected.share, atol=1e-5)
    np.testing.assert_allclose(found.state_share, expected.state_share, atol=1e-5)
    assert found.outside[0, 1] < 1e-8


def test_default_rate_descends_and_figures_have_the_curves() -> None:
    cell, readout, x, target = setting()
    found = kp.self_reference(flow_of(cell, x), target, readout=readout, k=3)
    losses, moved = [], (copy.deepcopy(cell), copy.deepcopy(readout))
    optimizer = torch.optim.SGD([p for part in moved for p in part.parameters()], lr=found.lr)
    for _ in range(11):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(moved[1](moved[0](x)[0]), target)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert (np.diff(losses) < 0).all()
    axes = found.plot().axes
    np.testing.assert_allclose(axes[0].lines[0].get_ydata(), found.share[0, 0])
    assert len(axes) == 2 and found.plot(dark=True).axes[1].get_title() == "10 steps"


def test_page() -> None:
    from kpflow_dyn.report._self_reference_chart import self_reference_charts

    cell, readout, x, target = setting()
    flow = flow_of(cell, x)
    found = kp.self_reference(flow, target, readout=readout, k=3)
    dataset = kp.analyze(flow, k=2).assign(found.variables())
    (chart,) = self_reference_charts(dataset)
    assert chart.choices[0].options == found.changes and found.verdict(1) in chart.finding
    np.testing.assert_allclose(chart.views[(1,)].data[0].y, found.share[1, 0], rtol=1e-6)
    assert not self_reference_charts(kp.analyze(flow, k=2))


def test_bad_input() -> None:
    cell, readout, x, target = setting()
    flow = flow_of(cell, x)
    with pytest.raises(ValueError, match="give a target"):
        kp.self_reference(flow)
    with pytest.raises(ValueError, match="have not changed"):
        kp.self_reference(flow, change=cell)
    with pytest.raises(ValueError, match=r"shape \(5, 9, 2\), expected"):
        kp.self_reference(flow, change=target)
    with pytest.raises(ValueError, match="at least 1"):
        kp.self_reference(flow, target, readout=readout, steps=(0, 1))
    with pytest.raises(ValueError, match="lr is -1"):
        kp.self_reference(flow, target, readout=readout, lr=-1)
    with pytest.raises(ValueError, match="rows are 'token'"):
        kp.self_reference(flow, target, readout=readout, rows="token")
    with pytest.raises(ValueError, match="give either"):
        kp.self_reference(flow.output(readout), target, readout=readout)
    equilibrium, z0 = network_registry.Equilibrium().double(), torch.zeros(TIMES, 4, dtype=torch.float64)
    at_rest = kp.linearize(kp.solve(kp.FixedPointProblem(equilibrium, x[0, :, [0, 1, 1]], z0)))
    with pytest.raises(TypeError, match="got FixedPointProblem; or give the change itself"):
        kp.self_reference(at_rest, at_rest.solution.state + 1)
    rated = kp.linearize(flow.solution, metric=kp.LearningRates(0.1))
    with pytest.raises(ValueError, match="the flow has a metric"):
        kp.self_reference(rated, target, readout=readout)


def test_what_does_not_count_is_in_no_share() -> None:
    cell, _readout, x, _target = setting()
    mask = torch.ones(TRIALS, TIMES, dtype=torch.bool)
    mask[1, 6:], mask[3, 4:] = False, False
    change = torch.randn(TRIALS, TIMES, UNITS, dtype=torch.float64)
    found = kp.self_reference(flow_of(cell, x).where(mask), change=change, k=4)
    states = cell(x)[0].detach()
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1]], 1)
    V = torch.cat([before, x, torch.ones(TRIALS, TIMES, 2)], -1) * mask[..., None]
    core = np.linalg.svd(V.reshape(TRIALS * TIMES, -1).numpy())[0]
    X = (change * mask[..., None]).reshape(TRIALS * TIMES, -1).numpy()
    place = BASES.index("core")
    assert found.share[0, place, 3] == pytest.approx(share(core[:, :4], X), rel=1e-10)
    constant = mask.double().reshape(-1, 1).numpy()
    assert found.share[0, BASES.index("constant"), 0] == pytest.approx(share(constant, X), rel=1e-10)
    assert kp.rank_bound(flow_of(cell, x).where(mask)).states == int(mask.sum()) * UNITS


@pytest.mark.parametrize("steps", [3, np.int64(3), [3], np.array([3])])
def test_one_number_of_steps(steps: Any) -> None:
    cell, readout, x, target = setting()
    found = kp.self_reference(flow_of(cell, x), target, readout=readout, steps=steps, lr=np.float32(0.0625), k=4)
    assert found.changes == ("3 steps",) and found.lr == 0.0625
