"""What gradient descent will learn soon, late or not: scores and times of targets under a frozen kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, full_precision
from kpflow_dyn._flows.flow import Flow, Output, check_flow
from kpflow_dyn._learning.curvature import Curvature, curvature
from kpflow_dyn._learning.decay import Decay, certain, squares
from kpflow_dyn._learning.descent import along
from kpflow_dyn._learning.forecasting import checked_mask, checked_target, loss_of, outputs, states_of
from kpflow_dyn._learning.linearised import HORIZON, LinearisedObjective, LongRun
from kpflow_dyn._learning.losses import Loss, OutputLoss
from kpflow_dyn._shown import ShownAsText
from kpflow_dyn._spaces.operators import Operator
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.solvers._landscape import TINY

if TYPE_CHECKING:
    import xarray as xr

NULL = 1e-6  # a direction whose eigenvalue is smaller than this part of the largest counts as unreached
HALF, TENTH = 0.5, 0.1
COLUMNS = ("score", "half", "tenth", "unreached", "followed")
WORDS = (
    "under the kernel as it is; half and tenth are tau = learning rate x steps, inf: never",
    f"unreached: part of the loss in directions of eigenvalues below {NULL:.0e} of the largest: very late, or never",
)
LATER = "> 20: later than tau = 20, up to which the loss was followed"


@dataclass(frozen=True, eq=False, repr=False)
class Learnability(ShownAsText):
    """How soon a gradient flow under a frozen kernel learns each target; times are tau = lr steps.

    Attributes:
        names: of the targets.
        score: the initial speed of the loss over the largest possible one [target], between 0 and 1. For the squared
            error it is <e, A e> / (|e|^2 l_max).
        half, tenth: tau at which the loss has fallen to half and to a tenth [target]. inf if it never falls so far: not
            in 1e12 times of the fastest direction. NaN if it comes later than `followed`, and when is not known.
        unreached: the part of the loss in directions whose eigenvalues are below 1e-6 of the largest [target]; NaN if
            it is not known to about a hundredth. For the cross-entropy it is that of the loss to second order. The
            frozen kernel moves these directions very slowly, if at all: `half` and `tenth` count them with their own
            rates. Descent may still learn this part sooner, because the kernel changes.
        followed: tau up to which the loss was followed [target].
        applications: how many times A was applied to one vector.

    Example as `learnability`.
    """

    names: tuple[str, ...]
    score: np.ndarray
    half: np.ndarray
    tenth: np.ndarray
    unreached: np.ndarray
    followed: np.ndarray
    applications: int

    def to_xarray(self) -> xr.Dataset:
        """The table, labelled."""
        import xarray as xr

        columns = {name: ("target", getattr(self, name)) for name in COLUMNS}
        return xr.Dataset(columns, {"target": list(self.names)}, {"applications": self.applications})

    def __str__(self) -> str:
        width = max(6, *map(len, self.names))
        times = [[_time(*one) for one in zip(column, self.followed, strict=True)] for column in (self.half, self.tenth)]
        rows = zip(self.names, self.score, *times, self.unreached, strict=True)
        table = [f"{n:{width}} {s:9.3g} {h:>10} {t:>10} {v:9.2f}" for n, s, h, t, v in rows]
        head = f"{'target':{width}} {'score':>9} {'half':>10} {'tenth':>10} {'unreached':>9}"
        later = [LATER] * bool(np.isnan([self.half, self.tenth]).any())
        return "\n".join([head, *table, *WORDS, *later])


def learnability(
    flow: Flow | Output,
    targets: Mapping[str, Any] | Any,
    *,
    loss: Loss = "squared_error",
    mask: Any = None,
    errors: bool = False,
) -> Learnability:
    """Which targets gradient descent learns soon, late, or not at all while the kernel is as it is now.

    Each target is taken alone: e = y - target, L = <e, m e> / <1, m> and de/dtau = -2 A m e / <1, m>, where A is the
    ntk of the outputs y. For another loss, e = grad_y L decays by the kernel h^{1/2} A h^{1/2}, where h is the Hessian
    of L in y. This gives score and unreached. The times are those of the loss itself along y + J delta. Times are right
    where learning is lazy. If the kernel changes much, they still order the targets of one network, but use
    `kp.gradient_flow` for times.

    Args:
        flow: a flow whose states are the outputs y; or `flow.output(C, learn=...)`.
        targets: by name, or as one block [target, ...]; each in the shape of y, or in the form that the loss takes.
        loss: "squared_error", "cross_entropy" as in `cross_entropy`, or a convex function (y, target) -> number.
        mask: m >= 0, broadcastable to the shape of y, or [trial, time]; all ones when None. None with a function.
        errors: whether the targets are themselves errors e, in the shape of y, such as single components of a target.
            For the cross-entropy they are parts of its gradient in y, and the times are those of its quadratic model.

    Raises:
        ValueError: no targets; targets whose shape is not that of y; errors with a function of your own; or a function
            that is not convex, or couples more outputs than a matrix can hold.
    Source: Hazelden, Driscoll, Shlizerman, Shea-Brown, arXiv 2605.08746.

    >>> import torch, kpflow_dyn as kp
    >>> cell, x = torch.nn.RNNCell(2, 32).double(), torch.randn(4, 6, 2, dtype=torch.float64)
    >>> y = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).output(torch.nn.Linear(32, 1))
    >>> constant, noise = torch.ones(4, 6, 1).double(), torch.randn(4, 6, 1).double()
    >>> found = kp.learnability(y, {"constant": constant, "noise": noise}, errors=True)
    >>> bool(found.half[0] < found.half[1])
    True
    """
    check_flow(flow)
    named = _named(targets)
    if loss == "squared_error":
        return _table(flow.ntk, outputs(flow), named, mask, errors)
    with full_precision(outputs(flow)):
        rows = [_row(flow, target, mask, loss, errors) for target in named.values()]
    *columns, applications = np.array(rows).T
    return Learnability(tuple(named), *columns, applications=int(applications.sum()))


def core_learnability(
    flow: Flow | Output, targets: Mapping[str, Array] | Array, *, mask: Array | None = None, errors: bool = False
) -> Learnability:
    """`learnability` from a forward pass alone, with G = sum over weights V V^T (x) I instead of the kernel.

    V are the variables that the weights multiply at each trial and time; the score is <e, G e> / (|e|^2 l_max), of the
    squared error. It leaves out how the dynamics pass changes on, and how strongly: use it to rank targets, not for
    times.

    Args and Source as `learnability`.

    Raises:
        ValueError: also where no site of the model is a matrix product at each trial and time.

    >>> import torch, kpflow_dyn as kp
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(2, 8), torch.randn(4, 6, 2))))
    >>> found = kp.core_learnability(flow, {"constant": torch.ones(4, 6, 8)}, errors=True)
    >>> bool(0 < found.score[0] <= 1)
    True
    """
    return _table(_of_variables(flow), outputs(flow), _named(targets), mask, errors)


def _time(tau: float, followed: float) -> str:
    return f"> {followed:.3g}" if math.isnan(tau) else f"{tau:.4g}"


def _named(targets: Any) -> Mapping[str, Any]:
    named = targets if isinstance(targets, Mapping) else {str(i): target for i, target in enumerate(targets)}
    if not named:
        raise ValueError("no targets given; expected a mapping of names to arrays like the outputs")
    return named


def _table(op: Operator, y: Array, named: Mapping[str, Any], mask: Any, errors: bool) -> Learnability:
    """Of the squared error, all targets in one basis."""
    mask = checked_mask(mask, op.domain)
    found = [checked_target(target, mask, op.domain, f"target {name!r}") for name, target in named.items()]
    e = array_namespace(y).stack([target if errors else y - target for target in found])
    with full_precision(y):
        decay = squares(op, e, mask)
        decay.settle(_bounded)
    return Learnability(tuple(named), *_known(decay), applications=decay.applications)


def _row(flow: Flow | Output, target: Any, mask: Any, loss: Loss, errors: bool) -> tuple[float, ...]:
    """The columns of one target, and the applications."""
    y, space = outputs(flow), flow.ntk.domain
    of_outputs = _loss_of_errors(flow, mask, loss) if errors else loss_of(flow, target, mask, loss)
    curved = curvature(of_outputs, y, space)
    decay = _decay(flow, curved, _error(target, mask, space) if errors else curved.gradient)
    decay.settle(_bounded if errors else lambda rates, energies: _bounded(rates, energies)[[0, 3]])
    score, half, tenth, unreached, followed = (float(column[0]) for column in _known(decay))
    if errors:
        return score, half, tenth, unreached, followed, decay.applications
    half, tenth, followed, spent = _times(flow, of_outputs, decay.lower[0].max())
    return score, half, tenth, unreached, followed, decay.applications + spent


def _loss_of_errors(flow: Flow | Output, mask: Any, loss: Loss) -> OutputLoss:
    """The loss whose curvature errors decay by: that of the cross-entropy is the same for all targets."""
    if callable(loss):
        raise ValueError("the curvature of a loss of your own hangs on its target: give targets, not errors")
    shape = flow.ntk.domain.shape
    return loss_of(flow, np.full(shape, 1 / shape[-1]), mask, loss)


def _error(given: Any, mask: Any, space: Space) -> Array:
    """A part of the gradient in y as a row [1, n]."""
    return space.to_euclidean(checked_target(given, checked_mask(mask, space), space, "error")).reshape((1, -1))


def _decay(flow: Flow | Output, curved: Curvature, e: Array) -> Decay:
    """Of an error e [1, n]; rows are in Euclidean coordinates."""
    space = flow.ntk.domain
    f = space.from_euclidean(curved.divided(e).reshape((1, *space.shape)))
    return Decay(flow.ntk, f, curved.rooted)


def _times(flow: Flow | Output, loss: OutputLoss, fastest: float) -> tuple[float, float, float, int]:
    """tau to half and to a tenth of the loss along y + J delta, up to when it was followed, and the applications."""
    objective = LinearisedObjective(flow.ntk, outputs(flow), loss)
    run = LongRun(objective, fastest, True, lambda point: point.loss <= TENTH * first, TENTH)
    first = run.point.loss
    found = along(run, objective, None)
    beyond = math.inf if run.settled else math.nan
    half, tenth = (beyond if math.isnan(tau := found.time_to(part)) else tau for part in (HALF, TENTH))
    return half, tenth, run.time, found.applications + int(found.gradients)


def _known(decay: Decay) -> np.ndarray:
    """The columns [5, target]: times are NaN where the basis does not tell; they are later than it was followed."""
    lower = _columns(*decay.lower)
    known = np.where(np.isnan(certain(_bounded, decay.lower, decay.upper)), math.nan, lower)
    times, earliest = known[1:3], lower[1:3]  # by the lower bound of the loss
    horizon = HORIZON / max(float(decay.lower[0].max()), TINY)
    times[earliest > horizon] = math.inf
    times[earliest > decay.resolved] = math.nan if decay.resolved < horizon else math.inf
    followed = np.min(np.where(np.isnan(times), earliest, math.inf), 0)
    followed = np.where(np.isinf(followed), lower[2], followed)
    return np.vstack([known, np.minimum(followed, decay.resolved)])


def _bounded(rates: np.ndarray, energies: np.ndarray) -> np.ndarray:
    """The columns, what is unreached as 1 + unreached, whose relative error is about the absolute one."""
    score, half, tenth, unreached = _columns(rates, energies)
    return np.stack([score, half, tenth, 1 + unreached])


def _columns(rates: np.ndarray, energies: np.ndarray) -> np.ndarray:
    """score, half, tenth and unreached [4, target]; what is zero already is learnt at once."""
    total = energies.sum(1)
    score = energies @ rates / np.maximum(total * rates.max(), 1e-300)
    half, tenth = (np.array([time_to(e, rates, part) for e in energies]) for part in (HALF, TENTH))
    unreached = energies[:, rates < NULL * rates.max()].sum(1) / np.maximum(total, 1e-300)
    return np.stack([score, half, tenth, unreached])


def time_to(energies: np.ndarray, rates: np.ndarray, part: float) -> float:
    """tau where sum_j energies_j exp(-2 rates_j tau) is this part of what it was; inf where it stays above."""
    goal, still = part * energies.sum(), energies[rates < 1e-14 * rates.max()].sum()
    if goal == 0 or still >= goal:
        return 0.0 if goal == 0 else np.inf
    low, high = -60.0, 60.0  # of log tau, in units of the largest rate
    for _ in range(80):
        middle = (low + high) / 2
        above = np.exp(-2 * rates / rates.max() * np.exp(middle)) @ energies > goal
        low, high = (middle, high) if above else (low, middle)
    return float(np.exp(high) / rates.max())


def _of_variables(flow: Flow | Output) -> Operator:
    """G on the outputs [trial, time, out]."""
    check_flow(flow)
    states, space = states_of(flow), flow.ntk.domain
    if states.untraced:
        raise ValueError(
            f"a flow without weight sites has no forward-pass score; the model was not traced: {states.untraced}"
        )
    found = [
        site.inputs for site in states.sites if site.kind == "matrix" and site.inputs.shape[:-1] == space.shape[:-1]
    ]
    if not found:
        raise ValueError(
            "no weight is multiplied with data once at each trial and time; there is no forward-pass score"
        )
    V = space.xp.concat(found, axis=-1).reshape((-1, sum(rows.shape[-1] for rows in found)))

    def apply(q: Array) -> Array:
        rows = (q if space.measure is None else space.measure * q).reshape((len(q), len(V), space.shape[-1]))
        return space.xp.matmul(V, space.xp.matmul(V.T, rows)).reshape(q.shape)

    return Operator(space, space, apply, None)
