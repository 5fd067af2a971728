"""The outputs of named parts of a JAX network: heard, and changed as they arise.

A part whose output should be heard gives it a name that stands in the network's jaxpr, which is then evaluated step by
step. So a part may be mapped over tokens by `jax.vmap`, or called in a `jax.lax.scan`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal, jaxprs_in_params

from kpflow_dyn._arrays.complex_numbers import in_halves, is_complex, of_halves
from kpflow_dyn._implicit.layout import unit_axis
from kpflow_dyn._jax.equations import CALLS, Equation, Jaxpr, body, opened, scan_sizes

Change = Callable[[int, jax.Array], tuple[jax.Array, jax.Array]]  # (number, value) -> what is kept, what goes on


def watched(net: Any, x: jax.Array, names: Sequence[str], change: Change) -> list[tuple[str, jax.Array]]:
    """The outputs of these parts by name, one for each call, in their order; "" is the network's own, the last."""
    found: list[tuple[str, jax.Array]] = []

    def hear(name: str, value: jax.Array) -> jax.Array:
        if name not in names:
            return value
        kept, onward = change(len(found), value)
        found.append((name, kept))
        return onward

    if inner := [name for name in names if name]:
        (out,) = _evaluated(jax.make_jaxpr(lambda x: _first(with_names(net, inner)(x)))(x), [x], hear)
    else:
        out = _first(net(x))
    if "" in names:
        hear("", halves_of_value(out))
    return found


def halves_of_value(value: jax.Array) -> jax.Array:
    """A complex value with its real and imaginary parts side by side on the axis of units."""
    return in_halves(value.reshape(value.shape or (1,)), unit_axis(value.shape)) if is_complex(value) else value


class _Named(eqx.Module):
    """A part whose outputs carry its name."""

    module: Any
    name: str = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.module(*args, **kwargs)
        leaves, tree = jax.tree.flatten(out)
        named = checkpoint_name(halves_of_value(leaves[0]), self.name)
        if is_complex(leaves[0]):
            named = of_halves(named, unit_axis(leaves[0].shape)).reshape(leaves[0].shape)
        return jax.tree.unflatten(tree, [named, *leaves[1:]])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def with_names(net: Any, names: Sequence[str]) -> Any:
    """The network in which the outputs of these parts carry their names."""
    found = set()

    def wrap(path: tuple, part: Any) -> Any:
        if (name := path_of(path)) not in names:
            return part
        found.add(name)
        return _Named(part, name)

    net = jax.tree_util.tree_map_with_path(
        wrap, net, is_leaf=lambda path, _part: path_of(path) in names, is_leaf_takes_path=True
    )
    if unknown := [name for name in names if name not in found]:
        raise ValueError(
            f"unknown modules {unknown}; name parts of the network as in its parameters, such as layers[0]"
        )
    return net


def path_of(path: tuple) -> str:
    """The name of a part, or of a parameter."""
    return jax.tree_util.keystr(path).removeprefix(".")


def _first(out: Any) -> jax.Array:
    return jax.tree.leaves(out)[0]


def _evaluated(closed: Jaxpr, args: Sequence[Any], hear: Callable[[str, Any], Any]) -> list[Any]:
    """The results of a jaxpr; what `hear` gives for a named value goes on in its place."""
    jaxpr = opened(closed)
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*getattr(closed, "consts", ()), *args], strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else env[var]

    for equation in jaxpr.eqns:
        env.update(zip(equation.outvars, _results(equation, list(map(read, equation.invars)), hear), strict=True))
    return [read(var) for var in jaxpr.outvars]


def _results(equation: Equation, args: list[Any], hear: Callable[[str, Any], Any]) -> Sequence[Any]:
    primitive = equation.primitive
    if primitive.name == "name":
        return [hear(equation.params["name"], args[0])]
    if not any(_names_in(equation)):
        out = primitive.bind(*args, **primitive.get_bind_params(equation.params))
        return out if primitive.multiple_results else [out]
    if primitive.name in CALLS:
        return _evaluated(body(equation), args, hear)
    if primitive.name == "scan":
        return _unrolled(equation, args, hear)
    raise ValueError(
        f"{', '.join(set(_names_in(equation)))} is called inside of {primitive.name}, where its outputs are no values "
        "of the network; name another part"
    )


def _unrolled(equation: Equation, args: list[Any], hear: Callable[[str, Any], Any]) -> list[Any]:
    """A scan, step by step."""
    fixed, carries = scan_sizes(equation)
    consts, carry, xs = args[:fixed], args[fixed : fixed + carries], args[fixed + carries :]
    times = range(equation.params["length"])
    order = slice(None, None, -1 if equation.params["reverse"] else 1)
    rows = []
    for time in times[order]:
        results = _evaluated(body(equation), [*consts, *carry, *(x[time] for x in xs)], hear)
        carry = results[:carries]
        rows.append(results[carries:])
    return [*carry, *(jnp.stack(column) for column in zip(*rows[order], strict=True))]


def _names_in(equation: Equation) -> Iterator[str]:
    """The names of values inside of what an equation calls."""
    for called in jaxprs_in_params(equation.params):
        for inner in opened(called).eqns:
            if inner.primitive.name == "name":
                yield inner.params["name"]
            yield from _names_in(inner)
