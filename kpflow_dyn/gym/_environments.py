"""gymnasium's environments in the words of their plants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace
from kpflow_dyn.models._plants import CartPole, Pendulum, Plant
from kpflow_dyn.tasks._data import nearest


def gym_plant(env: str) -> Plant:
    """The plant z' = plant(z, u) of `kpflow_dyn.models` with the constants of an environment.

    Args:
        env: "CartPole-v1" or "Pendulum-v1".

    Raises:
        ValueError: another environment.
    Source: gymnasium, "CartPole" and "Pendulum" of Classic Control, Towers et al., arXiv 2407.17032.

    >>> gym_plant("CartPole-v1")
    CartPole(cart_mass=1.0, pole_mass=0.1, half_length=0.5, gravity=9.8, cart_damping=0.0, pole_damping=0.0)
    """
    return environment_of(env).plant


@dataclass(frozen=True)
class Environment:
    """An environment in the words of its plant; `rollout` takes one of yours where it takes a name.

    Attributes:
        name: as gymnasium has it registered.
        plant: with the environment's constants; it says its `state_size`, `control_size` and `state_names`.
        dt: seconds between two steps.
        steps: how many an episode has at most.
        state: (observation, state before it or None) -> the plant's state.
        applied: control of a policy -> the control that the environment applies.
        action: applied control -> action.
        observation: the plant's state [..., state] -> the observation [..., entry], the inverse of `state`, made of
            functions that torch, JAX and numpy share (`array_api_compat.array_namespace(z)`); `policy` needs it.
        controls: of discrete actions, the control of each [action, control]; None where actions are continuous.
        bounds: of continuous actions, which are the control itself, the lowest and the highest [control]; or None.

    >>> from kpflow_dyn.models import DoubleIntegrator
    >>> push = lambda u: u.clip(-1, 1)
    >>> Environment("Cart-v0", DoubleIntegrator(), 0.1, 50, lambda seen, before: seen, push, list).steps
    50
    """

    name: str
    plant: Any
    dt: float
    steps: int
    state: Callable[[np.ndarray, np.ndarray | None], np.ndarray]
    applied: Callable[[np.ndarray], np.ndarray]
    action: Callable[[np.ndarray], Any]
    observation: Callable[[Array], Array] | None = None
    controls: Sequence[Sequence[float]] | None = None
    bounds: tuple[Sequence[float], Sequence[float]] | None = None


def _cart_seen(z: Array) -> Array:
    return array_namespace(z).stack([z[..., i] for i in (0, 2, 1, 3)], axis=-1)


def _pendulum_seen(z: Array) -> Array:
    xp = array_namespace(z)
    return xp.stack([xp.cos(z[..., 0]), xp.sin(z[..., 0]), z[..., 1]], axis=-1)


def _pendulum_state(observation: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    cosine, sine, velocity = observation
    angle = math.atan2(sine, cosine)
    turns = 0 if before is None else round((before[0] - angle) / (2 * math.pi))
    return np.array([angle + 2 * math.pi * turns, velocity])


ENVIRONMENTS = {
    "CartPole-v1": Environment(
        name="CartPole-v1",
        plant=CartPole(gravity=9.8),
        dt=0.02,
        steps=500,
        state=lambda observation, before: observation[[0, 2, 1, 3]],
        applied=lambda u: np.where(u > 0, 10.0, -10.0),
        action=lambda u: int(u[0] > 0),
        observation=_cart_seen,
        controls=((-10.0,), (10.0,)),
    ),
    "Pendulum-v1": Environment(
        name="Pendulum-v1",
        plant=Pendulum(mass=0.75, length=2 / 3, gravity=10.0),
        dt=0.05,
        steps=200,
        state=_pendulum_state,
        applied=lambda u: np.clip(u, -2.0, 2.0),
        action=lambda u: u.astype(np.float32),
        observation=_pendulum_seen,
        bounds=((-2.0,), (2.0,)),
    ),
}


def environment_of(env: str | Environment) -> Environment:
    """An environment, or that of a name."""
    if isinstance(env, Environment):
        return env
    if env not in ENVIRONMENTS:
        near, known = nearest(str(env), list(ENVIRONMENTS)), ", ".join(ENVIRONMENTS)
        raise ValueError(f"unknown environment {env!r}.{near} Known: {known}.")
    return ENVIRONMENTS[env]
