"""brax: the policies and critics of its training algorithms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from brax.training import networks
from jax.tree_util import Partial

import kpflow_dyn as kp

from ..member import Member

OBSERVED, ACTIONS = 5, 2


def double(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(jnp.float64), tree)


def of_observations(make: Callable[[], networks.FeedForwardNetwork]) -> Callable[[], kp.StaticProblem]:
    """A network of observations; None stands for the statistics that would scale them."""

    def problem() -> kp.StaticProblem:
        network, x = make(), jax.random.normal(jax.random.key(1), (4, OBSERVED))
        return kp.StaticProblem(Partial(network.apply, None, double(network.init(jax.random.key(0)))), x, state="")

    return problem


def critic() -> kp.StaticProblem:
    """Two critics of observations and actions."""
    network = networks.make_q_network(OBSERVED, ACTIONS, hidden_layer_sizes=(8, 8))
    x = jax.random.normal(jax.random.key(1), (4, OBSERVED)), jax.random.normal(jax.random.key(2), (4, ACTIONS))
    return kp.StaticProblem(Partial(network.apply, None, double(network.init(jax.random.key(0)))), x, state="")


MEMBERS = [
    Member(
        "brax: policy",
        "brax",
        of_observations(lambda: networks.make_policy_network(2 * ACTIONS, OBSERVED, hidden_layer_sizes=(8, 8))),
    ),
    Member(
        "brax: policy with layer norms",
        "brax",
        of_observations(
            lambda: networks.make_policy_network(2 * ACTIONS, OBSERVED, hidden_layer_sizes=(8, 8), layer_norm=True)
        ),
    ),
    Member(
        "brax: value", "brax", of_observations(lambda: networks.make_value_network(OBSERVED, hidden_layer_sizes=(8, 8)))
    ),
    Member("brax: critics", "brax", critic),
]
