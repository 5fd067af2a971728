"""What users of other libraries try first: it works, or is answered in words."""

from __future__ import annotations

import operator
import re
from functools import cache
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn import control
from kpflow_dyn._elsewhere import FLOW, OPERATOR, PACKAGE, Named
from kpflow_dyn.control._elsewhere import ROWS, table
from kpflow_dyn.models import CartPole, ClosedLoop, DoubleIntegrator, Event, Hybrid, MLPField, Pendulum

pytestmark = pytest.mark.usefixtures("x64")
T = np.linspace(0, 1, 5)
NAMES, SAMPLES = CartPole.state_names, (0.0, 0.02, 0.04, 0.06)


class Drift(eqx.Module):
    a: jax.Array

    def __call__(self, t: jax.Array, z: jax.Array, args: None) -> jax.Array:
        return -self.a * z


class Noise(eqx.Module):
    b: jax.Array

    def __call__(self, t: jax.Array, z: jax.Array, args: None) -> jax.Array:
        return self.b * jnp.ones((3, 2))


def tree(seed: int, *shape: int) -> diffrax.VirtualBrownianTree:
    return diffrax.VirtualBrownianTree(0.0, 1.0, tol=1e-2, shape=shape, key=jax.random.key(seed))


def of_terms(path: object, **options: object) -> kp.SDEProblem:
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(Drift(jnp.array(1.0))),  # type: ignore
        diffrax.ControlTerm(Noise(jnp.array(0.3)), path),  # type: ignore
    )
    return kp.SDEProblem(terms, None, jnp.ones((2, 3)), T, **options)  # type: ignore


def test_paths_beside_those_of_a_term() -> None:
    first, other = tree(1, 2, 2), tree(2, 2, 2)
    for given in (other, 7):
        with pytest.raises(ValueError, match="beside it"):
            of_terms(first, brownian=given)
    solved = kp.solve(of_terms(other)).state
    assert (kp.solve(of_terms(first).remake(brownian=other)).state == solved).all()
    assert (kp.solve(of_terms(None, brownian=other)).state == solved).all()
    assert (kp.solve(of_terms(first).remake(t=T)).state == kp.solve(of_terms(first)).state).all()
    alone = [tree(seed, 2) for seed in (1, 2)]
    assert (kp.solve(of_terms(alone)).state == kp.solve(of_terms(None, brownian=alone)).state).all()
    with pytest.raises(ValueError, match=r"path of the ControlTerm gives increments \[2, 2\].*\[6, 2\]; 3 paths"):
        kp.solve(of_terms(first, paths=3))


class Fixed(nn.Module):
    sde_type, noise_type = "ito", "diagonal"

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones((), dtype=torch.float64))

    def f(self, t: Tensor, z: Tensor) -> Tensor:
        return -self.a * z

    def g(self, t: Tensor, z: Tensor) -> Tensor:
        return self.a * torch.ones(2, 3, dtype=torch.float64)


def test_habits_of_torchsde() -> None:
    z0 = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"SDEProblem\(sde, None, y0, ts\)"):
        kp.SDEProblem(Fixed(), z0, T)
    with pytest.raises(ValueError, match="any number of trials"):
        kp.solve(kp.SDEProblem(Fixed(), None, z0, T, paths=3))
    for name, here in (("bm", "brownian="), ("method", "alg"), ("noise_type", "diffusion g"), ("dt", "steps=")):
        with pytest.raises(TypeError, match=here):
            kp.SDEProblem(Fixed(), None, z0, T, **{name: 1})
        with pytest.raises(TypeError, match=here):
            kp.solve(kp.SDEProblem(Fixed(), None, z0, T), **{name: 1})
    assert kp.solve(kp.SDEProblem(Fixed(), None, z0, T)).stats == {"steps": 4, "longest": 0.25}


def test_a_mean_over_paths_has_its_errors() -> None:
    drift, noise, z0 = MLPField(2, 3).double(), MLPField(2, 3).double(), torch.ones(2, 2).double()
    means = [kp.mean_ntk(kp.linearize(kp.solve(kp.SDEProblem(drift, noise, z0, T, paths=n)))) for n in (2, 4)]
    few, mean = means
    moments = mean.moments()
    assert kp.trace(mean) == moments.trace and kp.effective_rank(mean) == moments.effective_rank
    assert kp.frobenius_norm(mean) == moments.norm and moments.trace.stderr > 0
    assert kp.modes(mean, k=1).stderr is not None
    for found in (kp.trace(few), kp.effective_rank(few), kp.frobenius_norm(few), kp.alignment(few, few)):
        assert found.method.endswith("of the mean over these 2 paths")
    assert "4 paths" in kp.trace(mean, alg=kp.solvers.XTrace()).method


@cache
def sampled(*t: float, delay: float = 0.0) -> kp.Solution:
    torch.manual_seed(0)
    loop = ClosedLoop(CartPole(), nn.GRUCell(4, 2), readout=nn.Linear(2, 1), every=0.02, delay=delay).double()
    return kp.solve(kp.ODEProblem(loop, 0.1 * torch.randn(2, 4).double(), np.array(t)), "rk4")


def test_loops_in_discrete_time_have_their_dt_and_names() -> None:
    sol = sampled(*SAMPLES, delay=0.03)
    names = (*NAMES, "memory[0]", "memory[1]", "held[0]", "waiting[0]", "waiting[1]")
    ltv = control.linearize_ltv(sol)
    assert ltv.dt == pytest.approx(0.02) and ltv.names == names
    found = [control.gram(sol, "o").W, control.gram(sol, "c", rank=2).factor, control.hankel(sol, 0.04).states]
    found += [control.adjoint(sol, control.QuadraticCost(np.eye(4), [[1.0]])).costate]
    assert all(tuple(each.unit.values) == names for each in found)  # type: ignore
    uneven = control.linearize_ltv(sampled(0.0, 0.02, 0.06))
    assert np.isnan(uneven.dt or 0.0)
    with pytest.raises(ValueError, match="unequal"):
        control.LTI(uneven.A.values[0, 0], uneven.B.values[0, 0], dt=uneven.dt)
    noisy = kp.SDEProblem(ClosedLoop(Pendulum(), nn.Linear(2, 1)), MLPField(2, 3), torch.ones(2, 2), T)
    along = control.linearize_ltv(kp.solve(noisy))
    assert along.dt == 0.25 and along.names == Pendulum.state_names


@pytest.mark.slow
def test_results_are_contiguous_and_short() -> None:
    sol = sampled(*SAMPLES)
    for found in (control.gram(sol, "o"), control.gram(sol, "c"), control.gram(sol, "o", rank=2)):
        for array in (found.W, found.eigenvalues, found.directions):
            torch.tensor(array.values)
    costates = control.adjoint(sol, lambda z, u: (z**2).sum() + u[0] ** 2)
    torch.tensor(costates.cost_to_go.values)
    system = control.linearize_lti(CartPole(), torch.zeros(4), torch.zeros(1))
    shown = [control.linearize_ltv(sol), control.gram(sol, "c"), control.hankel(sol, 0.04), costates, system]
    assert all(len(repr(each)) < 300 and "\n" not in repr(each) for each in shown)
    assert "eigenvalues [" in repr(shown[1]) and "dt = 0.02" in repr(shown[0])


def test_observability_needs_no_inputs() -> None:
    model = Hybrid(MLPField(2, 3), Event(reset=lambda t, z: z / 2, every=0.5))
    sol = kp.solve(kp.ODEProblem(model, torch.ones(2, 2), T), "rk4")
    assert (control.gram(sol, "o").W == control.gram(sol, "o", inputs="kicks").W).all()


def test_costs_are_checked_where_they_are_given() -> None:
    z0 = torch.ones(2, 2).double()
    loop = kp.ODEProblem(ClosedLoop(DoubleIntegrator(), nn.Linear(2, 1)).double(), z0, T)
    plain = kp.ODEProblem(MLPField(2, 3).double(), z0, T)
    noisy = kp.SDEProblem(MLPField(2, 3).double(), MLPField(2, 3).double(), z0, T)

    def of_both(z: Tensor, u: Tensor) -> Tensor:
        return z[0] ** 2 + u[0] ** 2

    cases = [(loop, control.QuadraticCost(np.eye(3), [[1.0]]), ValueError, "2 states", {})]
    cases += [(loop, control.QuadraticCost(np.eye(2), np.eye(2)), ValueError, "controls", {})]
    cases += [(loop, cost, TypeError, "expected a function", {}) for cost in ((np.eye(2), [[1.0]]), {})]  # type: ignore
    cases += [(loop, lambda z: z[0], TypeError, "called as cost\\(z, u\\)", {})]  # type: ignore
    cases += [(plain, of_both, TypeError, "has no control", {"inputs": "kicks"})]  # type: ignore
    cases += [(noisy, of_both, TypeError, "has no control", {})]  # type: ignore
    for problem, cost, error, words, options in cases:
        with pytest.raises(error, match=words):
            control.training_cost(problem, cost)  # type: ignore
        with pytest.raises(error, match=words):
            control.adjoint(kp.solve(problem), cost, **options)  # type: ignore
    with pytest.raises(TypeError, match="expected a function"):
        control.analyze(kp.solve(loop), (np.eye(2), [[1.0]]))  # type: ignore


def test_training_cost_is_its_formula() -> None:
    Q, R, t = np.diag([1.0, 2.0, 3.0, 0.5]), [[0.3]], np.array(SAMPLES)
    sol = sampled(*SAMPLES)
    cost = control.QuadraticCost(Q, R)
    posed, loss = control.training_cost(sol.problem, cost, control.QuadraticCost(np.eye(4)))
    state = sol.state.numpy()
    z, u = state[..., :4], state[:, :-1, 6:7]
    rates = [cost(part, u) for part in (z[:, :-1], z[:, 1:])]
    expected = ((rates[0] + rates[1]) / 2 @ np.diff(t) + (z[:, -1] ** 2).sum(-1)).mean()
    assert abs(float(loss(kp.solve(posed, "rk4").state)) - expected) < 1e-10 * expected


def test_names_of_python_control() -> None:
    known = ["margin", "ss", "tf", "bode", "place", "step_response", "nyquist", "care", "lyap"]
    for name in known:
        with pytest.raises(AttributeError, match="in its place take"):
            getattr(control, name)
    assert not hasattr(control, "nothing_of_this_name")
    the_same = [name for names, here in ROWS if here.startswith("the same") for name in names]
    assert all(hasattr(control, name) for name in the_same)
    guide = Path(__file__).parents[1] / "docs" / "guides" / "controller.md"
    assert table() in guide.read_text()


def test_checkpoints_of_the_policy_alone() -> None:
    policy = nn.Linear(2, 1).double()
    sol = kp.solve(kp.ODEProblem(ClosedLoop(DoubleIntegrator(), policy), torch.ones(1, 2).double(), T), "rk4")
    values = policy.state_dict()
    with_names = {f"policy.{name}": value for name, value in values.items()}
    cost = control.QuadraticCost(np.eye(2), [[1.0]])
    found = control.analyze(sol, cost, checkpoints={0: values, 1: with_names})["cost"]
    assert (found.sel(step=0) == found.sel(step=1)).all()


def test_opened_loops() -> None:
    K = np.array([[1.0, 2.0]])
    policy = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        policy.weight.copy_(torch.tensor(-K))
    plant, z0 = DoubleIntegrator(), torch.ones(1, 2).double()
    for every in (None, 0.25):
        loop = ClosedLoop(plant, policy) if every is None else ClosedLoop(plant, policy, every=every)
        L = control.opened_loop(kp.solve(kp.ODEProblem(loop, z0, T), "rk4"), near=np.zeros(2))
        A, B = ([[0, 1], [0, 0]], [[0], [1]]) if every is None else ([[1, every], [0, 1]], [[every**2 / 2], [every]])
        assert np.allclose(L.A, A) and np.allclose(L.B, B) and np.allclose(L.C, K) and L.dt == every
    with pytest.raises(TypeError, match="opened_loop takes the solution of"):
        control.opened_loop(L)
    with pytest.raises(ValueError, match=r"near has the shape \(3,\), expected a state of the plant \[2\]"):
        control.opened_loop(kp.solve(kp.ODEProblem(ClosedLoop(plant, policy), z0, T), "rk4"), near=np.zeros(3))


def test_one_error_alone_is_an_obstacle() -> None:
    torch.manual_seed(0)
    problem = kp.DiscreteProblem(nn.RNNCell(2, 3).double(), torch.randn(2, 4, 2).double())
    out = kp.linearize(kp.solve(problem)).output(nn.Linear(3, 1).double())
    error = torch.ones(2, 4, 1).double()
    assert np.allclose(kp.obstacles(out, error).rate, kp.obstacles(out, error[None]).rate)  # type: ignore


class StateFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(7, 4)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(torch.cat([h, x], -1)))


class StateFirstJax(eqx.Module):
    mix: eqx.nn.Linear

    def __call__(self, carry: jax.Array, inputs: jax.Array) -> jax.Array:
        return jnp.tanh(self.mix(jnp.concatenate([carry, inputs])))


class InputFirst(StateFirst):
    def forward(self, x: Tensor, h: Tensor) -> Tensor:  # type: ignore[override]
        return torch.tanh(self.mix(torch.cat([h, x], -1)))


def test_a_cell_that_names_its_state_first() -> None:
    with pytest.warns(UserWarning, match=r"StateFirst names its arguments \(h, x\): swap them") as seen:
        kp.DiscreteProblem(StateFirst(), torch.zeros(2, 5, 3), torch.zeros(2, 4))
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match=r"\(carry, inputs\): swap them"):
        cell = StateFirstJax(eqx.nn.Linear(7, 4, key=jax.random.key(0)))
        kp.DiscreteProblem(cell, jnp.zeros((2, 5, 3)), jnp.zeros((2, 4)))
    kp.DiscreteProblem(InputFirst(), torch.zeros(2, 5, 3), torch.zeros(2, 4))


def test_a_field_that_names_its_state_first() -> None:
    class Backwards(MLPField):
        def forward(self, y: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(t, y)

    with pytest.raises(TypeError, match=r"the time first; yours names its arguments \(y, t\): swap them"):
        kp.ODEProblem(Backwards(2, 3), torch.zeros(1, 2), T)


def test_a_network_over_sequences_is_no_cell() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    net, x = Whole(), torch.zeros(2, 5, 3)
    for given in (net, nn.Sequential(nn.GRU(3, 4)), eqx.nn.MLP(3, 4, 5, 1, key=jax.random.key(0))):
        with pytest.raises(TypeError, match=r"a network over whole sequences.*StaticProblem.*model\.rnn"):
            kp.DiscreteProblem(given, x if isinstance(given, nn.Module) else jnp.zeros((2, 5, 3)))
    whole = kp.solve(kp.StaticProblem(net, x, axes=("trial", "time", "unit"))).state
    assert torch.allclose(whole, kp.solve(kp.DiscreteProblem(net.rnn, x)).state @ net.out.weight.T + net.out.bias)


NUMPY = np.zeros((2, 3))


@pytest.mark.parametrize(
    "pose",
    [
        lambda: kp.DiscreteProblem(nn.GRUCell(3, 8).double(), NUMPY[None]),  # type: ignore[arg-type]
        lambda: kp.StaticProblem(nn.Linear(3, 8).double(), NUMPY),
        lambda: kp.StaticProblem(nn.Linear(3, 8).double(), (NUMPY,)),
        lambda: kp.FixedPointProblem(nn.RNNCell(3, 8).double(), NUMPY),  # type: ignore[arg-type]
        lambda: kp.ImplicitProblem(lambda s, p: s, NUMPY, {"w": torch.zeros(2)}),  # type: ignore[arg-type]
        lambda: kp.ODEProblem(MLPField(3, 4), NUMPY, T),  # type: ignore[arg-type]
    ],
)
def test_numpy_beside_a_model_of_torch(pose: Any) -> None:
    with pytest.raises(TypeError, match=r"is numpy\.ndarray, expected a torch tensor .*: torch\.from_numpy\("):
        pose()


def test_a_plant_is_a_function_of_state_and_control() -> None:
    def plant(z: Tensor, u: Tensor) -> Tensor:
        return torch.cat([z[..., 1:], u], -1)

    z, u = torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    ours = control.linearize_lti(DoubleIntegrator(), z, u)
    for given in (plant, lambda a, b: plant(a, b)):
        found = control.linearize_lti(given, z, u)
        assert (found.A == ours.A).all() and (found.B == ours.B).all()
    for given in (plant, DoubleIntegrator()):
        with pytest.raises(ValueError, match="give u, its control at rest"):
            control.linearize_lti(given, z)
    with pytest.raises(TypeError, match=r"takes 2 positional arguments but 3.*A plant is plant"):
        control.linearize_lti(lambda t, z: -z, z, u)
    loop = ClosedLoop(plant, nn.Linear(2, 1, bias=False).double())
    with pytest.raises(TypeError, match=r"no control left.*Leave out u, or pass the plant, loop\.plant"):
        control.linearize_lti(loop, z, u)
    assert control.linearize_lti(loop.plant, z, u).B.tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize(
    ("owner", "name", "here"),
    [
        ("kp", "ntk", "linearize"),
        ("kp", "participation_ratio", "effective_rank"),
        ("kp", "eigsh", "kp.eigs"),
        ("kp", "odeint", "ODEProblem"),
        ("kp", "plot", "kp.figures"),
        ("flow", "NTK", "flow.ntk"),
        ("flow", "jacobian", "flow.J"),
        ("op", "to_dense", "op.dense"),
        ("op", "shape", "op.domain.shape"),
    ],
)
def test_names_of_others_are_answered_by_those_here(owner: str, name: str, here: str) -> None:
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(nn.RNNCell(1, 2), torch.zeros(1, 2, 1))))
    with pytest.raises(AttributeError, match=f"no attribute '{name}'; in its place take .*{here}"):
        getattr({"kp": kp, "flow": flow, "op": flow.ntk}[owner], name)


def test_the_names_that_are_recommended_exist() -> None:
    for path in {path for _, here in PACKAGE for path in re.findall(r"kp((?:\.\w+)+)", here)}:
        operator.attrgetter(path[1:])(kp)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(nn.RNNCell(1, 2), torch.zeros(1, 2, 1))))
    for owner, rows in ((flow, FLOW), (flow.ntk, OPERATOR)):
        for names, here in rows:
            assert not any(hasattr(owner, name) for name in names)
            for path in re.findall(r"`(?:flow|op)\.([\w.]+)", here):
                operator.attrgetter(path)(owner)


def test_an_error_within_a_property_is_its_own() -> None:
    class Broken(Named):
        _elsewhere = ((("jac",), "`flow.J`"),)

        @property
        def J(self) -> Any:
            return torch.ones(1).no_such_thing

    with pytest.raises(AttributeError, match="'Tensor' object has no attribute 'no_such_thing'"):
        _ = Broken().J
    with pytest.raises(AttributeError, match=r"no attribute .jac.; in its place take `flow\.J`"):
        _ = Broken().jac
