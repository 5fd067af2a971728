"""Networks of any size and recordings, compared on common trials and times: against dense definitions by autograd."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import xarray as xr
from scipy.linalg import orthogonal_procrustes, sqrtm, subspace_angles
from torch import Tensor, nn
from typer.testing import CliRunner

import kpflow_dyn as kp
from kpflow_dyn.cli._alike import ALIKE_FILES
from kpflow_dyn.cli._app import app
from kpflow_dyn.models import make_model, to_jax

pytestmark = pytest.mark.usefixtures("x64")

TRIALS, TIMES = 4, 5
PLACES = TRIALS * TIMES
X = np.random.default_rng(0).standard_normal((TRIALS, TIMES, 3))
MEASURES = ["cka", "alignment", "angles", "spectrum", "bures", "procrustes"]
SAME = dict.fromkeys(MEASURES, 0.0) | {"cka": 1.0, "alignment": 1.0}
OF = ["ntk", "K", "PP", "states"]


@cache
def cell(units: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.GRUCell(3, units).double()


def flow_of(model: Any, x: Any = None) -> kp.Flow:
    return kp.linearize(kp.solve(kp.DiscreteProblem(model, torch.tensor(X) if x is None else x)))


@cache
def pair() -> tuple[kp.Flow, kp.Flow]:
    return flow_of(cell(6, 0)), flow_of(cell(9, 1))


def recording(units: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((TRIALS, TIMES, units)).cumsum(1)


def rows_of(S: np.ndarray) -> np.ndarray:
    rows = S.reshape(PLACES, -1)
    return rows - rows.mean(0)


def dense_kernel(flow: kp.Flow, of: str) -> np.ndarray:
    """The kernel on [trial, time] of the model itself, by autograd."""
    model = flow.solution.problem.cell
    if of == "states":
        rows = rows_of(flow.solution.state.detach().numpy())
        return rows @ rows.T
    operator = {"ntk": flow.ntk, "K": flow.K, "PP": flow.P @ flow.P.T}[of].dense().numpy()
    if of == "ntk":
        parameters = dict(model.named_parameters())

        def states(weights: dict[str, Tensor]) -> Tensor:
            z, found = torch.zeros(TRIALS, model.hidden_size, dtype=torch.float64), []
            for t in range(TIMES):
                z = torch.func.functional_call(model, weights, (torch.tensor(X[:, t]), z))
                found.append(z)
            return torch.stack(found, 1).reshape(-1)

        jacobians = torch.func.jacrev(states)(parameters)
        J = torch.cat([one.reshape(len(one), -1) for one in jacobians.values()], 1).detach().numpy()
        operator = J @ J.T
    return np.einsum("aibi->ab", operator.reshape(PLACES, -1, PLACES, operator.shape[0] // PLACES))


def dense_measure(A: np.ndarray, B: np.ndarray, measure: str) -> float:
    """The definitions, word for word."""
    H = np.eye(len(A)) - 1 / len(A)
    norm = np.linalg.norm
    if measure in ("cka", "alignment"):
        A, B = (H @ A @ H, H @ B @ H) if measure == "cka" else (A, B)
        return np.trace(A @ B) / norm(A) / norm(B)
    if measure == "angles":
        leading = [np.linalg.eigh(one)[1][:, -4:] for one in (A, B)]
        return subspace_angles(*leading).mean()
    if measure == "spectrum":
        return abs(np.subtract(*(np.linalg.eigvalsh(one) / np.trace(one) for one in (A, B)))).sum() / 2
    A, B = A / np.trace(A), B / np.trace(B)
    values, vectors = np.linalg.eigh(A)
    root = (vectors * values.clip(0) ** 0.5) @ vectors.T
    square = 2 - 2 * (np.linalg.eigvalsh(root @ B @ root).clip(0) ** 0.5).sum()
    return square**0.5 if measure == "bures" else np.arccos(1 - square / 2)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("of", OF)
def test_each_measure_is_its_definition(of: Any, measure: str) -> None:
    a, b = pair()
    found = kp.similarity(a, b, of=of, measure=measure)
    rank_deficient = measure in ("bures", "procrustes") and of in ("states", "K")  # roots of round-off in the oracle
    expected = dense_measure(dense_kernel(a, of), dense_kernel(b, of), measure)
    assert found.value == pytest.approx(expected, rel=0, abs=1e-7 if rank_deficient else 1e-10)
    assert (found.stderr, found.method) == (0, "exact")


@pytest.mark.parametrize("measure", MEASURES)
def test_what_is_the_same_is_at_no_distance(measure: str) -> None:
    a, _ = pair()
    others = [kp.similarity(a, flow_of(cell(6, 0)), of=of, measure=measure).value for of in OF]
    assert np.allclose(others, SAME[measure], rtol=0, atol=1e-10)
    assert kp.similarities([a, a], measure=measure).distance.tolist() == pytest.approx(np.zeros((2, 2)), abs=1e-10)


def test_the_root_distance_is_that_of_the_states_rotated_onto_each_other() -> None:
    a, b = recording(7), recording(7, 1)
    first, second = (rows_of(S) / np.linalg.norm(rows_of(S)) for S in (a, b))
    Q, _ = orthogonal_procrustes(second, first)
    distance = np.linalg.norm(first - second @ Q)
    assert kp.similarity(a, b, of="states", measure="bures").value == pytest.approx(distance, abs=1e-12)
    angle = np.arccos(np.sum(first * (second @ Q)))
    assert kp.similarity(a, b, of="states", measure="procrustes").value == pytest.approx(angle, abs=1e-12)
    A, B = (rows @ rows.T for rows in (first, second))
    root = np.real(sqrtm(A + 0 * B))
    assert 2 - 2 * np.real(np.trace(sqrtm(root @ B @ root))) == pytest.approx(distance**2, abs=1e-5)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("axes", [("trial", "time"), "time", "trial"])
def test_states_are_the_same_when_their_units_are_turned_permuted_or_padded(measure: str, axes: Any) -> None:
    S, other = recording(6), recording(8, 1)
    Q = np.linalg.qr(np.random.default_rng(2).standard_normal((6, 6)))[0]
    k = 3 if axes == "trial" else 4  # the mean of four trials is none

    def to_other(S: Any) -> float:
        return kp.similarity(S, other, of="states", measure=measure, axes=axes, k=k).value

    silent = np.concatenate([S, np.zeros((TRIALS, TIMES, 3))], -1)
    same = [to_other(one) for one in (S @ Q, S[..., ::-1], silent, 3 * S, S + np.arange(6), torch.tensor(S))]
    assert same == pytest.approx([to_other(S)] * 6, abs=1e-10)
    one_time, shuffled = S.copy(), S[[1, 2, 3, 0]]
    one_time[:, 2] *= 3
    changed = [one_time] if axes == "time" or measure == "spectrum" else [one_time, shuffled]
    assert all(abs(to_other(one) - to_other(S)) > 1e-4 for one in changed)


def test_a_turn_of_weak_and_strong_units_that_is_not_orthogonal_shows() -> None:
    S, other = recording(6), recording(8, 1)
    stretched = S * np.array([5, 1, 1, 1, 1, 1])
    found = [kp.similarity(one, other, of="states").value for one in (S, stretched)]
    assert abs(found[0] - found[1]) > 1e-3


class Reordered(nn.Module):
    """A cell whose state is that of another with its units in another order, or padded with zeros."""

    def __init__(self, inner: nn.Module, order: list[int], silent: int = 0) -> None:
        super().__init__()
        self.inner, self.order, self.silent = inner, order, silent
        self.hidden_size = len(order) + silent

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        back = torch.argsort(torch.tensor(self.order))
        found = self.inner(x, z[..., : len(self.order)][..., back])[..., self.order]
        return torch.cat([found, torch.zeros_like(z[..., len(self.order) :])], -1)


@pytest.mark.parametrize("of", OF)
def test_networks_are_the_same_with_their_units_in_another_order_or_with_silent_ones(of: Any) -> None:
    a, b = pair()
    turned, padded = (
        kp.linearize(kp.solve(kp.DiscreteProblem(model, torch.tensor(X), z0=torch.zeros(model.hidden_size).double())))
        for model in (Reordered(cell(6, 0), [3, 1, 5, 0, 2, 4]), Reordered(cell(6, 0), list(range(6)), 4))
    )
    for measure in ("cka", "bures"):
        known, permuted, silent = (kp.similarity(one, b, of=of, measure=measure).value for one in (a, turned, padded))
        assert permuted == pytest.approx(known, abs=1e-10)
        # A kick to a silent unit stays there, so P P* has more units to count.
        assert (abs(silent - known) > 1e-4) if of == "PP" else silent == pytest.approx(known, abs=1e-10)


def test_places_left_out_count_in_none_of_them() -> None:
    mask = np.ones((TRIALS, TIMES), bool)
    mask[0, 3:] = mask[2, 4:] = False
    a, S = pair()[0].where(torch.tensor(mask)), recording(7)
    rows = [one[mask] - one[mask].mean(0) for one in (pair()[0].solution.state.detach().numpy(), S)]
    expected = dense_measure(*(one @ one.T for one in rows), "cka")
    S[~mask] = np.nan
    assert kp.similarity(a, S, of="states").value == pytest.approx(expected, abs=1e-10)
    with pytest.raises(ValueError, match="different places"):
        kp.similarity(a, pair()[1])


def test_unbiased_cka_of_what_is_unlike_is_zero_on_average() -> None:
    def found(seed: int, unbiased: bool) -> float:
        rng = np.random.default_rng(seed)
        a, b = (rng.standard_normal((TRIALS, TIMES, 40)) for _ in range(2))
        return kp.similarity(a, b, of="states", unbiased=unbiased).value

    plain, without = ([found(seed, unbiased) for seed in range(60)] for unbiased in (False, True))
    assert np.mean(plain) > 0.4
    assert abs(np.mean(without)) < 4 * np.std(without) / 60**0.5
    A, B = (rows_of(recording(7, seed)) @ rows_of(recording(7, seed)).T for seed in (0, 1))

    def hsic(A: np.ndarray, B: np.ndarray) -> float:  # Song et al., JMLR 13, 1393 (2012), equation 5
        A, B, n = A - np.diag(np.diag(A)), B - np.diag(np.diag(B)), len(A)
        ends = A.sum() * B.sum() / (n - 1) / (n - 2) - 2 / (n - 2) * A.sum(0) @ B.sum(0)
        return (np.trace(A @ B) + ends) / (n * (n - 3))

    expected = hsic(A, B) / (hsic(A, A) * hsic(B, B)) ** 0.5
    assert kp.similarity(recording(7), recording(7, 1), of="states", unbiased=True).value == pytest.approx(expected)


@pytest.mark.parametrize("measure", ["cka", "alignment", "spectrum"])
def test_errors_from_probes_cover(measure: str) -> None:
    a, b = pair()
    truth = kp.similarity(a, b, measure=measure).value
    found = [kp.similarity(a, b, measure=measure, samples=40, seed=seed) for seed in range(40)]
    assert found[0].method == "jackknife over 20 groups of probes"
    assert len({one.value for one in found}) == 40
    covered = sum(abs(one.value - truth) <= 1.96 * one.stderr for one in found)
    assert covered >= 33  # of 38 expected


def test_errors_over_trials_cover_those_of_other_trials() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 4, 6))

    def found(trials: int, over: Any = "trials") -> kp.Estimate:
        hidden = rng.standard_normal((trials, 3, 4))
        return kp.similarity(hidden @ first, hidden @ second, of="states", over=over)

    truth = np.mean([found(400, "probes").value for _ in range(3)])
    some = [found(25) for _ in range(60)]
    assert some[0].method == "jackknife over 25 trials"
    spread = np.std([one.value for one in some])
    assert 0.7 * spread < np.mean([one.stderr for one in some]) < 1.5 * spread
    assert sum(abs(one.value - truth) <= 1.96 * one.stderr + 0.02 for one in some) >= 50


@pytest.mark.parametrize("axes", ["time", "trial", ("trial", "time")])
def test_trials_are_left_out_of_operators_as_out_of_the_network(axes: Any) -> None:
    """The jackknife of exact kernels is that of the networks run on the other trials."""
    a, b = pair()
    found = kp.similarity(a, b, measure="alignment", axes=axes, over="trials")
    without = []
    for trial in range(TRIALS):
        x = torch.tensor(np.delete(X, trial, 0))
        without.append(kp.similarity(flow_of(cell(6, 0), x), flow_of(cell(9, 1), x), "ntk", "alignment", axes).value)
    spread = ((TRIALS - 1) * np.var(without)) ** 0.5
    assert found.stderr / spread == pytest.approx(kp.solvers._moments.student(TRIALS), rel=1e-8)


def test_torch_and_jax_agree_and_meet_in_one_comparison() -> None:
    cells = [make_model("rnn", 3, units, 1, seed=units, dtype="float64")[0] for units in (6, 9)]
    a, b = map(flow_of, cells)
    in_jax = [flow_of(to_jax(model), jnp.asarray(X)) for model in cells]
    for of in OF:
        known = kp.similarity(a, b, of=of)
        assert kp.similarity(*in_jax, of=of).value == pytest.approx(known.value, abs=1e-10)
        assert kp.similarity(a, in_jax[1], of=of).value == pytest.approx(known.value, abs=1e-10)


def test_readouts_compare_their_outputs() -> None:
    a, b = pair()
    found = kp.similarity(a.output(torch.ones(2, 6).double()), b.output(torch.ones(3, 9).double()), of="states")
    rows = [rows_of(one.solution.state.sum(-1, keepdim=True).detach().numpy()) for one in (a, b)]
    assert found.value == pytest.approx(dense_measure(*(one @ one.T for one in rows), "cka"), abs=1e-10)


def test_all_pairs_are_the_pairs_and_cluster() -> None:
    like = [recording(6, seed // 2) + 0.1 * recording(6, 10 + seed) for seed in range(6)]
    found = kp.similarities(like, of="states", names=list("abcdef"), over="trials")
    one = kp.similarity(like[1], like[4], of="states", over="trials")
    assert (found.values[1, 4], found.stderr[4, 1]) == (one.value, one.stderr)
    assert np.allclose(found.distance, 1 - found.values)
    places = {name: found.order.index(i) for i, name in enumerate("abcdef")}
    assert all(abs(places[first] - places[second]) == 1 for first, second in ("ab", "cd", "ef"))
    assert "nearest" in str(found)
    assert len(str(found).splitlines()) <= 12
    data = found.to_xarray()
    assert float(data.distance.sel(item="b", other="e")) == pytest.approx(1 - one.value)
    figure = found.plot()
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == [found.names[i] for i in found.order]


def test_mantel_finds_what_goes_together_and_by_chance_finds_little() -> None:
    items = [recording(6, seed) for seed in range(9)]
    found = kp.similarities(items, of="states")
    near = kp.similarities([one + 0.3 * recording(6, 50 + i) for i, one in enumerate(items)], of="states")
    others = [kp.similarities([recording(6, 100 * k + i) for i in range(9)], of="states") for k in range(1, 21)]
    together = found.mantel(near, permutations=199)
    assert together.correlation > 0.7
    assert together.pvalue == 1 / 200
    by_chance = [found.mantel(other, permutations=99).pvalue for other in others]
    assert sum(p <= 0.05 for p in by_chance) <= 4


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (lambda a, S: kp.similarity(a, S), "of='states'"),
        (lambda a, S: kp.similarity(a, S[:, :3], of="states"), "same inputs"),
        (lambda a, S: kp.similarity(a, S, of="states", measure="r2"), "expected one of cka"),
        (lambda a, S: kp.similarity(a, S, of="J"), "expected one of ntk"),
        (lambda a, S: kp.similarity(a, S, of="states", axes="unit"), "in common"),
        (lambda a, S: kp.similarity(a, S, of="states", over="seeds"), "'probes' or 'trials'"),
        (lambda a, S: kp.similarity(a, S, of="states", measure="angles", k=12), "rank 6"),
        (lambda a, S: kp.similarity(a, S, of="states", measure="bures", unbiased=True), "unbiased"),
        (lambda a, S: kp.similarity(a, 0 * S, of="states"), "like no other"),
        (lambda a, S: kp.similarity(a, S / 0 * 0, of="states"), "NaN"),
        (lambda a, S: kp.similarities([S, S], of="states", names=["a", "a"]), "a name of its own"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_cannot_be_compared_is_refused(asked: Any, said: str) -> None:
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=said):
        asked(pair()[0], recording(7))


def test_what_is_no_network_and_no_recording_is_refused() -> None:
    for other in ("a", np.ones((3, 2))):
        with pytest.raises(TypeError, match=r"array \[trial, time, unit\]"):
            kp.similarity(pair()[0], other, of="states")


def test_a_folder_of_checkpoints_is_compared_from_the_command_line(tmp_path: Path) -> None:
    folder, out = tmp_path / "runs", tmp_path / "out"
    folder.mkdir()
    for units in (4, 6, 8, 5):
        torch.save(cell(units, units).state_dict(), folder / f"gru_{units}.pt")
    call = ["compare", folder, "--task", "memorypro", "--task-option", "memory=2", "--trials", 2, "--samples", 40]
    shown = CliRunner().invoke(app, [*map(str, call), "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    assert "4 networks on memorypro" in shown.output.lower()
    assert "Mantel" in shown.output
    assert {file.name for file in out.iterdir()} == ALIKE_FILES
    task = kp.tasks.MemoryPro(memory=2).sample(trials=2, seed=0)
    flows = [flow_of(cell(units, units), torch.from_numpy(task.inputs)) for units in (4, 5, 6, 8)]
    with xr.open_dataset(out / "states.nc", engine="h5netcdf") as data:
        assert data.item.values.tolist() == [f"gru_{units}.pt" for units in (4, 5, 6, 8)]
        assert np.allclose(data.value, kp.similarities(flows, of="states").values, atol=1e-6)
    alone = CliRunner().invoke(app, [*map(str, call), "--out", str(out), "--overwrite", "--loss", "squared_error"])
    assert alone.exit_code == 2
    assert "--loss" in alone.stderr


@pytest.mark.filterwarnings("ignore")
def test_dynamical_similarity_is_that_of_its_package() -> None:
    package = pytest.importorskip("DSA")
    S, options = [pair()[0].solution.state.detach().numpy(), recording(8)], {"n_delays": 2, "rank": 5}
    found = kp.similarity(pair()[0], S[1], of="states", measure="dsa", dsa=options)
    assert found.value == pytest.approx(float(package.DSA(S, **options).fit_score()[0, 1]))
    assert np.isnan(found.stderr)
    with pytest.raises(ValueError, match="of='states'"):
        kp.similarity(*pair(), measure="dsa")
    with pytest.raises(ValueError, match="options of measure='dsa'"):
        kp.similarity(*pair(), dsa=options)


class Field(nn.Module):
    def __init__(self, units: int) -> None:
        super().__init__()
        torch.manual_seed(units)
        self.W = nn.Parameter(torch.randn(units, units).double())

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return -z + torch.tanh(z @ self.W.T) + 0.5 * torch.sin(3 * t)


@pytest.mark.parametrize(("of", "measure"), [("ntk", "cka"), ("states", "cka"), ("states", "procrustes")])
def test_the_mesh_of_an_ode_does_not_matter(of: Any, measure: str) -> None:
    found, even = [], torch.linspace(0, 1, 150).double()
    for t in (6 * even, 6 * (0.05 * even + 0.95 * even**3)):
        starts = {units: torch.ones(2, units).double() / (1 + torch.arange(2))[:, None] for units in (3, 4)}
        flows = [kp.linearize(kp.solve(kp.ODEProblem(Field(n), z0, t), "rk4")) for n, z0 in starts.items()]
        found.append(kp.similarity(*flows, of=of, measure=measure, axes="time").value)
        if of == "states":
            recorded = flows[1].solution.state.detach().numpy()
            again = kp.similarity(flows[0], recorded, of=of, measure=measure, axes="time").value
            assert again == pytest.approx(found[-1])
    assert found[0] == pytest.approx(found[1], abs=2e-3)


def test_trials_that_are_masked_whole_are_not_left_out_one_by_one() -> None:
    mask = torch.tensor([True, True, False, True])[:, None].expand(TRIALS, TIMES)
    masked = [flow.where(mask) for flow in pair()]
    alone = [flow_of(flow.solution.problem.model, torch.tensor(X[[0, 1, 3]])) for flow in pair()]
    found, expected = (kp.similarity(*flows, of="states", over="trials") for flows in (masked, alone))
    assert (found.value, found.stderr) == pytest.approx((expected.value, expected.stderr), rel=1e-10)


def test_distances_that_do_not_differ_have_no_correlation() -> None:
    same = kp.similarities([recording(3)] * 4, of="states", names="abcd")
    found = same.mantel(kp.similarities([recording(3, seed) for seed in range(4)], of="states", names="abcd"))
    assert np.isnan([found.correlation, found.stderr, found.pvalue]).all()


def test_complex_recordings_and_spans_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="real and imaginary parts as units"):
        kp.similarity(recording(3) + 0j, recording(3), of="states")
    for k in (0, -1, 2.5):
        with pytest.raises(ValueError, match="k is"):
            kp.similarity(recording(3), recording(4), of="states", measure="angles", k=k)
    with pytest.raises(ValueError, match="needs two trials"):
        kp.similarity(recording(3)[:1], recording(4)[:1], of="states", over="trials")
