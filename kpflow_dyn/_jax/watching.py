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
from kpflow_dyn._implicit.results import Value, replaced, taken
from kpflow_dyn._jax.equations import CALLS, Equation, Jaxpr, body, opened, scan_sizes
from kpflow_dyn._problems.arguments import Arguments

Change = Callable[[int, jax.Array], tuple[jax.Array, jax.Array]]  # (number, value) -> what is kept, what goes on


def watched(
    net: Any, given: Arguments, rows: Sequence[jax.Array], values: Sequence[Value], change: Change
) -> list[tuple[str, jax.Array]]:
    """These values of a call by name, one for each call of their part, in their order; the network's own come last.

    Args:
        rows: those of one trial.
    """
    found: list[tuple[str, jax.Array]] = []
    inner, own = ([value.name for value in values if bool(value.module) is within] for within in (True, False))

    def hear(name: str, value: jax.Array) -> jax.Array:
        if name not in inner:
            return value
        kept, onward = change(len(found), value)
        found.append((name, kept))
        return onward

    def outputs(*rows: jax.Array) -> list[jax.Array]:
        return results(net, given, rows, values)

    outs = _evaluated(jax.make_jaxpr(outputs)(*rows), rows, hear) if inner else outputs(*rows)
    for name, out in zip(own, outs, strict=True):
        found.append((name, change(len(found), out)[0]))
    return found


def results(net: Any, given: Arguments, rows: Sequence[jax.Array], values: Sequence[Value]) -> list[jax.Array]:
    """Those of these values that the network itself gives; those of its parts carry their names."""
    args, kwargs = given.filled(rows)
    out = with_names(net, values)(*args, **kwargs)
    own = [_halves(value.of(out), value) for value in values if not value.module]
    return own if len(own) == 1 else [value + 0 for value in own]  # none of which is on the way to another


def _halves(found: jax.Array, value: Value) -> jax.Array:
    """A complex value with its real and imaginary parts side by side on the axis of units."""
    return (
        in_halves(found.reshape(found.shape or (1,)), unit_axis(found.shape, value.axes))
        if is_complex(found)
        else found
    )


class _Named(eqx.Module):
    """A part whose outputs carry the names of these values."""

    module: Any
    values: tuple[Value, ...] = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.module(*args, **kwargs)
        for value in self.values:
            place = value.place(out)
            found = taken(out, place)
            named = checkpoint_name(_halves(found, value), value.name)
            if is_complex(found):
                named = of_halves(named, unit_axis(found.shape, value.axes)).reshape(found.shape)
            out = replaced(out, place, named)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def with_names(net: Any, values: Sequence[Value]) -> Any:
    """The network in which these values of its parts carry their names."""
    parts = {value.module for value in values if value.module}

    def wrap(path: tuple, part: Any) -> Any:
        these = tuple(value for value in values if value.module and value.module == path_of(path))
        return _Named(part, these) if these else part

    return jax.tree_util.tree_map_with_path(
        wrap, net, is_leaf=lambda path, _part: path_of(path) in parts, is_leaf_takes_path=True
    )


def parts_of(net: Any) -> list[str]:
    """The names of the parts of a network that can be called."""
    found: list[str] = []

    def look(path: tuple, part: Any) -> bool:
        if path and callable(part):
            found.append(path_of(path))
        return False

    jax.tree_util.tree_map_with_path(lambda _path, part: part, net, is_leaf=look, is_leaf_takes_path=True)
    return found


def path_of(path: tuple) -> str:
    """The name of a part, or of a parameter."""
    return jax.tree_util.keystr(path).removeprefix(".")


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
