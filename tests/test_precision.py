"""Iterating with fewer digits: what is returned is certified in the operator's own precision.

CPUs have no TF32, so here an operator that looks at the framework's setting rounds as such a device would.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from synthetic import as_array, spectra

from kpflow_dyn._arrays import Rows, to_numpy
from kpflow_dyn.solvers import BlockLanczos
from kpflow_dyn.solvers._results import Eigenpairs

N, K = 500, 8
SPECTRUM = np.asarray(spectra(N)["exponential"])
TURN, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))
MATRIX = (TURN * SPECTRUM) @ TURN.T


def digits_of_torch(rows: torch.Tensor) -> torch.Tensor:
    setting = torch.get_float32_matmul_precision()
    return {"highest": rows, "high": torch.round(rows * 2**14) / 2**14, "medium": rows.bfloat16().float()}[setting]


def digits_of_jax(rows: jax.Array) -> jax.Array:
    setting = jax.config.jax_default_matmul_precision
    return {
        None: rows,
        "tensorfloat32": jnp.round(rows * 2**14) / 2**14,
        "bfloat16": rows.astype("bfloat16").astype("float32"),
    }[setting]


def operator(library: str) -> tuple[Rows, object, list[int]]:
    """The matrix as such a device applies it, and how many rows it was given in its own precision."""
    matrix, digits = as_array(library, MATRIX, "float32"), {"torch": digits_of_torch, "jax": digits_of_jax}[library]
    exact = [0]

    def apply(rows):
        rounded = digits(rows)
        exact[0] += rows.shape[0] if rounded is rows else 0
        return rounded @ matrix

    return apply, matrix, exact


def true_residuals(pairs: Eigenpairs) -> np.ndarray:
    vectors, values = to_numpy(pairs.vectors).astype(float), to_numpy(pairs.values)
    return np.linalg.norm(vectors @ MATRIX - values[:, None] * vectors, axis=1) / SPECTRUM.max()


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize(("products", "tol"), [("tf32", 3e-3), ("bf16", 2e-2)])
def test_loose_pairs_are_had_with_few_exact_applications(library: str, products: str, tol: float) -> None:
    apply, like, exact = operator(library)
    pairs = BlockLanczos(block=4, tol=tol, dense=0, products=products).solve(apply, N, K, like=like)
    assert to_numpy(pairs.converged).all()
    assert exact[0] <= K + 2 < pairs.applications / 2
    found = true_residuals(pairs)
    assert found.max() <= tol
    assert (found <= 2 * to_numpy(pairs.residuals)).all()  # of a claim the rounding is known on average only


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("products", ["tf32", "bf16"])
def test_what_is_not_reached_is_flagged_with_its_true_residual(library: str, products: str) -> None:
    apply, like, _ = operator(library)
    with pytest.warns(UserWarning, match="did not reach"):
        pairs = BlockLanczos(block=4, tol=1e-6, dense=0, products=products).solve(apply, N, K, like=like)
    np.testing.assert_allclose(to_numpy(pairs.residuals), true_residuals(pairs), rtol=0.02, atol=1e-6)
    assert not to_numpy(pairs.converged).all()


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_settings_are_put_back_and_unasked_nothing_is_rounded(library: str) -> None:
    apply, like, exact = operator(library)
    BlockLanczos(block=4, tol=1e-2, dense=0, products="bf16").solve(apply, N, K, like=like)
    assert torch.get_float32_matmul_precision() == "highest"
    assert jax.config.jax_default_matmul_precision is None
    exact[0] = 0
    pairs = BlockLanczos(block=4, tol=1e-5, dense=0).solve(apply, N, K, like=like)
    assert exact[0] == pairs.applications
    assert true_residuals(pairs).max() <= 1e-5


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="tf32, bf16 or None"):
        BlockLanczos(products="half")
