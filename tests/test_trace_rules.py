"""Operations from outside the package: `add_rule` says what they do, and they are traced like the package's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from torch import Tensor, nn
from torch.func import functional_call

import kpflow_dyn as kp
from kpflow_dyn.tracing import Role, add_rule
from kpflow_dyn.tracing._rules import RULES


@pytest.fixture(autouse=True)
def rules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rules that end with a test."""
    kept = dict(RULES)
    yield
    RULES.clear()
    RULES.update(kept)


@torch.library.custom_op("kpflow_tests::soft", mutates_args=())
def soft(x: Tensor, sharpness: Tensor) -> Tensor:
    """A pointwise operation whose derivatives are its own."""
    return torch.tanh(sharpness * x)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, sharpness = ctx.saved_tensors
    slope = grad * (1 - torch.tanh(sharpness * x) ** 2)
    return slope * sharpness, (slope * x).sum(0)


soft.register_fake(lambda x, sharpness: torch.empty_like(x))
soft.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

LIBRARY = torch.library.Library("kpflow_tests", "FRAGMENT")
LIBRARY.define("smooth(Tensor z) -> Tensor")
LIBRARY.impl("smooth", lambda z: z.cumsum(-1).flip(-1) / z.shape[-1], "CompositeImplicitAutograd")


class Soft(nn.Module):
    """z' = soft(W z + U x, s) + smooth(z) / 2."""

    hidden_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.W, self.U = nn.Linear(4, 4), nn.Linear(3, 4, bias=False)
        self.sharpness = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return soft(self.W(z) + self.U(x), self.sharpness) + torch.ops.kpflow_tests.smooth(z) / 2


def problem() -> kp.DiscreteProblem:
    torch.manual_seed(0)
    return kp.DiscreteProblem(Soft().double(), torch.randn(2, 4, 3, dtype=torch.float64))


def dense_jacobian(flow: kp.Flow) -> Tensor:
    """By reverse mode through the operation itself."""
    cell, x = flow.solution.problem.cell, flow.solution.problem.x

    def states(*values: Tensor) -> Tensor:
        z, named, found = torch.zeros(2, 4, dtype=torch.float64), dict(zip(flow.parameters, values, strict=True)), []
        for x_t in x.unbind(1):
            z = functional_call(cell, named, (x_t, z))
            found.append(z)
        return torch.stack(found, 1)

    parts = torch.autograd.functional.jacobian(states, tuple(flow.parameters.values()))
    return torch.cat([part.reshape(x.shape[0] * x.shape[1] * 4, -1) for part in parts], 1)


def test_an_operation_of_torch_library_is_a_scale_and_a_linear_map() -> None:
    add_rule(soft, Role.POINTWISE, lambda x, sharpness: torch.tanh(sharpness * x))
    add_rule(torch.ops.kpflow_tests.smooth, Role.REDUCE)
    flow = kp.linearize(kp.solve(problem()))
    assert {site.name: site.kind for site in flow.sites} == {
        "W.weight + U.weight + W.bias": "matrix",
        "sharpness": "scale",
    }
    J = dense_jacobian(flow)
    assert float((flow.J.dense() - J).abs().max()) < 1e-12
    assert float(((flow.P @ flow.B @ flow.core @ flow.B.T @ flow.P.T).dense() - J @ J.T).abs().max()) < 1e-12
    assert flow.core.spectrum() is not None


def test_a_new_rule_makes_a_new_trace() -> None:
    add_rule(soft, Role.OTHER, lambda x, sharpness: torch.tanh(sharpness * x))
    assert {site.kind for site in kp.linearize(kp.solve(problem())).sites} == {"matrix", "opaque"}
    add_rule(soft, Role.POINTWISE, lambda x, sharpness: torch.tanh(sharpness * x))
    assert {site.kind for site in kp.linearize(kp.solve(problem())).sites} == {"matrix", "scale"}


def test_a_wrong_promise_is_noticed() -> None:
    add_rule(soft, Role.POINTWISE, lambda x, sharpness: torch.tanh(sharpness * x).flip(-1))
    with pytest.warns(kp.UntracedWarning, match="the trace is not the model"):
        kp.linearize(kp.solve(problem()))


cube = Primitive("kpflow_tests_cube")  # x^3 w, element by element
cube.def_impl(lambda x, w: x**3 * w)
cube.def_abstract_eval(lambda x, w: x)
ad.defjvp(cube, lambda t, x, w: 3 * x**2 * w * t, lambda t, x, w: x**3 * t)
mlir.register_lowering(cube, mlir.lower_fun(lambda x, w: x**3 * w, multiple_results=False))
batching.defbroadcasting(cube)


class Cubic(eqx.Module):
    """z' = tanh(W z + U x) + x^3 w / 9 of its product."""

    W: jax.Array
    w: jax.Array

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.tanh(self.W @ jnp.concatenate([z, x])) + cube.bind(z, self.w) / 9


@pytest.mark.usefixtures("x64")
def test_a_primitive_of_jax_is_a_scale() -> None:
    first, second = jax.random.split(jax.random.key(0))
    cell = Cubic(jax.random.normal(first, (4, 7)) / 3, jnp.ones(4))
    x = jax.random.normal(second, (2, 4, 3))

    def linearized() -> kp.Flow:
        return kp.linearize(kp.solve(kp.DiscreteProblem(cell, x, z0=jnp.ones((2, 4)) / 2)))

    assert {site.name: site.kind for site in linearized().sites} == {"W": "matrix", "w": "opaque"}
    add_rule(cube, Role.POINTWISE)
    flow = linearized()
    assert {site.name: site.kind for site in flow.sites} == {"W": "matrix", "w": "scale"}

    def states(cell: Cubic) -> jax.Array:
        z, found = jnp.ones((2, 4)) / 2, []
        for x_t in x.swapaxes(0, 1):
            z = jax.vmap(cell)(x_t, z)
            found.append(z)
        return jnp.stack(found, 1)

    of = jax.jacrev(states)(cell)
    J = np.concatenate([np.reshape(of.W, (32, -1)), np.reshape(of.w, (32, -1))], 1)
    assert np.abs(flow.J.dense() - J).max() < 1e-12
    assert np.abs((flow.P @ flow.B @ flow.core @ flow.B.T @ flow.P.T).dense() - J @ J.T).max() < 1e-12


@pytest.mark.parametrize(
    ("op", "role", "error", "message"),
    [
        (torch.tanh, Role.POINTWISE, TypeError, "no operation that can be traced"),
        (soft, "pointwise", TypeError, "expected a kpflow_dyn.tracing.Role"),
        (soft, Role.STATE, ValueError, "the role of a value"),
    ],
)
def test_bad_rules(op: Any, role: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        add_rule(op, role)
