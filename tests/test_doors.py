"""What others bring along works as what the package has: each door is used by something defined here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from synthetic import diagonal, library, matrix, parameters, space
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import array_namespace, to_numpy
from kpflow_dyn._arrays.dots import row_dots
from kpflow_dyn.models import ClosedLoop, Law, Plant, initialize, make_init, make_model, to_jax
from kpflow_dyn.solvers import Dense, Eigenpairs, Estimate, Moments, Random, XTrace
from kpflow_dyn.tasks import TaskData, make_task

__all__ = ["library"]


def flow(cell: nn.Module | None = None, inputs: int = 3, trials: int = 4) -> kp.Flow:
    torch.manual_seed(0)
    cell = nn.RNNCell(inputs, 6).double() if cell is None else cell
    x = torch.randn(trials, 5, inputs, dtype=torch.float64)
    return kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))


# Trace estimators


@dataclass(frozen=True)
class Signs:
    """tr A = E x^T A x over random signs x (Hutchinson, 1990)."""

    def trace(self, apply: Any, n: int, samples: int, *, like: Any, seed: Random) -> Estimate:
        x = array_namespace(like).sign(seed.normal((samples, n), like))
        each = to_numpy(row_dots(x, apply(x)))
        return Estimate(float(each.mean()), float(each.std(ddof=1) / samples**0.5), samples, "random signs")


class SignsTwice(Signs):
    """And |A|_F^2 = E |A x|^2."""

    def moments(self, apply: Any, n: int, samples: int, *, like: Any, seed: Random) -> Moments:
        x = array_namespace(like).sign(seed.normal((samples, n), like))
        image = apply(x)
        each = np.stack([to_numpy(row_dots(x, image)), to_numpy(row_dots(image, image))])
        return Moments(each.mean(1), np.cov(each) / samples, samples, samples, "random signs", 1e-15)


class Columns:
    """tr L L* = |L|_F^2, from all columns of L: for what has a factor alone."""

    def trace_product(self, factor: Any, shape: tuple[int, int], samples: int, *, like: Any, seed: Random) -> Estimate:
        columns = factor[0](array_namespace(like).eye(shape[1], dtype=like.dtype))
        return Estimate(float(to_numpy(row_dots(columns, columns)).sum()), 0.0, (shape[1] + 1) // 2, "all columns")


def naive(op: kp.Operator) -> tuple[float, float]:
    """tr A and |A|_F^2 from the matrix."""
    A = op.to_scipy() @ np.eye(op.domain.size)
    return float(np.trace(A)), float(np.sum(A**2))


def test_a_trace_estimator_is_used_in_every_library(library: str) -> None:
    line = space(library, shape=(3, 4, 5))
    op = kp.MatrixOperator(matrix(line, line), line, line)
    found = kp.trace(op, samples=4000, seed=1, alg=Signs())
    assert abs(found.value - naive(op)[0]) < 4 * found.stderr and found.method == "random signs"
    again = kp.trace(op, samples=4000, seed=1, alg=Signs())
    assert again == found and kp.trace(op, samples=4000, seed=2, alg=Signs()) != found


def test_of_a_flow_and_until_it_is_good_enough() -> None:
    ntk = flow().ntk
    found = kp.trace(ntk, rtol=0.02, alg=Signs())
    assert found.stderr <= 0.02 * found.value and abs(found.value - naive(ntk)[0]) < 4 * found.stderr


def test_the_norm_by_an_estimator_of_traces_is_the_root_of_the_trace_of_the_square() -> None:
    op = kp.GramOperator(kp.Operator(*[diagonal(np.linspace(1, 2, 40)).domain] * 2, lambda q: 2 * q, None))
    found = kp.frobenius_norm(op, samples=50, alg=Signs())
    assert found.value == pytest.approx(naive(op)[1] ** 0.5)  # signs see a diagonal exactly
    wide = kp.MatrixOperator(np.ones((2, 3)), parameters(size=3), parameters(size=2))
    assert kp.frobenius_norm(wide, samples=2000, alg=Signs()).value == pytest.approx(6**0.5, rel=0.1)


def test_what_knows_both_moments_gives_norms_and_ranks() -> None:
    ntk = flow().ntk
    trace, square = naive(ntk)
    for name, truth in {"trace": trace, "frobenius_norm": square**0.5, "effective_rank": trace**2 / square}.items():
        found = getattr(kp, name)(ntk, samples=4000, alg=SignsTwice())
        assert abs(found.value - truth) < 4 * found.stderr < 0.2 * truth and found.applications == 4000


def test_what_needs_the_factor_gets_it_from_the_smaller_side() -> None:
    ntk = flow(trials=2).ntk
    found = kp.trace(ntk, alg=Columns())
    assert found.value == pytest.approx(naive(ntk)[0]) and found.method == "all columns"
    assert found.applications == (min(ntk.domain.size, ntk.factor.domain.size) + 1) // 2
    assert kp.frobenius_norm(flow(trials=1).P, alg=Columns()).value == pytest.approx(naive(flow(trials=1).P)[1] ** 0.5)


def test_the_whole_matrix_is_an_estimator_too() -> None:
    ntk = flow().ntk
    trace, square = naive(ntk)
    assert kp.trace(ntk, alg=Dense()).value == pytest.approx(trace) and kp.trace(ntk, alg=Dense()).stderr == 0
    assert kp.effective_rank(ntk, alg=Dense()).value == pytest.approx(trace**2 / square)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda op: kp.effective_rank(op, alg=Signs()), r"Signs gives tr A alone: it has no method moments"),
        (lambda op: kp.trace(op @ op, alg=Columns()), r"Columns estimates A = J J\* from J and J\*, and .* no factor"),
        (lambda op: kp.trace(op, alg="xtrace"), r"alg is 'xtrace', expected an object with trace\(...\)"),
        (lambda op: kp.trace(op, alg=XTrace), r"expected an object with trace\(...\)"),
        (lambda op: kp.trace(op, alg=Wrong()), r"Wrong.trace returned float, expected kp.solvers.Estimate"),
    ],
)
def test_what_an_estimator_lacks_is_said(ask: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        ask(flow().ntk)


class Wrong:
    def trace(self, apply: Any, n: int, samples: int, *, like: Any, seed: Random) -> float:
        return 1.0


# Eigensolvers


class Arpack:
    """scipy's eigsh, on the host."""

    def solve(self, apply: Any, n: int, k: int, *, like: Any, seed: Random) -> Eigenpairs:
        def on_rows(columns: np.ndarray) -> np.ndarray:
            rows = columns.reshape(n, -1).T
            return to_numpy(apply(array_namespace(like).asarray(rows.copy(), dtype=like.dtype))).T.reshape(
                columns.shape
            )

        make: Any = LinearOperator
        values, vectors = eigsh(make((n, n), matvec=on_rows, matmat=on_rows, dtype=float), k, which="LA", v0=np.ones(n))
        rows = array_namespace(like).asarray(vectors.T[::-1].copy(), dtype=like.dtype)
        return Eigenpairs(values[::-1].copy(), rows, np.zeros(k), np.ones(k, dtype=bool), 0, 0)


class ArpackBothEnds(Arpack):
    """With one of the options that `kp.eigs` has."""

    def solve(self, apply: Any, n: int, k: int, *, like: Any, seed: Random, which: str = "LA") -> Eigenpairs:
        if which == "LA":
            return super().solve(apply, n, k, like=like, seed=seed)
        found = super().solve(lambda rows: -apply(rows), n, k, like=like, seed=seed)
        return Eigenpairs(
            -found.values, *(getattr(found, name) for name in ("vectors", "residuals", "converged")), 0, 0
        )


@pytest.mark.parametrize("trials", [2, 8])
def test_an_eigensolver_of_symmetric_operators_and_of_products(trials: int) -> None:
    """More states than parameters, or fewer; triplets follow from the pairs of the smaller product."""
    given = flow(trials=trials)
    ours, theirs = kp.eigs(given.ntk, 4), kp.eigs(given.ntk, 4, alg=Arpack())
    np.testing.assert_allclose(to_numpy(theirs.values), to_numpy(ours.values), rtol=1e-8)
    rest = given.ntk.mv(theirs.vectors) - torch.as_tensor(to_numpy(theirs.values))[:, None, None, None] * theirs.vectors
    assert float(rest.norm()) < 1e-6 * float(theirs.values[0])
    triplets = kp.svds(given.J, 4, alg=Arpack())
    np.testing.assert_allclose(to_numpy(triplets.values), to_numpy(ours.values) ** 0.5, rtol=1e-8)
    assert to_numpy(triplets.residuals).max() < 1e-6 and bool(triplets.converged.all()) and triplets.applications > 0
    assert kp.summary(given, k=2, alg=Arpack()).modes.values.shape == (2,)


def test_options_reach_a_solver_that_takes_them_and_name_those_it_does_not() -> None:
    core = flow().core
    smallest = kp.eigs(core, 2, which="SA", alg=ArpackBothEnds())
    np.testing.assert_allclose(to_numpy(smallest.values), to_numpy(kp.eigs(core, 2, which="SA").values), atol=1e-8)
    with pytest.raises(TypeError, match=r"Arpack.solve takes no which; leave it out, or take another alg"):
        kp.eigs(core, 2, which="SA", alg=Arpack())
    with pytest.raises(TypeError, match=r"Dense.solve_product takes no start"):
        kp.eigs(core, 2, start=core.domain.normal(2, Random(0)), alg=Dense())
    with pytest.raises(TypeError, match=r"alg is 3, expected an object with solve\(...\)"):
        kp.eigs(core, 2, alg=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"which is 'largest', expected one of LA, SA, LM"):
        kp.eigs(flow().ntk, 2, which="largest")  # pyright: ignore[reportArgumentType]


def test_the_whole_matrix_calls_back_once() -> None:
    seen: list[int] = []
    kp.eigs(flow().core, 3, alg=Dense(), callback=lambda calls, residuals: seen.append(len(residuals)))
    assert seen == [3]


# Plants


@dataclass(frozen=True)
class Tank(Plant):
    """Two tanks that leak, the first filled by a pump: written once for both frameworks."""

    leak: float = 1.0

    state_size, control_size, state_names = 2, 1, ("upper", "lower")

    def velocity(self, xp: Any, *entries: Any) -> list[Any]:
        upper, lower, pump = entries
        return [pump - self.leak * xp.tanh(upper), self.leak * (xp.tanh(upper) - xp.tanh(lower))]


class Learnt(nn.Module):
    """A plant in torch alone, with a parameter of its own, that derives from nothing of ours."""

    control_size, state_names = 1, ("upper", "lower")

    def __init__(self) -> None:
        super().__init__()
        self.leak = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, z: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        upper, lower = torch.tanh(z).unbind(-1)
        return torch.stack([u[..., 0] - self.leak * upper, self.leak * (upper - lower)], dim=-1)


@pytest.mark.parametrize("plant", [Tank(), Learnt()], ids=["derived", "callable"])
def test_a_plant_in_a_loop_and_in_control(plant: Any) -> None:
    torch.manual_seed(0)
    loop = ClosedLoop(plant, nn.Linear(2, 1, bias=False).double())
    names = [name for name, _ in loop.named_parameters()]
    assert names == ["policy.weight"]  # the plant does not learn
    problem = kp.ODEProblem(loop, torch.zeros(2, 2, dtype=torch.float64) + 0.1, torch.linspace(0, 1, 6).double())
    solution = kp.solve(problem)
    assert kp.check_adjoint(kp.linearize(solution).ntk) < 1e-10
    z, u = torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    system = kp.control.linearize_lti(plant, z, u)
    np.testing.assert_allclose(system.A, [[-1, 0], [1, -1]], atol=1e-12)
    np.testing.assert_allclose(system.B, [[1], [0]], atol=1e-12)
    assert system.names == ("upper", "lower")
    assert kp.control.linearize_ltv(solution).names == ("upper", "lower")


def test_a_plant_that_derives_from_ours_serves_both_frameworks() -> None:
    loop = ClosedLoop(Tank(leak=2.0), nn.Linear(2, 1).double())
    with jax.enable_x64(True):
        there = to_jax(loop)(0.0, jax.numpy.asarray([0.3, 0.4]))
    here = loop(torch.tensor(0.0), torch.tensor([[0.3, 0.4]], dtype=torch.float64))[0]
    np.testing.assert_allclose(there, here.detach(), rtol=1e-12)


@dataclass(frozen=True)
class LightCart(kp.models.CartPole):
    """A cart of one's own, in the states of gymnasium's."""

    cart_mass: float = 0.9


def test_a_policy_for_a_plant_of_ones_own_in_an_environment_of_ones_own() -> None:
    pytest.importorskip("gymnasium")
    policy = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        policy.weight.copy_(torch.tensor([[0.0, 1.0, 0.0, 0.3]]))
    expected = kp.gym.rollout(policy, episodes=1, max_steps=20)
    np.testing.assert_array_equal(
        kp.gym.rollout(ClosedLoop(LightCart(), policy), episodes=1, max_steps=20).states, expected.states
    )
    short = kp.gym.Environment(
        name="CartPole-v1",
        plant=LightCart(gravity=9.8),
        dt=0.02,
        steps=20,
        state=lambda observation, before: observation[[0, 2, 1, 3]],
        applied=lambda u: np.where(u > 0, 10.0, -10.0),
        action=lambda u: int(u[0] > 0),
    )
    found = kp.gym.rollout(policy, short, episodes=1, max_steps=20)
    np.testing.assert_array_equal(found.states, expected.states)
    with pytest.raises(ValueError, match=r"the loop's plant is Tank\(leak=1.0\), but CartPole-v1 is a CartPole"):
        kp.gym.rollout(ClosedLoop(Tank(), policy))


# Tasks


@dataclass(frozen=True)
class Echo:
    """The input of some steps ago."""

    delay: int = 2

    def sample(self, trials: int | None, seed: int) -> TaskData:
        inputs = np.random.default_rng(seed).standard_normal((trials or 3, 8, 1))
        return TaskData(inputs, targets=np.roll(inputs, self.delay, axis=1), name="echo", dt=5.0)


MINE = """
import numpy as np
from kpflow_dyn.models import Law
from kpflow_dyn.tasks import TaskData

class Echo:
    def __init__(self, delay=2):
        self.delay = delay
    def sample(self, trials, seed):
        inputs = np.random.default_rng(seed).standard_normal((trials or 3, 8, 1))
        return TaskData(inputs, targets=np.roll(inputs, self.delay, axis=1), name="echo", dt=5.0)

class Identity(Law):
    def matrix(self, n, seed=0):
        return 0.5 * np.eye(n)

made = Echo(delay=1)
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "doors_of_mine.py"
    path.write_text(MINE)
    return path


def test_a_task_is_trained_on_and_analysed() -> None:
    data = make_task(Echo(), trials=4, seed=1)
    assert data.inputs.shape == (4, 8, 1) and make_task(Echo()).inputs.shape[0] == 3
    cell, readout = make_model("rnn", inputs=1, units=6)
    training = kp.train.fit(cell, data, readout, steps=5, lr=0.01)
    assert training.losses[-1] < training.losses[0]
    analysed = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(data.inputs).float())))
    found = kp.analyze(analysed, k=2, samples=40, task=data)
    assert found.time.values[1] - found.time.values[0] == 5.0


def test_a_task_in_a_sweep(tmp_path: Path) -> None:
    def spread(delay: int) -> float:
        return float(make_task(Echo(delay), trials=2).targets[:, delay].std())  # pyright: ignore[reportOptionalSubscript]

    sweep = kp.Sweep(spread, {"delay": [1, 2]}, tmp_path / "sweep")
    sweep.run()
    found = sweep.collect()
    assert found.sizes["delay"] == 2


def test_a_task_by_its_place(mine: Path) -> None:
    expected = Echo(3).sample(2, 1)
    np.testing.assert_array_equal(make_task(f"{mine}:Echo", trials=2, seed=1, delay=3).targets, expected.targets)
    assert make_task(f"{mine}:made", trials=2).targets is not None


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("nowhere.py:Echo", ValueError, "no file nowhere.py; the task takes module:name, or file.py:name"),
        ("not_there:Echo", ValueError, "no module 'not_there' in"),
        ("math:pi", TypeError, r"math:pi is 3.14.*, expected an object with sample\(...\)"),
        ("math:Echo", ValueError, "math has no name 'Echo'"),
        (3, TypeError, r"the task is 3, expected its name, or an object with sample"),
        (Echo, TypeError, "the task is <class"),
    ],
)
def test_what_is_no_task_is_said(spec: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_task(spec)


# Laws of weights


@dataclass(frozen=True)
class Circulant(Law):
    """W[i, j] = c[i - j]."""

    g: float = 1.0

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        c = self.g / n**0.5 * rng.standard_normal(n)
        return np.stack([np.roll(c, i) for i in range(n)], axis=1)

    def words(self) -> str:
        return "a circulant matrix"


class Identity:
    """A law that derives from nothing."""

    def matrix(self, n: int, seed: Any = 0) -> np.ndarray:
        return np.eye(n)


class Silent(Identity):
    """A law of the whole model: it knows other weights than the recurrent one."""

    def weights(self, model: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"bias_ih": np.zeros(model.hidden_size), "weight_hh": 0.5 * np.eye(model.hidden_size)}


def test_a_law_from_outside() -> None:
    W = Circulant(0.8).matrix(6, seed=2)
    cell = initialize(nn.RNNCell(3, 6).double(), Circulant(0.8), seed=2)
    np.testing.assert_array_equal(cell.weight_hh.detach(), W)
    by_name = make_model("gru", inputs=3, units=6, init=Circulant(0.8), dtype="float64", seed=2).cell
    np.testing.assert_array_equal(by_name.weight_hh[:6].detach(), W)
    assert Circulant(0.8).describe() == "Circulant(g=0.8): a circulant matrix"
    assert kp.analyze(flow(cell), k=2, samples=40, init=Circulant(0.8)).init == "Circulant(g=0.8): a circulant matrix"
    with pytest.raises(TypeError, match="g is str, expected a real number"):
        Circulant("1")  # pyright: ignore[reportArgumentType]


def test_a_law_that_derives_from_nothing_or_is_of_the_whole_model() -> None:
    assert torch.equal(initialize(nn.RNNCell(3, 6), Identity()).weight_hh, torch.eye(6))
    cell = initialize(nn.RNNCell(3, 6), Silent())
    assert torch.equal(cell.weight_hh, 0.5 * torch.eye(6)) and not cell.bias_ih.any()
    assert "Identity object" in kp.analyze(flow(), k=2, samples=40, init=Identity()).init


def test_a_law_by_its_place(mine: Path) -> None:
    assert (make_init(f"{mine}:Identity").matrix(3) == 0.5 * np.eye(3)).all()
    with pytest.raises(TypeError, match=r"expected an object with matrix\(...\)"):
        make_init("math:pi")
