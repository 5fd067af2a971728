"""Trace JAX models that are no steps: networks, fixed points and free-form constraints."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kpflow_dyn._backend import BACKENDS
from kpflow_dyn._implicit.constraint import Form, TracedConstraint, network_of
from kpflow_dyn._jax.cells import initial_state
from kpflow_dyn._jax.checks import check_parameters, named_parameters, with_parameters
from kpflow_dyn._jax.trace import trace_rows
from kpflow_dyn._problems.problems import FixedPointProblem, ImplicitProblem, StaticProblem
from kpflow_dyn.tracing._graph import Role

Values = dict[str, jax.Array]

TRANSFORMS = BACKENDS["jax"].transforms


def network(problem: StaticProblem) -> TracedConstraint:
    """A feed-forward network on one trial."""
    net, x, names = problem.net, problem.x, problem.state
    known, _like = _check(net, x)

    def call(values: Values, x: jax.Array) -> jax.Array:
        return _first(_watched(with_parameters(net, values), [name for name in names or () if name])(x))

    graph = trace_rows(call, known, (Role.INPUT, x[0]))
    named = {**graph.named, "": [graph.output]}
    parts = None if names is None else [(name, node) for name in names for node in named.get(name, [])]
    return network_of(graph, known, TRANSFORMS, x, parts, lambda shape: shape)


def fixed_point(problem: FixedPointProblem, swapped: bool) -> TracedConstraint:
    """A map f(x, z) -> z on one trial."""
    f, x = problem.f, problem.x
    known, like = _check(f, x)
    z0 = initial_state([getattr(f, "hidden_size", None)], like, problem.z0)

    def call(values: Values, x: jax.Array, z: jax.Array) -> jax.Array:
        model: Any = with_parameters(f, values)
        return model(z, x) if swapped else model(x, z)

    try:
        graph = trace_rows(call, known, (Role.INPUT, x[0]), (Role.STATE, z0[0]))
    except (TypeError, IndexError) as error:
        raise ValueError(
            f"f failed on x {x.shape[1:]} and z {z0.shape[1:]}: {error}; it is called as f(x, z), or as f(z, x) where "
            "its parameters are called z and x"
        ) from error
    return TracedConstraint(graph, Form.FIXED_POINT, [graph.output], None, TRANSFORMS, known, [x], z0)


def free_form(problem: ImplicitProblem) -> TracedConstraint:
    """F(S, params, x) on the whole state."""
    leaves, tree = jax.tree.flatten_with_path(problem.params)
    known = {_path(path): jnp.asarray(leaf) for path, leaf in leaves if eqx.is_inexact_array_like(leaf)}
    if not known:
        raise TypeError("params holds no floating-point arrays: nothing can learn")
    x = [] if problem.x is None else [jnp.asarray(problem.x)]

    def call(values: Values, state: jax.Array, *x: jax.Array) -> jax.Array:
        named = [values.get(_path(path), leaf) for path, leaf in leaves]
        return problem.F(state, jax.tree.unflatten(tree, named), *x)

    graph = trace_rows(call, known, (Role.STATE, problem.state), *((Role.INPUT, value) for value in x))
    return TracedConstraint(graph, Form.FREE, [graph.output], None, TRANSFORMS, known, x, problem.state)


class _Watched(eqx.Module):
    """A submodule whose outputs carry its name."""

    module: Any
    name: str = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.module(*args, **kwargs)
        leaves, tree = jax.tree.flatten(out)
        return jax.tree.unflatten(tree, [checkpoint_name(leaves[0], self.name), *leaves[1:]])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def _watched(net: Any, names: Sequence[str]) -> Any:
    """The network with these submodules watched."""
    found = set()

    def wrap(path: tuple, part: Any) -> Any:
        if (name := _path(path)) not in names:
            return part
        found.add(name)
        return _Watched(part, name)

    net = jax.tree_util.tree_map_with_path(
        wrap, net, is_leaf=lambda path, _part: _path(path) in names, is_leaf_takes_path=True
    )
    if unknown := [name for name in names if name not in found]:
        raise ValueError(
            f"unknown modules {unknown}; name parts of the network as in its parameters, such as layers[0]"
        )
    return net


def _path(path: tuple) -> str:
    return jax.tree_util.keystr(path).removeprefix(".")


def _first(out: Any) -> jax.Array:
    return jax.tree.leaves(out)[0]


def _check(model: Any, x: jax.Array) -> tuple[Values, jax.Array]:
    """The model's parameters; and x, or where it holds integers one like it in their dtype."""
    known = named_parameters(model)
    like = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(next(iter(known.values())).dtype)
    check_parameters(model, like)
    return known, like
