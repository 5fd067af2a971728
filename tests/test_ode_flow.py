"""Linearised ODEs against dense Jacobians of the discretised model, by reverse mode through the solver itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from conftest import cases
from synthetic import check_apart
from torch import Tensor, nn
from torch.func import functional_call
from torchdiffeq import odeint

import kpflow_dyn as kp
from kpflow_dyn import models
from kpflow_dyn._problems.inputs import inputs_at

GRID = np.array([0.0, 0.2, 0.5, 0.6, 1.0])


class Driven(nn.Module):
    """A field with inputs that depends on the time, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, t: Tensor, z: Tensor, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(torch.cat([z, x], -1)))) * torch.cos(2 * t) - z


class Drift(nn.Module):
    """z' = b."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.randn(3))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.b.expand_as(z)


def closed_loop(plant: Callable) -> nn.Module:
    width = plant.state_size
    return models.ClosedLoop(plant, nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, plant.control_size)))


@dataclass(frozen=True)
class Field:
    """A registered field, its method and options, and what its inputs are."""

    make: Callable[[], nn.Module]
    units: int
    alg: str = "rk4"
    inputs: str = ""
    t: object = field(default_factory=lambda: GRID)
    options: dict = field(default_factory=dict)
    scale: float = 1.0

    def problem(self) -> kp.ODEProblem:
        torch.manual_seed(5)
        model = self.make().double()
        start = self.scale * torch.randn(2, self.units, dtype=torch.float64)
        samples = torch.randn(2, len(GRID), 2, dtype=torch.float64)
        x = {"": None, "samples": (GRID, samples), "callable": lambda t: torch.stack([torch.sin(3 * t), t])}
        if isinstance(model, models.HodgkinHuxleyField):
            start = model.resting_state(2) + 0.01 * start
        return kp.ODEProblem(model, start, self.t, x[self.inputs])


FIELDS = {
    "driven_rk4": Field(Driven, 3, inputs="samples"),
    "driven_euler": Field(Driven, 3, "euler", "callable"),
    "driven_midpoint": Field(Driven, 3, "midpoint", "samples"),
    "driven_given_steps": Field(Driven, 3, "dopri5", "samples", options={"steps": np.linspace(0, 1, 4)}),
    "driven_adaptive": Field(Driven, 3, "bosh3", "callable", options={"rtol": 1e-3, "atol": 1e-3}),
    "driven_span": Field(Driven, 3, "dopri5", "callable", (0.0, 1.0), {"rtol": 1e-3, "atol": 1e-3}),
    "dopri8": Field(Driven, 3, "dopri8", "samples", options={"rtol": 1e-3, "atol": 1e-3}),
    "rk4_span": Field(Driven, 3, "rk4", "samples", (0.0, 1.0), {"steps": 0.4}),
    "drift": Field(Drift, 3),
    "mlp": Field(lambda: models.MLPField(3, 4, depth=2), 3),
    "ctrnn": Field(lambda: models.CTRNNField(3, inputs=2, tau=[0.5, 1.0, 2.0]), 3, inputs="samples"),
    "double_integrator": Field(lambda: closed_loop(models.DoubleIntegrator()), 2),
    "pendulum": Field(lambda: closed_loop(models.Pendulum(damping=0.1)), 2),
    "cart_pole": Field(lambda: closed_loop(models.CartPole()), 4, scale=0.3),
    "van_der_pol": Field(lambda: closed_loop(models.VanDerPol()), 2),
    "quadrotor": Field(lambda: closed_loop(models.PlanarQuadrotor()), 6, "dopri5", options={"steps": GRID}, scale=0.3),
    "hodgkin_huxley": Field(lambda: models.HodgkinHuxleyField(2), 10, "rk4", t=np.linspace(0, 0.1, 5)),
}


def reference(flow: kp.Flow) -> Callable[[dict[str, Tensor]], Tensor]:
    """Parameters -> states, by torchdiffeq on the same frozen steps."""
    solution, problem = flow.solution, flow.solution.problem
    ends = np.append(solution.steps.t[0, 0], (solution.steps.t + solution.steps.dt)[0, 1:])
    times, inside = torch.from_numpy(ends), torch.from_numpy(np.array(solution.t))
    adaptive = solution.alg not in ("euler", "midpoint", "rk4")
    forced = {"step_t": times[1:], "first_step": 2 * (times[-1] - times[0]), "ifactor": 1e3}
    given = {"grid_constructor": lambda f, y0, t: times, "interp": "cubic"}
    options = forced if adaptive else given

    def rate(parameters: dict[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def f(t: Tensor, z: Tensor) -> Tensor:
            x = inputs_at(problem, np.full((len(z), 1), float(t)))
            return functional_call(problem.f, parameters, (t, z) if x is None else (t, z, x[:, 0]))

        return f

    def states(parameters: dict[str, Tensor]) -> Tensor:
        wanted = torch.cat([times[:1], inside, times[-1:]]).unique()
        found = odeint(rate(parameters), problem.z0, wanted, rtol=1e30, atol=1e30, method=solution.alg, options=options)
        return found[torch.searchsorted(wanted, inside)].transpose(0, 1)

    return states


QUICK = {
    "driven_midpoint",
    "driven_adaptive",
    "driven_span",
    "rk4_span",
    "drift",
    "ctrnn",
    "pendulum",
    "hodgkin_huxley",
}


@pytest.fixture(scope="module", params=cases(FIELDS, QUICK))
def flow(request: pytest.FixtureRequest) -> kp.Flow:
    case = FIELDS[request.param]
    return kp.linearize(kp.solve(case.problem(), case.alg, **case.options))


@pytest.fixture(scope="module")
def jacobian(flow: kp.Flow) -> Tensor:
    names = list(flow.parameters)
    found = torch.autograd.functional.jacobian(
        lambda *values: reference(flow)(dict(zip(names, values, strict=True))), tuple(flow.parameters.values())
    )
    return torch.cat([part.reshape(flow.ntk.domain.size, -1) for part in found], 1)


def relative(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def test_states_and_jacobian_are_those_of_the_solver(flow: kp.Flow, jacobian: Tensor) -> None:
    assert relative(reference(flow)(flow.parameters), flow.solution.state) < 1e-12
    assert relative(flow.J.dense(), jacobian) < 1e-9


def test_ntk_is_that_of_the_weighted_states(flow: kp.Flow, jacobian: Tensor) -> None:
    """ntk = J J^T W, whose spectrum is that of W^(1/2) J J^T W^(1/2)."""
    weights = torch.from_numpy(flow.solution.weights)[:, None].expand(flow.ntk.domain.shape).reshape(-1)
    assert relative(flow.ntk.dense(), jacobian @ jacobian.T * weights) < 1e-9
    root = weights.sqrt()[:, None] * jacobian
    values = torch.linalg.eigvalsh(root.T @ root).flip(0)[:3]
    torch.testing.assert_close(kp.eigs(flow.ntk, k=3).values, values, rtol=1e-8, atol=0)


def test_nodal_identity(flow: kp.Flow, jacobian: Tensor) -> None:
    nodal = flow.nodal
    assert relative((nodal.P @ nodal.K @ nodal.P.T).dense(), nodal.ntk.dense()) < 1e-10
    assert relative((nodal.P @ nodal.B @ nodal.core @ nodal.B.T @ nodal.P.T).dense(), nodal.ntk.dense()) < 1e-10
    if nodal.ntk.domain.shape == flow.ntk.domain.shape:  # the nodes are the ends of the steps
        assert relative(nodal.ntk.dense(), jacobian @ jacobian.T) < 1e-9


@pytest.mark.parametrize("name", ["P", "K", "core", "B", "J", "ntk"])
def test_adjointness(flow: kp.Flow, name: str) -> None:
    assert kp.check_adjoint(getattr(flow, name), seed=3) < 1e-12
    assert kp.check_adjoint(getattr(flow.nodal, name), seed=3) < 1e-12


def test_gradient_step_moves_the_state_by_the_ntk(flow: kp.Flow) -> None:
    """On the frozen steps, S(theta - eta g) - S = -eta ntk grad S with an error that falls linearly in eta."""
    state, states = flow.solution.state, reference(flow)
    torch.manual_seed(1)
    error = torch.randn_like(state)
    predicted = -flow.ntk.mv(error)
    gradient = flow.as_parameters(flow.J.T.mv(error))
    off = []
    for eta in (1e-3, 1e-4):
        moved = states({name: value - eta * gradient[name] for name, value in flow.parameters.items()})
        off.append(float(((moved - state) / eta - predicted).norm() / predicted.norm()))
    assert off[1] < 0.2 * off[0] or off[1] < 1e-6


def test_closed_loops_learn_the_policy_alone() -> None:
    case = FIELDS["cart_pole"]
    flow = kp.linearize(kp.solve(case.problem(), "rk4"))
    assert all(name.startswith("policy.") for name in flow.parameters)
    assert [site.kind for site in flow.sites] == ["matrix", "matrix"]
    assert flow.sites[0].inputs.shape == (2, len(GRID), 5)  # the state and a one


def test_multistep_methods_name_the_alternatives() -> None:
    solution = kp.solve(FIELDS["driven_rk4"].problem(), "explicit_adams")
    with pytest.raises(ValueError, match=r"explicit_adams.*Runge-Kutta.*InterpolatingAdjoint"):
        kp.linearize(solution)


def test_each_trial_by_itself_has_the_blocks_of_the_ntk_within_trials(flow: kp.Flow) -> None:
    check_apart(flow.ntk)
