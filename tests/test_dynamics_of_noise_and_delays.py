"""kp.dynamics and kp.control along SDEs and DDEs, against the operators of their flows and known exponents."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import lambertw
from synthetic import assert_close
from test_noisy_and_delayed_starts import GRID, posed, solved
from torch import Tensor, nn

import kpflow_dyn as kp

pytestmark = pytest.mark.usefixtures("x64")

Z0 = np.random.default_rng(1).normal(size=(2, 2))


@pytest.mark.parametrize(
    ("kind", "framework"),
    [("sde", "torch"), ("dde", "torch"), ("sde", "jax"), pytest.param("dde", "jax", marks=pytest.mark.slow)],
)
def test_systems_along_steps_are_those_of_the_propagator(kind: str, framework: str) -> None:
    solution = solved(posed(kind, framework, Z0))
    trials, times, units = solution.state.shape
    steps = kp.linearize(solution, measure=kp.Measure(time=np.ones(4))).nodal
    places = solution.places if kind == "dde" else np.arange(times)
    P = np.asarray(steps.P.dense()).reshape(2 * [trials, steps.P.domain.shape[1], units])
    blocks = np.stack([P[n, :, :, n] for n in range(trials)])[:, places][
        :, :, :, places
    ]  # [trial, to, unit, from, unit]

    ltv = kp.control.linearize_ltv(solution)
    phi, front = ltv.A.values, slice(units)
    moved = np.broadcast_to(ltv.B.values[:, :1], (trials, 1, *ltv.B.shape[2:]))[:, 0]
    for k in range(1, times):
        moved = phi[:, k] @ moved
        assert_close((ltv.C.values[:, k] @ moved), blocks[:, k, :, 0])
    reached = kp.control.gram(solution, "c").W.values[:, -1, front, front]
    assert_close(reached, np.einsum("bukv,bwkv->buw", blocks[:, -1], blocks[:, -1]))
    seen = kp.control.gram(solution, "o").W.values[:, 0, front, front]
    assert_close(seen, np.einsum("bkuv,bkuw->bvw", blocks[:, :, :, 0], blocks[:, :, :, 0]))
    assert kp.control.hankel(solution, GRID[1]).values.shape[0] == trials

    found = kp.control.adjoint(solution, lambda z: (z**2).sum(), lambda z: z[0])
    state, weights = np.asarray(solution.state), np.array([0.1, 0.2, 0.3, 0.2])
    slopes = 2 * state * weights[:, None]
    slopes[:, -1, 0] += 1
    assert_close(found.costate.values, np.einsum("bkulv,bku->blv", blocks, slopes))
    assert_close(found.cost.values, (state**2).sum(-1) @ weights + state[:, -1, 0])
    _, loss = kp.control.training_cost(solution.problem, lambda z: (z**2).sum(), lambda z: z[0])
    assert_close(np.asarray(loss(solution.state)), found.cost.values.mean())


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_exponents_along_brownian_paths_are_those_of_the_product(framework: str) -> None:
    """Linear noise on a commuting system: exponents are known on each path."""
    a, s, h, n = np.array([-0.3, 0.4]), 0.5, 0.05, 40
    dW = np.sqrt(h) * np.random.default_rng(0).normal(size=(3, n, 2))
    if framework == "torch":

        class Linear(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Parameter(torch.tensor(a))

            def forward(self, t: Tensor, z: Tensor) -> Tensor:
                return self.a * z

        f, z0, g = Linear(), torch.ones(3, 2).double(), lambda t, z: s * z
    else:
        import jax

        f, g = jax.tree_util.Partial(lambda a, t, z: a * z, jax.numpy.asarray(a)), lambda t, z: s * z
        z0 = jax.numpy.ones((3, 2))
    problem = kp.SDEProblem(f, g, z0, np.arange(0, n + 1, 4) * h, brownian=dW)
    solution = kp.solve(problem, "euler", steps=h)
    expected = np.log(abs(1 + h * a + s * dW)).sum(1) / (n * h)
    found = kp.dynamics.lyapunov_spectrum(solution)
    assert_close(found.exponents.sum(1), expected.sum(1))
    assert_close(np.sort(kp.dynamics.finite_time_exponents(solution).exponents[:, -1]), np.sort(expected))
    A = np.asarray(kp.dynamics.step_jacobians(solution))
    assert A.shape == (3, n + 1, 2, 2)
    assert_close(A[:, 1:, 0, 0], 1 + h * a[0] + s * dW[..., 0])


def test_leading_exponents_of_a_linear_delay_equation() -> None:
    """z' = -z(t - 1): l = Re W(-1), of a pair."""

    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

        def forward(self, t: Tensor, z: Tensor, delayed: tuple[Tensor, ...]) -> Tensor:
            return self.a * delayed[0]

    posed = kp.DDEProblem(Past(), torch.ones(1, 1).double(), (0.0, 60.0), 1.0)
    found = kp.dynamics.lyapunov_spectrum(kp.solve(posed, "rk4", steps=0.2), 2, transient=10.0)
    assert abs(found.mean - lambertw(-1).real).max() < 0.02
    assert found.units > 2
    assert kp.dynamics.lyapunov_spectrum(posed.remake(t=np.linspace(0, 5, 26))).mean.shape == (1,)


def test_refused_in_words() -> None:
    noisy, delayed = solved(posed("sde", "torch", Z0)), solved(posed("dde", "torch", Z0))
    for solution, said in ((noisy, "its drift"), (delayed, "passes z for each")):
        with pytest.raises(TypeError, match=said):
            kp.dynamics.fixed_points(solution)
        with pytest.raises(ValueError, match="inputs='kicks'"):
            kp.control.linearize_ltv(solution, inputs="x")
        with pytest.raises(TypeError, match="take its parts"):
            kp.control.analyze(solution, kp.control.QuadraticCost(np.eye(2)))
        with pytest.raises(ValueError, match="factors along other"):
            kp.control.gram_operator(kp.linearize(solution), "c", 1)
        for function in (kp.summary, kp.analyze, kp.contributions, kp.core_learnability, kp.learnability):
            with pytest.raises(TypeError, match="expected a Flow"):
                function(*([solution, None] if "learnability" in function.__name__ else [solution]))
        rest = torch.zeros(2).double()
        with pytest.raises(TypeError, match=r"along the states .* linearize_ltv"):
            kp.control.linearize_lti(solution, rest)
        with pytest.raises(TypeError, match="passes z for each delayed state"):
            kp.control.linearize_lti(solution.problem.f, rest, inputs="kicks")
    with pytest.raises(TypeError, match="rate_of takes an ODEProblem"):
        kp.ode.rate_of(noisy.problem)
    with pytest.raises(TypeError, match="forecast_starts takes a DiscreteProblem"):
        kp.forecast_starts(noisy.problem, [], rest)
    with pytest.raises(TypeError, match="expected an array"):
        kp.dynamics.pca(noisy.problem)
