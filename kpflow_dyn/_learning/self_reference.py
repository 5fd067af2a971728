"""The self-referential bias: how much of what learning changes lies where the network is active already."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, full_precision, like_numpy, to_numpy
from kpflow_dyn._flows.flow import Flow, Output
from kpflow_dyn._learning.changes import Descent, given_changes
from kpflow_dyn._learning.forecasting import outputs
from kpflow_dyn._learning.learnable import learnability
from kpflow_dyn._learning.losses import Loss, OutputLoss, gradient_in, output_loss
from kpflow_dyn._learning.options import is_count, is_number, plain
from kpflow_dyn._numbers.leading_directions import (
    DATA_AXES,
    NULL,
    at_unit_size,
    control_shares,
    control_shares_of_states,
    leading,
    rows_of,
    shares,
    variables,
)
from kpflow_dyn._numbers.reductions import partial_trace
from kpflow_dyn._numbers.spectra import eigs
from kpflow_dyn._shown import ShownAsText, type_name
from kpflow_dyn._spaces.operators import GramOperator, Operator
from kpflow_dyn._spaces.rows import CHEAP
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.solvers import BlockLanczos, Dense, EigenSolver

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

CONTROLS = ("constant", "cosines", "own cosines", "random")
BASES = ("core", "NTK", *CONTROLS)
MARGIN = 0.05  # by which a share must exceed that of the best control
SOLVER = BlockLanczos(block=4, tol=1e-3, maxiter=200)


@dataclass(frozen=True, eq=False, repr=False)
class SelfReference(ShownAsText):
    """Which part of a change of the states lies where, and what the start leaves out.

    Attributes:
        changes: the names of the changes.
        share: of |dS|^2 in the first 1, 2, ... directions of rows, which leave all units free [change, basis, k];
            rows are trials and times (or tokens), and the bases are those of `BASES`: the core, the NTK, and the
            controls constant, cosines, own cosines and random. NaN of a core without weight sites.
        state_share: the same in directions of whole states [change, basis, k]; of the core NaN.
        size: |dS| / |S| [change].
        k: the number of directions at which `at_k` and the words are.
        rows, units: how many rows and other entries the states have.
        axes: the names of the rows' axes.
        components: names of parts of the error, and of the changes.
        outside: the share of each component [component, of: core, NTK] in no direction of the rows that the core has,
            and in none of whole states (of the outputs, for parts of the error) that the NTK has, up to 1e-6 of the
            largest eigenvalue; NaN where it is not known.
        lr: of the steps that were made, else NaN.

    Example as `self_reference`.
    """

    changes: tuple[str, ...]
    share: np.ndarray
    state_share: np.ndarray
    size: np.ndarray
    k: int
    rows: int
    units: int
    axes: tuple[str, ...]
    components: tuple[str, ...]
    outside: np.ndarray
    lr: float

    @property
    def at_k(self) -> np.ndarray:
        """The shares in k directions of rows [change, basis]."""
        return self.share[..., self.k - 1]

    @property
    def state_at_k(self) -> np.ndarray:
        """The shares in k directions of whole states [change, basis]."""
        return self.state_share[..., self.k - 1]

    @property
    def beyond(self) -> np.ndarray:
        """By how much the shares of core and NTK exceed that of the best control, in k directions [change, 2]."""
        return self.at_k[:, :2] - self.at_k[:, 2:].max(1, keepdims=True)

    def verdict(self, change: int = 0) -> str:
        """Whether the bias is there, in words."""
        core, best = self.at_k[change, 0], int(self.at_k[change, 2:].argmax())
        if math.isnan(core):
            return f"{self.changes[change]}: no weight sites are known, so that only the NTK can be compared"
        beyond, most = self.beyond[change, 0] > MARGIN, core > 0.5
        words = {
            (True, True): "most of the change lies in the core's modes, beyond all controls",
            (True, False): "more of the change lies in the core's modes than in any control, yet most of it elsewhere",
            (False, True): "most of the change lies in the core's modes, but about as much in a control",
            (
                False,
                False,
            ): "most of the change lies outside of the core's modes, and no more in these than in a control",
        }
        control = f"{CONTROLS[best]} {self.at_k[change, 2 + best]:.2f}"
        return f"{self.changes[change]}: {words[beyond, most]} (core {core:.2f}, {control})"

    def __str__(self) -> str:
        where = " x ".join(self.axes)
        lines = [f"share of a change of the states in {self.k} directions of {where} ({self.rows})", _header()]
        lines += [_row(name, values) for name, values in zip(self.changes, self.at_k, strict=True)]
        lines += [f"in {self.k} directions of whole states ({self.rows * self.units})"]
        lines += [_row(name, values) for name, values in zip(self.changes, self.state_at_k, strict=True)]
        lines += [self.verdict(number) for number in range(len(self.changes))]
        lines += ["outside of what the start has, of core and NTK:"]
        outside = zip(self.components, self.outside, strict=True)
        return "\n".join([*lines, *(f"{name:16} {core:9.2g} {ntk:9.2g}" for name, (core, ntk) in outside)])

    def to_xarray(self) -> xr.Dataset:
        """`share` and `state_share` [change, basis, directions], `size` [change], `outside` [component, of]."""
        import xarray as xr

        by = ("change", "basis", "directions")
        data = {"share": (by, self.share), "state_share": (by, self.state_share), "size": ("change", self.size)}
        data |= {"outside": (("component", "of"), self.outside)}
        names = {"change": list(self.changes), "basis": list(BASES), "component": list(self.components)}
        counts = {"directions": 1 + np.arange(self.share.shape[-1]), "of": ["core", "NTK"]}
        words = {"verdict": "\n".join(map(self.verdict, range(len(self.changes)))), "axes": " x ".join(self.axes)}
        return xr.Dataset(data, names | counts, {"k": self.k, "rows": self.rows, "lr": self.lr, **words})

    def variables(self) -> dict[str, Any]:
        """`to_xarray` as variables and coordinates of a larger dataset, by names such as "self_reference_share"."""
        dataset = self.to_xarray()
        renamed = dataset.rename({name: f"self_reference_{name}" for name in (*dataset.dims, *dataset.data_vars)})
        share = renamed.self_reference_share.assign_attrs(dataset.attrs)
        found = {str(name): variable for name, variable in renamed.variables.items()}
        return found | {"self_reference_share": share}

    def plot(self, dark: bool = False) -> Figure:
        """The shares by the number of directions."""
        from kpflow_dyn.figures import _learning as figures

        return figures.self_reference(self, dark=dark)


def _header() -> str:
    return " ".join([f"{'change':16}", *(f"{name:>11}" for name in BASES)])


def _row(name: str, values: np.ndarray) -> str:
    return " ".join([f"{name:16}", *(f"{'-' if math.isnan(value) else format(value, '.3f'):>11}" for value in values)])


def self_reference(
    flow: Flow | Output,
    target: Any = None,
    *,
    change: Any = None,
    loss: Loss = "squared_error",
    readout: Any = None,
    learn: bool = True,
    mask: Any = None,
    steps: int | Sequence[int] = (1, 10),
    lr: float | None = None,
    components: Mapping[str, Array] | None = None,
    k: int = 10,
    rows: str | Sequence[str] | None = None,
    samples: int | None = None,
    seed: int | Random = 0,
    alg: EigenSolver | None = None,
) -> SelfReference:
    """How much of an actual change dS of the states lies in the leading directions of the network's own activity.

        share = |U^T dS|^2 / |dS|^2,    U [trial x time, k]

    U are the k leading left singular vectors of all that the weights see, V = [hidden, input, 1], each weight's V times
    the root of its number of rows (the modes of the core, from a forward pass alone); or the k leading modes of the NTK
    on trials and times; or as many directions that know nothing of the network: functions that are constant in time,
    cosines, random ones. The bias of gradient descent to what the network does already is what the first has beyond
    the last. The second gives k directions of whole states the same way, of the NTK itself.

    The change is that of real steps of gradient descent on a copy of the model, after each number of `steps`. Or give
    `change`.

    Args:
        flow: where learning starts; or `flow.output(readout, learn=...)`, with its readout.
        target: of the outputs, for `loss`; class indices for the cross-entropy.
        change: the change itself, an array like the states; or what the states become: a Solution, a Flow or another
            model; or the folder of a `Recorder` (or what it reads), whose first step is that of the flow; or several of
            the first ones by name.
        loss: "squared_error", "cross_entropy", or a function (y, target) -> number of the outputs.
        readout: a Linear layer that gives the outputs; the states are the outputs when None.
        learn: whether the readout's own weights learn.
        mask: m >= 0 [trial, time], where targets count.
        steps: after how many steps of gradient descent the change is taken, one number or several.
        lr: their learning rate; half of the inverse of the loss's largest curvature when None.
        components: parts of the error by name, each as the outputs; each output on its own when None.
        k: how many directions; the curves go up to 2 k.
        rows: the axes of rows, such as "time" alone; trials with times, or with tokens, when None.
        samples: probes for the NTK's modes on rows; None for exact ones where these are cheap.
        seed: of the probes.
        alg: how the NTK's own modes are found; `solvers.BlockLanczos(block=4, tol=1e-3)` when None.

    Raises:
        ValueError, TypeError: neither a target nor a change, a change that is zero, states without trials, times or
            tokens, and where steps are asked of a problem that `gradient_flow` does not take, or of a flow with a
            metric.
    Source: Hazelden, Driscoll, Shlizerman, Shea-Brown, arXiv 2605.08746.

    >>> import torch, kpflow_dyn as kp
    >>> cell, x = torch.nn.RNNCell(1, 16).double(), torch.sin(torch.arange(20.0).double())[None, :, None]
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))
    >>> found = kp.self_reference(flow, torch.ones(1, 20, 1), readout=torch.nn.Linear(16, 1), k=4)
    >>> found.changes, found.share.shape
    (('1 step', '10 steps'), (2, 6, 8))
    """
    states, readout, learn = _parts(flow, readout, learn)
    if change is None and target is None and not callable(loss):
        raise ValueError("nothing to compare: give a target, for which steps of gradient descent are made, or a change")
    counts, lr = np.atleast_1d(np.asarray(steps)).tolist(), plain(lr)
    _check_counts(k, counts, lr)
    space, rng = states.ntk.domain, Random(seed)
    names = _rows(rows, space)
    with full_precision(states.solution.state):
        error = None if target is None and not callable(loss) else _Error(states, readout, learn, loss, target, mask)
        if change is not None:
            changes, rate = given_changes(states, change), math.nan
        else:
            assert error is not None
            changes, rate = error.descent().changes(counts, lr)
        _check_changes(changes)
        found = _Directions(states, names, k, samples, rng, alg or SOLVER)
        outside = found.outside(changes) | ({} if error is None else error.outside(components, names))
    return SelfReference(
        changes=tuple(changes),
        share=np.array([found.of_rows(one) for one in changes.values()]),
        state_share=np.array([found.of_states(one) for one in changes.values()]),
        size=np.array([_norm(one) / max(_norm(states.solution.state), 1e-300) for one in changes.values()]),
        k=min(k, found.rows),
        rows=found.rows,
        units=space.size // found.rows,
        axes=names,
        components=tuple(outside),
        outside=np.array(list(outside.values())),
        lr=rate,
    )


def _parts(flow: Flow | Output, readout: Any, learn: bool) -> tuple[Flow, Any, bool]:
    """The flow of the states, the readout, and whether it learns."""
    if not isinstance(flow, Flow | Output):
        raise TypeError(f"got {type_name(flow)}, expected a Flow or flow.output(C)")
    if isinstance(flow, Flow):
        return flow, readout, learn and readout is not None
    if readout is not None:
        raise ValueError("this is the flow of a readout already; give either flow.output(C) or readout=C")
    if flow.rate not in (0, 1):
        raise ValueError(f"the readout has a learning rate of its own, {flow.rate}; give the change itself by change=")
    return flow.flow, flow, flow.rate > 0


def _check_counts(k: Any, steps: list[Any], lr: Any) -> None:
    if not steps or not all(map(is_count, (k, *steps))):
        raise ValueError(f"k is {k!r} and steps are {steps!r}, expected whole numbers, at least 1")
    if lr is not None and not (is_number(lr) and 0 < lr < math.inf):
        raise ValueError(f"lr is {lr!r}, expected a positive number, or None")


def _check_changes(changes: dict[str, Array]) -> None:
    for name, one in changes.items():
        if not 0 < _norm(one) < math.inf:
            raise ValueError(
                f"the states have not changed, or not to finite numbers ({name}); take another rate or change"
            )


def _rows(rows: str | Sequence[str] | None, space: Space) -> tuple[str, ...]:
    """The axes that are rows, in the order of the space."""
    wanted = DATA_AXES if rows is None else (rows,) if isinstance(rows, str) else tuple(rows)
    found = tuple(axis for axis in space.axes if axis in wanted and axis in DATA_AXES)
    if not found or (rows is not None and len(found) < len(wanted)):
        raise ValueError(f"rows are {rows!r}, expected some of {', '.join(DATA_AXES)} that {space} has")
    return found


def _norm(q: Array) -> float:
    values = to_numpy(q).astype(np.float64)
    return float(np.abs(values).max() * np.linalg.norm(at_unit_size(values)))


class _Directions:
    """The leading directions of one flow: of rows, and of whole states."""

    def __init__(
        self, flow: Flow, names: tuple[str, ...], k: int, samples: int | None, rng: Random, alg: EigenSolver
    ) -> None:
        self.flow, self.names, space = flow, names, flow.ntk.domain
        self.rows = math.prod(space.keep(names).shape)
        self.most = min(2 * k, self.rows)
        V = variables(flow.sites, space, names)
        self.seen = None if V is None else leading(V)
        self.core = self.seen
        if V is not None and not all(flow.core.separate) and set(names) <= set(flow.core.domain.axes):
            of_core = partial_trace(flow.core, names, samples, rng)  # with the metric of weights that are computed
            self.core = _leading_of(of_core, self.most, rng).T
        self.ntk = _leading_of(partial_trace(flow.ntk, names, samples, rng), self.most, rng).T
        self.states = _leading_of(flow.ntk, self.most, rng, alg)
        self.measure = _measure(space, names)

    def of_rows(self, change: Array) -> np.ndarray:
        """Shares [basis, directions]."""
        X = rows_of(change, self.flow.ntk.domain, self.names)
        nothing = np.full(self.most, np.nan)
        own = [nothing if U is None else shares(U, X, self.most) for U in (self.core, self.ntk)]
        return np.stack([*own, *control_shares(X, self.measure, self.most).values()])

    def of_states(self, change: Array) -> np.ndarray:
        """Shares [basis, directions]."""
        space = self.flow.ntk.domain
        flat = to_numpy(space.to_euclidean(space.counted(change))).reshape(-1, 1).astype(np.float64)
        X = rows_of(change, space, self.names)
        controls = control_shares_of_states(X, self.measure, self.most).values()
        return np.stack([np.full(self.most, np.nan), shares(self.states.T, flat, self.most), *controls])

    def outside(self, changes: dict[str, Array]) -> dict[str, list[float]]:
        """What is in no direction of the core, and in none of the NTK."""
        space, unreached = self.flow.ntk.domain, _unreached(self.flow, changes, None)
        return {
            name: [_rest(self.seen, rows_of(one, space, self.names)), unreached[name]] for name, one in changes.items()
        }


def _unreached(kernel: Flow | Output, parts: dict[str, Array], mask: Any) -> dict[str, float]:
    """The share of each part in no direction of the NTK: by all of these where they are few, else by Krylov."""
    op = kernel.ntk
    if mask is None and (rank := min(op.domain.dimension, op.factor.domain.size)) <= CHEAP:
        U = _leading_of(op, rank, Random(0), Dense()).T
        return {name: _rest(U, rows_of(part, op.domain, op.domain.axes)) for name, part in parts.items()}
    found = learnability(kernel, parts, errors=True, mask=mask)
    return dict(zip(parts, found.unreached.tolist(), strict=True))


def _rest(U: np.ndarray | None, X: np.ndarray) -> float:
    """The share of X outside of the columns of U."""
    return math.nan if U is None else max(0.0, 1 - float(shares(U, X, U.shape[1])[-1]))


def _leading_of(op: Operator, most: int, rng: Random, alg: EigenSolver | None = None) -> np.ndarray:
    """The leading eigenvectors [k, size] where the inner product is plain, float64."""
    rank = min(op.domain.dimension, op.factor.domain.size if isinstance(op, GramOperator) else op.domain.dimension)
    found = eigs(op, min(most, rank), alg, rng)
    values = to_numpy(found.values)
    kept = values > NULL * values.max(initial=0)
    vectors = to_numpy(found.space.to_euclidean(found.vectors)).reshape(len(values), -1)
    return vectors[kept].astype(np.float64)


def _measure(space: Space, names: tuple[str, ...]) -> np.ndarray:
    """How much each row counts [trial, time]."""
    kept = space.keep(names)
    weights = np.ones(kept.shape) if kept.measure is None else np.broadcast_to(to_numpy(kept.measure), kept.shape)
    weights = weights if kept.mask is None else weights * to_numpy(kept.mask)
    trials = kept.shape[0] if kept.axes[0] == "trial" else 1
    return weights.reshape(trials, -1).astype(np.float64)


class _Error:
    """The error of the outputs: the gradient of the loss in them."""

    def __init__(self, flow: Flow, readout: Any, learn: bool, loss: Loss, target: Any, mask: Any) -> None:
        self.flow, self.readout, self.learn = flow, readout, learn
        self.kernel = flow if readout is None else flow.output(readout, learn=learn)
        y = outputs(self.kernel)
        self.loss: OutputLoss = output_loss(loss, target, mask, y)
        self.mask = mask
        self.gradient = gradient_in(y, self.loss, flow.solution.problem.backend.transforms)

    def descent(self) -> Descent:
        """Gradient descent of this loss."""
        return Descent(self.kernel, self.loss)

    def outside(self, components: Mapping[str, Array] | None, names: tuple[str, ...]) -> dict[str, list[float]]:
        """Of the error and its parts, what is in no direction of the core or the learning readout, and of the NTK."""
        parts = {"error": self.gradient} | self._parts(components)
        parts = {name: part for name, part in parts.items() if _norm(part) > 0}
        if not parts:
            return {}
        space, U, unreached = self.kernel.ntk.domain, self._seen(names), _unreached(self.kernel, parts, self.mask)
        return {name: [_rest(U, rows_of(part, space, names)), unreached[name]] for name, part in parts.items()}

    def _parts(self, components: Mapping[str, Array] | None) -> dict[str, Array]:
        """By name."""
        e, width = self.gradient, self.gradient.shape[-1]
        if components is not None:
            return {name: like_numpy(to_numpy(part), e) for name, part in components.items()}
        if width == 1 or self.readout is None:
            return {}
        only = np.eye(width)
        return {f"output {i}": e * like_numpy(only[i], e) for i in range(width)}

    def _seen(self, names: tuple[str, ...]) -> np.ndarray | None:
        """The directions of what all weights see, those of a readout that learns included."""
        space = self.flow.ntk.domain
        found = [V for V in (variables(self.flow.sites, space, names),) if V is not None]
        state = self.flow.solution.state
        ones = array_namespace(state).ones_like(state)
        own = {"weight": rows_of(state, space, names), "bias": rows_of(ones, space, names)[:, :1]}
        if found and isinstance(self.kernel, Output):
            found += [own[name] for name in self.kernel.learnt]
        return leading(np.concatenate(found, 1)) if found else None
