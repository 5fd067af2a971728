"""How the parts of a loss fall, when all is trained together: under the kernel as it is, and in a training itself.

What a part is at later outputs y is said by `parabolas`: |Pi f(y)|^2 / 2, with f(y) as high as the loss at each place.
Of orthogonal parts these add up to the loss at any time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array
from kpflow_dyn._flows.flow import Output
from kpflow_dyn._learning.decay import Decay, certain
from kpflow_dyn._learning.descent import GradientFlow, along, gradient_flow
from kpflow_dyn._learning.forecasting import RTOL_FROZEN, trained_loss
from kpflow_dyn._learning.learnable import NULL
from kpflow_dyn._learning.linearised import LinearisedObjective
from kpflow_dyn._learning.losses import OutputLoss
from kpflow_dyn._learning.objective import LOSS, Objective
from kpflow_dyn._learning.parabolas import parabola
from kpflow_dyn._learning.projections import Projection, energies
from kpflow_dyn.solvers._integration import Integration
from kpflow_dyn.solvers._landscape import TINY, Piece

FIRST, LAST, GRID = 0.03, 1e9, 600  # points of curves, in times of the fastest direction
STILL = 1e-12  # part of the largest rate below which nothing moves
TENTH, SMALL = 0.1, 0.01  # what is followed of each part, and the share of one that is not waited for
STRIDE = 0.5  # of the time so far, for a step between whose ends the losses of parts are interpolated
LEFT = 0.05  # part of the loss at which a training by an optimiser is ended
LOOKS = 60  # at the outputs of such a training: each is a forward pass


@dataclass(frozen=True, eq=False)
class Course:
    """The losses of parts over their first values.

    Attributes:
        time: tau, or steps [point].
        curve: the losses there [part, point]; NaN where they are not known.
        end: what they come to at last [part]; NaN where that is not known.
    """

    time: np.ndarray
    curve: np.ndarray
    end: np.ndarray

    def time_to(self, part: float) -> np.ndarray:
        """When each loss first is this part of its first value [part]; inf where it never is, NaN where not known."""
        return np.array([self._first(curve, end, part) for curve, end in zip(self.curve, self.end, strict=True)])

    def stays_from(self, part: float) -> np.ndarray:
        """From when on each loss is no more than this part, up to the end [part]; NaN where it is not at the end."""
        above = [np.append(np.flatnonzero(curve > part), 0).max() for curve in self.curve]
        return np.array([self._crossing(curve, i, part) for curve, i in zip(self.curve, above, strict=True)])

    @property
    def shown(self) -> Course:
        """Up to some time after the last half or tenth that there is."""
        found = np.concatenate([self.time_to(0.5), self.time_to(0.1)])
        last = np.max(found, initial=0, where=np.isfinite(found)) or self.time[-1]
        kept = self.time <= 3 * last
        return Course(self.time[kept], self.curve[:, kept], self.end)

    def _first(self, curve: np.ndarray, end: float, part: float) -> float:
        below = np.flatnonzero(curve <= part)
        if not below.size:
            return np.inf if end > part else np.nan
        return np.nan if below[0] == 0 else self._crossing(curve, below[0] - 1, part)

    def _crossing(self, curve: np.ndarray, i: int, part: float) -> float:
        """Where it falls to this part, behind point i."""
        if i + 1 == len(curve) or np.isnan(curve[i]):
            return np.nan
        step = (curve[i] - part) / (curve[i] - curve[i + 1])
        return float(self.time[i] + step * (self.time[i + 1] - self.time[i]))


def of_modes(decay: Decay, parts: dict[str, Projection], shape: tuple[int, ...]) -> Course:
    """Of the squared error: |Pi f(tau)|^2, f(tau) = sum_j c_j exp(-rate_j tau) v_j, where the whole is certain."""
    (rates, _), (vectors, c) = decay.lower, decay.vectors()
    vectors = vectors.astype(np.float64).reshape((-1, *shape))
    tau, still = np.geomspace(FIRST, LAST, GRID) / rates.max(), rates < STILL * rates.max()
    along_modes = np.exp(-np.outer(tau, np.where(still, 0, rates))) * c
    coordinates = np.concatenate([[c], along_modes, [still * c]])  # now, at each tau, in the end
    flat = vectors.reshape((len(c), -1))
    grams = (project(vectors).reshape(flat.shape) @ flat.T for project in parts.values())
    losses = np.array([((coordinates @ gram) * coordinates).sum(1) for gram in grams])
    ratio = losses[:, 1:] / losses[:, :1]
    known = ~np.isnan(certain(lambda rates, energies: _curve(rates, energies[0], tau), decay.lower, decay.upper))
    return Course(tau, np.where(known, ratio[:, :-1], np.nan), ratio[:, -1])


def of_linearised(output: Output, loss: OutputLoss, parts: dict[str, Projection], fastest: float) -> Course:
    """Of any loss: the gradient flow of the whole one along y + J delta, as `forecast` takes it."""
    objective = LinearisedObjective(output.ntk, output.values, loss)
    span = 1 / (NULL * fastest)
    run = Strides(objective, objective.start, span, None, RTOL_FROZEN)
    followed = Followed(output, loss, parts)
    found = along(run, objective, TENTH * max(SMALL, followed.smallest))
    tau = np.geomspace(FIRST / fastest, found.time[-1], GRID)
    at = np.arange(len(found.time))
    curve, last = followed.curves(found, at, lambda theta: objective.outputs(objective.theta(theta)), tau)
    return Course(tau, curve, last if run.finished else last + np.nan)


def of_training(
    output: Output, loss: OutputLoss, parts: dict[str, Projection], steps: int, progress: Any, **how: Any
) -> tuple[GradientFlow, Course]:
    """Of a training by an optimiser, as `gradient_flow` does it, in its steps."""
    states = output.flow
    if states.preconditioner:
        raise ValueError("an optimizer has its own metric; linearize without one, or leave out optimizer")
    of_states, values = trained_loss(output, loss)
    found = gradient_flow(
        states.solution, of_states, steps, params=list(values), stop_below=LEFT, progress=progress, **how
    )
    objective = Objective(states.solution, of_states, list(values))

    def outputs(theta: dict[str, Array]) -> Array:
        weight, bias = (theta.get(LOSS + name, getattr(output, name)) for name in ("weight", "bias"))
        y = objective.seen(objective.theta(theta)) @ weight.T
        return y if bias is None else y + bias

    at = np.unique(np.linspace(0, len(found.time) - 1, LOOKS).round().astype(int))
    taken = np.unique(np.geomspace(1, found.time[-1], GRID).round())
    curve, last = Followed(output, loss, parts).curves(found, at, outputs, np.append(0, taken))
    return found, Course(np.append(0, taken), curve, last + np.nan)


class Strides(Integration):
    """A gradient flow of which no step is longer than a part of the time so far."""

    def advance(self) -> Piece:
        """Take a step; the span ends behind it for a moment."""
        whole, self.span = self.span, min((1 + STRIDE) * self.time or self.span, self.span)
        piece, self.span = super().advance(), whole
        return piece


class Followed:
    """The parts of a loss at other outputs than these."""

    def __init__(self, output: Output, loss: OutputLoss, parts: dict[str, Projection]) -> None:
        self._space, self._loss, self._parts = output.ntk.domain, loss, parts
        self._first = self._energies(output.values)

    @property
    def smallest(self) -> float:
        """The share of the smallest part."""
        return float((self._first / self._first[0]).min())

    def curves(
        self, found: GradientFlow, at: np.ndarray, outputs: Callable[[Any], Array], time: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Losses over the first ones at times [part, point], from the outputs at some steps; and at the last of these.

        That of the whole is known in between. The shares that parts have of it are interpolated over the logarithm of
        time, so that parts that add up to the whole do so at any time.
        """
        of_steps = [{name: values[step] for name, values in found.parameters.items()} for step in at]
        energies = np.array([self._energies(outputs(theta)) for theta in of_steps])  # [step, part]
        least = found.loss[0] - energies[0, :1]
        shares = energies / np.maximum(energies[:, :1] + least, TINY)
        shares[:, 0] = 1
        relative, places = shares / shares[0], np.log(found.time[at] + found.time[at[1]])
        between = _between(np.log(time + found.time[at[1]]), places, relative)
        return between.T * found(time) / found.loss[0], relative[-1] * found.loss[-1] / found.loss[0]

    def _energies(self, y: Array) -> np.ndarray:
        return energies(self._parts, parabola(y, self._loss, self._space).f)


def _between(at: np.ndarray, places: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Shares [point, part] from those at some places, in ways that are linear in them: splines, and straight lines
    between two places where a spline swings out of their range by more than this is wide.
    """
    from scipy.interpolate import CubicSpline, make_interp_spline

    smooth, straight = CubicSpline(places, shares)(at), make_interp_spline(places, shares, k=1)(at)
    i = np.clip(np.searchsorted(places, at, side="right") - 1, 0, len(places) - 2)
    width = np.abs(shares[i + 1] - shares[i])
    swings = ((np.abs(smooth - straight) > width) | (smooth < 0)).any(1)
    return np.where(np.isin(i, i[swings])[:, None], straight, smooth)


def _curve(rates: np.ndarray, energies: np.ndarray, tau: np.ndarray) -> np.ndarray:
    return energies @ np.exp(-2 * np.outer(rates, tau)) / energies.sum()
