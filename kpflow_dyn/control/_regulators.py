"""Linear-quadratic regulators: the feedback u = -K z that costs least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr
from scipy.linalg import expm, solve_continuous_are, solve_discrete_are

from kpflow_dyn.control._magnus import halvings, magnus, transposed
from kpflow_dyn.control._systems import LTV, Mesh, as_matrix, coordinates, square

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Regulator(NamedTuple):
    """What `lqr` and `dlqr` give, in the order of python-control.

    Attributes:
        K: the gain [input, unit], u = -K z.
        X: the solution of the Riccati equation [unit, unit]; z^T X z is the cost from z on.
        eigenvalues: the poles of the closed loop [unit].

    Example as `lqr`.
    """

    K: np.ndarray
    X: np.ndarray
    eigenvalues: np.ndarray


def lqr(A: Any, B: Any, Q: Any, R: Any) -> Regulator:
    """The gain K of u = -K z that minimises int z^T Q z + u^T R u dt for z' = A z + B u.

        A^T X + X A - X B R^{-1} B^T X + Q = 0        K = R^{-1} B^T X

    Args:
        A: [unit, unit].
        B: [unit, input].
        Q: [unit, unit], symmetric, positive semi-definite.
        R: [input, input], symmetric, positive definite.

    Raises:
        ValueError: weights of other shapes or indefinite, or where nothing stabilises the system.
    Source: Astrom, Murray, "Feedback Systems" (2008), section 6.3; `scipy.linalg.solve_continuous_are`.

    >>> from kpflow_dyn import control
    >>> K, X, poles = control.lqr([[0.0, 1.0], [0.0, 0.0]], [[0.0], [1.0]], [[1.0, 0.0], [0.0, 0.0]], [[1.0]])
    >>> K.round(6)
    array([[1.      , 1.414214]])
    """
    A, B, Q, R = _checked(A, B, Q, R)
    X = _riccati(solve_continuous_are, A, B, Q, R)
    K = np.linalg.solve(R, B.T @ X)
    return _regulator(K, X, A - B @ K, lambda poles: poles.real < 0)


def dlqr(A: Any, B: Any, Q: Any, R: Any) -> Regulator:
    """The gain K of u_t = -K z_t that minimises sum_t z_t^T Q z_t + u_t^T R u_t for z_{t+1} = A z_t + B u_t.

        X = A^T X (A - B K) + Q        K = (R + B^T X B)^{-1} B^T X A

    Args and Raises as `lqr`.

    Source: Anderson, Moore, "Optimal Control: Linear Quadratic Methods" (1990); `scipy.linalg.solve_discrete_are`.

    >>> from kpflow_dyn import control
    >>> K, X, poles = control.dlqr([[1.0]], [[1.0]], [[1.0]], [[1.0]])
    >>> round(K.item(), 6), round(X.item(), 6)
    (0.618034, 1.618034)
    """
    A, B, Q, R = _checked(A, B, Q, R)
    X = _riccati(solve_discrete_are, A, B, Q, R)
    K = np.linalg.solve(R + B.T @ X @ B, B.T @ X @ A)
    return _regulator(K, X, A - B @ K, lambda poles: abs(poles) < 1)


def _checked(A: Any, B: Any, Q: Any, R: Any) -> tuple[np.ndarray, ...]:
    A = square(A, "A")
    B = as_matrix(B, "B", (len(A), None))
    return A, B, check_weight(Q, "Q", len(A), definite=False), check_weight(R, "R", B.shape[1], definite=True)


def check_weight(values: Any, what: str, n: int, definite: bool) -> np.ndarray:
    """A symmetric weight [n, n], positive definite or semi-definite; raise for another."""
    W = as_matrix(values, what, (n, n))
    size = float(np.abs(W).max())
    if np.abs(W - W.T).max() > 1e-10 * size:
        raise ValueError(f"{what} is not symmetric; take ({what} + {what}.T) / 2")
    lowest = float(np.linalg.eigvalsh(W)[0])
    if lowest < -1e-10 * size or (definite and lowest <= 1e-14 * size):
        expected = "definite" if definite else "semi-definite"
        raise ValueError(f"{what} has the eigenvalue {lowest:.3g}, expected a positive {expected} weight")
    return (W + W.T) / 2


def _riccati(solve: Any, *matrices: np.ndarray) -> np.ndarray:
    try:
        X = solve(*matrices)
    except np.linalg.LinAlgError as error:
        raise ValueError(f"the Riccati equation has no stabilising solution ({error}); {_ADVICE}") from error
    return (X + X.T) / 2


_ADVICE = "(A, B) must be stabilisable, and Q see each mode of A on the boundary of stability"


def _regulator(K: np.ndarray, X: np.ndarray, closed: np.ndarray, inside: Any) -> Regulator:
    poles = np.linalg.eigvals(closed)
    if not inside(poles).all():
        raise ValueError(f"the gain found leaves poles at {np.array2string(poles, precision=3)}; {_ADVICE}")
    return Regulator(K, X, poles)


# Along trajectories


@dataclass(frozen=True, eq=False)
class TimeVaryingRegulator:
    """Gains along each trial.

    Attributes:
        K: [trial, time, input, unit]; u(t) = -K(t) z(t), or in discrete time u_t = -K_t z_{t-1}.
        X: [trial, time, unit, other_unit]; z^T X(t) z is the cost from z at t on.

    Example as `tvlqr`.
    """

    K: xr.DataArray
    X: xr.DataArray

    def plot(self, dark: bool = False) -> Figure:
        """The gains of the first trial, and the size of K in all."""
        from kpflow_dyn.figures import _control as figures

        return figures.gains(self, dark=dark)


def tvlqr(ltv: LTV, Q: Any, R: Any, Qf: Any = None) -> TimeVaryingRegulator:
    """The gains that cost least over the horizon of each trial.

        continuous    J = int z^T Q z + u^T R u dt + z(T)^T Qf z(T)      -X' = A^T X + X A - X B R^{-1} B^T X + Q
        discrete      J = sum_{t=1..T} z_{t-1}^T Q z_{t-1} + u_t^T R u_t + z_T^T Qf z_T
                      K_t = (R + B_t^T X_t B_t)^{-1} B_t^T X_t A_t       X_{t-1} = Q + A_t^T X_t (A_t - B_t K_t)

    z and u are deviations from the trajectory. With `linearize_ltv(..., loop="open")` u is the whole control's; with
    "closed" it is what is added to that of the policy.

    Args:
        ltv: what `linearize_ltv` or `LTI.along` gives.
        Q: [unit, unit], symmetric, positive semi-definite.
        R: [input, input], symmetric, positive definite.
        Qf: the weight at the end, like Q; zeros when None.

    Raises:
        TypeError, ValueError: something else than an LTV, weights of other shapes or indefinite.
    Source: Anderson, Moore, "Optimal Control: Linear Quadratic Methods" (1990), chapters 2 and 3.

    >>> import numpy as np
    >>> from kpflow_dyn import control
    >>> pushed = control.LTI([[0.0, 1.0], [0.0, 0.0]], [[0.0], [1.0]])
    >>> gains = control.tvlqr(pushed.along([0.0, 5.0, 20.0]), np.diag([1.0, 0.0]), [[1.0]])
    >>> gains.K.values[0, 0].round(4)
    array([[1.    , 1.4142]])
    """
    if not isinstance(ltv, LTV):
        raise TypeError(f"ltv is {type(ltv).__name__}, expected an LTV; an LTI becomes one by .along(t)")
    n, m = ltv.B.values.shape[-2:]
    Q, R = check_weight(Q, "Q", n, definite=False), check_weight(R, "R", m, definite=True)
    Qf = np.zeros((n, n)) if Qf is None else check_weight(Qf, "Qf", n, definite=False)
    X = np.broadcast_to(Qf, (len(ltv.A), n, n))
    K, X = _steps(ltv, Q, R, X) if ltv.mesh is None else _flows(ltv, ltv.mesh, Q, R, X)
    coords = {"time": ltv.time, **coordinates(ltv.names, "unit")}
    return TimeVaryingRegulator(
        xr.DataArray(K, coords, ("trial", "time", "input", "unit")),
        xr.DataArray(X, coords | coordinates(ltv.names, "other_unit"), ("trial", "time", "unit", "other_unit")),
    )


def _steps(ltv: LTV, Q: np.ndarray, R: np.ndarray, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    gains, costs = [], []
    for k in reversed(range(len(ltv.time))):
        A, B = ltv.A.values[:, k], ltv.B.values[:, k]
        K = np.linalg.solve(R + transposed(B) @ X @ B, transposed(B) @ X @ A)
        gains.append(K)
        costs.append(X)
        X = Q + transposed(A) @ X @ (A - B @ K)
        X = (X + transposed(X)) / 2
    return np.stack(gains[::-1], 1), np.stack(costs[::-1], 1)


def _flows(ltv: LTV, mesh: Mesh, Q: np.ndarray, R: np.ndarray, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Riccati equation by the linear flow of state and costate, [z, l]' = [[A, -B R^-1 B^T], [-Q, -A^T]] [z, l]."""
    weighted = np.linalg.solve(R, transposed(mesh.B))
    block = np.block([[mesh.A, -mesh.B @ weighted], [np.broadcast_to(-Q, mesh.A.shape), -transposed(mesh.A)]])
    omega, n, found = magnus(block, np.diff(mesh.edges)), len(Q), [X]
    parts = 2 ** halvings(omega)
    back = expm(-omega / parts)
    for k in reversed(range(back.shape[1])):
        for _ in range(parts):
            flow = back[:, k, :, :n] + back[:, k, :, n:] @ X  # [2 unit, unit]: states, then costates
            X = transposed(np.linalg.solve(transposed(flow[:, :n]), transposed(flow[:, n:])))
            X = (X + transposed(X)) / 2
        found.append(X)
    X = np.stack(found[::-1], 1)[:, mesh.at]
    return np.linalg.solve(R, transposed(ltv.B.values) @ X), X
