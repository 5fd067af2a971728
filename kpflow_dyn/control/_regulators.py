"""Linear-quadratic regulators, the feedback u = -K z that costs least, and the estimators that are dual to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr
from scipy.linalg import expm, solve_continuous_are, solve_discrete_are

from kpflow_dyn._shown import Row, Shown, labelled, numbers, type_name
from kpflow_dyn.control._magnus import halvings, magnus, transposed
from kpflow_dyn.control._modes import combination, modes, told, unreachable, untold
from kpflow_dyn.control._systems import LTI, LTV, Mesh, as_matrix, bound, coordinates

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Regulator(NamedTuple):
    """What `lqr` and `dlqr` give, in the order of python-control, which calls them K, S, E.

    Attributes:
        K: the gain [input, unit], u = -K z.
        X: the solution of the Riccati equation [unit, unit]; z^T X z is the cost from z on.
        eigenvalues: the poles of the closed loop [unit].

    Example as `lqr`.
    """

    K: np.ndarray
    X: np.ndarray
    eigenvalues: np.ndarray

    def _shown(self) -> tuple[str, list[Row]]:
        return _gains("Regulator", self)

    __repr__, _repr_html_ = Shown.__repr__, Shown._repr_html_


class Estimator(NamedTuple):
    """What `lqe` and `dlqe` give, in the order of python-control, which calls them L, P, E.

    Attributes:
        L: the gain [unit, output], by which an estimate follows y - C z.
        P: the covariance of the estimate's error [unit, unit]; in discrete time before y is seen.
        eigenvalues: the poles of the error [unit].

    Example as `lqe`.
    """

    L: np.ndarray
    P: np.ndarray
    eigenvalues: np.ndarray

    def _shown(self) -> tuple[str, list[Row]]:
        return _gains("Estimator", self)

    __repr__, _repr_html_ = Shown.__repr__, Shown._repr_html_


def _gains(title: str, found: Regulator | Estimator) -> tuple[str, list[Row]]:
    """Named tuples, which can derive from nothing else, as rows."""
    matrices = zip(found._fields[:2], found[:2], strict=True)
    rows: list[Row] = [(name, f"{list(matrix.shape)}: {numbers(matrix.ravel())}") for name, matrix in matrices]
    return title, [*rows, ("eigenvalues", numbers(found.eigenvalues))]


@dataclass(frozen=True)
class _Words:
    """What a Riccati equation is about, for its messages."""

    Q: str
    R: str
    N: str
    letter: str  # of what R weighs
    unreached: str
    unseen: str


_REGULATOR = _Words(
    "Q", "R", "N", "u",
    "(A, B) must be stabilisable, but no input moves the mode of A at {}, which does not decay; give it an input (a "
    "column of B), or leave it out of the state",
    "Q must see each mode of A on the boundary of stability, but it does not see the one at {}, which neither grows "
    "nor decays; let Q weigh it",
)  # fmt: skip
_ESTIMATOR = _Words(
    "G QN G^T", "RN", "NN", "y",
    "(A, C) must be detectable, but no output tells the mode of A at {}, which does not decay; measure it (a row of "
    "C), or leave it out of the state",
    "noise must drive each mode of A on the boundary of stability, but none drives the one at {}, which neither grows "
    "nor decays; give it some (G, QN)",
)  # fmt: skip


def lqr(*args: Any, integral_action: Any = None, **named: Any) -> Regulator:
    """The gain K of u = -K z that minimises int z^T Q z + u^T R u + 2 z^T N u dt for z' = A z + B u.

        A^T X + X A - (X B + N) R^{-1} (B^T X + N^T) + Q = 0        K = R^{-1} (B^T X + N^T)

    Call it as lqr(system, Q, R), lqr(system, Q, R, N), lqr(A, B, Q, R) or lqr(A, B, Q, R, N), as in python-control. For
    a system in discrete time it returns the gain of `dlqr`.

    Args:
        system: an `LTI`, or anything that `LTI` takes.
        A: [unit, unit].
        B: [unit, input].
        Q: [unit, unit], symmetric, positive semi-definite.
        R: [input, input], symmetric, positive definite.
        N: [unit, input]; zeros if left out. Q - N R^{-1} N^T must be positive semi-definite.
        integral_action: C [output, unit]. Its outputs are integrated, and become further states after the others.

    Raises:
        TypeError: too few or too many arguments.
        ValueError: weights of wrong shapes, or indefinite weights; or nothing stabilises the system. The message then
            names the mode at fault, and the states that it is made of.
    Source: Astrom, Murray, "Feedback Systems" (2008), section 6.3; `scipy.linalg.solve_continuous_are`.

    >>> from kpflow_dyn import control
    >>> K, X, poles = control.lqr([[0.0, 1.0], [0.0, 0.0]], [[0.0], [1.0]], [[1.0, 0.0], [0.0, 0.0]], [[1.0]])
    >>> K.round(6)
    array([[1.      , 1.414214]])
    """
    system, Q, R, N = bound("lqr", ("A", "B"), ("Q", "R", "N"), args, named)
    return _regulator(_with_integrals(system, integral_action), Q, R, N)


def dlqr(*args: Any, integral_action: Any = None, **named: Any) -> Regulator:
    """The gain K of u_t = -K z_t that minimises sum_t z^T Q z + u^T R u + 2 z^T N u for z_{t+1} = A z_t + B u_t.

        X = A^T X A - (A^T X B + N) K + Q        K = (R + B^T X B)^{-1} (B^T X A + N^T)

    Called as `lqr`; here R may be semi-definite, where R + B^T X B is definite.

    Args and Raises as `lqr`.

    Source: Anderson, Moore, "Optimal Control: Linear Quadratic Methods" (1990); `scipy.linalg.solve_discrete_are`.

    >>> from kpflow_dyn import control
    >>> K, X, poles = control.dlqr([[1.0]], [[1.0]], [[1.0]], [[1.0]])
    >>> round(K.item(), 6), round(X.item(), 6)
    (0.618034, 1.618034)
    """
    system, Q, R, N = bound("dlqr", ("A", "B"), ("Q", "R", "N"), args, named, discrete=True)
    return _regulator(_with_integrals(system, integral_action), Q, R, N)


def lqe(*args: Any, **named: Any) -> Estimator:
    """The gain L of the Kalman filter e' = A e + B u + L (y - C e) for z' = A z + B u + G w, y = C z + v.

        A P + P A^T - (P C^T + G NN) RN^{-1} (C P + NN^T G^T) + G QN G^T = 0        L = (P C^T + G NN) RN^{-1}

    Called as lqe(system, QN, RN), lqe(system, QN, RN, NN), lqe(A, G, C, QN, RN) or lqe(A, G, C, QN, RN, NN), as in
    python-control (which has no NN yet). The gain of a system in discrete time is that of `dlqe`.

    Args:
        system: an `LTI`, or what `LTI` takes; its inputs are the noise, G = B.
        A: [unit, unit].
        G: [unit, noise].
        C: [output, unit].
        QN: the covariance of w [noise, noise], positive semi-definite.
        RN: that of v [output, output], positive definite.
        NN: of w with v [noise, output]; zeros when it is left out.

    Raises:
        TypeError, ValueError: as `lqr`, of which this is the dual: modes that no output tells, or no noise drives.
    Source: Astrom, Murray, "Feedback Systems" (2008), section 7.4.

    >>> from kpflow_dyn import control
    >>> L, P, poles = control.lqe([[-1.0]], [[1.0]], [[1.0]], [[3.0]], [[1.0]])
    >>> L, P
    (array([[1.]]), array([[1.]]))
    """
    return _estimator(*bound("lqe", ("A", "G", "C"), ("QN", "RN", "NN"), args, named))


def dlqe(*args: Any, **named: Any) -> Estimator:
    """The gain L of the Kalman filter e_{t+1} = A e_t + B u_t + L (y_t - C e_t) for z_{t+1} = A z_t + B u_t + G w_t.

        P = A P A^T - L (C P A^T + NN^T G^T) + G QN G^T        L = (A P C^T + G NN) (C P C^T + RN)^{-1}

    Called as `lqe`.

    Args and Raises as `lqe`.

    Source: Anderson, Moore, "Optimal Filtering" (1979).

    >>> from kpflow_dyn import control
    >>> L, P, poles = control.dlqe([[1.0]], [[1.0]], [[1.0]], [[1.0]], [[1.0]])
    >>> round(L.item(), 6)
    0.618034
    """
    return _estimator(*bound("dlqe", ("A", "G", "C"), ("QN", "RN", "NN"), args, named, discrete=True))


def _with_integrals(system: LTI, outputs: Any) -> LTI:
    """A system with the integrals (or sums) of outputs [output, unit] of its states as further states."""
    if outputs is None:
        return system
    C = as_matrix(outputs, "integral_action", (None, len(system.A)))
    kept = np.zeros((len(C), len(C))) if system.dt is None else np.eye(len(C))
    A = np.block([[system.A, np.zeros((len(system.A), len(C)))], [C, kept]])
    names = (*system.names, *(f"integral[{i}]" for i in range(len(C)))) if system.names else ()
    return LTI(A, np.pad(system.B, ((0, len(C)), (0, 0))), dt=system.dt, names=names)


def _regulator(system: LTI, Q: Any, R: Any, N: Any) -> Regulator:
    n, m = system.B.shape
    Q = check_weight(Q, "Q", n, definite=False, names=system.names)
    R = check_weight(R, "R", m, definite=system.dt is None, letter="u")
    N = np.zeros((n, m)) if N is None else as_matrix(N, "N", (n, m))
    return Regulator(*_riccati(system.A, system.B, Q, R, N, system.dt, system.names, _REGULATOR))


def _estimator(system: LTI, QN: Any, RN: Any, NN: Any) -> Estimator:
    G, C = system.B, system.C
    QN = check_weight(QN, "QN", G.shape[1], definite=False, letter="w")
    RN = check_weight(RN, "RN", len(C), definite=system.dt is None, letter="y")
    NN = np.zeros((G.shape[1], len(C))) if NN is None else as_matrix(NN, "NN", (G.shape[1], len(C)))
    K, P, poles = _riccati(system.A.T, C.T, G @ QN @ G.T, RN, G @ NN, system.dt, system.names, _ESTIMATOR)
    return Estimator(K.T, P, poles)


def check_weight(
    values: Any, what: str, n: int, definite: bool, names: tuple[str, ...] = (), letter: str = "z"
) -> np.ndarray:
    """A symmetric weight [n, n], positive definite or semi-definite; raise for another, and say along what."""
    W = as_matrix(values, what, (n, n))
    size = float(np.abs(W).max())
    if np.abs(W - W.T).max() > 1e-10 * size:
        raise ValueError(f"{what} is not symmetric; take ({what} + {what}.T) / 2")
    eigenvalues, vectors = np.linalg.eigh(W)
    lowest = float(eigenvalues[0])
    if lowest < -1e-10 * size or (definite and lowest <= 1e-14 * size):
        expected = "definite" if definite else "semi-definite"
        along = combination(vectors[:, 0], names, letter)
        raise ValueError(f"{what} has the eigenvalue {lowest:.3g} along {along}, expected a positive {expected} weight")
    return (W + W.T) / 2


def _riccati(
    A: np.ndarray, B: np.ndarray, Q: np.ndarray, R: np.ndarray, N: np.ndarray, dt: Any, names: Any, words: _Words
) -> tuple[np.ndarray, ...]:
    """The gain, the solution and the poles of the closed loop; raise with the mode that is at fault."""
    _check_modes(A, B, *_without_cross(A, B, Q, R, N, names, words), dt, names, words)
    solve = solve_continuous_are if dt is None else solve_discrete_are
    try:
        X = solve(A, B, Q, R, s=N)
        X = (X + X.T) / 2
        K = np.linalg.solve(R, B.T @ X + N.T) if dt is None else np.linalg.solve(R + B.T @ X @ B, B.T @ X @ A + N.T)
    except np.linalg.LinAlgError as error:
        raise ValueError(_nearly(A, B, R, dt, names, words, str(error))) from error
    closed = modes(A - B @ K)
    if any(mode.off_boundary(dt) >= 0 for mode in closed):
        raise ValueError(_nearly(A, B, R, dt, names, words, f"the gain found leaves the pole {closed[0].value:.3g}"))
    return K, X, np.linalg.eigvals(A - B @ K)


def _without_cross(A: Any, B: Any, Q: Any, R: Any, N: Any, names: Any, words: _Words) -> tuple[np.ndarray, np.ndarray]:
    """A - B R^{-1} N^T and Q - N R^{-1} N^T, of u + R^{-1} N^T z in the place of u; raise where it is indefinite."""
    shift = np.linalg.pinv(R, hermitian=True) @ N.T
    if np.abs(R @ shift - N.T).max() > 1e-8 * np.abs(N).max():
        raise ValueError(
            f"{words.N} weighs what {words.R} does not, so that no least cost exists; make {words.R} definite"
        )
    if N.any():
        rest = Q - N @ shift
        what = f"{words.Q} - {words.N} {words.R}^-1 {words.N}^T"
        Q = check_weight((rest + rest.T) / 2, what, len(Q), definite=False, names=names)
    return A - B @ shift, Q


def _check_modes(
    A: np.ndarray, B: np.ndarray, shifted: np.ndarray, Q: np.ndarray, dt: Any, names: tuple[str, ...], words: _Words
) -> None:
    lost = [mode for mode in unreachable(A, B) if mode.lingers(dt)]
    if lost:
        raise ValueError(words.unreached.format(told(lost, names)))
    unseen = [mode for mode in untold(shifted, Q) if mode.is_on_boundary(dt)]
    if unseen:
        raise ValueError(words.unseen.format(told(unseen, names)))


def _nearly(
    A: np.ndarray, B: np.ndarray, R: np.ndarray, dt: Any, names: tuple[str, ...], words: _Words, error: str
) -> str:
    """Why there is no solution where no mode is out of reach exactly: the one that is nearest to that, or R."""
    values, vectors = np.linalg.eigh(R)
    if values[0] <= 1e-14 * abs(values[-1]):
        along = combination(vectors[:, 0], (), words.letter)
        return f"{words.R} does not weigh {along}, and nothing else limits it ({error}); make {words.R} definite"
    lingering = [mode for mode in modes(A.T) if mode.lingers(dt)] or modes(A.T)
    size = np.linalg.norm(B, axis=0).max() or 1.0
    coupling = [np.linalg.norm(mode.vector @ B) / np.linalg.norm(mode.vector) / size for mode in lingering]
    weakest = lingering[int(np.argmin(coupling))]
    return (
        f"the Riccati equation has no stabilising solution to rounding ({error}); the mode of A that is hardest to "
        f"reach is at {weakest.told(names)}, by {min(coupling):.1e} of the largest column. Scale states and weights to "
        "similar sizes"
    )


# Along trajectories


@dataclass(frozen=True, eq=False, repr=False)
class TimeVaryingRegulator(Shown):
    """Gains along each trial.

    Attributes:
        K: [trial, time, input, unit]; u(t) = -K(t) z(t), or in discrete time u_t = -K_t z_{t-1}.
        X: [trial, time, unit, other_unit]; z^T X(t) z is the cost from z at t on.

    Example as `tvlqr`.
    """

    K: xr.DataArray
    X: xr.DataArray

    def _shown(self) -> tuple[str, list[Row]]:
        return "TimeVaryingRegulator", [(name, labelled(array)) for name, array in (("K", self.K), ("X", self.X))]

    def to_xarray(self) -> xr.Dataset:
        """A dataset of K and X."""
        import xarray as xr

        return xr.Dataset({name: getattr(self, name) for name in ("K", "X")})

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
        raise TypeError(f"ltv is {type_name(ltv)}, expected an LTV; an LTI becomes one by .along(t)")
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
