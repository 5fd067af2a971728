"""The derivative of a function of a JAX model by JAX's own autodiff.

Reverse mode decides; forward mode is `jax.linearize` where the function has it, else the transpose of reverse mode,
else its matrix.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from kpflow_dyn._arrays import Rows
from kpflow_dyn._arrays.memory import bytes_of, in_blocks, require
from kpflow_dyn._flows.referee import Mismatch, check_transpose
from kpflow_dyn._jax.equations import custom_functions

Values = dict[str, jax.Array]


class Derivative:
    """See `kpflow_dyn._flows.referee.Derivative`."""

    def __init__(self, function: Callable[[Values, jax.Array], jax.Array], parameters: Values, at: jax.Array) -> None:
        self._at, self._shapes = at, {name: value.shape for name, value in parameters.items()}
        self._theta = jnp.concatenate([at.reshape(-1)[:0], *(value.reshape(-1) for value in parameters.values())])
        # What the function closes over becomes an argument: constants of a program would be whole on every device.
        self._function = eqx.filter_closure_convert(
            lambda theta, s: function(self._named(theta), s), self._theta, self._at
        )
        self.value, self._pull = _vjp(self._function, self._theta, self._at)

    @property
    def custom(self) -> list[str]:
        """The functions with derivatives of their own that the model calls."""
        return custom_functions(self._function.jaxpr)

    def pull(self, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Reverse mode."""
        found = self._in_blocks(lambda rows: _pulled(self._pull, rows))(q)
        return self._parted(found)

    def push(self, theta: jax.Array | None, argument: jax.Array | None) -> jax.Array:
        """Its transpose."""
        probes = len(theta if theta is not None else argument)  # type: ignore[arg-type]
        theta = jnp.zeros((probes, self._theta.size), self._at.dtype) if theta is None else theta
        argument = jnp.zeros((probes, *self._at.shape), self._at.dtype) if argument is None else argument
        return self._forward(jnp.concatenate([theta, argument.reshape(probes, -1)], 1))

    def _named(self, theta: jax.Array) -> Values:
        sizes = [int(np.prod(shape)) for shape in self._shapes.values()]
        parts = jnp.split(theta, np.cumsum(sizes)[:-1])
        return {name: part.reshape(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def _in_blocks(self, function: Rows) -> Rows:
        return in_blocks(function, self.value.size, self.value)

    def _parted(self, both: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gradients [probe, p + argument] as those of the parameters and of the argument."""
        size = self._theta.size
        return both[:, :size], both[:, size:].reshape(len(both), *self._at.shape)

    @cached_property
    def _forward(self) -> Rows:
        """The first of the ways forward that JAX has and that is the transpose of reverse mode."""
        for way in (self._by_linearize, self._by_transpose, self._by_double):
            try:
                forward = self._in_blocks(way())
                self._check(forward)
            except Exception:  # JAX says that there is no such mode in many ways
                continue
            return forward
        forward = self._by_matrix()
        try:
            self._check(forward)
        except Mismatch as error:
            raise ValueError(f"the model's backward pass is not linear, so it is no derivative: {error}") from error
        return forward

    def _check(self, forward: Rows) -> None:
        generator = np.random.default_rng(2)
        shapes = (self.value.shape, self._theta.shape, self._at.shape)
        q, theta, dz = (jnp.asarray(generator.standard_normal((1, *shape)), self._at.dtype) for shape in shapes)
        check_transpose(_Forward(self, forward), q, theta, dz, self.pull(q))

    def _by_linearize(self) -> Rows:
        push = _linearized(self._function, self._theta, self._at)
        return lambda rows: _pushed(push, *self._parted(rows))

    def _by_transpose(self) -> Rows:
        return lambda rows: _transposed(self._pull, self.value, *self._parted(rows))

    def _by_double(self) -> Rows:
        return lambda rows: _doubled(self._pull, self.value, *self._parted(rows))

    def _by_matrix(self) -> Rows:
        states, columns = self.value.size, self._theta.size + self._at.size
        require(
            bytes_of(states * columns, self._at),
            f"the model's backward pass has no derivative, and the {states} x {columns} entries of its matrix",
            "write it with operations that JAX differentiates in forward mode too",
        )
        matrix = jnp.concatenate(self.pull(jnp.eye(states, dtype=self._at.dtype).reshape(states, *self.value.shape)))
        return lambda rows: (rows @ matrix.T).reshape(len(rows), *self.value.shape)


class _Forward:
    """A derivative with another way forward."""

    def __init__(self, derivative: Derivative, forward: Rows) -> None:
        self.value, self.pull, self._forward = derivative.value, derivative.pull, forward

    def push(self, theta: jax.Array, argument: jax.Array) -> jax.Array:
        return self._forward(jnp.concatenate([theta, argument.reshape(len(argument), -1)], 1))


@eqx.filter_jit
def _vjp(function: Any, theta: jax.Array, at: jax.Array) -> tuple[jax.Array, Any]:
    return jax.vjp(function, theta, at)


@eqx.filter_jit
def _linearized(function: Any, theta: jax.Array, at: jax.Array) -> Any:
    return jax.linearize(function, theta, at)[1]


@jax.jit
def _pulled(pull: Any, q: jax.Array) -> jax.Array:
    def one(q: jax.Array) -> jax.Array:
        return jnp.concatenate([part.reshape(-1) for part in pull(q)])

    return jax.vmap(one)(q)


@jax.jit
def _pushed(push: Any, theta: jax.Array, argument: jax.Array) -> jax.Array:
    return jax.vmap(push)(theta, argument)


@jax.jit
def _transposed(pull: Any, like: jax.Array, theta: jax.Array, argument: jax.Array) -> jax.Array:
    return jax.vmap(lambda *moved: jax.linear_transpose(pull, like)(moved)[0])(theta, argument)


@jax.jit
def _doubled(pull: Any, like: jax.Array, theta: jax.Array, argument: jax.Array) -> jax.Array:
    back = jax.vjp(pull, jnp.zeros_like(like))[1]
    return jax.vmap(lambda *moved: back(moved)[0])(theta, argument)
