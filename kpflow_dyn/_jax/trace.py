"""Trace a JAX step `step(parameters, x, z) -> z` to a `Graph` of one row, through its jaxpr."""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.errors import JAXIndexError, JAXTypeError
from jax.extend.core import ClosedJaxpr, DropVar, Literal, jaxprs_in_params

from kpflow_dyn._jax import equations
from kpflow_dyn._jax.associative import AssociativeScan, grouped
from kpflow_dyn._jax.complex_parts import form_of, kind_of
from kpflow_dyn._jax.custom import is_floating
from kpflow_dyn._jax.equations import Equation, Jaxpr, body, opened
from kpflow_dyn._jax.programs import constants_of
from kpflow_dyn.tracing._graph import Graph, Node, Role
from kpflow_dyn.tracing._pairs import Form, real_graph
from kpflow_dyn.tracing._rules import rule_of

Atom = Node | np.generic  # what stands for a value: a node, or the number of a literal
Step = Callable[..., Any]


def trace(step: Step, parameters: dict[str, jax.Array], x: jax.Array, z: jax.Array) -> Graph:
    """The graph of `step(parameters, x, z) -> z` for one row x [input] and z [unit]; raises as `trace_rows`."""
    return trace_rows(step, parameters, (Role.INPUT, x), (Role.STATE, z))


def trace_rows(step: Step, parameters: dict[str, jax.Array], *rows: tuple[Role, jax.Array]) -> Graph:
    """The functional graph of `step(parameters, *rows)`, whose result is like the row in the role of the state, if any.

    A ValueError where JAX cannot trace it, or it has side effects.
    """
    return graph_of(jaxpr_of(step, parameters, *rows), parameters, *rows)


def jaxpr_of(step: Step, parameters: dict[str, jax.Array], *rows: tuple[Role, Any]) -> Jaxpr:
    """The jaxpr of the same, for rows like these; its constants are arrays of JAX."""
    found = _jaxpr(step, parameters, [row for _, row in rows], [row for role, row in rows if role is Role.STATE])
    return ClosedJaxpr(found.jaxpr, constants_of(found))


def graph_of(jaxpr: Jaxpr, parameters: dict[str, jax.Array], *rows: tuple[Role, Any]) -> Graph:
    """The graph of that jaxpr; the first of its values are the constants of the jaxpr, then come the parameters."""
    tracer = _Tracer()
    constants = [tracer.fixed(f"constant_{n}", value) for n, value in enumerate(jaxpr.consts)]
    names = {tracer.parameter(name, parameters[name]): name for name in sorted(parameters)}
    given = [tracer.row(role.name.lower(), role, row) for role, row in rows]
    outputs = list(map(tracer.as_node, tracer.inline(jaxpr, [*names, *given], constants)))
    output, *further = outputs or [node for _, node in tracer.named]
    graph = Graph(tracer.nodes, output, names, tracer.values, further=further, named=tracer.named)
    return real_graph(graph, tracer.forms)


def _jaxpr(step: Step, parameters: dict[str, jax.Array], rows: list[jax.Array], states: list[jax.Array]) -> Jaxpr:
    try:
        jaxpr, out = jax.make_jaxpr(step, return_shape=True)(parameters, *rows)
    except (JAXTypeError, JAXIndexError) as error:
        raise ValueError(
            f"JAX could not trace the step: {str(error).strip().splitlines()[0].rstrip('.')}; it must be a "
            "function of (parameters, x, z) without Python branches or loops on their values, and without numpy; use "
            "jnp.where, jax.lax and jax.numpy instead"
        ) from error
    for z in states:
        if not isinstance(out, jax.ShapeDtypeStruct) or (out.shape, out.dtype) != (z.shape, z.dtype):
            raise ValueError(
                f"a step must return the next state, {z.dtype}{list(z.shape)} as z; this one returns {out}; "
                "concatenate the parts of the state to one vector, and keep its dtype"
            )
    if "new_ref" in _side_effects(jaxpr.jaxpr):
        jaxpr = _without_references(jaxpr)
    if acts := sorted(set(_side_effects(jaxpr.jaxpr))):
        raise ValueError(
            f"a step must be a pure function, but this one has side effects ({', '.join(acts)}); write it with "
            "operations of JAX alone, and make all that it remembers part of z"
        )
    return jaxpr


def _without_references(jaxpr: Jaxpr) -> Jaxpr:
    """The same as a pure function, where all references that it writes to are its own."""
    with suppress(Exception):  # a private name, the only one that JAX has for it; and it may meet what it cannot do
        from jax._src.state.discharge import discharge_state

        found = discharge_state(jaxpr)
        if len(found.jaxpr.outvars) == len(jaxpr.jaxpr.outvars):
            return found
    return jaxpr


def _side_effects(jaxpr: Jaxpr) -> Iterator[str]:
    """The names of the operations that do more than compute or print."""
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, list(jaxprs_in_params(equation.params))
        if name in equations.CUSTOM and not equation.effects:
            continue  # a check of values, or a function of numpy: its derivative is known, so it is one of numbers
        if name in equations.CALLBACKS or (equation.effects and not inner and name not in equations.PRINTS):
            yield name
        for called in inner:
            yield from _side_effects(called)


class _Nodes:
    """The nodes so far; which of them hang on data, and which are weights: they hang on parameters alone."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.values: dict[Node, jax.Array] = {}
        self.data: set[Node] = set()
        self.weights: set[Node] = set()
        self.constants: dict[int, tuple[Any, Node]] = {}
        self.named: list[tuple[str, Node]] = []
        self.forms: dict[Node, Form] = {}  # what is complex

    def parameter(self, name: str, value: jax.Array) -> Node:
        node = self.fixed(name, value)
        self.weights.add(node)
        return node

    def row(self, name: str, role: Role, value: jax.Array) -> Node:
        node = Node(name, role, (value.shape,), is_floating(value))
        self.nodes.append(node)
        self.data.add(node)
        self.forms[node] = form_of([value])
        return node

    def fixed(self, name: str, value: Any) -> Node:
        value = jnp.asarray(value)
        node = Node(name, Role.FIXED, (value.shape,), is_floating(value))
        self.nodes.append(node)
        self.values[node] = value
        self.forms[node] = form_of([value])
        return node

    def as_node(self, value: Any) -> Node:
        """The node of an atom, or of a constant array: one for each array."""
        if isinstance(value, Node):
            return value
        if id(value) not in self.constants:  # kept, so that no other gets its id
            self.constants[id(value)] = value, self.fixed(f"constant_{len(self.nodes)}", value)
        return self.constants[id(value)][1]

    def add(self, role: Role, name: str, outs: Sequence[Any], apply: Any, *args: Any) -> Node:
        """The node of an operation whose results have the shapes and dtypes of `outs`."""
        floating = any(map(is_floating, outs))
        node = Node(f"{name}_{len(self.nodes)}", role, tuple(out.shape for out in outs), floating, apply, args)
        self.nodes.append(node)
        self.forms[node] = form_of(outs)
        if self.any_in(self.data, node.operands):
            self.data.add(node)
        elif floating and role is not Role.STOP and self.any_in(self.weights, node.operands):
            self.weights.add(node)
        return node

    def any_in(self, those: set[Node], atoms: Sequence[Atom]) -> bool:
        return any(atom in those for atom in atoms)

    def meet(self, atoms: Sequence[Atom]) -> bool:
        """Whether there are both weights and data."""
        return self.any_in(self.weights, atoms) and self.any_in(self.data, atoms)

    def arrange(self, node: Node, order: Sequence[int], out: Any) -> Node:
        """The node's elements with the axes in this order, in an array of the form of `out`."""
        if tuple(order) == tuple(range(len(order))) and out.shape == node.shape:
            return node
        return self.add(Role.MOVE, "arrange", [out], partial(equations.arrange, tuple(order), out.shape), node)


class _Tracer(_Nodes):
    """Adds the equations of jaxprs."""

    def inline(self, closed: Jaxpr, args: Sequence[Atom], constants: Sequence[Node] | None = None) -> list[Atom]:
        """Add a jaxpr's equations one by one; its results. `constants` are nodes of its own, where there are any."""
        jaxpr = opened(closed)
        constants = list(map(self.as_node, getattr(closed, "consts", ()))) if constants is None else constants
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *args], strict=True))

        def read(var: Any) -> Atom:
            return self.literal(var) if isinstance(var, Literal) else env[var]

        for equation in grouped(jaxpr):
            results = self.equation(equation, [read(var) for var in equation.invars])
            env.update(zip(equation.outvars, results, strict=True))
        return [read(var) for var in jaxpr.outvars]

    def literal(self, literal: Any) -> Atom:
        """A number as it is, an array as a node."""
        value: Any = np.asarray(literal.val, literal.aval.dtype)
        return self.as_node(literal.val) if value.ndim else value[()]

    def equation(self, equation: Equation | AssociativeScan, args: list[Atom]) -> Sequence[Any]:
        """The results of one equation; None for one that is not used."""
        if isinstance(equation, AssociativeScan):
            return self.results(Role.OTHER, "associative_scan", [var.aval for var in equation.outvars], equation, args)
        name = equation.primitive.name
        if name in equations.PRINTS:
            return []
        if name == "name":
            self.named.append((equation.params["name"], self.as_node(args[0])))
        if equations.is_copy(equation):
            return args
        if name in equations.CALLS or (name in equations.CUSTOM and self.opens(equation, args)):
            return self.inline(body(equation), args)
        if name == "scan" and equation.params["length"] and self.unrolls(equation, args):
            return self.unroll(equation, args)
        if name == "custom_linear_solve":
            return self.operation(equation, self.without_derivative(equation, args, equations.of_solvers(equation)))
        if name == "dot_general":
            return [self.product(equation, args)]
        if name == "conv_general_dilated" and equations.is_one_convolution(equation):
            return [self.convolution(equation, args)]
        return self.operation(equation, args)

    def opens(self, equation: Equation, args: list[Atom]) -> bool:
        """Whether to look into an operation with a custom derivative, for the weights inside."""
        return self.meet(args) and not equations.is_pointwise(equation) and equations.derives_itself(equation)

    def unrolls(self, equation: Equation, args: list[Atom]) -> bool:
        """Whether to take a scan apart, step by step, for the weights inside."""
        return self.meet(args) and equations.meets_openly(body(equation), [arg in self.weights for arg in args])

    def operation(self, equation: Equation, args: list[Atom]) -> list[Any]:
        """The results of an operation that stays whole."""
        name, role = equation.primitive.name, _role(equation)
        used = [i for i, var in enumerate(equation.outvars) if not isinstance(var, DropVar)]
        outs = [equation.outvars[i].aval for i in used]
        if not used:
            return [None] * len(equation.outvars)
        rule = rule_of(equation.primitive)
        if rule is not None and rule.function is not None:
            apply = partial(rule.function, **equation.params)
        else:
            apply = partial(equations.move if role is Role.MOVE else equations.bind, equation, used)
        if len(used) == 1:
            parts = [self.add(role, name, outs, apply, *args)]
            self.forms[parts[0]] = form_of(outs, kind_of(equation))
        elif role is Role.MOVE:
            every = self.add(role, name, outs, apply, *args)
            parts = [self.add(Role.MOVE, "getitem", [out], operator.getitem, every, i) for i, out in enumerate(outs)]
        else:
            parts = self.results(role, name, outs, apply, args)
        results = dict(zip(used, parts, strict=True))
        return [results.get(i) for i in range(len(equation.outvars))]

    def results(self, role: Role, name: str, outs: list[Any], apply: Any, args: list[Atom]) -> list[Node]:
        """Several results as parts of one vector for each dtype: a weight enters one value, whatever the operation."""
        if len(outs) == 1:
            return [self.add(role, name, outs, apply, *args)]
        found: dict[int, Node] = {}
        for dtype in dict.fromkeys(out.dtype for out in outs):
            alike = [i for i, out in enumerate(outs) if out.dtype == dtype]
            ends = np.cumsum([outs[i].size for i in alike]).tolist()
            vector = jax.ShapeDtypeStruct((ends[-1],), dtype)
            every = self.add(role, name, [vector], partial(equations.side_by_side, apply, alike), *args)
            for i, end in zip(alike, ends, strict=True):
                cut = partial(equations.part, slice(end - outs[i].size, end), outs[i].shape)
                found[i] = self.add(Role.MOVE, "part", [outs[i]], cut, every)
        return [found[i] for i in range(len(outs))]

    def without_derivative(self, equation: Equation, args: list[Atom], those: Sequence[int]) -> list[Atom]:
        """The arguments of an equation, where it has no derivative in those of these numbers."""
        found = list(args)
        for i in those:
            node, aval = self.as_node(args[i]), equation.invars[i].aval
            found[i] = self.add(Role.STOP, "stop_gradient", [aval], lax.stop_gradient, node)
        return found

    def product(self, equation: Equation, args: list[Atom]) -> Node:
        """A contraction as a product of matrices, its operands and its result moved into place."""
        left, right = map(self.as_node, args)
        mirrored = right in self.data and left not in self.data
        role, apply, orders, forms = equations.as_product(equation, mirrored)
        operands = [self.arrange(*operand) for operand in zip((left, right), orders, forms[:2], strict=True)]
        node = self.add(role, "product", forms[2:], apply, *operands)
        return self.arrange(node, range(len(node.shape)), equation.outvars[0].aval)

    def convolution(self, equation: Equation, args: list[Atom]) -> Node:
        """A convolution with its operands as [batch, in, ...] and [out, in, ...], its result moved into place."""
        apply, orders, forms, back = equations.as_convolution(equation)
        operands = [self.arrange(*o) for o in zip(map(self.as_node, args), orders, forms[:2], strict=True)]
        node = self.add(Role.CONVOLUTION, "convolution", forms[2:], apply, *operands)
        return self.arrange(node, back, equation.outvars[0].aval)

    def unroll(self, equation: Equation, args: list[Atom]) -> list[Any]:
        """A scan as its steps, one after another."""
        inner, order = body(equation), slice(None, None, -1 if equation.params["reverse"] else 1)
        fixed, carries = equations.scan_sizes(equation)
        consts, carry, xs = args[:fixed], args[fixed : fixed + carries], map(self.as_node, args[fixed + carries :])
        sweeps = list(zip(xs, opened(inner).invars[fixed + carries :], strict=True))
        rows: list[list[Node]] = []
        for time in range(equation.params["length"])[order]:
            here = [self.add(Role.MOVE, "row", [var.aval], partial(equations.row, time), x) for x, var in sweeps]
            results = self.inline(inner, [*consts, *carry, *here])
            carry = results[:carries]
            rows.append([self.as_node(y) for y in results[carries:]])
        columns = zip(equation.outvars[carries:], zip(*rows[order], strict=True), strict=True)
        return [*carry, *(self.add(Role.MOVE, "stack", [y.aval], equations.stack, *column) for y, column in columns)]


def _role(equation: Equation) -> Role:
    name = equation.primitive.name
    if rule := rule_of(equation.primitive):
        return rule.role
    if name == "stop_gradient":
        return Role.STOP
    if name in equations.MOVES:
        return Role.MOVE
    if name in equations.ADDS:
        return Role.ADD
    if name == "fft":
        return Role.REDUCE
    return Role.POINTWISE if equations.is_pointwise(equation) else Role.OTHER
