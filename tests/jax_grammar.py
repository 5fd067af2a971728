"""A grammar of JAX models: operations, ways to keep a weight and ways to call, put together at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from random_models import INPUTS, UNITS, Piece, Recipe

TOKENS = 3
SQUARE, VECTOR = (UNITS, UNITS), (UNITS,)


@dataclass(frozen=True)
class Operation:
    """h [unit], x [input] -> [unit] with arrays and modules of its own; `refused` where there is no derivative.

    Where there is forward mode alone (`one_way`), it may be refused.
    """

    call: Callable[..., Array]
    parts: dict[str, Any] = field(default_factory=dict)
    refused: bool = False
    one_way: bool = False


OPERATIONS: dict[str, Operation] = {}


def operation(*, refused: bool = False, one_way: bool = False, **parts: Any) -> Callable:
    """Add a function (p, h, x), with arrays of these shapes or modules that these functions of a key make."""

    def to_registry(call: Callable[..., Array]) -> Callable[..., Array]:
        OPERATIONS[call.__name__] = Operation(call, parts, refused, one_way)
        return call

    return to_registry


def elementwise(name: str, call: Callable[[Array], Array]) -> None:
    OPERATIONS[name] = Operation(lambda p, h, x: call(h * p.scale + p.shift), {"scale": VECTOR, "shift": VECTOR})


for name, call in {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "exact_gelu": partial(jax.nn.gelu, approximate=False),
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "celu": jax.nn.celu,
    "softplus": jax.nn.softplus,
    "soft_sign": jax.nn.soft_sign,
    "log_sigmoid": jax.nn.log_sigmoid,
    "hard_sigmoid": jax.nn.hard_sigmoid,
    "hard_tanh": jax.nn.hard_tanh,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "abs": jnp.abs,
    "sin": jnp.sin,
    "exp_of_tanh": lambda h: jnp.exp(jnp.tanh(h)),
    "log1p": lambda h: jnp.log1p(h * h),
    "sqrt": lambda h: jnp.sqrt(1 + h * h),
    "arctan2": lambda h: jnp.arctan2(h, 1 + h * h),
    "erf": jax.scipy.special.erf,
    "power": lambda h: (1 + h * h) ** -0.7,
    "logaddexp": lambda h: jnp.logaddexp(h, -h),
    "sinc": jnp.sinc,
    "clip": lambda h: jnp.clip(h, -0.5, 0.7),
    "round": lambda h: h + jnp.round(3 * h),
    "remainder": lambda h: h % 0.7,
    "sign": lambda h: h * jnp.sign(h - 0.1),
    "nan_to_num": jnp.nan_to_num,
    "where": lambda h: jnp.where(h > 0.1, h, h * h),
    "select": lambda h: jnp.select([h > 0.5, h > 0], [h, h**2], h**3),
    "piecewise": lambda h: jnp.piecewise(h, [h < 0, h >= 0], [jnp.sin, jnp.tanh]),
    "maximum": lambda h: jnp.maximum(h, 0.3 * h[::-1]),
    "minimum": lambda h: jnp.minimum(h, jnp.roll(h, 1)),
    "roll": lambda h: jnp.roll(h, 1) * h,
    "flip": lambda h: jnp.flip(h) * 0.5 + h,
    "concatenate": lambda h: jnp.concatenate([h[1:], jnp.sin(h[:1])]),
    "stack": lambda h: jnp.stack([h, jnp.cos(h)]).sum(0),
    "split": lambda h: jnp.concatenate([jnp.cumsum(part) for part in jnp.split(h, [1])]),
    "tile": lambda h: jnp.tile(h[:2], 2) * h,
    "repeat": lambda h: jnp.repeat(h[:2], 2) * h,
    "outer": lambda h: jnp.outer(h, jnp.tanh(h)).max(-1),
    "einsum_of_data": lambda h: jnp.einsum("i,j,j->i", h, h, jnp.sin(h)),
    "take": lambda h: jnp.take(h, jnp.array([3, 1, 1, 0])),
    "take_along_axis": lambda h: jnp.take_along_axis(h, jnp.argsort(h), 0) * 0.5 + h,
    "dynamic_index": lambda h: h + h[jnp.argmax(h)],
    "dynamic_slice": lambda h: h + lax.dynamic_slice(jnp.tile(h, 2), (jnp.argmin(h),), (UNITS,)),
    "set_slices": lambda h: jnp.zeros_like(h).at[1:].set(h[:-1]).at[0].set(jnp.sin(h[0])),
    "add_at": lambda h: h.at[jnp.array([0, 0, 2])].add(h[1:]),
    "multiply_at": lambda h: h.at[jnp.array([1, 3])].multiply(h[:2], unique_indices=True),
    "max_at": lambda h: h.at[jnp.array([1, 3])].max(h[:2]),
    "segment_sum": lambda h: jax.ops.segment_sum(h, jnp.array([0, 0, 2, 3]), UNITS),
    "cumsum": jnp.cumsum,
    "cumprod": lambda h: jnp.cumprod(1 + 0.3 * jnp.tanh(h)),
    "cummax": lambda h: lax.cummax(h) + h,
    "cumlogsumexp": lax.cumlogsumexp,
    "associative_scan": lambda h: lax.associative_scan(lambda a, b: a * 0.5 + b, h),
    "diff": lambda h: jnp.diff(h, prepend=h[-1:]),
    "logsumexp": lambda h: h - jax.nn.logsumexp(h),
    "softmax": jax.nn.softmax,
    "log_softmax": jax.nn.log_softmax,
    "standardize": lambda h: jax.nn.standardize(h, epsilon=0.1),
    "sort": jnp.sort,
    "top_k": lambda h: h - lax.top_k(h, 2)[0].sum(),
    "median": lambda h: h * jnp.median(h),
    "quantile": lambda h: h * jnp.quantile(h, 0.4),
    "max_along": lambda h: h * h.max(),
    "norm": lambda h: h / (1 + jnp.linalg.norm(h)),
    "glu": lambda h: jax.nn.glu(jnp.concatenate([h, h[::-1]])),
    "fft": lambda h: jnp.abs(jnp.fft.fft(h)),
    "rfft": lambda h: jnp.fft.irfft(jnp.fft.rfft(h) * jnp.array([1.0, 0.5j, -1.0]), n=UNITS),
    "complex": lambda h: (lax.complex(h, h[::-1]) ** 2).real,
    "pad": lambda h: jnp.pad(h, (1, 1), mode="wrap")[:-2] * jnp.pad(h, (1, 0))[:-1],
    "convolve": lambda h: jnp.convolve(h, h, mode="same"),
    "reduce_window": lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (2,), (1,), "SAME") + h,
    "interp": lambda h: jnp.interp(h, jnp.array([-1.0, 0.0, 1.0]), jnp.array([0.3, -0.2, 0.9])),
    "polyval": lambda h: jnp.polyval(jnp.array([0.1, -0.5, 1.0]), h),
    "tril": lambda h: jnp.tril(jnp.outer(h, h)) @ h,
    "triangular_solve": lambda h: jax.scipy.linalg.solve_triangular(
        jnp.diag(2 + jnp.tanh(h)) + jnp.tril(jnp.outer(h, h) * 0.1, -1), h, lower=True
    ),
    "cross": lambda h: jnp.concatenate([jnp.cross(h[:3], jnp.cos(h[1:])), h[:1]]),
    "prod": lambda h: h + h.prod(),
    "one_hot": lambda h: h * jax.nn.one_hot(jnp.argmax(h), UNITS),
    "searchsorted": lambda h: h * (1 + jnp.searchsorted(jnp.array([-0.5, 0.0, 0.5]), h)),
    "stop_gradient": lambda h: h * jax.nn.sigmoid(lax.stop_gradient(h)),
    "straight_through": lambda h: h + lax.stop_gradient(jnp.round(h) - h),
    "special": lambda h: jax.scipy.special.i0e(h) + jax.scipy.special.ndtr(h),
    "digamma": lambda h: jax.scipy.special.digamma(1.5 + jax.nn.sigmoid(h)),
    "map": lambda h: lax.map(lambda u: jnp.sin(u) * u, h),
    "vmap": lambda h: jax.vmap(lambda u, v: u * jnp.tanh(v))(h, h[::-1]),
    "vectorize": lambda h: jnp.vectorize(lambda u: jnp.where(u > 0, u, jnp.expm1(u)))(h),
    "dtype_and_back": lambda h: h * (h > 0).astype(int).astype(h.dtype) + h,
    "optimization_barrier": lambda h: lax.optimization_barrier(h) * 2,
    "named_scope": lambda h: jax.named_scope("inside")(jnp.tanh)(h),
}.items():
    elementwise(name, call)


@operation(W=SQUARE, b=VECTOR)
def linear(p, h, x):
    return p.W @ h + p.b


@operation(W=SQUARE)
def row_times_matrix(p, h, x):
    return h @ p.W


@operation(W=(UNITS, UNITS, INPUTS))
def bilinear(p, h, x):
    return jnp.einsum("oij,i,j->o", p.W, h, x)


@operation(W=SQUARE)
def dot_general(p, h, x):
    return lax.dot_general(p.W, h, (((0,), (0,)), ((), ())))


@operation(W=SQUARE, V=SQUARE)
def chain(p, h, x):
    return jnp.linalg.multi_dot([p.W, p.V, p.W.T, h])


@operation(W=(1, 1, 3))
def convolution(p, h, x):
    return lax.conv_general_dilated(h[None, None], p.W, (1,), "SAME")[0, 0]


@operation(W=SQUARE)
def twice(p, h, x):
    return p.W.T @ jnp.tanh(p.W @ h)


@operation(W=(6, 6))
def sliced(p, h, x):
    return p.W[1:5, 2:] @ h + p.W[0, :4]


@operation(W=SQUARE)
def masked_by_its_size(p, h, x):
    return (p.W * (jnp.abs(p.W) > 0.3)) @ h


@operation(W=SQUARE)
def divided_by_its_norm(p, h, x):
    return p.W / jnp.linalg.norm(p.W) @ h


@operation(W=SQUARE)
def divided_by_its_stopped_norm(p, h, x):
    return p.W / lax.stop_gradient(jnp.linalg.norm(p.W)) @ h


@operation(W=SQUARE)
def partly_stopped(p, h, x):
    return jnp.concatenate([p.W[:2], lax.stop_gradient(p.W[2:])]) @ h


@operation(W=SQUARE)
def rounded_straight_through(p, h, x):
    return (p.W + lax.stop_gradient(jnp.round(2 * p.W) / 2 - p.W)) @ h


@operation(W=SQUARE)
def solved(p, h, x):
    return jnp.linalg.solve(p.W + 3 * jnp.eye(UNITS), h)


@operation(W=SQUARE)
def inverted(p, h, x):
    return jnp.linalg.inv(p.W + 3 * jnp.eye(UNITS)) @ h


@operation(W=SQUARE)
def matrix_exponential(p, h, x):
    return jax.scipy.linalg.expm(p.W - p.W.T) @ h


@operation(W=SQUARE)
def cholesky(p, h, x):
    return jnp.linalg.cholesky(p.W @ p.W.T + jnp.eye(UNITS)) @ h


@operation(W=SQUARE)
def determinant(p, h, x):
    return h * jnp.linalg.det(p.W + 2 * jnp.eye(UNITS)) / 10


@operation(W=SQUARE)
def log_determinant(p, h, x):
    return h * jnp.linalg.slogdet(p.W @ p.W.T + jnp.eye(UNITS))[1]


@operation(W=SQUARE)
def qr(p, h, x):
    return jnp.linalg.qr(p.W + 2 * jnp.eye(UNITS))[0] @ h


@operation(W=SQUARE)
def singular_values(p, h, x):
    return h * jnp.linalg.svd(p.W, compute_uv=False)


@operation(W=SQUARE)
def eigenvalues(p, h, x):
    return h * jnp.linalg.eigvalsh(p.W + p.W.T)


@operation(W=SQUARE, V=SQUARE)
def complex_weight(p, h, x):
    return jnp.abs(lax.complex(p.W, p.V) @ h)


@operation(W=VECTOR)
def filtered(p, h, x):
    return jnp.fft.irfft(jnp.fft.rfft(h) * jnp.fft.rfft(p.W), n=UNITS)


@operation(q=SQUARE, k=SQUARE)
def attention_by_hand(p, h, x):
    tokens = jnp.stack([h, h[::-1], jnp.sin(h)])
    return (jax.nn.softmax((tokens @ p.q) @ (tokens @ p.k).T) @ tokens)[0]


@operation(attention=lambda key: eqx.nn.MultiheadAttention(1, 2, key=key))
def multihead_attention(p, h, x):
    tokens = h.reshape(2, 2)
    return p.attention(tokens, tokens, tokens).reshape(-1)


@operation(layer=lambda key: eqx.nn.MLP(UNITS, UNITS, 5, 1, key=key))
def mlp(p, h, x):
    return p.layer(h)


@operation(inner=lambda key: eqx.nn.GRUCell(INPUTS, UNITS, key=key))
def gru_cell_inside(p, h, x):
    return p.inner(x, h)


@operation(inner=lambda key: eqx.nn.LSTMCell(2, 3, key=key), out=(UNITS, 3))
def lstm_in_a_scan(p, h, x):
    start = (jnp.zeros(3), jnp.zeros(3))
    return p.out @ lax.scan(lambda state, u: (p.inner(u, state), None), start, h.reshape(2, 2))[0][0]


@operation(norm=lambda key: eqx.nn.LayerNorm(UNITS))
def layer_norm(p, h, x):
    return p.norm(h)


@operation(norm=lambda key: eqx.nn.RMSNorm(UNITS))
def rms_norm(p, h, x):
    return p.norm(h)


@operation(norm=lambda key: eqx.nn.GroupNorm(2, UNITS))
def group_norm(p, h, x):
    return p.norm(h)


@operation(relu=lambda key: eqx.nn.PReLU())
def prelu(p, h, x):
    return p.relu(h)


@operation(layer=lambda key: eqx.nn.Conv1d(1, 1, 3, padding=1, key=key))
def convolution_layer(p, h, x):
    return p.layer(h[None])[0]


@operation(layer=lambda key: eqx.nn.WeightNorm(eqx.nn.Linear(UNITS, UNITS, key=key)))
def weight_norm(p, h, x):
    return p.layer(h)


@operation(table=lambda key: eqx.nn.Embedding(5, UNITS, key=key))
def embedding(p, h, x):
    return h + p.table(jnp.clip(jnp.abs(3 * x[0]).astype(int), 0, 4))


@operation(table=(5, UNITS))
def tied_embedding(p, h, x):
    row = p.table[jnp.clip(jnp.abs(3 * x[0]).astype(int), 0, 4)]
    return h + (p.table @ row)[:UNITS]


@operation(dropout=lambda key: eqx.nn.Dropout(0.5, inference=True))
def dropout_in_inference(p, h, x):
    return p.dropout(h)


@operation(b=VECTOR)
def noise_of_a_fixed_key(p, h, x):
    return h * p.b + jax.random.normal(jax.random.key(3), h.shape, h.dtype)


@jax.custom_vjp
def spike(u):
    return (u > 0).astype(u.dtype)


def _spike_backward(u, g):
    s = jax.nn.sigmoid(5 * u)
    return (g * 5 * s * (1 - s),)


spike.defvjp(lambda u: (spike(u), u), _spike_backward)


@jax.custom_vjp
def clamped(u):
    return jnp.clip(u, -0.3, 0.3)


clamped.defvjp(lambda u: (clamped(u), None), lambda _, g: (g,))


@jax.custom_vjp
def reversed_product(W, h):
    return W @ h


reversed_product.defvjp(lambda W, h: (W @ h, (W, h)), lambda kept, g: (jnp.outer(g, kept[1]), -0.5 * kept[0].T @ g))


@jax.custom_jvp
def surrogate(u):
    return jnp.sign(u)


@surrogate.defjvp
def _surrogate_tangent(primals, tangents):
    (u,), (du,) = primals, tangents
    return surrogate(u), du / (1 + u * u)


@operation(W=SQUARE)
def spikes(p, h, x):
    return 0.5 * h + spike(p.W @ h)


@operation(W=SQUARE)
def clamped_straight_through(p, h, x):
    return clamped(p.W @ h)


@operation(W=SQUARE)
def reversed_gradient(p, h, x):
    return reversed_product(p.W, h)


@operation(W=SQUARE)
def spikes_of_a_weight(p, h, x):
    return spike(p.W) @ h


@operation(W=SQUARE)
def custom_jvp(p, h, x):
    return surrogate(p.W @ h)


@operation(W=SQUARE)
def custom_root(p, h, x):
    """y with y + tanh(y) / 2 = W h, by Newton's method in a loop."""

    def solve(f, start):
        return lax.fori_loop(0, 20, lambda _, y: y - f(y) / (1 + 0.5 / jnp.cosh(y) ** 2), start)

    def tangent(g, y):
        return jnp.linalg.solve(jax.jacobian(g)(y), y)

    return lax.custom_root(lambda y: y + 0.5 * jnp.tanh(y) - p.W @ h, h, solve, tangent)


@operation(W=SQUARE)
def custom_linear_solve(p, h, x):
    A = p.W @ p.W.T + jnp.eye(UNITS)
    return lax.custom_linear_solve(lambda y: A @ y, h, lambda _, b: jnp.linalg.solve(A, b), symmetric=True)


@operation(W=SQUARE)
def conjugate_gradients(p, h, x):
    A = p.W @ p.W.T + jnp.eye(UNITS)
    return jax.scipy.sparse.linalg.cg(lambda y: A @ y, h, tol=1e-14, maxiter=50)[0]


@operation(W=SQUARE)
def scan_of_steps(p, h, x):
    return lax.scan(lambda y, s: (jnp.tanh(p.W @ y * s), None), h, jnp.array([1.0, 0.5, -0.5]))[0]


@operation(W=(3, UNITS, UNITS))
def scan_over_weights(p, h, x):
    return lax.scan(lambda y, W: (jnp.tanh(W @ y), None), h, p.W)[0]


@operation(W=SQUARE)
def fori_loop(p, h, x):
    return lax.fori_loop(0, 3, lambda n, y: jnp.tanh(p.W @ y / (n + 1)), h)


@operation(W=SQUARE, one_way=True)
def while_loop(p, h, x):
    return lax.while_loop(lambda y: jnp.linalg.norm(y) > 0.5, lambda y: 0.25 * jnp.tanh(p.W @ y), h)


@operation(W=SQUARE)
def while_loop_of_constants(p, h, x):
    count = lax.while_loop(lambda n: n < 3 * jnp.abs(x[0]), lambda n: n + 1.0, 0.0)
    return jnp.tanh(p.W @ h) * lax.stop_gradient(count)


@operation(W=SQUARE)
def bounded_loop(p, h, x):
    return eqx.internal.while_loop(
        lambda y: jnp.linalg.norm(y) > 0.5, lambda y: 0.5 * jnp.tanh(p.W @ y), h, max_steps=8, kind="checkpointed"
    )


@operation(W=SQUARE, V=SQUARE)
def cond(p, h, x):
    return lax.cond(h[0] > 0, lambda y: p.W @ y, lambda y: jnp.tanh(p.V @ y), h)


@operation(W=(3, UNITS, UNITS))
def switch(p, h, x):
    branches = [lambda y, n=n: jnp.tanh(p.W[n] @ y) * (n + 1) for n in range(3)]
    return lax.switch(jnp.abs(5 * x[0]).astype(int) % 3, branches, h)


@operation(experts=(3, UNITS, UNITS))
def mixture_of_experts(p, h, x):
    return jnp.tanh(p.experts[jnp.abs(5 * x[0]).astype(int) % 3] @ h)


@operation(W=SQUARE)
def gradient_inside(p, h, x):
    return jax.grad(lambda y: (jnp.tanh(p.W @ y) ** 2).sum())(h)


@operation(W=SQUARE)
def jvp_inside(p, h, x):
    return jax.jvp(lambda y: jnp.tanh(p.W @ y), (h,), (jnp.cos(h),))[1]


@operation(W=SQUARE)
def linear_transpose_inside(p, h, x):
    return jax.linear_transpose(lambda y: p.W @ y, h)(h)[0]


@operation(W=SQUARE)
def gate_that_seldom_opens(p, h, x):
    return h + (x[0] > 1.2) * jnp.tanh(p.W @ h)


@operation(W=SQUARE)
def stopped_where_the_gate_opens(p, h, x):
    return p.W @ h + (x[0] > 1.2) * lax.stop_gradient(jnp.tanh(p.W @ h))


@operation(W=SQUARE, V=SQUARE)
def not_used(p, h, x):
    return p.W @ h


@operation(W=SQUARE)
def zero_weight(p, h, x):
    return h + 0 * (p.W @ h)


@operation(W=SQUARE)
def callback_beside(p, h, x):
    shape = jax.ShapeDtypeStruct(h.shape, h.dtype)
    seen = jax.pure_callback(np.sin, shape, lax.stop_gradient(h), vmap_method="expand_dims")
    return p.W @ h + seen


@operation(W=SQUARE)
def debug_callback(p, h, x):
    jax.debug.callback(lambda y: None, h)
    return jnp.tanh(p.W @ h)


@operation(W=SQUARE)
def checked_by_equinox(p, h, x):
    return p.W @ eqx.error_if(h, jnp.isnan(h), "the state is not a number")


@operation(W=SQUARE, refused=True)
def callback(p, h, x):
    shape = jax.ShapeDtypeStruct(h.shape, h.dtype)
    return jax.pure_callback(np.sin, shape, p.W @ h, vmap_method="expand_dims")


# How a layer keeps its weight W: the arrays that it holds, and how W is read off them.


@dataclass(frozen=True)
class Keeping:
    hold: Callable[[Array], Any] = lambda W: W
    read: Callable[[Any], Array] = lambda held: held


class Outside(eqx.Module):
    """An array that a function closes over, which does not learn."""

    function: Callable = eqx.field(static=True)


class Split(eqx.Module):
    """A weight in two parts, one of them a constant."""

    learnt: Array
    fixed: np.ndarray


KEEPING = {
    "plain": Keeping(),
    "in_a_list": Keeping(lambda W: [W], lambda held: held[0]),
    "in_a_dict": Keeping(lambda W: {"w": W}, lambda held: held["w"]),
    "in_a_closure": Keeping(lambda W: Outside(lambda: W), lambda held: held.function()),
    "in_a_partial": Keeping(lambda W: jax.tree_util.Partial(jnp.tanh, W), lambda held: held()),
    "numpy": Keeping(np.asarray, lambda held: jnp.asarray(held)),
    "with_a_constant": Keeping(lambda W: Split(W, 0.5 * np.asarray(W)), lambda held: held.learnt + held.fixed),
    "held_twice": Keeping(lambda W: [W, W], lambda held: held[0] + 0.5 * held[1]),
    "stopped": Keeping(read=lax.stop_gradient),
    "squared": Keeping(read=lambda held: held * jnp.abs(held)),
    "with_integers": Keeping(
        lambda W: (W, jnp.arange(W.shape[0])),
        lambda held: held[0] * (1 + held[1]).reshape(-1, *[1] * (held[0].ndim - 1)),
    ),
    "with_a_key": Keeping(lambda W: (W, jax.random.key(0)), lambda held: held[0]),
    "frozen_by_equinox": Keeping(
        lambda W: eqx.nn.Lambda(jax.tree_util.Partial(lambda v: v, W)), lambda held: held.fn()
    ),
}


HOOKS = ["none"]


def _thrice(layer: Callable, h: Array, x: Array) -> Array:
    return lax.scan(lambda y, _: (jnp.tanh(layer(y, x)), None), h, None, length=3)[0]


CALLS: dict[str, Callable[[Callable, Array, Array], Array]] = {
    "plain": lambda layer, h, x: layer(h, x),
    "residual": lambda layer, h, x: h + layer(h, x),
    "twice": lambda layer, h, x: layer(jnp.tanh(layer(h, x)), x),
    "checkpoint": lambda layer, h, x: jax.checkpoint(lambda h, x: layer(h, x))(h, x),
    "jit": lambda layer, h, x: jax.jit(lambda h, x: layer(h, x))(h, x),
    "filter_jit": lambda layer, h, x: eqx.filter_jit(layer)(h, x),
    "filter_checkpoint": lambda layer, h, x: eqx.filter_checkpoint(layer)(h, x),
    "vmap": lambda layer, h, x: jax.vmap(layer, (0, None))(jnp.stack([h, -h]), x).sum(0),
    "scan": _thrice,
    "cond": lambda layer, h, x: lax.cond(x[1] > 0, lambda y: layer(y, x), jnp.sin, h),
    "gated": lambda layer, h, x: h + (x[1] > 1) * layer(h, x),
    "half_stopped": lambda layer, h, x: 0.5 * (layer(h, x) + layer(lax.stop_gradient(h), x)),
    "stopped_beside": lambda layer, h, x: layer(h, x) + lax.stop_gradient(layer(h, x)),
}


class Layer(eqx.Module):
    """One piece of a model."""

    parts: dict[str, Any]
    piece: Piece = eqx.field(static=True)

    def __init__(self, piece: Piece, key: Array) -> None:
        self.piece, self.parts = piece, {}
        for name, part in OPERATIONS[piece.operation].parts.items():
            key, own = jax.random.split(key)
            made = 0.6 * jax.random.normal(own, part) if isinstance(part, tuple) else part(own)
            self.parts[name] = KEEPING[piece.weight].hold(made) if name == "W" else made

    def __call__(self, h: Array, x: Array) -> Array:
        read = KEEPING[self.piece.weight].read
        parts = {name: read(part) if name == "W" else part for name, part in self.parts.items()}
        return OPERATIONS[self.piece.operation].call(SimpleNamespace(**parts), h, x)


class Body(eqx.Module):
    """The layers one after another."""

    layers: list[Layer]

    def __init__(self, pieces: tuple[Piece, ...], key: Array) -> None:
        self.layers = [Layer(piece, jax.random.fold_in(key, n)) for n, piece in enumerate(pieces)]

    def __call__(self, h: Array, x: Array) -> Array:
        for layer in self.layers:
            h = CALLS[layer.piece.call](layer, h, x)
        return h


EXITS: dict[str, Callable[[Array, Array], Array]] = {
    "tanh": lambda h, z: jnp.tanh(h),
    "leaky": lambda h, z: 0.5 * z + 0.5 * jnp.tanh(h),
    "clamped": lambda h, z: jnp.clip(0.7 * z + h, -1, 1),
}
ENTRIES: dict[str, Callable[[Any, Array, Array], Array]] = {
    "sum": lambda cell, x, z: cell.z(z) + cell.x(x),
    "product": lambda cell, x, z: cell.z(z) * jax.nn.sigmoid(cell.x(x)),
    "only_z": lambda cell, x, z: jnp.tanh(cell.z(z)) + 0.1 * x.sum(),
    "joined": lambda cell, x, z: jnp.concatenate([cell.z.weight, cell.x.weight], 1) @ jnp.concatenate([z, x]),
}


class Cell(eqx.Module):
    """z' = exit(body(W z + U x + b))."""

    z: eqx.nn.Linear
    x: eqx.nn.Linear
    body: Body
    entry: str = eqx.field(static=True)
    exit: str = eqx.field(static=True)
    hidden_size: int = UNITS

    def __init__(self, recipe: Recipe, key: Array) -> None:
        keys = jax.random.split(key, 3)
        self.z, self.x = eqx.nn.Linear(UNITS, UNITS, key=keys[0]), eqx.nn.Linear(INPUTS, UNITS, key=keys[1])
        self.body, self.entry, self.exit = Body(recipe.pieces, keys[2]), recipe.entry, recipe.exit

    def __call__(self, x: Array, z: Array) -> Array:
        return EXITS[self.exit](self.body(ENTRIES[self.entry](self, x, z), x), z)


class PairCell(Cell):
    """A cell with the state (h, c)."""

    def __call__(self, x: Array, z: tuple[Array, Array]) -> tuple[Array, Array]:
        slow = 0.9 * z[1] + 0.1 * z[0][:2]
        return super().__call__(x, z[0]) * jnp.cos(slow.sum()), slow


class SharedCell(eqx.Module):
    """A cell one of whose layers uses the recurrent matrix once more."""

    shared: eqx.nn.Shared

    def __init__(self, recipe: Recipe, key: Array) -> None:
        tied = (Cell(recipe, key), eqx.nn.Linear(UNITS, UNITS, key=key))
        self.shared = eqx.nn.Shared(tied, lambda pair: pair[1].weight, lambda pair: pair[0].z.weight)

    def __call__(self, x: Array, z: Array) -> Array:
        cell, again = self.shared()
        return 0.5 * jnp.tanh(again(z)) + 0.5 * cell(x, z)


def _as_partial(recipe: Recipe, key: Array) -> Callable:
    return jax.tree_util.Partial(lambda cell, x, z: cell(x, z), Cell(recipe, key))


CELL_FORMS: dict[str, Callable[[Recipe, Array], Callable]] = {
    "module": Cell,
    "pair": PairCell,
    "shared": SharedCell,
    "partial": _as_partial,
}


class Net(eqx.Module):
    """x [input], tokens [token] or words [token, input] -> [unit]."""

    entry: Any
    body: Body
    exit: str = eqx.field(static=True)

    def __init__(self, recipe: Recipe, key: Array) -> None:
        keys = jax.random.split(key)
        self.entry = NET_ENTRIES[recipe.entry](keys[0])
        self.body, self.exit = Body(recipe.pieces, keys[1]), recipe.exit

    def __call__(self, x: Array) -> Array:
        entry = self.entry if x.ndim == 1 and jnp.issubdtype(x.dtype, jnp.floating) else jax.vmap(self.entry)
        h = entry(x)
        h = h.sum(0) if h.ndim == 2 else h
        features = x.reshape(-1)[:INPUTS].astype(h.dtype)
        return EXITS[self.exit](self.body(h, features), h)


NET_ENTRIES: dict[str, Callable[[Array], Any]] = {
    "sum": lambda key: eqx.nn.Linear(INPUTS, UNITS, key=key),
    "tokens": lambda key: eqx.nn.Embedding(6, UNITS, key=key),
    "words": lambda key: eqx.nn.Linear(INPUTS, UNITS, key=key),
}


class Field(eqx.Module):
    """z' = body(W z + b, (cos t, t, 1)) - z."""

    z: eqx.nn.Linear
    body: Body
    exit: str = eqx.field(static=True)

    def __init__(self, recipe: Recipe, key: Array) -> None:
        keys = jax.random.split(key)
        self.z, self.body, self.exit = (
            eqx.nn.Linear(UNITS, UNITS, key=keys[0]),
            Body(recipe.pieces, keys[1]),
            recipe.exit,
        )

    def __call__(self, t: Array, z: Array) -> Array:
        x = jnp.stack([jnp.cos(3 * t), t, jnp.ones_like(t)])
        return EXITS[self.exit](self.body(self.z(z), x), z) - z


def is_refused(recipe: Recipe) -> bool:
    """Whether the model has no derivative."""
    return any(OPERATIONS[piece.operation].refused for piece in recipe.pieces)


def is_one_way(recipe: Recipe) -> bool:
    """Whether the model has forward mode alone."""
    return any(OPERATIONS[piece.operation].one_way for piece in recipe.pieces)
