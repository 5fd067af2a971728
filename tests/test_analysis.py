"""The dataset of `analyze` against the dense NTK, exact on a small model and within its error bars on a larger one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import xarray as xr

import kpflow_dyn as kp
from kpflow_dyn._analyze import KERNELS, WORDS, analyze
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn.figures import FIGURES, trial_label
from kpflow_dyn.models import Dale
from kpflow_dyn.report import page_of, settings
from kpflow_dyn.tasks import TaskData

SUMS = {"temporal": "btnbsn->ts", "spatial": "btnbtm->nm", "trial": "btnctn->bc"}


def make_flow(cell: torch.nn.Module, trials: int, times: int) -> kp.Flow:
    torch.manual_seed(0)
    x = torch.randn(trials, times, 2, dtype=torch.float64)
    return kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))


@pytest.fixture(scope="module")
def small_flow() -> kp.Flow:
    torch.manual_seed(1)
    return make_flow(torch.nn.RNNCell(2, 5).double(), trials=3, times=4)


@pytest.fixture(scope="module")
def large_flow() -> kp.Flow:
    torch.manual_seed(2)
    return make_flow(torch.nn.RNNCell(2, 24).double(), trials=6, times=5)


@pytest.fixture(scope="module")
def small(small_flow: kp.Flow) -> xr.Dataset:
    return analyze(small_flow, k=3, init=Dale(1.2))


@pytest.fixture(scope="module")
def large(large_flow: kp.Flow) -> xr.Dataset:
    return analyze(large_flow, k=3, seed=5, samples=60)


def rank_of(matrix: np.ndarray) -> float:
    return float(np.trace(matrix) ** 2 / (matrix**2).sum())


def dense_kernel(flow: kp.Flow, name: str) -> np.ndarray:
    shape = flow.ntk.domain.shape
    return np.einsum(SUMS[name], flow.ntk.dense().numpy().reshape(*shape, *shape))


def true_numbers(flow: kp.Flow) -> dict[str, float]:
    dense = {name: getattr(flow, name).dense().numpy() for name in ("core", "K", "ntk")}
    numbers = {f"{name}_trace": np.trace(matrix) for name, matrix in dense.items()}
    numbers |= {f"{name}_norm": np.linalg.norm(matrix) for name, matrix in dense.items()}
    numbers |= {f"{name}_effective_rank": rank_of(matrix) for name, matrix in dense.items()}
    numbers |= {f"{name}_effective_rank": rank_of(dense_kernel(flow, name)) for name in KERNELS}
    numbers["state_effective_rank"] = rank_of(np.cov(flow.solution.state.numpy().reshape(-1, flow.K.domain.shape[2]).T))
    numbers["K_ntk_alignment"] = (dense["K"] * dense["ntk"]).sum() / (numbers["K_norm"] * numbers["ntk_norm"])
    return numbers


def test_numbers_of_a_small_model_are_exact(small: xr.Dataset, small_flow: kp.Flow) -> None:
    truth = true_numbers(small_flow)
    assert set(truth) == set(WORDS)
    for name, value in truth.items():
        assert float(small[name]) == pytest.approx(value, rel=1e-9), name
        assert small[name].attrs["stderr"] == 0, name


def test_numbers_of_a_larger_model_lie_within_their_error_bars(large: xr.Dataset, large_flow: kp.Flow) -> None:
    for name, value in true_numbers(large_flow).items():
        found, stderr = float(large[name]), large[name].attrs["stderr"]
        assert stderr < 0.06 * value, name
        assert abs(found - value) <= max(4 * stderr, 1e-9 * value), name
    assert large.ntk_effective_rank.attrs["stderr"] > 0


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_and_their_modes(small: xr.Dataset, small_flow: kp.Flow, name: str) -> None:
    dense, axis = dense_kernel(small_flow, name), KERNELS[name]
    values, modes = small[f"{name}_eigenvalue"].values, small[f"{name}_mode"].values
    np.testing.assert_allclose(small[f"{name}_kernel"], dense, atol=1e-10 * values[0])
    np.testing.assert_allclose(modes @ dense, values[:, None] * modes, atol=1e-10 * values[0])
    assert small[f"{name}_mode"].dims == (f"{name}_rank", axis)
    assert (np.diff(values) <= 0).all()
    assert (small[f"{name}_eigenvalue_stderr"] == 0).all()


@pytest.mark.parametrize("name", KERNELS)
def test_estimated_kernels(large: xr.Dataset, large_flow: kp.Flow, name: str) -> None:
    dense = dense_kernel(large_flow, name)
    assert np.linalg.norm(large[f"{name}_kernel"].values - dense) < 0.15 * np.linalg.norm(dense)
    values, modes = large[f"{name}_eigenvalue"].values, large[f"{name}_mode"].values
    carried = ((modes @ dense) * modes).sum(1)
    assert (np.abs(values - carried)[:3] < 5 * large[f"{name}_eigenvalue_stderr"].values[:3]).all()
    assert values.sum() == pytest.approx(np.trace(large[f"{name}_kernel"].values))


def test_noise_does_not_pass_for_leading_modes() -> None:
    space = kp.Space(("time", "unit"), (40, 20), np.zeros(1))
    identity = kp.GramOperator(kp.Operator(space, space, lambda q: q, lambda q: q))
    kernel = kp.partial_trace(identity, keep="time", samples=60)  # of 20 times the identity
    found = kp.modes(kernel, "time", k=40)
    values, stderr = found.values, found.stderr
    assert np.linalg.eigvalsh(kernel.matrix)[-1] > 20 * 1.2
    assert (np.abs(values - 20) < 5 * stderr).all() and stderr.max() < 20 * 0.2
    rank = kp.effective_rank(kernel)
    assert abs(rank.value - 40) < 4 * rank.stderr < 4


def test_spectra(small: xr.Dataset, large: xr.Dataset, small_flow: kp.Flow, large_flow: kp.Flow) -> None:
    for dataset, flow in ((small, small_flow), (large, large_flow)):
        for name in ("K", "ntk"):
            truth = np.linalg.eigvalsh(getattr(flow, name).dense().numpy())[::-1][:3]
            np.testing.assert_allclose(dataset[f"{name}_eigenvalue"], truth, rtol=1e-3)
            assert dataset[f"{name}_converged"].all()
        core = np.repeat(dataset.core_eigenvalue.values, dataset.core_multiplicity.values)
        dense = np.linalg.eigvalsh(flow.core.dense().numpy())[::-1]
        np.testing.assert_allclose(core, dense[: core.size], atol=1e-9 * dense[0])
    mode = torch.from_numpy(small.ntk_mode.values[0])
    torch.testing.assert_close(small_flow.ntk.mv(mode), float(small.ntk_eigenvalue[0]) * mode, rtol=0, atol=1e-2)


def test_principal_components(small: xr.Dataset, small_flow: kp.Flow) -> None:
    state = small_flow.solution.state.numpy()
    centred = state - state.mean((0, 1))
    np.testing.assert_allclose(small.pc_projection.values @ small.pc_direction.values, centred, atol=1e-12)
    np.testing.assert_allclose(
        small.pc_variance, small.pc_projection.var(("trial", "time")) / centred.var((0, 1)).sum()
    )


def test_same_seed_same_dataset(large: xr.Dataset, large_flow: kp.Flow) -> None:
    xr.testing.assert_identical(large, analyze(large_flow, k=3, seed=5, samples=60))
    assert float(analyze(large_flow, k=3, seed=6).ntk_trace) != float(large.ntk_trace)


def test_netcdf_keeps_everything(large: xr.Dataset, tmp_path) -> None:
    large.to_netcdf(tmp_path / "results.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "results.nc", engine="h5netcdf") as read:
        xr.testing.assert_identical(read.load(), large)


def test_core_of_tied_weights_has_its_leading_eigenvalues() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden_size = 2
            self.W = torch.nn.Parameter(torch.randn(2, 2, dtype=torch.float64))

        def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
            return torch.tanh(h @ self.W.T + x @ self.W)

    flow = make_flow(Tied(), trials=2, times=3)
    dataset = analyze(flow, k=8)
    truth = np.linalg.eigvalsh(flow.core.dense().numpy())[::-1][:4]
    np.testing.assert_allclose(dataset.core_eigenvalue, truth, atol=1e-10)
    assert float(dataset.core_trace) == pytest.approx(truth.sum())


def make_task(trials: int, times: int, mask: np.ndarray | None = None) -> TaskData:
    labels = {"angle": np.arange(trials)[::-1] / trials, "class": np.zeros((trials, times))}
    return TaskData(np.zeros((trials, times, 2)), None, mask, labels, "task", 20.0)


def test_a_task_brings_milliseconds_and_labels(small_flow: kp.Flow) -> None:
    mask = np.ones((3, 4), bool)
    mask[0, 1:] = False
    dataset = analyze(small_flow, k=1, task=make_task(3, 4, mask))
    np.testing.assert_array_equal(dataset.time, [20.0, 40.0, 60.0, 80.0])
    assert dataset.time.attrs["units"] == "ms"
    assert trial_label(dataset) == "label_angle" and "label_class" not in dataset.coords
    assert dataset.attrs["steps"].startswith(
        "25% of the steps lie behind the last target of their trial; they are left"
    )


def test_progress_counts_to_its_total(large_flow: kp.Flow) -> None:
    seen: dict[str, list[tuple[int, int | None]]] = {}
    analyze(large_flow, k=1, progress=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)))
    for stage in ("probes of ntk", "trace, norm and effective rank of K"):
        done, total = seen[stage][-1]
        assert done == total, stage
    for counts in seen.values():
        assert [done for done, _ in counts] == sorted(done for done, _ in counts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "at least 1"),
        ({"samples": 10}, "at least 40"),
        ({"task": make_task(2, 4)}, r"\(2, 4\), expected those of the flow, \(3, 4\)"),
    ],
)
def test_bad_options(small_flow: kp.Flow, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        analyze(small_flow, **options)


def test_results_say_where_the_weights_came_from(small_flow: kp.Flow, small: xr.Dataset, large: xr.Dataset) -> None:
    assert settings(small)["init"] == Dale(1.2).describe() and "init" not in large.attrs
    with pytest.raises(TypeError, match=r"init is 'dale', expected the law"):
        analyze(small_flow, init="dale")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FIGURES)
def test_figures_draw_labelled_axes_and_leave_the_settings_alone(small: xr.Dataset, name: str) -> None:
    before = dict(matplotlib.rcParams)
    light, dark = FIGURES[name](small), FIGURES[name](small, dark=True)
    assert dict(matplotlib.rcParams) == before
    assert all(axes.get_xlabel() or axes.get_ylabel() for axes in light.axes)
    assert light.get_facecolor() != dark.get_facecolor()


def test_figures_show_the_numbers(small: xr.Dataset, large: xr.Dataset) -> None:
    core, K, ntk = FIGURES["spectra"](small).axes[0].lines[:2] + FIGURES["spectra"](small).axes[0].lines[3:4]
    assert core.get_label() == "core" and np.max(core.get_ydata()) == small.core_eigenvalue[0]
    np.testing.assert_array_equal(K.get_ydata(), small.K_eigenvalue)
    np.testing.assert_array_equal(ntk.get_ydata(), small.ntk_eigenvalue)
    texts = [text.get_text() for text in FIGURES["effective_ranks"](large).axes[0].texts]
    assert f"{float(large.temporal_effective_rank):.3g} of 5" in texts


def test_figures_of_one_trial_and_one_unit() -> None:
    torch.manual_seed(0)
    flow = make_flow(torch.nn.RNNCell(2, 1).double(), trials=1, times=1)
    dataset = analyze(flow)
    for draw in FIGURES.values():
        draw(dataset).canvas.draw()


class OfTime(torch.nn.Module):
    """A field with a gate in time, so that its modes are uneven."""

    def __init__(self) -> None:
        super().__init__()
        self.W = torch.nn.Parameter(torch.randn(2, 2, dtype=torch.float64))

    def forward(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z @ self.W.T) * torch.cos(2 * t)


def torch_ode() -> kp.Flow:
    torch.manual_seed(3)
    start = torch.randn(3, 2, dtype=torch.float64)
    solution = kp.solve(kp.ODEProblem(OfTime(), start, np.array([0.0, 0.1, 0.4, 1.0])), "midpoint")
    return kp.linearize(solution, measure=kp.Measure(trial=[1.0, 2.0, 0.5]))


def jax_ode() -> kp.Flow:
    diffrax, jax = pytest.importorskip("diffrax"), pytest.importorskip("jax")
    field = kp.models.jax.MLPField(2, hidden=3, key=jax.random.key(0))
    start = jax.random.normal(jax.random.key(1), (2, 2))
    return kp.linearize(kp.solve(kp.ODEProblem(field, start, (0.0, 1.0)), diffrax.Heun(), steps=0.6))


def jax_gru() -> kp.Flow:
    eqx, jax = pytest.importorskip("equinox"), pytest.importorskip("jax")
    cell = eqx.nn.GRUCell(2, 3, key=jax.random.key(0))
    return kp.linearize(kp.solve(kp.DiscreteProblem(cell, jax.random.normal(jax.random.key(1), (2, 4, 2)))))


@pytest.fixture(
    scope="module", params=[torch_ode, *(pytest.param(make, marks=pytest.mark.slow) for make in (jax_ode, jax_gru))]
)
def other(request: pytest.FixtureRequest, x64: None) -> tuple[kp.Flow, xr.Dataset]:
    flow = request.param()
    return flow, analyze(flow, k=3)


def euclidean(op: kp.Operator) -> np.ndarray:
    """The matrix of an operator on one space, in coordinates where the inner product is plain."""
    space = op.domain
    weights = np.ones(space.shape) if space.measure is None else np.broadcast_to(to_numpy(space.measure), space.shape)
    root = np.sqrt(weights.ravel())
    return root[:, None] * to_numpy(op.dense()) / root


def test_numbers_in_the_inner_product_of_the_flow(other: tuple[kp.Flow, xr.Dataset]) -> None:
    flow, dataset = other
    dense = {name: euclidean(getattr(flow, name)) for name in ("core", "K", "ntk")}
    for name, matrix in dense.items():
        assert float(dataset[f"{name}_trace"]) == pytest.approx(np.trace(matrix), rel=1e-9)
        assert float(dataset[f"{name}_norm"]) == pytest.approx(np.linalg.norm(matrix), rel=1e-9)
        assert float(dataset[f"{name}_effective_rank"]) == pytest.approx(rank_of(matrix), rel=1e-9)
    aligned = (dense["K"] * dense["ntk"]).sum() / np.linalg.norm(dense["K"]) / np.linalg.norm(dense["ntk"])
    assert float(dataset.K_ntk_alignment) == pytest.approx(aligned, rel=1e-9)
    for name in ("K", "ntk"):
        truth = np.linalg.eigvalsh(dense[name])[::-1][:3]
        np.testing.assert_allclose(dataset[f"{name}_eigenvalue"], truth, rtol=1e-3, atol=1e-9 * truth[0])
    core = np.repeat(dataset.core_eigenvalue.values, dataset.core_multiplicity.values)
    truth = np.linalg.eigvalsh(dense["core"])[::-1][: core.size]
    np.testing.assert_allclose(np.sort(core)[::-1], truth, atol=1e-9 * truth[0])


@pytest.mark.parametrize("name", KERNELS)
def test_modes_in_the_inner_product_of_the_flow(other: tuple[kp.Flow, xr.Dataset], name: str) -> None:
    flow, dataset = other
    shape = flow.ntk.domain.shape
    kernel = np.einsum(SUMS[name], euclidean(flow.ntk).reshape(*shape, *shape))
    values, modes = dataset[f"{name}_eigenvalue"].values, dataset[f"{name}_mode"].values
    weights = dataset[f"{name}_measure"].values
    assert float(dataset[f"{name}_effective_rank"]) == pytest.approx(rank_of(kernel), rel=1e-9)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(kernel)[::-1], atol=1e-10 * values[0])
    np.testing.assert_allclose((modes * weights) @ modes.T, np.eye(len(modes)), atol=1e-10)
    acted = modes @ dataset[f"{name}_kernel"].values.T
    np.testing.assert_allclose(acted, values[:, None] * modes, atol=1e-9 * values[0] * np.abs(modes).max())


def test_principal_components_are_weighted(other: tuple[kp.Flow, xr.Dataset]) -> None:
    flow, dataset = other
    state, measure = to_numpy(flow.solution.state), dataset.measure.values
    truth = (
        1
        if flow.ntk.domain.measure is None
        else np.broadcast_to(to_numpy(flow.ntk.domain.measure)[..., 0], measure.shape)
    )
    np.testing.assert_array_equal(measure, truth * np.ones_like(measure))
    covariance = np.cov(state.reshape(-1, state.shape[2]).T, aweights=measure.ravel(), bias=True)
    assert float(dataset.state_effective_rank) == pytest.approx(rank_of(covariance), rel=1e-9)
    variance = np.linalg.eigvalsh(covariance)[::-1]
    np.testing.assert_allclose(dataset.pc_variance, variance / variance.sum(), atol=1e-12)
    mean = (measure[..., None] * state).sum((0, 1)) / measure.sum()
    np.testing.assert_allclose(dataset.pc_projection.values @ dataset.pc_direction.values, state - mean, atol=1e-12)


def test_times_versions_and_figures_of_other_flows(other: tuple[kp.Flow, xr.Dataset]) -> None:
    flow, dataset = other
    np.testing.assert_array_equal(dataset.time, to_numpy(flow.solution.t))
    ode = isinstance(flow.solution.problem, kp.ODEProblem)
    assert dataset.time.attrs == ({} if ode else {"units": "step"})
    assert FIGURES["temporal_modes"](dataset).axes[1].get_xlabel() == ("Time" if ode else "Time (step)")
    np.testing.assert_array_equal(FIGURES["temporal_modes"](dataset).axes[1].lines[1].get_xdata(), dataset.time)
    versions = {key.removeprefix("version_") for key in dataset.attrs if key.startswith("version_")}
    used = {"torch", "torchdiffeq"} if isinstance(flow.solution.state, torch.Tensor) else {"jax", "equinox"}
    assert used <= versions and len(versions & {"torch", "jax"}) == 1 and ("diffrax" in versions) <= ode
    assert (dataset.attrs["problem"] == "ODE") == ode == ("solver" in dataset.attrs)
    for draw in FIGURES.values():
        draw(dataset).canvas.draw()


@pytest.mark.parametrize("given", ["task", "flow"])
def test_steps_that_do_not_count_are_left_out(small_flow: kp.Flow, given: str) -> None:
    mask = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 1]], bool)
    if given == "task":
        dataset = analyze(small_flow, k=3, task=make_task(3, 4, mask.astype(float)))
        assert dataset.attrs["steps"] == (
            "25% of the steps lie behind the last target of their trial and 17% of the steps lie before it and have no "
            "target; they are left out (all_steps=True, or --all-steps, keeps them)"
        )
    else:
        dataset = analyze(small_flow.where(mask), k=3)
        assert dataset.attrs["steps"] == "42% of the steps do not count; they are left out"
    units, A = small_flow.ntk.domain.shape[2], small_flow.ntk.dense().numpy()
    R = np.repeat(mask.reshape(-1), units)
    inside = A * R * R[:, None]
    assert float(dataset.ntk_trace) == pytest.approx(np.trace(inside))
    assert float(dataset.ntk_effective_rank) == pytest.approx(rank_of(inside))
    assert dataset.ntk_effective_rank.attrs["dimension"] == R.sum()
    for name, counts in {"temporal": mask.any(0), "spatial": np.ones(units, bool), "trial": mask.any(1)}.items():
        kernel = np.einsum(SUMS[name], inside.reshape(*small_flow.ntk.domain.shape * 2))
        assert float(dataset[f"{name}_effective_rank"]) == pytest.approx(rank_of(kernel))
        assert dataset[f"{name}_effective_rank"].attrs["dimension"] == dataset.sizes[f"{name}_rank"] == counts.sum()
        np.testing.assert_allclose(
            dataset[f"{name}_kernel"].values[np.ix_(counts, counts)], kernel[np.ix_(counts, counts)]
        )
        assert np.isnan(dataset[f"{name}_mode"].values[:, ~counts]).all()
        assert np.isfinite(dataset[f"{name}_mode"].values[:, counts]).all()
    np.testing.assert_array_equal(dataset.measure, mask)
    for name in ("ntk_mode", "pc_projection"):
        blank = np.isnan(dataset[name].transpose("trial", "time", ...).values)
        assert blank[~mask].all() and not blank[mask].any()
    states = small_flow.solution.state.numpy()[mask]
    assert float(dataset.state_effective_rank) == pytest.approx(rank_of(np.cov(states.T)))
    np.testing.assert_allclose(
        dataset.pc_variance, np.linalg.eigvalsh(np.cov(states.T))[::-1] / np.cov(states.T).trace()
    )
    for draw in FIGURES.values():
        draw(dataset)
    page = page_of(dataset)
    assert page.lead[-1] == f"{dataset.attrs['steps']}." and not any("NaN" in chart.to_json() for chart in page.charts)


def test_all_steps_are_kept_if_asked_for(small_flow: kp.Flow, small: xr.Dataset) -> None:
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]], bool)
    dataset = analyze(small_flow, k=3, task=make_task(3, 4, mask), all_steps=True)
    assert dataset.attrs["steps"] == "17% of the steps lie behind the last target of their trial; they are analysed too"
    assert float(dataset.ntk_trace) == float(small.ntk_trace) and (dataset.measure.values == 1).all()


def test_the_weights_of_a_mask_are_said_and_count(tmp_path: Path) -> None:
    """A file of trials may have weights; they are in the loss, in the attributes and on the page."""
    rng = np.random.default_rng(0)
    weights, right = rng.choice([0.5, 2.0], (4, 5)), rng.integers(0, 3, (4, 5))
    np.savez(tmp_path / "a.npz", inputs=rng.normal(size=(4, 5, 2)), targets=right, mask=weights)
    task = kp.tasks.make_task(str(tmp_path / "a.npz"))
    torch.manual_seed(0)
    cell, readout = torch.nn.RNNCell(2, 4).double(), torch.nn.Linear(4, 3).double()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(task.inputs))))
    found = kp.analyze(flow, k=1, task=task, readout=readout)
    logits = readout(flow.solution.state).flatten(0, 1)
    each = (
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(right).flatten(), reduction="none").detach().numpy()
    )
    np.testing.assert_allclose(found.loss, np.average(each, weights=weights.flatten()), rtol=1e-6)
    assert found.attrs["weights"].startswith("Steps weigh differently in loss and accuracy: 0.5 to 2")
    assert f"{found.attrs['weights']}." in page_of(found).lead
    assert found.attrs["weights"] in settings(found).values()  # and so in results.json
    assert "weights" not in kp.analyze(flow, k=1, task=replace(task, mask=2 * (weights > 0)), readout=readout).attrs
