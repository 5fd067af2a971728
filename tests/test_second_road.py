"""Flows of models without a trace: autograd alone gives what the traced road gives, and the dense Jacobian."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import equinox as eqx
import jax
import jax.numpy as jnp
import jax_registry
import numpy as np
import pytest
import registry
import test_jax_ode_flow
import test_ode_flow
import torch
from conftest import cases
from jax import lax
from jax.experimental import checkify
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._jax import model as jax_model
from kpflow_dyn._jax.checks import named_parameters
from kpflow_dyn._torch import model as torch_model

pytestmark = pytest.mark.usefixtures("x64")


@contextmanager
def no_traces() -> Iterator[None]:
    """As if no model could be traced."""
    error = ValueError("traces are switched off")
    both = [mock.patch.object(backend.Model, "tangents", side_effect=error) for backend in (jax_model, torch_model)]
    with both[0], both[1]:
        yield


def untraced(solution: kp.Solution, **options: Any) -> kp.Flow:
    with no_traces(), pytest.warns(kp.UntracedWarning, match="traces are switched off"):
        flow = kp.linearize(solution, **options)
    assert flow.untraced and flow.sites == []
    return flow


def relative(a: Any, b: Any) -> float:
    a, b = to_numpy(a), to_numpy(b)
    assert a.shape == b.shape
    return float(abs(a - b).max() / max(abs(b).max(), 1e-300))


def assert_same(flow: kp.Flow, traced: kp.Flow, names: tuple[str, ...] = ("J", "ntk", "P", "K")) -> None:
    for name in names:
        assert relative(getattr(flow, name).dense(), getattr(traced, name).dense()) < 1e-10, name
        assert kp.check_adjoint(getattr(flow, name), seed=3) < 1e-11, name


def check_steps(flow: kp.Flow, reference: Any) -> None:
    """J, ntk, P and K of a discrete flow, and its identities, against reverse mode through the model."""
    J, S = (to_numpy(matrix(flow)) for matrix in (reference.dense_jacobian, reference.dense_steps))
    P = np.linalg.inv(S)
    assert relative(flow.J.dense(), J) < 1e-10
    assert relative(flow.ntk.dense(), J @ J.T) < 1e-10
    assert relative(flow.P.dense(), P) < 1e-10
    assert relative(flow.K.dense(), S @ J @ J.T @ S.T) < 1e-10
    assert relative((flow.P @ flow.K @ flow.P.T).dense(), J @ J.T) < 1e-10
    assert relative(flow.P.inv.dense(), S) < 1e-10


@pytest.mark.parametrize("name", cases(jax_registry.MODELS, {"tanh_rnn", "pair_state"}))
def test_jax_cells(name: str) -> None:
    solution = kp.solve(jax_registry.MODELS[name].problem(True))
    flow = untraced(solution)
    check_steps(flow, jax_registry)
    assert_same(flow, kp.linearize(solution))


QUICK_CELLS = {"gru_cell", "lstm", "pair_state", "embedding", "attending", "computed_weight", "reservoir"}


@pytest.mark.parametrize("name", cases(registry.MODELS, QUICK_CELLS))
def test_torch_cells(name: str) -> None:
    solution = kp.solve(registry.MODELS[name].problem(True))
    flow = untraced(solution)
    check_steps(flow, registry)
    assert_same(flow, kp.linearize(solution))


@pytest.mark.parametrize("name", cases(test_jax_ode_flow.FIELDS, {"euler"}))
def test_jax_fields(name: str) -> None:
    check_field(test_jax_ode_flow.FIELDS[name])


QUICK = {"driven_rk4", "drift"}


@pytest.mark.parametrize("name", cases(test_ode_flow.FIELDS, QUICK))
def test_torch_fields(name: str) -> None:
    check_field(test_ode_flow.FIELDS[name])


def check_field(case: Any) -> None:
    solution = kp.solve(case.problem(), case.alg, **case.options)
    flow, traced = untraced(solution), kp.linearize(solution)
    assert_same(flow, traced)
    assert_same(flow.nodal, traced.nodal)
    nodal = flow.nodal
    assert relative((nodal.P @ nodal.K @ nodal.P.T).dense(), nodal.ntk.dense()) < 1e-10


# Cells of JAX, each with what it may be told of: nothing where it is traced as well


@jax.custom_vjp
def spike(u: jax.Array) -> jax.Array:
    return (u > 0).astype(u.dtype)


spike.defvjp(lambda u: (spike(u), u), lambda u, g: (5 * g * jax.nn.sigmoid(5 * u) * jax.nn.sigmoid(-5 * u),))


@jax.custom_jvp
def rounded(u: jax.Array) -> jax.Array:
    return jnp.round(u)


rounded.defjvp(lambda u, du: (jnp.round(u[0]), du[0]))


@jax.custom_vjp
def called_back(u: jax.Array) -> jax.Array:
    return jax.pure_callback(np.sin, u, u, vmap_method="sequential")


called_back.defvjp(lambda u: (called_back(u), u), lambda u, g: (g * jnp.cos(u),))


@jax.custom_vjp
def signed(u: jax.Array) -> jax.Array:
    return jnp.tanh(u)


signed.defvjp(lambda u: (signed(u), u), lambda u, g: (jnp.sign(g),))


def halved(W: jax.Array, z: jax.Array) -> jax.Array:
    """As often as the state needs: JAX has no reverse mode of it."""
    return lax.while_loop(lambda s: (s**2).sum() > 0.1, lambda s: 0.5 * jnp.tanh(W @ s), z)


def solved(W: jax.Array, x: jax.Array, z: jax.Array) -> jax.Array:
    import diffrax

    term = diffrax.ODETerm(lambda t, y, _: jnp.tanh(W @ y + x) - y)
    return diffrax.diffeqsolve(term, diffrax.Heun(), 0.0, 0.5, 0.25, z).ys[0]


def rooted(W: jax.Array, x: jax.Array, z: jax.Array) -> jax.Array:
    import optimistix

    iteration = optimistix.FixedPointIteration(1e-13, 1e-13)
    return optimistix.fixed_point(lambda y, _: 0.3 * jnp.tanh(W @ y + x + z), iteration, z).value


def noisy(W: jax.Array, x: jax.Array, z: jax.Array) -> jax.Array:
    return jnp.tanh(W @ z + x) + 0.1 * z * jax.random.normal(jax.random.key(1), z.shape)


CELLS = {
    "surrogate": lambda W, x, z: 0.9 * z + W @ spike(z - 0.1) + x,
    "straight_through": lambda W, x, z: jnp.tanh(W @ rounded(3 * z) / 3 + x),
    "cond": lambda W, x, z: lax.cond(x[0] > 0, lambda: jnp.tanh(W @ z + x), lambda: jnp.sin(W @ z) - x),
    "switch": lambda W, x, z: lax.switch((x[0] > 0).astype(int), [lambda: jnp.tanh(W @ z + x), lambda: z * W[0]]),
    "while_loop": lambda W, x, z: halved(W, jnp.tanh(W @ z + x)),
    "fori_loop": lambda W, x, z: lax.fori_loop(0, 3, lambda i, s: jnp.tanh(W @ s + x), z),
    "solver": solved,
    "root": rooted,
    "error_if": lambda W, x, z: eqx.error_if(jnp.tanh(W @ z + x), jnp.isnan(z).any(), "a state is NaN"),
    "stop_gradient": lambda W, x, z: jnp.tanh(lax.stop_gradient(W) @ z + W @ x),
    "callback": lambda W, x, z: called_back(W @ z + x),
    "fixed_key": noisy,
    "solve": lambda W, x, z: jnp.linalg.solve(4 * jnp.eye(3) + W @ W.T, jnp.tanh(z) + x),
    "eigh": lambda W, x, z: 0.2 * jnp.linalg.eigh(W + W.T + jnp.diag(z))[0] + x,
    "complex": lambda W, x, z: 0.2 * jnp.abs(jnp.fft.fft(W @ z + x)),
}
UNTRACED = {
    "while_loop": "Reverse-mode differentiation does not work",
    **dict.fromkeys(("solver", "root"), "could not be analysed"),
}


def problem_of(cell: Callable) -> kp.DiscreteProblem:
    keys = jax.random.split(jax.random.key(3), 3)
    W, x, z0 = (jax.random.normal(key, shape) for key, shape in zip(keys, [(3, 3), (2, 4, 3), (2, 3)], strict=True))
    return kp.DiscreteProblem(jax.tree_util.Partial(cell, W), x, 0.3 * z0)


def jacobian_of(problem: kp.DiscreteProblem, jacobian: Callable) -> jax.Array:
    """dS/dW [state, parameter], by one mode of JAX through the cell step by step."""
    (name, W), states = named_parameters(problem.cell).popitem(), jax_registry.states_of(problem)
    return jacobian(lambda W: states({name: W}))(W).reshape(-1, W.size)


def checked(W: jax.Array, x: jax.Array, z: jax.Array) -> jax.Array:
    return eqx.error_if(jnp.tanh(W @ z + x), (x**2).sum() > 0, "the input is not zero")


@pytest.mark.parametrize("name", cases(CELLS, {"surrogate", "cond", "while_loop", "error_if", "callback"}))
@pytest.mark.filterwarnings("ignore::kpflow_dyn.UntracedWarning")
def test_unusual_cells_of_jax(name: str) -> None:
    problem = problem_of(CELLS[name])
    flow = kp.linearize(kp.solve(problem))
    assert UNTRACED.get(name, "") in flow.untraced
    assert bool(flow.untraced) == (name in UNTRACED)
    J = to_numpy(jacobian_of(problem, jax.jacfwd if name == "while_loop" else jax.jacrev))
    assert relative(flow.J.dense(), J) < 1e-10
    assert relative(flow.ntk.dense(), J @ J.T) < 1e-10
    assert relative((flow.P @ flow.K @ flow.P.T).dense(), J @ J.T) < 1e-10


def test_a_norm_at_a_start_of_zeros_is_answered_where_its_derivative_is_not_asked_for() -> None:
    problem = problem_of(lambda W, x, z: jnp.tanh(W @ z + x) / (1 + jnp.linalg.norm(z)))
    problem = problem.remake(z0=jnp.zeros((2, 3)))
    with pytest.warns(kp.UntracedWarning, match=r"first step in z0 holds NaN"):
        flow = kp.linearize(kp.solve(problem))
    J = to_numpy(jacobian_of(problem, jax.jacrev))
    assert np.isfinite(J).all()
    assert relative(flow.J.dense(), J) < 1e-10
    assert relative(flow.ntk.dense(), J @ J.T) < 1e-10
    assert relative((flow.P @ flow.K @ flow.P.T).dense(), J @ J.T) < 1e-10
    assert relative((flow.P.inv @ flow.P).dense(), np.eye(24)) < 1e-10
    with pytest.raises(ValueError, match=r"first at step 0 .*norm of a zero"):
        kp.dynamics.step_jacobians(problem)


def test_a_check_that_fails_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"the input is not zero"):
        kp.solve(problem_of(checked))


def batch_normalised(W: jax.Array, x: jax.Array, z: jax.Array) -> jax.Array:
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, axis_name="batch", mode="batch")
    return jnp.tanh(W @ norm(z, state)[0] + x)


def functionless(W: jax.Array, x: jax.Array, z: jax.Array) -> jax.Array:
    checkify.check(jnp.isfinite(z).all(), "a state is not finite")
    return jnp.tanh(W @ z + x)


REFUSED = {
    "dropout": (lambda W, x, z: eqx.nn.Dropout(0.5)(W @ z + x), r"test_second_road.py, line \d+.*inference_mode"),
    "batch_norm": (batch_normalised, r"test_second_road.py, line \d+.*statistics over a batch.*inference_mode"),
    "branch": (lambda W, x, z: W @ z + x if z[0] > 0 else z, r"test_second_road.py, line \d+.*jnp\.where"),
    "numpy": (lambda W, x, z: W @ np.asarray(z) + x, r"test_second_road.py, line \d+.*jax\.numpy"),
    "callback": (lambda W, x, z: jax.pure_callback(np.sin, z, W @ z, vmap_method="sequential"), "custom_vjp"),
    "checkify": (functionless, r"leave the checks of checkify out"),
    "nonlinear": (lambda W, x, z: signed(W @ z + x), "backward pass is not linear"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_cells_without_a_derivative_or_a_fixed_meaning_are_refused(name: str) -> None:
    cell, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason), no_warnings():
        kp.linearize(kp.solve(problem_of(cell))).J.mv(jnp.ones(9))


# All that is built on a flow


class Spike(torch.autograd.Function):
    """Through numpy, which no trace follows."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return torch.from_numpy(1.0 * (u.numpy() > 0))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 5 * g * torch.sigmoid(5 * ctx.saved_tensors[0]) * torch.sigmoid(-5 * ctx.saved_tensors[0])


class Spiking(nn.Module):
    hidden_size = 3

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.5 * z + self.inner(x) - self.outer(Spike.apply(z))


def torch_solution() -> kp.Solution:
    torch.manual_seed(0)
    return kp.solve(kp.DiscreteProblem(Spiking(), torch.randn(2, 4, 3).double()))


def jax_solution() -> kp.Solution:
    return kp.solve(problem_of(CELLS["root"]))


USES = {
    "eigs": lambda flow, y: kp.eigs(flow.ntk, 2),
    "modes": lambda flow, y: kp.modes(flow.ntk, axis="time"),
    "svds": lambda flow, y: kp.svds(flow.P, 2),
    "trace": lambda flow, y: kp.trace(flow.ntk, samples=8),
    "effective_rank": lambda flow, y: kp.effective_rank(flow.core),
    "partial_trace": lambda flow, y: kp.partial_trace(flow.ntk, ["time"]),
    "marginal": lambda flow, y: kp.marginal(flow.ntk, ["time"]).dense(),
    "schmidt_rank": lambda flow, y: kp.schmidt_rank(flow.ntk, ["trial"]),
    "spectral_density": lambda flow, y: kp.spectral_density(flow.ntk, k=2),
    "forecast": lambda flow, y: kp.forecast(flow, y, lr=0.01, steps=3),
    "learnability": lambda flow, y: kp.learnability(flow, {"y": y}),
    "contributions": lambda flow, y: kp.contributions(flow),
    "summary": lambda flow, y: kp.summary(flow),
    "analyze": lambda flow, y: kp.analyze(flow),
    "compare": lambda flow, y: kp.compare(flow, flow),
    "compare under a loss": lambda flow, y: kp.compare(flow, flow, k=2, target=y),
    "only": lambda flow, y: flow.only(next(iter(flow.parameters))).ntk.mv(y),
    "output": lambda flow, y: flow.output(torch.ones(2, 3).double() if isinstance(y, Tensor) else jnp.ones((2, 3))).ntk,
    "nodal": lambda flow, y: flow.nodal.P.inv.mv(y),
    "lyapunov": lambda flow, y: kp.dynamics.lyapunov_spectrum(flow.solution),
}
WITHOUT = {
    "truncate": lambda flow, y: flow.truncate(),
    "feedback": lambda flow, y: flow.feedback(lambda name, W: W),
    "core_learnability": lambda flow, y: kp.core_learnability(flow, {"y": y}),
}


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kp.UntracedWarning)
        yield


@pytest.mark.parametrize("solution", [torch_solution, pytest.param(jax_solution, marks=pytest.mark.slow)])
def test_all_that_is_built_on_a_flow(solution: Callable[[], kp.Solution]) -> None:
    with no_warnings():
        flow = kp.linearize(solution())
        y = flow.solution.state + 0.1
        for use in USES.values():
            assert use(flow, y) is not None
    for use in WITHOUT.values():
        with pytest.raises(ValueError, match="weight sites"):
            use(flow, y)
    if solution is torch_solution:
        with pytest.raises(ValueError, match=r"row by row.*kp\.linearize"):
            kp.control.linearize_ltv(flow.solution)


# Equations of their own, which torch.func differentiates


class Clamped(torch.autograd.Function):
    """Straight through in reverse mode, and nothing in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor) -> Tensor:
        return u.clamp(-1, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g

    @staticmethod
    def jvp(ctx: Any, du: Tensor) -> Tensor:
        return 0 * du


class Unusual(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner, self.how = nn.Linear(3, 3).double(), how
        self.alias = [self.inner.weight]

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        if self.how == "alias":
            return torch.tanh(z @ self.alias[0].T) - z
        return (Clamped if self.how == "two_modes" else Spike).apply(3 * self.inner(z)) - z


@pytest.mark.parametrize(("how", "tolerance"), [("alias", 1e-6), ("two_modes", 1e-3), ("surrogate", 2e-2)])
def test_variational_equations_are_those_of_the_model_also_where_function_transforms_are_not(
    how: str, tolerance: float
) -> None:
    """Against the derivative of fine steps: what the backward pass says of kinks and jumps is of first order there."""
    torch.manual_seed(0)
    field, z0 = Unusual(how), torch.randn(2, 3).double()
    solution = kp.solve(kp.ODEProblem(field, z0, np.linspace(0, 1, 5)), "dopri5", rtol=1e-8)
    fine = kp.solve(kp.ODEProblem(field, z0, np.linspace(0, 1, 5)), "rk4", steps=1 / 128)
    with no_warnings():
        flow = kp.linearize(solution, sensealg=kp.InterpolatingAdjoint(1e-8, 1e-10))
        expected = kp.linearize(fine).J
    theta, q = torch.randn(1, flow.J.domain.size).double(), torch.randn(1, 2, 5, 3).double()
    before = [parameter.detach().clone() for parameter in field.parameters()]
    found = [flow.J.mv(theta), flow.J.T.mv(q)]
    for one, own in zip(found, [expected.mv(theta), expected.T.mv(q)], strict=True):
        assert float((one - own).abs().max()) < tolerance * float(own.abs().max())
    assert all(map(torch.equal, before, field.parameters()))
    with torch.no_grad():
        field.inner.weight.add_(1.0)
    assert torch.equal(flow.J.mv(theta), found[0])


@pytest.mark.parametrize("kind", ["cell", "field"])
def test_what_autograd_refuses_for_a_write_is_refused(kind: str) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.8).double())

        def forward(self, _x: Tensor, z: Tensor) -> Tensor:
            z = z.clone()
            z[:, 1] = -self.w * z[:, 1]  # its gradient needs what it writes to
            return z

    start = torch.ones(1, 2).double()
    problem: Any = kp.DiscreteProblem(Writes(), torch.zeros(1, 3, 1).double(), start)
    if kind == "field":
        problem = kp.ODEProblem(Writes(), start, [0.0, 0.2, 0.5])
    with pytest.raises(ValueError, match="written to in place"):
        kp.linearize(kp.solve(problem))
