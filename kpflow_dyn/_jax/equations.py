"""One equation of a jaxpr: what kind of operation it is, and the functions that the nodes of a graph apply."""

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal, jaxpr_as_fun, jaxprs_in_params

from kpflow_dyn._jax.custom import Function, is_floating, same_derivative, with_forward_mode
from kpflow_dyn.tracing._graph import Role
from kpflow_dyn.tracing._rules import rule_of

Equation = Any  # jax.extend.core.JaxprEqn, whose variables' types a type checker does not know
Jaxpr = Any  # open or closed: one class from jax 0.11 on, two before

CALLS = {"jit", "pjit", "call", "custom_vmap_call", "core_call", "closed_call", "remat", "remat2", "checkpoint"}
CUSTOM = {"custom_jvp_call", "custom_vjp_call"}
WHOLE = {"cond", "while"}
PRINTS = {"debug_callback", "debug_print"}
CALLBACKS = {"io_callback", "pure_callback"}
COPIES = {"copy", "copy_p", "device_put", "name", "optimization_barrier", "sharding_constraint"}
MOVES = {
    *("reshape", "transpose", "broadcast_in_dim", "squeeze", "slice", "rev", "concatenate", "split", "stack"),
    *("unstack", "tile", "pad", "gather", "dynamic_slice", "dynamic_update_slice", "scatter"),
}
ADDS = {"add", "add_any"}
POINTWISE = {
    *("sub", "mul", "div", "rem", "pow", "integer_pow", "max", "min", "atan2", "nextafter", "select_n", "clamp"),
    *("neg", "abs", "sign", "floor", "ceil", "round", "square", "sqrt", "rsqrt", "cbrt", "convert_element_type"),
    *("exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "sinh", "cosh", "asinh", "acosh", "atanh"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "erf", "erfc", "erf_inv", "lgamma", "digamma", "reduce_precision"),
    *("igamma", "igammac", "polygamma", "zeta", "bessel_i0e", "bessel_i1e", "regularized_incomplete_beta"),
    *("complex", "real", "imag", "conj"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "is_finite"),
}


def body(equation: Equation) -> Jaxpr:
    """The jaxpr that an equation calls."""
    return next(equation.params[name] for name in ("jaxpr", "call_jaxpr", "call") if name in equation.params)


def custom_functions(jaxpr: Jaxpr) -> list[str]:
    """The functions with a reverse mode of their own that are called, in words."""
    found = {}
    for equation in opened(jaxpr).eqns:
        if equation.primitive.name.startswith("custom_vjp"):
            name = getattr(getattr(equation.params.get("call_jaxpr"), "jaxpr", None), "debug_info", None)
            found[f"the custom_vjp {getattr(name, 'func_name', '') or 'of the model'}"] = None
        for called in jaxprs_in_params(equation.params):
            found |= dict.fromkeys(custom_functions(called))
    return list(found)


def rounding_of(jaxpr: Jaxpr) -> float:
    """The round-off of the least precise numbers that are computed."""
    found = [0.0]
    for equation in opened(jaxpr).eqns:
        dtypes = [var.aval.dtype for var in equation.outvars]
        found += [float(jnp.finfo(dtype).eps) for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
        found += map(rounding_of, jaxprs_in_params(equation.params))
    return max(found)


def opened(jaxpr: Jaxpr) -> Jaxpr:
    """The jaxpr itself, whether or not it comes with its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def is_copy(equation: Equation) -> bool:
    """Whether the results are the operands, one by one."""
    operands, results = ([var.aval.dtype for var in side] for side in (equation.invars, equation.outvars))
    name = equation.primitive.name
    return name in COPIES or (name == "convert_element_type" and operands == results)


def is_pointwise(equation: Equation) -> bool:
    """Whether each element of the result depends on one element of each operand, up to broadcasting."""
    name, rule = equation.primitive.name, rule_of(equation.primitive)
    if rule is not None:
        return rule.role in (Role.POINTWISE, Role.ADD)
    if name in CALLS | CUSTOM:
        shapes = [var.aval.shape for var in [*equation.invars, *equation.outvars]]
        alike = all(shape in ((), shapes[-1]) for shape in shapes)
        return len(equation.outvars) == 1 and alike and all(map(is_pointwise, opened(body(equation)).eqns))
    return name in POINTWISE | ADDS or (name == "broadcast_in_dim" and not equation.invars[0].aval.shape)


def is_one_convolution(equation: Equation) -> bool:
    """Whether one kernel runs over all of its operand, without groups."""
    return equation.params["feature_group_count"] == equation.params["batch_group_count"] == 1


def as_convolution(equation: Equation) -> tuple[Any, list[Sequence[int]], list[Any], list[int]]:
    """A convolution that takes [batch, in, ...] and [out, in, ...] to [batch, out, ...], whatever its own order is.

    Its function, the order of the axes of each operand, the forms of operands and result, and how the axes of the
    result are ordered for the equation's own.
    """
    orders, avals = equation.params["dimension_numbers"], [var.aval for var in [*equation.invars, *equation.outvars]]
    straight = tuple(range(len(avals[0].shape)))
    params = equation.params | {"dimension_numbers": lax.ConvDimensionNumbers(straight, straight, straight)}
    forms = [jax.ShapeDtypeStruct(_sizes(aval, order), aval.dtype) for aval, order in zip(avals, orders, strict=True)]
    back = [orders.out_spec.index(axis) for axis in straight]
    return partial(equation.primitive.bind, **params), [orders.lhs_spec, orders.rhs_spec], forms, back


def derives_itself(equation: Equation) -> bool:
    """Whether a custom derivative is no other than the body's, which may then stand in its place."""
    every = range(len(equation.outvars))
    return same_derivative(
        lambda *args: _listed(bind(equation, every, *args)), jaxpr_as_fun(body(equation)), equation.invars
    )


def of_solvers(equation: Equation) -> list[int]:
    """Which arguments of a custom linear solve only its solvers take: JAX derives it by its matrix alone."""
    matrix, *others = equation.params["const_lengths"]
    avals = [var.aval for var in equation.invars]
    return [i for i in range(matrix, matrix + sum(others)) if is_floating(avals[i])]


def meets_openly(jaxpr: Jaxpr, weights: Sequence[bool]) -> bool:
    """Whether any of the inputs that are weights meets others outside of branches and loops, which stay whole."""
    jaxpr = opened(jaxpr)
    known = {var for var, weight in zip(jaxpr.invars, weights, strict=True) if weight}
    for equation in jaxpr.eqns:
        name, given = equation.primitive.name, [isinstance(v, Literal) or v in known for v in equation.invars]
        if all(given):
            known.update(equation.outvars)
        elif known.isdisjoint(v for v in equation.invars if not isinstance(v, Literal)) or name in WHOLE:
            continue
        elif name not in CALLS | CUSTOM | {"scan"} or meets_openly(body(equation), given):
            return True
    return False


def scan_sizes(equation: Equation) -> tuple[int, int]:
    """How many constants and carries a scan has; unlike these, what it sweeps over has an axis of its own outside."""
    inner = opened(body(equation))
    kept, carries = (
        sum(o.aval.shape == i.aval.shape for o, i in zip(outer, within, strict=True))
        for outer, within in ((equation.invars, inner.invars), (equation.outvars, inner.outvars))
    )
    return kept - carries, carries


def bind(equation: Equation, used: Sequence[int], *args: Any) -> Any:
    """The used results of an equation: a list, or the only one."""
    primitive = equation.primitive
    function = partial(primitive.bind, **primitive.get_bind_params(equation.params))
    if primitive.name == "custom_vjp_call":
        function = with_forward_mode(function, partial(plainly, body(equation)))
    return _choose(equation, used, function(*args))


def plainly(jaxpr: Jaxpr, *args: Any) -> list[Any]:
    """The results of a jaxpr without reverse modes of their own, within loops and branches too."""
    inner = opened(jaxpr)
    env = dict(zip([*inner.constvars, *inner.invars], [*getattr(jaxpr, "consts", ()), *args], strict=True))

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else env[var]

    for equation in inner.eqns:
        env.update(zip(equation.outvars, _plain(equation, *map(read, equation.invars)), strict=True))
    return list(map(read, inner.outvars))


def _plain(equation: Equation, *args: Any) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if not equation.outvars:
        return []
    if name in CALLS or name == "custom_vjp_call":
        return plainly(body(equation), *args)
    if name == "while":
        tests, steps = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        go_on = partial(plainly, params["cond_jaxpr"], *args[:tests])
        step = partial(plainly, params["body_jaxpr"], *args[tests:steps])
        return lax.while_loop(lambda carry: go_on(*carry)[0], lambda carry: step(*carry), list(args[steps:]))
    if name == "cond":
        return lax.switch(args[0], [partial(plainly, branch) for branch in params["branches"]], *args[1:])
    if name == "scan":
        fixed, carries = scan_sizes(equation)
        step = partial(plainly, body(equation), *args[:fixed])

        def one(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
            out = step(*carry, *row)
            return out[:carries], out[carries:]

        start, rows = list(args[fixed : fixed + carries]), list(args[fixed + carries :])
        carry, columns = lax.scan(one, start, rows, params["length"], params["reverse"])
        return [*carry, *columns]
    return _listed(bind(equation, range(len(equation.outvars)), *args))


def move(equation: Equation, used: Sequence[int], *args: Any) -> Any:
    """Copies of elements, or of their numbers: integers, where literals and fill values are 0, the number of none."""
    params = dict(equation.params)
    numbers = [arg for var, arg in zip(equation.invars, args, strict=True) if is_floating(var.aval) > is_floating(arg)]
    if numbers:
        args = tuple(numbers[0].dtype.type(0) if is_floating(arg) else arg for arg in args)
        params |= {"fill_value": 0} if "fill_value" in params else {}
    return _choose(equation, used, equation.primitive.bind(*args, **params))


def _choose(equation: Equation, used: Sequence[int], out: Any) -> Any:
    if not equation.primitive.multiple_results:
        return out
    return [out[i] for i in used] if len(used) > 1 else out[used[0]]


def side_by_side(apply: Function, which: Sequence[int], *args: Any) -> jax.Array:
    """These of the results of an operation as one vector."""
    out = apply(*args)
    return jnp.concatenate([out[i].reshape(-1) for i in which])


def part(where: slice, shape: Sequence[int], values: jax.Array) -> jax.Array:
    """Some elements of a vector as an array of their own."""
    return values[where].reshape(shape)


def _listed(out: Any) -> list[Any]:
    return out if isinstance(out, list) else [out]


def as_product(equation: Equation, mirrored: bool) -> tuple[Role, Any, list[list[int]], list[Any]]:
    """A dot_general as a product of matrices [b, r, d] x [b, d, m], or without a sum as an elementwise product.

    Its role and its function, the order of the axes of each operand, and the forms of operands and result.
    """
    sums, batches = equation.params["dimension_numbers"]
    left, right, out = (var.aval for var in [*equation.invars, *equation.outvars])
    free = [_others(aval, *axes) for aval, *axes in zip((left, right), sums, batches, strict=True)]
    batch, rows, columns = _sizes(left, batches[0]), _sizes(left, free[0]), _sizes(right, free[1])
    orders = [[*batches[0], *free[0], *sums[0]], [*batches[1], *sums[1], *free[1]]]
    if sums[0]:
        b, r, d, m = [prod(batch)] if batch else [], prod(rows), prod(_sizes(left, sums[0])), prod(columns)
        role, apply = Role.PRODUCT, partial(product, equation.params, mirrored)
        shapes = [*b, r, d], [*b, d, m], [*b, r, m]
    else:
        shapes = ([*batch, *rows, *(1 for _ in columns)], [*batch, *(1 for _ in rows), *columns], out.shape)
        role, apply = Role.POINTWISE, partial(multiply, out.dtype)
    forms = zip(shapes, (left, right, out), strict=True)
    return role, apply, orders, [jax.ShapeDtypeStruct(shape, aval.dtype) for shape, aval in forms]


def _others(aval: Any, *axes: Sequence[int]) -> list[int]:
    return [axis for axis in range(len(aval.shape)) if not any(axis in some for some in axes)]


def _sizes(aval: Any, axes: Sequence[int]) -> list[int]:
    return [aval.shape[axis] for axis in axes]


def arrange(order: Sequence[int], shape: Sequence[int], value: jax.Array) -> jax.Array:
    """Transpose and reshape."""
    return value.transpose(order).reshape(shape)


def row(number: int, value: jax.Array) -> jax.Array:
    """One row of an array."""
    return lax.index_in_dim(value, number, keepdims=False)


def stack(*rows: jax.Array) -> jax.Array:
    """An array of rows."""
    return jnp.stack(rows)


def multiply(dtype: Any, left: jax.Array, right: jax.Array) -> jax.Array:
    """left * right, broadcast."""
    return (left * right).astype(dtype)


def real_dtype(dtype: Any) -> Any:
    """That of the parts of complex numbers; another one, or None, as it is."""
    return jnp.finfo(dtype).dtype if dtype is not None and jnp.issubdtype(dtype, jnp.complexfloating) else dtype


def product(params: Mapping[str, Any], mirrored: bool, left: jax.Array, right: jax.Array) -> jax.Array:
    """left @ right, with or without a batch axis, as precise as the dot_general of these params.

    Mirrored it is computed as (right^T left^T)^T: many rows of `right` lie behind each other then, not side by side.
    """
    batch = tuple(range(left.ndim - 2))
    last, first = (left.ndim - 1,), (right.ndim - 2,)
    kept = {"precision": params["precision"], "preferred_element_type": params["preferred_element_type"]}
    if not jnp.issubdtype(left.dtype, jnp.complexfloating):
        kept["preferred_element_type"] = real_dtype(kept["preferred_element_type"])
    if mirrored:
        return lax.dot_general(right, left, ((first, last), (batch, batch)), **kept).swapaxes(-1, -2)
    return lax.dot_general(left, right, ((last, first), (batch, batch)), **kept)
