"""Policies in gymnasium: a step of each environment is a step of its plant, and the shipped controller balances."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load
from scipy.linalg import solve_continuous_are
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn import gym
from kpflow_dyn.models import CartPole, ClosedLoop, DoubleIntegrator, Pendulum, to_jax

pytest.importorskip("gymnasium")
pytestmark = pytest.mark.usefixtures("x64")

CART, PENDULUM = gym.gym_plant("CartPole-v1"), gym.gym_plant("Pendulum-v1")


def mlp(seed: int = 0, states: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(states, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def lqr(plant: Any) -> np.ndarray:
    """The gains [state] of the linear-quadratic regulator about the origin, with unit costs."""
    size, h = plant.state_size, 1e-5
    steps = h * np.eye(size + 1)
    slopes = [(plant(v[:size], v[size:]) - plant(-v[:size], -v[size:])) / (2 * h) for v in steps]
    A, B = np.split(np.array(slopes).T, [size], axis=1)
    return (B.T @ solve_continuous_are(A, B, np.eye(len(A)), np.eye(1)))[0]


def steps_of(found: gym.Episodes) -> list[tuple[np.ndarray, np.ndarray]]:
    """States [time, state] and controls [time, control] of each episode, without the NaN behind."""
    states, controls = found.states.values, found.controls.values
    return [(states[i, : n + 1], controls[i, :n]) for i, n in enumerate(found.lengths)]


def test_a_step_of_cartpole_is_an_euler_step_of_its_plant() -> None:
    found = gym.rollout(lambda z: np.array([np.sin(1e3 * z.sum())]), episodes=20, seed=3)
    for states, controls in steps_of(found):
        assert set(np.unique(controls)) <= {-10.0, 10.0}
        euler = states[:-1] + 0.02 * CART(states[:-1], controls)
        np.testing.assert_allclose(states[1:], euler, rtol=0, atol=1e-6)
    assert len(np.unique(found.controls.values[~np.isnan(found.controls.values)])) == 2


@pytest.mark.parametrize("gain", [1.5, 30.0])
def test_a_step_of_pendulum_is_a_semi_implicit_step_of_its_plant(gain: float) -> None:
    found = gym.rollout(lambda z: gain * np.sign(z[1:]), "Pendulum-v1", episodes=6, max_steps=120)
    for states, controls in steps_of(found):
        assert abs(controls).max() == min(gain, 2.0)
        velocity = np.clip(states[:-1, 1] + 0.05 * PENDULUM(states[:-1], controls)[:, 1], -8, 8)
        np.testing.assert_allclose(states[1:, 1], velocity, rtol=0, atol=3e-6)
        np.testing.assert_allclose(states[1:, 0], states[:-1, 0] + 0.05 * velocity, rtol=0, atol=1e-6)
    if gain > 2:  # energy is pumped in until the pendulum turns over
        assert abs(found.states.sel(state="angle")).max() > 2 * np.pi


def test_states_are_those_of_the_environment() -> None:
    """A step from a state that is set, not only from where episodes start; and its sign conventions."""
    import gymnasium

    rng = np.random.default_rng(0)
    cart = gymnasium.make("CartPole-v1", disable_env_checker=True)
    for action in (0, 1):
        cart.reset(seed=0)
        position, angle, velocity, spin = state = rng.uniform(-0.2, 0.2, 4)
        cart.unwrapped.state = (position, velocity, angle, spin)
        found = cart.step(action)[0][[0, 2, 1, 3]]
        np.testing.assert_allclose(found, state + 0.02 * CART(state, np.array([20.0 * action - 10])), atol=1e-6)
    pendulum = gymnasium.make("Pendulum-v1", disable_env_checker=True)
    pendulum.reset(seed=0)
    angle, velocity = pendulum.unwrapped.state = np.array([0.4, -1.0])
    cosine, sine, after = pendulum.step(np.array([1.3], np.float32))[0]
    expected = velocity + 0.05 * PENDULUM(np.array([angle, velocity]), np.array([1.3]))[1]
    assert after == pytest.approx(expected, abs=1e-6)
    assert np.arctan2(sine, cosine) == pytest.approx(angle + 0.05 * expected, abs=1e-6)


def test_returns_lengths_and_labels() -> None:
    found = gym.rollout(lambda z: np.ones(1), episodes=4, seed=2)
    assert found.terminated.all() and (found.returns == found.lengths).all() and found.lengths.max() < 20
    assert found.states.dims == ("episode", "time", "state") and found.controls.dims == ("episode", "time", "control")
    assert found.states.shape == (4, found.lengths.max() + 1, 4)
    np.testing.assert_allclose(found.states.time[:3], [0, 0.02, 0.04])
    assert (np.isfinite(found.states.values).all(2).sum(1) == found.lengths + 1).all()
    assert (np.isfinite(found.controls.values).all(2).sum(1) == found.lengths).all()
    again = gym.rollout(lambda z: np.ones(1), episodes=3, seed=3)
    np.testing.assert_array_equal(again.states[0, :5], found.states[1, :5])
    assert len(found.plot().axes) == 4


def test_pendulum_rewards_are_summed() -> None:
    found = gym.rollout(lambda z: np.zeros(1), "Pendulum-v1", episodes=2, max_steps=30)
    assert (found.lengths == 30).all() and not found.terminated.any()
    wrapped = (found.states.sel(state="angle") + np.pi) % (2 * np.pi) - np.pi
    cost = (wrapped**2 + 0.1 * found.states.sel(state="angular_velocity") ** 2).isel(time=slice(0, -1)).sum("time")
    np.testing.assert_allclose(found.returns, -cost, rtol=1e-5)


def test_a_linear_quadratic_regulator_of_our_plants_balances_in_gymnasium() -> None:
    gains = lqr(CART)
    assert (gym.rollout(lambda z: -gains @ z[:, None], episodes=3).lengths == 500).all()
    gains = lqr(PENDULUM)
    found = gym.rollout(lambda z: -gains @ z[:, None], "Pendulum-v1", episodes=12)
    upright = abs(found.states.sel(state="angle")[:, 0]) < 0.3  # elsewhere two newton metres are too weak
    assert upright.any() and (abs(found.states.sel(state="angle")[upright, -1]) < 1e-2).all()


def test_both_frameworks_and_loops_do_the_same() -> None:
    policy = mlp()
    found = [gym.rollout(given, episodes=2) for given in (policy, ClosedLoop(CartPole(), policy), to_jax(policy))]
    for other in found[1:]:
        np.testing.assert_array_equal(other.lengths, found[0].lengths)
        np.testing.assert_allclose(other.states, found[0].states, atol=1e-6)


def test_a_policy_of_float32_runs_in_float32() -> None:
    assert gym.rollout(mlp().float(), episodes=1).lengths > 0
    policy = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0), dtype=jnp.float32)
    assert gym.rollout(policy, "Pendulum-v1", episodes=1, max_steps=3).lengths == 3


def test_the_shipped_controller_balances_for_500_steps_in_20_of_20_episodes() -> None:
    file = files("kpflow_dyn").joinpath("data/cartpole.safetensors")
    assert len(file.read_bytes()) < 200_000
    policy = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    policy.load_state_dict(load(file.read_bytes()))
    found = gym.rollout(policy, "CartPole-v1", episodes=20, seed=0)
    assert (found.lengths == 500).all() and (found.returns == 500).all() and not found.terminated.any()


@pytest.mark.slow
def test_the_example_runs() -> None:
    path = Path(__file__).parents[1] / "examples" / "gym_cartpole.py"
    done = subprocess.run([sys.executable, path, "--quick"], capture_output=True, text=True, check=True)
    assert "After training: 500 to 500 steps of 500 in 20 episodes" in done.stdout


@pytest.mark.parametrize(
    ("policy", "options", "error", "message"),
    [
        (mlp(), {"env": "CartPole-v2"}, ValueError, r"unknown environment 'CartPole-v2'\. Nearest: CartPole-v1"),
        (mlp(states=3), {}, ValueError, "the policy does not take the 4 states of CartPole-v1"),
        (ClosedLoop(CartPole(), mlp(states=2)), {}, ValueError, "the policy does not take the 4 states"),
        (nn.Linear(4, 2).double(), {}, ValueError, r"the policy gave \(2,\), expected a control of the shape \(1,\)"),
        (
            ClosedLoop(Pendulum(), mlp(states=2)),
            {},
            ValueError,
            "plant is Pendulum.*CartPole-v1 is a CartPole",
        ),
        (
            ClosedLoop(DoubleIntegrator(), mlp(states=2)),
            {"env": "Pendulum-v1"},
            ValueError,
            "plant is DoubleIntegrator",
        ),
        (lambda z: np.full(1, np.nan), {}, ValueError, r"the policy gave \[nan\] at the state .* step 0 of seed 0"),
        (None, {}, TypeError, "policy is None, expected a torch or JAX module"),
        (nn.Linear, {}, TypeError, "expected a torch or JAX module"),
        (mlp(), {"episodes": 0}, ValueError, "episodes must be at least 1, got 0"),
        (mlp(), {"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
    ],
)
def test_bad_input_is_explained(policy: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gym.rollout(policy, **options)


def test_without_gymnasium_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'kpflow-dyn\[gym\]'"):
        kp.gym.rollout(mlp())
    assert kp.gym.gym_plant("CartPole-v1") == CartPole(gravity=9.8)


def test_the_module_is_found_without_gymnasium() -> None:
    code = (
        "import sys, kpflow_dyn as kp; kp.gym.gym_plant('Pendulum-v1')\n"
        "print({'gymnasium', 'torch', 'jax'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
