"""How much of known features lies in the leading modes: known spectra, dense definitions, invariances."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import kpflow_dyn as kp

TRIALS, INPUTS, OUTPUTS = 40, 5, 3


def linear_flow(measure: kp.Measure | None = None) -> tuple[kp.Flow, torch.Tensor]:
    """y = W x, whose kernel is x x^T on the trials, the same for each output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TRIALS, INPUTS, generator=generator, dtype=torch.float64) * (2.0 ** -torch.arange(INPUTS))
    model = nn.Linear(INPUTS, OUTPUTS, bias=False).double()
    return kp.linearize(kp.solve(kp.StaticProblem(model, x, state="")), measure=measure), x


def random_modes(k: int, shape: tuple[int, ...], seed: int = 0) -> kp.Modes:
    """The leading modes of a random symmetric matrix on [trial, unit]."""
    space = kp.Space(("trial", "unit"), shape, np.zeros(1))
    root = np.random.default_rng(seed).normal(size=(space.size, space.size))
    return kp.eigs(kp.MatrixOperator(root @ root.T, space, space, symmetric=True), k=k, alg=kp.solvers.Dense())


def test_modes_of_a_linear_model_are_the_principal_components() -> None:
    flow, x = linear_flow()
    components = torch.linalg.svd(x).U.T[:INPUTS]
    found = kp.feature_shares(kp.modes(flow.ntk, axis="trial", k=INPUTS), {str(i): u for i, u in enumerate(components)})
    assert np.allclose(found.of_modes, np.eye(INPUTS), atol=1e-10)
    assert np.array_equal(found.dimensions, np.ones(INPUTS))


def test_eigenspaces_over_trials_and_outputs_hold_each_component_in_every_output() -> None:
    flow, x = linear_flow()
    first, second = torch.linalg.svd(x).U.T[:2]
    families = {
        name: torch.einsum("t,oc->otc", u, torch.eye(OUTPUTS).double()) for name, u in {"a": first, "b": second}.items()
    }
    found = kp.feature_shares(kp.eigs(flow.ntk, k=2 * OUTPUTS), families)
    assert np.allclose(found.in_leading[OUTPUTS - 1], [1, 0], atol=1e-10)
    assert np.allclose(found.in_leading[-1], 1, atol=1e-10)
    assert found.size == TRIALS * OUTPUTS


def test_shares_are_squared_cosines_of_principal_angles() -> None:
    scipy_linalg = pytest.importorskip("scipy.linalg")
    modes, family = random_modes(6, (5, 4)), np.random.default_rng(1).normal(size=(3, 5, 4))
    found = kp.feature_shares(modes, {"family": family})
    for k in (1, 3, 6):
        angles = scipy_linalg.subspace_angles(modes.vectors[:k].reshape(k, -1).T, family.reshape(3, -1).T)
        assert abs(found.in_leading[k - 1, 0] - np.sum(np.cos(angles) ** 2) / 3) < 1e-10


def test_a_single_feature_by_its_definition() -> None:
    modes, f = random_modes(6, (5, 4)), np.random.default_rng(2).normal(size=(5, 4))
    found = kp.feature_shares(modes, {"f": f})
    expected = np.einsum("kij,ij->k", modes.vectors, f) ** 2 / np.sum(f**2)
    assert np.allclose(found.of_modes[:, 0], expected, atol=1e-10)
    assert np.allclose(found.in_leading[:, 0], np.cumsum(expected), atol=1e-10)


def test_only_the_span_of_a_family_and_of_the_modes_counts() -> None:
    rng = np.random.default_rng(3)
    modes, family = random_modes(4, (5, 4)), rng.normal(size=(3, 5, 4))
    mixed = np.einsum("ij,jkl->ikl", rng.normal(size=(5, 3)), 1e6 * family)  # five, of which three are independent
    turned = dataclasses.replace(
        modes, vectors=np.tensordot(np.linalg.qr(rng.normal(size=(4, 4)))[0], modes.vectors, 1)
    )
    plain = kp.feature_shares(modes, {"f": family})
    again = kp.feature_shares(modes, {"f": mixed})
    assert np.allclose(again.of_modes, plain.of_modes, atol=1e-10)
    assert again.dimensions[0] == 3
    assert np.allclose(kp.feature_shares(turned, {"f": family}).in_leading[-1], plain.in_leading[-1], atol=1e-10)
    permuted = rng.permutation(5)
    moved = kp.feature_shares(
        dataclasses.replace(modes, vectors=modes.vectors[:, permuted]), {"f": family[:, permuted]}
    )
    assert np.allclose(moved.of_modes, plain.of_modes, atol=1e-10)


def test_weights_of_trials_are_those_of_the_inner_product() -> None:
    weights = torch.linspace(0.1, 2, TRIALS).double()
    flow, _x = linear_flow(kp.Measure(trial=weights))
    modes = kp.eigs(flow.ntk, k=4)
    f = torch.randn(TRIALS, OUTPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    space = flow.ntk.domain
    expected = (space.inner(modes.vectors, f) ** 2 / space.inner(f, f)).numpy()
    assert np.allclose(kp.feature_shares(modes, {"f": f}).of_modes[:, 0], expected, atol=1e-10)


def test_chance_is_the_mean_over_random_features() -> None:
    modes = random_modes(5, (5, 4))
    features = np.random.default_rng(4).normal(size=(4000, 5, 4))
    found = kp.feature_shares(modes, {str(i): f for i, f in enumerate(features)})
    assert np.allclose(found.in_leading.mean(1), found.chance, atol=0.01)
    assert found.chance[-1] == 5 / 20


def test_labels_and_text() -> None:
    found = kp.feature_shares(random_modes(5, (5, 4)), {"one": np.ones((5, 4)), "two": np.eye(20)[:2].reshape(2, 5, 4)})
    data = found.to_xarray()
    assert data.in_leading.sel(mode=5, feature="two") == found.in_leading[4, 1]
    assert data.dimension.values.tolist() == [1, 2]
    assert "0.250 in 5 random directions" in str(found)


@pytest.mark.parametrize(
    ("feature", "words"),
    [
        (np.ones(5), r"expected \[trial, unit\] = \(5, 4\)"),
        (np.ones((2, 2, 5, 4)), r"or \[feature, trial, unit\]"),
        (np.zeros((5, 4)), "zero everywhere"),
        (np.full((5, 4), np.nan), "not finite"),
        (1j * np.ones((5, 4)), "complex"),
    ],
)
def test_features_that_are_none_are_refused(feature: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kp.feature_shares(random_modes(2, (5, 4)), {"f": feature})


def test_what_is_not_modes_or_has_no_names_is_refused() -> None:
    modes = random_modes(2, (5, 4))
    with pytest.raises(TypeError, match=r"Modes of kp\.eigs"):
        kp.feature_shares(modes.vectors, {"f": np.ones((5, 4))})
    for features in (np.ones((5, 4)), {}):
        with pytest.raises(TypeError, match="by name"):
            kp.feature_shares(modes, features)


def test_members_that_depend_on_others_in_single_precision_add_no_dimension() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 4, generator=generator)
    family = torch.stack([a, b, 0.3 * a - 0.7 * b, a + b])
    for modes in (random_modes(3, (5, 4)), single_precision(random_modes(3, (5, 4)))):
        assert kp.feature_shares(modes, {"f": family}).dimensions[0] == 2


def single_precision(modes: kp.Modes) -> kp.Modes:
    """The same modes as float32 of JAX."""
    jnp = pytest.importorskip("jax.numpy")
    space = dataclasses.replace(modes.space, like=jnp.zeros(1, dtype="float32"))
    return dataclasses.replace(modes, vectors=jnp.asarray(modes.vectors, dtype="float32"), space=space)


def test_modes_of_jax_and_features_of_torch_and_numpy() -> None:
    modes, f = random_modes(6, (5, 4)), np.random.default_rng(2).normal(size=(5, 4))
    expected = kp.feature_shares(modes, {"f": f}).of_modes
    assert np.allclose(
        kp.feature_shares(single_precision(modes), {"f": torch.from_numpy(f)}).of_modes, expected, atol=1e-6
    )


def test_entries_that_do_not_count_are_left_out() -> None:
    modes = random_modes(2, (5, 4))
    mask = np.arange(5)[:, None] < 3
    space = dataclasses.replace(modes.space, mask=mask)
    vectors = np.zeros((1, 5, 4))
    vectors[0, 0, 0] = 1
    feature = np.where(mask, np.zeros((5, 4)), 7.0)
    feature[0, 0] = 1
    found = kp.feature_shares(dataclasses.replace(modes, vectors=vectors, space=space), {"f": feature})
    assert np.allclose(found.of_modes, 1)
    assert found.size == 12


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sizes_of_the_members_do_not_matter(dtype: type) -> None:
    modes, rng = random_modes(6, (1000, 2)), np.random.default_rng(0)
    family = rng.normal(size=(2, 1000, 2)).astype(dtype)
    expected = kp.feature_shares(modes, {"f": family})
    found = kp.feature_shares(modes, {"f": family * np.array([1, 1e-5], dtype)[:, None, None]})
    assert found.dimensions[0] == expected.dimensions[0] == 2
    assert np.allclose(found.of_modes, expected.of_modes, atol=1e-6)


def test_half_precision_is_no_zero() -> None:
    feature = np.random.default_rng(0).normal(size=(1000, 2)).astype(np.float16)
    assert kp.feature_shares(random_modes(6, (1000, 2)), {"f": feature}).dimensions[0] == 1
