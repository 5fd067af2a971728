"""Gradient descent in the limit of small steps: the loss and the parameters along the gradient flow."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kpflow_dyn._arrays import Array, full_precision, like_numpy, to_numpy
from kpflow_dyn._backend import Backend
from kpflow_dyn._learning.linearised import LinearisedObjective
from kpflow_dyn._learning.objective import Objective
from kpflow_dyn._learning.options import at_fractions, check_seed, is_count, is_number, plain
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.problems import Problem
from kpflow_dyn._problems.signatures import positional
from kpflow_dyn._problems.solutions import Solution
from kpflow_dyn._progress import Progress, stages
from kpflow_dyn._shown import Row, ShownAsText, number
from kpflow_dyn._solve import solve
from kpflow_dyn.solvers._chebyshev import RungeKuttaChebyshev
from kpflow_dyn.solvers._integration import Algorithm, Integration
from kpflow_dyn.solvers._landscape import Costs, Piece, Point
from kpflow_dyn.solvers._multirate import DrawnSteps, Multirate, OwnSteps
from kpflow_dyn.solvers._rosenbrock import ExponentialRosenbrock

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

FLOWS = (ExponentialRosenbrock, RungeKuttaChebyshev)
TRAINED = 0.9  # part of the steps taken one by one from which on an answer is a training
FINEST = 500  # points within a step of an optimiser's run at which its loss is looked at
RISE = 0.05  # part by which the loss of an optimiser's run rises where runs part that differ in the last digit
FINITE = 0.04  # part of a time by which descent at a small but finite rate may differ from the flow


@dataclass(frozen=True, eq=False, repr=False)
class GradientFlow(ShownAsText):
    """The gradient flow d theta / d tau = -grad L(theta), at the steps that the solver took; step 0 is the start.

    A step of gradient descent with learning rate eta is a time eta, so tau = eta times the number of steps. For an
    optimiser, times count its own steps.

    Attributes:
        time: tau [step], or steps of the optimiser.
        loss: L [step].
        gradient_norm: |grad L| [step].
        error: the estimated relative error of the loss [step]: |dL/dtau| / L times the error in time so far, as for a
            solution of one order less. It does not contain errors that the flow itself amplifies.
        parameters: by name, [step, ...] in their own shapes; names of the loss's parameters begin with "loss.".
        late: the estimated error in time [step].
        linearisations: at how many points a Hessian was used; 0 if all steps were explicit.
        gradients: how many gradients, without those for differences.
        applications: how many products of a Hessian with a vector.
        differences: how many of these products were differences of two gradients.
        cost: the total cost, in gradients on all trials.
        own: how many of the optimiser's steps were taken one by one, as training does.
        optimizer: the optimiser that trains; "" for the gradient flow.
        reached: whether the flow came to the end of the span, or below the loss at which it should stop.
        pieces: the loss between the steps.

    Example as `gradient_flow`.
    """

    time: np.ndarray
    loss: np.ndarray
    gradient_norm: np.ndarray
    error: np.ndarray
    late: np.ndarray
    parameters: dict[str, Array] = field(repr=False)
    linearisations: int
    gradients: float
    applications: int
    differences: int
    cost: float
    reached: bool
    pieces: list[Piece] = field(repr=False)
    own: int = 0
    optimizer: str = ""

    def __call__(self, tau: Any) -> np.ndarray:
        """The loss at times [n], or at one time.

        Between steps it is that of the quadratic model about the earlier one, plus a cubic that meets loss and slope at
        the later one.

        Raises:
            ValueError: outside of the times that were reached.
        """
        times = np.asarray(tau, np.float64)
        if not ((times >= 0) & (times <= self.time[-1])).all():
            raise ValueError(f"tau = {tau} lies outside of the times [0, {self.time[-1]:.6g}] that were reached")
        found = [self._loss_at(float(t)) for t in times.reshape(-1)]
        return np.array(found).reshape(times.shape)

    def time_to(self, fraction: Any) -> Any:
        """The first time at which the loss is this part of what it was at the start; NaN where it never is.

        Args:
            fraction: a number, or an array of them; then the times are an array like it.

        Raises:
            ValueError: a fraction outside of (0, 1), or a loss that is not positive at the start.
        """
        return at_fractions(self._time_to, fraction)

    def _time_to(self, fraction: float) -> float:
        if self.loss[0] <= 0:
            raise ValueError(f"the loss is {self.loss[0]:.6g} at the start; it has fractions where it is positive")
        from scipy.optimize import root_scalar

        wanted = fraction * self.loss[0]
        ends = next(self._brackets(wanted), None)
        if ends is None:
            return math.nan
        return float(root_scalar(lambda tau: self._loss_at(tau) - wanted, bracket=ends, xtol=1e-12 * ends[1]).root)

    def interval_to(self, fraction: Any) -> tuple[Any, Any]:
        """Between which times the loss falls to this part: `time_to` give or take `late` and 4 %, or NaN.

        The 4 % are for what gradient descent at a small but finite rate differs from its limit, as long as the rate
        stays below 2 over the largest curvature of the loss: a larger one is unstable and takes another way. Of an
        optimiser's own steps, all taken one by one, it is half a step, as there is no loss in between. If at most nine
        tenths were, and the loss rose by more than 5 % on the way, the time since then is added: from there on runs
        part that differ in the last digit.

        Args and Raises as `time_to`.
        """
        return at_fractions(self._interval_to, fraction)

    def _interval_to(self, fraction: float) -> tuple[float, float]:
        time = self._time_to(fraction)
        late = float(np.interp(time, self.time, self.late))
        late += FINITE * time if late or not self.optimizer else 0.5
        late += max(time - _rise(self), 0.0)
        return max(time - late, 0.0), time + late

    def __str__(self) -> str:
        if self.loss[0] <= 0:
            return f"the loss goes from {self.loss[0]:.6g} to {self.loss[-1]:.6g}\n{self.road}"
        return "\n".join([*(_part(self, fraction) for fraction in (0.5, 0.2, 0.1)), *_cautions(self), self.road])

    def _shown(self) -> tuple[str, list[Row]]:
        title, rows = super()._shown()
        return f"{title}: the loss goes from {number(self.loss[0])} to {number(self.loss[-1])}", rows

    def to_xarray(self) -> xr.Dataset:
        """A dataset of `loss`, `gradient_norm`, `error` and `late` [time]; without the parameters."""
        import xarray as xr

        data = {name: ("time", getattr(self, name)) for name in ("loss", "gradient_norm", "error", "late")}
        known = {"optimizer": self.optimizer, "reached": int(self.reached), "cost": self.cost}
        return xr.Dataset(data, {"time": self.time}, known)

    def plot(self, dark: bool = False) -> Figure:
        """The loss and the norm of the gradient over time, a dot at each step."""
        from kpflow_dyn.figures import _learning as figures

        return figures.gradient_flow(self, dark=dark)

    @property
    def road(self) -> str:
        """How this was got, and for how many gradients."""
        if not self.optimizer:
            return f"by the gradient flow, at the cost of {self.cost:.4g} gradients on all trials"
        own = self.own / self.time[-1]
        words = f"{'all' if own == 1 else f'{own:.0%}'} of these steps were taken one by one"
        if own > TRAINED:
            words += ": this is a training, no forecast"
            words += "" if own == 1 else "; the intervals are the errors of the other steps"
        price = f"at the cost of {self.cost:.4g} gradients on all trials"
        return f"by {self.time[-1]:.0f} steps of {self.optimizer}, {price}; {words}"

    def _brackets(self, wanted: float) -> Iterator[np.ndarray]:
        """Times between which the loss falls to this, the first ones first; an optimiser's may rise in between."""
        for step, (before, after) in enumerate(itertools.pairwise(self.time)):
            points = 1 + min(max(1, int(after - before)), FINEST) if self.optimizer else 2
            times = np.linspace(before, after, points)
            losses = np.array([self.loss[step], *map(self._loss_at, times[1:-1]), self.loss[step + 1]])
            if (below := np.flatnonzero(losses <= wanted)).size:
                yield times[below[0] - 1 : below[0] + 1]

    def _loss_at(self, tau: float) -> float:
        step = min(int(np.searchsorted(self.time, tau, side="right")) - 1, len(self.pieces) - 1)
        return self.pieces[step](tau - self.time[step])


def _rise(flow: GradientFlow) -> float:
    """The first step of an optimiser at which the loss is well above before; inf if never, and for a training."""
    if not flow.optimizer or flow.own > TRAINED * flow.time[-1]:
        return math.inf
    losses = flow(np.arange(flow.time[-1] + 1))
    lowest = np.minimum.accumulate(losses)
    risen = np.flatnonzero(losses - lowest > RISE * abs(lowest))
    return float(risen[0]) if risen.size else math.inf


def _part(flow: GradientFlow, fraction: float) -> str:
    """When the loss falls to this part, in words."""
    time, (low, high) = flow.time_to(fraction), flow.interval_to(fraction)
    part, unit = f"{100 * fraction:3.0f} % of the loss", "steps" if flow.optimizer else "tau"
    if math.isnan(time):
        return f"{part} not within {flow.time[-1]:.4g} {unit}"
    return f"{part} after {time:.4g} ({low:.4g} to {high:.4g}) {unit}"


def _cautions(flow: GradientFlow) -> list[str]:
    """What is not in the intervals."""
    if not flow.optimizer:
        return ["for small learning rates: one above 2 / the curvature of the loss is unstable, and takes another way"]
    if math.isfinite(rise := _rise(flow)):
        return [f"the loss rises by more than {RISE:.0%} at step {rise:.0f}: later times are rough"]
    return []


def gradient_flow(
    problem: Problem | Solution,
    loss: Callable[[Array], Array],
    span: float,
    *,
    params: Choice = None,
    alg: Algorithm | Multirate | None = None,
    rtol: float = 0.05,
    stop_below: float | None = None,
    optimizer: Any = None,
    lr: float | None = None,
    clip: float | None = None,
    batch: int | None = None,
    seed: int = 0,
    progress: bool | Progress = False,
) -> GradientFlow:
    """Follow gradient descent with very small steps, by fewer and longer steps; or train by an optimiser's own steps.

        d theta / d tau = -grad L(S(theta)),        theta(0) as in the model

    Explicit descent is stable only for learning rates below 2 / l_1, where l_1 is the largest eigenvalue of the
    Hessian. So a slow direction of eigenvalue l_k takes about l_1 / l_k steps. Here a step is as long as its error
    allows. There are two kinds of steps. One uses several gradients, and is stable far beyond 2 / l_1. The other solves
    the flow of the quadratic model exactly, by functions of the Hessian. The kind that comes further per gradient is
    used. The parameters are copied.

    If the curvature grows beyond 2 / your learning rate, your descent leaves the flow. It may then take fewer gradients
    than this function.

    Args:
        problem: a DiscreteProblem, a StaticProblem or an ODEProblem; an ODEProblem on a span is taken at the nodes of
            its solution. Or its Solution: every later solve then uses its solver and tolerances. An ODE is
            differentiated on the steps that its solver took, and solved again after each step of the flow.
        loss: a function from the states [trial, time, unit] to a number of shape (). If it has parameters, such as
            those of a readout, they learn too. Then it is an nn.Module, or in JAX a callable pytree, whose jax arrays
            are parameters and whose numpy arrays are constants.
        span: how long to flow, in tau = learning rate times steps; with an optimiser the number of its steps.
        params: which parameters learn: names, or a function of the name, as in `linearize`; all when None.
        alg: `RungeKuttaChebyshev(...)` or `ExponentialRosenbrock(...)`; None takes the cheaper of both at any time.
        rtol: the relative error of a step: in time relative to its length, in the parameters relative to its distance.
        stop_below: end as soon as the loss is below this part of its value at the start. With an optimiser, end if the
            loss was below it at one of the optimiser's steps.
        optimizer: an optimiser to train by instead of the gradient flow. This costs at most 1.1 times as many gradients
            as its steps, and two more. Give "adam", "adamw", "rmsprop" or "sgd". Or give a maker of another one: in
            torch a class called as optimizer(parameters, lr=lr), in JAX a function of optax called as optimizer(lr). Or
            give an optimiser of all parameters that learn; it is copied and goes on from its state. See
            `solvers.Multirate`.
        lr: the learning rate of the optimiser; None if it has its own.
        clip: if the gradient's norm over all parameters is larger than this, the gradient is scaled down to it.
        batch: how many trials a step sees, drawn anew for each step without repetition; all when None. With batches
            each step is one of the optimiser's own, and the recorded loss is that on all trials. Your own loss is
            called as loss(states of these trials, their numbers). A draw of trials without a target that counts is an
            error: its mean is 0 / 0.
        seed: for the draws of trials.
        progress: show on a terminal a bar, and the most that this will cost, if known. Or a function, called with these
            words, the time so far and the span.

    Raises:
        TypeError, ValueError: the problem cannot be differentiated twice, the loss is not a finite number, or an option
            is out of range.
        RuntimeError: no step is short enough, because the loss is NaN or jumps, or because events of a hybrid model
            come or go. Kinks are crossed. Also if training by an optimiser leaves the finite numbers.

    Warns:
        UserWarning: alg's limit of steps was reached. The flow up to there is returned, with `reached` False.

    Source as `solvers.RungeKuttaChebyshev` and `solvers.ExponentialRosenbrock`.

    >>> import torch, kpflow_dyn as kp
    >>> net, x = torch.nn.Linear(2, 1, bias=False).double(), torch.tensor([[1.0, 0.0], [0.0, 30.0]]).double()
    >>> flow = kp.gradient_flow(kp.StaticProblem(net, x), lambda y: ((y - 1) ** 2).sum() / 2, span=14.0)
    >>> flow.reached, flow.cost < 400  # where descent takes 6300 steps, as the curvatures are 1 and 900
    (True, True)
    >>> flow.parameters["weight"][-1]
    tensor([[1.0000, 0.0333]], dtype=torch.float64)
    """
    _check(span, alg, rtol, stop_below, FLOWS if optimizer is None else (Multirate,))
    check_seed(seed)
    lr, clip = plain(lr), plain(clip)
    _check_loss(loss, 1 if batch is None else 2)
    solution = problem if isinstance(problem, Solution) else solve(problem)
    with full_precision(solution.state):
        objective = Objective(solution, loss, params)
        if optimizer is None:
            _check_no_optimizer(lr=lr, clip=clip, batch=batch)
            flow: Any = Integration(objective, objective.start, float(span), alg, rtol)  # type: ignore[arg-type]
            return along(flow, objective, stop_below, progress=progress)
        span = _whole(span)
        make = optimizer_of(solution.problem.backend, optimizer, lr, clip)
        rule = objective.rule(make, lr, clip)
        if batch is not None:
            _check_batch(batch, len(solution.state))
            draws = _batches(objective, len(solution.state), batch, seed)
            run: Run = DrawnSteps(objective.loss, draws, batch / len(solution.state), objective.start, span, rule)
        elif rule.rate is None:
            own: Any = alg or Multirate()
            run = OwnSteps(objective, objective.start, span, rule, own, rtol, stop_below)
        else:
            run = Integration(objective, objective.start, rule.rate * span, None, rtol, rule.rate)
        step = rule.rate if rule.rate is not None and batch is None else 1.0
        return along(run, objective, stop_below, step, name_of(optimizer), progress)


class Run(Protocol):
    """What an integrator offers; see `Integration`."""

    @property
    def point(self) -> Point: ...
    @property
    def time(self) -> float: ...
    @property
    def span(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def costs(self) -> Costs: ...
    @property
    def finished(self) -> bool: ...
    @property
    def exhausted(self) -> bool: ...
    @property
    def slope(self) -> float: ...
    @property
    def error(self) -> float: ...
    @property
    def late(self) -> float: ...
    @property
    def own(self) -> int: ...
    def advance(self) -> Piece: ...


def optimizer_of(backend: Backend, optimizer: Any, lr: float | None, clip: float | None) -> Any:
    """The optimiser, or what makes it."""
    known = backend.training.OPTIMIZERS
    if isinstance(optimizer, str) and optimizer not in known:
        raise ValueError(f"optimizer is {optimizer!r}, expected one of {', '.join(known)}, or what makes one")
    if lr is None and isinstance(optimizer, str):
        raise ValueError(f"the optimizer {optimizer} needs lr=, its learning rate")
    if not (isinstance(optimizer, str) or callable(optimizer)) and lr is not None:
        raise ValueError(f"an optimizer itself ({type(optimizer).__name__}) has its own learning rate; leave out lr")
    for name, value in {"lr": lr, "clip": clip}.items():
        if value is not None and not (is_number(value) and 0 < value < math.inf):
            raise ValueError(f"{name} is {value!r}, expected a positive number")
    return known[optimizer] if isinstance(optimizer, str) else optimizer


def along(
    run: Run,
    objective: Objective | LinearisedObjective,
    stop_below: float | None,
    step: float = 1.0,
    optimizer: str = "",
    progress: bool | Progress = False,
) -> GradientFlow:
    """Step after step until the end, or until there were too many; a `step` of the optimiser is a time of the run."""
    lowest = -math.inf if stop_below is None else stop_below * run.point.loss
    rows, thetas, pieces = [_row(run)], [run.point.theta], []
    with stages(progress) as show:
        show(what := _beforehand(run, optimizer), 0, run.span)
        while not (reached := run.finished or run.point.loss < lowest) and not run.exhausted:
            pieces.append(_advanced(run, objective))
            rows.append(_row(run))
            thetas.append(run.point.theta)
            show(what, run.time, run.span)
    if not reached:
        warnings.warn(
            f"the gradient flow stopped at {run.time / step:.4g} of {run.span / step:.4g} after {run.steps} steps of "
            "the integrator; raise max_linearisations or max_steps of alg, raise rtol, or ask for a shorter span",
            stacklevel=3,
        )
    values = [objective.values(theta) for theta in thetas]
    times, losses, norms, errors, late = np.array(rows).T
    return GradientFlow(
        time=times / step,
        loss=losses,
        gradient_norm=norms,
        error=errors,
        late=late / step,
        parameters={name: _stacked([value[name] for value in values]) for name in values[0]},
        linearisations=run.costs.linearisations,
        gradients=run.costs.gradients,
        applications=run.costs.applications,
        differences=run.costs.differences,
        cost=run.costs.total,
        reached=reached,
        pieces=pieces if step == 1 else [lambda s, piece=piece: piece(s * step) for piece in pieces],
        own=run.own,
        optimizer=optimizer,
    )


def _advanced(run: Run, objective: Objective | LinearisedObjective) -> Piece:
    """The next step; where there is none, the error says why the loss is not known beyond."""
    try:
        return run.advance()
    except RuntimeError as error:
        if stopped := getattr(objective, "stopped", ""):
            raise RuntimeError(f"{error}. The loss has no value beyond that: {stopped}") from error
        raise


def _stacked(values: list[Array]) -> Array:
    """In numpy, as JAX compiles it for each number of them."""
    return like_numpy(np.stack([to_numpy(value) for value in values]), values[0])


def _beforehand(run: Run, optimizer: str) -> str:
    """What a run is, and what it will cost at most."""
    most = f", at most {run.most} gradients, where training takes {run.span}" if isinstance(run, OwnSteps) else ""
    return f"{optimizer or 'gradient flow'}{most}"


def name_of(optimizer: Any) -> str:
    """An optimiser as a user calls it."""
    made_by = getattr(optimizer, "func", optimizer)
    name = optimizer if isinstance(optimizer, str) else getattr(made_by, "__name__", type(made_by).__name__)
    return "your optimiser" if name.startswith(("GradientTransformation", "<")) else name  # of optax, or a lambda


def _batches(objective: Objective, trials: int, batch: int, seed: int) -> Iterator[Callable[[Array], Any]]:
    """The loss and the gradient of one draw of trials after the other."""
    rng = np.random.default_rng(seed)
    while True:
        yield partial(objective.on, rng.choice(trials, batch, replace=False))


def _row(run: Run) -> tuple[float, ...]:
    return run.time, run.point.loss, math.sqrt(-run.slope), run.error, run.late


def _check_loss(loss: Any, most: int) -> None:
    """Raise for a function that needs more than the states, and the numbers of a batch's trials."""
    taken = positional(getattr(loss, "forward", loss)) or ()
    needed = [one.name for one in taken if one.default is one.empty and one.kind is not one.VAR_POSITIONAL]
    if len(needed) > most:
        raise TypeError(
            f"the loss is called with the states alone, and this one needs {', '.join(needed)}; give "
            "kp.squared_error(target, readout) or kp.cross_entropy(target, readout), or a function of the states"
        )


def _check_no_optimizer(**options: Any) -> None:
    if given := [name for name, value in options.items() if value is not None]:
        raise ValueError(f"{', '.join(given)} is for an optimizer; say which, or leave it out")


def _whole(span: float) -> int:
    if span != int(span):
        raise ValueError(f"span is {span!r}, expected a whole number of the optimizer's steps")
    return int(span)


def _check_batch(batch: Any, trials: int) -> None:
    if not is_count(batch, trials):
        raise ValueError(f"batch is {batch!r}, expected a number of trials from 1 to {trials}")


def _check(span: Any, alg: Any, rtol: Any, stop_below: Any, known: tuple[type, ...]) -> None:
    if alg is not None and not isinstance(alg, known):
        names = ", ".join(f"kp.solvers.{kind.__name__}(...)" for kind in known)
        raise TypeError(f"alg is {alg!r}, expected None or {names}")
    if not is_number(span) or not 0 < span < math.inf:
        raise ValueError(f"span is {span!r}, expected a positive number: learning rate times steps")
    if not is_number(rtol) or not 0 < rtol < 1:
        raise ValueError(f"rtol is {rtol!r}, expected a number between 0 and 1")
    if stop_below is not None and not (is_number(stop_below) and 0 < stop_below < 1):
        raise ValueError(f"stop_below is {stop_below!r}, expected a part of the loss at the start, between 0 and 1")
