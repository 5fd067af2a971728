"""Policies as stable-baselines3 and CleanRL leave them: the same episodes as their own, and their derivatives."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kpflow_dyn as kp
from kpflow_dyn import gym
from kpflow_dyn.models import ClosedLoop, DoubleIntegrator, to_jax

pytest.importorskip("gymnasium")
pytestmark = pytest.mark.usefixtures("x64")

CART, PENDULUM = "CartPole-v1", "Pendulum-v1"
SIZES = {CART: (4, 2), PENDULUM: (3, 1)}


def mlp(sizes: tuple[int, ...], phi: type[nn.Module], last: type[nn.Module] | None = None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), phi()]
    return nn.Sequential(*layers[:-1], *([last()] if last else []))


# Networks with the names and the forward passes of the two libraries, and what their `predict` gives


class SB3PPO(nn.Module):
    """stable-baselines3's ActorCriticPolicy, of PPO and A2C."""

    def __init__(self, env: str, phi: type[nn.Module] = nn.Tanh) -> None:
        super().__init__()
        seen, actions = SIZES[env]
        self.mlp_extractor = nn.Module()
        self.mlp_extractor.policy_net = nn.Sequential(nn.Linear(seen, 8), phi(), nn.Linear(8, 8), phi())
        self.mlp_extractor.value_net = nn.Sequential(nn.Linear(seen, 8), phi())
        self.action_net, self.value_net = nn.Linear(8, actions), nn.Linear(8, 1)
        if env == PENDULUM:
            self.log_std = nn.Parameter(torch.zeros(1))

    def act(self, seen: Tensor) -> Any:
        out = self.action_net(self.mlp_extractor.policy_net(seen))
        return out.clamp(-2, 2) if hasattr(self, "log_std") else out.argmax(-1)


class SB3DQN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_net, self.q_net_target = nn.Module(), nn.Module()
        self.q_net.q_net, self.q_net_target.q_net = mlp((4, 8, 2), nn.ReLU), mlp((4, 8, 2), nn.ReLU)

    def act(self, seen: Tensor) -> Any:
        return self.q_net.q_net(seen).argmax(-1)


class SB3SAC(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = nn.Module(), nn.Module()
        self.actor.latent_pi, self.actor.mu = nn.Sequential(nn.Linear(3, 8), nn.ReLU()), nn.Linear(8, 1)
        self.actor.log_std, self.critic.qf0 = nn.Linear(8, 1), mlp((4, 8, 1), nn.ReLU)

    def act(self, seen: Tensor) -> Any:
        return 2 * torch.tanh(self.actor.mu(self.actor.latent_pi(seen)))


class SB3TD3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.actor, self.actor_target = nn.Module(), nn.Module()
        self.actor.mu, self.actor_target.mu = mlp((3, 8, 1), nn.ReLU, nn.Tanh), mlp((3, 8, 1), nn.ReLU, nn.Tanh)

    def act(self, seen: Tensor) -> Any:
        return 2 * self.actor.mu(seen)


class CleanPPO(nn.Module):
    """CleanRL's Agent of ppo.py."""

    def __init__(self) -> None:
        super().__init__()
        self.critic, self.actor = mlp((4, 8, 1), nn.Tanh), mlp((4, 8, 8, 2), nn.Tanh)

    def act(self, seen: Tensor) -> Any:
        return self.actor(seen).argmax(-1)


class CleanPPOContinuous(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.critic, self.actor_mean = mlp((3, 8, 1), nn.Tanh), mlp((3, 8, 1), nn.Tanh)
        self.actor_logstd = nn.Parameter(torch.zeros(1, 1))

    def act(self, seen: Tensor) -> Any:
        return self.actor_mean(seen).clamp(-2, 2)


class CleanDQN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = mlp((4, 8, 8, 2), nn.ReLU)

    def forward(self, seen: Tensor) -> Tensor:
        return self.network(seen)

    def act(self, seen: Tensor) -> Any:
        return self(seen).argmax(-1)


class CleanActor(nn.Module):
    """CleanRL's Actor of td3_continuous_action.py, and with `log_std` of sac_continuous_action.py."""

    def __init__(self, last: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.last = nn.Linear(3, 8), nn.Linear(8, 8), last
        setattr(self, last, nn.Linear(8, 1))
        if last == "fc_mean":
            self.fc_logstd = nn.Linear(8, 1)
        self.register_buffer("action_scale", torch.tensor([2.0]))
        self.register_buffer("action_bias", torch.tensor([0.0]))

    def act(self, seen: Tensor) -> Any:
        h = functional.relu(self.fc2(functional.relu(self.fc1(seen))))
        return torch.tanh(getattr(self, self.last)(h)) * self.action_scale + self.action_bias


NETWORKS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "SB3 PPO": (lambda: SB3PPO(CART), CART, "logits"),
    "SB3 PPO, continuous": (lambda: SB3PPO(PENDULUM), PENDULUM, "mean"),
    "SB3 DQN": (SB3DQN, CART, "logits"),
    "SB3 SAC": (SB3SAC, PENDULUM, "tanh"),
    "SB3 TD3": (SB3TD3, PENDULUM, "scaled"),
    "CleanRL PPO": (CleanPPO, CART, "logits"),
    "CleanRL PPO, continuous": (CleanPPOContinuous, PENDULUM, "mean"),
    "CleanRL DQN": (CleanDQN, CART, "logits"),
    "CleanRL SAC": (lambda: CleanActor("fc_mean"), PENDULUM, "tanh"),
    "CleanRL TD3": (lambda: CleanActor("fc_mu"), PENDULUM, "tanh"),
}


def own_episodes(act: Callable[[np.ndarray], Any], env: str, steps: int, episodes: int = 2) -> list[np.ndarray]:
    """The observations [time, entry] of a policy's own episodes in gymnasium."""
    import gymnasium

    world, runs = gymnasium.make(env, max_episode_steps=steps), []
    for seed in range(episodes):
        seen, over, run = world.reset(seed=seed)[0], False, []
        while not over:
            run.append(seen)
            seen, _, failed, late, _ = world.step(act(seen))
            over = failed or late
        runs.append(np.array(run))
    return runs


def assert_same_episodes(made: Any, env: str, act: Callable[[np.ndarray], Any]) -> None:
    found, runs = gym.rollout(made, env, episodes=2, max_steps=40), own_episodes(act, env, 40)
    seen_of = made.head.env.observation
    assert found.lengths.tolist() == [len(run) for run in runs]
    for states, run in zip(found.states.values, runs, strict=True):
        np.testing.assert_allclose(seen_of(states[: len(run)]), run, rtol=0, atol=1e-5)


def numpy_act(net: Any) -> Callable[[np.ndarray], Any]:
    @torch.no_grad()
    def act(seen: np.ndarray) -> Any:
        found = net.act(torch.tensor(seen)[None])[0].numpy()
        return int(found) if found.ndim == 0 else found

    return act


@pytest.mark.parametrize("name", NETWORKS)
def test_episodes_are_those_of_the_library(name: str, tmp_path: Path) -> None:
    """Of the network itself, and of its state dict in a file."""
    build, env, head = NETWORKS[name]
    net = build()
    made = gym.policy(net, env)
    assert made.head.kind == head and name.split(",")[0].split()[-1] in made.head.found
    torch.save(net.state_dict(), tmp_path / "net.pt")
    for given in (made, gym.policy(tmp_path / "net.pt", env)):
        assert_same_episodes(given, env, numpy_act(net))
    assert {name.split(".")[0] for name, _ in made.named_parameters()} == {"net"}


def test_a_file_of_stable_baselines_says_its_nonlinearity(tmp_path: Path) -> None:
    net, path, weights = SB3PPO(CART, nn.ELU), tmp_path / "ppo.zip", io.BytesIO()
    torch.save(net.state_dict(), weights)
    pickled = base64.b64encode(b"\x80\x04cos\nsystem\n.").decode()
    options = {":type:": "<class 'dict'>", ":serialized:": pickled, "activation_fn": f"{nn.ELU}"}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("policy.pth", weights.getvalue())
        file.writestr("data", json.dumps({"policy_kwargs": options}))
    made = gym.policy(path)
    assert "ELU as the file says" in made.head.found and "ELU" in str(made)
    assert_same_episodes(made, CART, numpy_act(net))


@pytest.mark.parametrize("name", ["PPO", "DQN", "SAC", "TD3"])
def test_stable_baselines_itself(name: str, tmp_path: Path) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    env = CART if name in ("PPO", "DQN") else PENDULUM
    model = getattr(sb3, name)("MlpPolicy", env, seed=0, device="cpu", policy_kwargs={"net_arch": [8, 8]})
    model.save(tmp_path / "model.zip")
    for given in (model, model.policy, tmp_path / "model.zip"):
        assert_same_episodes(gym.policy(given, env), env, lambda seen: model.predict(seen, deterministic=True)[0])


def test_derivatives_are_those_of_autograd() -> None:
    """A closed loop of the plant under a policy of logits, and under one that sees an angle's cosine and sine."""
    for build, env in ((lambda: SB3PPO(CART), CART), (SB3SAC, PENDULUM)):
        loop = ClosedLoop(gym.gym_plant(env), gym.policy(build(), env)).double()
        size = loop.plant.state_size
        start = 0.1 * torch.randn(2, size, dtype=torch.float64)
        sol = kp.solve(kp.ODEProblem(loop, start, np.linspace(0, 0.08, 5)), "euler")
        flow, parameters = kp.linearize(sol), dict(loop.named_parameters())

        def states(*values: Tensor, loop: Any = loop, start: Tensor = start, names: Any = parameters) -> Tensor:
            z, found, given = start, [start], dict(zip(names, values, strict=True))
            for _ in range(4):
                z = z + 0.02 * torch.func.functional_call(loop, given, (torch.tensor(0.0), z))
                found.append(z)
            return torch.stack(found, 1)

        parts = torch.autograd.functional.jacobian(states, tuple(parameters.values()))
        J = torch.cat([p.reshape(2 * 5 * size, -1) for p in parts], 1)
        found = flow.nodal.J.dense() if hasattr(flow, "nodal") else flow.J.dense()
        assert flow.untraced is None or flow.untraced == ""
        np.testing.assert_allclose(found.reshape(J.shape), J, atol=1e-8 * float(J.abs().max()))


@pytest.mark.parametrize(("env", "head"), [(CART, "logits"), (PENDULUM, "mean"), (PENDULUM, "tanh")])
def test_jax_is_torch(env: str, head: str) -> None:
    seen, actions = SIZES[env]
    net = mlp((seen, 8, actions), nn.Tanh).double()
    twin = eqx.nn.Sequential([to_jax(net[0]), eqx.nn.Lambda(jnp.tanh), to_jax(net[2])])
    made, other = (gym.policy(given, env, head) for given in (net, twin))
    z = np.random.default_rng(0).standard_normal((5, made.head.env.plant.state_size))
    expected = made(torch.tensor(z)).detach()
    np.testing.assert_allclose(jax.vmap(other)(z), expected, rtol=1e-12, atol=1e-12)
    runs = [gym.rollout(given, env, episodes=1, max_steps=20) for given in (made, other)]
    np.testing.assert_allclose(runs[1].states, runs[0].states, atol=1e-6)


def three_actions() -> gym.Environment:
    return gym.Environment(
        "Three-v0",
        DoubleIntegrator(),
        0.1,
        50,
        lambda seen, before: seen,
        lambda u: u,
        lambda u: int(u[0]) + 1,
        observation=lambda z: z,
        controls=[[-1.0], [0.0], [1.0]],
    )


def test_of_three_actions_rollouts_take_the_most_probable_one() -> None:
    from kpflow_dyn.gym._policies import greedy

    net = nn.Linear(2, 3).double()
    made, z = gym.policy(net, three_actions()), torch.randn(20, 2).double()
    p = torch.softmax(net(z), -1)
    torch.testing.assert_close(made(z)[:, 0], p[:, 2] - p[:, 0])
    torch.testing.assert_close(greedy(made)(z)[:, 0], (net(z).argmax(-1) - 1).double())
    twin = gym.policy(to_jax(net), three_actions())
    np.testing.assert_allclose(jax.vmap(greedy(twin))(z.numpy()), greedy(made)(z).detach())


def test_normalised_observations_and_references() -> None:
    mean, variance = np.array([0.1, -0.2, 0.0, 1.0]), np.array([1.0, 4.0, 0.25, 1.0])
    net, z = nn.Linear(5, 2).double(), torch.randn(6, 5).double()

    class Wrapper:
        epsilon, clip_obs = 1e-8, 1.0

        class obs_rms:
            pass

    Wrapper.obs_rms.mean, Wrapper.obs_rms.var = mean, variance  # type: ignore[attr-defined]
    made = [gym.policy(net, CART, normalize=given) for given in (Wrapper(), (mean, variance, 1.0))]
    seen = (z[:, [0, 2, 1, 3]].numpy() - mean) / np.sqrt(variance)
    expected = net(torch.cat([torch.tensor(seen).clamp(-1, 1), z[:, 4:]], -1))
    for policy in made:
        torch.testing.assert_close(policy(z)[:, 0], 10 * torch.tanh((expected[:, 1] - expected[:, 0]) / 2))


class WithLayers(SB3PPO):
    def __init__(self, name: str) -> None:
        super().__init__(CART)
        setattr(self, name, nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("net", "options", "error", "message"),
    [
        (nn.Linear(4, 2), {"head": "softmax"}, ValueError, "head is 'softmax', expected one of logits, mean, tanh"),
        (nn.Linear(4, 2), {"head": "mean"}, ValueError, "the actions of CartPole-v1 are discrete"),
        (SB3SAC(), {}, ValueError, "the head is 'tanh' .stable-baselines3 SAC.*CartPole-v1 are discrete"),
        (CleanPPO(), {"env": PENDULUM}, ValueError, "the actions of Pendulum-v1 are continuous"),
        (WithLayers("features_extractor"), {}, ValueError, "layers of its own .*features_extractor.weight"),
        (WithLayers("lstm_actor"), {}, ValueError, "layers of its own .*lstm_actor.weight"),
        (lambda z: z, {}, TypeError, "net is function, expected a torch module"),
        (nn.Linear(4, 2), {"normalize": 3.0}, ValueError, "expected .mean, variance."),
        (
            nn.Linear(4, 2),
            {"env": gym.Environment("Cart-v0", DoubleIntegrator(), 0.1, 50, lambda seen, z: seen, list, list)},
            ValueError,
            "Cart-v0 needs an observation",
        ),
    ],
)
def test_what_does_not_fit_is_said(net: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gym.policy(net, **options)


def test_other_files_and_widths_are_explained(tmp_path: Path) -> None:
    torch.save(nn.GRU(3, 4).state_dict(), tmp_path / "gru.pt")
    with pytest.raises(ValueError, match=r"holds no policy of .*stable-baselines3 PPO or A2C.*weight_ih_l0"):
        gym.policy(tmp_path / "gru.pt")
    with pytest.raises(ValueError, match="gives 3 numbers, expected 2, as CartPole-v1 has actions"):
        gym.policy(nn.Linear(4, 3))(torch.zeros(2, 4))
    with pytest.raises(FileNotFoundError):
        gym.policy(tmp_path / "none.zip")
