"""Models of JAX that other people write are traced, and right: against reverse mode through the model itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.tree_util import Partial
from jax_registry import states_of
from synthetic import assert_close

import kpflow_dyn as kp

pytestmark = pytest.mark.usefixtures("x64")

TRIALS, TIMES, INPUTS, UNITS = 2, 3, 3, 4
Parameters = dict[str, jax.Array]
Step = Callable[[Parameters, jax.Array, jax.Array], jax.Array]


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(0.5 * np.random.default_rng(len(shape)).standard_normal(shape))


def weights() -> Parameters:
    return {"W": normal(UNITS, UNITS), "U": normal(UNITS, INPUTS)}


def check_cell(cell: Callable, z0: jax.Array | None = None) -> kp.Flow:
    """That the cell is traced, and that J* is what reverse mode through it says."""
    problem = kp.DiscreteProblem(cell, normal(TRIALS, TIMES, INPUTS), normal(TRIALS, UNITS) if z0 is None else z0)
    flow = kp.linearize(kp.solve(problem))
    assert flow.untraced == ""
    q = normal(*flow.J.codomain.shape)
    pull = jax.vjp(states_of(problem), flow.parameters)[1]
    found, expected = flow.as_parameters(flow.J.T.mv(q)), pull(q)[0]
    for name, gradient in expected.items():
        assert_close(found[name], gradient)
    return flow


@jax.custom_jvp
def product_and_sum(w: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    return w @ z, (w * z).sum()


@product_and_sum.defjvp
def _tangent(primals: tuple, tangents: tuple) -> tuple:
    """Twice the derivative of the sum in w."""
    (w, z), (dw, dz) = primals, tangents
    return product_and_sum(w, z), (dw @ z + w @ dz, 2 * (dw * z).sum() + (w * dz).sum())


@jax.custom_vjp
def surrogate(w: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (w @ z > 0).astype(z.dtype), w @ z


def _pulled(saved: tuple, cotangents: tuple) -> tuple:
    w, z = saved
    c = cotangents[0] / (1 + jnp.square(w @ z)) + cotangents[1]
    return jnp.outer(c, z), w.T @ c


surrogate.defvjp(lambda w, z: (surrogate(w, z), (w, z)), _pulled)


def branches(p: Parameters, x: jax.Array, z: jax.Array) -> jax.Array:
    tanh, other = (lambda z: (jnp.tanh(p["W"] @ z), z)), (lambda z: (z, p["U"] @ x))
    a, b = lax.cond(x[0] > 0, tanh, other, z)
    return a * b + 0.5 * a


def forward_rule(p: Parameters, x: jax.Array, z: jax.Array) -> jax.Array:
    a, b = product_and_sum(p["W"], z)
    return jnp.tanh(a * b + p["U"] @ x)


def reverse_rule(p: Parameters, x: jax.Array, z: jax.Array) -> jax.Array:
    spikes, v = surrogate(p["W"], z)
    return spikes + jnp.tanh(v) + p["U"] @ x


def factors_of_weight_and_state(p: Parameters, x: jax.Array, z: jax.Array) -> jax.Array:
    """Floats and integers: the factors and the order of their rows."""
    factors, _, order = lax.linalg.lu(p["W"] * z + 3 * jnp.eye(UNITS)[::-1])
    return jnp.tanh(factors @ z[order] / 3 + p["U"] @ x)


def largest(p: Parameters, x: jax.Array, z: jax.Array) -> jax.Array:
    """The largest of the sums of weight and state, and which they are."""
    values, which = lax.top_k(p["W"][0] + z, 2)
    return jnp.tanh((p["W"] @ z).at[which].add(values) + p["U"] @ x)


@pytest.mark.parametrize("step", [branches, forward_rule, reverse_rule, factors_of_weight_and_state, largest])
def test_operations_with_several_results(step: Step):
    check_cell(Partial(step, weights()))


@jax.custom_vjp
def sine(u: jax.Array) -> jax.Array:
    return jax.pure_callback(np.sin, u, u, vmap_method="sequential")


sine.defvjp(lambda u: (sine(u), u), lambda u, g: (g * jnp.cos(u),))


def of_numpy(p: Parameters, x: jax.Array, z: jax.Array) -> jax.Array:
    return sine(p["W"] @ z) + p["U"] @ x


def checked(p: Parameters, x: jax.Array, z: jax.Array) -> jax.Array:
    z = eqx.error_if(z, jnp.isnan(z), "the state is not a number")
    return jnp.tanh(p["W"] @ z + p["U"] @ x)


@pytest.mark.parametrize("step", [of_numpy, checked])
def test_what_runs_outside_of_jax_with_a_derivative_of_its_own(step: Step):
    check_cell(Partial(step, weights()))


def in_dtype(model: Callable, dtype: str) -> Callable:
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, model)


@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.slow), "bfloat16"])
def test_half_precision_has_states_in_it_and_operators_in_single(dtype: str):
    """The derivatives are those of the same model with its numbers in float32."""
    network = in_dtype(eqx.nn.MLP(INPUTS, 2, 5, 1, jnp.tanh, key=jax.random.key(0)), dtype)
    x = normal(TRIALS, INPUTS).astype(dtype)
    solution = kp.solve(kp.StaticProblem(network, x, state=""))
    flow = kp.linearize(solution)
    assert solution.state.dtype == dtype
    assert flow.untraced == ""
    q = normal(TRIALS, 2).astype("float32")
    single, fixed = eqx.partition(in_dtype(network, "float32"), eqx.is_array)
    expected = jax.vjp(lambda p: jax.vmap(eqx.combine(p, fixed))(x.astype("float32")), single)[1](q)[0]
    found = flow.as_parameters(flow.J.T.mv(q))
    assert_close(found["layers[0].weight"], expected.layers[0].weight, "float32")
    assert_close(found["layers[1].bias"], expected.layers[1].bias, "float32")


def test_a_cell_in_half_precision():
    cell = in_dtype(Partial(branches, weights()), "bfloat16")
    x, z0 = normal(TRIALS, TIMES, INPUTS), normal(TRIALS, UNITS)
    problem = kp.DiscreteProblem(cell, x.astype("bfloat16"), z0.astype("bfloat16"))
    solution = kp.solve(problem)
    flow, q = kp.linearize(solution), normal(TRIALS, TIMES, UNITS).astype("float32")
    assert (solution.state.dtype, flow.ntk.mv(q).dtype, flow.untraced) == ("bfloat16", "float32", "")
    expected = jax.vjp(states_of(flow.solution.problem), flow.parameters)[1](q)[0]
    assert_close(flow.as_parameters(flow.J.T.mv(q))["[0]['W']"], expected["[0]['W']"], "float32")


def channels_last(p: Parameters, x: jax.Array) -> jax.Array:
    """A convolution as flax and haiku have it: [batch, ..., in] with a kernel [..., in, out]."""
    layout = ("NWC", "WIO", "NWC")
    h = lax.conv_general_dilated(x[None], p["kernel"], (2,), "SAME", dimension_numbers=layout)
    return jnp.tanh(h[0] + p["bias"])


def test_a_convolution_with_channels_last_is_a_weight_site():
    """Its spectrum is that of its patches, so that the one of its core follows from them."""
    parameters = {"kernel": normal(3, INPUTS, 2), "bias": normal(2)}
    x = normal(TRIALS, 5, INPUTS)
    flow = kp.linearize(kp.solve(kp.StaticProblem(Partial(channels_last, parameters), x, state="")))
    assert flow.untraced == ""
    assert [site.kind for site in flow.sites] == ["matrix", "scale"]
    q = normal(*flow.J.codomain.shape)
    expected = jax.vjp(lambda p: jax.vmap(lambda x: channels_last(p, x))(x), parameters)[1](q)[0]
    found = flow.as_parameters(flow.J.T.mv(q))
    assert_close(found["[0]['kernel']"], expected["kernel"])
    assert_close(found["[0]['bias']"], expected["bias"])
    patches = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    rows = jnp.concatenate([patches[:, 2 * i : 2 * i + 3].reshape(TRIALS, -1) for i in range(3)])
    assert_close(flow.sites[0].gram_eigenvalues(), np.linalg.eigvalsh(rows.T @ rows)[::-1])


def reference(p: Parameters, x: jax.Array, z: jax.Array) -> jax.Array:
    """Writes in place, into an array of its own."""
    kept = jax.new_ref(z)
    kept[0] = jnp.tanh(p["W"][0] @ z)

    def write(k: jax.Array, carry: None) -> None:
        kept[k] = jnp.tanh(p["W"][k] @ kept[...])
        return carry

    lax.fori_loop(1, UNITS, write, None)
    return kept[...] + p["U"] @ x


@jax.custom_batching.custom_vmap
def batched(W: jax.Array, z: jax.Array) -> jax.Array:
    return jnp.tanh(W @ z)


@batched.def_vmap
def _rows(_count: int, mapped: list[bool], W: jax.Array, z: jax.Array) -> tuple[jax.Array, bool]:
    return jnp.tanh(jnp.einsum("bij,bj->bi" if mapped[0] else "ij,bj->bi", W, z)), True


def own_batching(p: Parameters, x: jax.Array, z: jax.Array) -> jax.Array:
    return batched(p["W"], z) + p["U"] @ x


def own_solver(p: Parameters, x: jax.Array, z: jax.Array) -> jax.Array:
    """A linear solve whose matrix and solvers close over a weight."""
    M = p["W"] + 3 * jnp.eye(UNITS)
    solved = lax.custom_linear_solve(
        lambda v: M @ v, z, lambda _, b: jnp.linalg.solve(M, b), lambda _, b: jnp.linalg.solve(M.T, b)
    )
    return solved + p["U"] @ x


@jax.custom_vjp
def looped(W: jax.Array, z: jax.Array) -> jax.Array:
    """z -> tanh(W z) by loops, of which JAX transposes none."""
    return lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, jnp.tanh(W @ c[1])), (0, z))[1]


def _looped_back(saved: tuple, q: jax.Array) -> tuple:
    W, z = saved

    def back(carry: tuple) -> tuple:
        n, q, dW = carry
        q = q * (1 - jnp.tanh(W @ z) ** 2)
        return n - 1, q @ W, dW + jnp.outer(q, z)

    _, dz, dW = lax.while_loop(lambda c: c[0] > 0, back, (1, q, jnp.zeros_like(W)))
    return dW, dz


looped.defvjp(lambda W, z: (looped(W, z), (W, z)), _looped_back)


@jax.custom_vjp
def scaled(W: jax.Array, z: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * (W @ z)


def _scaled(W: Any, z: Any, scale: Any) -> tuple:
    assert not scale.perturbed, "no derivative in the scale"
    return scaled(W.value, z.value, scale.value), (W.value, z.value, scale.value)


def _scaled_back(saved: tuple, q: jax.Array) -> tuple:
    W, z, scale = saved
    return scale * jnp.outer(q, z), scale * (W.T @ q), jnp.zeros_like(scale)


scaled.defvjp(_scaled, _scaled_back, symbolic_zeros=True)


def loop_with_a_reverse_mode(p: Parameters, x: jax.Array, z: jax.Array) -> jax.Array:
    return looped(p["W"], z) + p["U"] @ x


def no_derivative_in_an_argument(p: Parameters, x: jax.Array, z: jax.Array) -> jax.Array:
    return jnp.tanh(scaled(p["W"], z, jnp.array(0.5))) + p["U"] @ x


@pytest.mark.parametrize(
    "step", [reference, own_batching, own_solver, loop_with_a_reverse_mode, no_derivative_in_an_argument]
)
def test_operations_that_jax_derives_or_maps_in_a_way_of_their_own(step: Step):
    check_cell(Partial(step, weights()))


def of_rows(p: Parameters, _x: jax.Array, z: jax.Array) -> jax.Array:
    """What JAX maps over rows of its first operand alone."""
    return lax.ragged_dot(z.reshape(2, 2), p["W"].reshape(4, 2, 2)[:2], jnp.array([1, 1])).ravel()


def test_what_cannot_be_mapped_over_trials_is_refused_in_words():
    cell = Partial(of_rows, weights())
    with pytest.raises(ValueError, match=r"cell failed.*cannot map it over trials"):
        kp.solve(kp.DiscreteProblem(cell, normal(TRIALS, TIMES, INPUTS), normal(TRIALS, UNITS)))
    net = Partial(lambda p, z: of_rows(p, z, z), weights())
    with pytest.raises(ValueError, match=r"network failed.*cannot map it over trials"):
        kp.solve(kp.StaticProblem(net, normal(TRIALS, UNITS), state=""))
