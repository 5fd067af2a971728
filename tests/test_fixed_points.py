"""Fixed points: all planted ones, with the stability that the dense Jacobian has, in both frameworks."""

from __future__ import annotations

import io
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.optimize import root
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn.dynamics import FixedPoints, fixed_points
from kpflow_dyn.dynamics._deflation import deflated
from kpflow_dyn.dynamics._levenberg import minimise
from kpflow_dyn.models import CTRNNCell, CTRNNField, plant_fixed_points

UNITS = 12


class Step(nn.Module):
    """A map of the state alone, with one parameter that does nothing."""

    def __init__(self, units: int, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden_size, self.input_size, self.step = units, 1, step
        self.zero = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.step(z) + self.zero


class Field(nn.Module):
    """A field of the state alone."""

    def __init__(self, rate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rate, self.zero = rate, nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.rate(z) + self.zero


def pitchfork() -> nn.RNNCell:
    """z = tanh(2 z)."""
    cell = nn.RNNCell(1, 1, bias=False).double()
    nn.init.constant_(cell.weight_hh, 2.0)
    return cell


def line(units: int = 3, drift: float = 0.0) -> Step:
    """Everything decays to a line, along which there is but a drift."""
    along = torch.ones(units, dtype=torch.float64) / units**0.5
    return Step(units, lambda z: z - 0.5 * (z - (z @ along)[:, None] * along) + drift * along)


def starts(count: int, units: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(count, units, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def distances(found: FixedPoints, points: np.ndarray) -> np.ndarray:
    """Of each of these points to the nearest one that was found."""
    return np.linalg.norm(found.xstar[:, None] - points, axis=2).min(0)


def test_all_planted_points_are_found_with_their_stability() -> None:
    torch.manual_seed(0)
    cell, planted, x = CTRNNCell(3, UNITS, alpha=0.3).double(), starts(5, UNITS), torch.randn(3).double()
    nn.init.normal_(cell.W, std=0.3 / UNITS**0.5)
    planted[:2] *= 3
    plant_fixed_points(cell, planted, x)
    near = planted.repeat(30, 1) + starts(150, UNITS, 0.3)
    found = fixed_points(kp.DiscreteProblem(cell, torch.zeros(1, 1, 3).double()), x, near)
    assert distances(found, planted.numpy()).max() < 1e-8
    assert found.is_fixed.all() and found.qstar.max() < 1e-24
    W, a = cell.W.detach().numpy(), 0.3
    for z, J, values, stable in zip(found.xstar, found.J_xstar, found.eigval_J_xstar, found.is_stable, strict=True):
        dense = (1 - a) * np.eye(UNITS) + a * W * (1 - np.tanh(z) ** 2)
        np.testing.assert_allclose(J, dense, atol=1e-13)
        size = np.abs(np.linalg.eigvals(dense))
        np.testing.assert_allclose(np.abs(values), np.sort(size)[::-1], atol=1e-9)
        assert stable == (size.max() < 1)
    assert 0 < found.is_stable.sum() < len(found)


def test_a_pitchfork_has_three() -> None:
    found = fixed_points(pitchfork(), starts=torch.linspace(-1, 1, 20)[:, None].double())
    order = np.argsort(found.xstar[:, 0])
    z = root(lambda z: np.tanh(2 * z) - z, 1.0, tol=1e-14).x[0]
    np.testing.assert_allclose(found.xstar[order, 0], [-z, 0, z], atol=1e-12)
    slope = 2 * (1 - np.array([z, 0, z]) ** 2)
    np.testing.assert_allclose(found.eigval_J_xstar[order, 0], slope, atol=1e-12)
    assert found.is_stable[order].tolist() == [True, False, True]
    assert found.index[order].tolist() == [1, -1, 1] and found.starts.sum() == 20
    np.testing.assert_allclose(found.F_xstar, np.tanh(2 * found.xstar), atol=1e-15)
    np.testing.assert_array_equal(np.sign(found.x_init[order[[0, 2]], 0]), [-1, 1])


def test_the_zeros_of_a_field_are_those_of_scipy() -> None:
    torch.manual_seed(1)
    field = CTRNNField(3, inputs=2, tau=[0.5, 1.0, 2.0], gain=3.0).double()
    nn.init.normal_(field.b, std=0.3)
    x, given = np.array([0.2, -0.1]), starts(60, 3, 3.0)
    problem = kp.ODEProblem(field, torch.zeros(1, 3).double(), (0.0, 1.0), x=lambda t: torch.zeros(2).double())
    found = fixed_points(problem, x, given)

    def rate(z: np.ndarray) -> np.ndarray:
        at = torch.from_numpy(np.atleast_2d(z)), torch.from_numpy(x[None])
        return field(torch.tensor(0.0), *at).detach().numpy()[0]

    solved = [result.x for z in given.numpy() if (result := root(rate, z, tol=1e-13)).success]
    assert distances(found, np.array(solved)).max() < 1e-8
    assert len(found) > 1 and found.index.sum() == 1 and found.continuous
    assert max(np.abs(rate(z)).max() for z in found.xstar) < 1e-12
    W, tau = field.W.detach().numpy(), np.array([0.5, 1.0, 2.0])
    for z, values, stable in zip(found.xstar, found.eigval_J_xstar, found.is_stable, strict=True):
        dense = (W * (1 - np.tanh(z) ** 2) - np.eye(3)) / tau[:, None]
        expected = np.linalg.eigvals(dense)
        np.testing.assert_allclose(values.real, np.sort(expected.real)[::-1], atol=1e-9)
        assert stable == (expected.real.max() < 0)


def gru(seed: int = 3) -> nn.GRUCell:
    torch.manual_seed(seed)
    cell = nn.GRUCell(2, 6).double()
    nn.init.normal_(cell.weight_hh, std=1.2)
    return cell


def test_a_gru_rests_in_its_stable_points() -> None:
    cell, x = gru(), torch.randn(20, 30, 2).double()
    found = fixed_points(kp.DiscreteProblem(cell, x))
    z, held = kp.solve(kp.DiscreteProblem(cell, x)).state[:, -1], torch.zeros(20, 2).double()
    with torch.no_grad():
        for _ in range(3000):
            z = cell(held, z)
        at_rest = (cell(held, z) - z).abs().amax(1) < 1e-12
    assert at_rest.any()
    assert distances(found[found.is_stable], z[at_rest].numpy()).max() < 1e-8
    for point, J, F in zip(found.xstar, found.J_xstar, found.F_xstar, strict=True):
        exact: Tensor = torch.autograd.functional.jacobian(  # type: ignore[assignment]
            lambda z: cell(held[:1], z[None])[0], torch.from_numpy(point)
        )
        np.testing.assert_allclose(J, exact.numpy(), atol=1e-13)
        np.testing.assert_allclose(F, cell(held[:1], torch.from_numpy(point)[None])[0].detach().numpy(), atol=1e-14)


@pytest.mark.parametrize("make", [nn.LSTMCell, nn.LSTM, nn.GRU])
def test_states_of_several_parts(make: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    options = {"num_layers": 2} if make is nn.GRU else {}
    cell = make(2, 3, **options).double()
    found = fixed_points(cell, np.zeros(2), starts(30, 6))
    np.testing.assert_allclose(found.xstar, found.F_xstar, atol=1e-12)
    step = kp.solve(kp.DiscreteProblem(cell, torch.zeros(1, 400, 2).double())).state[0, -1]
    assert distances(found, step[None].numpy()).max() < 1e-8


def test_a_line_of_fixed_points_gives_many() -> None:
    found = fixed_points(line(), starts=starts(40, 3))
    assert len(found) > 30 and found.is_fixed.all()
    np.testing.assert_allclose(found.xstar - found.xstar.mean(1, keepdims=True), 0, atol=1e-10)
    np.testing.assert_allclose(found.eigval_J_xstar.real, [[1, 0.5, 0.5]] * len(found), atol=1e-12)


def test_a_drift_along_the_line_makes_slow_points_of_them() -> None:
    found = fixed_points(line(drift=1e-5), starts=starts(40, 3), iterations=60)
    assert len(found) > 1 and not found.is_fixed.any()
    np.testing.assert_allclose(found.qstar, 0.5e-10, rtol=1e-3)
    with pytest.warns(
        UserWarning, match=r"none of 40 starts came to a point with q <= 1e-12 \(the least was 5.0e-11\)"
    ):
        fixed_points(line(drift=1e-5), starts=starts(40, 3), slow=1e-12, iterations=60)


def test_each_start_may_have_its_own_input() -> None:
    cell = CTRNNCell(1, 1, alpha=0.5).double()
    nn.init.zeros_(cell.W)
    nn.init.ones_(cell.U)
    x = np.repeat([[0.3], [-0.2]], 5, axis=0)
    found = fixed_points(cell, x, starts(10, 1))
    np.testing.assert_allclose(found.xstar, found.inputs, atol=1e-13)  # z = x
    assert sorted(found.inputs[:, 0]) == [-0.2, 0.3] and found.starts.tolist() == [5, 5]


def test_what_runs_away_is_no_point() -> None:
    problem = kp.ODEProblem(Field(lambda z: torch.exp(-z)), torch.zeros(1, 1).double(), (0.0, 1.0))
    with pytest.warns(UserWarning, match="running away"):
        found = fixed_points(problem, starts=starts(20, 1, 0.1))
    assert len(found) == 0 and found.J_xstar.shape == (0, 1, 1) and found.is_stable.shape == (0,)
    assert found.to_xarray().sizes["point"] == 0
    found.plot().savefig(io.BytesIO())


def test_starts_that_break_the_step_are_left_out() -> None:
    cell = Step(1, lambda z: z.sqrt() - 0.1)
    found = fixed_points(cell, starts=torch.tensor([[-1.0], [0.9], [0.5]], dtype=torch.float64))
    np.testing.assert_allclose(np.sort(found.xstar[:, 0])[-1], 0.4 + 0.15**0.5, atol=1e-12)
    assert found.starts.sum() <= 2


def test_the_same_seed_gives_the_same_points_and_indexing_takes_some() -> None:
    problem = kp.DiscreteProblem(gru(), torch.randn(4, 10, 2, generator=torch.Generator().manual_seed(0)).double())
    once, again = (fixed_points(problem, starts=64, seed=5) for _ in range(2))
    np.testing.assert_array_equal(once.xstar, again.xstar)
    assert once.states.shape == (4, 10, 6)
    assert len(once[once.is_stable]) == once.is_stable.sum() and len(once[0]) == 1
    np.testing.assert_array_equal(once[0].eigvec_J_xstar[0], once.eigvec_J_xstar[0])
    dataset = once.to_xarray()
    J, vectors, values = dataset.J_xstar.values, dataset.eigvec_J_xstar.values, dataset.eigval_J_xstar.values
    np.testing.assert_allclose(J @ vectors, vectors * values[:, None], atol=1e-10)


def test_float32_is_enough_for_points_of_its_own_precision() -> None:
    found = fixed_points(pitchfork().float(), starts=torch.linspace(-1, 1, 9)[:, None])
    np.testing.assert_allclose(np.sort(found.xstar[:, 0]), [-0.957504, 0, 0.957504], atol=1e-5)
    assert found.is_fixed.all()


class TorchGRU(eqx.Module):
    """nn.GRUCell in JAX."""

    W: jax.Array
    U: jax.Array
    b: jax.Array
    c: jax.Array
    hidden_size: int = 6

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        r_x, u_x, n_x = jnp.split(self.U @ x + self.b, 3)
        r_z, u_z, n_z = jnp.split(self.W @ z + self.c, 3)
        update = jax.nn.sigmoid(u_x + u_z)
        return (1 - update) * jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_z) * n_z) + update * z


def test_jax_finds_the_same(x64: None) -> None:
    cell, x, given = gru(), np.array([0.1, -0.3]), starts(12, 6, 0.5)
    weights = (cell.weight_hh, cell.weight_ih, cell.bias_ih, cell.bias_hh)
    twin = TorchGRU(*(jnp.asarray(w.detach().numpy()) for w in weights))
    both = fixed_points(cell, x, given), fixed_points(twin, x, jnp.asarray(given.numpy()))
    expected, found = (points[points.is_fixed] for points in both)
    assert len(found) == len(expected) > 1
    assert distances(found, expected.xstar).max() < 1e-10
    nearest = np.linalg.norm(found.xstar[:, None] - expected.xstar, axis=2).argmin(0)
    np.testing.assert_allclose(found.J_xstar[nearest], expected.J_xstar, atol=1e-9)
    assert (found.is_stable[nearest] == expected.is_stable).all()


def test_a_field_of_jax(x64: None) -> None:
    field = jax.tree_util.Partial(lambda a, t, z: a * z - z**3, jnp.ones(1))
    found = fixed_points(kp.ODEProblem(field, jnp.zeros((1, 1)), (0.0, 1.0)), starts=np.linspace(-2, 2, 9)[:, None])
    order = np.argsort(found.xstar[:, 0])
    np.testing.assert_allclose(found.xstar[order, 0], [-1, 0, 1], atol=1e-12)
    np.testing.assert_allclose(found.eigval_J_xstar[order, 0], [-2, 1, -2], atol=1e-10)
    assert found.is_stable[order].tolist() == [True, False, True] and found.index.sum() == 1


PROBLEM = kp.DiscreteProblem(nn.GRUCell(2, 3).double(), torch.zeros(1, 4, 2).double())


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((PROBLEM, np.zeros(3)), {}, r"x has shape \(256, 3\), expected \[n, input\] with input = 2"),
        (
            (PROBLEM, np.zeros((5, 2))),
            {},
            r"x has shape \(5, 2\), one input for each start, and starts='auto' draws as",
        ),
        ((PROBLEM, np.array([0.0, np.nan])), {}, "x holds NaN or inf"),
        ((PROBLEM, None, np.zeros((4, 2))), {}, r"starts has shape \(4, 2\), expected \[n, unit\] with unit = 3"),
        ((PROBLEM, None, np.zeros(3)), {}, "starts has shape"),
        ((PROBLEM, None, np.array([[0.0, 0, 0], [0, np.inf, 0]])), {}, "starts holds NaN or inf, first in row 1"),
        ((PROBLEM, None, 0), {}, "expected at least one start"),
        ((PROBLEM, None, "many"), {}, "starts is .many., expected .auto., a number of starts"),
        ((PROBLEM,), {"max_starts": 0}, "max_starts is 0"),
        ((PROBLEM,), {"noise": -1.0}, "noise >= 0"),
        ((PROBLEM,), {"slow": 0.0}, "slow is 0.0, expected a positive number"),
        ((PROBLEM,), {"unique": -1.0}, "unique is -1.0"),
        ((PROBLEM,), {"iterations": 0}, "iterations is 0"),
        ((nn.GRUCell(2, 3).double(),), {}, "pass starts"),
        ((Field(torch.sin), None, np.zeros((1, 1))), {}, "width of its input is unknown"),
    ],
)
def test_bad_input_is_explained(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fixed_points(*arguments, **options)


@pytest.mark.parametrize("given", [kp.StaticProblem(nn.Linear(2, 2), torch.zeros(1, 2)), "cell"])
def test_what_has_no_dynamics_is_refused(given: object) -> None:
    with pytest.raises(TypeError, match="has no dynamics; expected a cell"):
        fixed_points(given)


def rotated(units: int, gain: float = 2.0, tilt: float = 0.0) -> kp.Solution:
    """3^units fixed points, 2^units of them stable: z = tanh(gain z + tilt) in rotated axes, from kicks."""
    Q, b = torch.linalg.qr(starts(units, units))[0], tilt * starts(units, units)[0]
    cell = Driven(units, lambda z: torch.tanh(gain * (z @ Q) + b) @ Q.T)
    return kp.solve(kp.DiscreteProblem(cell, 0.3 * starts(20 * 40, units).reshape(20, 40, units)))


class Driven(Step):
    """A map to which the input is added."""

    def __init__(self, units: int, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__(units, step)
        self.input_size = units

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return super().forward(x, z) + x


@pytest.mark.parametrize("tilt", [0.0, 0.1])
def test_rounds_of_starts_find_what_a_fixed_number_misses(tilt: float) -> None:
    solution = rotated(4, tilt=tilt)
    few, found = fixed_points(solution, starts=256), fixed_points(solution)
    assert len(few) < 81 and few.tried == 256 and few.complete is False
    assert f"the index sum is {few.index.sum()}, expected 1" in few.missing
    assert "points were reached by one start only: another finds a new one with probability 0.0" in few.missing
    assert len(found) == 81 and found.is_stable.sum() == 16 and found.index.sum() == 1
    assert found.complete is True and not found.missing and found.starts.sum() <= found.tried <= 4096
    counts = np.bincount(found.unstable)
    assert counts.tolist() == [16, 32, 24, 8, 1]  # as many as a cube has corners, edges, ...
    np.testing.assert_array_equal(found.index, (-1) ** found.unstable)
    again = fixed_points(solution)
    np.testing.assert_array_equal(found.xstar, again.xstar)
    assert found.tried == again.tried


def test_a_search_that_is_cut_short_says_what_it_did_not_find() -> None:
    found = fixed_points(rotated(4), max_starts=300)
    assert found.tried == 300 and found.complete is False
    assert "points were reached by one start only" in found.missing
    assert found[:3].complete is None and found[:3].missing == f"a selection of 3 of the {len(found)} points"
    text = repr(found)
    assert "complete  no, from 300 starts" in text and max(map(len, text.splitlines())) <= 100


def test_states_without_spread_do_not_hide_the_other_points() -> None:
    cell = nn.RNNCell(1, 2, bias=False).double()
    cell.weight_hh.data = 2 * torch.eye(2).double()
    found = fixed_points(kp.DiscreteProblem(cell, torch.zeros(2, 5, 1).double()))
    assert len(found) == 9 and found.complete is True and found.unstable.tolist().count(1) == 4


@pytest.mark.parametrize(("seed", "units", "gain"), [(3, 2, 3.0), (4, 3, 3.0), (28, 3, 3.0), (14, 4, 1.5)])
def test_states_at_rest_do_not_hide_the_other_points(seed: int, units: int, gain: float) -> None:
    """All points are those that scipy finds from many starts."""
    generator, cell = torch.Generator().manual_seed(seed), nn.RNNCell(1, units).double()
    W, b = gain * torch.randn(units, units, generator=generator) / units**0.5, torch.randn(units, generator=generator)
    for weight, value in zip(cell.parameters(), (torch.zeros(units, 1), W, 0 * b, 0.3 * b), strict=True):
        weight.data = value.double()
    W, b = cell.weight_hh.detach().numpy(), cell.bias_hh.detach().numpy()
    settled = kp.solve(kp.DiscreteProblem(cell, torch.zeros(2, 500, 1).double())).state[:, -1]
    found = fixed_points(kp.DiscreteProblem(cell, torch.zeros(2, 20, 1).double(), settled))
    tried = np.random.default_rng(0).uniform(-1, 1, (400, units))
    ends = [root(lambda z: np.tanh(W @ z + b) - z, z, tol=1e-12) for z in tried]
    points = np.unique([np.round(end.x, 6) + 0.0 for end in ends if end.success], axis=0)
    assert found.complete is True and len(found) == len(points) > 1
    assert distances(found, points).max() < 1e-5


def test_a_ghost_in_float32_is_slow_and_not_fixed() -> None:
    """Just beyond a saddle-node of z = tanh(2 z + b), and of dz/dt = z^2."""
    cell, z = nn.RNNCell(1, 1), -(0.5**0.5)
    for weight, value in zip(cell.parameters(), (0.0, 2.0, 0.0, np.arctanh(z) - 2 * z + 1e-4), strict=True):
        nn.init.constant_(weight, value)
    found = fixed_points(kp.DiscreteProblem(cell, torch.zeros(3, 40, 1), torch.tensor([[-0.9], [-1.0], [0.5]])))
    ghost = found.xstar[~found.is_fixed, 0]
    np.testing.assert_allclose(ghost, np.full(len(ghost), z), atol=0.02)
    assert len(ghost)
    fixed = root(lambda v: np.tanh(2 * v + np.arctanh(z) - 2 * z + 1e-4) - v, 1.0).x
    np.testing.assert_allclose(found.xstar[found.is_fixed, 0], fixed, atol=1e-6)
    field = Field(lambda z: z**2 + 1e-5).float()
    slow = fixed_points(kp.ODEProblem(field, starts(6, 1).float(), (0.0, 0.05)))
    assert len(slow) and not slow.is_fixed.any()


def test_points_nearer_than_unique_are_said_to_be_a_reason() -> None:
    field = Field(lambda z: -z * (z - 3e-4) * (z + 5e-3))
    found = fixed_points(kp.ODEProblem(field, starts(6, 1), (0.0, 0.05)), max_starts=512)
    assert len(found) == 2 and found.complete is False
    assert "or nearer to another than `unique`" in found.missing


def test_rounds_of_starts_of_a_field() -> None:
    Q = torch.linalg.qr(starts(3, 3))[0]
    field = Field(lambda z: torch.tanh(2 * (z @ Q)) @ Q.T - z)
    found = fixed_points(kp.ODEProblem(field, 0.5 * starts(10, 3), (0.0, 8.0)))
    assert len(found) == 27 and found.complete is True and found.index.sum() == 1
    slope = np.linalg.eigvalsh((found.J_xstar + found.J_xstar.transpose(0, 2, 1)) / 2)
    np.testing.assert_allclose(np.sort(found.time_constants), np.sort(-1 / slope), rtol=1e-6)


class Turned(eqx.Module):
    """z = Q tanh(2 Q^T z) + x."""

    Q: jax.Array
    hidden_size: int

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return self.Q @ jnp.tanh(2 * self.Q.T @ z) + x


@pytest.mark.slow
def test_rounds_of_starts_in_jax(x64: None) -> None:
    Q = jnp.asarray(torch.linalg.qr(starts(3, 3))[0].numpy())
    inputs = jnp.asarray(0.3 * starts(20 * 40, 3).reshape(20, 40, 3).numpy())
    found = fixed_points(kp.DiscreteProblem(Turned(Q, 3), inputs))
    assert len(found) == 27 and found.is_stable.sum() == 8 and found.complete is True


def test_time_constants_of_a_map_are_in_steps() -> None:
    cell = Step(2, lambda z: z * torch.tensor([0.5, -2.0], dtype=torch.float64))
    found = fixed_points(cell, starts=starts(5, 2))
    np.testing.assert_allclose(found.time_constants[0], [-1 / np.log(2), 1 / np.log(2)])
    assert found.unstable.tolist() == [1]


def test_where_the_index_sum_cannot_be_used() -> None:
    on_a_line = fixed_points(line(), starts=starts(40, 3))
    assert on_a_line.complete is None
    assert f"{len(on_a_line)} points of a continuum, such as a line or ring" in on_a_line.missing
    growing = fixed_points(Step(1, lambda z: z + z**3 - 0.25 * z), starts=starts(40, 1))
    assert len(growing) == 3 and growing.index.sum() == -1
    assert growing.complete is None and "states far away were not seen to return" in growing.missing
    cell = CTRNNCell(1, 1, alpha=0.5).double()
    of_two = fixed_points(cell, np.repeat([[0.3], [-0.2]], 5, axis=0), starts(10, 1))
    assert of_two.complete is None and "under different inputs" in of_two.missing
    alone = fixed_points(pitchfork(), starts=torch.linspace(-1, 1, 20)[:, None].double())
    assert alone.complete is None and 'starts="auto" also tries others' in alone.missing


def test_rounds_stop_soon_on_a_line() -> None:
    found = fixed_points(kp.DiscreteProblem(line(), torch.zeros(8, 5, 1).double(), starts(8, 3)), max_starts=1024)
    assert found.tried == 512 and found.complete is None


def test_deflation_leads_to_other_zeros_and_its_jacobian_is_that_of_autograd() -> None:
    known, z = np.array([[0.9575], [-0.9575]]), starts(6, 1)

    def residual(_numbers: np.ndarray, z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(2 * z) - z, (2 / torch.cosh(2 * z) ** 2 - 1)[..., None]

    product = deflated(residual, known, 0.5, lambda function: function)
    _, J = product(np.arange(6), z)
    exact = torch.autograd.functional.jacobian(lambda z: product(np.arange(6), z)[0].sum(0), z)
    np.testing.assert_allclose(J[:, 0, 0], exact[0, :, 0], rtol=1e-8)
    ends = minimise(product, torch.tensor([[0.9], [-0.7]]).double(), 100, lambda function: function)
    np.testing.assert_allclose(ends, 0, atol=1e-8)


def test_the_progress_and_the_table() -> None:
    calls: list[tuple] = []
    found = fixed_points(rotated(2), progress=lambda *done: calls.append(done))
    assert calls == [("starts", 256, 4096)] and found.tried == 512
    lines = found.table(4).splitlines()
    assert len(lines) == 6 and "unstable directions" in lines[0] and lines[-1] == "and 5 more"
    dataset = found.to_xarray()
    assert dataset.unstable.sizes == {"point": 9} and dataset.attrs["tried"] == 512
    assert dataset.attrs["complete"] == "yes" and dataset.time_constants.dims == ("point", "eigenvalue")
    labels = found.plot().axes[0].get_legend_handles_labels()[1]
    assert labels == ["stable (4)", "unstable (5)"]
