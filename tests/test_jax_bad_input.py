"""What a JAX user can get wrong in discrete time, and what they are told."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import kpflow_dyn as kp
from kpflow_dyn._jax.checks import named_parameters, with_parameters

X = np.random.default_rng(0).standard_normal((2, 5, 3)).astype("float32")


class Cell(eqx.Module):
    """step(W, x, z) as a cell of four units."""

    W: jax.Array
    step: Callable = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True, default=4)

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return self.step(self.W, x, z)


def cell_of(step: Callable, **sizes: Any) -> Cell:
    return Cell(jax.random.normal(jax.random.key(1), (4, 4)) / 2, step, **sizes)


def gru(key: int = 0) -> eqx.nn.GRUCell:
    return eqx.nn.GRUCell(3, 4, key=jax.random.key(key))


def solve(cell: Any, x: Any = None, z0: Any = None) -> kp.Solution:
    return kp.solve(kp.DiscreteProblem(cell, jnp.asarray(X) if x is None else x, z0))


def test_shapes_of_the_input() -> None:
    with pytest.raises(ValueError, match=r"\[trial, time, input\].*x\[None\]"):
        solve(gru(), jnp.ones((5, 3)))
    with pytest.raises(ValueError, match=r"2 input channels, but the cell takes 3"):
        solve(gru(), jnp.ones((2, 5, 2)))
    with pytest.raises(ValueError, match=r"0 input channels, but the cell takes 3"):
        solve(gru(), jnp.ones((2, 5, 0)))
    for shape in ((0, 5, 3), (2, 0, 3)):
        with pytest.raises(ValueError, match=r"needs a trial and a time"):
            solve(gru(), jnp.ones(shape))
    with pytest.raises(TypeError, match=r"x is list"):
        solve(gru(), [[1.0]])
    with pytest.raises(TypeError, match=r"x is int32, expected float32 or float64"):
        solve(gru(), jnp.ones((2, 5, 3), "int32"))


def test_double_precision_data_are_never_rounded_silently() -> None:
    with pytest.raises(TypeError, match=r"x is float64.*jax_enable_x64.*astype\('float32'\)"):
        solve(gru(), X.astype("float64"))
    with pytest.raises(TypeError, match=r"z0 is float64.*jax_enable_x64"):
        solve(gru(), z0=np.zeros((2, 4)))


def test_initial_states() -> None:
    with pytest.raises(ValueError, match=r"z0 has shape \(3, 4\), expected .*\[2, 4\]"):
        solve(gru(), z0=jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"z0 holds NaN"):
        solve(gru(), z0=jnp.full((2, 4), jnp.nan))
    with pytest.raises(TypeError, match=r"z0 is float, expected a jax array"):
        solve(gru(), z0=[0.0, 1.0])
    with pytest.raises(ValueError, match=r"the same trials"):
        solve(eqx.nn.LSTMCell(3, 4, key=jax.random.key(0)), z0=(jnp.zeros((2, 4)), jnp.zeros((1, 4))))
    with pytest.raises(ValueError, match=r"hidden_size.*pass z0"):
        solve(cell_of(lambda W, x, z: jnp.tanh(W @ z), hidden_size=None))


def test_parameters_must_be_passed() -> None:
    W = jnp.eye(4)
    with pytest.raises(TypeError, match=r"closes over cannot be told from constants.*tree_util\.Partial"):
        solve(lambda x, z: jnp.tanh(W @ z), z0=jnp.zeros(4))
    with pytest.raises(TypeError, match=r"the model is float, expected a callable such as an equinox module"):
        solve(3.0)
    with pytest.raises(TypeError, match=r"the model is a torch module, but the data are jax arrays"):
        solve(torch.nn.GRUCell(3, 4))


def test_parameters_are_named_by_their_path() -> None:
    assert list(named_parameters(eqx.nn.MLP(2, 2, 3, 1, key=jax.random.key(0)))) == [
        *("layers[0].weight", "layers[0].bias", "layers[1].weight", "layers[1].bias")
    ]
    given = jax.tree_util.Partial(lambda p, x, z, W: z, {"b": jnp.ones(2)}, W=jnp.ones(2))
    assert list(named_parameters(given)) == ["[0]['b']", "['W']"]
    values = {name: 2 * value for name, value in named_parameters(given).items()}
    assert named_parameters(with_parameters(given, values))["['W']"][0] == 2


def test_what_a_cell_returns() -> None:
    with pytest.raises(ValueError, match=r"returned \(3,\) of float32, expected the next state \(4,\) of float32"):
        solve(cell_of(lambda W, x, z: jnp.tanh(W @ z)[:3]))
    with pytest.raises(ValueError, match=r"returned tuple, expected the next state"):
        solve(cell_of(lambda W, x, z: (z, z)))
    with pytest.raises(ValueError, match=r"called on one trial, as cell\(x_t, z\)"):
        solve(cell_of(lambda W, x, z: jnp.tanh(W @ z.T @ jnp.ones((2, 4)))))


def test_numbers_that_are_not_finite_name_the_first_step() -> None:
    x = X.copy()
    x[1, 3, 0] = np.nan
    with pytest.raises(ValueError, match=r"x holds NaN or inf, first at step 3 \(trial 1\)"):
        solve(gru(), x)
    with pytest.raises(ValueError, match=r"the state holds NaN or inf, first at step"):
        solve(cell_of(lambda W, x, z: (z + 1 + x[0] ** 2) ** 5 + 0 * W[0]))
    with pytest.raises(ValueError, match=r"parameter weight_hh holds NaN"):
        solve(eqx.tree_at(lambda c: c.weight_hh, gru(), replace_fn=lambda a: a.at[0, 0].set(jnp.nan)))
    with pytest.raises(ValueError, match=r"the derivative of the step holds NaN or inf"):
        kp.linearize(solve(cell_of(lambda W, x, z: jnp.sqrt(abs(W @ z)))))


def test_branches_on_values_and_side_effects() -> None:
    with pytest.raises(Exception, match=r"jnp\.where|boolean"):
        kp.linearize(solve(cell_of(lambda W, x, z: W @ z if z[0] > 0 else z)))
    noisy = cell_of(lambda W, x, z: jax.pure_callback(np.sin, z, W @ z, vmap_method="sequential"))
    with pytest.raises(ValueError, match=r"not differentiate the model: Pure callbacks.*custom_vjp"):
        kp.linearize(solve(noisy))


def test_another_model_than_the_one_that_was_solved() -> None:
    solution = solve(gru())
    other = dataclasses.replace(solution, problem=solution.problem.remake(cell=gru(1)))
    with pytest.raises(ValueError, match=r"differs from the solved states.*solve again"):
        kp.linearize(other)


def test_parameters_that_learn() -> None:
    solution = solve(gru())
    with pytest.raises(ValueError, match=r"weight_hx"):
        kp.linearize(solution, params=["weight_hx"])


def test_probes_of_the_wrong_shape_dtype_or_library() -> None:
    flow = kp.linearize(solve(gru()))
    with pytest.raises(ValueError, match=r"q has shape \(2, 5, 3\), expected .* \[\.\.\., 2, 5, 4\]"):
        flow.ntk.mv(jnp.ones((2, 5, 3)))
    with pytest.raises(TypeError, match=r"torch|jax"):
        flow.ntk.mv(torch.ones(2, 5, 4))


def test_dtypes_must_agree(x64: None) -> None:
    """The last of the module: from here on JAX is in double precision."""
    with pytest.raises(TypeError, match=r"parameter .* is float64 but the data are float32"):
        solve(gru())
    single = jax.tree.map(lambda a: a.astype("float32") if eqx.is_inexact_array(a) else a, gru())
    with pytest.raises(TypeError, match=r"z0 is float64, x is float32"):
        solve(single, z0=jnp.zeros((2, 4)))
