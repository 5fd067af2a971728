"""The derivative of a function of a JAX model by JAX's own autodiff.

Reverse mode decides; forward mode is `jax.linearize` where the function has it, else the transpose of reverse mode,
else its matrix. Where there is no reverse mode, it is the transposed matrix of forward mode.
"""

import math
from collections.abc import Callable
from copy import copy
from functools import cached_property, partial
from typing import Any, Self

import jax
import jax.numpy as jnp

from kpflow_dyn._arrays import Rows, eps_of
from kpflow_dyn._arrays.complex_numbers import by_name, count, vector_of
from kpflow_dyn._arrays.memory import in_blocks, require_matrix
from kpflow_dyn._arrays.sooner_jax import sooner
from kpflow_dyn._flows.referee import NOT_LINEAR, OWN, Mismatch, Probe, check_transpose, drawn
from kpflow_dyn._jax import equations
from kpflow_dyn._jax.failures import explained, first_line
from kpflow_dyn._jax.programs import compiled_of, constants_of

Values = dict[str, jax.Array]
Both = tuple[jax.Array, jax.Array]  # of the parameters [..., p] and of the argument
Point = tuple[list[jax.Array], jax.Array]  # the parameters and the argument


class Derivative:
    """See `kpflow_dyn._flows.referee.Derivative`; programs are compiled when they are first asked for."""

    def __init__(self, function: Callable[[Values, jax.Array], jax.Array], parameters: Values, at: jax.Array) -> None:
        forms = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in parameters.items()}
        self._at: Point = [*parameters.values()], at
        self._size = sum(map(count, parameters.values()))
        with explained("the model failed"):
            # What the function closes over becomes an argument: constants of a program would be whole on every device.
            of_numbers = jax.make_jaxpr(lambda theta, s: function(_named(theta, forms), s), return_shape=True)
            closed, self._states = of_numbers(*jax.eval_shape(_vectors, self._at))
        self._closed, self._constants = closed, constants_of(closed)
        self._programs: dict[Callable[..., Any], Callable[..., Any]] = {}
        self._columns: jax.Array | None = None  # the matrix [states, p + argument], where there is no reverse mode

    def at(self, argument: jax.Array) -> Self:
        """That of the same function at another argument; nothing is compiled anew."""
        other = copy(self)
        for known in ("_first", "_reverse", "_forward"):
            vars(other).pop(known, None)
        other._at, other._columns = (self._at[0], argument), None
        return other

    @property
    def custom(self) -> list[str]:
        """The functions with derivatives of their own that the model calls."""
        return equations.custom_functions(self._closed)

    @property
    def value(self) -> jax.Array:
        """The states."""
        return self._first[0]

    connected = True  # which JAX does not tell

    @property
    def rounding(self) -> float:
        """Of the least precise part."""
        return max(equations.rounding_of(self._closed), eps_of(self._at[1]))

    @property
    def probe(self) -> Probe:
        """A random q and what it pulls back."""
        return self._first[1]

    def pull(self, q: jax.Array) -> Both:
        """Reverse mode."""
        return self._parted(self._reverse(q))

    def push(self, theta: jax.Array | None, argument: jax.Array | None) -> jax.Array:
        """Its transpose."""
        return self._forward(_side_by_side(theta, argument, self._size, self._at[1].shape))

    def _parted(self, rows: jax.Array) -> Both:
        return _parted(rows, self._at[1].shape)

    @cached_property
    def _first(self) -> tuple[jax.Array, Probe]:
        """The value and the probe, from one program."""
        (q,) = drawn([(1, *self._states.shape)], self._at[1])
        try:
            value, *found = self._run(_pulled_once, q)
        except Exception as error:  # JAX says that there is no reverse mode in many ways
            value, self._columns = self._by_columns(error)
            found = self._parted(q.reshape(1, -1) @ self._columns)
        return value, Probe(q, *found)

    @cached_property
    def _reverse(self) -> Rows:
        """Blocks q -> rows [probe, p + argument]."""
        value, columns = self.value, self._columns
        if columns is not None:
            return lambda q: q.reshape(len(q), -1) @ columns
        return in_blocks(lambda q: self._run(_pulled, q)[1], value.size, value)

    @cached_property
    def _forward(self) -> Rows:
        """Rows -> states; the first of the ways that JAX has and that is the transpose of reverse mode."""
        value = self.value
        if self._columns is not None:
            return self._by_matrix(self._columns)
        for way in (_linearized, _transposed, _doubled):
            forward = in_blocks(partial(self._run, way), value.size, value)
            try:
                self._check(forward)
            except Exception:  # JAX says that there is no such mode in many ways
                continue
            return forward
        return self._by_rows()

    def _run(self, what: Callable[..., Any], *given: jax.Array) -> Any:
        if what not in self._programs:  # by the form it is found again, which takes longer than to apply it
            options = sooner() if what is _pulled_once else {}
            self._programs[what] = compiled_of(self._closed, what, **options)
        return self._programs[what](self._constants, self._at, *given)

    def _check(self, forward: Rows) -> None:
        """Raise a `Mismatch` unless it is the transpose of reverse mode."""
        q, *pulled = self.probe
        (rows,) = drawn([(1, self._size + self._at[1].size)], q, seed=2)
        check_transpose(q, forward(rows), pulled, self._parted(rows), OWN)

    def _by_columns(self, error: Exception) -> tuple[jax.Array, jax.Array]:
        """The value, and the matrix of forward mode [states, p + argument]."""
        unit = self._unit(self._size + self._at[1].size, self._states.size, "reverse", error)
        try:
            found = self._run(_linearized, unit)
        except Exception:
            raise ValueError(
                f"JAX does not differentiate the model: {first_line(error)}; give what has no derivative a custom_vjp"
            ) from error
        return self._run(_valued), found.reshape(len(unit), -1).T

    def _by_rows(self) -> Rows:
        """Forward mode by the matrix of reverse mode."""
        states, columns = self.value.size, self._size + self._at[1].size
        unit = self._unit(states, columns, "forward", None).reshape(states, *self.value.shape)
        forward = self._by_matrix(self._reverse(unit))
        try:
            self._check(forward)
        except Mismatch as error:
            raise ValueError(NOT_LINEAR.format(error)) from error
        return forward

    def _by_matrix(self, matrix: jax.Array) -> Rows:
        return lambda rows: (rows @ matrix.T).reshape(len(rows), *self.value.shape)

    def _unit(self, size: int, other: int, mode: str, error: Exception | None) -> jax.Array:
        """All unit vectors of one side of the matrix, if there is room for it."""
        why = f"JAX has no {mode} mode of the model{f' ({first_line(error)})' if error else ''}"
        advice = "write it with operations that have one, lax.scan in the place of lax.while_loop"
        require_matrix(size, other, self._at[1], why, advice)
        return jnp.eye(size, dtype=self._at[1].dtype)


def _named(theta: jax.Array, forms: dict[str, jax.ShapeDtypeStruct]) -> Values:
    """Parameters [p] by name."""
    return by_name(theta, forms)  # type: ignore[arg-type]


@partial(jax.jit, static_argnums=1)
def _parted(rows: jax.Array, shape: tuple[int, ...]) -> Both:
    """Rows [probe, p + argument] as those of the parameters and of the argument, which has this shape."""
    theta = rows.shape[1] - math.prod(shape)
    return rows[:, :theta], rows[:, theta:].reshape(len(rows), *shape)


@partial(jax.jit, static_argnums=(2, 3))
def _side_by_side(theta: jax.Array | None, argument: jax.Array | None, size: int, shape: tuple[int, ...]) -> jax.Array:
    """The inverse, of this number of parameters and an argument of this shape; None is none."""
    given: Any = theta if argument is None else argument
    moved = [
        jnp.zeros((len(given), size), given.dtype) if theta is None else theta,
        jnp.zeros((len(given), math.prod(shape)), given.dtype) if argument is None else argument,
    ]
    return jnp.concatenate([v.reshape(len(given), -1) for v in moved], 1)


def _vectors(at: Point) -> Both:
    """The parameters as one vector [p], and the argument."""
    parameters, argument = at
    return vector_of([argument.reshape(-1)[:0], *parameters]), argument


def _first_of(function: Any) -> Callable[..., jax.Array]:
    return lambda *at: function(*at)[0]


def _valued(function: Any, at: Point) -> jax.Array:
    return function(*_vectors(at))[0]


def _pulled(function: Any, at: Point, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The value, and rows [probe, p + argument]."""
    value, pull = jax.vjp(_first_of(function), *_vectors(at))
    return value, jax.vmap(lambda q: jnp.concatenate([part.reshape(-1) for part in pull(q)]))(q)


def _pulled_once(function: Any, at: Point, q: jax.Array) -> tuple[jax.Array, ...]:
    """The same in two parts, by a program that is compiled sooner."""
    value, rows = _pulled(function, at, q)
    return value, *_parted(rows, at[1].shape)


def _linearized(function: Any, at: Point, rows: jax.Array) -> jax.Array:
    return jax.vmap(jax.linearize(_first_of(function), *_vectors(at))[1])(*_parted(rows, at[1].shape))


def _transposed(function: Any, at: Point, rows: jax.Array) -> jax.Array:
    value, pull = jax.vjp(_first_of(function), *_vectors(at))
    return jax.vmap(lambda *moved: jax.linear_transpose(pull, value)(moved)[0])(*_parted(rows, at[1].shape))


def _doubled(function: Any, at: Point, rows: jax.Array) -> jax.Array:
    value, pull = jax.vjp(_first_of(function), *_vectors(at))
    back = jax.vjp(pull, jnp.zeros_like(value))[1]
    return jax.vmap(lambda *moved: back(moved)[0])(*_parted(rows, at[1].shape))
