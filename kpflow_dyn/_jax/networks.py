"""Models of JAX that are no steps, as their users call them and traced; see `kpflow_dyn._implicit.equations`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from kpflow_dyn._arrays.complex_numbers import in_halves, in_pairs, is_complex, of_halves
from kpflow_dyn._backend import BACKENDS
from kpflow_dyn._implicit.constraint import TracedConstraint, network_of, network_of_uses
from kpflow_dyn._implicit.form import Form
from kpflow_dyn._implicit.layout import Layout, layout_of
from kpflow_dyn._implicit.results import Unknown, values_named
from kpflow_dyn._jax.cells import initial_state
from kpflow_dyn._jax.checks import check_parameters, floating_leaves, named_parameters, with_parameters
from kpflow_dyn._jax.custom import is_floating
from kpflow_dyn._jax.failures import cause_of, explained, of_all_trials
from kpflow_dyn._jax.model import Model
from kpflow_dyn._jax.models import copied
from kpflow_dyn._jax.trace import trace_rows
from kpflow_dyn._jax.transforms import once_of_models
from kpflow_dyn._jax.watching import Change, parts_of, results, watched
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.problems import FixedPointProblem, ImplicitProblem, StaticProblem
from kpflow_dyn.tracing._graph import Role

Values = dict[str, jax.Array]
Rows = tuple[jax.Array, ...]

OUTPUT = values_named([""], [])
TRANSFORMS = BACKENDS["jax"].transforms


class Network:
    """Values of a network, of named parts or its own, as its state."""

    form = Form.NETWORK

    def __init__(self, problem: StaticProblem) -> None:
        self.call, self.problem, self.given = copied(problem.net), problem, problem.arguments
        _check(self.call, self.given.like)
        self.rows = tuple(map(jnp.asarray, self.given.rows.values()))
        self.values = values_named(problem.state or ("",), parts_of(self.call), problem.axes)
        self.layout = self._look()
        with explained("the network failed"):
            self.start = once_of_models(self._of_trials)(self.call, self.rows)

    def model(self, params: Choice) -> Model:
        """The network with the parameters that learn."""
        return Model(self.call, params)

    def residual(self, call: Any, state: jax.Array) -> jax.Array:
        """S - G(S)."""

        def of_trial(rows: Rows, state: jax.Array) -> jax.Array:
            given = self.layout.split(state)
            return state - self._state(call, rows, lambda i, value: (value, given[i]))

        return jax.vmap(of_trial)(self.rows, state)

    def kicked(self, call: Any, kicks: jax.Array) -> jax.Array:
        """S, where each value is kicked."""

        def of_trial(rows: Rows, kicks: jax.Array) -> jax.Array:
            parts = self.layout.split(kicks)

            def kick(number: int, value: jax.Array) -> tuple[jax.Array, jax.Array]:
                return (moved := value + parts[number]), moved

            return self._state(call, rows, kick)

        return jax.vmap(of_trial)(self.rows, kicks)

    def traced(self) -> TracedConstraint:
        """Traced on one trial."""
        net, own = self.call, [value.name for value in self.values if not value.module]

        def call(parameters: Values, *rows: jax.Array) -> list[jax.Array]:
            return results(with_parameters(net, parameters), self.given, rows, self.values)

        graph = trace_rows(call, named_parameters(net), *((Role.INPUT, row[0]) for row in self.rows))
        if self.problem.state is None:
            return network_of_uses(graph, TRANSFORMS, [*map(in_pairs, self.rows)], lambda shape: shape)
        named = [*graph.named, *zip(own, [graph.output, *graph.further], strict=False)]
        inside = [value.name for value in self.values]
        parts = [(name, node) for name, node in named if name in inside]
        return network_of(graph, TRANSFORMS, [*map(in_pairs, self.rows)], parts, self.layout)

    def _look(self) -> Layout:
        """How the values of a trial make the state."""
        names: list[str] = []

        def values(rows: Rows) -> list[jax.Array]:
            found = watched(self.call, self.given, rows, self.values, lambda _i, value: (value, value))
            names[:] = [name for name, _ in found]
            return [value for _, value in found]

        try:
            found = jax.eval_shape(values, self._rows_of_one)
        except Unknown:
            raise
        except Exception as error:
            advice = of_all_trials(lambda *rows: values(rows), *self._rows_of_one, trials=self.given.trials)
            raise ValueError(f"the network failed on one trial of {self.given}{cause_of(error)}{advice}") from error
        given, shapes = list(zip(names, found, strict=True)), [value.shape for value in found]
        if not names:
            asked = [value.name for value in self.values]
            raise ValueError(f"the network calls none of the modules {asked}; nothing to analyse")
        if wrong := [f"{name or 'the output'} {one.dtype}" for name, one in given if not is_floating(one)]:
            raise ValueError(f"the state would be {', '.join(wrong)}, expected floats: integers have no derivative")
        axes = self.problem.axes
        layout = layout_of(names, shapes, axes and [name for name in axes if name != "trial"])
        if self.problem.shared is None:
            self._check_rows(values, shapes)
        return layout

    @property
    def _rows_of_one(self) -> Rows:
        return tuple(row[0] for row in self.rows)

    def _check_rows(self, values: Callable[[Rows], list[jax.Array]], shapes: list[tuple[int, ...]]) -> None:
        """Raise where the network takes an array whole as well as row by row: its length does not tell which."""
        for i, name in list(enumerate(self.given.rows))[1:]:
            rows = tuple(self.rows[j] if j == i else row for j, row in enumerate(self._rows_of_one))
            if not self.given.alone and _shapes(values, rows) == shapes:
                raise ValueError(
                    f"{name} {list(self.rows[i].shape)} has as many rows as there are trials, but the network takes it "
                    "whole as well; name it in shared if all trials share it, else give shared=()"
                )

    def _state(self, call: Any, rows: Rows, change: Change) -> jax.Array:
        return self.layout.join([value for _, value in watched(call, self.given, rows, self.values, change)])

    def _of_trials(self, call: Any, rows: Rows) -> jax.Array:
        return jax.vmap(lambda rows: self._state(call, rows, lambda _i, value: (value, value)))(rows)


def states_of(problem: StaticProblem, net: Any) -> jax.Array:
    """The state of the problem with this network, its output as it comes where no other is asked for."""
    rows = tuple(map(jnp.asarray, problem.arguments.rows.values()))
    if problem.axes is None and problem.state in (None, ("",)):
        return jax.vmap(lambda rows: results(net, problem.arguments, rows, OUTPUT)[0])(rows)
    network = Network(problem)
    return network.kicked(net, jnp.zeros_like(network.start))


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
        step = partial(self._next, self.call)
        try:
            found = jax.eval_shape(step, x, z)
        except Exception as error:
            advice = of_all_trials(step, x, z, trials=len(problem.x))
            raise ValueError(f"f failed on x {x.shape} and z {z.shape} ({called}){cause_of(error)}{advice}") from error
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


def _shapes(function: Callable[[Rows], list[jax.Array]], rows: Rows) -> list[tuple[int, ...]] | None:
    """The shapes of its results; None where it does not take these rows."""
    try:
        return [value.shape for value in jax.eval_shape(function, rows)]
    except Exception:  # of the user's network
        return None


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
