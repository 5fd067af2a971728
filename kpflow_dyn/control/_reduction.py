"""Systems with fewer states that answer in the same way, or nearly."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from scipy.linalg import matrix_balance

from kpflow_dyn.control._gramians import gram, root
from kpflow_dyn.control._modes import reached
from kpflow_dyn.control._systems import LTI, as_system

METHODS = ("truncate", "matchdc")


def minreal(system: Any) -> LTI:
    """The same answers to inputs, with the states that these reach and outputs tell alone.

        G(s) = C (s - A)^{-1} B + D, with A as small as it can be

    Args:
        system: an `LTI`, or what `LTI` takes.

    Raises:
        TypeError: no system.
        ValueError: one of whose states nothing is left.
    Source: Kalman, SIAM J. Control 1, 152 (1963).

    >>> from kpflow_dyn import control
    >>> control.minreal(control.LTI([[-1.0, 0.0], [0.0, -2.0]], [[1.0], [0.0]])).A
    array([[-1.]])
    """
    system = as_system(system)
    A, (scale, _) = cast(tuple[np.ndarray, Any], matrix_balance(system.A, permute=False, separate=True))
    A, B, C = _within(A, system.B / scale[:, None], system.C * scale)
    A, C, B = (M.T for M in _within(A.T, C.T, B.T))
    if not len(A):
        raise ValueError("no state is both reached by inputs and told by outputs: the system is the gain D alone")
    return LTI(A, B, C, system.D, system.dt)


def _within(A: np.ndarray, B: np.ndarray, C: np.ndarray) -> tuple[np.ndarray, ...]:
    basis = reached(A, B)
    return basis.T @ A @ basis, basis.T @ B, C @ basis


def balred(system: Any, orders: int, method: str = "truncate") -> LTI:
    """A stable system with the states alone that are both easy to reach and easy to tell: balanced truncation.

        max over frequencies of |G - G_r| <= 2 (s_{r+1} + ... + s_n)        s: the Hankel singular values, `hsvd`

    Args:
        system: an `LTI`, or what `LTI` takes.
        orders: how many states to keep.
        method: "truncate" leaves the others out; "matchdc" keeps them at rest, so that the answer to a constant input
            is the same.

    Raises:
        TypeError: no system.
        ValueError: one that is not stable, another method, or an order that is not between 1 and the dimension of
            `minreal`.
    Source: Moore, IEEE Trans. Automatic Control 26, 17 (1981); Laub et al., ibid. 32, 115 (1987).

    >>> from kpflow_dyn import control
    >>> two = control.LTI([[-1.0, 0.0], [0.0, -100.0]], [[1.0], [1.0]], [[1.0, 1.0]])
    >>> control.balred(two, 1).A.round(1)
    array([[-1.]])
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {METHODS}")
    system = as_system(system)
    R, O = (root(gram(system, kind).W.values) for kind in "co")  # noqa: E741
    left, values, right = np.linalg.svd(O.T @ R)
    rank = int((values > 1e-9 * values[0]).sum()) if values[0] else 0
    if not (isinstance(orders, int | np.integer) and 1 <= orders <= rank):
        raise ValueError(f"orders is {orders!r}, expected how many states to keep, from 1 to {rank}")
    kept = rank if method == "matchdc" else int(orders)
    scale = values[:kept] ** -0.5
    into, out = scale[:, None] * (O @ left[:, :kept]).T, (R @ right[:kept].T) * scale
    balanced = LTI(into @ system.A @ out, into @ system.B, system.C @ out, system.D, system.dt)
    return balanced if kept == orders else _at_rest(balanced, int(orders))


def _at_rest(system: LTI, kept: int) -> LTI:
    """A system whose states from `kept` on follow the others at once."""
    fast = system.A[kept:, kept:] - (0 if system.dt is None else np.eye(len(system.A) - kept))
    follow = -np.linalg.solve(fast, np.concatenate([system.A[kept:, :kept], system.B[kept:]], 1))
    of_state, of_input = follow[:, :kept], follow[:, kept:]
    A12, C2 = system.A[:kept, kept:], system.C[:, kept:]
    A, B = system.A[:kept, :kept] + A12 @ of_state, system.B[:kept] + A12 @ of_input
    return LTI(A, B, system.C[:, :kept] + C2 @ of_state, system.D + C2 @ of_input, system.dt)
