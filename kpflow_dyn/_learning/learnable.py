"""What gradient descent will learn soon, late or never: scores and times of targets under a frozen kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, full_precision
from kpflow_dyn._flows.flow import Flow, Output
from kpflow_dyn._learning.decay import squares
from kpflow_dyn._learning.forecasting import checked_mask, checked_target, outputs
from kpflow_dyn._spaces.operators import Operator

if TYPE_CHECKING:
    import xarray as xr

NULL = 1e-6  # a direction whose eigenvalue is smaller than this part of the largest counts as never learnt


@dataclass(frozen=True, eq=False)
class Learnability:
    """How soon each target is learnt by a gradient flow under a frozen kernel, times being tau = lr steps.

    Attributes:
        names: of the targets.
        score: <e, A e> / (|e|^2 l_max), between 0 and 1: the initial speed of the loss over the largest one [target].
        half, tenth: tau at which |e| has fallen to half and to a tenth; inf where it does not; each [target].
        never: the part of |e|^2 in directions whose eigenvalues are below 1e-6 of the largest [target].
        applications: of A to one vector.

    Example as `learnability`.
    """

    names: tuple[str, ...]
    score: np.ndarray
    half: np.ndarray
    tenth: np.ndarray
    never: np.ndarray
    applications: int

    def to_xarray(self) -> xr.Dataset:
        """The table, labelled."""
        import xarray as xr

        columns = {name: ("target", getattr(self, name)) for name in ("score", "half", "tenth", "never")}
        return xr.Dataset(columns, {"target": list(self.names)}, {"applications": self.applications})

    def __str__(self) -> str:
        width = max(6, *map(len, self.names))
        rows = zip(self.names, self.score, self.half, self.tenth, self.never, strict=True)
        table = [f"{n:{width}} {s:9.3g} {h:10.4g} {t:10.4g} {v:9.2g}" for n, s, h, t, v in rows]
        return "\n".join([f"{'target':{width}} {'score':>9} {'half':>10} {'tenth':>10} {'never':>9}", *table])


def learnability(
    flow: Flow | Output, targets: Mapping[str, Array] | Array, *, mask: Array | None = None, errors: bool = False
) -> Learnability:
    """Which targets gradient descent learns soon, late, or never, as the kernel is now.

    Each target is on its own: e = y - target, L = <e, m e> / <1, m> and de/dtau = -2 A m e / <1, m>, with A the ntk of
    the outputs y. Times are right where learning is lazy. Where the kernel changes much, they still order targets of
    one network, but `kp.gradient_flow` is what to trust for times.

    Args:
        flow: whose states are the outputs y; or `flow.output(C, learn=...)`.
        targets: by name, or as one block [target, ...]; each as y.
        mask: m >= 0, broadcastable to the shape of y; all ones when None.
        errors: whether the targets are errors e themselves, such as single components of a target.

    Raises:
        ValueError: no targets, or ones of another shape than y's.
    Source: Hazelden, Driscoll, Shlizerman, Shea-Brown, arXiv 2605.08746.

    >>> import torch, kpflow_dyn as kp
    >>> cell, x = torch.nn.RNNCell(2, 32).double(), torch.randn(4, 6, 2, dtype=torch.float64)
    >>> y = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).output(torch.nn.Linear(32, 1))
    >>> constant, noise = torch.ones(4, 6, 1).double(), torch.randn(4, 6, 1).double()
    >>> found = kp.learnability(y, {"constant": constant, "noise": noise}, errors=True)
    >>> bool(found.half[0] < found.half[1])
    True
    """
    return _table(flow.ntk, outputs(flow), targets, mask, errors)


def core_learnability(
    flow: Flow | Output, targets: Mapping[str, Array] | Array, *, mask: Array | None = None, errors: bool = False
) -> Learnability:
    """`learnability` from a forward pass alone, with G = sum over weights V V^T (x) I instead of the kernel.

    V are the variables that the weights multiply at each trial and time; the score is <e, G e> / (|e|^2 l_max). It
    leaves out how the dynamics pass changes on, and how strongly: use it to rank targets, not for times.

    Args and Source as `learnability`.

    Raises:
        ValueError: also where no site of the model is a matrix product at each trial and time.

    >>> import torch, kpflow_dyn as kp
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(2, 8), torch.randn(4, 6, 2))))
    >>> found = kp.core_learnability(flow, {"constant": torch.ones(4, 6, 8)}, errors=True)
    >>> bool(0 < found.score[0] <= 1)
    True
    """
    return _table(_of_variables(flow), outputs(flow), targets, mask, errors)


def _table(op: Operator, y: Array, targets: Any, mask: Array | None, errors: bool) -> Learnability:
    named = targets if isinstance(targets, Mapping) else {str(i): target for i, target in enumerate(targets)}
    if not named:
        raise ValueError("no targets given; expected a mapping of names to arrays like the outputs")
    mask = checked_mask(mask, op.domain)
    found = [checked_target(target, mask, op.domain, f"target {name!r}") for name, target in named.items()]
    e = array_namespace(y).stack([target if errors else y - target for target in found])
    with full_precision(y):
        decay = squares(op, e, mask)
        decay.settle(lambda rates, energies: np.stack(_columns(rates, energies)[:3]))
    score, half, tenth, never = _columns(*decay.lower)
    return Learnability(tuple(named), score, half, tenth, never, decay.applications)


def _columns(rates: np.ndarray, energies: np.ndarray) -> tuple[np.ndarray, ...]:
    """score, half, tenth and never; what is zero already is learnt at once."""
    total = energies.sum(1)
    score = energies @ rates / np.maximum(total * rates.max(), 1e-300)
    half, tenth = (np.array([time_to(e, rates, part) for e in energies]) for part in (0.25, 0.01))
    never = energies[:, rates < NULL * rates.max()].sum(1) / np.maximum(total, 1e-300)
    return score, half, tenth, never


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
    states, space = flow.flow if isinstance(flow, Output) else flow, flow.ntk.domain
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
