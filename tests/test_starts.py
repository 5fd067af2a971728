"""Times of many starts in one batch, against the dense kernel of each by autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import nn

import kpflow_dyn as kp

TRIALS, TIMES, OUTPUTS = 2, 4, 2
x = torch.randn(TRIALS, TIMES, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
target = torch.randn(TRIALS, TIMES, OUTPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
mask = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0]]).double()
LAYERS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def layers(name: str, count: int = 3, units: int = 5) -> list[tuple[nn.Module, nn.Linear]]:
    torch.manual_seed(0)
    made = [(LAYERS[name](3, units, batch_first=True), nn.Linear(units, OUTPUTS)) for _ in range(count)]
    return [(layer.double(), readout.double()) for layer, readout in made]


def half_of(layer: Any, readout: Any, mask: torch.Tensor) -> tuple[float, float]:
    """L, and tau at half of it, from the dense kernel of the layer as torch runs it."""
    values = [value for value in (*layer.parameters(), *readout.parameters()) if value.requires_grad]
    root = (mask / (mask.sum() * OUTPUTS)).sqrt()[..., None]
    f = (root * (readout(layer(x)[0]) - target)).reshape(-1)
    rows = [torch.autograd.grad(entry, values, retain_graph=True, allow_unused=True) for entry in f]
    flat = [[v.new_zeros(v.shape) if g is None else g for g, v in zip(row, values, strict=True)] for row in rows]
    J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in flat]).numpy()
    rates, vectors = np.linalg.eigh(2 * J @ J.T)
    energies = (vectors.T @ f.detach().numpy()) ** 2
    left = lambda tau: float(np.exp(-2 * rates * tau) @ energies / energies.sum() - 0.5)  # noqa: E731
    return float(energies.sum()), float(brentq(left, 0, 1e6, xtol=1e-12))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("masked", [False, True])
def test_times_are_those_of_each_dense_kernel(name: str, masked: bool) -> None:
    starts, m = layers(name), mask if masked else torch.ones_like(mask)
    problem = kp.DiscreteProblem(starts[1][0], x)
    found = kp.forecast_starts(problem, starts, target, mask=m if masked else None, applications=16)
    expected = np.array([half_of(*start, m) for start in starts])
    np.testing.assert_allclose(found.energies.sum(1), expected[:, 0], rtol=1e-10)
    np.testing.assert_allclose(found.half, expected[:, 1], rtol=1e-6)
    assert list(found.order) == list(np.argsort(expected[:, 1]))


def krylov_of(layer: Any, readout: Any, count: int) -> np.ndarray:
    """Ritz values of the dense kernel in the space of e, H e, ..., H^(count - 1) e."""
    values = dict(nn.ModuleList([layer, readout]).named_parameters())

    def errors(values: dict[str, torch.Tensor]) -> torch.Tensor:
        of_layer, of_readout = (
            {name[2:]: v for name, v in values.items() if name[0] == number} for number in ("0", "1")
        )
        states = torch.func.functional_call(layer, of_layer, x)[0]
        return (torch.func.functional_call(readout, of_readout, states) - target).reshape(-1)

    found = torch.autograd.functional.jacobian(
        lambda *v: errors(dict(zip(values, v, strict=True))), (*values.values(),)
    )
    J = torch.cat([part.reshape(target.numel(), -1) for part in found], 1).detach().numpy()
    H, e = 2 * J @ J.T / target.numel(), errors(values).detach().numpy()
    Q = np.linalg.qr(np.stack([np.linalg.matrix_power(H, power) @ e for power in range(count)], 1))[0]
    return np.linalg.eigvalsh(Q.T @ H @ Q)


@pytest.mark.parametrize("count", [2, 3])
def test_few_applications_are_those_of_the_krylov_space(count: int) -> None:
    starts = layers("gru")
    found = kp.forecast_starts(kp.DiscreteProblem(starts[0][0], x), starts, target, applications=count)
    assert found.applications == count and found.rates.shape == (3, count)
    for rates, start in zip(found.rates, starts, strict=True):
        np.testing.assert_allclose(rates, krylov_of(*start, count), rtol=1e-8)


@pytest.mark.parametrize("name", LAYERS)
def test_as_many_applications_as_the_order_needs(name: str) -> None:
    starts = layers(name, 12)
    problem = kp.DiscreteProblem(starts[0][0], x)
    found = kp.forecast_starts(problem, starts, target)
    same = kp.forecast_starts(problem, starts, target, applications=found.applications)
    np.testing.assert_array_equal(found.half, same.half)
    fewer = [kp.forecast_starts(problem, starts, target, applications=k).settled for k in range(3, found.applications)]
    assert all(settled < 0.95 for settled in fewer)
    assert 3 <= found.applications <= 6 and (found.settled >= 0.95 or found.applications == 6)


def test_the_last_application_needs_no_jvp(monkeypatch: pytest.MonkeyPatch) -> None:
    starts, calls = layers("rnn"), []
    problem = kp.DiscreteProblem(starts[0][0], x)
    transforms = problem.backend.transforms
    jvp = transforms.jvp
    monkeypatch.setattr(transforms, "jvp", lambda *given: calls.append(given) or jvp(*given))
    kp.forecast_starts(problem, starts, target, applications=4)
    assert len(calls) == 3


def test_one_start_has_no_order_that_settles() -> None:
    starts = layers("rnn", 1)
    found = kp.forecast_starts(kp.DiscreteProblem(starts[0][0], x), starts, target)
    assert np.isnan(found.settled) and found.applications == 6


@pytest.mark.parametrize("name", ["rnn", "lstm", "lowrank"])
def test_jax_has_the_times_of_torch(name: str) -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        options = {"bias": False} if name in ("gru", "lstm") else {}  # of which torch has two, and equinox one
        starts = [kp.models.make_model(name, 3, 5, OUTPUTS, seed=seed, dtype="float64", **options) for seed in range(2)]
        there = [(kp.models.to_jax(cell), kp.models.to_jax(readout)) for cell, readout in starts]
        theirs = kp.DiscreteProblem(there[0][0], jax.numpy.asarray(x.numpy()))
        ours = kp.forecast_starts(kp.DiscreteProblem(starts[0].cell, x), starts, target, applications=4)
        found = kp.forecast_starts(theirs, there, jax.numpy.asarray(target.numpy()), applications=4)
    np.testing.assert_allclose(found.half, ours.half, rtol=1e-8)


def test_starts_of_two_architectures_are_refused() -> None:
    starts = [*layers("gru", 1), *layers("gru", 1, units=6)]
    with pytest.raises(ValueError, match="start 1 has the parameters"):
        kp.forecast_starts(kp.DiscreteProblem(starts[0][0], x), starts, target)
    with pytest.raises(ValueError, match="no starts"):
        kp.forecast_starts(kp.DiscreteProblem(starts[0][0], x), [], target)
    for wrong in (target[:, :1], target[..., 0], target.numpy()):
        with pytest.raises(ValueError, match="expected an array like the inputs"):
            kp.forecast_starts(kp.DiscreteProblem(starts[0][0], x), starts[:1], wrong)
    with pytest.raises(ValueError, match="applications is 1"):
        kp.forecast_starts(kp.DiscreteProblem(starts[0][0], x), starts[:1], target, applications=1)


def test_frozen_parameters_of_starts_do_not_learn() -> None:
    """The dense kernel is that of the parameters that torch gives a gradient."""
    starts = layers("gru")
    for layer, readout in starts:
        layer.weight_hh_l0.requires_grad_(False)
        readout.bias.requires_grad_(False)
    found = kp.forecast_starts(kp.DiscreteProblem(starts[0][0], x), starts, target, applications=16)
    np.testing.assert_allclose(found.half, [half_of(*start, torch.ones_like(mask))[1] for start in starts], rtol=1e-6)
    starts[1][0].weight_hh_l0.requires_grad_(True)
    with pytest.raises(ValueError, match=r"start 1 has the parameters .* frozen"):
        kp.forecast_starts(kp.DiscreteProblem(starts[0][0], x), starts, target)


def test_numbers_that_are_not_finite_are_explained() -> None:
    starts = layers("gru")
    hidden = torch.where(mask[..., None] > 0, target, torch.nan)
    kp.forecast_starts(kp.DiscreteProblem(starts[0][0], x), starts, hidden, mask=mask)
    with pytest.raises(ValueError, match="the target holds NaN or inf where it counts"):
        kp.forecast_starts(kp.DiscreteProblem(starts[0][0], x), starts, hidden)
    with torch.no_grad():
        starts[2][1].bias.fill_(torch.inf)
    with pytest.raises(ValueError, match="the outputs of start 2 hold NaN or inf"):
        kp.forecast_starts(kp.DiscreteProblem(starts[0][0], x), starts, target)
    with pytest.raises(TypeError, match=r"a start is torch\.nn\.GRU, expected a pair"):
        kp.forecast_starts(kp.DiscreteProblem(starts[0][0], x), [starts[0][0]], target)


def test_starts_are_printed_in_their_order() -> None:
    starts = [kp.models.make_model("gru", 2, 6, seed=seed) for seed in range(12)]
    found = kp.forecast_starts(kp.DiscreteProblem(starts[0].cell, torch.randn(3, 5, 2)), starts, torch.ones(3, 5, 1))
    lines = str(found).splitlines()
    assert [int(line.split()[1]) for line in lines[:10]] == found.order[:10].tolist()
    assert lines[10] == "and 2 later ones" and len(lines) == 12
