"""The JAX models that every identity is tested on, and their dense Jacobians by reverse mode through the real model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

import kpflow_dyn as kp
from kpflow_dyn._jax.cells import as_step
from kpflow_dyn._jax.checks import with_parameters

TRIALS, TIMES, INPUTS, UNITS = 2, 4, 3, 4


class WithHiddenSize(eqx.Module):
    """A hand-written cell of four units, with one array W [units, units], U [units, inputs] and b [units]."""

    W: jax.Array
    U: jax.Array
    b: jax.Array
    hidden_size: int = UNITS

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 3)
        self.W = 0.5 * jax.random.normal(keys[0], (UNITS, UNITS))
        self.U = jax.random.normal(keys[1], (UNITS, INPUTS))
        self.b = jax.random.normal(keys[2], (UNITS,))


class TanhRNN(WithHiddenSize):
    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.tanh(self.W @ z + self.U @ x + self.b)


class Transposed(WithHiddenSize):
    """Weights on the right of a row, jitted inside, and a power that is learnt."""

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        inner = jax.jit(lambda W, z: z @ W)
        return jnp.abs(jnp.tanh(inner(self.W, z) + jnp.einsum("oi,i->o", self.U, x))) ** (1 + self.b**2)


class Concatenating(eqx.Module):
    """A gate and a candidate over [x, z, learnt constant]."""

    gate: eqx.nn.Linear
    candidate: eqx.nn.Linear
    constant: jax.Array
    hidden_size: int = UNITS

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 3)
        self.gate = eqx.nn.Linear(INPUTS + UNITS + 2, UNITS, key=keys[0])
        self.candidate = eqx.nn.Linear(INPUTS + UNITS + 2, UNITS, use_bias=False, key=keys[1])
        self.constant = jax.random.normal(keys[2], (2,))

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        v = jnp.concatenate([x, z, self.constant])
        gate = jax.nn.sigmoid(self.gate(v))
        return gate * z + (1 - gate) * jax.nn.relu(self.candidate(v))


class ComputedWeight(WithHiddenSize):
    """W = W_1 W_1^T and a softplus time constant: weights that are themselves computed."""

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        a = 1 / (1 + jax.nn.softplus(self.b))
        return (1 - a) * z + a * jnp.tanh((self.W @ self.W.T) @ z / UNITS + self.U @ x)


class Tied(WithHiddenSize):
    """One matrix used three times, once turned."""

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return self.W.T @ jnp.tanh(self.W @ jnp.tanh(self.W @ z + self.b) + self.U @ x)


class Repeated(WithHiddenSize):
    """A loop inside of the step, by scan."""

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        def body(z: jax.Array, scale: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(self.W @ z * scale + self.U @ x + self.b), None

        return lax.scan(body, z, jnp.array([1.0, 0.5, -0.5]))[0]


class Attending(WithHiddenSize):
    """LayerNorm, softmax glue over two halves of the state, one matrix for both, and a convolution over the units."""

    norm: eqx.nn.LayerNorm
    convolution: eqx.nn.Conv1d

    def __init__(self, key: jax.Array) -> None:
        super().__init__(key)
        self.norm = eqx.nn.LayerNorm(UNITS)
        self.convolution = eqx.nn.Conv1d(1, 1, 3, padding=1, key=key)

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        halves = jax.vmap(lambda half: self.W[:2, :2] @ half)(self.norm(z).reshape(2, 2))
        weights = jax.nn.softmax(halves @ halves.T, axis=-1)
        return jnp.tanh((weights @ halves).ravel() + self.convolution(z[None])[0] + self.U @ x)


class Embedding(WithHiddenSize):
    """Inputs that pick columns of a table."""

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.tanh(self.W @ z + self.U[:, jnp.clip(jnp.abs(x[0]).astype(int), 0, INPUTS - 1)])


class PairState(eqx.Module):
    """A cell with a tuple of two states of different sizes."""

    fast: eqx.nn.Linear
    slow: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        self.fast, self.slow = eqx.nn.Linear(INPUTS + 3, 3, key=key), eqx.nn.Linear(3, 2, key=key)

    def __call__(self, x: jax.Array, z: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        fast = jnp.tanh(self.fast(jnp.concatenate([x, z[0]])) * z[1].sum())
        return fast, 0.9 * z[1] + 0.1 * self.slow(fast)


def function_of(key: jax.Array) -> jax.tree_util.Partial:
    """A plain function with its pytree of parameters."""
    keys = jax.random.split(key)
    weights = {"W": jax.random.normal(keys[0], (UNITS, UNITS)), "in": [jax.random.normal(keys[1], (UNITS, INPUTS))]}
    return jax.tree_util.Partial(lambda p, x, z: jnp.tanh(p["W"] @ z) + p["in"][0] @ x, weights)


@dataclass(frozen=True)
class Model:
    """A registered cell, with the shape of its state."""

    make: Callable[[jax.Array], Callable]
    units: int = UNITS
    parts: tuple[int, ...] = ()

    def problem(self, started: bool, dtype: str = "float64") -> kp.DiscreteProblem:
        """The model on random inputs, from zero or from a random state."""
        keys = jax.random.split(jax.random.key(7), 3)
        cell = jax.tree.map(lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a, self.make(keys[0]))
        x = jax.random.normal(keys[1], (TRIALS, TIMES, INPUTS)).astype(dtype)
        z0 = (0.3 * started * jax.random.normal(keys[2], (TRIALS, self.units))).astype(dtype)
        return kp.DiscreteProblem(cell, x, tuple(jnp.split(z0, self.parts, -1)) if self.parts else z0)


MODELS = {
    "tanh_rnn": Model(TanhRNN),
    "gru": Model(lambda key: eqx.nn.GRUCell(INPUTS, UNITS, key=key)),
    "lstm": Model(lambda key: eqx.nn.LSTMCell(INPUTS, UNITS, key=key), 2 * UNITS, (UNITS,)),
    "transposed": Model(Transposed),
    "concatenating": Model(Concatenating),
    "computed_weight": Model(ComputedWeight),
    "tied": Model(Tied),
    "repeated": Model(Repeated),
    "attending": Model(Attending),
    "embedding": Model(Embedding),
    "pair_state": Model(PairState, 5, (3,)),
    "function": Model(function_of),
}


def states_of(problem: kp.DiscreteProblem) -> Callable[[dict[str, jax.Array]], jax.Array]:
    """Parameters -> states, rolled out step by step."""
    step, start = as_step(problem.cell, problem.x, problem.z0)

    @jax.jit
    def states(parameters: dict[str, jax.Array]) -> jax.Array:
        cell, z, found = with_parameters(problem.cell, parameters), start, []
        for t in range(problem.x.shape[1]):
            z = jax.vmap(lambda x, z: step(cell, x, z))(problem.x[:, t], z)
            found.append(z)
        return jnp.stack(found, 1)

    return states


def dense_jacobian(flow: kp.Flow) -> jax.Array:
    """dS/dtheta [state, parameter] by reverse mode through the real model."""
    jacobian = jax.jit(jax.jacrev(states_of(flow.solution.problem)))(flow.parameters)
    return jnp.concatenate([jacobian[name].reshape(flow.ntk.domain.size, -1) for name in flow.parameters], 1)


def dense_steps(flow: kp.Flow) -> jax.Array:
    """D_S F = I - D_S Phi [state, state], from the Jacobian of each step of the real model."""
    problem, state = flow.solution.problem, flow.solution.state
    step, _ = as_step(problem.cell, problem.x, problem.z0)
    jacobian = jax.jit(jax.jacrev(lambda z, x: step(problem.cell, x, z)))
    matrix = jnp.eye(state.size, dtype=state.dtype).reshape(*state.shape, *state.shape)
    for b in range(state.shape[0]):
        for t in range(1, state.shape[1]):
            matrix = matrix.at[b, t, :, b, t - 1, :].add(-jacobian(state[b, t - 1], problem.x[b, t]))
    return matrix.reshape(state.size, state.size)
