"""All learning rules of one network beside backpropagation through time, as a table."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, Random, to_numpy
from kpflow_dyn._flows.flow import Flow
from kpflow_dyn._learning.losses import Loss, OutputLoss, default_loss, gradient_in, output_loss
from kpflow_dyn._numbers.estimate import alignment, effective_rank
from kpflow_dyn._numbers.reductions import partial_trace
from kpflow_dyn._numbers.spectra import eigs
from kpflow_dyn._shown import Row, Shown, plural, type_name
from kpflow_dyn._spaces.operators import GramOperator, Operator
from kpflow_dyn._spaces.rows import euclidean_matrix
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.learning_rules._known import RULES, MakeRule, made, rule_of

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

DAMPING = 0.01  # of the largest eigenvalue of the ntk, for the rules that take one

Given = Operator | MakeRule | str


@dataclass(frozen=True, eq=False, repr=False)
class RuleTable(Shown):
    """Learning rules of one flow beside backpropagation through time, each an operator A on the states.

    Attributes:
        rules: their names [rule].
        alignment, alignment_stderr: cos(A, ntk) [rule], and its standard error.
        step: cos(A q, ntk q) [rule], of the steps for the actual gradient q.
        rank: the effective rank of A A* [rule], for symmetric rules and others alike; that of "bptt" is lower than the
            effective rank of the ntk itself.
        temporal_rank: that of T T* [rule], with T [time, time] the partial trace of A over trials and units.
        kept: [rule, mode], of each temporal mode u of the ntk how much of the rule's movement it has, over how much of
            that of the ntk it has: 1 where the rule moves errors with this time course as backpropagation does, 0 where
            it loses them, negative where it moves them the wrong way. It is

                s(A, u) / s(ntk, u),    s(A, u) = <u, T u> / sum |<u_i, T u_i>| over all temporal modes u_i

        share: s(ntk, u) [mode] itself: how much of backpropagation's movement has this time course.
        modes: the temporal modes u of the ntk, [mode, time].
        times: of the states [time].
        left_out: by name why a rule cannot be had of this flow.

    Example as `compare`.
    """

    rules: list[str]
    alignment: np.ndarray
    alignment_stderr: np.ndarray
    step: np.ndarray
    rank: np.ndarray
    temporal_rank: np.ndarray
    kept: np.ndarray
    share: np.ndarray
    modes: np.ndarray
    times: np.ndarray
    left_out: dict[str, str] = field(default_factory=dict)

    def _shown(self) -> tuple[str, list[Row]]:
        wide = max(map(len, self.rules))
        rows: list[Row] = [f"{'':{wide}}  cos to BPTT  cos of step    rank  temporal  kept of temporal modes 1, 2, ..."]
        for n, name in enumerate(self.rules):
            numbers = (
                f"{self.alignment[n]:11.3f}  {self.step[n]:11.3f}  {self.rank[n]:6.3g}  {self.temporal_rank[n]:8.3g}"
            )
            rows.append(f"{name:{wide}}  {numbers}  {' '.join(f'{kept:.2f}' for kept in self.kept[n, :4])}")
        rows += [f"not of this flow: {', '.join(self.left_out)}"] if self.left_out else []
        return f"{plural(len(self.rules), 'learning rule')} beside backpropagation through time", rows

    def to_xarray(self) -> xr.Dataset:
        """A dataset of the numbers, by "rule", "mode" and "time"."""
        import xarray as xr

        of_rules = ("alignment", "alignment_stderr", "step", "rank", "temporal_rank")
        data: dict[str, Any] = {name: ("rule", getattr(self, name)) for name in of_rules}
        data |= {"kept": (("rule", "mode"), self.kept), "share": ("mode", self.share)}
        data |= {"modes": (("mode", "time"), self.modes)}
        coords = {"rule": self.rules, "mode": 1 + np.arange(len(self.share)), "time": self.times}
        return xr.Dataset(data, coords, {"left_out": list(self.left_out)})

    def plot(self, dark: bool = False) -> Figure:
        """Cosines and ranks of the rules as bars, and which temporal modes they keep as a map."""
        from kpflow_dyn.figures import _learning as figures

        return figures.rules(self, dark=dark)


def compare(
    flow: Flow,
    target: Any = None,
    readout: Any = None,
    *,
    loss: Loss | None = None,
    mask: Any = None,
    rules: Iterable[str | MakeRule] | Mapping[str, Given] | None = None,
    k: int = 8,
    samples: int | None = None,
    seed: int = 0,
) -> RuleTable:
    """How near each learning rule is to backpropagation through time on this network, and which time courses it loses.

        cos(A, ntk) = tr(A^T ntk) / (|A|_F |ntk|_F) of the operators,    cos(A q, ntk q) of one step

    Args:
        flow: what `linearize` gives; of an ODE take `flow.nodal` for the rules that count steps.
        target: of the outputs, for the gradient q of the loss in the states; q is drawn from a normal distribution when
            None.
        readout: C of the outputs, as in `Flow.output`; None where the states are the outputs.
        loss, mask: of the target, as in `forecast`; by default that which fits the target.
        rules: names of `kp.learning_rules` and functions flow -> rule, or by a name of yours also operators. All known
            rules when None, with k = 1 where they count steps, and where they take a damping 0.01 of the largest
            eigenvalue of the ntk; those that are not of this kind of flow are listed in `left_out`.
        k: how many temporal modes.
        samples: how many applications of each rule to spend on each number; exact where it is cheap when None.
        seed: of rules and estimates.

    Raises:
        TypeError, ValueError: no flow, an unknown rule, a target that does not fit, or states without time.
    Source: docs/theory.md, "Learning rules and optimisers".

    >>> import torch, kpflow_dyn as kp
    >>> _ = torch.manual_seed(0)
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 8), torch.randn(2, 6, 3))))
    >>> table = kp.learning_rules.compare(flow, rules=["bptt", "truncated_bptt", "muon"], k=3)
    >>> table.rules, table.kept.shape, bool(table.alignment[1] < 1)
    (['bptt', 'truncated_bptt', 'muon'], (3, 3), True)
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"got {type_name(flow)}, expected a Flow, as kp.linearize makes it")
    if not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k is {k!r}, expected a number of temporal modes, 1 or more")
    if "time" not in flow.ntk.domain.axes:
        raise ValueError(f"the states {flow.ntk.domain} have no axis of time; take a flow of states over time")
    q, chosen = _gradient(flow, target, readout, loss, mask, seed)
    offered = {"q": q, "k": 1, "readout": readout, "seed": seed}
    offered |= {} if chosen is None or chosen.quadratic else {"loss": chosen}
    operators, left_out = _operators(flow, rules, offered)
    T = to_numpy(euclidean_matrix(partial_trace(flow.ntk, "time", samples, seed)))
    values, vectors = np.linalg.eigh((T + T.T) / 2)
    k, vectors = min(k, len(values)), vectors[:, ::-1]
    step, (own, _) = flow.ntk.mv(q), _along_time(flow.ntk, vectors, samples, seed)
    found = [_numbers_of(rule, flow.ntk, q, step, vectors, samples, seed) for rule in operators.values()]
    cosine, stderr, of_step, rank, temporal, shares = (np.array(each) for each in zip(*found, strict=True))
    kept = shares[:, :k] / np.maximum(own[:k], np.finfo(float).tiny)
    times = flow.ntk.domain.times
    on_time = np.arange(len(values)) if times is None else to_numpy(times)
    names, modes = list(operators), vectors.T[:k]
    return RuleTable(names, cosine, stderr, of_step, rank, temporal, kept, own[:k], modes, on_time, left_out)


def _gradient(
    flow: Flow, target: Any, readout: Any, loss: Loss | None, mask: Any, seed: int
) -> tuple[Array, OutputLoss | None]:
    """q, the gradient of the loss in the states, and the loss of the outputs."""
    if target is None:
        return flow.ntk.domain.normal(1, Random(seed))[0], None
    read = None if readout is None else flow.output(readout)
    y = flow.solution.state if read is None else read.values
    chosen = output_loss(loss or default_loss(target, y.shape), target, mask, y)
    error = gradient_in(y, chosen, flow.solution.problem.backend.transforms)
    space = flow.ntk.domain if read is None else read.C.codomain
    error = error if space.measure is None else error / space.measure
    return (error if read is None else read.C.T.mv(error)), chosen


def _operators(flow: Flow, rules: Any, offered: dict[str, Any]) -> tuple[dict[str, Operator], dict[str, str]]:
    """The rules of this flow by name, and why others are not."""
    if rules is not None and not isinstance(rules, Mapping):
        rules = _by_name([rules] if isinstance(rules, str) or callable(rules) else list(rules))
    asked = {name: one if isinstance(one, Operator) else rule_of(one) for name, one in (rules or RULES).items()}
    makers = [one for one in asked.values() if not isinstance(one, Operator)]
    if any("damping" in inspect.signature(make).parameters for make in makers):
        offered = offered | {"damping": DAMPING * float(eigs(flow.ntk, 1).values[0])}
    found, left_out = {}, {}
    for name, one in asked.items():
        try:
            found[name] = one if isinstance(one, Operator) else made(one, flow, offered, {})
        except ValueError as error:
            if rules is not None:
                raise
            left_out[name] = str(error)
    return found, left_out


def _by_name(rules: list[Any]) -> dict[str, Any]:
    names = [rule if isinstance(rule, str) else getattr(rule, "__name__", "") for rule in rules]
    if not rules or not all(names) or len(set(names)) < len(names):
        raise ValueError(f"rules of the names {names}, expected one or more, each with its own: rules={{name: rule}}")
    return dict(zip(names, rules, strict=True))


def _along_time(rule: Operator, modes: np.ndarray, samples: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """s(A, u) of all temporal modes u, and the partial trace on time.

    All rules are seen by the same probes, as operators of no structure, so that errors of their ratios are small.
    """
    plain = Operator(rule.domain, rule.codomain, rule.mv, rule.T.mv)
    T = to_numpy(euclidean_matrix(partial_trace(plain, "time", samples, seed))).astype(float)
    along = np.einsum("ti,ts,si->i", modes, T, modes)
    return along / np.abs(along).sum(), T


def _unit(q: Array, space: Space) -> np.ndarray:
    """q over its length, as a vector in float64; NaN where it is zero."""
    row = to_numpy(space.to_euclidean(q)).astype(float).ravel()
    with np.errstate(invalid="ignore"):
        row = row / np.abs(row).max()
        return row / np.linalg.norm(row)


def _numbers_of(
    rule: Operator, ntk: Operator, q: Array, step: Array, modes: np.ndarray, samples: int | None, seed: int
) -> tuple[float, float, float, float, float, np.ndarray]:
    """cos to the ntk with its error, cos of the step, effective ranks, and s(A, u) of all temporal modes."""
    near = alignment(rule, ntk, samples, seed)
    of_step = float(_unit(rule.mv(q), ntk.domain) @ _unit(step, ntk.domain))
    shares, T = _along_time(rule, modes, samples, seed)
    sizes = np.linalg.svd(T)[1]
    squares = (sizes / sizes[0]) ** 2
    rank = effective_rank(GramOperator(rule), samples, seed).value
    return near.value, near.stderr, of_step, rank, squares.sum() ** 2 / (squares**2).sum(), shares
