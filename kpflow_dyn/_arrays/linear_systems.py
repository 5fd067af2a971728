"""Krylov solvers of scipy and JAX for A x = b, on arrays of any form."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from kpflow_dyn._arrays import Array, library_of, like_numpy, to_numpy

OPTIONS = {"gmres": {"restart": 100, "maxiter": 50}, "cg": {}}


def iterate(method: Literal["cg", "gmres"], apply: Callable[[Array], Array], b: Array, rtol: float) -> Array:
    """x with |A x - b| <= rtol |b|, or the best that the method finds: the caller checks A x - b.

    JAX has solvers of its own; all others run scipy's, on the host.
    """
    if own := library_of(b).linear_solvers():
        return getattr(own, method)(apply, b, tol=rtol, **OPTIONS[method])[0]
    from scipy.sparse import linalg

    operator = on_host(apply, b)
    found, _info = getattr(linalg, method)(operator, to_numpy(b).ravel(), rtol=rtol, atol=0.0, **OPTIONS[method])
    return like_numpy(found.reshape(b.shape), b)


def on_host(apply: Callable[[Array], Array], like: Array) -> Any:
    """A map between arrays of one form as a LinearOperator of scipy."""
    from scipy.sparse import linalg

    make: Any = linalg.LinearOperator  # scipy builds a subclass from these keywords, which its types do not say

    def matvec(flat: np.ndarray) -> np.ndarray:
        return to_numpy(apply(like_numpy(flat.reshape(like.shape), like))).ravel()

    size = int(np.prod(like.shape))
    return make((size, size), matvec=matvec, dtype=to_numpy(like.reshape(-1)[:0]).dtype)
