"""Laws of recurrent weights against their spectra and moments, and what `initialize` and `make_model` make of them."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._problems.parameters import parameters_of
from kpflow_dyn.models import (
    CTRNNCell,
    CTRNNField,
    Dale,
    Gaussian,
    HodgkinHuxleyField,
    LowRankRNNCell,
    MLPField,
    Orthogonal,
    Planted,
    SpectralRadius,
    TorchDefault,
    _laws,
    initialize,
    make_init,
    make_model,
    plant_fixed_points,
    to_jax,
)
from kpflow_dyn.models import jax as in_jax
from kpflow_dyn.models._named import LAWS

pytestmark = pytest.mark.usefixtures("x64")

N = 400
RADII = {
    Gaussian(1.5): 1.5,
    Orthogonal(1.5): 1.5,
    SpectralRadius(1.5): 1.5,
    TorchDefault(1.5): 1.5 / math.sqrt(3),
    Dale(1.5): 1.5,
    Dale(1.5, excitatory=0.5): 1.5,
}
VARIANCES = {
    Gaussian(1.5): 1.5**2,
    Orthogonal(1.5): 1.5**2,
    SpectralRadius(1.5): 1.5**2,
    TorchDefault(1.5): 1.5**2 / 3,
}
KEY = 3


def radius(W: np.ndarray) -> float:
    return float(np.abs(np.linalg.eigvals(W)).max())


def numbers(model: Any) -> dict[str, np.ndarray]:
    return {name: to_numpy(value).copy() for name, value in parameters_of(model).items()}


@pytest.mark.parametrize("law", RADII, ids=repr)
def test_spectral_radius_is_what_the_table_says(law: Any) -> None:
    assert radius(law.matrix(N, seed=1)) == pytest.approx(RADII[law], rel=0.08)


@pytest.mark.parametrize("law", VARIANCES, ids=repr)
def test_entries_have_the_variance_of_the_table(law: Any) -> None:
    W = law.matrix(N, seed=2)
    assert N * W.var() == pytest.approx(VARIANCES[law], rel=0.08)
    assert abs(W.mean()) < 5 * W.std() / N


@pytest.mark.parametrize("law", [*RADII, Planted(points=3)], ids=repr)
def test_a_seed_is_a_matrix_and_a_generator_goes_on(law: Any) -> None:
    first = law.matrix(20, seed=1)
    assert first.shape == (20, 20) and first.dtype == np.float64
    np.testing.assert_array_equal(first, law.matrix(20, seed=1))
    assert not np.array_equal(first, law.matrix(20, seed=2))
    rng = np.random.default_rng(1)
    np.testing.assert_array_equal(first, law.matrix(20, rng))
    assert not np.array_equal(first, law.matrix(20, rng))


def test_entries_have_the_distribution_of_their_law() -> None:
    for law, cdf in ((Gaussian(2.0), stats.norm(0, 0.2)), (TorchDefault(2.0), stats.uniform(-0.2, 0.4))):
        assert stats.kstest(law.matrix(100, seed=5).ravel(), cdf.cdf).pvalue > 0.01


def test_orthogonal_matrices_are_haar() -> None:
    """Traces of powers of a Haar matrix have the mean 0 (odd), 1 (even) and the variance of the power (Diaconis)."""
    rng = np.random.default_rng(0)
    drawn = [Orthogonal().matrix(8, rng) for _ in range(2000)]
    np.testing.assert_allclose(drawn[0] @ drawn[0].T, np.eye(8), atol=1e-13)
    first = np.array([np.trace(Q) for Q in drawn])
    second = np.array([np.trace(Q @ Q) for Q in drawn])
    assert abs(first.mean()) < 0.1 and first.var() == pytest.approx(1, rel=0.15)
    assert second.mean() == pytest.approx(1, abs=0.15) and second.var() == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize("n", [1, 2, 30])
def test_the_spectral_radius_is_exact(n: int) -> None:
    assert radius(SpectralRadius(0.95).matrix(n)) == pytest.approx(0.95, rel=1e-12)


@pytest.mark.parametrize("excitatory", [0.5, 0.8])
def test_dale_has_signed_columns_of_balanced_strength(excitatory: float) -> None:
    W, count = Dale(1.3, excitatory).matrix(N, seed=1), round(excitatory * N)
    assert (W[:, :count] > 0).all() and (W[:, count:] < 0).all()
    np.testing.assert_allclose(W.sum(axis=1), 0, atol=1e-12)
    within = [W[:, part].var() * N for part in (slice(count), slice(count, None))]
    f = excitatory
    assert within == pytest.approx([1.3**2 * (1 - f) / f, 1.3**2 * f / (1 - f)], rel=0.1)
    assert f * within[0] + (1 - f) * within[1] == pytest.approx(1.3**2, rel=0.05)


def test_balance_on_average_would_leave_outliers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_laws, "_balanced", lambda W, count: W)
    assert radius(Dale(1.0).matrix(N, seed=1)) > 1.5


def test_dale_keeps_a_unit_of_each_kind() -> None:
    assert np.sign(Dale(excitatory=0.999).matrix(3)[0]).tolist() == [1, 1, -1]
    assert np.sign(Dale(excitatory=0.001).matrix(2)[0]).tolist() == [1, -1]
    with pytest.raises(ValueError, match="n of Dale must be at least 2, got 1"):
        Dale().matrix(1)


@pytest.mark.parametrize("name", LAWS)
def test_laws_by_name_and_in_words(name: str) -> None:
    law = make_init(name.upper())
    assert type(law) is LAWS[name] and hash(law) == hash(make_init(name))
    assert law.describe().startswith(f"{law!r}: ") and "\n" not in law.describe()
    assert (law.matrix(4) == make_init(name).matrix(4)).all()
    zero = make_init(name, **{"rho" if name == "spectralradius" else "g": 0})
    assert name == "planted" or not zero.matrix(4).any()


def test_long_names_and_options() -> None:
    assert make_init("spectral_radius", rho=0.9) == make_init("Spectral-Radius", rho=0.9) == SpectralRadius(0.9)
    assert make_init("dale", g=2, excitatory=0.7) == Dale(2.0, 0.7)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: make_init("gausian"),
            ValueError,
            r"law 'gausian'\. Nearest: gaussian.* Known: gaussian, orth",
        ),
        (lambda: make_init("gaussian", rho=1), ValueError, "gaussian has no option rho; it has: g"),
        (lambda: Gaussian(-1), ValueError, "g must be a finite number >= 0, got -1"),
        (lambda: Gaussian(math.nan), ValueError, "g must be a finite number"),
        (lambda: Gaussian("1"), TypeError, "g is str, expected a real number"),
        (lambda: Dale(excitatory=1.0), ValueError, r"between 0 and 1, got 1\.0"),
        (lambda: Dale(excitatory=0.0), ValueError, "excitatory must be a finite number > 0"),
        (lambda: Gaussian().matrix(0), ValueError, "n must be at least 1, got 0"),
        (lambda: Gaussian().matrix(2.5), TypeError, "n must be a whole number"),
        (lambda: Planted(points=0), ValueError, "points must be at least 1, got 0"),
        (
            lambda: Planted(points=[1.0, 2.0]),
            ValueError,
            r"points has the shape \(2,\), expected finite",
        ),
        (lambda: Planted(points=[[math.inf]]), ValueError, "expected finite numbers"),
        (lambda: Planted(g=-1), ValueError, "g must be"),
        (lambda: Planted(spread=0), ValueError, "spread must be a finite number > 0"),
        (lambda: Planted(points=[[1.0, 2.0]]).matrix(3), ValueError, "the points have 2 units, expected 3"),
        (lambda: Planted(points=5).matrix(4), ValueError, "the rank 4, of 4 units"),
    ],
)
def test_bad_options_are_explained(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


BLOCKS = {
    "rnn cell": (lambda: nn.RNNCell(3, 6), ["weight_hh"], 1),
    "gru cell": (lambda: nn.GRUCell(3, 6), ["weight_hh"], 3),
    "lstm cell": (lambda: nn.LSTMCell(3, 6), ["weight_hh"], 4),
    "two layers, both ways": (
        lambda: nn.GRU(3, 6, num_layers=2, bidirectional=True),
        ["weight_hh_l0", "weight_hh_l0_reverse", "weight_hh_l1", "weight_hh_l1_reverse"],
        3,
    ),
    "ctrnn cell": (lambda: CTRNNCell(3, 6), ["W"], 1),
    "ctrnn field": (lambda: CTRNNField(6), ["W"], 1),
    "inside": (lambda: nn.ModuleDict({"rnn": nn.LSTM(3, 6), "readout": nn.Linear(6, 6)}), ["rnn.weight_hh_l0"], 4),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_is_a_draw_and_the_rest_stays(name: str) -> None:
    make, names, gates = BLOCKS[name]
    model = make().double()
    before = numbers(model)
    assert initialize(model, Orthogonal(1.2), seed=4) is model
    after = numbers(model)
    assert [key for key in after if not np.array_equal(after[key], before[key])] == names
    rng = np.random.default_rng(4)
    for key in names:
        for block in np.split(after[key], gates):
            np.testing.assert_array_equal(block, Orthogonal(1.2).matrix(6, rng))
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("make", [lambda: nn.GRUCell(2, 5), lambda: LowRankRNNCell(2, 5, rank=2)])
def test_the_frameworks_draw_the_same(make: Any) -> None:
    cell = make().double()
    first = to_jax(cell)
    there = initialize(first, Dale(1.1), seed=2)
    expected = numbers(to_jax(initialize(cell, Dale(1.1), seed=2)))
    found = numbers(there)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in found)
    assert there is not first and not all(np.array_equal(found[key], value) for key, value in numbers(first).items())


def test_a_low_rank_weight_is_the_nearest_of_its_rank() -> None:
    cell = initialize(LowRankRNNCell(2, 8, rank=3).double(), Gaussian(1.5), seed=3)
    m, n = cell.m.detach().numpy(), cell.n.detach().numpy()
    W = Gaussian(1.5).matrix(8, seed=3)
    s = np.linalg.svd(W, compute_uv=False)
    assert np.linalg.norm(W - m @ n.T / 8) == pytest.approx(np.linalg.norm(s[3:]), rel=1e-12)
    np.testing.assert_allclose(np.linalg.norm(m, axis=0), np.linalg.norm(n, axis=0))


def test_float32_is_rounded_and_other_weights_go_by_name() -> None:
    cell = initialize(CTRNNCell(2, 5), Gaussian(), seed=1)
    np.testing.assert_array_equal(cell.W.detach(), Gaussian().matrix(5, seed=1).astype(np.float32))
    field = initialize(MLPField(2, hidden=4, depth=2).double(), Orthogonal(), which="layers.1.weight")
    np.testing.assert_array_equal(field.layers[1].weight.detach(), Orthogonal().matrix(4))


@pytest.mark.parametrize("points", [2, [[0.3, -0.2, 0.5, 0.1], [0.1, 0.4, -0.3, 0.2]]])
@pytest.mark.parametrize(
    "make",
    [
        lambda: CTRNNCell(2, 4),
        lambda: CTRNNCell(2, 4, nonlinearity="relu"),
        lambda: nn.RNNCell(2, 4),
        lambda: in_jax.CTRNNCell(2, 4, alpha=0.3, key=jax.random.key(KEY)),
        lambda: in_jax.RNNCell(2, 4, key=jax.random.key(KEY)),
    ],
)
def test_planted_points_are_fixed_in_both_frameworks(make: Any, points: Any) -> None:
    law = Planted(points=points, g=0.7, spread=0.8, x=[0.5, -1.0])
    cell = make()
    cell = cell.double() if isinstance(cell, nn.Module) else cell
    planted = initialize(cell, law, seed=6)
    rng = np.random.default_rng(6)
    Gaussian(0.7).matrix(4, rng)
    z = law.states(4, rng)
    if isinstance(points, int) and hasattr(cell, "weight_hh"):
        z = np.tanh(z)
    if isinstance(planted, nn.Module):
        found = planted(torch.tensor([[0.5, -1.0]] * 2).double(), torch.from_numpy(z)).detach().numpy()
    else:
        found = jax.vmap(planted)(jnp.array([[0.5, -1.0]] * 2), jnp.asarray(z))
    np.testing.assert_allclose(found, z, atol=1e-12)


def test_the_matrix_of_planted_is_that_of_a_cell_at_its_start() -> None:
    law = Planted(points=3, g=0.8)
    cell = initialize(CTRNNCell(2, 6).double(), law, seed=1)
    np.testing.assert_allclose(cell.W.detach(), law.matrix(6, seed=1), rtol=1e-12)
    assert "Planted(points=1 given, g=1.0" in Planted(points=np.ones((1, 3))).describe()


def test_planting_relu_draws_states_that_it_reaches() -> None:
    cell = initialize(nn.RNNCell(2, 5, nonlinearity="relu").double(), Planted(points=2), seed=1)
    z = np.random.default_rng(1)
    Gaussian().matrix(5, z)
    states = torch.from_numpy(np.abs(z.standard_normal((2, 5))))
    torch.testing.assert_close(cell(torch.zeros(2, 2).double(), states), states, rtol=0, atol=1e-12)


def test_points_planted_in_jax_leave_the_cell_that_was() -> None:
    cell = in_jax.CTRNNCell(2, 5, key=jax.random.key(KEY))
    before, states = np.array(cell.W), jax.random.normal(jax.random.key(1), (2, 5))
    planted = plant_fixed_points(cell, states)
    np.testing.assert_array_equal(cell.W, before)
    np.testing.assert_allclose(jax.vmap(lambda z: planted(jnp.zeros(2), z))(states), states, atol=1e-12)


def test_a_cell_that_cannot_be_planted_stays_as_it_is() -> None:
    cell = CTRNNCell(2, 4)
    before = numbers(cell)
    with pytest.raises(ValueError, match=r"states has the shape \(1, 3\)"):
        initialize(cell, Planted(points=[[1.0, 2.0, 3.0]]))
    assert all(np.array_equal(value, before[key]) for key, value in numbers(cell).items())
    with pytest.raises(TypeError, match=r"cell is torch\.nn\.GRUCell, expected a CTRNNCell or an RNNCell"):
        initialize(nn.GRUCell(2, 3), Planted())
    with pytest.raises(ValueError, match="leave it out"):
        initialize(cell, Planted(), which="W")


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (nn.Linear(3, 3), {}, TypeError, "Linear has no recurrent weights.*of 'weight', 'bias'"),
        (HodgkinHuxleyField(2), {}, TypeError, "HodgkinHuxleyField has no recurrent weights"),
        (nn.LSTM(2, 4, proj_size=2), {}, ValueError, "proj_size has no square recurrent weight"),
        (nn.Linear(3, 4), {"which": "weight"}, ValueError, r"weight is \[4, 3\], expected square blocks"),
        (nn.Linear(3, 3), {"which": "bias"}, ValueError, r"bias is \[3\], expected square blocks"),
        (nn.Linear(3, 3), {"which": "W"}, ValueError, r"unknown parameters \['W'\]"),
        (object(), {}, TypeError, "has no parameters"),
    ],
)
def test_models_without_such_weights_are_explained(model: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        initialize(model, Gaussian(), **options)


@pytest.mark.parametrize("law", ["gaussian", Gaussian, None])
def test_a_law_is_an_object(law: Any) -> None:
    with pytest.raises(TypeError, match=r"expected an object such as Gaussian\(g=1.5\)"):
        initialize(nn.GRUCell(2, 3), law)


MODELS = {
    "rnn": {"nonlinearity": "relu", "bias": False},
    "gru": {"bias": False},
    "lstm": {},
    "ctrnn": {"alpha": 0.3, "gain": 1.5},
    "lowrank": {"rank": 2, "learn_alpha": True},
}


@pytest.mark.parametrize(
    ("framework", "name"),
    [
        *(("torch", name) for name in MODELS),
        *(pytest.param("jax", name, marks=pytest.mark.slow) for name in MODELS),
    ],
)
def test_models_by_name(framework: str, name: str) -> None:
    options = MODELS[name]
    model = make_model(name, 3, 6, 2, framework=framework, seed=5, dtype="float64", **options)
    again = make_model(name, 3, 6, 2, framework=framework, seed=5, dtype="float64", **options)
    cell, readout = model
    assert "bias_hh" not in numbers(cell) or options.get("bias", True)
    assert numbers(readout)["weight"].shape == (2, 6)
    for one, other in zip(model, again, strict=True):
        assert {value.dtype for value in numbers(one).values()} == {np.dtype("float64")}
        assert all(np.array_equal(value, numbers(other)[key]) for key, value in numbers(one).items())
    other = make_model(name, 3, 6, 2, framework=framework, seed=6, **options)
    assert {value.dtype for value in numbers(other.cell).values()} == {np.dtype("float32")}
    assert (cell.input_size, cell.hidden_size) == (3, 6)


@pytest.mark.slow
def test_names_mean_the_same_in_both_frameworks() -> None:
    for name in MODELS:
        cell, readout = make_model(name, 1, 2)
        there = make_model(name, 1, 2, framework="jax")
        assert (type(to_jax(cell)), type(to_jax(readout))) == (type(there.cell), type(there.readout))


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_a_model_starts_from_its_law(framework: str) -> None:
    cell, _ = make_model("gru", 3, 6, framework=framework, init=Gaussian(1.5), seed=7, dtype="float64", bias=False)
    assert len(numbers(cell)) == 2
    np.testing.assert_array_equal(numbers(cell)["weight_hh"][:6], Gaussian(1.5).matrix(6, seed=7))


def test_making_a_model_draws_nothing_else() -> None:
    state = torch.random.get_rng_state()
    make_model("gru", 2, 3)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("grue", 2, 3), {}, ValueError, r"unknown model 'grue'\. Nearest: gru\. Known: rnn, gru"),
        (("gru", 2, 3), {"alpha": 0.1}, ValueError, "gru has no option alpha; it has: bias"),
        (("gru", 2, 3), {"framework": "numpy"}, ValueError, "framework must be torch or jax, got 'numpy'"),
        (("gru", 2, 3), {"dtype": "float16"}, ValueError, "dtype must be float32 or float64"),
        (("gru", 0, 3), {}, ValueError, "inputs must be at least 1, got 0"),
        (("gru", 2, 3.0), {}, TypeError, r"units must be a whole number, got 3\.0"),
    ],
)
def test_bad_models_are_explained(arguments: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_model(*arguments, **options)


def test_float64_needs_jax_in_float64() -> None:
    with jax.enable_x64(False), pytest.raises(TypeError, match="jax_enable_x64"):
        make_model("gru", 2, 3, framework="jax", dtype="float64")
