"""Two models under a loss: against dense Jacobians and Hessians of the user's own model and loss, by autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import subspace_angles
from torch import Tensor, nn

import kpflow_dyn as kp
import kpflow_dyn._learning.curvature
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn.models import to_jax
from kpflow_dyn.report import page_of
from kpflow_dyn.solvers import Estimate

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
TRIALS, TIMES, OUT = 3, 4, 3
X = RNG.standard_normal((TRIALS, TIMES, 2))
TARGET = RNG.standard_normal((TRIALS, TIMES, OUT))
CLASSES = RNG.integers(0, OUT, (TRIALS, TIMES))
PARTS = RNG.dirichlet(np.ones(OUT), (TRIALS, TIMES))
MASK = RNG.random((TRIALS, TIMES)) + 0.1
MASK[0, 2:] = MASK[1, 0] = 0
COUNTS = MASK > 0


class Model:
    """A GRU with a readout: its outputs as a function of all parameters, and its flow in either framework.

    Without biases, which are other parameters in JAX.
    """

    def __init__(self, seed: int, units: int = 4, x: np.ndarray = X) -> None:
        torch.manual_seed(seed)
        self.x = x
        self.cell, self.readout = nn.GRUCell(2, units, bias=False).double(), nn.Linear(units, OUT).double()

    def outputs(self, values: dict[str, Tensor]) -> Tensor:
        parts = [
            {n.removeprefix(f"{part}."): v for n, v in values.items() if n.startswith(part)} for part in ("cell", "out")
        ]
        z, states = torch.zeros(len(self.x), self.cell.hidden_size, dtype=torch.float64), []
        for x_t in torch.from_numpy(self.x).unbind(1):
            z = torch.func.functional_call(self.cell, parts[0], (x_t, z))
            states.append(z)
        return torch.func.functional_call(self.readout, parts[1], torch.stack(states, 1))

    def dense(self) -> tuple[np.ndarray, Tensor]:
        """J J^T, and the outputs."""
        values = {f"cell.{n}": p.detach() for n, p in self.cell.named_parameters()}
        values |= {f"out.{n}": p.detach() for n, p in self.readout.named_parameters()}
        J = torch.cat(
            [j.reshape(self.x[..., 0].size * OUT, -1) for j in torch.func.jacrev(self.outputs)(values).values()], 1
        )
        return (J @ J.T).numpy(), self.outputs(values)

    def flow(self, framework: str) -> kp.Output:
        in_torch = framework == "torch"
        cell, x = (self.cell, torch.from_numpy(self.x)) if in_torch else (to_jax(self.cell), jnp.asarray(self.x))
        readout = self.readout if in_torch else to_jax(self.readout)
        return kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).output(readout, learn=True)


@cache
def flow_of(seed: int, framework: str) -> kp.Output:
    return Model(seed).flow(framework)


def under(loss: Callable[[Tensor], Tensor], model: Model) -> tuple[np.ndarray, np.ndarray, float]:
    """W, the direction in which the outputs move (with the other sign), and the loss."""
    ntk, y = model.dense()
    H = torch.autograd.functional.hessian(loss, y).reshape(len(ntk), -1).numpy()
    values, vectors = np.linalg.eigh(H)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    gradient = torch.func.grad(loss)(y).reshape(-1).numpy()
    return root @ ntk @ root, ntk @ gradient, float(loss(y))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)


def squares(y: Tensor) -> Tensor:
    m = torch.from_numpy(MASK)[..., None].expand(y.shape)
    return (m * (y - torch.from_numpy(TARGET)) ** 2).sum() / m.sum()


def classes(y: Tensor) -> Tensor:
    each = F.cross_entropy(y.reshape(-1, OUT), torch.from_numpy(CLASSES).reshape(-1), reduction="none")
    return (torch.from_numpy(MASK).reshape(-1) * each).sum() / MASK.sum()


def parts(y: Tensor) -> Tensor:
    return F.cross_entropy(y.reshape(-1, OUT), torch.from_numpy(PARTS).reshape(-1, OUT))


def softly(y: Tensor, target: Tensor) -> Tensor:
    return ((1 + (y - target) ** 2) ** 0.5).mean()


def of_mean_over_times(y: Tensor, target: Tensor) -> Tensor:
    return ((y.mean(1) - target.mean(1)) ** 2).sum() + 0.1 * (y**2).mean()


def of_all(y: Tensor, target: Tensor) -> Tensor:
    return ((y - target).mean(0) ** 2).sum()


NAMED = {
    "squares": (squares, {"target": TARGET, "mask": MASK}),
    "classes": (classes, {"target": CLASSES, "mask": MASK, "loss": "cross_entropy"}),
    "left out": (classes, {"target": np.where(COUNTS, CLASSES, -100), "mask": MASK, "loss": "cross_entropy"}),
    "probabilities": (parts, {"target": PARTS, "loss": "cross_entropy"}),
}
OWN = {f.__name__: f for f in (softly, of_mean_over_times, of_all)}


@pytest.mark.parametrize("name", [*NAMED, *OWN])
@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_against_dense_derivatives(name: str, framework: str) -> None:
    models = Model(0), Model(1)
    if name in NAMED:
        loss, asked = NAMED[name]
    else:
        as_array = torch.from_numpy if framework == "torch" else jnp.asarray
        loss = lambda y: OWN[name](y, torch.from_numpy(TARGET))  # noqa: E731
        asked = {"target": as_array(TARGET), "loss": OWN[name]}
    found = kp.compare(flow_of(0, framework), flow_of(1, framework), k=3, **asked)
    (first, goes, now), (second, other, then) = (under(loss, model) for model in models)
    assert found.ntk.value == pytest.approx(cosine(first, second), rel=1e-9) and 0 <= found.ntk.value < 1
    assert found.loss == pytest.approx((now, then), rel=1e-12)
    counts = np.repeat(COUNTS if "mask" in asked else np.ones_like(COUNTS), OUT)
    assert found.step == pytest.approx(cosine(counts * goes, counts * other), rel=1e-9)
    for modes, W in zip(found.modes, (first, second), strict=True):
        assert to_numpy(modes.values) == pytest.approx(np.linalg.eigvalsh(W)[:-4:-1], rel=1e-9)
        assert tuple(modes.vectors.shape) == (3, TRIALS, TIMES, OUT)
    leading = [np.linalg.eigh(W)[1][:, -3:] for W in (first, second)]
    assert found.angles == pytest.approx(np.sort(subspace_angles(*leading)), abs=1e-8)
    assert (found.accuracy is None) == (asked.get("loss") != "cross_entropy")


def test_accuracies_are_those_of_the_outputs() -> None:
    a, b = (flow_of(seed, "torch") for seed in (0, 1))
    found = kp.compare(a, b, k=2, target=CLASSES, mask=MASK, loss="cross_entropy")
    right = [to_numpy(y.values).argmax(-1) == CLASSES for y in (a, b)]
    assert found.accuracy == pytest.approx(tuple(np.average(each, weights=MASK) for each in right))
    shown = str(found)
    rows = {line.split("  ")[0]: line.split()[-2:] for line in shown.splitlines()}
    assert rows[""] == ["A", "B"] and rows["loss"] == [f"{loss:.4g}" for loss in found.loss]
    assert rows["accuracy"] == [f"{part:.4g}" for part in found.accuracy]
    assert shown.count("(of the outputs, under the loss)") == 2  # the effective rank and the alignment of the NTK
    assert shown.count("(of the states)") == 4  # those of K and P
    assert f"next steps {found.step:.4f}" in shown and "K and P compare unit i" in shown
    assert "one mode" not in shown
    one = replace(found, ranks={"NTK": (Estimate(1.01418, 1.2e-6, 9, "exact"),) * 2})
    assert "Nearly all of each kernel is in one mode" in str(one) and " 1.014 " in str(one)
    assert "1.01418" not in str(one)
    axes = found.plot().axes
    assert axes[1].get_ylabel() == "Rate under the loss" and len(axes[1].lines) == 2


def test_the_rates_are_those_of_a_forecast() -> None:
    y = flow_of(0, "torch")
    for asked in ({"target": TARGET}, {"target": CLASSES, "loss": "cross_entropy"}):
        found = kp.compare(y, y, k=3, **asked)
        rates = kp.forecast(y, lr=1e-3, steps=10, check=False, **asked).rates
        assert float(found.modes[0].values[0]) == pytest.approx(rates.max(), rel=1e-2)
        assert found.ntk.value == pytest.approx(1) and found.step == pytest.approx(1) and found.angles.max() < 1e-6


def test_a_mean_of_squares_compares_the_kernels_themselves() -> None:
    a, b = (flow_of(seed, "torch") for seed in (0, 1))
    plain, squared = kp.compare(a, b, k=3), kp.compare(a, b, k=3, target=TARGET)
    assert squared.ntk.value == pytest.approx(plain.ntk.value, rel=1e-12)
    assert squared.angles == pytest.approx(plain.angles, abs=1e-9)
    assert plain.loss is None and plain.accuracy is None and np.isnan(plain.step)
    assert plain.K.value == pytest.approx(kp.compare(a.flow, b.flow).K.value, rel=1e-12)


def test_a_mask_leaves_out_as_where_does() -> None:
    """And what is added to all logits, which no probability sees, changes nothing but the plain direction."""
    a, b = (Model(seed) for seed in (0, 1))
    asked = {"target": CLASSES, "loss": "cross_entropy", "k": 3}
    masked = kp.compare(a.flow("torch"), b.flow("torch"), mask=COUNTS, **asked)
    there = [model.flow("torch").flow.where(COUNTS).output(model.readout, learn=True) for model in (a, b)]
    left_out = kp.compare(*there, **asked)
    for name in ("loss", "accuracy", "step", "angles"):
        assert getattr(masked, name) == pytest.approx(getattr(left_out, name), rel=1e-9, abs=1e-8)
    assert masked.ntk.value == pytest.approx(left_out.ntk.value, rel=1e-9)
    with torch.no_grad():
        a.readout.weight += torch.randn(4, dtype=torch.float64)
    shifted = kp.compare(a.flow("torch"), b.flow("torch"), mask=COUNTS, **asked)
    assert shifted.ntk.value == pytest.approx(masked.ntk.value, rel=1e-9)
    assert shifted.angles == pytest.approx(masked.angles, abs=1e-8)


def test_networks_of_different_widths() -> None:
    a, b = Model(0).flow("torch"), Model(1, units=6).flow("torch")
    found = kp.compare(a, b, k=2, target=TARGET)
    first, second = (under(lambda y: (y**2).mean(), model)[0] for model in (Model(0), Model(1, 6)))
    assert found.ntk.value == pytest.approx(cosine(first, second), rel=1e-9)
    assert found.K is None and found.P is None and "alignment of K" not in str(found)


def test_more_outputs_than_parameters() -> None:
    """Modes from the parameters' side, by Lanczos, and an alignment that is estimated."""
    x = RNG.standard_normal((9, 20, 2))
    right = torch.from_numpy(RNG.integers(0, OUT, (9, 20)))
    models = [Model(seed, x=x) for seed in (0, 1)]
    found = kp.compare(*(model.flow("torch") for model in models), k=3, target=right, loss="cross_entropy")
    both = [under(lambda y: F.cross_entropy(y.reshape(-1, OUT), right.reshape(-1)), model)[0] for model in models]
    assert found.ntk.value == pytest.approx(cosine(*both), rel=1e-6) and "exact" not in found.ntk.method
    assert found.ntk.value == pytest.approx(cosine(*both), abs=5 * found.ntk.stderr + 1e-12)
    pairs = [np.linalg.eigh(W) for W in both]
    for modes, (values, _) in zip(found.modes, pairs, strict=True):
        assert to_numpy(modes.values) == pytest.approx(values[:-4:-1], rel=1e-6) and bool(modes.converged.all())
    assert found.angles == pytest.approx(np.sort(subspace_angles(*(v[:, -3:] for _, v in pairs))), abs=1e-4)


def test_states_on_the_times_of_an_equation() -> None:
    """Their weights are in the loss, an integral over time, and in the inner product."""
    field, t = nn.Linear(2, 2).double(), torch.linspace(0, 1, 5, dtype=torch.float64)
    start = torch.randn(3, 2, dtype=torch.float64)
    flow = kp.linearize(kp.solve(kp.ODEProblem(lambda_field(field), start, t)))
    target = np.zeros(flow.ntk.domain.shape)
    found = kp.compare(flow, flow, k=2, target=target)
    rates = kp.forecast(flow, target, lr=1e-3, steps=5, check=False).rates
    assert float(found.modes[0].values[0]) == pytest.approx(rates.max(), rel=1e-2) and found.step == pytest.approx(1)


def lambda_field(layer: nn.Linear) -> nn.Module:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return torch.tanh(self.layer(z))

    return Field()


def test_losses_that_have_no_such_kernel() -> None:
    a, b = (flow_of(seed, "torch") for seed in (0, 1))
    target = torch.from_numpy(TARGET)
    with pytest.raises(ValueError, match="not convex in the outputs"):
        kp.compare(a, b, target=target, loss=lambda y, target: torch.cos(y - target).mean())
    with pytest.raises(ValueError, match="no curvature in these outputs"):
        kp.compare(a, b, target=target, loss=F.l1_loss)
    with pytest.raises(ValueError, match="needs a target"):
        kp.compare(a, b, loss="cross_entropy")
    with pytest.raises(ValueError, match="needs a target"):
        kp.compare(a, b, mask=MASK)
    with pytest.raises(ValueError, match="the outputs differ"):
        kp.compare(a, a.flow.output(np.ones((2, 4))), target=TARGET)
    with pytest.raises(TypeError, match="expected a Flow"):
        kp.compare(a, a.ntk)


def test_where_one_model_has_nothing_to_learn() -> None:
    a, b = (flow_of(seed, "torch") for seed in (0, 1))
    found = kp.compare(a, b, k=2, target=to_numpy(a.values))
    assert found.loss[0] == 0 and found.loss[1] > 0 and np.isnan(found.step)


def test_directions_that_the_loss_does_not_see_have_no_angle() -> None:
    """Of three logits at a place two count, and at places without a target none."""
    a, b = (flow_of(seed, "torch") for seed in (0, 1))
    found = kp.compare(a, b, k=30, target=CLASSES, mask=MASK, loss="cross_entropy")
    assert np.isfinite(found.angles).sum() == 2 * COUNTS.sum() and np.isnan(found.angles[2 * COUNTS.sum() :]).all()


def test_a_hessian_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a, target = flow_of(0, "torch"), torch.from_numpy(TARGET)
    monkeypatch.setattr(kpflow_dyn._learning.curvature, "DENSE_BYTES", 36 * 12 * 8)
    assert kp.compare(a, a, k=2, target=target, loss=of_mean_over_times).ntk.value == pytest.approx(1)
    with pytest.raises(ValueError, match="couples outputs of several times or trials, 36 at once"):
        kp.compare(a, a, k=2, target=target, loss=of_all)


def test_a_comparison_as_data_and_as_a_page() -> None:
    """Its numbers by the names of the models; effective ranks are those of the dense matrices."""
    models = Model(0), Model(1)
    a, b = (model.flow("torch") for model in models)
    named = kp.compare(a, b, k=3, target=TARGET, mask=MASK, names=("before", "after"))
    dataset = named.to_xarray()
    assert dataset.model.values.tolist() == ["before", "after"] and dataset.operator.values.tolist() == [
        "NTK",
        "K",
        "P",
    ]
    for place, (name, model) in enumerate(zip(named.names, models, strict=True)):
        W = under(squares, model)[0]
        assert float(dataset.effective_rank.sel(operator="NTK", model=name)) == pytest.approx(
            np.trace(W) ** 2 / (W**2).sum(), rel=1e-9
        )
        P = to_numpy((a, b)[place].flow.P.dense())
        assert float(dataset.effective_rank.sel(operator="P", model=name)) == pytest.approx(
            np.trace(P @ P.T) ** 2 / ((P @ P.T) ** 2).sum(), rel=1e-9
        )
        assert float(dataset.loss.sel(model=name)) == named.loss[place]
        np.testing.assert_array_equal(dataset.vectors.sel(model=name), to_numpy(named.modes[place].vectors))
    assert float(dataset.alignment.sel(operator="NTK")) == named.ntk.value
    page = page_of(dataset)
    assert page.tables[0].header == ("", "before", "after", "What it is")
    assert all(text in page.to_html() for text in ("before", "after", f"{named.ntk.value:.4g}", f"{named.loss[1]:.4g}"))
    legend = [text.get_text() for text in named.plot().axes[1].get_legend().get_texts()]
    assert [text.split(",")[0] for text in legend] == ["before", "after"]
    with pytest.raises(ValueError, match="expected two different ones"):
        kp.compare(a, b, names=("one", "one"))


def test_a_comparison_of_different_widths_as_data() -> None:
    """The alignments of K and P, which are not there, are NaN."""
    found = kp.compare(Model(0).flow("torch"), Model(0, units=5).flow("torch"), k=2, target=TARGET)
    dataset = found.to_xarray()
    assert np.isnan(dataset.alignment.values).tolist() == [False, True, True]
    assert np.isfinite(dataset.effective_rank.values).all()
    assert len(page_of(dataset).tables[1].rows) == 3
