"""Policies as reinforcement learning leaves them: on observations, with logits, means or squashed actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, like_numpy
from kpflow_dyn._backend import backend_of
from kpflow_dyn._shown import type_name
from kpflow_dyn.gym._environments import Environment, environment_of

HEADS = ("logits", "mean", "tanh", "scaled")
GREEDY = "greedy"


@dataclass(frozen=True, eq=False)
class Head:
    """How an environment's observations and actions are those of a network.

    Attributes:
        env: the environment.
        kind: one of HEADS, or GREEDY.
        scale: (mean [entry], standard deviation [entry], clip) of observations, or None.
        found: what was found and what was guessed, in words.
    """

    env: Environment
    kind: str
    scale: tuple[np.ndarray, np.ndarray, float] | None
    found: str

    def observation(self, z: Array) -> Array:
        """What the network sees of [plant's state, reference]."""
        assert self.env.observation is not None
        size, xp = self.env.plant.state_size, array_namespace(z)
        seen = self.env.observation(z[..., :size])
        if self.scale is not None:
            mean, deviation, most = self.scale
            seen = (seen - like_numpy(mean, z)) / like_numpy(deviation, z)
            seen = xp.clip(seen, -most, most) if np.isfinite(most) else seen
        return seen if z.shape[-1] == size else xp.concat([seen, z[..., size:]], axis=-1)

    def control(self, out: Array) -> Array:
        """The control [..., control] of what the network gives [..., action]."""
        xp, env = array_namespace(out), self.env
        wanted = len(env.bounds[0] if env.controls is None else env.controls)  # type: ignore[index]
        if out.shape[-1] != wanted:
            raise ValueError(f"the network gives {out.shape[-1]} numbers, expected {wanted}, as {env.name} has actions")
        if env.controls is not None:
            controls = like_numpy(np.asarray(env.controls, float), out)
            if self.kind == GREEDY:
                return xp.take(controls, xp.argmax(out, axis=-1), axis=0)
            weights = xp.exp(out - xp.max(out, axis=-1, keepdims=True))
            return weights @ controls / xp.sum(weights, axis=-1, keepdims=True)
        assert env.bounds is not None
        low, high = (like_numpy(np.asarray(bound, float), out) for bound in env.bounds)
        if self.kind == "mean":
            return xp.minimum(xp.maximum(out, low), high)
        return low + ((xp.tanh(out) if self.kind == "tanh" else out) + 1) / 2 * (high - low)


def policy(net: Any, env: str | Environment = "CartPole-v1", head: str | None = None, normalize: Any = None) -> Any:
    """A policy on a plant's state, of a network on an environment's observations.

        u = head(net(observation(z)))

        logits   u = sum_a p_a u_a, p = softmax(net(...)), u_a the control of action a: the mean of the stochastic
                 policy; of two actions its sign is that of the most probable one. Values of actions (DQN) as well.
        mean     u = net(...), clipped to the bounds of the action: a Gaussian's mean
        tanh     u = low + (tanh(net(...)) + 1) (high - low) / 2
        scaled   u = low + (net(...) + 1) (high - low) / 2, of a network that ends with tanh

    Of discrete actions `rollout` takes the most probable one, of any number of them, as `predict(deterministic=True)`.

    Args:
        net: of stable-baselines3 PPO, A2C, DQN, SAC, TD3 or DDPG: the model, its policy, or its .zip file; an agent of
            CleanRL, its actor or Q-network, or a file of its state dict; or a torch module on [trial, observation], or
            a callable pytree of JAX on one observation. Files are read without unpickling; where they do not say the
            nonlinearity it is taken to be the library's own (tanh for PPO and A2C, relu otherwise). Modules are used
            as they are, not copied.
        env: "CartPole-v1", "Pendulum-v1", or an `Environment` that has an `observation`, and `controls` or `bounds`.
        head: "logits", "mean", "tanh" or "scaled"; found out when None. `policy.head.found` says how.
        normalize: of normalised observations, (mean, variance) or (mean, variance, clip), or the stable-baselines3
            VecNormalize or gymnasium NormalizeObservation itself.

    Returns:
        A torch nn.Module or an equinox module on [plant's state, reference], whose parameters begin with "net.": the
        policy of a `ClosedLoop`, and of `rollout`. Only what acts is in it, no critic and no standard deviation.

    Raises:
        TypeError: no network of torch or JAX.
        ValueError: an environment without what is needed, an unknown head, or one of the other kind of actions; a
            network with other layers before those that act, such as a CNN's; when called, one of another number of
            actions.
        FileNotFoundError: no such file.
    Source: Raffin et al., "Stable-Baselines3", JMLR 22 (2021); Huang et al., "CleanRL", JMLR 23 (2022).

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    >>> made = policy(net, "Pendulum-v1", head="tanh")
    >>> made(torch.zeros(5, 2)).shape
    torch.Size([5, 1])
    """
    known = environment_of(env)
    if known.observation is None or (known.controls is None) == (known.bounds is None):
        raise ValueError(f"{known.name} needs an observation, and controls (discrete actions) or bounds (others)")
    if head is not None and head not in HEADS:
        raise ValueError(f"head is {head!r}, expected one of {', '.join(HEADS)}, or None to find it out")
    acting, guess, found = _acting(net)
    backend = backend_of(acting)
    if backend is None or not callable(acting):
        raise TypeError(f"net is {type_name(net)}, expected a torch module, a callable pytree of JAX, or a file")
    kind = head or guess or ("mean" if known.controls is None else "logits")
    if (kind == "logits") == (known.controls is None):
        actions = "continuous" if known.controls is None else "discrete"
        raise ValueError(f"the head is {kind!r} ({found}), but the actions of {known.name} are {actions}")
    said = f"{found}; head {kind!r}, {'as asked for' if head else 'of this kind' if guess else 'by the actions'}"
    made = Head(known, kind, _scale(normalize), said)
    return import_module(f"kpflow_dyn.gym._{backend.name}_policy").Policy(acting, made)


def greedy(policy: Any) -> Any:
    """The policy that takes the most probable of discrete actions, where it is one of logits."""
    head = getattr(policy, "head", None)
    if not isinstance(head, Head) or head.kind != "logits":
        return policy
    return type(policy)(policy.net, replace(head, kind=GREEDY))


def _acting(net: Any) -> tuple[Any, str | None, str]:
    """The network that acts, its head if its library tells, and what was found."""
    inner = getattr(net, "policy", net) if not callable(net) else net
    backend = backend_of(inner)
    if isinstance(net, str | Path) or (backend is not None and backend.name == "torch"):
        from kpflow_dyn.gym._networks import acting_part

        return acting_part(inner)
    return inner, None, f"a {type(inner).__name__}"


def _scale(normalize: Any) -> tuple[np.ndarray, np.ndarray, float] | None:
    if normalize is None:
        return None
    epsilon = getattr(normalize, "epsilon", 1e-8)
    if (seen := getattr(normalize, "obs_rms", None)) is not None:
        normalize = seen.mean, seen.var, getattr(normalize, "clip_obs", np.inf)
    if not isinstance(normalize, Sequence) or len(normalize) not in (2, 3):
        raise ValueError(
            f"normalize is {normalize!r}, expected (mean, variance), (mean, variance, clip) or a wrapper's"
        )
    mean, variance, *clip = normalize
    return np.asarray(mean, float), np.sqrt(np.asarray(variance, float) + epsilon), float(*clip or [np.inf])
