"""One small object of each kind that the package gives back, in torch and in JAX."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cached_property
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn import control
from kpflow_dyn.models import ClosedLoop, DoubleIntegrator, Pendulum

TRIALS, TIMES, UNITS = 4, 12, 6
GRID = np.linspace(0.0, 1.0, 5)
COST, END = control.QuadraticCost(np.diag([1.0, 0.2]), [[0.3]]), control.QuadraticCost(np.eye(2))


SYSTEM = control.LTI([[0.0, 1.0], [-1.0, -0.5]], [[0.0], [1.0]], [[1.0, 0.0]])


class Drift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Linear(3, 3).double()

    def forward(self, t: Any, z: Any) -> Any:
        return torch.tanh(self.W(z)) - z


class JaxDrift(eqx.Module):
    W: Any

    def __call__(self, t: Any, z: Any) -> Any:
        return jnp.tanh(self.W(z)) - z


class Kit:
    """What results are made from, each made once."""

    def __init__(self, framework: str) -> None:
        self.torch = framework == "torch"
        torch.manual_seed(0)

    def array(self, values: Any) -> Any:
        values = np.asarray(values, np.float64)
        return torch.from_numpy(values) if self.torch else jnp.asarray(values)

    def linear(self, inputs: int, outputs: int) -> Any:
        return (
            nn.Linear(inputs, outputs).double() if self.torch else eqx.nn.Linear(inputs, outputs, key=jax.random.key(1))
        )

    @cached_property
    def task(self) -> kp.tasks.TaskData:
        return kp.tasks.FlipFlop(bits=2, steps=TIMES).sample(TRIALS, 0)

    @cached_property
    def problem(self) -> Any:
        cell = nn.GRUCell(2, UNITS).double() if self.torch else eqx.nn.GRUCell(2, UNITS, key=jax.random.key(0))
        return kp.DiscreteProblem(cell, self.array(self.task.inputs))

    @cached_property
    def discrete(self) -> Any:
        return kp.solve(self.problem)

    @cached_property
    def flow(self) -> Any:
        return kp.linearize(self.discrete)

    @cached_property
    def output(self) -> Any:
        return self.flow.output(self.linear(UNITS, 2), learn=True)

    @cached_property
    def policy(self) -> Any:
        return nn.Linear(2, 1).double() if self.torch else self.linear(2, 1)

    @cached_property
    def loop(self) -> Any:
        start = self.array([[0.3, -0.2], [-0.5, 0.4], [1.0, 0.1]])
        return kp.solve(kp.ODEProblem(ClosedLoop(Pendulum(damping=0.2), self.policy), start, GRID), rtol=1e-6)

    @cached_property
    def field(self) -> Any:
        return Drift() if self.torch else JaxDrift(eqx.nn.Linear(3, 3, key=jax.random.key(0)))

    @cached_property
    def start(self) -> Any:
        return self.array(np.random.default_rng(0).standard_normal((TRIALS, 3)))

    @cached_property
    def target(self) -> Any:
        return self.array(np.nan_to_num(self.task.targets))

    @cached_property
    def modes(self) -> kp.Modes:
        return kp.modes(self.flow.ntk, "time", k=3)


class Noise(nn.Module):
    def forward(self, t: Any, z: Any) -> Any:
        return 0.1 + 0 * z


class Delayed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Linear(3, 3).double()

    def forward(self, t: Any, z: Any, late: Any) -> Any:
        return torch.tanh(self.W(late[0])) - z


class JaxDelayed(JaxDrift):
    def __call__(self, t: Any, z: Any, late: Any) -> Any:
        return jnp.tanh(self.W(late[0])) - z


class Map(Drift):
    def forward(self, z: Any, x: Any) -> Any:
        return 0.5 * torch.tanh(self.W(z)) + x


class JaxMap(JaxDrift):
    def __call__(self, z: Any, x: Any) -> Any:
        return 0.5 * jnp.tanh(self.W(z)) + x


def _sde(kit: Kit) -> Any:
    noise = Noise() if kit.torch else lambda t, z: 0.1 + 0 * z
    return kp.solve(kp.SDEProblem(kit.field, noise, kit.start, GRID, brownian=0))


def _delayed(kit: Kit) -> Any:
    return Delayed() if kit.torch else JaxDelayed(kit.field.W)


def _map(kit: Kit) -> Any:
    return Map() if kit.torch else JaxMap(kit.field.W)


def _opened(kit: Kit) -> Any:
    return control.linearize_ltv(kit.loop, loop="open", inputs="control")


def _point(g: float, seed: int) -> dict[str, float]:
    return {"gain": 2 * g + seed}


def _recording(kit: Kit) -> Any:
    record = kp.Recorder(tempfile.mkdtemp())
    for step in range(3):
        record(step, kit.problem.cell, loss=1 / (step + 1))
    return kp.Recorder.read(record.folder)


RESULTS: dict[str, Callable[[Kit], Any]] = {
    "discrete problem": lambda kit: kit.problem,
    "ode problem": lambda kit: kit.loop.problem,
    "discrete solution": lambda kit: kit.discrete,
    "ode solution": lambda kit: kit.loop,
    "flow": lambda kit: kit.flow,
    "ode flow": lambda kit: kp.linearize(kit.loop),
    "output": lambda kit: kit.output,
    "site": lambda kit: kit.flow.sites[0],
    "operator": lambda kit: kit.flow.ntk,
    "partial trace": lambda kit: kp.partial_trace(kit.flow.ntk, keep="time"),
    "space": lambda kit: kit.flow.ntk.domain,
    "modes": lambda kit: kit.modes,
    "eigs": lambda kit: kp.eigs(kit.flow.ntk, 3),
    "svds": lambda kit: kp.svds(kit.flow.J, 3),
    "estimate": lambda kit: kp.trace(kit.flow.ntk),
    "rank estimate": lambda kit: kp.effective_rank(kit.flow.ntk),
    "rank bound": lambda kit: kp.rank_bound(kit.flow),
    "density": lambda kit: kp.spectral_density(kit.flow.ntk),
    "summary": lambda kit: kp.summary(kit.flow),
    "contributions": lambda kit: kp.contributions(kit.flow),
    "forecast": lambda kit: kp.forecast(kit.output, kit.target, lr=0.1, steps=50),
    "gradient flow": lambda kit: kp.gradient_flow(kit.discrete, lambda z: (z**2).mean(), 20.0),
    "learnability": lambda kit: kp.learnability(kit.output, {"target": kit.target}),
    "obstacles": lambda kit: kp.obstacles(kit.output, {"error": kit.target}),
    "self reference": lambda kit: kp.self_reference(kit.flow, change={"drift": kit.discrete.state}, k=3),
    "comparison": lambda kit: kp.compare(kit.flow, kit.flow, k=2),
    "metric": lambda kit: kp.LearningRates({"": 0.1}),
    "measure": lambda kit: kp.Measure(),
    "fixed points": lambda kit: kp.dynamics.fixed_points(kit.discrete, x=[0.0, 0.0], starts=8),
    "lyapunov": lambda kit: kp.dynamics.lyapunov_spectrum(kit.discrete, k=3),
    "finite time": lambda kit: kp.dynamics.finite_time_exponents(kit.discrete),
    "pca": lambda kit: kp.dynamics.pca(kit.discrete),
    "lti": lambda kit: SYSTEM,
    "ltv": lambda kit: control.linearize_ltv(kit.loop),
    "gramian": lambda kit: control.gram(control.linearize_ltv(kit.loop), "c"),
    "gramian of lti": lambda kit: control.gram(SYSTEM, "c"),
    "gramian factor": lambda kit: control.gram(control.linearize_ltv(kit.loop), "c", rank=1),
    "hankel": lambda kit: control.hankel(kit.loop, 0.5),
    "regulator": lambda kit: control.lqr([[0.0, 1.0], [-1.0, -0.5]], [[0.0], [1.0]], np.eye(2), np.eye(1)),
    "tvlqr": lambda kit: control.tvlqr(_opened(kit), np.eye(2), np.eye(1)),
    "angles": lambda kit: control.reachable_angles(
        kp.modes(kp.linearize(kit.loop).ntk, "unit", k=2), control.gram(control.linearize_ltv(kit.loop), "c"), rank=1
    ),
    "frequency": lambda kit: control.frequency_response(SYSTEM),
    "margins": lambda kit: control.disk_margins(SYSTEM),
    "cost": lambda kit: COST,
    "costates": lambda kit: control.adjoint(kit.loop, COST),
    "loop analysis": lambda kit: control.analyze(kit.loop, COST, END),
    "sde solution": _sde,
    "dde solution": lambda kit: kp.solve(kp.DDEProblem(_delayed(kit), kit.start, GRID, delays=(0.2,))),
    "static solution": lambda kit: kp.solve(kp.StaticProblem(kit.linear(2, 3), kit.array(np.ones((4, 2))))),
    "static flow": lambda kit: kp.linearize(kp.solve(kp.StaticProblem(kit.linear(2, 3), kit.array(np.ones((4, 2)))))),
    "fixed point solution": lambda kit: kp.solve(
        kp.FixedPointProblem(_map(kit), kit.array(np.ones((4, 3))), kit.array(np.zeros((4, 3))))
    ),
    "episodes": lambda kit: kp.gym.rollout(lambda z: z[1:2] + 0.3 * z[3:4], episodes=2, max_steps=10),
    "sweep": lambda kit: kp.Sweep(_point, over={"g": [0.5, 1.5], "seed": range(3)}, out=tempfile.mkdtemp()),
    "recording": lambda kit: _recording(kit),
    "hybrid solution": lambda kit: (
        kp.solve(kp.ODEProblem(ClosedLoop(Pendulum(), kit.policy, every=0.25), kit.array([[0.3, -0.2]]), GRID), "rk4")
        if kit.torch
        else kp.solve(kp.ODEProblem(ClosedLoop(Pendulum(), kit.policy, every=0.25), kit.array([[0.3, -0.2]]), GRID))
    ),
    "task": lambda kit: kit.task,
    "training": lambda kit: kp.train.fit(kit.problem.cell, kit.task, kit.linear(UNITS, 2), steps=3),
    "plant": lambda kit: Pendulum(),
    "closed loop": lambda kit: ClosedLoop(DoubleIntegrator(), kit.policy),
    "law": lambda kit: kp.models.Dale(1.2),
}

IN_JAX = [
    "discrete problem",
    "discrete solution",
    "ode solution",
    "flow",
    "ode flow",
    "output",
    "site",
    "operator",
    "modes",
]
IN_JAX += ["svds", "sde solution", "static solution", "fixed point solution", "training", "fixed points"]
"""Kinds that hold arrays of a framework."""
