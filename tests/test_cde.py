"""CDEs against torchcde and diffrax, and what follows from a solution of each kind of problem with steps in time."""

from __future__ import annotations

import copy

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchcde
from torch import Tensor, nn
from torch.func import functional_call

import kpflow_dyn as kp
from kpflow_dyn._learning.changes import given_changes

pytestmark = pytest.mark.usefixtures("x64")

GRID, TIMES = np.array([0.0, 0.3, 0.5, 1.0]), np.array([0.0, 0.2, 0.45, 0.8, 1.0])
RNG = np.random.default_rng(0)
W, B, Z0, X = (RNG.normal(size=size) for size in ((8, 4), (8,), (3, 4), (3, 5, 2)))
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


class Field(nn.Module):
    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.W, self.b, self.flat = nn.Parameter(torch.tensor(W)), nn.Parameter(torch.tensor(B)), flat

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        matrix = torch.tanh(z @ self.W.T + self.b)
        return matrix if self.flat else matrix.reshape(-1, 4, 2)


class JaxField(eqx.Module):
    W: jax.Array
    b: jax.Array

    def __call__(self, t: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.tanh(self.W @ z + self.b).reshape(4, 2)


def jax_field() -> JaxField:
    return JaxField(jnp.array(W), jnp.array(B))


def problem(interpolation: str = "linear", **more: object) -> kp.CDEProblem:
    given = {"f": Field(), "z0": torch.tensor(Z0), "t": GRID, "path": (TIMES, torch.tensor(X))}
    return kp.CDEProblem(**(given | {"interpolation": interpolation} | more))  # type: ignore[arg-type]


def torchcde_path(interpolation: str) -> object:
    x, t = torch.tensor(X), torch.tensor(TIMES)
    if interpolation == "linear":
        return torchcde.LinearInterpolation(torchcde.linear_interpolation_coeffs(x, t), t)
    make = {
        "hermite": torchcde.hermite_cubic_coefficients_with_backward_differences,
        "natural": torchcde.natural_cubic_coeffs,
    }[interpolation]
    return torchcde.CubicSpline(make(x, t), t)


def relative(a: object, b: object) -> float:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(abs(a - b).max() / abs(b).max())


@pytest.mark.parametrize("interpolation", ["linear", "hermite", "natural"])
def test_torchcde_on_samples_and_on_its_own_path(interpolation: str) -> None:
    path = torchcde_path(interpolation)
    options = {"options": {"jump_t": torch.tensor(TIMES[1:-1])}} if interpolation == "linear" else {}
    reference = torchcde.cdeint(
        path, Field(), torch.tensor(Z0), torch.tensor(GRID), adjoint=False, method="dopri5", **TIGHT, **options
    ).detach()
    for given in (problem(interpolation, f=Field(flat=True)), problem(path=path)):
        assert relative(kp.solve(given, **TIGHT).state, reference) < 1e-6
        assert list(kp.linearize(kp.solve(given, "rk4", steps=0.1)).parameters) == ["W", "b"]


def test_diffrax_on_samples_and_on_its_own_paths() -> None:
    t, x = jnp.array(TIMES), jnp.array(X)
    paths = jax.vmap(lambda y: diffrax.CubicInterpolation(t, diffrax.backward_hermite_coefficients(t, y)))(x)

    def solved(path: diffrax.AbstractPath, z0: jax.Array) -> jax.Array:
        term, saved = diffrax.ControlTerm(lambda t, z, args: jax_field()(t, z), path).to_ode(), diffrax.SaveAt(ts=GRID)
        steps = diffrax.PIDController(**TIGHT)
        return diffrax.diffeqsolve(
            term, diffrax.Tsit5(), 0.0, 1.0, None, z0, saveat=saved, stepsize_controller=steps
        ).ys

    reference = jax.vmap(solved)(paths, jnp.array(Z0))
    posed = {"f": jax_field(), "z0": jnp.array(Z0)}
    assert relative(kp.solve(problem("hermite", path=(TIMES, x), **posed), **TIGHT).state, reference) < 1e-6
    rates = [kp.ode.rate_of(problem("hermite", path=path, **posed))(0.3, posed["z0"]) for path in ((TIMES, x), paths)]
    assert relative(rates[1], rates[0]) < 1e-12


def test_jacobian_of_the_steps_and_torch_as_jax() -> None:
    steps = np.array([0.0, 0.1, 0.2, 0.3, 0.45, 0.5, 0.8, 1.0])
    ours = kp.linearize(kp.solve(problem(), "midpoint", steps=steps))
    slopes = torch.tensor(np.diff(X, axis=1) / np.diff(TIMES)[:, None])

    def states(W: Tensor, b: Tensor) -> Tensor:
        z, found, f = torch.tensor(Z0), [], Field()
        for t, end in zip(steps, [*steps[1:], None], strict=True):
            if t in GRID:
                found.append(z)
            if end is not None:
                rate = slopes[:, np.searchsorted(TIMES, t + 1e-9) - 1, :, None]
                k = lambda z: (functional_call(f, {"W": W, "b": b}, (None, z)) @ rate)[..., 0]  # noqa: B023, E731
                z = z + (end - t) * k(z + (end - t) / 2 * k(z))
        return torch.stack(found, 1)

    J = torch.autograd.functional.jacobian(states, (torch.tensor(W), torch.tensor(B)))
    J = torch.cat([part.reshape(48, -1) for part in J], 1)
    assert relative(ours.J.dense(), J) < 1e-8
    assert kp.check_adjoint(ours.J) < 1e-12 and not ours.untraced
    nodal = ours.nodal
    assert relative((nodal.P @ nodal.K @ nodal.P.T).dense(), nodal.ntk.dense()) < 1e-10
    given = problem(f=jax_field(), z0=jnp.array(Z0), path=(TIMES, jnp.array(X)))
    theirs = kp.linearize(kp.solve(given, diffrax.Midpoint(), steps=steps))
    assert relative(theirs.ntk.dense(), ours.ntk.dense()) < 1e-8


def test_remade_problems_keep_their_path() -> None:
    posed = problem("natural")
    assert list(kp.linearize(kp.solve(posed.remake(f=posed.f))).parameters) == ["W", "b"]
    one = kp.solve(problem("natural", z0=torch.tensor(Z0[:1]), path=(TIMES, torch.tensor(X[:1]))), "rk4")
    assert relative(one.state[0], kp.solve(posed, "rk4").state[0]) < 1e-12

    class Growing(Field):
        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return 1e150 * (z**3 * (z[:, :1] > 0.5)).repeat(1, 2)

    with pytest.raises(kp.SolveError) as failed:
        kp.solve(problem(f=Growing()), "rk4")
    assert failed.value.solution is not None and isinstance(failed.value.solution.problem, kp.CDEProblem)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": None}, "expected samples"),
        ({"path": lambda t: t}, "expected samples"),
        ({"path": torch.zeros(3, 5, 2).double()}, "5 samples for 4 times"),
        ({"path": (TIMES[:-1], torch.tensor(X[:, :-1]))}, "does not cover"),
        ({"interpolation": "cubic"}, "linear, hermite, natural"),
        ({"f": nn.Linear(4, 8).double()}, "f failed"),
        ({"z0": torch.tensor(Z0).to(torch.complex128)}, "z0 is complex"),
    ],
)
def test_refused_in_words(change: dict, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        kp.solve(problem(**change))


# What follows from a solution


class Delayed(Field):
    def forward(self, t: Tensor, z: Tensor, delayed: tuple[Tensor, ...]) -> Tensor:
        return super().forward(t, delayed[0])[..., 0] - z


class Drift(Field):
    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return super().forward(t, z)[..., 1] - z


POSED = {
    "SDE (ito)": lambda: (kp.SDEProblem(Drift(), Drift(), torch.tensor(Z0), GRID), {"steps": 0.25}),
    "DDE": lambda: (kp.DDEProblem(Delayed(), torch.tensor(Z0), GRID, 0.4), {"steps": 0.25}),
    "CDE": lambda: (problem(), {"steps": 0.25, "alg": "rk4"}),
}


@pytest.mark.parametrize("kind", POSED)
def test_learning_along_each_kind(kind: str) -> None:
    """Numbers of the kernel, and gradient descent by steps of 1e-4 through the problem itself."""
    posed, options = POSED[kind]()
    flow = kp.linearize(kp.solve(posed, **options))
    target, readout = torch.tensor(RNG.normal(size=(3, 4, 1))), nn.Linear(4, 1).double()
    output = flow.output(readout, learn=True)
    assert kp.learnability(output, [target]).score.shape == (1,)
    assert kp.forecast(output, target, steps=2, lr=1e-3, check=False) is not None
    assert kp.modes(flow.ntk, "time", k=2).values.shape == (2,)
    assert kp.eigs(flow.ntk, 2).converged.all()
    attributes = kp.analyze(flow, k=1).attrs
    assert attributes["problem"] == kind
    assert attributes["solver"]
    other = copy.deepcopy(flow.solution.problem.model)
    with torch.no_grad():
        next(other.parameters()).add_(1e-5)
    moved = given_changes(flow, other)["change"]
    theta = torch.zeros(flow.J.domain.size, dtype=torch.float64)
    theta[: next(other.parameters()).numel()] = 1e-5
    assert relative(moved, flow.J.mv(theta)) < 1e-3
    loss = kp.squared_error(target, readout)
    span, first = 1e-4, loss(flow.solution.state).item()
    found = kp.gradient_flow(flow.solution, loss, span, rtol=1e-4)
    e = output.values - target
    slope = 4 * float((e * output.ntk.mv(e / torch.tensor(flow.solution.weights)[:, None])).sum()) / e.numel() ** 2
    drop = (first - float(np.asarray(found.loss)[-1])) / span
    assert abs(drop - slope) < 0.05 * slope


def test_a_path_that_ends_too_soon_is_refused() -> None:
    samples = torch.randn(1, 4, 2).double()
    path = torchcde.LinearInterpolation(samples, torch.linspace(0, 1, 4).double())
    with pytest.raises(ValueError, match="known from 0 to 1"):
        kp.CDEProblem(torch.nn.Linear(2, 4).double(), torch.ones(1, 2).double(), [0.0, 1.0, 2.0], path)
