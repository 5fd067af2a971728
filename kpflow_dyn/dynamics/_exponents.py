"""How fast nearby trajectories part: Lyapunov exponents, and those of a finite time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Random, array_namespace, like_numpy
from kpflow_dyn._problems.problems import DiscreteProblem, OverTimes
from kpflow_dyn._problems.solutions import Solution
from kpflow_dyn._shown import Row, Shown, axes_sizes, number, numbers, some, with_error
from kpflow_dyn.dynamics._blocks import Blocks, is_whole
from kpflow_dyn.dynamics._jacobians import smooth, solved, width
from kpflow_dyn.dynamics._singular_values import GradedProduct

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

Dynamics = Solution | DiscreteProblem | OverTimes
PARTS = 10  # of each trial, from whose spread the standard error comes


@dataclass(frozen=True, eq=False, repr=False)
class Lyapunov(Shown):
    """Lyapunov exponents, the largest first: per step, or for an ODE per unit of its time.

    Attributes:
        exponents: of each trial [trial, k].
        mean: over the trials [k].
        stderr: its standard error [k], from the spread of tenths of each trial, which are taken as independent; NaN if
            there is only one such part. It is what the print shows after +-. It is how much the rates vary along the
            trials, and no bound on the error of the solve.
        history: the exponents from the end of the transient up to each time [trial, time, k]; NaN before that.
        times: when each factor ends [trial, time].
        units: the total number of exponents.

    Example as `lyapunov_spectrum`.
    """

    exponents: np.ndarray
    mean: np.ndarray
    stderr: np.ndarray
    history: np.ndarray
    times: np.ndarray
    units: int

    def _shown(self) -> tuple[str, list[Row]]:
        pairs = [with_error(value, error) for value, error in zip(self.mean, self.stderr, strict=True)]
        rows: list[Row] = [("exponents", axes_sizes(("trial", "exponent"), self.exponents.shape))]
        rows += [("mean", some(pairs, 4)), ("entropy", number(self.entropy)), ("dimension", number(self.dimension))]
        return f"The first {len(self.mean)} of {self.units} Lyapunov exponents", rows

    @property
    def entropy(self) -> float:
        """The sum of the positive exponents, by Pesin's formula the rate of entropy (at least, where k < units)."""
        return float(self.mean[self.mean > 0].sum())

    @property
    def dimension(self) -> float:
        """The attractor dimension of Kaplan and Yorke, j + (l_1 + ... + l_j) / |l_{j+1}| for the last sum >= 0.

        `units` where no sum is negative; NaN where more exponents are needed to tell.
        """
        sums = np.cumsum(self.mean)
        if (sums >= 0).all():
            return float(self.units) if len(sums) == self.units else float("nan")
        j = int(np.argmax(sums < 0))
        return j + (float(sums[j - 1] / -self.mean[j]) if j else 0.0)

    def to_xarray(self) -> xr.Dataset:
        """A dataset of `exponents`, `mean`, `stderr` and `history`, `time` being [trial, time]."""
        import xarray as xr

        data: dict[str, Any] = {
            "exponents": (("trial", "exponent"), self.exponents),
            "mean": ("exponent", self.mean),
            "stderr": ("exponent", self.stderr),
            "history": (("trial", "time", "exponent"), self.history),
        }
        return xr.Dataset(data, {"end": (("trial", "time"), self.times)})

    def plot(self, dark: bool = False) -> Figure:
        """The exponents with error bars of two standard errors, and how they settled over time."""
        from kpflow_dyn.figures import _dynamics as figures

        return figures.lyapunov(self, dark=dark)


@dataclass(frozen=True, eq=False, repr=False)
class FiniteTimeExponents(Shown):
    """1/t log s_i(A_t ... A_1) along each trial, the largest first.

    Attributes:
        exponents: [trial, time, unit], per step or of an ODE per unit of its time; -inf where a singular value is zero.
        times: t [trial, time].
        start: the time that the product begins at.

    Example as `finite_time_exponents`.
    """

    exponents: np.ndarray
    times: np.ndarray
    start: float

    def _shown(self) -> tuple[str, list[Row]]:
        rows: list[Row] = [("exponents", axes_sizes(("trial", "time", "unit"), self.exponents.shape))]
        rows += [("at the end", f"{numbers(self.exponents[:, -1].mean(0), 4)} in the mean over trials")]
        return "FiniteTimeExponents", [*rows, ("times", f"{number(self.start)} to {number(self.times.max())}")]

    def to_xarray(self) -> xr.Dataset:
        """A dataset of `exponents` [trial, time, exponent], `end` being t [trial, time]."""
        import xarray as xr

        data = {"exponents": (("trial", "time", "exponent"), self.exponents)}
        return xr.Dataset(data, {"end": (("trial", "time"), self.times)}, {"start": self.start})

    def plot(self, dark: bool = False) -> Figure:
        """The mean of each exponent over the trials against time, and the range of the largest."""
        from kpflow_dyn.figures import _dynamics as figures

        return figures.finite_time(self, dark=dark)


def lyapunov_spectrum(
    sol: Dynamics, k: int | None = None, *, interval: int = 1, transient: float = 0.0, seed: int = 0
) -> Lyapunov:
    """The leading Lyapunov exponents along each trial.

        A_t Q_{t-1} = Q_t R_t        l_i = sum_t log |R_t[i, i]| / time

    k directions go through the linearised steps of the solution together; no Jacobian is kept. For an ODE each step
    that its solver accepted is divided along the dense output, into twice as many parts until no exponent changes by
    more than 1 %: near rest a solver takes steps as long as stability allows, and such a step contracts by less than
    the flow. The path is that of the solve, as good as its tolerances. For an SDE they are the steps on its
    paths, which are trials of their own. For a DDE the directions are changes of the state and of all earlier states
    that later steps look up. A DDE has infinitely many exponents. Its steps have as many as the numbers that they look
    up, and the leading ones belong to the equation.

    Args:
        sol: a solution, or a problem, which is solved first. Its trials are starts, and its inputs drive them.
        k: how many exponents. When None all; for a DDE as many as units.
        interval: steps from one QR factorisation to the next. A longer interval is cheaper. But growth and decay within
            it must not differ by more than the digits of a number.
        transient: the part of each trial that does not count: a number of steps, or for an ODE a time. In it the states
            have to reach the attractor, and the directions have to align.
        seed: for the random directions Q_0.

    Raises:
        TypeError: a problem without steps.
        ValueError: a k above the number of units; a transient as long as the trial; an interval over which a number
            overflows; or an ODE whose steps cannot be replayed.

    Warns:
        UserWarning: some exponents are lost in round-off; or those of an ODE still change when its steps are divided
            into 64 parts.
    Source: Benettin et al., Meccanica 15, 9 (1980); Engelken, Wolf, Abbott, Phys. Rev. Research 5, 043044 (2023).

    >>> import torch
    >>> import kpflow_dyn as kp
    >>> cell = torch.nn.RNNCell(1, 2, bias=False).double()
    >>> _ = cell.weight_hh.data.copy_(torch.diag(torch.tensor([0.9, 0.5])))
    >>> problem = kp.DiscreteProblem(cell, torch.zeros(1, 200, 1, dtype=torch.float64))  # rests at zero
    >>> found = kp.dynamics.lyapunov_spectrum(problem, transient=50)
    >>> found.mean.round(3), np.log([0.9, 0.5]).round(3)
    (array([-0.105, -0.693]), array([-0.105, -0.693]))
    """
    sol = smooth(solved(sol))
    units = width(sol)
    if k is not None and not (is_whole(k) and 1 <= k <= units):
        raise ValueError(f"k is {k!r}, expected a number of exponents from 1 to the {units} units")
    blocks = Blocks(sol, interval)
    counted = blocks.after(transient)
    R = blocks.factors(_random_start(sol, k or sol.state.shape[2], seed), counted)
    with np.errstate(divide="ignore"):
        logs = np.log(np.abs(np.diagonal(R, axis1=2, axis2=3)))
    order = np.argsort(-_rates(logs, counted).mean(0), kind="stable")
    logs = logs[..., order]
    exponents = _rates(logs, counted)
    return Lyapunov(
        exponents, exponents.mean(0), _standard_error(logs, counted), _history(logs, counted), blocks.end, units
    )


def finite_time_exponents(sol: Dynamics, horizon: float | None = None, *, interval: int = 1) -> FiniteTimeExponents:
    """Finite-time Lyapunov exponents: the singular values s of the product of Jacobians from the start of each trial.

        l_i(t) = 1/t log s_i(A_t ... A_1)

    Steps of an ODE are divided as in `lyapunov_spectrum`. The product is never formed. Its singular values are followed
    from factor to factor, each with its own relative accuracy: after long times the ratio of the largest to the
    smallest may be beyond what a number holds. Of a DDE it is that of `step_jacobians`, of earlier states too.

    Args:
        sol: a solution, or a problem to be solved first.
        horizon: up to when: steps, or of an ODE a time from t_0 on; the whole trial when None.
        interval: steps from one time to the next; they make one factor, within the digits of a number.

    Raises:
        TypeError: of a problem without steps.
        ValueError: a horizon longer than the trial, or as `lyapunov_spectrum`.

    Warns as `lyapunov_spectrum`.

    Source: Demmel, Veselic, "Jacobi's method is more accurate than QR", SIAM J. Matrix Anal. Appl. 13, 1204 (1992).

    >>> import torch
    >>> import kpflow_dyn as kp
    >>> cell = torch.nn.RNNCell(1, 2, bias=False).double()
    >>> _ = cell.weight_hh.data.copy_(torch.tensor([[0.5, 10.0], [0.0, 0.5]]))  # amplifies, then decays
    >>> problem = kp.DiscreteProblem(cell, torch.zeros(1, 200, 1, dtype=torch.float64))
    >>> found = kp.dynamics.finite_time_exponents(problem)
    >>> found.exponents[0, [0, 9, 199], 0].round(2)
    array([ 2.31, -0.16, -0.65])
    """
    sol = smooth(solved(sol))
    trials, units = len(sol.state), width(sol)
    eye = like_numpy(np.broadcast_to(np.eye(units)[:, None], (units, trials, units)).copy(), sol.state)
    blocks = Blocks(sol, interval)
    end = blocks.end[:, : blocks.until(horizon)]
    R, product = blocks.factors(eye, blocks.end - blocks.begin), GradedProduct(trials, units)
    logs = np.stack([product.multiply(R[:, block]) for block in range(end.shape[1])], 1)
    return FiniteTimeExponents(logs / (end - blocks.start)[..., None], end, blocks.start)


def _random_start(sol: Any, k: int, seed: int) -> Any:
    """Orthonormal directions [k, trial, unit]."""
    trials, units = len(sol.state), width(sol)
    xp = array_namespace(sol.state)
    drawn = Random(seed).normal((trials, units, k), sol.state)
    return xp.permute_dims(xp.linalg.qr(drawn)[0], (2, 0, 1))


def _rates(logs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """sum logs / sum lengths over the blocks that count [trial, k]."""
    return np.where(lengths[..., None] > 0, logs, 0).sum(1) / lengths.sum(1)[:, None]


def _history(logs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    sums, times = np.where(lengths[..., None] > 0, logs, 0).cumsum(1), lengths.cumsum(1)[..., None]
    return np.where(times > 0, sums / np.where(times > 0, times, 1), np.nan)


def _standard_error(logs: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """From the rates of the parts of all trials, as if these were independent."""
    along = (lengths.cumsum(1) - lengths / 2) / lengths.sum(1, keepdims=True)
    parts = [np.where(part, lengths, 0) for part in (np.floor(PARTS * along) == n for n in range(PARTS))]
    rates = np.concatenate([_rates(logs[there], part[there]) for part in parts if (there := part.any(1)).any()])
    if len(rates) < 2:
        return np.full(logs.shape[2], np.nan)
    with np.errstate(invalid="ignore"):  # of exponents that are -inf
        return rates.std(0, ddof=1) / len(rates) ** 0.5
