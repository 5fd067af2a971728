"""In continuous time the operators are those of functions of time: spectra do not depend on the mesh."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import cases
from scipy.linalg import expm
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn.models import CTRNNCell, CTRNNField, MLPField

END = 2.0


class Drift(nn.Module):
    """z' = b, so that A = 0 and P is the integral from 0 to t."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.b.expand_as(z)


class Linear(nn.Module):
    """z' = A z."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(A)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return z @ self.A.T


def grid(steps: int, kind: str) -> np.ndarray:
    gaps = np.ones(steps) if kind == "uniform" else np.random.default_rng(0).uniform(0.5, 1.5, steps)
    return END * np.concatenate([[0.0], np.cumsum(gaps) / gaps.sum()])


def volterra_error(t: np.ndarray | tuple[float, float], **options: object) -> np.ndarray:
    """Relative errors of the first ten singular values of P, which are 2 T / ((2 k - 1) pi)."""
    start = torch.zeros(1, 1, dtype=torch.float64)
    flow = kp.linearize(kp.solve(kp.ODEProblem(Drift(), start, t), "rk4", **options))
    found = kp.eigs(flow.P @ flow.P.T, k=10).values.sqrt().numpy()
    return abs(found * (2 * np.arange(1, 11) - 1) * np.pi / (2 * END) - 1)


@pytest.mark.parametrize("kind", cases(["uniform", "random"], ["random"]))
def test_propagator_without_dynamics_is_the_volterra_operator(kind: str) -> None:
    coarse, fine = volterra_error(grid(200, kind)), volterra_error(grid(400, kind))
    assert fine.max() < 1e-3
    assert (fine[1:] < 0.3 * coarse[1:]).all()  # second order


def test_volterra_on_gauss_points() -> None:
    coarse, fine = (volterra_error((0.0, END), steps=END / count) for count in (60, 120))
    assert fine.max() < 1e-3
    assert (fine < 0.3 * coarse).all()


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_propagator_of_linear_dynamics_is_the_matrix_exponential(method: str, order: int) -> None:
    """P_node[n, m] = exp(A (t_n - t_m)), to the order of the scheme; P = (P_node - I/2) W exactly."""
    A = np.array([[-0.5, 2.0, 0.0], [-2.0, -0.5, 0.3], [0.0, 0.1, -1.0]])
    start = torch.ones(1, 3, dtype=torch.float64)
    errors = []
    for steps in (10, 20):
        t = grid(steps, "random")
        flow = kp.linearize(kp.solve(kp.ODEProblem(Linear(torch.tensor(A)), start, t), method))
        found = flow.nodal.P.dense().numpy().reshape(steps + 1, 3, steps + 1, 3)
        exact = np.zeros_like(found)
        for n in range(steps + 1):
            for m in range(n + 1):
                exact[n, :, m] = expm(A * (t[n] - t[m]))
        errors.append(abs(found - exact).max())
        identity = np.eye(3 * (steps + 1))
        weights = np.repeat(flow.solution.weights, 3)
        expected = (found.reshape(identity.shape) - identity / 2) * weights
        np.testing.assert_allclose(flow.P.dense().numpy(), expected, atol=1e-13)
    assert errors[1] < errors[0] * 0.5**order * 1.6
    assert errors[1] < {"euler": 0.5, "midpoint": 0.05, "rk4": 2e-4}[method]


def field_problem(t: object) -> kp.ODEProblem:
    torch.manual_seed(0)
    field = MLPField(3, 12).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.mul_(3)
    return kp.ODEProblem(field, torch.randn(2, 3, dtype=torch.float64), t)


def leading(flow: kp.Flow) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ten eigenvalues of the NTK, three temporal modes [mode, time] and the times."""
    temporal = kp.modes(flow.ntk, axis="time", k=3).vectors.numpy()
    return kp.eigs(flow.ntk, k=10).values.numpy(), temporal, np.asarray(flow.solution.t)


def mode_distance(flow: kp.Flow, fine: kp.Flow) -> float:
    """The largest L2 distance of three temporal modes, up to sign, from those on a finer grid."""
    _, modes, t = leading(flow)
    _, fine_modes, fine_t = leading(fine)
    distances = []
    for mode, fine_mode in zip(modes, fine_modes, strict=True):
        other = np.interp(t, fine_t, fine_mode)
        distances.append(min((flow.solution.weights @ (mode - sign * other) ** 2) ** 0.5 for sign in (1, -1)))
    return max(distances)


@pytest.mark.parametrize("kind", cases(["uniform", "random"], ["random"]))
def test_spectra_and_modes_do_not_depend_on_the_grid(kind: str) -> None:
    flows = [kp.linearize(kp.solve(field_problem(grid(steps, kind)), "rk4")) for steps in (100, 200, 400)]
    values = [leading(flow)[0] for flow in flows]
    changes = [abs(b / a - 1).max() for a, b in pairwise(values)]
    assert changes[1] < 1e-3
    assert changes[1] < 0.3 * changes[0]  # second order
    assert mode_distance(flows[1], flows[2]) < 1e-3


@pytest.mark.slow
def test_spectra_and_modes_do_not_depend_on_the_tolerance() -> None:
    """About ten and twenty adaptive steps, with three Gauss points in each."""
    flows = [kp.linearize(kp.solve(field_problem((0.0, END)), "dopri5", rtol=r, atol=r * 1e-2)) for r in (1e-5, 1e-7)]
    counts = [flow.solution.steps.dt.shape[1] - 1 for flow in flows]
    assert counts[0] < counts[1] < 40
    exact = kp.linearize(kp.solve(field_problem(grid(800, "uniform")), "rk4"))
    loose, tight, reference = (leading(flow)[0] for flow in (*flows, exact))
    assert abs(loose / tight - 1).max() < 1e-3
    assert abs(tight / reference - 1).max() < 1e-4
    assert max(mode_distance(flow, exact) for flow in flows) < 5e-4  # so less than 1e-3 from each other


def test_unweighted_spectra_grow_with_the_mesh() -> None:
    """What the measure is for: counts instead of quadrature weights double with every halving of the step."""
    ones = lambda n: kp.Measure(time=np.ones(n + 1))  # noqa: E731
    solutions = {n: kp.solve(field_problem(grid(n, "uniform")), "rk4") for n in (100, 200)}
    tops = [float(kp.eigs(kp.linearize(s, measure=ones(n)).ntk, k=1).values[0]) for n, s in solutions.items()]
    assert tops[1] / tops[0] == pytest.approx(2, rel=0.03)


def test_composed_operators_tend_to_the_ntk_with_second_order() -> None:
    """K is that of the field at the nodes: P K P* is the NTK up to the quadrature."""
    errors = []
    for steps in (20, 40, 80):
        flow = kp.linearize(kp.solve(field_problem(grid(steps, "random")), "rk4"))
        composed, fused = (kp.eigs(op, k=5).values for op in (flow.P @ flow.K @ flow.P.T, flow.ntk))
        errors.append(float(abs(composed / fused - 1).max()))
    assert errors[2] < 0.3 * errors[1] < 0.3**2 * errors[0]


def test_leaky_rnn_tends_to_its_neural_ode() -> None:
    """An RNN with leak dt is an Euler step of the CTRNN: its NTK, in the measure dt, tends to that of the field."""
    torch.manual_seed(0)
    field = CTRNNField(4, inputs=2, gain=1.5).double()
    start = torch.randn(3, 4, dtype=torch.float64)

    def drive(t: Tensor) -> Tensor:
        return torch.stack([torch.sin(3 * t), torch.cos(t)])

    exact = kp.linearize(kp.solve(kp.ODEProblem(field, start, grid(400, "uniform"), drive), "rk4"))
    reference, errors = float(kp.eigs(exact.ntk, k=1).values[0]), []
    for steps in (50, 100, 200):
        dt = END / steps
        cell = CTRNNCell(2, 4, alpha=dt).double()
        cell.load_state_dict(field.state_dict(), strict=False)
        x = torch.stack([drive(t) for t in torch.arange(steps, dtype=torch.float64) * dt])
        problem = kp.DiscreteProblem(cell, x.expand(3, -1, -1).contiguous(), start)
        flow = kp.linearize(kp.solve(problem), measure=kp.Measure(time=np.full(steps, dt)))
        errors.append(abs(float(kp.eigs(flow.ntk, k=1).values[0]) / reference - 1))
    assert errors[2] < 0.6 * errors[1] < 0.6**2 * errors[0]
    assert errors[2] < 0.05


def test_measures_weigh_times_and_trials() -> None:
    solution = kp.solve(field_problem(grid(10, "random")), "rk4")
    plain = kp.linearize(solution)
    weights = torch.from_numpy(solution.weights)
    assert float(plain.ntk.domain.measure.reshape(-1).sub(weights).abs().max()) < 1e-15
    mean = kp.linearize(solution, measure=kp.Measure(trial="mean"))
    assert float(kp.trace(mean.ntk).value) == pytest.approx(float(kp.trace(plain.ntk).value) / 2)
    own = kp.linearize(solution, measure=kp.Measure(time=np.arange(1.0, 12.0), trial=[1.0, 3.0]))
    J = plain.J.dense()
    scale = (torch.tensor([1.0, 3.0])[:, None, None] * torch.arange(1.0, 12.0)[:, None]).expand(2, 11, 3).reshape(-1)
    root = scale.double().sqrt()
    expected = torch.linalg.eigvalsh(root[:, None] * (J @ J.T) * root).flip(0)[:4]
    torch.testing.assert_close(kp.eigs(own.ntk, k=4).values, expected, rtol=1e-9, atol=0)
    for name in ("P", "K", "core", "B", "J", "ntk"):
        assert kp.check_adjoint(getattr(own, name)) < 1e-12
    top = float(torch.linalg.eigvals(own.core.dense()).real.max())
    assert own.core.spectrum()[0].max() == pytest.approx(top, rel=1e-10)


def test_measures_that_are_none() -> None:
    solution = kp.solve(field_problem(grid(10, "random")), "rk4")
    with pytest.raises(ValueError, match=r"time weights of shape \(3,\), expected \[time\] = \(11,\)"):
        kp.linearize(solution, measure=kp.Measure(time=[1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="positive and finite"):
        kp.linearize(solution, measure=kp.Measure(trial=[1.0, 0.0]))
    with pytest.raises(ValueError, match="expected 'sum', 'mean' or weights"):
        kp.linearize(solution, measure=kp.Measure(trial="median"))
    with pytest.raises(TypeError, match=r"expected kp.Measure"):
        kp.linearize(solution, measure="mean")
