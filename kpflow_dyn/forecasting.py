"""Forecasts of gradient descent from the kernel as it is now: the loss curve, and up to where it can be believed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn.arrays import Array, array_namespace, full_precision, like_numpy, to_numpy
from kpflow_dyn.decay import Decay
from kpflow_dyn.flow import Flow
from kpflow_dyn.moving import can_move, moved
from kpflow_dyn.output import Output
from kpflow_dyn.solution import Solution
from kpflow_dyn.space import Space

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRACTIONS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)  # of the loss, where the forecast is checked
PARTED = 0.1  # part of the loss by which model and forecast may differ


@dataclass(frozen=True, eq=False)
class Forecast:
    """The loss of gradient descent under a frozen kernel.

    Attributes:
        lr: the learning rate.
        steps, loss: the predicted curve, from step 0 on.
        rates: eigenvalues of the kernel as the error meets them: what decays with one shrinks by 1 - lr rate a step.
        energies: the parts of the loss at step 0 that decay with each rate.
        checked: steps at which the model was run with the parameters that the frozen kernel leads to.
        checked_loss: the loss of the model there; the forecast itself is right as long as they agree.
        applications: of the kernel to one vector.
    """

    lr: float
    steps: np.ndarray
    loss: np.ndarray
    rates: np.ndarray
    energies: np.ndarray
    checked: np.ndarray
    checked_loss: np.ndarray
    applications: int

    def at(self, steps: Any) -> np.ndarray:
        """The predicted loss after these numbers of steps."""
        return curve(self.energies, self.rates, self.lr, np.asarray(steps, float))

    def steps_to(self, fraction: float) -> float:
        """After how many steps the loss has fallen to this fraction; inf for more than 1e12."""
        return first_below(self.energies, self.rates, self.lr, fraction)

    @property
    def holds_until(self) -> float:
        """The step at which model and forecast first differ by a tenth of the loss: inf where they never do.

        The model is asked at the losses 0.95, 0.9, ..., 0.05 of the first, so that this is the last of those before it.
        """
        apart = abs(self.checked_loss - self.at(self.checked)) > PARTED * self.at(self.checked)
        if not apart.any():
            return math.inf
        return float(self.checked[apart.argmax() - 1]) if apart.argmax() else 0.0

    def plot(self, recorded: Any = None) -> Figure:
        """The forecast, the checks, and losses that were recorded, one for each step from 0 on."""
        from kpflow_dyn.figures import forecast_figure

        return forecast_figure(self, recorded)

    def __str__(self) -> str:
        rows = [f"{100 * part:3.0f} % of the loss after {self.steps_to(part):.4g} steps" for part in (0.5, 0.2, 0.1)]
        return "\n".join([*rows, f"holds for {self.holds_until:.4g} steps"])


def forecast(
    flow: Flow | Output, target: Array, loss: str = "mse", *, lr: float, steps: int, mask: Array | None = None
) -> Forecast:
    """What gradient descent does to the loss if the kernel stays as it is.

        L = <e, m e> / <1, m>,  e = y - target:    e after s steps = (1 - lr H)^s e,   H = 2 m ntk / <1, m>

    by a Krylov basis that begins with e, which gives the loss after any number of steps. The kernel does change in
    training. So the forecast also runs the model with the parameters that the frozen kernel leads to, at eleven losses
    on the way, and `holds_until` says where it stops to describe the model. Where it does early, `kp.gradient_flow`
    follows the descent itself.

    Args:
        flow: whose states are the outputs y; or `flow.output(C, learn=...)`, a readout of them. A metric's learning
            rates multiply `lr`.
        target: as y.
        loss: "mse", the mean over all entries; of an ODE in its quadrature weights.
        lr: the learning rate.
        steps: how many steps of gradient descent on all trials.
        mask: m >= 0, broadcastable to y; all ones when None.

    Raises:
        ValueError: a target or mask of another shape or not finite, an unknown loss, or a learning rate at which
            gradient descent is unstable: above 2 over the largest rate.

    Example:
        >>> import torch
        >>> import kpflow_dyn as kp
        >>> cell, x = torch.nn.RNNCell(2, 64).double(), torch.randn(4, 5, 2, dtype=torch.float64)
        >>> y = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).output(torch.nn.Linear(64, 1), learn=True)
        >>> found = kp.forecast(y, torch.ones(4, 5, 1, dtype=torch.float64), lr=0.01, steps=100)
        >>> bool(found.loss[-1] < found.loss[0])
        True

    Source: Hazelden, Driscoll, Shlizerman, Shea-Brown, arXiv 2605.08746.
    """
    if loss != "mse":
        raise ValueError(f"loss is {loss!r}, expected 'mse'")
    if not (isinstance(lr, int | float) and 0 < lr < math.inf and isinstance(steps, int) and steps > 0):
        raise ValueError(f"lr is {lr!r} and steps is {steps!r}, expected a positive number and a positive integer")
    space, y = flow.ntk.domain, outputs(flow)
    target, mask = checked_target(target, space, "target"), checked_mask(mask, space)
    grid = np.unique(np.concatenate([np.arange(min(steps, 1000) + 1), np.geomspace(1, steps, 1000).round(), [steps]]))
    with full_precision(y):
        decay = Decay(flow.ntk, (y - target)[None], mask)
        decay.settle(lambda rates, energies: _bounded(curve(energies[0], rates, lr, grid), decay.start[0]))
        _check_rate(lr, decay.rates)
        rates, energies = decay.rates, decay.energies[0]
        at = np.array([first_below(energies, rates, lr, part) for part in FRACTIONS])
        at = np.unique(np.maximum(np.floor(at[at <= steps]), 1)) if can_move(solution_of(flow)) else np.zeros(0)
        found = _of_model(flow, decay, lr, at, target, mask)
    return Forecast(lr, grid, curve(energies, rates, lr, grid), rates, energies, at, found, decay.applications)


def curve(energies: np.ndarray, rates: np.ndarray, lr: float, steps: np.ndarray) -> np.ndarray:
    """sum_j energies_j (1 - lr rates_j)^(2 s)."""
    return np.abs(1 - lr * rates) ** (2 * steps[..., None]) @ energies


def first_below(energies: np.ndarray, rates: np.ndarray, lr: float, fraction: float) -> float:
    """The step, not rounded, at which the loss is this fraction of the first; inf for more than 1e12."""
    goal, low, high = fraction * energies.sum(), 0.0, 1.0
    while curve(energies, rates, lr, np.array(high)) > goal:
        low, high = high, 2 * high
        if high > 1e12:
            return math.inf
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if curve(energies, rates, lr, np.array(middle)) > goal else (low, middle)
    return high


def outputs(flow: Flow | Output) -> Array:
    """What the kernel moves."""
    if not isinstance(flow, Flow | Output):
        raise TypeError(f"got {type(flow).__name__}, expected a Flow or flow.output(C)")
    return flow.values if isinstance(flow, Output) else flow.solution.state


def solution_of(flow: Flow | Output) -> Solution:
    """What was linearised."""
    return (flow.flow if isinstance(flow, Output) else flow).solution


def checked_target(target: Any, space: Space, what: str) -> Array:
    """A target like the outputs."""
    found = like_numpy(to_numpy(target), space.like)
    if tuple(found.shape) != space.shape or not bool(array_namespace(found).isfinite(found).all()):
        raise ValueError(
            f"the {what} has shape {tuple(found.shape)}, expected finite numbers [{', '.join(space.axes)}] = "
            f"{list(space.shape)}"
        )
    return found


def checked_mask(mask: Any, space: Space) -> Array | None:
    """A mask that broadcasts to a block of outputs."""
    if mask is None:
        return None
    values = to_numpy(mask)
    if values.ndim == len(space.shape) - 1:
        values = values[..., None]
    if values.ndim != len(space.shape) or not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        raise ValueError(
            f"the mask has shape {to_numpy(mask).shape}, expected numbers >= 0 [{', '.join(space.axes)}] or without "
            "the last axis, not all zero"
        )
    return like_numpy(np.broadcast_to(values, space.shape).copy(), space.like)[None]


def _bounded(losses: np.ndarray, start: float) -> np.ndarray:
    """Losses below a thousandth of the first need not be right relative to themselves."""
    return np.minimum(losses, 1e3 * start) + 1e-3 * start


def _check_rate(lr: float, rates: np.ndarray) -> None:
    if lr * rates.max() > 2:
        raise ValueError(
            f"gradient descent with lr = {lr:.3g} is unstable: the largest rate is {rates.max():.4g}, so lr must stay "
            f"below {2 / rates.max():.3g}"
        )


# The model along the path of the frozen kernel


def _of_model(
    flow: Flow | Output, decay: Decay, lr: float, at: np.ndarray, target: Array, mask: Array | None
) -> np.ndarray:
    """L of the model moved by -2 lr F* root sum_{r < s} (1 - lr H)^r f, with ntk = F F*."""
    if not len(at):
        return np.zeros(0)
    sums = lr * _sums_of_powers(lr * decay.rates, at[:, None])
    changes = -2 * flow.ntk.factor.T.mv(decay.root * decay.sums(sums))
    return np.array([_loss(moved(flow, change) - target, mask, flow.ntk.domain) for change in changes])


def _sums_of_powers(x: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """sum_{r < s} (1 - x)^r."""
    small = x < 1e-6  # where 1 - (1 - x)^s has lost its digits
    slow = -np.expm1(-steps * x) / np.where(x > 0, x, 1)
    return np.where(x == 0, steps, np.where(small, slow, (1 - (1 - x) ** steps) / np.where(small, 1, x)))


def _loss(error: Array, mask: Array | None, space: Space) -> float:
    ones = array_namespace(error).ones_like(error)
    weights = ones if mask is None else mask[0]
    return float(space.inner(weights * error, error)) / float(space.inner(weights, ones))
