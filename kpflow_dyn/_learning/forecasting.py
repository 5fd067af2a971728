"""Forecasts of gradient descent from the kernel as it is now: the loss curve, and up to where it can be believed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, full_precision, like_numpy, to_numpy
from kpflow_dyn._backend import Values, backend_for
from kpflow_dyn._flows.flow import Flow, Output, check_flow
from kpflow_dyn._learning.decay import Decay, Spectrum, certain, squares
from kpflow_dyn._learning.descent import GradientFlow, Run, along, name_of, optimizer_of
from kpflow_dyn._learning.linearised import RTOL_FROZEN, LinearisedObjective, spectrum
from kpflow_dyn._learning.losses import Loss, OutputLoss, counted, full_mask, loss_of_states, output_loss
from kpflow_dyn._learning.objective import LOSS, Objective, check_logits, check_twice
from kpflow_dyn._learning.options import at_fractions, is_count, is_number, plain
from kpflow_dyn._learning.sampling import mean_losses
from kpflow_dyn._shown import Row, ShownAsText, number
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.solvers._integration import Integration
from kpflow_dyn.solvers._landscape import Piece
from kpflow_dyn.solvers._multirate import Multirate, OwnSteps

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

PARTED = 0.1  # part of the loss by which forecast and gradient flow may differ
RTOL = 5e-2  # of the gradient flow
SETTLED, KNOWN = 1e-4, 1e-6  # parts of the first loss: far below, the curve need not be right, and is NaN if it is not
NOTICED = 0.01  # difference of the losses from which on their times are compared
HALF_A_STEP = 0.5  # by which descent at a finite rate may differ from its limit
WITHIN = 8  # points of its curve for each of its steps
MANY = 1e6  # steps that are not shown one by one
BESIDE = 8  # random vectors in the basis that mini-batches are followed in


@dataclass(frozen=True, eq=False, repr=False)
class Forecast(ShownAsText):
    """The loss over steps of gradient descent, or of an optimiser, under a frozen kernel.

    Attributes:
        lr: the learning rate; NaN for an optimiser that has its own.
        steps, loss: the predicted curve from step 0 on, each [point]; NaN where it is not known.
        rates: the eigenvalues of h^{1/2} ntk h^{1/2} [mode], of the modes that the error contains. h is the Hessian of
            the loss in y at step 0. A mode shrinks by 1 - lr rate in each step.
        energies: the part of the loss at step 0 that is in each mode [mode], to second order.
        holds_until: the first step at which real training differs from the forecast by a tenth, because the kernel
            changed. The tenth is of the loss, or of the time to it (where the losses differ by a hundredth or more).
            Training is the gradient flow, or the optimiser. inf: no such step within the `steps` that were asked for;
            nothing beyond them was compared. NaN: not asked for, or not found.
        flow_steps, flow_loss: the training up to that step, each [point].
        mean_loss: with batches, the loss on all trials at `steps` [point], as the mean over the draws; else None.
        applications: how many times the kernel was applied to one vector.
        frozen: gives the loss at any step.

    Example as `forecast`.
    """

    lr: float
    steps: np.ndarray
    loss: np.ndarray
    rates: np.ndarray
    energies: np.ndarray
    holds_until: float
    flow_steps: np.ndarray
    flow_loss: np.ndarray
    mean_loss: np.ndarray | None
    applications: int
    frozen: FrozenModes | FrozenFlow = field(repr=False)

    def at(self, steps: Any) -> np.ndarray:
        """The predicted loss after these numbers of steps, NaN where it is not known: beyond what was asked for."""
        return self.frozen.at(np.asarray(steps, float))

    def steps_to(self, fraction: Any) -> Any:
        """After how many steps the loss has fallen to this fraction.

        inf where it never does, or not in 1e12 steps; NaN where this is not known: it takes more steps than were asked
        for, and what was computed for these does not tell. (`kp.learnability` has inf for times that
        are late or never, as it has no number of steps behind which it does not look.)

        Args:
            fraction: a number, or an array of them; then the steps are an array like it.

        Raises:
            ValueError: a fraction outside of (0, 1), or a loss that is not positive at the start.
        """
        return at_fractions(self.frozen.steps_to, fraction)

    def interval_to(self, fraction: Any) -> tuple[Any, Any]:
        """Between which steps training itself has its loss at this fraction; NaN where the forecast was not checked.

        It is what the training beside has shown, give or take a tenth. That was followed up to `holds_until`, or
        through all steps that were asked for; where it is not there by then, it comes later, and the upper end is inf.

        Args as `steps_to`.

        Raises:
            ValueError: a fraction outside of (0, 1).
        """
        return at_fractions(self._interval_to, fraction)

    def _interval_to(self, fraction: float) -> tuple[float, float]:
        parted = 1 + PARTED
        if math.isnan(self.holds_until):
            return math.nan, math.nan
        reached = np.flatnonzero(self.flow_loss <= fraction * self.flow_loss[0])
        if len(reached):
            low, high = (float(step) for step in self.flow_steps[reached[0] - 1 : reached[0] + 1])
            return max(low / parted - HALF_A_STEP, 0.0), high * parted + HALF_A_STEP
        return float(self.flow_steps[-1]) / parted, math.inf

    def _shown(self) -> tuple[str, list[Row]]:
        title, rows = super()._shown()
        return f"{title}: the loss is {number(self.loss[0])} now", rows

    def to_xarray(self) -> xr.Dataset:
        """A dataset of the predicted `loss` [step], the training beside as `flow_loss` [flow_step], and `rates` and
        `energies` [mode]; with batches also `mean_loss` [step].
        """
        import xarray as xr

        data = {"loss": ("step", self.loss), "flow_loss": ("flow_step", self.flow_loss)}
        data |= {"rates": ("mode", self.rates), "energies": ("mode", self.energies)}
        data |= {} if self.mean_loss is None else {"mean_loss": ("step", self.mean_loss)}
        known = {"lr": self.lr, "holds_until": self.holds_until, "applications": self.applications}
        return xr.Dataset(data, {"step": self.steps, "flow_step": self.flow_steps}, known)

    def plot(self, recorded: Any = None, dark: bool = False) -> Figure:
        """The forecast, the gradient flow or the optimiser beside it, and losses that were recorded, one for each step
        from 0 on.
        """
        from kpflow_dyn.figures import _learning as figures

        return figures.forecast((self, recorded), dark=dark)

    def __str__(self) -> str:
        frozen = f"under the kernel as it is; {self._holds}"
        if not self.loss[0] > 0:
            return (
                f"the loss goes from {self.loss[0]:.6g} to {self.loss[-1]:.6g} in {self.steps[-1]:.0f} steps\n{frozen}"
            )
        found = {part: self.steps_to(part) for part in (0.5, 0.2, 0.1)}
        known = max([self.steps[-1], *(steps for steps in found.values() if math.isfinite(steps))])
        ends = {part: self.interval_to(part) for part in found}
        rows = [
            f"{100 * part:3.0f} % of the loss {_after(steps, known)}{_between(*ends[part])}"
            for part, steps in found.items()
        ]
        by = ", optimizer=..." if self.optimizer else ""
        later = any(math.isinf(high) for _, high in ends.values())
        ask = f"training was followed no further; ask kp.gradient_flow(...{by}) when it gets there"
        return "\n".join([*rows, frozen, *[ask] * later])

    @property
    def optimizer(self) -> str:
        """The name of the optimiser that trains; "" for gradient descent."""
        return self.frozen.flow.optimizer if isinstance(self.frozen, FrozenFlow) else ""

    @property
    def _holds(self) -> str:
        if math.isnan(self.holds_until):
            return "not compared with training"
        if math.isinf(self.holds_until):
            return f"holds for all the {self.steps[-1]:.0f} steps that were followed"
        if self.holds_until < 1:
            return "does not hold: training differs by a tenth within the first step"
        return f"holds for {_in_steps(math.floor(self.holds_until))}, then training differs by a tenth"


def _after(steps: float, known: float) -> str:
    """In words; where it is not known, it is after all that is `known`."""
    if math.isinf(steps):
        return "never"
    return f"after more than {_in_steps(known)}" if math.isnan(steps) else f"after {_in_steps(steps)}"


def _between(low: float, high: float) -> str:
    if math.isnan(low) or (low < 1 and math.isinf(high)):  # nothing is known of it
        return ""
    first = _whole(math.floor(low))
    found = f"later than {first}" if math.isinf(high) else f"{first} to {_whole(math.ceil(high))}"
    return f" (training: {found})"


def _in_steps(steps: float) -> str:
    return "1 step" if round(steps) == 1 else f"{_whole(steps)} steps"


def _whole(steps: float) -> str:
    """Steps are whole."""
    return f"{steps:.0f}" if steps < MANY else f"{steps:.4g}"


@dataclass(frozen=True, eq=False)
class FrozenModes:
    """Of a quadratic loss: sum_j energies_j (1 - lr rates_j)^(2 s), from below and from above."""

    lr: float
    lower: Spectrum
    upper: Spectrum

    def at(self, steps: np.ndarray) -> np.ndarray:
        """The loss where it is certain."""
        floor = KNOWN * self.lower[1].sum()
        of = lambda rates, energies: curve(energies, rates, self.lr, steps) + floor  # noqa: E731
        return certain(of, self.lower, self.upper) - floor

    def along(self, tau: float) -> float:
        """The loss of the gradient flow, in the limit of small steps."""
        return float(np.exp(-2 * tau * self.lower[0]) @ self.lower[1])

    def when(self, fraction: float) -> float:
        """tau at which `along` is this fraction of the first; inf where that takes more than 1e12 steps."""
        tiny = 1e-6 / max(float(self.lower[0].max()), 1e-300)
        return tiny * first_below(self.lower[1], self.lower[0], tiny, fraction)

    def steps_to(self, fraction: float) -> float:
        """The step."""
        of = lambda rates, energies: np.array(first_below(energies, rates, self.lr, fraction))  # noqa: E731
        return float(certain(of, self.lower, self.upper))


@dataclass(frozen=True, eq=False)
class FrozenFlow:
    """Of another loss or an optimiser: training of the linearised model, a step of which takes a time lr."""

    lr: float
    flow: GradientFlow

    def at(self, steps: np.ndarray) -> np.ndarray:
        """The loss."""
        tau, end = self.lr * steps, self.flow.time[-1]
        return np.where(tau <= end * (1 + 1e-12), self.flow(np.minimum(tau, end)), math.nan)

    def along(self, tau: float) -> float:
        """The loss of the training."""
        return float(self.flow(min(tau, self.flow.time[-1])))

    def when(self, fraction: float) -> float:
        """The time at which it is this fraction of the first; inf where it is not."""
        time = self.flow.time_to(fraction)
        return math.inf if math.isnan(time) else time

    def steps_to(self, fraction: float) -> float:
        """The step."""
        return self.flow.time_to(fraction) / self.lr


def forecast(
    flow: Flow | Output,
    target: Any = None,
    *,
    lr: float | None = None,
    steps: int,
    loss: Loss = "squared_error",
    mask: Any = None,
    batch: int | None = None,
    check: bool = True,
    optimizer: Any = None,
    clip: float | None = None,
) -> Forecast:
    """Predict the loss under gradient descent, or under an optimiser, if the kernel stays as it is now.

        L = <e, m e> / <1, m>,  e = y - target:    e after s steps = (1 - lr H)^s e,   H = 2 m ntk / <1, m>

    A Krylov basis that begins with e gives the loss after any number of steps. For any other loss the forecast is the
    gradient flow of the linearised model, d delta / d tau = -grad L(y + J delta), that is descent in small steps. Its
    Hessian is the generalised Gauss-Newton matrix J* h J. In real training the kernel changes. `holds_until` says for
    how many steps the forecast agrees with the gradient flow of the parameters, which is computed up to there. If that
    is only a few steps, use `kp.gradient_flow`.

    Args:
        flow: a flow whose states are the outputs y; or a readout of them, `flow.output(C, learn=...)`. The learning
            rates of a metric multiply `lr`.
        target: in the shape of y, such as [trial, time, out]. For the cross-entropy: class indices [trial, time] or
            probabilities, as in `cross_entropy`. None for a function of y alone.
        lr: the learning rate.
        steps: how many steps of gradient descent on all trials.
        loss: "squared_error", "cross_entropy", or a function (y, target) -> number of shape (), twice differentiable.
            With the two names, times of an ODE count by their quadrature weights.
        mask: m >= 0, broadcastable to the shape of y, or [trial, time]; all ones when None. None with a function.
        batch: how many trials a step sees, drawn anew for each step without repetition; all when None. With batches
            `mean_loss` is the loss of such steps, as the mean over the draws; for the squared error only.
        check: whether to follow the real training too. It is left out with a metric, and for states on a span of an
            ODE. It is left out with a warning if the model cannot be called with other parameters.
        optimizer, clip: as in `gradient_flow`. The optimiser then trains the linearised model; `lr` may be its own.

    Raises:
        ValueError: a target or mask that does not fit; a batch with another loss or an optimiser; or a learning rate at
            which descent under the frozen kernel is unstable, above 2 over the largest rate. Below this limit real
            descent may still be unstable: the frozen kernel does not know the Hessian of the model, which may be
            larger.
    Source: Hazelden, Driscoll, Shlizerman, Shea-Brown, arXiv 2605.08746.

    >>> import torch, kpflow_dyn as kp
    >>> cell, x = torch.nn.RNNCell(2, 64).double(), torch.randn(4, 5, 2, dtype=torch.float64)
    >>> y = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).output(torch.nn.Linear(64, 1), learn=True)
    >>> found = kp.forecast(y, torch.ones(4, 5, 1, dtype=torch.float64), lr=0.01, steps=100)
    >>> bool(found.loss[-1] < found.loss[0])
    True
    """
    lr, clip = plain(lr), plain(clip)
    _check(lr, steps, optimizer, clip)
    of_outputs, space = loss_of(flow, target, mask, loss), flow.ntk.domain
    _check_batch(batch, space, of_outputs, optimizer)
    grid = np.unique(np.concatenate([np.arange(min(steps, 1000) + 1), np.geomspace(1, steps, 1000).round(), [steps]]))
    road = _frozen_steps if optimizer is not None else _frozen_modes if of_outputs.quadratic else _frozen_flow
    with full_precision(outputs(flow)):
        own = _own_training(flow, of_outputs) if check or optimizer is not None else None
        unreached = own[0].unreached if own is not None and optimizer is not None else ()
        training = Training(optimizer, lr, clip, unreached)
        frozen, (rates, energies), applications, mean = road(flow, of_outputs, training, grid, batch)
        path, parted = np.zeros((2, 0)), math.nan
        if check and own is not None and frozen.at(np.zeros(())) > 0:
            path, parted = _flow_beside(training.run(*own, steps), frozen)
    parted, path[0] = parted / training.step, path[0] / training.step
    known, lr = frozen.at(grid), math.nan if lr is None else lr
    return Forecast(lr, grid, known, rates, energies, parted, path[0], path[1], mean, applications, frozen)


@dataclass(frozen=True)
class Training:
    """How to train: by the gradient flow, or by an optimiser in its steps."""

    optimizer: Any
    lr: float | None
    clip: float | None
    unreached: Sequence[str] = ()  # parameters that the loss does not hang on

    @property
    def step(self) -> float:
        """The time of a step of training, in what a run counts."""
        return 1.0 if self.optimizer is not None else float(self.lr or math.nan)

    def run(self, objective: Objective | LinearisedObjective, values: Values, steps: float) -> Run:
        """A run of so many steps from these parameters."""
        theta = objective.theta(values)
        if self.optimizer is None:
            return Integration(objective, theta, self.step * steps, None, RTOL)
        backend = backend_for(theta, "theta", "[n]")
        make = optimizer_of(backend, self.optimizer, self.lr, self.clip)
        rule = backend.training.Rule(make, self.lr, self.clip, values, self.unreached)
        return OwnSteps(objective, theta, steps, rule, Multirate(), RTOL)


def _frozen_modes(
    flow: Flow | Output, loss: OutputLoss, training: Training, grid: np.ndarray, batch: int | None
) -> tuple[FrozenModes, Spectrum, int, np.ndarray | None]:
    """The curve of a quadratic loss, rates and energies, applications, and the mean over batches."""
    lr = training.step
    measure = flow.ntk.domain.measure
    mask = loss.mask if measure is None else loss.mask / measure
    decay = squares(flow.ntk, (outputs(flow) - loss.target)[None], mask)
    some = grid[:: max(1, len(grid) // 100)]

    def losses(rates: np.ndarray, energies: np.ndarray) -> np.ndarray:
        check_rate(lr, rates)
        return curve(energies[0], rates, lr, some) + SETTLED * decay.start

    decay.settle(losses, beside=1 if batch is None else BESIDE)
    (rates, energies), (others, bound) = decay.lower, decay.upper
    mean = None if batch is None else _of_batches(decay, lr, batch, grid)
    frozen = FrozenModes(lr, (rates, energies[0]), (others, bound[0]))
    return frozen, frozen.lower, decay.applications, mean


def _frozen_flow(
    flow: Flow | Output, loss: OutputLoss, training: Training, grid: np.ndarray, _batch: int | None
) -> tuple[FrozenFlow, Spectrum, int, None]:
    """The same of any other loss."""
    objective, lr = LinearisedObjective(flow.ntk, outputs(flow), loss), training.step
    run = Integration(objective, objective.start, lr * float(grid[-1]), None, RTOL_FROZEN)
    rates, energies, applications = spectrum(run.point)
    check_rate(lr, rates)
    found = along(run, objective, None)
    return FrozenFlow(lr, found), (rates, energies), applications + found.applications + int(found.gradients), None


def _frozen_steps(
    flow: Flow | Output, loss: OutputLoss, training: Training, grid: np.ndarray, _batch: int | None
) -> tuple[FrozenFlow, Spectrum, int, None]:
    """The same of an optimiser, in its steps."""
    values, order = _as_moved(flow)
    objective = LinearisedObjective(flow.ntk, outputs(flow), loss, values, order)
    run = training.run(objective, values, float(grid[-1]))
    rates, energies, applications = spectrum(run.point)
    found = along(run, objective, None, 1.0, name_of(training.optimizer))
    return FrozenFlow(1.0, found), (rates, energies), applications + int(found.gradients), None


def _as_moved(flow: Flow | Output) -> tuple[Values, np.ndarray]:
    """All parameters that learn, and the order of their entries in which the kernel's factor takes changes."""
    inner, readout = states_of(flow), flow if isinstance(flow, Output) and flow.rate else None
    if inner.preconditioner or (readout is not None and readout.rate != 1):
        raise ValueError("an optimizer has its own metric; linearize without one, and let the readout learn by True")
    values, order = dict(inner.parameters), np.arange(inner.J.domain.size)
    if readout is not None:  # whose changes are [unit, out], and then those of its bias
        values |= {f"readout.{name}": getattr(readout, name) for name in readout.learnt}
        places = np.arange(len(order), readout.J.domain.size)
        size = readout.parts.get("readout.weight", 0)
        turned = places[:size].reshape((len(readout.weight), -1)).T
        order = np.concatenate([order, turned.reshape(-1), places[size:]])
    return values, order


def _of_batches(decay: Decay, lr: float, batch: int, grid: np.ndarray) -> np.ndarray:
    vectors, start = decay.vectors()
    vectors = vectors.reshape((*vectors.shape[:2], -1))
    return mean_losses(vectors, decay.lower[0], start, lr, batch, int(grid[-1]))[grid.astype(int)]


def _check(lr: Any, steps: Any, optimizer: Any, clip: Any) -> None:
    if clip is not None and optimizer is None:
        raise ValueError("clip is for an optimizer; say which, or leave it out")
    known = optimizer is not None if lr is None else is_number(lr) and 0 < lr < math.inf
    if not (known and is_count(steps)):
        raise ValueError(f"lr is {lr!r} and steps is {steps!r}, expected a positive number and a positive integer")


def _check_batch(batch: int | None, space: Space, loss: OutputLoss, optimizer: Any) -> None:
    if batch is None:
        return
    if optimizer is not None:
        raise ValueError("the mean over batches is that of plain descent; with an optimizer take kp.gradient_flow")
    if not loss.quadratic:
        raise ValueError("the mean over batches is known for the squared error alone; leave batch out for other losses")
    if space.axes[0] != "trial" or not is_count(batch, space.shape[0]):
        raise ValueError(f"batch is {batch!r}, expected a number of trials from 1 to {space.shape[0]} of {space}")


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
    check_flow(flow)
    return flow.values if isinstance(flow, Output) else flow.solution.state


def states_of(flow: Flow | Output) -> Flow:
    """The flow of the states."""
    return flow.flow if isinstance(flow, Output) else flow


def loss_of(flow: Flow | Output, target: Any, mask: Any, loss: Loss) -> OutputLoss:
    """The loss of a flow's outputs where they count, times of an ODE by their weights; a user's function sees all."""
    y, space = outputs(flow), flow.ntk.domain
    if loss == "cross_entropy" and isinstance(flow, Flow):
        check_logits(flow.solution)
    if loss == "squared_error" and target is not None:
        target = checked_target(target, checked_mask(mask, space), space, "target")
    if callable(loss) or (space.measure is None and space.mask is None):
        return output_loss(loss, target, mask, y)
    ones = array_namespace(y).ones_like(y)
    weights = to_numpy(space.counted(ones if space.measure is None else space.measure * ones))
    weights = weights if loss == "squared_error" else weights[..., :1]
    return output_loss(loss, target, full_mask(mask, weights.shape) * weights, y)


def checked_target(target: Any, mask: Array | None, space: Space, what: str) -> Array:
    """A target like the outputs, with zeros where the mask of `checked_mask` is zero."""
    found = like_numpy(to_numpy(target), space.like)
    fits = tuple(found.shape) == space.shape
    if fits and mask is not None:
        found = counted(found, mask[0])
    if not fits or not bool(array_namespace(found).isfinite(found).all()):
        raise ValueError(
            f"the {what} has shape {tuple(found.shape)}, expected finite numbers [{', '.join(space.axes)}] = "
            f"{list(space.shape)}; class indices are for the loss cross_entropy"
        )
    return found


def checked_mask(mask: Any, space: Space) -> Array | None:
    """A mask that broadcasts to a block of outputs, without what their space leaves out."""
    if mask is None and space.mask is None:
        return None
    weights = full_mask(mask, space.shape) * (1.0 if space.mask is None else to_numpy(space.mask))
    return like_numpy(full_mask(weights, space.shape).copy(), space.like)[None]


def check_rate(lr: float, rates: np.ndarray) -> None:
    """Raise for a learning rate at which gradient descent under the frozen kernel is unstable."""
    if lr * rates.max(initial=0.0) > 2:
        raise ValueError(
            f"gradient descent with lr = {lr:.3g} is unstable: the largest rate is {rates.max():.4g}, so lr must stay "
            f"below {2 / rates.max():.3g}, the limit of the frozen kernel; that of the model itself may be lower"
        )


# The gradient flow beside it


def _flow_beside(run: Run, frozen: FrozenModes | FrozenFlow) -> tuple[np.ndarray, float]:
    """Times and losses of the training [2, step] while it stays with the frozen one, and when it parts."""
    rows, parted, first = [(run.time, run.point.loss)], math.inf, run.point.loss
    while not run.finished and math.isinf(parted):
        if run.exhausted:
            return np.array(rows).T, math.nan
        before, piece = run.time, run.advance()
        within = np.linspace(before, run.time, WITHIN + 1)[1:-1]
        rows += [*((tau, piece(tau - before)) for tau in within), (run.time, run.point.loss)]

        def apart(tau: float, piece: Piece = piece, before: float = before) -> float:
            return _apart(frozen, tau, piece(tau - before), first)

        parted = _parting(apart, before, run.time)
    return np.array(rows).T, parted


def _apart(frozen: FrozenModes | FrozenFlow, tau: float, loss: float, first: float) -> float:
    """By how much more than a tenth the frozen loss is another than this one, or has it at another time."""
    in_loss = abs(loss / frozen.along(tau) - 1)
    comparable = in_loss > NOTICED and KNOWN < loss / first < 1
    return max(in_loss, abs(frozen.when(loss / first) / tau - 1) if comparable else 0.0) - PARTED


def _parting(apart: Callable[[float], float], before: float, after: float) -> float:
    """Where in a step this becomes positive; inf where it does not by its end."""
    from scipy.optimize import brentq

    if apart(after) < 0:
        return math.inf
    crossing: Any = before if apart(before) >= 0 else brentq(apart, before, after, xtol=1e-6 * after)
    return float(crossing)


def objective_of(flow: Flow | Output, loss: OutputLoss) -> tuple[Objective, Values]:
    """The loss of the model itself, and the parameters that learn as they were linearised."""
    of_states, values = trained_loss(flow, loss)
    return Objective(states_of(flow).solution, of_states, list(values)), values


def trained_loss(flow: Flow | Output, loss: OutputLoss) -> tuple[Any, Values]:
    """The loss of the states, and the parameters that learn as they were linearised."""
    inner = states_of(flow)
    learnt = flow.learnt if isinstance(flow, Output) else ()
    of_states = loss_of_states(loss, inner.solution.problem.backend, flow, learnt)
    own = {LOSS + name: getattr(of_states, name) for name in learnt}
    return of_states, {**inner.parameters, **own}


def _own_training(flow: Flow | Output, loss: OutputLoss) -> tuple[Objective, Values] | None:
    """What the model itself trains; None where there is no gradient flow of the same metric, the plain one."""
    inner = states_of(flow)
    if inner.preconditioner or (isinstance(flow, Output) and flow.rate not in (0, 1)):
        return None
    try:
        check_twice(inner.solution)
    except (TypeError, ValueError):
        return None
    try:
        return objective_of(flow, loss)
    except ValueError as error:
        warnings.warn(f"the forecast is not compared with training itself: {error}", stacklevel=3)
        return None
