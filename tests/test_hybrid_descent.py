"""Gradient flows of hybrid models: the times of events follow the parameters, to second order."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from test_hybrid import ball, fall, jax_ball
from test_hybrid_forms import Scale

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._learning.objective import Objective

pytestmark = pytest.mark.usefixtures("x64")

GRID = [0.0, 0.3, 0.6, 0.8]
ONCE = {"alg": "rk4", "steps": 0.2}


def height(z):
    return ((z[:, -1, 0] - 0.3) ** 2).mean()


def posed(framework: str, t=GRID) -> kp.ODEProblem:
    start = np.array([[1.0, 0.0], [0.7, 0.3]])
    if framework == "torch":
        return kp.ODEProblem(ball(), torch.tensor(start), t)
    return kp.ODEProblem(jax_ball(), jnp.asarray(start), t)


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_gradient_and_hessian_are_those_of_the_solves(framework: str) -> None:
    problem = posed(framework)
    solution = kp.solve(problem, **ONCE) if framework == "torch" else kp.solve(problem)
    objective = Objective(solution, height, lambda _name: True)
    here, d = objective.start, 1e-4
    point, before, after = (objective(here + step) for step in (0.0, -d, d))
    assert to_numpy(point.gradient)[0] == pytest.approx((after.loss - before.loss) / (2 * d), rel=1e-6)
    bend = to_numpy(after.gradient - before.gradient)[0] / (2 * d)
    assert to_numpy(point.hessian(here[None] * 0 + 1))[0, 0] == pytest.approx(bend, rel=1e-6)
    loss, gradient = point.around(here + 1e-3)
    there = objective(here + 1e-3)
    assert loss == pytest.approx(there.loss, rel=1e-7)
    assert to_numpy(gradient)[0] == pytest.approx(to_numpy(there.gradient)[0], rel=1e-4)


@pytest.mark.parametrize("t", [GRID, (0.0, 0.8)], ids=["grid", "span"])
def test_descent_goes_on_while_the_same_events_happen(t) -> None:
    def loss(z):
        return ((z[..., 0] - 0.3) ** 2).mean()

    solution = kp.solve(posed("torch", t), **ONCE)
    flow = kp.gradient_flow(solution, loss, span=1.0)
    assert flow.reached and flow.loss[-1] < flow.loss[0]
    restitution = to_numpy(flow.parameters["events.0.reset.restitution"])
    assert abs(restitution[-1] - restitution[0]) > 0.01


def test_an_event_that_goes_ends_it_and_is_named() -> None:
    problem = posed("torch", [0.0, 0.5, 1.2])  # the second bounce is at 1.17, and after higher hops later
    with pytest.raises(RuntimeError, match=r"no value beyond that: trial 0 has 1 events where it had 2.* Solve again"):
        kp.gradient_flow(kp.solve(problem.remake(z0=problem.z0[:1]), **ONCE), lambda z: -z[:, 1, 0].mean(), span=1.0)


def test_a_learnt_start_goes_through_events_as_well() -> None:
    model = kp.models.Hybrid(fall, kp.models.Event(lambda t, z: z[:, 0], Scale(-0.8), direction=-1))
    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    problem = kp.ODEProblem(model, start, GRID).learn_start()
    flow = kp.gradient_flow(kp.solve(problem, **ONCE), height, span=0.1)
    assert flow.reached and flow.loss[-1] < flow.loss[0]
