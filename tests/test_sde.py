"""SDEs: strong orders, other libraries on the same paths, dense Jacobians by autograd, and the mean over paths."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchsde
from jax.tree_util import Partial
from torch import Tensor, nn
from torch.func import functional_call

import kpflow_dyn as kp
from kpflow_dyn._torch.trace import Applied

pytestmark = pytest.mark.usefixtures("x64")

GRID = np.array([0.0, 0.3, 0.5, 1.0])
METHODS = {"euler": "ito", "milstein": "ito", "heun": "stratonovich", "euler_heun": "stratonovich"}
RNG = np.random.default_rng(0)
W, B, V, Z0 = (RNG.normal(size=size) for size in ((3, 3), (3,), (3,), (2, 3)))
X = RNG.normal(size=(2, 4, 3))


class Drift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.tensor(W)), nn.Parameter(torch.tensor(B))

    def forward(self, t: Tensor, z: Tensor, *x: Tensor) -> Tensor:
        return torch.tanh(z @ self.W.T + self.b) - z * torch.cos(t) + (x[0] if x else 0)


class Diffusion(nn.Module):
    """Diagonal noise."""

    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.tensor(V))

    def forward(self, t: Tensor, z: Tensor, *x: Tensor) -> Tensor:
        return torch.sin(z * self.v + t)


class General(nn.Module):
    """Two noises for three units."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 6).double()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.layer(z)).reshape(-1, 3, 2)


class JaxDrift(eqx.Module):
    W: jax.Array
    b: jax.Array

    def __call__(self, t: jax.Array, z: jax.Array, *x: jax.Array) -> jax.Array:
        return jnp.tanh(self.W @ z + self.b) - z * jnp.cos(t) + (x[0] if x else 0)


class JaxDiffusion(eqx.Module):
    v: jax.Array

    def __call__(self, t: jax.Array, z: jax.Array, *x: jax.Array) -> jax.Array:
        return jnp.sin(z * self.v + t)


class Whole(nn.Module):
    """As torchsde has it."""

    noise_type = "diagonal"

    def __init__(self, sde_type: str = "ito") -> None:
        super().__init__()
        self.drift, self.diffusion, self.sde_type = Drift(), Diffusion(), sde_type

    def f(self, t: Tensor, z: Tensor) -> Tensor:
        return self.drift(torch.as_tensor(t), z)

    def g(self, t: Tensor, z: Tensor) -> Tensor:
        return self.diffusion(torch.as_tensor(t), z)


class Linear(nn.Module):
    """a z: the parts of a geometric Brownian motion."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.a * z


def torch_problem(method: str, **more: object) -> kp.SDEProblem:
    given = {"g": Diffusion(), "z0": torch.tensor(Z0), "t": GRID, "x": torch.tensor(X), "brownian": 3}
    return kp.SDEProblem(Drift(), **(given | {"sde_type": METHODS[method]} | more))  # type: ignore[arg-type]


def jax_problem(method: str, **more: object) -> kp.SDEProblem:
    given = {"x": jnp.array(X), "brownian": 3, "sde_type": METHODS[method]}
    f, g = JaxDrift(jnp.array(W), jnp.array(B)), JaxDiffusion(jnp.array(V))
    return kp.SDEProblem(f, g, jnp.array(Z0), GRID, **(given | more))  # type: ignore[arg-type]


def relative(a: object, b: object) -> float:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(abs(a - b).max() / abs(b).max())


# Solutions


@pytest.mark.parametrize(
    ("method", "sde_type", "order"),
    [("euler", "ito", 0.5), ("milstein", "ito", 1), ("heun", "stratonovich", 1), ("milstein", "stratonovich", 1)],
)
def test_strong_order_on_the_path_of_an_exact_solution(method: str, sde_type: str, order: float) -> None:
    """Of dz = a z dt + b z dW, z = exp((a - b^2 / 2) t + b W) in the sense of Ito, exp(a t + b W) in Stratonovich's."""
    a, b, trials, finest = 0.5, 0.8, 300, 64
    fine = np.linspace(0, 1, finest + 1)
    steps = np.random.default_rng(1).normal(size=(trials, finest, 1)) / finest**0.5
    path = np.concatenate([np.zeros((trials, 1, 1)), steps.cumsum(1)], 1)
    exact = np.exp(a - (b**2 / 2 if sde_type == "ito" else 0) + b * path[:, -1, 0])
    problem = kp.SDEProblem(
        Linear(a), Linear(b), torch.ones(trials, 1).double(), (0.0, 1.0), brownian=(fine, path), sde_type=sde_type
    )
    lengths = np.array([1 / 64, 1 / 32, 1 / 16, 1 / 8])
    errors = [abs(kp.solve(problem, method, steps=h).state[:, -1, 0].numpy() - exact).mean() for h in lengths]
    assert abs(np.polyfit(np.log(lengths), np.log(errors), 1)[0] - order) < 0.12


def test_milstein_is_of_order_one_with_a_single_noise_for_all_units() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3).double()

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return torch.sin(2 * self.layer(z))[..., None]

    trials, finest = 200, 512
    steps = np.random.default_rng(1).normal(size=(trials, finest, 1)) / finest**0.5
    path = np.concatenate([np.zeros((trials, 1, 1)), steps.cumsum(1)], 1)
    start, fine = torch.tensor(Z0[:1]).repeat(trials, 1), np.linspace(0, 1, finest + 1)
    problem = kp.SDEProblem(Drift(), Single(), start, (0.0, 1.0), brownian=(fine, path))
    ends = [kp.solve(problem, "milstein", steps=h).state[:, -1] for h in (1 / finest, 1 / 32, 1 / 8)]
    errors = [float((end - ends[0]).detach().abs().mean()) for end in ends[1:]]
    assert abs(np.log(errors[1] / errors[0]) / np.log(4) - 1) < 0.2


@pytest.mark.parametrize("method", ["euler", "milstein", "heun", "euler_heun"])
def test_torchsde_on_one_brownian_interval(method: str) -> None:
    sde, z0 = Whole(METHODS[method]), torch.tensor(Z0)
    noise = torchsde.BrownianInterval(0.0, 1.0, size=(2, 3), dtype=torch.float64, entropy=4)
    t = torch.linspace(0, 1, 5).double()
    reference = torchsde.sdeint(sde, z0, t, bm=noise, method=method, dt=0.125)
    found = kp.solve(kp.SDEProblem(sde, None, z0, t, brownian=noise), method, steps=0.125)
    assert relative(found.state, reference.detach().transpose(0, 1)) < 1e-12
    assert list(kp.linearize(found).parameters) == [name for name, _ in sde.named_parameters()]


@pytest.mark.parametrize(
    ("solver", "sde_type"),
    [(diffrax.ItoMilstein(), "ito"), (diffrax.Heun(), "stratonovich")],
)
def test_diffrax_on_one_brownian_tree(solver: diffrax.AbstractSolver, sde_type: str) -> None:
    problem = jax_problem("euler", x=None)
    tree = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (3,), jax.random.key(2), levy_area=diffrax.BrownianIncrement)
    drift, diffusion = ((lambda t, z, args, part=part: part(t, z)) for part in (problem.f, problem.g))
    diagonal = lambda t, z, args: jnp.diag(diffusion(t, z, args))  # noqa: E731
    saved = diffrax.SaveAt(ts=jnp.linspace(0, 1, 5))
    terms = diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diagonal, tree))
    reference = diffrax.diffeqsolve(terms, solver, 0.0, 1.0, 0.125, problem.z0[0], saveat=saved)
    given = problem.remake(z0=problem.z0[:1], t=np.linspace(0, 1, 5), brownian=tree, sde_type=sde_type)
    found = kp.solve(given, solver, steps=0.125)
    assert relative(found.state[0], reference.ys) < 1e-12


def test_a_tree_for_each_trial() -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    make = lambda key: diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (3,), key)  # noqa: E731
    mapped, listed = (
        kp.solve(jax_problem("euler", brownian=trees), steps=0.25).state
        for trees in (jax.vmap(make)(keys), [make(key) for key in keys])
    )
    assert relative(mapped, listed) < 1e-12


def test_terms_of_diffrax_are_taken_apart() -> None:
    """And weights that drift and diffusion share count once."""
    weights = {"w": jnp.array(W)}
    f = Partial(lambda p, t, z, args: jnp.tanh(p["w"] @ z), weights)
    g = Partial(lambda p, t, z, args: p["w"] * t, weights)
    tree = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (2, 3), jax.random.key(0))
    terms = diffrax.MultiTerm(diffrax.ODETerm(f), diffrax.ControlTerm(g, tree))
    flow = kp.linearize(kp.solve(kp.SDEProblem(terms, None, jnp.array(Z0), GRID)))
    plain = [Partial(lambda p, t, z, at=part.func: at(p, t, z, None), weights) for part in (f, g)]
    other = kp.linearize(kp.solve(kp.SDEProblem(*plain, jnp.array(Z0), GRID, brownian=tree)))
    assert flow.J.domain.size == other.J.domain.size == 9
    assert relative(flow.ntk.dense(), other.ntk.dense()) < 1e-12

    def states(w: jax.Array) -> jax.Array:
        dW, z, found = jnp.asarray(flow.solution.rows)[:, 1:, 3:6], jnp.array(Z0), [jnp.array(Z0)]
        for n, (t, h) in enumerate(zip(GRID, np.diff(GRID), strict=False)):
            z = z + h * jnp.tanh(z @ w.T) + t * dW[:, n] @ w.T
            found.append(z)
        return jnp.stack(found, 1)

    J = jax.jacrev(states)(weights["w"]).reshape(24, 9)
    assert relative(flow.J.dense(), J) < 1e-10


def test_shared_modules_of_torch_count_once() -> None:
    drift = Drift()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = drift

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return 0.3 * self.of(t, z)

    flow = kp.linearize(kp.solve(kp.SDEProblem(drift, Scaled(), torch.tensor(Z0), GRID)))
    assert list(flow.parameters) == ["f.W", "f.b"]
    methods = Whole()
    flow = kp.linearize(kp.solve(kp.SDEProblem(methods.f, methods.g, torch.tensor(Z0), GRID)))
    assert sorted(flow.parameters) == ["model.diffusion.v", "model.drift.W", "model.drift.b"]


def test_seeds_paths_and_increments_are_the_same_noise() -> None:
    seeded = kp.solve(torch_problem("euler"), "euler", steps=0.1)
    ends, dW = seeded.ends, seeded.rows[:, 1:, 3:6]
    path = np.concatenate([np.zeros((2, 1, 3)), dW.numpy().cumsum(1)], 1)
    for brownian in (dW, dW.numpy(), (ends, path), (torch.tensor(ends), torch.tensor(path))):
        again = kp.solve(torch_problem("euler", brownian=brownian), "euler", steps=0.1)
        assert relative(again.state, seeded.state) < 1e-12
    two = dW.reshape(1, 2, -1, 3)
    paths = torch_problem("euler", z0=torch.tensor(Z0[:1]), x=None, paths=2, brownian=two)
    assert kp.solve(paths, "euler", steps=0.1).state.shape == (2, 4, 3)
    middle = (seeded(0.3) + seeded(0.5)) / 2
    assert kp.solve(torch_problem("euler", x=None), "euler")(0.4).shape == middle.shape


# Flows


def states_of(solution: kp.Solution) -> Callable[..., Tensor]:
    """Parameters -> states, by a plain loop over the steps written out."""
    problem, rows, width = solution.problem, solution.rows, 3
    noise = rows.shape[-1] - 3 - 2 * (0 if problem.x is None else 3)

    def run(model: nn.Module) -> Tensor:
        z, found = problem.z0[problem.trials], []
        for row in rows.unbind(1):
            h, t, end, dW = row[0, 0], row[0, 1], row[0, 2], row[:, 3 : 3 + noise]
            x = () if problem.x is None else (row[:, 3 + noise : 6 + noise],)
            y = () if problem.x is None else (row[:, 6 + noise :],)
            times = partial(torch.mul, dW) if noise == width else partial(torch.einsum, "bn,bun->bu", dW)
            f, g = model.f(t, z, *x), model.g(t, z, *x)
            if solution.alg == "euler":
                z = z + h * f + times(g)
            elif solution.alg == "milstein":
                slope = torch.cos(z * model.g.v + t) * model.g.v
                z = z + h * f + g * dW + g * slope * (dW**2 - h) / 2
            elif solution.alg == "heun":
                guess = z + h * f + times(g)
                z = z + h * (f + model.f(end, guess, *y)) / 2 + (times(g) + times(model.g(end, guess, *y))) / 2
            else:
                z = z + h * f + (times(g) + times(model.g(end, z + times(g), *y))) / 2
            found.append(z)
        return torch.stack(found, 1)[:, solution.places]

    names = list(dict(problem.pair.named_parameters()))
    return lambda *values: functional_call(
        Applied(run, problem.pair), {f"call.{name}": v for name, v in zip(names, values, strict=True)}, ()
    )


@pytest.mark.parametrize("steps", [None, 0.1])
@pytest.mark.parametrize("method", [*METHODS, "general"])
def test_jacobian_and_identities(method: str, steps: float | None) -> None:
    problem = torch_problem("heun", x=None) if method == "general" else torch_problem(method)
    problem = problem.remake(g=General()) if method == "general" else problem
    solution = kp.solve(problem, "heun" if method == "general" else method, steps=steps)
    flow = kp.linearize(solution)
    assert not flow.untraced
    J = torch.autograd.functional.jacobian(states_of(solution), tuple(problem.pair.parameters()))
    J = torch.cat([part.reshape(24, -1) for part in J], 1)
    assert relative(flow.J.dense(), J) < 1e-10
    weights = torch.tensor(solution.weights)[None, :, None].expand(2, 4, 3).reshape(-1)
    assert relative(flow.ntk.dense(), J @ J.T * weights) < 1e-10
    P, K = flow.P.dense(), flow.K.dense()
    assert relative(P @ K @ flow.P.T.dense(), flow.ntk.dense()) < 1e-10
    assert relative(flow.B.dense() @ flow.core.dense() @ flow.B.T.dense(), K) < 1e-10
    assert relative(flow.P.inv.dense() @ P, torch.eye(24)) < 1e-10
    for op in (flow.P, flow.J, flow.B, flow.P.inv, flow.ntk.apart):
        assert kp.check_adjoint(op) < 1e-12
    assert abs(kp.trace(flow.core).value - flow.core.dense().trace()) < 1e-9


@pytest.mark.parametrize(
    ("method", "steps", "paths"), [pytest.param("milstein", None, 1, marks=pytest.mark.slow), ("heun", 0.25, 2)]
)
def test_torch_and_jax_agree(method: str, steps: float | None, paths: int) -> None:
    ours, theirs = (kp.solve(make(method, paths=paths), method, steps=steps) for make in (torch_problem, jax_problem))
    assert relative(theirs.state, ours.state) < 1e-12
    ours, theirs = kp.linearize(ours), kp.linearize(theirs)
    assert not theirs.untraced and list(ours.parameters) == list(theirs.parameters)
    for name in ("J", "ntk", "P", "K"):
        assert relative(getattr(theirs, name).dense(), getattr(ours, name).dense()) < 1e-10
    assert kp.check_adjoint(theirs.J) < 1e-12


def test_models_that_are_not_traced() -> None:
    class Branching(Diffusion):
        def forward(self, t: Tensor, z: Tensor, *x: Tensor) -> Tensor:
            return torch.stack([(2.0 if row[0] > 0 else 1.0) * torch.sin(row * self.v + t) for row in z])

    solution = kp.solve(torch_problem("euler", x=None, g=Branching()), "euler", steps=0.25)
    with pytest.warns(kp.UntracedWarning):
        flow = kp.linearize(solution)
    J = torch.autograd.functional.jacobian(states_of(solution), tuple(solution.model.parameters()))
    assert relative(flow.J.dense(), torch.cat([part.reshape(24, -1) for part in J], 1)) < 1e-10
    assert relative((flow.P @ flow.K @ flow.P.T).dense(), flow.ntk.dense()) < 1e-10


def test_flow_of_some_times_parameters_and_metrics() -> None:
    flow = kp.linearize(kp.solve(torch_problem("euler"), steps=0.1))
    mask = np.array([[1, 1, 0, 1], [1, 1, 1, 0]]) > 0
    part, J = flow.where(mask), flow.J.dense().reshape(2, 4, 3, -1) * torch.tensor(mask)[..., None, None]
    assert relative(part.J.dense(), J.reshape(24, -1)) < 1e-12
    assert relative((part.P @ part.K @ part.P.T).dense(), part.ntk.dense()) < 1e-10
    only = flow.only("g.v")
    assert relative(only.J.dense(), flow.J.dense()[:, -3:]) < 1e-12
    assert flow.truncate(1e-6).truncation.bound <= 1e-6
    rates = kp.linearize(flow.solution, metric=kp.LearningRates({"": 0.1, "g.v": 0.5}))
    assert kp.check_adjoint(rates.ntk.factor) < 1e-12


# The mean over paths


@pytest.fixture(scope="module")
def of_paths() -> kp.Flow:
    return kp.linearize(kp.solve(torch_problem("euler", x=None, paths=8), steps=0.25))


def test_mean_ntk_is_the_mean_of_the_paths(of_paths: kp.Flow) -> None:
    mean = kp.mean_ntk(of_paths)
    J = of_paths.J.dense().reshape(2, 8, 4, 3, -1)
    weights = torch.tensor(of_paths.solution.weights)[None, :, None].expand(2, 4, 3).reshape(-1)
    each = [J[:, p].reshape(24, -1) for p in range(8)]
    kernels = torch.stack([part @ part.T * weights for part in each])
    assert relative(mean.dense(), kernels.mean(0)) < 1e-12
    assert kp.check_adjoint(mean.factor) < 1e-12
    traces = np.array([float(kernel.trace()) for kernel in kernels])
    estimate = mean.moments().trace
    assert abs(estimate.value - traces.mean()) < 1e-10
    assert 1 < estimate.stderr / (traces.std(ddof=1) / 8**0.5) < 1.5  # widened by Student's factor
    root = weights.sqrt()
    plain = kernels * root[:, None] / root
    products = torch.einsum("pij,qij->pq", plain, plain)
    off = float(products[~torch.eye(8, dtype=torch.bool)].mean())
    assert abs(mean.moments().means[1] - off) < 1e-9 * off
    for axis in ("time", "unit", "trial"):
        found = mean.partial_trace(axis)
        assert relative(found.matrix, kp.partial_trace(kp.GramOperator(mean.factor), axis).matrix) < 1e-10
        assert kp.modes(mean, axis=axis, k=1).stderr is not None
    modes = kp.modes(mean.partial_trace("time"), k=2)
    assert modes.stderr is not None and float(modes.stderr[0]) > 0


@pytest.mark.parametrize("learn", [False, True])
def test_mean_of_a_readout_with_errors(of_paths: kp.Flow, learn: bool) -> None:
    readout = of_paths.output(nn.Linear(3, 2).double(), learn=learn)
    mean, paths = kp.mean_ntk(readout), of_paths.solution.problem.paths
    J = np.asarray(readout.J.dense()).reshape((-1, paths, np.prod(readout.values.shape[1:]), readout.J.domain.size))
    weights = np.repeat(np.asarray(of_paths.ntk.domain.measure)[:, 0], 2)
    each = np.einsum("aptn,bpsn->patbs", J, J) * weights
    expected = each.mean(0).reshape(2 * [each.shape[1] * each.shape[2]])
    assert mean.domain.axes == ("trial", "time", "out")
    assert relative(mean.dense(), expected) < 1e-12
    moments = mean.moments(samples=None)
    traces = np.einsum("patat->p", each)
    assert abs(moments.trace.value - traces.mean()) < 1e-10 * traces.mean()
    assert 1 < moments.trace.stderr / (traces.std(ddof=1) / paths**0.5) < 1.5  # widened by Student's factor
    assert kp.modes(mean.partial_trace("time"), k=2).stderr.shape == (2,)


def test_sampled_moments_of_the_mean_cover_the_exact_ones(of_paths: kp.Flow) -> None:
    mean = kp.mean_ntk(of_paths)
    exact, sampled = mean.moments(), mean.moments(samples=100, seed=1)
    assert abs(sampled.trace.value - exact.trace.value) < 0.2 * exact.trace.value
    assert relative(mean.partial_trace("time", samples=2000).matrix, mean.partial_trace("time").matrix) < 0.05


def test_error_bars_over_paths_cover() -> None:
    """Of 12 seeds of 8 paths each, the mean of 200 paths lies in most of the intervals."""
    many = kp.mean_ntk(kp.linearize(kp.solve(torch_problem("euler", x=None, paths=200, brownian=99)))).moments()
    inside = 0
    for seed in range(12):
        flow = kp.linearize(kp.solve(torch_problem("euler", x=None, paths=8, brownian=seed)))
        found = kp.mean_ntk(flow).moments().trace
        inside += abs(found.value - many.trace.value) < 1.96 * found.stderr
    assert inside >= 9


def test_mean_in_jax_is_that_of_torch(of_paths: kp.Flow) -> None:
    theirs = kp.mean_ntk(kp.linearize(kp.solve(jax_problem("euler", x=None, paths=8), steps=0.25)))
    ours = kp.mean_ntk(of_paths)
    assert relative(theirs.dense(), ours.dense()) < 1e-10
    assert abs(theirs.moments().effective_rank.value - ours.moments().effective_rank.value) < 1e-8
    assert relative(theirs.partial_trace("time").matrix, ours.partial_trace("time").matrix) < 1e-10


# What is refused


class Coupled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3).double()

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.layer(z)


@pytest.mark.parametrize(
    ("change", "alg", "options", "said"),
    [
        ({"g": General()}, "milstein", {}, "Levy areas"),
        ({"g": Coupled()}, "milstein", {}, "hangs on other units"),
        ({}, "heun", {}, "does not converge to the ito solution"),
        ({"sde_type": "stratonovich"}, "euler", {}, "does not converge to the stratonovich solution"),
        ({"sde_type": "Ito"}, None, {}, "expected 'ito' or 'stratonovich'"),
        ({}, "srk", {}, "no method for an SDE here"),
        ({}, "euler", {"rtol": 1e-3}, "adaptive steps"),
        ({}, "euler", {"dt": 0.1}, "dt= is here `steps=`"),
        ({}, "euler", {"bm": None}, "bm= is here `brownian=` of `kp.SDEProblem`"),
        ({}, "euler", {"steps": -1.0}, "positive length"),
        ({"t": (0.0, 1.0)}, "euler", {}, "on a span"),
        ({"brownian": np.zeros((2, 5, 3))}, "euler", {}, r"\[trial, step, noise\] = \[2, 3, 3\]"),
        ({"brownian": ([0.0, 0.5, 1.0], np.zeros((2, 3, 3)))}, "euler", {}, "no sample at t = 0.3"),
        ({"brownian": "seed"}, "euler", {}, "expected a seed"),
        ({"brownian": -1}, "euler", {}, "no negative number"),
        ({"brownian": jax.random.key(0)}, "euler", {}, "a key of jax.random"),
        ({"t": GRID[::-1]}, "euler", {}, "forward in time"),
        ({"g": nn.Linear(3, 3).double()}, "euler", {}, "the diffusion g failed"),
        ({"paths": 0}, "euler", {}, "1 or more"),
        ({"g": lambda t, z: Coupled()(t, z)}, "euler", {}, "plain function of parameters"),
        ({"g": None}, "euler", {}, "methods f and g"),
    ],
)
def test_refused_in_words(change: dict, alg: str | None, options: dict, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        kp.solve(torch_problem("euler", x=None).remake(**change), alg, **options)


def test_inputs_that_jump_and_too_few_paths_are_refused() -> None:
    def jumping(t: Tensor) -> Tensor:
        return torch.ones(3) * t

    jumping.jumps = [0.4]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="x jumps"):
        torch_problem("euler", x=jumping)
    with pytest.raises(ValueError, match="at least 4"):
        kp.mean_ntk(kp.linearize(kp.solve(torch_problem("euler", paths=2)))).moments()
    with pytest.raises(TypeError, match="SDEProblem"):
        kp.mean_ntk(kp.linearize(kp.solve(kp.DiscreteProblem(nn.RNNCell(2, 3), torch.zeros(2, 3, 2)))))
    with pytest.raises(TypeError, match="got int"):
        kp.mean_ntk(3)  # type: ignore


def test_noise_without_parameters_may_be_a_plain_function() -> None:
    problem = torch_problem("euler", x=None, g=lambda t, z: 0.1 * torch.ones_like(z))
    assert list(kp.linearize(kp.solve(problem)).parameters) == ["f.W", "f.b"]
