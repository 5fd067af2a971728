"""How soon each of many starts of one architecture is learnt: their frozen kernels in one batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, full_precision, like_numpy, to_numpy
from kpflow_dyn._arrays.complex_numbers import count, split, vector_of
from kpflow_dyn._learning.losses import counted, full_mask
from kpflow_dyn._learning.options import is_count
from kpflow_dyn._problems.problems import DiscreteProblem
from kpflow_dyn._problems.units import units_read
from kpflow_dyn._shown import ShownAsText, type_name

if TYPE_CHECKING:
    import xarray as xr

PARTS = (0.5, 0.1)
SETTLED = 0.95  # from here on one application more leaves the order about as it is
SHOWN = 10  # starts that are printed
FEWEST, MOST = 3, 6  # applications, where their number is not given


@dataclass(frozen=True, eq=False, repr=False)
class Starts(ShownAsText):
    """How soon gradient descent would learn from each start, if its kernel stayed as it is.

    Attributes:
        half, tenth: tau = learning rate x steps at which the loss has fallen to this part [start]; inf if it never
            does.
        rates: Ritz values of the kernel [start, k], and
        energies: the part of the loss along each [start, k].
        settled: the rank correlation of `half` with its values after one application fewer. If it is below .95, take
            more applications. NaN for one start alone.
        applications: how many times the kernel of each start was applied to one vector.

    Example as `forecast_starts`.
    """

    half: np.ndarray
    tenth: np.ndarray
    rates: np.ndarray
    energies: np.ndarray
    settled: float
    applications: int

    @property
    def order(self) -> np.ndarray:
        """The numbers of the starts, the soonest first."""
        return np.argsort(self.half, kind="stable")

    def to_xarray(self) -> xr.Dataset:
        """A dataset of `half`, `tenth` [start], `rates` and `energies` [start, mode]."""
        import xarray as xr

        data = {name: ("start", getattr(self, name)) for name in ("half", "tenth")}
        data |= {name: (("start", "mode"), getattr(self, name)) for name in ("rates", "energies")}
        return xr.Dataset(data, attrs={"settled": self.settled, "applications": self.applications})

    def __str__(self) -> str:
        first = [f"start {i:<4} half of the loss at tau = {self.half[i]:.4g}" for i in self.order[:SHOWN]]
        more = [f"and {len(self.half) - SHOWN} later ones"] * (len(self.half) > SHOWN)
        settled = f"order like that of one application fewer: {self.settled:.2f} ({self.applications} applications)"
        return "\n".join([*first, *more, settled])


def forecast_starts(
    problem: DiscreteProblem,
    starts: Sequence[tuple[Any, Any]],
    target: Array,
    *,
    mask: Array | None = None,
    applications: int | None = None,
) -> Starts:
    """Find the starts that gradient descent on a squared error learns first, under the kernel of each as it is now.

        e' = -(2 / Z) ntk m e,    L = <e, m e> / Z,    e = y - target,    Z = <1, m>

    All starts go through the model together, so no start is linearised by itself. A few steps of Lanczos from e give
    Gauss quadratures of the loss over time. The order of the starts is right long before each time has settled. For the
    times of one network use `forecast` or `gradient_flow`. The order is for gradient descent at one small rate for all
    starts; Adam has another order. Each application is a vjp and, except for the last, a jvp. In seconds this is two to
    three gradients of the loss.

    Args:
        problem: of any of the starts. All starts share its inputs and its initial state.
        starts: cells and linear readouts, such as `models.make_model` makes, of the same shapes. All weights learn
            except frozen ones. The frozen weights must be the same ones in all starts.
        target: as y, [trial, time, out].
        mask: m >= 0, [trial, time] or as the target; all ones when None.
        applications: of each kernel. None takes 3 to 6, until the order has settled.

    Raises:
        ValueError: no starts; starts whose parameters have other names or shapes than those of the first; a mask,
            target or number of applications that does not fit; states that are not finite, or a target that is not
            finite where it counts.
    Source: as `forecast`; Golub, Meurant, "Matrices, moments and quadrature" (1994).

    >>> import torch, kpflow_dyn as kp
    >>> starts = [kp.models.make_model("gru", 2, 16, seed=seed) for seed in range(5)]
    >>> problem = kp.DiscreteProblem(starts[0].cell, torch.randn(4, 10, 2))
    >>> kp.forecast_starts(problem, starts, torch.ones(4, 10, 1)).half.shape
    (5,)
    """
    if not isinstance(problem, DiscreteProblem):
        raise TypeError(f"forecast_starts takes a DiscreteProblem, got {type_name(problem)}; take kp.forecast of each")
    if applications is not None and not (is_count(applications) and applications > 1):
        raise ValueError(f"applications is {applications!r}, expected an integer from 2 on, or None")
    batch = _Batch(problem, list(starts), target, mask)

    def enough(found: Starts) -> bool:
        settled = applications is None and found.applications >= FEWEST and found.settled >= SETTLED
        return settled or found.applications == (applications or MOST)

    with full_precision(target):
        return next(found for found in _forecasts(batch) if enough(found))


def _forecasts(batch: _Batch) -> Iterator[Starts]:
    """With 1, 2, ... applications."""
    before = None
    for diagonal, norms in _lanczos(batch):
        rates, parts = _quadrature(diagonal, norms)
        half, tenth = (_times(rates, parts, part) for part in PARTS)
        settled = math.nan if before is None else _rank_correlation(half, before)
        yield Starts(half, tenth, rates, norms[:, :1] ** 2 * parts, settled, len(rates[0]))
        before = half


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's; NaN where all numbers of one are equal."""
    from scipy.stats import spearmanr

    if min(len(np.unique(a)), len(np.unique(b))) < 2:
        return math.nan
    found: Any = spearmanr(a, b)
    return float(found.statistic)


class _Batch:
    """f = (m / Z)^(1/2) (y - target) of all starts [start, trial, time, out], and its J in their parameters."""

    def __init__(self, problem: DiscreteProblem, starts: Sequence[tuple[Any, Any]], target: Array, mask: Any) -> None:
        if problem.encoder is not None:
            raise ValueError(
                "the kernels of many starts are those of cells and readouts, and the start z0 of this problem learns "
                "as well; pose it with a fixed z0"
            )
        backend = problem.backend
        self._problem, self._models, self._transforms = problem, backend.models, backend.transforms
        self._values = [[self._models.parameters_of(part) for part in _pair(start)] for start in starts]
        self._check()
        self._readout = starts[0][1]
        self._check_target(problem, target)
        weights = full_mask(mask, tuple(target.shape))
        self._root = like_numpy((weights / weights.sum()) ** 0.5, target)
        self._target = counted(target, self._root)
        if not np.isfinite(to_numpy(self._target)).all():
            raise ValueError("the target holds NaN or inf where it counts; leave such places out by mask=")
        self._step, self._z0 = backend.tracing.discrete_step(problem)
        xp = array_namespace(target)
        rows = [vector_of(v for values in both for v in values.values()) for both in self._values]
        self._theta = self._models.snapshot(xp.stack(rows))  # [start, n]
        self._learning = like_numpy(self._learnt(), self._theta)  # [n]
        self._every = self._transforms.compiled(self._transforms.over_models(self._errors))
        errors, self._pull = self._transforms.vjp(self._every, self._theta)
        self.errors = self._models.snapshot(errors)
        if not (finite := np.isfinite(to_numpy(self.errors)).reshape((len(starts), -1)).all(1)).all():
            raise ValueError(f"the outputs of start {int(np.argmin(finite))} hold NaN or inf; look at its weights")

    def pull(self, f: Array) -> Array:
        """J* f [start, n]."""
        return self._learning * self._models.snapshot(self._pull(f)[0])

    def push(self, theta: Array) -> Array:
        """J theta."""
        return self._models.snapshot(self._transforms.jvp(self._every, (self._theta,), (theta,))[1])

    def _errors(self, theta: Array) -> Array:
        """f [trial, time, out] of one start with parameters [n]."""
        problem, (of_cell, of_readout) = self._problem, self._values[0]
        values = split(theta, [*of_cell.values(), *of_readout.values()])
        cell = dict(zip(of_cell, values, strict=False))
        readout = dict(zip(of_readout, values[len(of_cell) :], strict=True))

        def states(cell: Any) -> Array:
            return problem.backend.solving.run(self._step, cell, problem.x, self._z0)

        state = self._models.call(states, problem.cell, cell)
        read = state[..., units_read(problem.cell, self._readout, state.shape[-1])]
        y = read @ readout["weight"].T + readout.get("bias", 0)
        return self._root * (y - self._target)

    def _learnt(self) -> np.ndarray:
        """1 for each entry of the parameters that learns, 0 for those that are frozen [n]."""
        learns, values = self._models.learns, [v for part in self._values[0] for v in part.values()]
        return np.concatenate([np.full(count(v), float(learns(v))) for v in values])

    def _check_target(self, problem: DiscreteProblem, target: Any) -> None:
        expected = (*problem.x.shape[:2], self._values[0][1]["weight"].shape[0])
        if not problem.backend.data.is_own(target) or tuple(target.shape) != expected:
            got = f"{type_name(target)} {tuple(getattr(target, 'shape', ()))}"
            raise ValueError(
                f"the target is {got}, expected an array like the inputs [trial, time, out] = {[*expected]}; the loss "
                "is the squared error, so of classes give one-hot targets"
            )

    def _check(self) -> None:
        forms = [[{name: self._form(v) for name, v in values.items()} for values in both] for both in self._values]
        if not forms:
            raise ValueError("no starts given; expected pairs of a cell and a linear readout")
        for number, form in enumerate(forms):
            if form != forms[0]:
                raise ValueError(f"start {number} has the parameters {form}, expected those of start 0: {forms[0]}")

    def _form(self, value: Array) -> str:
        return f"{[*value.shape]}{'' if self._models.learns(value) else ' frozen'}"


def _pair(start: Any) -> tuple[Any, Any]:
    if not (isinstance(start, Sequence) and len(start) == 2):
        raise TypeError(f"a start is {type_name(start)}, expected a pair of a cell and a linear readout")
    return start[0], start[1]


def _lanczos(batch: _Batch) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """After each application of H = 2 J J*, from f: <v, H v> of its vectors v, and their norms before [start, k].

    As <v, H v> = 2 |J* v|^2, J itself waits until the next vector is asked for.
    """
    moved = batch.errors
    basis, diagonal, norms = [], [], []
    while True:
        norms.append(_dot(moved, moved) ** 0.5)
        basis.append(moved / _each(_positive(norms[-1])))
        gradient = batch.pull(basis[-1])
        diagonal.append(2 * _dot(gradient, gradient))
        yield np.stack([to_numpy(n) for n in diagonal], 1), np.stack([to_numpy(n) for n in norms], 1)
        moved = 2 * batch.push(gradient)
        for vector in basis:
            moved = moved - _each(_dot(vector, moved)) * vector


def _dot(a: Array, b: Array) -> Array:
    return array_namespace(a).sum((a * b).reshape((len(a), -1)), axis=1)


def _each(numbers: Array) -> Array:
    """One number for each start, beside [start, trial, time, out]."""
    return numbers[:, None, None, None]


def _positive(norm: Array) -> Array:
    xp = array_namespace(norm)
    return xp.where(norm > 0, norm, xp.ones_like(norm))


def _quadrature(diagonal: np.ndarray, norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights [start, k] of the loss over rates."""
    T = np.zeros((*diagonal.shape, diagonal.shape[1]))
    place = np.arange(diagonal.shape[1])
    T[:, place, place] = diagonal
    T[:, place[1:], place[:-1]] = norms[:, 1:]
    rates, vectors = np.linalg.eigh(T)  # of the lower triangles
    return np.maximum(rates, 0), vectors[:, 0] ** 2


def _times(rates: np.ndarray, parts: np.ndarray, part: float) -> np.ndarray:
    """tau [start] where sum_j parts_j exp(-2 rates_j tau) is this part; inf where it stays above."""
    still = np.where(rates < 1e-14 * rates.max(1, keepdims=True), parts, 0).sum(1)
    low, high = np.full(len(rates), -60.0), np.full(len(rates), 60.0)  # of log tau, in units of the largest rate
    largest = np.maximum(rates.max(1), 1e-300)
    for _ in range(80):
        middle = (low + high) / 2
        left = (parts * np.exp(-2 * rates / largest[:, None] * np.exp(middle)[:, None])).sum(1)
        low, high = np.where(left > part, middle, low), np.where(left > part, high, middle)
    return np.where(still >= part, np.inf, np.exp(high) / largest)
