"""Fields as their users write them: with args, on states of several arrays, of second order, backward in time."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.optim.swa_utils import AveragedModel
from torchdiffeq import odeint

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy

pytestmark = pytest.mark.usefixtures("x64")

GRID = np.array([1.0, 0.7, 0.4, 0.0])
RNG = np.random.default_rng(3)
Z0 = {"q": RNG.standard_normal((2, 1, 2)), "w": RNG.standard_normal((2, 2)) + 1j * RNG.standard_normal((2, 2))}
X, W = RNG.standard_normal((2, 4, 2)), RNG.standard_normal((2, 2)) / 2
FIXED = {"steps": GRID}


class Field(nn.Module):
    """A complex pytree with inputs and args, in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.tensor(W))

    def forward(self, t: Tensor, y: dict, x: Tensor, args: dict) -> dict:
        q, w = y["q"][:, 0], y["w"]
        return {"q": (torch.tanh(w.real @ self.W) + t)[:, None], "w": args["k"] * w * q @ self.W.to(w.dtype) + x * t}


class JaxField(eqx.Module):
    """The same in JAX, on one trial."""

    W: jax.Array

    def __call__(self, t: Any, y: dict, x: Any, args: dict) -> dict:
        q, w = y["q"][0], y["w"]
        return {"q": (jnp.tanh(w.real @ self.W) + t)[None], "w": args["k"] * w * q @ self.W + x * t}


def posed(framework: str, t: Any = GRID, x: Any = X) -> kp.ODEProblem:
    if framework == "torch":
        z0, k = (
            {name: torch.tensor(part) for name, part in Z0.items()},
            torch.tensor(0.5 + 0.2j, dtype=torch.complex128),
        )
        return kp.ODEProblem(Field(), z0, t, torch.tensor(x) if isinstance(x, np.ndarray) else x, args={"k": k})
    z0, k = {name: jnp.asarray(part) for name, part in Z0.items()}, jnp.asarray(0.5 + 0.2j)
    x = jnp.asarray(x) if isinstance(x, np.ndarray) else x
    return kp.ODEProblem(JaxField(jnp.asarray(W)), z0, t, x, args={"k": k})


def far(a: Any, b: Any) -> float:
    return float(np.abs(to_numpy(a) - to_numpy(b)).max())


def flat(y: dict) -> Tensor:
    """All leaves side by side, the real parts of the complex one first, as the docs say."""
    w = y["w"]
    return torch.cat([y["q"].flatten(-2), w.real, w.imag], -1)


def dense(problem: kp.ODEProblem, field: nn.Module) -> tuple[Tensor, Tensor]:
    """States and dS/dtheta, by torchdiffeq run backward on the user's own field, and autograd through that."""
    t, z0, k = (
        torch.tensor(GRID),
        problem.unflatten(problem.z0),
        {"k": torch.tensor(0.5 + 0.2j, dtype=torch.complex128)},
    )

    def states(parameters: dict[str, Tensor]) -> Tensor:
        def rate(t: Tensor, z: tuple) -> tuple:
            x = torch.stack([torch.stack([_at(t, X[n, :, i]) for i in range(2)]) for n in range(2)])
            y = functional_call(field, parameters, (t, {"q": z[0], "w": torch.complex(z[1], z[2])}, x, k))
            return y["q"], y["w"].real, y["w"].imag

        start = (z0["q"], z0["w"].real.clone(), z0["w"].imag.clone())
        q, re, im = odeint(rate, start, t, method="rk4")
        return torch.cat([q.flatten(-2), re, im], -1).transpose(0, 1)

    values = {name: value.detach() for name, value in field.named_parameters()}
    return states(values), torch.cat([j.flatten(3) for j in jacrev(states)(values).values()], -1)


def _at(t: Tensor, samples: np.ndarray) -> Tensor:
    """Linear interpolation on the decreasing grid."""
    return torch.tensor(np.interp(float(t), GRID[::-1], samples[::-1]))


def test_a_complex_pytree_with_inputs_and_args_backward_in_time() -> None:
    problem = posed("torch")
    solution = kp.solve(problem, "rk4", **FIXED)
    assert solution.t.tolist() == GRID.tolist() and (solution.weights > 0).all()
    parts = problem.unflatten(solution.state)
    assert parts["q"].shape == (2, 4, 1, 2) and parts["w"].shape == (2, 4, 2)
    assert far(flat(parts), solution.state) == 0
    states, J = dense(problem, Field())
    assert far(solution.state, states) < 1e-12
    flow = kp.linearize(solution)
    assert not flow.untraced and list(flow.parameters) == ["W"]
    assert far(flow.J.dense(), J.reshape(-1, 4)) < 1e-10
    assert max(kp.check_adjoint(op) for op in (flow.P, flow.K, flow.ntk)) < 1e-12


def test_both_frameworks_agree_on_it() -> None:
    ours = kp.solve(posed("torch"), "dopri5", **FIXED)
    theirs = kp.solve(posed("jax"), diffrax.Dopri5(), **FIXED)
    assert far(ours.state, theirs.state) < 1e-12
    flows = [kp.linearize(solution) for solution in (ours, theirs)]
    q = np.random.default_rng(0).standard_normal((1, *ours.state.shape))
    found = [flow.ntk.mv(array(q)) for flow, array in zip(flows, (torch.tensor, jnp.asarray), strict=True)]
    assert far(*found) < 1e-10 and not flows[1].untraced


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_time_backward_is_time_forward_from_the_end(framework: str) -> None:
    there = kp.solve(posed(framework), rtol=1e-10, atol=1e-12)
    y = there.problem.unflatten(there.state[:, -1])
    x = there.problem.x[:, ::-1] if framework == "jax" else there.problem.x.flip(1)
    again = kp.solve(there.problem.remake(z0=y, t=GRID[::-1].copy(), x=x), rtol=1e-10, atol=1e-12)
    back = to_numpy(again.state)[:, ::-1]
    assert far(there.state, back) < 1e-8
    assert far(there(0.3), again(0.3)) < 1e-7 and far(there(GRID), there.state) < 1e-12
    with pytest.raises(ValueError, match=r"outside of the solved span \[0.0, 1.0\]"):
        there(1.5)
    pair = (GRID[::-1].copy(), x)  # the same samples in the order of time
    assert far(kp.solve(posed(framework, x=pair)).state, kp.solve(posed(framework)).state) < 1e-12


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_the_equations_of_such_a_problem(framework: str) -> None:
    alg = "dopri5" if framework == "torch" else diffrax.Dopri5()
    solution = kp.solve(posed(framework), alg, rtol=1e-9, atol=1e-11)
    exact = kp.linearize(solution, sensealg=kp.InterpolatingAdjoint(1e-9, 1e-11))
    assert kp.check_adjoint(exact.J) < 1e-6 and kp.check_adjoint(exact.P) < 1e-6
    assert far(exact.J.dense(), kp.linearize(solution).J.dense()) < 1e-6


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_a_span_backward_with_an_input_that_jumps(framework: str) -> None:
    xp = torch if framework == "torch" else jnp

    def light(t: Any) -> Any:
        return xp.where(t > 1 / 3, xp.ones_like(t), xp.zeros_like(t))[None] * xp.ones_like(t)

    def both(t: Any) -> Any:
        return xp.concatenate([light(t), 0 * light(t)])

    both.jumps = [1 / 3]
    problem = posed(framework, (1.0, 0.0), both)
    solution = kp.solve(problem, rtol=1e-9, atol=1e-11)
    assert (
        (np.diff(solution.t) < 0).all() and (solution.weights > 0).all() and solution.weights.sum() == pytest.approx(1)
    )
    assert np.isclose(solution.steps.t, -1 / 3, rtol=0, atol=1e-12).any()
    y = problem.unflatten(solution(0.0))
    forward = kp.solve(problem.remake(z0=y, t=(0.0, 1.0)), rtol=1e-9, atol=1e-11)
    assert far(forward(1.0), solution(1.0)) < 1e-6 and far(forward(0.5), solution(0.5)) < 1e-6
    assert kp.check_adjoint(kp.linearize(solution).J) < 1e-10


def test_steps_and_errors_are_told_in_the_users_time() -> None:
    class Blows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(1).double())

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return -self.a * z**2

    problem = kp.ODEProblem(Blows(), torch.tensor([[1.0], [0.1]]).double(), (2.0, 0.0))
    with pytest.raises(kp.SolveError, match=r"trial 0 .* at t = 1[.\d]*") as caught:
        kp.solve(problem)
    assert caught.value.solution.state[0, -1, 0] == pytest.approx(1 / 8, rel=0.1)  # near t = 0
    lengths = [kp.solve(problem.remake(z0=problem.z0[1:]), steps=h).state for h in (0.25, -0.25)]
    assert far(*lengths) == 0
    with pytest.raises(ValueError, match="does not come after"):
        kp.solve(problem, steps=[0.0, 1.0, 2.0])


# args


def torch_field(source: str) -> nn.Module:
    """A module whose forward has these parameters."""
    names: dict[str, Any] = {}
    exec(f"def forward({source}", {"torch": torch}, names)
    made = type("Made", (nn.Module,), names)()
    made.a = nn.Parameter(torch.ones(2).double())
    return made


@pytest.mark.parametrize(
    ("source", "args"),
    [
        ("self, t, y, args): return -self.a * y * args", 2.0),
        ("self, t, y, *args): return -self.a * y * args[0]", 2.0),
        ("self, t, y, k, c): return -self.a * y * k + c", (2.0, 0.0)),  # as scipy unpacks them
        ("self, t, y, args): return -self.a * y * args[0] + args[1]", (2.0, 0.0)),  # as diffrax does not
        ("self, t, y, p): return -self.a * y * p['k']", {"k": 2.0}),
        ("self, t, y, k, c=2.0): return -self.a * y * k * c", (1.0,)),
        ("self, t, y, k, c=1.0): return -self.a * y * k * c", 2.0),
        ("self, t, y, k=1.0, c=1.0, d=1.0): return -self.a * y * k * c * d", (1.0, 2.0)),
        ("self, t, y, k=1.0, c=2.0): return -self.a * y * k * c", ()),
        ("self, t, y, *ks): return -self.a * y * ks[0] * ks[1]", (4.0, 0.5)),
        ("self, t, y, args, c=1.0): return -self.a * y * args[0] * args[1] * c", (4.0, 0.5)),
        ("self, t, y, k, *, c=1.0): return -self.a * y * k * c", 2.0),
        ("self, t, y, k, /, c=1.0, **_): return -self.a * y * k * c", (2.0,)),
        ("self, t, y, x=None, args=None): return -self.a * y * args", 2.0),
        ("self, t, y, x=None, k=1.0, c=2.0): return -self.a * y * k * c", (1.0,)),
        ("self, t, y, u=None, args=None): return -self.a * y * args + (u or 0)", 2.0),
        ("self, t, y, u=None, p=1.0): return -self.a * y * p + (u or 0)", 2.0),
        ("self, t, y, scale=2.0, args=None): return -self.a * y * args * scale", 1.0),
        ("self, t, y, u=None, args=None): return -self.a * y * args[0] * args[1] + (u or 0)", (4.0, 0.5)),
        ("self, t, y, k, args=None): return -self.a * y * k", 2.0),
        ("self, t, y, k=1.0, p=1.0): return -self.a * y * k * p", (4.0, 0.5)),
        ("self, t, y, args): return -2 * self.a * y", None),  # diffrax's form, args unused
        ("self, t, y, args=None): return -2 * self.a * y", None),
        ("self, t, y, *_): return -2 * self.a * y", None),
    ],
)
def test_args_as_diffrax_scipy_and_sciml_give_them(source: str, args: Any) -> None:
    solution = kp.solve(kp.ODEProblem(torch_field(source), torch.ones(3, 2).double(), [0.0, 0.1, 0.2], args=args))
    assert far(solution.state[0, :, 0], np.exp(-2 * solution.t)) < 1e-6
    assert list(kp.linearize(solution).parameters) == ["a"]


@pytest.mark.parametrize("wrapped", [lambda f: torch.compile(f, backend="eager"), AveragedModel])
@pytest.mark.parametrize(
    ("source", "args"),
    [
        ("self, t, y, args=None): return -self.a * y * args[0]", (torch.tensor([2.0, 2.0]).double(),)),
        ("self, t, y, args, c=1.0): return -self.a * y * args[0] * c", (2.0, 3.0)),
        ("self, t, y, k, c): return -self.a * y * k * c", (4.0, 0.5)),
        ("self, t, y, args): return -2 * self.a * y", None),
    ],
)
def test_args_of_a_module_inside_another(wrapped: Any, source: str, args: Any) -> None:
    problem = kp.ODEProblem(wrapped(torch_field(source)), torch.ones(3, 2).double(), [0.0, 0.1, 0.2], args=args)
    solution = kp.solve(problem)
    assert far(solution.state[0, :, 0], np.exp(-2 * solution.t)) < 1e-6


def test_args_of_jax_are_no_parameters() -> None:
    def rate(p: dict, t: Any, y: Any, args: Any) -> Any:
        return -p["a"] * y * args["k"]

    f, z0 = jax.tree_util.Partial(rate, {"a": jnp.ones(2)}), jnp.ones((3, 2))
    problem = kp.ODEProblem(f, z0, [0.0, 0.1, 0.2], args={"k": jnp.asarray(2.0)})
    flow = kp.linearize(kp.solve(problem))
    assert list(flow.parameters) == ["[0]['a']"]
    assert far(flow.solution.state[0, :, 0], np.exp(-2 * flow.solution.t)) < 1e-6
    other = kp.solve(problem.remake(args={"k": jnp.asarray(3.0)}))
    assert far(other.state[0, :, 0], np.exp(-3 * other.t)) < 1e-6
    with pytest.raises(TypeError, match="args are constants"):
        kp.solve(kp.ODEProblem(lambda t, y, args: args * y, z0, [0.0, 0.1, 0.2], args=jnp.ones(2)))


def test_args_of_methods_partials_and_jax_modules() -> None:
    class Field(eqx.Module):
        a: jax.Array
        forward: eqx.nn.Linear  # no call of the module, whatever its name

        def rate(self, t: Any, y: Any, k: Any, c: Any = 2.0) -> Any:
            return -self.a * y * k * c

        @eqx.filter_jit
        def __call__(self, t: Any, y: Any, k: Any, c: Any = 2.0) -> Any:
            return self.rate(t, y, k, c)

    def rate(a: Any, t: Any, y: Any, k: Any, c: Any = 2.0) -> Any:
        return -a * y * k * c

    module = Field(jnp.ones(2), eqx.nn.Linear(2, 2, key=jax.random.key(0)))
    held = jax.tree_util.Partial(rate, jnp.ones(2))
    for f in (module, module.rate, eqx.filter_jit(module), held, jax.tree_util.Partial(jax.jit(rate), jnp.ones(2))):
        found = kp.solve(kp.ODEProblem(f, jnp.ones((3, 2)), [0.0, 0.1, 0.2], args=(1.0,)))
        assert far(found.state[0, :, 0], np.exp(-2 * found.t)) < 1e-6
    one = kp.solve(
        kp.ODEProblem(jax.tree_util.Partial(rate, jnp.ones(2), c=1.0), jnp.ones((3, 2)), [0.0, 0.2], args=2.0)
    )
    assert far(one.state[0, :, 0], np.exp(-2 * np.asarray(one.t))) < 1e-6


def test_args_that_do_not_fit() -> None:
    with pytest.raises(TypeError, match=r"f takes \(t, y, k, c=2.0\).*takes by name alone is set beforehand"):
        source = "self, t, y, k, c=2.0, *, d=1.0): return y"
        kp.ODEProblem(torch_field(source), torch.ones(3, 2).double(), (0.0, 1.0), args=(1.0, 2.0, 3.0))
    z0 = torch.ones(3, 2).double()
    with pytest.raises(TypeError, match=r"f takes \(t, y\), but with args it is called as f\(t, z, args\)"):
        kp.ODEProblem(torch_field("self, t, y): return y"), z0, (0.0, 1.0), args=2.0)
    with pytest.raises(TypeError, match=r"called as f\(t, z, args\)"):
        kp.ODEProblem(kp.models.MLPField(2, 3).double(), z0, (0.0, 1.0), args=2.0)
    with pytest.raises(ValueError, match=r"f failed on .*called as f\(t, z, args\), z \[trial, unit\]"):
        kp.solve(kp.ODEProblem(torch_field("self, t, y, args): return y @ args"), z0, (0.0, 1.0), args=2.0))


@pytest.mark.parametrize("more", [{}, {"args": 2.0}])
@pytest.mark.parametrize("source", ["args, x=None", "p=None, u=None", "params, u", "gain=2.0, x=None"])
def test_args_before_the_inputs_are_refused(source: str, more: dict) -> None:
    with pytest.raises(TypeError, match=r"(args|p|params|gain) before the inputs, but is called as f\(t, z, x_t"):
        field = torch_field(f"self, t, y, {source}): return y")
        kp.ODEProblem(field, torch.ones(3, 2).double(), [0.0, 0.1, 0.2], torch.ones(3, 3, 2).double(), **more)


def test_a_tensor_of_args_with_a_gradient_is_not_dropped_in_silence() -> None:
    f, z0 = torch_field("self, t, y, args): return -self.a * y * args"), torch.ones(3, 2).double()
    with pytest.raises(ValueError, match=r"args .* requires a gradient.*make it a parameter of f, or .detach"):
        kp.ODEProblem(f, z0, (0.0, 1.0), args=torch.ones(2).double().requires_grad_())
    kp.ODEProblem(f, z0, (0.0, 1.0), args=f.a)  # which learns as a parameter of f


# states of several arrays


Pair = namedtuple("Pair", ["pos", "vel"])


class Oscillator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(2.0).double())

    def forward(self, t: Tensor, y: Pair) -> Pair:
        return Pair(y.vel, -self.k * y.pos)


def test_tuples_images_and_what_does_not_fit() -> None:
    pos = torch.ones(3, 2, 2).double()
    problem = kp.ODEProblem(Oscillator(), Pair(pos, 0 * pos), [0.0, 0.1, 0.3])
    solution = kp.solve(problem, rtol=1e-9, atol=1e-11)
    found = problem.unflatten(solution.state)
    assert isinstance(found, Pair) and found.pos.shape == (3, 3, 2, 2)
    assert far(found.pos[0, :, 0, 0], np.cos(np.sqrt(2) * solution.t)) < 1e-8
    assert kp.check_adjoint(kp.linearize(solution).ntk) < 1e-12
    again = pickle.loads(pickle.dumps(problem.remake(z0=Pair(2 * pos, 0 * pos)))).z0
    assert again.shape == (3, 8) and copy.copy(problem).unflatten(again).pos.shape == (3, 2, 2)

    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1).double()

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(self.conv(y))

    images = kp.solve(kp.ODEProblem(Image(), torch.randn(2, 1, 3, 3).double(), [0.0, 0.1, 0.3]))
    assert images.state.shape == (2, 3, 9) and not kp.linearize(images).untraced
    with pytest.raises(ValueError, match="what f returns is of another structure than z0"):
        kp.solve(problem.remake(f=torch_field("self, t, y): return (y[1], -y[0], y[0])")))
    with pytest.raises(ValueError, match="parts of z0 have shapes"):
        kp.ODEProblem(Oscillator(), Pair(pos, pos[:2]), (0.0, 1.0))
    with pytest.raises(TypeError, match=r"the parts of z0 are .*they must agree"):
        kp.ODEProblem(Oscillator(), Pair(pos, pos.float()), (0.0, 1.0))
    with pytest.raises(ValueError, match="units, expected 8"):
        problem.unflatten(torch.ones(3, 7))


def test_a_recurrent_cell_whose_state_is_a_pytree() -> None:
    rng = np.random.default_rng(0)
    x, h, W = rng.standard_normal((2, 3, 2)), rng.standard_normal((2, 2, 1)), rng.standard_normal((2, 2))

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(torch.tensor(W))

        def forward(self, x: Tensor, z: dict) -> dict:
            h = torch.tanh(z["h"][..., 0] @ self.W + x)
            return {"h": h[..., None], "trace": 0.5 * z["trace"] + h.sum(-1, keepdim=True)}

    def cell(W: Any, x: Any, z: dict) -> dict:
        h = jnp.tanh(z["h"][..., 0] @ W + x)
        return {"h": h[..., None], "trace": 0.5 * z["trace"] + h.sum(-1, keepdims=True)}

    z0 = {"h": torch.tensor(h), "trace": torch.zeros(2, 1).double()}
    ours = kp.linearize(kp.solve(kp.DiscreteProblem(Cell(), torch.tensor(x), z0)))
    f, start = jax.tree_util.Partial(cell, jnp.asarray(W)), {"h": jnp.asarray(h), "trace": jnp.zeros((2, 1))}
    theirs = kp.linearize(kp.solve(kp.DiscreteProblem(f, jnp.asarray(x), start)))
    assert far(ours.solution.state, theirs.solution.state) < 1e-12 and ours.solution.state.shape == (2, 3, 3)
    q = rng.standard_normal((1, 2, 3, 3))
    assert far(ours.ntk.mv(torch.tensor(q)), theirs.ntk.mv(jnp.asarray(q))) < 1e-12
    assert kp.check_adjoint(ours.P) < 1e-12 and not ours.untraced and not theirs.untraced


# second order


def test_an_equation_of_second_order() -> None:
    class Spring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.c = nn.Parameter(torch.tensor(4.0).double()), nn.Parameter(torch.tensor(0.1).double())

        def forward(self, t: Tensor, z: Tensor, v: Tensor, x: Tensor, args: float) -> Tensor:
            return args * (-self.k * z - self.c * v + x)

    z0, x = torch.ones(2, 3).double(), torch.randn(2, 4, 3).double()
    problem = kp.SecondOrderProblem(Spring(), z0, 0 * z0, GRID, x, args=1.5)
    solution = kp.solve(problem, "rk4", steps=GRID)
    z, v = problem.unflatten(solution.state)

    class FirstOrder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spring = Spring()

        def forward(self, t: Tensor, y: Tensor, x: Tensor) -> Tensor:
            return torch.cat([y[:, 3:], self.spring(t, y[:, :3], y[:, 3:], x, 1.5)], 1)

    plain = kp.solve(kp.ODEProblem(FirstOrder(), torch.cat([z0, 0 * z0], 1), GRID, x), "rk4", steps=GRID)
    assert far(torch.cat([z, v], -1), plain.state) < 1e-14
    flows = kp.linearize(solution), kp.linearize(plain)
    assert far(flows[0].J.dense(), flows[1].J.dense()) < 1e-12 and list(flows[0].parameters) == ["k", "c"]
    faster = kp.solve(problem.remake(args=3.0), "rk4", steps=GRID)
    assert far(faster.state, solution.state) > 1e-3
    with pytest.raises(ValueError, match=r"second order it is the pair \(z, z'\)"):
        kp.ODEProblem(Spring(), z0, GRID, order=2)
    with pytest.raises(ValueError, match="order is 3"):
        kp.ODEProblem(Spring(), z0, GRID, order=3)


def test_a_pendulum_of_second_order_in_jax() -> None:
    f = jax.tree_util.Partial(lambda p, t, q, v: -p["k"] * jnp.sin(q), {"k": jnp.asarray(2.0)})
    problem = kp.SecondOrderProblem(f, jnp.ones((2, 1)), jnp.zeros((2, 1)), [0.0, 0.2, 0.4])
    flow = kp.linearize(kp.solve(problem, rtol=1e-10, atol=1e-12))
    q, v = problem.unflatten(flow.solution.state)
    energy = v**2 / 2 - 2 * jnp.cos(q)
    assert far(energy, energy[:, :1]) < 1e-8 and list(flow.parameters) == ["[0]['k']"]


# what is built on these


def test_a_learning_of_such_a_problem_and_of_its_plain_form_are_one() -> None:
    problem = posed("torch")
    solution = kp.solve(problem, "rk4", **FIXED)
    flow = kp.gradient_flow(solution, lambda state: (state**2).mean(), span=0.05)
    assert flow.loss[-1] < flow.loss[0]
    linear = kp.linearize(solution)
    assert kp.forecast(linear, torch.zeros(2, 4, 6).double(), lr=1e-3, steps=5).loss[-1] < flow.loss[0] * 100
    nodal = linear.nodal
    q = torch.randn(nodal.ntk.domain.shape).double()
    assert far((nodal.P @ nodal.K @ nodal.P.T).mv(q), nodal.ntk.mv(q)) < 1e-10
