"""Inner products of long float32 rows keep the digits that plain products of the libraries lose."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._arrays.dots import dots, gram
from kpflow_dyn.solvers._orthogonalise import orthonormalise

LIBRARIES = {"numpy": np.asarray, "torch": torch.as_tensor, "jax": jnp.asarray}


def positive_rows(rows: int, n: int) -> np.ndarray:
    """Rows of length one whose products have nothing that cancels."""
    values = np.random.default_rng(rows).random((rows, n)) + 0.5
    return (values / np.linalg.norm(values, axis=1)[:, None]).astype(np.float32)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("n", [1, 3000, 2**14, 600_001])
@pytest.mark.parametrize(("left", "right"), [(1, 5), (5, 2)])
def test_products_are_right_to_round_off(library: str, n: int, left: int, right: int) -> None:
    a, b = positive_rows(left, n), positive_rows(right, n)
    expected = a.astype(np.float64) @ b.astype(np.float64).T
    of = LIBRARIES[library]
    found, exact = dots(of(a), of(b)), gram(of(a), of(b))
    assert "float64" in str(found.dtype)
    np.testing.assert_allclose(to_numpy(found), expected, rtol=1e-6)
    np.testing.assert_allclose(to_numpy(exact), expected, rtol=1e-12)


@pytest.mark.parametrize("library", LIBRARIES)
def test_long_float32_rows_become_orthonormal(library: str) -> None:
    """With plain float32 products these are 1e-5 from it in torch, and 1e-4 in JAX."""
    of = LIBRARIES[library]
    known, _c, _r = orthonormalise(of(positive_rows(3, 600_001)), [], 0.0)
    fresh, _c, _r = orthonormalise(of(positive_rows(1, 600_001) ** 2), [known], 0.0)
    rows = to_numpy(gram(known, known)), to_numpy(gram(fresh, known)), to_numpy(gram(fresh, fresh))
    np.testing.assert_allclose(rows[0], np.eye(3), atol=5e-7)
    np.testing.assert_allclose(rows[1], 0, atol=5e-7)
    np.testing.assert_allclose(rows[2], 1, atol=5e-7)
