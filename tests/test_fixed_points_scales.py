"""Fixed points do not hang on the units of states and time, and none is called stable or unstable by round-off."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn.dynamics import FixedPoints, fixed_points

GRID = np.array([[x, y] for x in (-1.0, 0.0, 1.0) for y in (-1.0, 0.0, 1.0)])  # where z = z^3


class Model(nn.Module):
    """A field f(z), or a map F(z) to which the input is added."""

    def __init__(self, f: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float64, units: int = 1) -> None:
        super().__init__()
        self.hidden_size, self.input_size, self.f = units, 1, f
        self.one = nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.one * self.f(z)


def normal(count: int, units: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, units, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def of_field(f: Callable[[Tensor], Tensor], z0: Tensor, end: float = 5.0, **options: float) -> FixedPoints:
    times = torch.linspace(0, end, 30, dtype=z0.dtype)
    return fixed_points(kp.solve(kp.ODEProblem(Model(f, z0.dtype), z0, times)), **options)


def of_map(F: Callable[[Tensor], Tensor], z0: Tensor, **options: float) -> FixedPoints:
    x = torch.zeros(len(z0), 20, 1, dtype=z0.dtype)
    return fixed_points(kp.solve(kp.DiscreteProblem(Model(F, z0.dtype, z0.shape[1]), x, z0)), **options)


def ordered(found: FixedPoints, length: float) -> tuple[np.ndarray, FixedPoints]:
    """The fixed points in units of a length, in the order of GRID, so that they can be compared."""
    fixed = found[found.is_fixed]
    assert len(fixed) == 9 and found.complete is True, found
    rows = fixed.xstar / length
    order = np.lexsort(np.round(rows, 3).T[::-1])
    return rows[order], fixed[order]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rate", [1e-9, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("length", [1e-6, 1.0, 1e6])
def test_units_of_states_and_time_do_not_change_the_points(length: float, rate: float, dtype: torch.dtype) -> None:
    def f(z: Tensor) -> Tensor:
        return rate * length * (z / length - (z / length) ** 3)

    found = of_field(f, length * normal(8, 2, dtype), 5 / rate)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    rows, fixed = ordered(found, length)
    np.testing.assert_allclose(rows, GRID, atol=tolerance)
    assert fixed.is_stable.tolist() == (np.abs(GRID).sum(1) == 2).tolist() and fixed.index.sum() == 1
    slopes = np.sort(1 - 3 * GRID**2)[:, ::-1]
    np.testing.assert_allclose(fixed.eigval_J_xstar.real / rate, slopes, atol=10 * tolerance)
    np.testing.assert_allclose(fixed.F_xstar, f(torch.as_tensor(fixed.xstar)), atol=tolerance * rate * length)
    np.testing.assert_allclose(fixed.qstar, (fixed.F_xstar**2).sum(1) / 2, atol=1e-300)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1e-6, 1e6])
def test_units_of_the_states_of_a_map(length: float, dtype: torch.dtype) -> None:
    once, scaled = (of_map(lambda z, s=s: s * torch.tanh(2 * z / s), s * normal(8, 2, dtype)) for s in (1.0, length))
    (expected, of_one), (rows, fixed) = ordered(once, 1.0), ordered(scaled, length)
    np.testing.assert_allclose(rows, expected, atol=1e-9 if dtype == torch.float64 else 1e-5)
    assert fixed.is_stable.tolist() == of_one.is_stable.tolist() and fixed.index.tolist() == of_one.index.tolist()
    np.testing.assert_allclose(fixed.F_xstar, fixed.xstar, atol=1e-6 * length)


@pytest.mark.parametrize("length", [1.0, 1e-4, 1e-6])
def test_a_switch_has_three_in_small_units_too(length: float) -> None:
    def switch(z: Tensor) -> Tensor:
        x, y = (z / length).unbind(-1)
        return length * torch.stack([3 / (1 + y**4) - x, 3 / (1 + x**4) - y], -1)

    found = of_field(switch, 3 * length * torch.rand(8, 2, generator=torch.Generator().manual_seed(0)).double())
    assert len(found) == 3 and found.is_stable.sum() == 2 and found.complete is True


def test_states_near_one_point_do_not_set_the_scale_of_all() -> None:
    found = of_map(lambda z: torch.tanh(2 * z), 1e-9 * normal(4, 2)[:, :2])
    assert found.is_fixed.sum() == 9 and found.complete is True
    given = fixed_points(Model(lambda z: torch.tanh(2 * z)), starts=1e-3 * normal(20, 1))
    np.testing.assert_allclose(np.unique(np.abs(given.xstar).round(4)), [0, 0.9575][: len(given)])


def test_points_that_a_unique_takes_as_one_are_told() -> None:
    def f(z: Tensor) -> Tensor:
        return z - z**3 * 1e12

    found = of_field(f, 1e-6 * normal(8, 1), unique=1e-3, max_starts=512)
    assert len(found) == 1 and found.complete is False
    assert "1 point has another nearer than `unique`, left out as the same: give a smaller one" in found.missing
    assert len(of_field(f, 1e-6 * normal(8, 1), unique=1e-9)) == 3


def test_slow_is_in_the_units_of_the_model() -> None:
    def ghost(z: Tensor) -> Tensor:
        return 1e-6 * (z**2 + 1e-3)  # q = 5e-19 at the slowest state, for a rate of 1e-6

    assert len(of_field(ghost, -0.1 * normal(6, 1).abs(), 1e5, slow=1e-18)) == 1
    with pytest.warns(UserWarning, match=r"q <= 1e-19 \(the least was 5.0e-19\)"):
        assert len(of_field(ghost, -0.1 * normal(6, 1).abs(), 1e5, slow=1e-19)) == 0


def line(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """All decays to a line in six units."""
    u = normal(1, 6)[0] / normal(1, 6).norm()
    W = torch.outer(u, u).to(dtype)
    return lambda z: z + 0.1 * (z @ W.T - z)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_points_of_a_line_are_neither_stable_nor_unstable(dtype: torch.dtype) -> None:
    found = of_map(line(dtype), normal(6, 6, dtype), max_starts=256)
    fixed = found[found.is_fixed]
    assert len(fixed) > 50 and fixed.is_marginal.all() and fixed.is_degenerate.all()
    assert not fixed.is_stable.any() and not fixed.unstable.any() and not fixed.index.any()
    assert (fixed.is_neutral.sum(1) == 1).all() and np.isinf(fixed.time_constants[:, 0]).all()
    assert f"0 stable, 0 unstable, {len(fixed)} marginal; no index sum, as some are degenerate" in str(found)
    assert found.complete is None and f"{len(fixed)} points of a continuum, such as a line or ring" in found.missing
    assert "marginal" in found.table() and found.to_xarray().is_marginal.values.any()
    labels = fixed.plot().axes[0].get_legend_handles_labels()[1]
    assert labels == [f"marginal ({len(fixed)})"]


def test_points_of_a_ring_and_of_a_line_of_saddles() -> None:
    ring = of_field(lambda z: z * (1 - (z**2).sum(-1, keepdim=True)), normal(16, 2), max_starts=256)
    on_it = ring[np.linalg.norm(ring.xstar, axis=1) > 0.5]
    assert on_it.is_marginal.all() and len(on_it) > 20 and "points of a continuum" in ring.missing
    assert not ring[np.linalg.norm(ring.xstar, axis=1) < 0.5].is_stable.any()
    rates = torch.tensor([0.0, 0.2, -0.3], dtype=torch.float64)
    saddles = of_field(lambda z: rates * z, normal(8, 3), 1.0, max_starts=256)
    fixed = saddles[saddles.is_fixed]
    assert len(fixed) > 20 and (fixed.unstable == 1).all() and not fixed.is_marginal.any() and not fixed.index.any()


def test_single_points_that_are_degenerate_are_no_continuum() -> None:
    two = of_field(lambda z: -((z - z**3) ** 3), 0.3 * normal(16, 1), 0.1, max_starts=512)
    fixed = two[two.is_fixed]
    assert fixed.is_degenerate.all() and not fixed.is_stable.any()
    assert two.complete is None and "degenerate point" in two.missing and "continuum" not in two.missing


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_centre_is_marginal_and_has_an_index(dtype: torch.dtype) -> None:
    """A rotation in a random basis, of a field and of a map; and a defective pair, known to sqrt(eps) only."""
    basis = torch.eye(2) + 0.3 * normal(2, 2)
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    A = (basis @ turn @ basis.inverse()).to(dtype)
    of_both = of_field(lambda z: z @ A.T, normal(4, 2, dtype), 1.0), of_map(lambda z: z @ A.T, normal(4, 2, dtype))
    for found in of_both:
        assert len(found) == 1 and found.is_marginal.all() and found.index.tolist() == [1]
        assert not found.is_degenerate.any() and np.isinf(found.time_constants).all()
    flip = torch.tensor([[-1.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    D = (basis @ flip @ basis.inverse()).to(dtype)
    (kind,) = of_map(lambda z: z @ D.T, normal(4, 2, dtype)).is_neutral
    assert kind.all()


def test_what_is_slow_but_known_is_stable() -> None:
    for value, kind in ((1 - 1e-6, "stable"), (1 + 1e-6, "unstable"), (-1 + 1e-12, "stable"), (-1 - 1e-12, "unstable")):
        found = of_map(lambda z, value=value: value * z, normal(4, 1))
        assert kind in found.table().splitlines()[1] and found.is_stable.tolist() == [kind == "stable"]
