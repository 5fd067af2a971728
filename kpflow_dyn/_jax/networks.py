"""Models of JAX that are no steps, as their users call them and traced; see `kpflow_dyn._implicit.equations`."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from kpflow_dyn._arrays.complex_numbers import in_halves, in_pairs, is_complex, of_halves
from kpflow_dyn._backend import BACKENDS
from kpflow_dyn._implicit.constraint import TracedConstraint, network_of, network_of_uses
from kpflow_dyn._implicit.form import Form
from kpflow_dyn._implicit.layout import Layout
from kpflow_dyn._jax.cells import initial_state
from kpflow_dyn._jax.checks import check_parameters, floating_leaves, named_parameters, with_parameters
from kpflow_dyn._jax.failures import explained
from kpflow_dyn._jax.model import Model
from kpflow_dyn._jax.trace import trace_rows
from kpflow_dyn._jax.watching import Change, halves_of_value, watched, with_names
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.problems import FixedPointProblem, ImplicitProblem, StaticProblem
from kpflow_dyn.tracing._graph import Role

Values = dict[str, jax.Array]
Rows = tuple[jax.Array, ...]

TRANSFORMS = BACKENDS["jax"].transforms


class Network:
    """The outputs of named parts of a network, or its own, as its state."""

    form = Form.NETWORK

    def __init__(self, problem: StaticProblem) -> None:
        self.call, self.problem, self.names = problem.net, problem, tuple(dict.fromkeys(problem.state or ("",)))
        _check(self.call, problem.x)
        self.layout = self._look()
        self.start = _values(self._of_trials, self.call, problem.x)

    def model(self, params: Choice) -> Model:
        """The network with the parameters that learn."""
        return Model(self.call, params)

    def residual(self, call: Any, state: jax.Array) -> jax.Array:
        """S - G(S)."""

        def of_trial(x: jax.Array, state: jax.Array) -> jax.Array:
            given = self.layout.split(state)
            return state - self._state(call, x, lambda i, value: (value, given[i]))

        return jax.vmap(of_trial)(self.problem.x, state)

    def kicked(self, call: Any, kicks: jax.Array) -> jax.Array:
        """S, where each value is kicked."""

        def of_trial(x: jax.Array, kicks: jax.Array) -> jax.Array:
            parts = self.layout.split(kicks)

            def kick(number: int, value: jax.Array) -> tuple[jax.Array, jax.Array]:
                return (moved := value + parts[number]), moved

            return self._state(call, x, kick)

        return jax.vmap(of_trial)(self.problem.x, kicks)

    def traced(self) -> TracedConstraint:
        """Traced on one trial."""
        net, x = self.call, self.problem.x
        inner = [name for name in self.names if name]

        def call(values: Values, x: jax.Array) -> jax.Array:
            return halves_of_value(jax.tree.leaves(with_names(with_parameters(net, values), inner)(x))[0])

        graph = trace_rows(call, named_parameters(net), (Role.INPUT, x[0]))
        if self.problem.state is None:
            return network_of_uses(graph, TRANSFORMS, in_pairs(x), lambda shape: shape)
        values = [(name, node) for name, node in [*graph.named, ("", graph.output)] if name in self.names]
        return network_of(graph, TRANSFORMS, in_pairs(x), values, self.layout)

    def _look(self) -> Layout:
        """How the values of a trial make the state."""
        names: list[str] = []

        def values(x: jax.Array) -> list[jax.Array]:
            found = watched(self.call, x, self.names, lambda _i, value: (value, value))
            names[:] = [name for name, _ in found]
            return [value for _, value in found]

        with explained("the network failed"):
            shapes = [value.shape for value in jax.eval_shape(values, self.problem.x[0])]
        if not names:
            raise ValueError(f"the network calls none of the modules {list(self.names)}; nothing to analyse")
        return Layout(tuple(names), tuple(shapes))

    def _state(self, call: Any, x: jax.Array, change: Change) -> jax.Array:
        return self.layout.join([value for _, value in watched(call, x, self.names, change)])

    def _of_trials(self, call: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(lambda x: self._state(call, x, lambda _i, value: (value, value)))(x)


class FixedPoint:
    """A map f(x, z) -> z on one trial, or f(z, x) where that is swapped."""

    form, layout = Form.FIXED_POINT, None

    def __init__(self, problem: FixedPointProblem, swapped: bool) -> None:
        self.call, self.problem, self.swapped = problem.f, problem, swapped
        _, like = _check(self.call, problem.x)
        self.complex = problem.z0 is not None and is_complex(problem.z0)
        units = None if self.complex else getattr(self.call, "hidden_size", None)
        self.start = initial_state([units], like, problem.z0)
        x, z = problem.x[0], self.start[0]
        called = "it is called as f(x, z), or as f(z, x) where its parameters are called z and x"
        with explained(f"f failed on x {x.shape} and z {z.shape} ({called})"):
            found = jax.eval_shape(lambda x, z: self._next(self.call, x, z), x, z)
        if (found.shape, found.dtype) != (z.shape, z.dtype):
            raise ValueError(f"f gave {found} for z {z.dtype}{list(z.shape)}; it must give the next z")

    def model(self, params: Choice) -> Model:
        """The map with the parameters that learn."""
        return Model(self.call, params)

    def residual(self, call: Any, state: jax.Array) -> jax.Array:
        """z - f(x, z)."""
        return self._of_trials(call, self.problem.x, state)

    def at(self, state: jax.Array) -> jax.Array:
        """The same, compiled."""
        return _values(self._of_trials, self.call, self.problem.x, state)

    def check(self, state: jax.Array) -> None:
        """Nothing: a model of one trial knows no other, and has no random state."""

    def traced(self) -> TracedConstraint:
        """Traced on one trial."""
        f, x = self.call, self.problem.x

        def call(values: Values, x: jax.Array, z: jax.Array) -> jax.Array:
            return self._next(with_parameters(f, values), x, z)

        graph = trace_rows(call, named_parameters(f), (Role.INPUT, x[0]), (Role.STATE, self.start[0]))
        return TracedConstraint(graph, self.form, [graph.output], None, TRANSFORMS, [in_pairs(x)])

    def _next(self, call: Any, x: jax.Array, z: jax.Array) -> jax.Array:
        z = of_halves(z) if self.complex else z
        return in_halves(call(z, x) if self.swapped else call(x, z))

    def _of_trials(self, call: Any, x: jax.Array, z: jax.Array) -> jax.Array:
        return z - jax.vmap(lambda x, z: self._next(call, x, z))(x, z)


class FreeForm:
    """F(S, params, x) on the whole state."""

    form, layout = Form.FREE, None

    def __init__(self, problem: ImplicitProblem) -> None:
        self.problem, self.start = problem, in_halves(problem.state)
        is_learnt = eqx.is_inexact_array_like
        self.call = jax.tree.map(lambda leaf: jnp.asarray(leaf) if is_learnt(leaf) else leaf, problem.params)
        if not floating_leaves(self.call):
            raise TypeError("params holds no floating-point arrays: nothing can learn")
        self._rows = [] if problem.x is None else [jnp.asarray(problem.x)]
        with explained("F failed"):
            found = jax.eval_shape(lambda s: self._F(self.call, s, *self._rows), self.start)
        if getattr(found, "shape", None) != self.start.shape:
            raise ValueError(f"F gave {found} for the state {self.start.shape}; it must have its form")

    def model(self, params: Choice) -> Model:
        """The parameters that learn."""
        return Model(self.call, params)

    def residual(self, call: Any, state: jax.Array) -> jax.Array:
        """F."""
        return self._F(call, state, *self._rows)

    def at(self, state: jax.Array) -> jax.Array:
        """The same, compiled."""
        return _values(self._F, self.call, state, *self._rows)

    def check(self, state: jax.Array) -> None:
        """Nothing: F has no random state."""

    def traced(self) -> TracedConstraint:
        """Traced as it is."""

        def call(values: Values, state: jax.Array, *x: jax.Array) -> jax.Array:
            return self._F(with_parameters(self.call, values), state, *x)

        rows = (Role.STATE, self.start), *((Role.INPUT, x) for x in self._rows)
        graph = trace_rows(call, floating_leaves(self.call), *rows)
        return TracedConstraint(graph, self.form, [graph.output], None, TRANSFORMS, [*map(in_pairs, self._rows)])

    def _F(self, call: Any, state: jax.Array, *x: jax.Array) -> jax.Array:
        state = of_halves(state) if is_complex(self.problem.state) else state
        return in_halves(self.problem.F(state, call, *x))


@eqx.filter_jit
def _values(function: Callable[..., jax.Array], *args: Any) -> jax.Array:
    """Compiled; the arrays are arguments, as constants of a program would be whole on every device."""
    return function(*args)


def _check(model: Any, x: jax.Array) -> tuple[Values, jax.Array]:
    """The model's parameters; and x, or where it holds integers one like it in their dtype."""
    known = named_parameters(model)
    first = next(iter(known.values()))
    like = in_halves(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(first.real.dtype)
    check_parameters(model, like)
    return known, like
