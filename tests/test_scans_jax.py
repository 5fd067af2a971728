"""Scans inside of JAX networks: associative ones are one operation, and those of branches stay whole."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.tree_util import Partial
from synthetic import assert_close

import kpflow_dyn as kp
from kpflow_dyn._arrays.sooner_jax import _are_known
from kpflow_dyn._jax.associative import AssociativeScan, grouped

pytestmark = pytest.mark.usefixtures("x64")

TRIALS, TIMES, UNITS = 2, 7, 3
Parameters = dict[str, jax.Array]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(0.5 * np.random.default_rng(seed).standard_normal(shape))


def parameters() -> Parameters:
    return {"a": normal(UNITS), "W": normal(UNITS, UNITS, seed=1)}


def affine(first: tuple, second: tuple) -> tuple:
    return first[0] * second[0], second[0] * first[1] + second[1]


def diagonal(p: Parameters, x: jax.Array) -> jax.Array:
    """z_t = a z_{t-1} + W x_t."""
    driven = x @ p["W"].T
    return lax.associative_scan(affine, (jnp.broadcast_to(jnp.tanh(p["a"]), driven.shape), driven))[1]


def gated(p: Parameters, x: jax.Array) -> jax.Array:
    """z_t = (1 - f_t) z_{t-1} + f_t x_t and the product of all 1 - f, of two trials' layers one after the other."""
    gate = jax.nn.sigmoid(x @ p["W"].T)
    product, z = lax.associative_scan(affine, (1 - gate, gate * x))
    return lax.associative_scan(affine, (jnp.tanh(z), p["a"] * z))[1] + product


def matrices(p: Parameters, x: jax.Array) -> jax.Array:
    """Products of matrices, backward in time."""
    turned = jnp.eye(UNITS) + 0.3 * p["W"] * x[:, None]
    return lax.associative_scan(lambda a, b: b @ a, turned, reverse=True).reshape(TIMES, -1)


def along_the_second_axis(p: Parameters, x: jax.Array) -> jax.Array:
    """z_t = z_{t-1} + a W x_t with a weight inside of the function that combines, over the axis 1 of its elements."""
    change = jnp.stack([x @ p["W"].T, x])
    return lax.associative_scan(lambda a, b: a + b + p["a"] * a * b, change, axis=1).sum(0)


def mapped(p: Parameters, x: jax.Array) -> jax.Array:
    """The diagonal one for twice the units, by a map of it."""
    return jax.vmap(lambda scale: diagonal(p, scale * x), out_axes=1)(jnp.array([0.5, 2.0])).reshape(TIMES, -1)


def no_semigroup(p: Parameters, x: jax.Array) -> jax.Array:
    """What is combined hangs on the order: JAX's own tree is the model."""
    return lax.associative_scan(lambda a, b: p["a"] * a + 0.5 * b, x @ p["W"].T)


ASSOCIATIVE = {"diagonal": 1, "gated": 2, "matrices": 1, "along_the_second_axis": 1, "mapped": 1, "no_semigroup": 0}


def check(step: Callable, x: jax.Array) -> kp.Flow:
    """A network on the first road, whose J and J* are those of JAX."""
    problem = kp.StaticProblem(Partial(step, parameters()), x, state="", axes=("trial", "time", "unit"))
    flow = kp.linearize(kp.solve(problem))
    assert flow.untraced == ""
    value, pull = jax.vjp(lambda p: jax.vmap(lambda x: step(p, x))(x), parameters())
    q, theta = normal(*value.shape), normal(flow.J.domain.size)
    expected, found = pull(q)[0], flow.as_parameters(flow.J.T.mv(q))
    for name, gradient in expected.items():
        assert_close(found[f"[0]['{name}']"], gradient)
    assert_close(flow.solution.state, value)
    assert_close((flow.J.mv(theta) * q).sum(), (flow.J.T.mv(q) * theta).sum())
    return flow


@pytest.mark.parametrize("name", ASSOCIATIVE)
def test_an_associative_scan_is_one_operation(name: str) -> None:
    flow = check(globals()[name], normal(TRIALS, TIMES, UNITS, seed=2))
    names = [node.name for node in flow.solution.traced.graph.nodes]  # type: ignore[attr-defined]
    assert sum(name.startswith("associative_scan") for name in names) == ASSOCIATIVE[name]


@pytest.mark.parametrize("times", [2, 3, 8, 11])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_it_is_found_in_every_length_and_computed_as_a_loop_or_as_it_is(
    times: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = normal(times, UNITS), normal(times, UNITS, seed=1)
    jaxpr = jax.make_jaxpr(lambda a, b: lax.associative_scan(affine, (a, b)))(a, b)
    (scan,) = grouped(jaxpr.jaxpr)
    assert isinstance(scan, AssociativeScan)
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    for found, expected in zip(scan(a, b), lax.associative_scan(affine, (a, b)), strict=True):
        assert_close(found, expected)


def of_branches(p: Parameters, x: jax.Array) -> jax.Array:
    """A loop of at most 64 steps, as libraries of solvers write it."""

    def step(z: jax.Array, n: jax.Array) -> tuple[jax.Array, None]:
        return lax.cond(n < 3, lambda z: jnp.tanh(p["W"] @ z + p["a"]), lambda z: z, z), None

    return lax.scan(step, x, jnp.arange(64))[0]


def test_a_reverse_mode_within_the_network_is_traced() -> None:
    def net(p: Parameters, x: jax.Array) -> jax.Array:
        def energy(u: jax.Array) -> jax.Array:
            return (lax.associative_scan(affine, (jax.nn.sigmoid(u), u))[1] ** 2).sum()

        return jax.grad(energy)(jnp.tanh(x @ p["W"].T + p["a"]))

    p, x = parameters(), normal(TRIALS, TIMES, UNITS, seed=2)
    flow = kp.linearize(kp.solve(kp.StaticProblem(Partial(net, p), x, state="")))
    assert not flow.untraced
    found = jax.jacrev(lambda p: jax.vmap(lambda row: net(p, row))(x).reshape(-1))(p)
    J = np.concatenate([np.asarray(found[name]).reshape(found[name].shape[0], -1) for name in found], 1)
    assert_close(flow.ntk.dense(), J @ J.T)


def test_a_scan_whose_weights_are_in_branches_alone_stays_whole() -> None:
    flow = kp.linearize(kp.solve(kp.StaticProblem(Partial(of_branches, parameters()), normal(TRIALS, UNITS), state="")))
    assert flow.untraced == ""
    assert {site.kind for site in flow.sites} == {"opaque"}
    assert len(flow.solution.traced.graph.nodes) < 20  # type: ignore[attr-defined]
    pull = jax.vjp(lambda p: jax.vmap(lambda x: of_branches(p, x))(normal(TRIALS, UNITS)), parameters())[1]
    q = normal(TRIALS, UNITS, seed=5)
    found = flow.as_parameters(flow.J.T.mv(q))
    for name, gradient in pull(q)[0].items():
        assert_close(found[f"[0]['{name}']"], gradient)


def test_options_that_xla_does_not_have_are_left_out() -> None:
    assert not _are_known({"xla_of_another_version": 1})
