"""Plants in discrete time: a loop around any step(z, u), MuJoCo's MJX and MotorNet's arms; against autograd."""

from __future__ import annotations

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import array_namespace
from kpflow_dyn.models import ClosedLoop, MJXPlant, MotorNetPlant, MotorNetPolicy

pytestmark = pytest.mark.usefixtures("x64")
TRIALS, STEPS, UNITS = 3, 5, 4
RNG = np.random.default_rng(0)
GOALS = RNG.standard_normal((TRIALS, STEPS, 1))


class Slider:
    """A mass on a stiff spring, by semi-implicit Euler, in both frameworks."""

    dt, state_size, control_size, state_names = 0.1, 2, 1, ("position", "velocity")

    def step(self, z: Any, u: Any) -> Any:
        place, velocity = z[..., :1], z[..., 1:]
        velocity = velocity + self.dt * (u - 3 * place**3)
        return array_namespace(z).concat([place + self.dt * velocity, velocity], axis=-1)


class Watched(Slider):
    """One of which the policy sees the distance to its goal alone."""

    def observe(self, z: Any, x_t: Any) -> Any:
        return x_t - z[..., :1]


class Twofold(nn.Module):
    """policy(memory, seen) -> (memory, control)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.RNNCell(3, UNITS), nn.Linear(UNITS, 1)

    def forward(self, memory: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.cell(seen, memory)
        return memory, torch.tanh(self.out(memory))


def start(memory: int = 0, plant: int = 2) -> np.ndarray:
    return np.concatenate([RNG.standard_normal((TRIALS, plant)), np.zeros((TRIALS, memory))], -1)


def torch_flow(loop: nn.Module, x: np.ndarray, z0: np.ndarray) -> kp.Flow:
    return kp.linearize(kp.solve(kp.DiscreteProblem(loop, torch.tensor(x), torch.tensor(z0))))


def assert_is_autograd(loop: nn.Module, x: np.ndarray, z0: np.ndarray) -> kp.Flow:
    """J of the flow is that of the loop's own steps under autograd, and ntk is J J*."""
    flow, parameters = torch_flow(loop, x, z0), dict(loop.named_parameters())

    def states(*values: Tensor) -> Tensor:
        z, found, given = torch.tensor(z0), [], dict(zip(parameters, values, strict=True))
        for x_t in torch.tensor(x).unbind(1):
            z = torch.func.functional_call(loop, given, (x_t, z))
            found.append(z)
        return torch.stack(found, 1)

    parts = torch.autograd.functional.jacobian(states, tuple(parameters.values()))
    J = torch.cat([part.reshape(-1, value.numel()) for part, value in zip(parts, parameters.values(), strict=True)], 1)
    np.testing.assert_allclose(flow.J.dense().reshape(J.shape), J, atol=1e-8 * float(J.abs().max()))
    np.testing.assert_allclose(flow.ntk.dense().reshape(len(J), -1), J @ J.T, atol=1e-8 * float((J @ J.T).abs().max()))
    assert kp.check_adjoint(flow.P) < 1e-10
    return flow


@pytest.mark.parametrize(
    ("plant", "policy", "readout", "memory"),
    [
        (Slider(), lambda: nn.Linear(3, 1), None, 0),
        (Watched(), lambda: nn.Linear(1, 1), None, 0),
        (Slider(), Twofold, None, UNITS),
        (Slider(), lambda: nn.GRUCell(3, UNITS), lambda: nn.Linear(UNITS, 1), UNITS),
        (Slider(), lambda: nn.LSTMCell(3, UNITS), lambda: nn.Linear(UNITS, 1), 2 * UNITS),
    ],
)
def test_loops_in_torch(plant: Any, policy: Any, readout: Any, memory: int) -> None:
    loop = ClosedLoop(plant, policy(), readout=readout and readout()).double()
    flow = assert_is_autograd(loop, GOALS, start(memory))
    assert not flow.untraced and flow.sites
    assert {name.split(".")[0] for name in flow.parameters} == ({"policy", "readout"} if readout else {"policy"})


def test_a_loop_without_a_reference() -> None:
    loop = ClosedLoop(Slider(), nn.Linear(2, 1)).double()
    assert_is_autograd(loop, np.zeros((TRIALS, STEPS, 0)), start())


@pytest.mark.parametrize("cell", ["GRUCell", "LSTMCell"])
def test_loops_in_jax_are_those_in_torch(cell: str) -> None:
    torch_cell, readout = getattr(nn, cell)(3, UNITS, bias=False).double(), nn.Linear(UNITS, 1).double()
    loop = ClosedLoop(Slider(), torch_cell, readout=readout)
    twin = ClosedLoop(Slider(), kp.models.to_jax(torch_cell), readout=kp.models.to_jax(readout))
    z0 = start(UNITS * (1 + (cell == "LSTMCell")))
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(twin, jnp.asarray(GOALS), jnp.asarray(z0))))
    other = torch_flow(loop, GOALS, z0)
    assert not flow.untraced and len(flow.sites) > 1
    ntk, expected = (np.asarray(found.ntk.dense()) for found in (flow, other))
    np.testing.assert_allclose(ntk, expected, atol=1e-8 * abs(expected).max())


def test_analysis_goes_on_top() -> None:
    sol = kp.solve(
        kp.DiscreteProblem(ClosedLoop(Slider(), nn.Linear(3, 1)).double(), torch.tensor(GOALS), torch.tensor(start()))
    )
    closed, opened = kp.control.linearize_ltv(sol), kp.control.linearize_ltv(sol, loop="open")
    weight = sol.problem.cell.policy.weight.detach().numpy()
    np.testing.assert_allclose(closed.B, np.broadcast_to([[0.01], [0.1]], closed.B.shape))
    np.testing.assert_allclose(closed.A, opened.A + opened.B.values @ weight[:, :2], atol=1e-12)
    np.testing.assert_allclose(opened.A[..., 1, 0], -0.9 * sol.before[..., 0].detach() ** 2, atol=1e-12)
    costs = kp.control.adjoint(sol, lambda z, u: (z**2).sum() + (u**2).sum())
    assert costs.costate.shape == (TRIALS, STEPS, 2)
    rest = torch.zeros(2, dtype=torch.float64)
    found = kp.control.linearize_lti(Slider(), rest, rest[:1])
    assert found.dt == Slider.dt
    loop = ClosedLoop(Slider(), nn.Linear(3, 1, bias=False)).double()
    assert kp.control.linearize_lti(loop, rest, rest[:1]).dt == Slider.dt
    np.testing.assert_allclose(found.A, [[1, 0.1], [0, 1]])
    np.testing.assert_allclose(found.B, [[0.01], [0.1]])


def test_what_does_not_fit_is_said() -> None:
    class NoSize:
        def step(self, z: Any, u: Any) -> Any:
            return z

    with pytest.raises(TypeError, match="has a step but no state_size"):
        ClosedLoop(NoSize(), nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"readout .* of sampled loops"):
        ClosedLoop(kp.models.CartPole(), nn.GRUCell(4, 2), readout=nn.Linear(2, 1))
    memory = ClosedLoop(Slider(), nn.GRUCell(3, UNITS), readout=nn.Linear(UNITS, 1)).double()
    with pytest.raises(ValueError, match="none of the policy's memory"):
        torch_flow(memory, GOALS, start())
    with pytest.raises(ValueError, match=r"the policy returned \(3, 2\), expected a control of the shape \(3, 1\)"):
        torch_flow(ClosedLoop(Slider(), nn.Linear(3, 2)).double(), GOALS, start())

    class Reversed(Twofold):
        def forward(self, memory: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(memory, seen)[::-1]  # type: ignore[return-value]

    with pytest.raises(ValueError, match=r"expected \(memory, control\) with a memory \(3, 4\)"):
        torch_flow(ClosedLoop(Slider(), Reversed()).double(), GOALS, start(UNITS))


# A plant that knows where its derivative is no good


class Doubtful(Slider):
    def check_derivative(self, z: Any, u: Any) -> None:
        assert z.shape == (TRIALS * STEPS, 2) and u.shape == (TRIALS * STEPS, 1)
        raise ValueError("the derivative in position is NaN")


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_plant_is_asked_about_its_derivative(framework: str) -> None:
    cell, readout, z0 = nn.GRUCell(3, UNITS).double(), nn.Linear(UNITS, 1).double(), start(UNITS)
    if framework == "jax":
        loop = ClosedLoop(Doubtful(), kp.models.to_jax(cell), readout=kp.models.to_jax(readout))
        problem = kp.DiscreteProblem(loop, jnp.asarray(GOALS), jnp.asarray(z0))
    else:
        loop = ClosedLoop(Doubtful(), cell, readout=readout)
        problem = kp.DiscreteProblem(loop, torch.tensor(GOALS), torch.tensor(z0))
    with pytest.raises(ValueError, match="the derivative in position is NaN"):
        kp.linearize(kp.solve(problem))


# MuJoCo

HOPPER = """<mujoco><option timestep="0.01"/><worldbody><geom type="plane" size="1 1 .1"/>
  <body name="trunk" pos="0 0 .2"><joint name="height" type="slide" axis="0 0 1"/><geom type="sphere" size=".05"/>
    <body pos="0 0 -.1"><joint name="leg" type="slide" axis="0 0 1"/><geom type="sphere" size=".05"/></body>
  </body></worldbody><actuator><general name="push" joint="leg" dyntype="filter" dynprm=".05"/></actuator></mujoco>"""
BALL = """<mujoco><option timestep="0.01" cone="{cone}"/><worldbody><geom type="plane" size="1 1 .1"/>
  <body name="ball" pos="0 0 .09"><freejoint name="root"/><geom type="sphere" size=".1"/><site name="s"/></body>
  </worldbody><actuator><motor site="s" gear="1 0 0 0 0 0"/></actuator></mujoco>"""


def mjx_plant(xml: str, **options: Any) -> MJXPlant:
    mujoco = pytest.importorskip("mujoco")
    pytest.importorskip("mujoco.mjx")
    return MJXPlant(mujoco.MjModel.from_xml_string(xml), **options)


@pytest.mark.slow
def test_mjx_with_a_contact() -> None:
    """J and ntk of both modes are those of forward mode through MJX's own steps, which have no reverse mode."""
    plant = mjx_plant(HOPPER)
    from mujoco import mjx

    assert plant.state_names == ("height", "leg", "height_velocity", "leg_velocity", "push_activation")
    policy = eqx.nn.MLP(5, 1, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    loop = ClosedLoop(plant, policy)
    z0 = plant.start + jnp.asarray(np.random.default_rng(1).normal(0, 0.03, (2, 5))).at[0, 0].set(-0.12)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(loop, jnp.zeros((2, 4, 0)), z0)))
    model, data = mjx.put_model(plant.model), mjx.make_data(mjx.put_model(plant.model))

    def states(weights: Any, z0: jax.Array) -> jax.Array:
        def step(z: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            found = mjx.step(model, data.replace(qpos=z[:2], qvel=z[2:4], act=z[4:], ctrl=weights(z)))
            z = jnp.concatenate([found.qpos, found.qvel, found.act])
            return z, z

        return jax.lax.scan(step, z0, None, length=4)[1]

    arrays, rest = eqx.partition(policy, eqx.is_inexact_array)
    found = jax.jit(jax.vmap(jax.jacfwd(lambda p, z: states(eqx.combine(p, rest), z)), (None, 0)))(arrays, z0)
    by_name = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(found)}
    J = np.concatenate([by_name[name.removeprefix("policy")].reshape(40, -1) for name in flow.parameters], 1)
    np.testing.assert_allclose(flow.J.dense().reshape(J.shape), J, atol=1e-8 * abs(J).max())
    np.testing.assert_allclose(flow.ntk.dense().reshape(40, 40), J @ J.T, atol=1e-8 * abs(J @ J.T).max())
    assert not flow.untraced and flow.sites and kp.check_adjoint(flow.P) < 1e-10


def test_nan_of_mjx_is_named() -> None:
    plant = mjx_plant(BALL.format(cone="elliptic"))
    with pytest.raises(ValueError, match=r"NaN in root_x, root_y.*first at state 0 of 1.*set cone='pyramidal'"):
        plant.check_derivative(plant.start[None], jnp.zeros((1, 1)))


def test_wrong_derivatives_of_mjx_are_named() -> None:
    plant = mjx_plant(BALL.format(cone="pyramidal"))
    with pytest.warns(UserWarning, match=r"at 1 of 1 states, first at 0, in .*root_wx, root_wy, root_wz"):
        plant.check_derivative(plant.start[None], jnp.zeros((1, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plant.check_derivative(plant.start[None].at[0, 7:].set(0.1), jnp.zeros((1, 1)))


def test_what_mjx_does_not_take_is_said() -> None:
    with pytest.raises(ValueError, match="substeps is 0"):
        mjx_plant(HOPPER, substeps=0)
    plant = mjx_plant(HOPPER, substeps=2)
    assert plant.dt == pytest.approx(0.02)
    with pytest.raises(ValueError, match=r"z has the shape \(4,\), expected the 5 entries"):
        plant.step(jnp.zeros(4), jnp.zeros(1))
    with pytest.raises(TypeError, match="set jax_enable_x64 before the plant"):
        plant.step(jnp.zeros(5, jnp.float32), jnp.zeros(1))
    with pytest.raises(TypeError, match=r"expected a mujoco\.MjModel"):
        MJXPlant("hopper.xml")


# MotorNet


def test_an_arm_with_muscles() -> None:
    """States are those of MotorNet's own loop, and J that of autograd."""
    motornet = pytest.importorskip("motornet")
    effector = motornet.effector.RigidTendonArm26(motornet.muscle.ReluMuscle())
    plant = MotorNetPlant(effector)
    policy = motornet.policy.PolicyGRU(16, UNITS, 6, device="cpu")
    nn.init.constant_(policy.fc.bias, -1.0)
    loop = ClosedLoop(plant, MotorNetPolicy(policy)).double()
    joints, goals = torch.tensor([[0.8, 1.2], [1.0, 0.9]]).double(), np.full((2, STEPS, 2), 0.3)
    z0 = torch.cat([loop.plant.start(joints), torch.zeros(2, UNITS).double()], -1)
    flow = assert_is_autograd(loop, goals, z0.numpy())
    environment = motornet.environment.Environment(effector, max_ep_duration=1.0).double()
    environment.reset(options={"joint_state": joints.float(), "batch_size": 2})
    effector.states = {name: value.double() for name, value in effector.states.items()}
    h = torch.zeros(1, 2, UNITS).double()
    for k in range(STEPS):
        seen = torch.cat([torch.tensor(goals[:, k]), environment.get_vision(), environment.get_proprioception()], -1)
        u, h = policy(seen, h)
        effector.step(u)
        expected = torch.cat([effector.states["joint"], effector.states["muscle"].flatten(1), h[0]], -1)
        torch.testing.assert_close(flow.solution.state[:, k], expected, rtol=1e-6, atol=1e-6)
    assert plant.state_names[4:6] == ("pectoralis_activation", "deltoid_activation") and not flow.untraced
    with pytest.raises(ValueError, match=r"joints are \(2, 3\), expected \[trial, 2\] positions"):
        plant.start(torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"expected one of motornet\.effector"):
        MotorNetPlant(nn.Linear(2, 2))
