"""How alike two models learn: their operators and the modes in which each can change, side by side.

Under a loss L(y) of Hessian h and gradient e in the outputs, with f = h^{-1/2} e, errors decay as (see `decay`)

    df/dtau = -W f        W = h^{1/2} ntk h^{1/2}

Of the three forms of this operator, W, ntk h and h ntk, which have the same eigenvalues, the rates, W is symmetric. So
its alignments are between 0 and 1 and its modes are orthonormal, while ntk h and h ntk would give two different answers
to one question. And W is zero along all that the loss does not see, such as outputs without a target, or a shift of all
logits, along which ntk h still moves the outputs. Any root h = r r^T gives the same rates; the symmetric one makes
coordinates of two models equal where their Hessians are, which their comparison needs. It is found from h by blocks, so
that a loss of the user's own has it too; it must be convex, as an h with negative eigenvalues has no root.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, Random, eps_of, full_precision, to_numpy
from kpflow_dyn._arrays.dots import gram, row_dots, row_norms
from kpflow_dyn._flows.flow import Flow, Output
from kpflow_dyn._learning.curvature import curvature
from kpflow_dyn._learning.forecasting import loss_of, outputs, states_of
from kpflow_dyn._learning.losses import Loss, OutputLoss
from kpflow_dyn._numbers.estimate import alignment, effective_rank
from kpflow_dyn._numbers.spectra import Modes, eigs
from kpflow_dyn._problems.versions import versions_of
from kpflow_dyn._shown import ShownAsText, with_bar
from kpflow_dyn._spaces.operators import GramOperator, Operator
from kpflow_dyn._spaces.rows import on_rows
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.solvers import BlockLanczos, Estimate
from kpflow_dyn.solvers._orthogonalise import combine

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure


NEARLY_ONE = 1.1  # an effective rank below which nearly all is in one mode


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(ShownAsText):
    """Two flows on the same states, or of the same outputs.

    Attributes:
        ntk: the alignment of the two NTKs, tr(A^T B) / (|A|_F |B|_F); with a loss, of the two h^{1/2} ntk h^{1/2}.
        K, P: the alignments of the states' K and P. For P this is the similarity of Green's operators. None if the
            states have different shapes.
        angles: the principal angles [k] between the spans of the k leading modes of the two, ascending, in radians. 0
            is a direction that they share, pi/2 a direction that only one of them has. NaN for directions that an
            operator of lower rank does not have.
        modes: the leading modes of each. With a loss their values are rates, and their vectors are h^{1/2} times
            changes of the outputs.
        loss: of each model, if there is one.
        accuracy: of each model, if the loss is one of classes.
        step: the cosine between the two directions, ntk grad L, in which the next small step of gradient descent moves
            the outputs that count of each model; NaN if there is no loss, or if one model does not move.
        names: names of the two in tables and figures.
        ranks: the effective ranks of each, by operator: of "NTK" (with a loss, of h^{1/2} ntk h^{1/2}), and of the
            states' "K" and "P" (this is the rank of P P*).

    Example as `compare`.
    """

    ntk: Estimate
    K: Estimate | None
    P: Estimate | None
    angles: np.ndarray
    modes: tuple[Modes, Modes]
    loss: tuple[float, float] | None = None
    accuracy: tuple[float, float] | None = None
    step: float = math.nan
    names: tuple[str, str] = ("A", "B")
    ranks: Mapping[str, tuple[Estimate, Estimate]] = field(default_factory=dict)

    def __str__(self) -> str:
        degrees = ", ".join("none" if math.isnan(angle) else f"{angle:.1f}" for angle in np.degrees(self.angles))
        alike = [f"alignment of {name:4} {with_bar(found, 4)}{self._of(name)}" for name, found in self._alignments()]
        step = [] if self.loss is None else [f"cosine of the next steps {self.step:.4f}"]
        angles = f"principal angles of {len(self.angles)} leading modes, in degrees: {degrees}"
        ranks = [found.value for found in self.ranks.get("NTK", ())]
        said = [on_one_mode(ranks), on_units(self.loss is not None) if self.K is not None else ""]
        return "\n".join([*self._side_by_side(), *alike, *step, angles, *filter(None, said)])

    def _side_by_side(self) -> list[str]:
        """A row for each number that both have."""
        now = {"loss": self.loss, "accuracy": self.accuracy}
        rows = [("", self.names, "")]
        rows += [(name, [f"{one:.4g}" for one in pair], "") for name, pair in now.items() if pair]
        for name, pair in self.ranks.items():
            rows.append((f"effective rank of {name}", [with_bar(one, 4) for one in pair], self._of(name)))
        widths = [max(len(row[1][place]) for row in rows) for place in (0, 1)]
        return [f"{name:21}  {a:>{widths[0]}}  {b:>{widths[1]}}{under}" for name, (a, b), under in rows]

    def _of(self, operator: str) -> str:
        """Of what the operator is under a loss: only the NTK is that of the outputs."""
        if not self.loss:
            return ""
        return "  (of the outputs, under the loss)" if operator == "NTK" else "  (of the states)"

    def _alignments(self) -> list[tuple[str, Estimate]]:
        known = {"NTK": self.ntk, "K": self.K, "P": self.P}
        return [(name, found) for name, found in known.items() if found is not None]

    def to_xarray(self) -> xr.Dataset:
        """All of it as one dataset on "model" (by name), "operator" (NTK, K, P), "mode" and the axes of the modes.

        `alignment` and `effective_rank` (each with `..._stderr`), `principal_angle` (radians), `step_cosine`, `loss`,
        `accuracy`, and of the leading modes `eigenvalues`, `residuals` and `vectors`.
        """
        return dataset_of(self)

    def plot(self, dark: bool = False) -> Figure:
        """Principal angles, and the leading eigenvalues of both."""
        from kpflow_dyn.figures import _learning as figures

        return figures.comparison(self, dark=dark)


def on_one_mode(ranks: Sequence[float]) -> str:
    """What two effective ranks near 1 mean for an alignment; "" of others."""
    if not ranks or not max(ranks) < NEARLY_ONE:
        return ""
    return "Nearly all of each kernel is in one mode, so that the alignment says how alike these two modes are."


def on_units(outputs: bool) -> str:
    """What is compared unit by unit: K and P, and the NTK too where it is not that of outputs."""
    which = "K and P compare" if outputs else "All kernels here compare"
    return (
        f"{which} unit i of one network with unit i of the other. Networks trained from different seeds have their "
        "units in no common order: between them these alignments mean nothing."
    )


def compare(
    a: Flow | Output,
    b: Flow | Output,
    k: int = 8,
    samples: int | None = None,
    seed: int | Random = 0,
    alg: BlockLanczos | None = None,
    *,
    target: Any = None,
    loss: Loss = "squared_error",
    mask: Any = None,
    names: tuple[str, str] = ("A", "B"),
) -> Comparison:
    """Compare how gradient descent moves two models or checkpoints: cos(A, B) = tr(A^T B) / (|A|_F |B|_F).

    Without a loss, A and B are the two kernels. With a target, or with your own loss, they are the kernels by which the
    loss L(y) trains. Each then uses the Hessian h of L in its own outputs y:

        W = h^{1/2} ntk h^{1/2}        df/dtau = -W f,    f = h^{-1/2} grad L,    L = L_min + |f|^2 / 2 to second order

    The eigenvalues of W are the rates at which its modes decay. Directions that the loss does not see do not count,
    such as outputs without a target or a shift of all logits. Classes that are nearly certain count little. For a plain
    squared error W is a multiple of the kernel.

    Args:
        a, b: flows on the same inputs. Their states have the same axes and lengths, and unit i is compared with unit i.
            (Between models from different seeds, whose units have no common order, their alignments mean nothing.)
            Or their readouts, `flow.output(C, learn=True)`, with the same number of outputs; the states may then
            differ.
        k: how many leading modes to compare.
        samples: how many applications of each operator to spend on an alignment; None gives exact values where they are
            cheap.
        seed: an int, or a `Random` to continue.
        alg: the method that finds the modes; `solvers.BlockLanczos()` when None.
        target: of both, as in `forecast`.
        loss: "squared_error", "cross_entropy" as in `cross_entropy`, or a convex function (y, target) -> number; y ->
            number if there is no target.
        mask: m >= 0 of the loss, [trial, time] or in the shape of y; all ones when None. It must be None with a
            function. It does not change K and P; use `flow.where(mask)` to leave places out of them.
        names: names of the two in tables and figures, such as ("before", "after").

    Raises:
        TypeError: a or b is not a flow, or a readout of one.
        ValueError: states or outputs of different shapes; a k larger than the ranks; a target or mask that does not
            fit; a loss that is not convex in the outputs, or has no curvature; or two names that are the same.
    Source: Bjorck, Golub, Math. Comp. 27, 579 (1973), for the angles; `alignment` for the cosines.

    >>> import torch, kpflow_dyn as kp
    >>> x, right = torch.randn(2, 5, 3), torch.randint(2, (2, 5))
    >>> a, b = (kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), x))) for _ in range(2))
    >>> found = kp.compare(a, b, k=3)
    >>> found.angles.shape, found.ntk.value < 1
    ((3,), True)
    >>> readout = torch.nn.Linear(8, 2)
    >>> of_classes = kp.compare(a.output(readout), b.output(readout), k=3, target=right, loss="cross_entropy")
    >>> len(of_classes.loss), -1 <= of_classes.step <= 1
    (2, True)
    """
    _check_alike(a, b)
    if len(names) != 2 or names[0] == names[1]:
        raise ValueError(f"names are {names!r}, expected two different ones, such as ('before', 'after')")
    rng, alg = Random(seed), BlockLanczos() if alg is None else alg
    first, second, now = a.ntk, b.ntk, {}
    if target is not None or callable(loss) or loss != "squared_error" or mask is not None:
        one, other = (_under_loss(flow, loss_of(flow, target, mask, loss)) for flow in (a, b))
        first, second, now = one.kernel, other.kernel, _now(one, other)
    leading = eigs(first, k, alg, seed=rng), eigs(second, k, alg, seed=rng)
    ntk, K, P = alignment(first, second, samples, rng), *(_of_states(a, b, name, samples, rng) for name in ("K", "P"))
    ranks = _ranks(first, second, states_of(a), states_of(b), samples, rng)
    return Comparison(ntk, K, P, principal_angles(*leading), leading, **now, names=(names[0], names[1]), ranks=ranks)


def _check_alike(a: Flow | Output, b: Flow | Output) -> None:
    for flow in (a, b):
        outputs(flow)  # raises for what is no flow
    if not a.ntk.domain.matches(b.ntk.domain):
        what = "outputs" if isinstance(a, Output) and isinstance(b, Output) else "states"
        raise ValueError(f"the {what} differ: {a.ntk.domain} and {b.ntk.domain}; {_advice(a.ntk.domain, b.ntk.domain)}")


def _advice(a: Space, b: Space) -> str:
    """What to do about two spaces that do not match."""
    if a.shape[:-1] != b.shape[:-1] or a.axes != b.axes or a.xp is not b.xp:
        return "compare models on the same inputs"
    if a.shape != b.shape:
        return "to compare models of other sizes, give readouts with the same number of outputs"
    return "take one dtype for both (--dtype on the command line)"


def _of_states(a: Flow | Output, b: Flow | Output, name: str, samples: int | None, rng: Random) -> Estimate | None:
    """The alignment of an operator of the states; None where these differ."""
    first, second = (states_of(flow) for flow in (a, b))
    if not first.ntk.domain.matches(second.ntk.domain):
        return None
    return alignment(getattr(first, name), getattr(second, name), samples, rng)


def _ranks(
    first: GramOperator, second: GramOperator, a: Flow, b: Flow, samples: int | None, rng: Random
) -> dict[str, tuple[Estimate, Estimate]]:
    """The effective ranks of each operator of the two."""
    pairs = {"NTK": (first, second), "K": (a.K, b.K), "P": (GramOperator(a.P), GramOperator(b.P))}
    return {n: (effective_rank(x, samples, rng), effective_rank(y, samples, rng)) for n, (x, y) in pairs.items()}


# Under a loss


@dataclass(frozen=True, eq=False)
class Trained:
    """One of the two models: W, its loss and accuracy, and where its outputs go, -dy/dtau as a row [1, n]."""

    kernel: GramOperator
    loss: float
    accuracy: float
    moves: Array


def _under_loss(flow: Flow | Output, loss: OutputLoss) -> Trained:
    y, space = outputs(flow), flow.ntk.domain
    with full_precision(y):
        curved, value = curvature(loss, y, space), float(to_numpy(loss(y)))
        moves = on_rows(flow.ntk)(curved.gradient)
    return Trained(
        kernel=_rooted(flow.ntk, curved.rooted),
        loss=value,
        accuracy=loss.accuracy(y) if loss.of_classes else math.nan,
        moves=moves * space.xp.reshape(_counts(loss, y), moves.shape),
    )


def _rooted(ntk: GramOperator, root: Callable[[Array], Array]) -> GramOperator:
    """W = h^{1/2} ntk h^{1/2} from the root on rows in plain coordinates."""
    space = ntk.domain

    def apply(q: Array) -> Array:
        rows = root(space.to_euclidean(q).reshape((len(q), -1)))
        return space.from_euclidean(rows.reshape(q.shape))

    roots = Operator(space, space, apply, None)
    return GramOperator(roots @ ntk.factor, lambda q: apply(ntk.mv(apply(q))))


def _counts(loss: OutputLoss, y: Array) -> Array:
    """One where outputs count, else zero, as y."""
    if loss.mask is None:
        return 0 * y + 1
    return 0 * y + (loss.mask.reshape((*y.shape[:-1], -1)) > 0)


def _now(a: Trained, b: Trained) -> dict[str, Any]:
    """What a comparison says of the two and of their next steps."""
    accuracy = None if math.isnan(a.accuracy) else (a.accuracy, b.accuracy)
    return {"loss": (a.loss, b.loss), "accuracy": accuracy, "step": _cosine(a.moves, b.moves)}


def _cosine(a: Array, b: Array) -> float:
    """Of two rows [1, n]; NaN where one of them is zero."""
    sizes = [float(row_norms(rows)[0]) for rows in (a, b)]
    if not all(sizes):
        return math.nan
    first, second = (rows / size for rows, size in zip((a, b), sizes, strict=True))
    return float(np.clip(float(row_dots(first, second)[0]), -1, 1))


# The modes of both


def principal_angles(a: Modes, b: Modes) -> np.ndarray:
    """The principal angles between the spans of two sets of modes, ascending.

    Source: Bjorck, Golub, Math. Comp. 27, 579 (1973): by their sines where these are small.
    """
    second, first = sorted(map(_span, (a, b)), key=len)
    missing = np.full(min(len(a.values), len(b.values)) - len(second), np.nan)
    if not len(second):
        return missing
    products = gram(second, first)
    rest = second - combine(products, [first])
    cosines = np.clip(np.linalg.svd(to_numpy(products), compute_uv=False), 0, 1)
    sines = np.clip(np.linalg.eigvalsh(to_numpy(gram(rest, rest))), 0, 1) ** 0.5
    return np.append(np.where(cosines**2 > 0.5, np.arcsin(sines), np.arccos(cosines)), missing)


def _span(modes: Modes) -> Array:
    """The modes [b, n] whose values are not zero to round-off, as the vectors of others are any."""
    values = abs(to_numpy(modes.values))
    count = int((values > 10 * eps_of(modes.vectors) * values.max()).sum())
    return modes.space.to_euclidean(modes.vectors[:count]).reshape((count, -1))


# As data


def dataset_of(found: Comparison) -> xr.Dataset:
    """What `Comparison.to_xarray` gives."""
    import xarray as xr

    axes, under = found.modes[0].space.axes, " under the loss" if found.loss else ""
    alike = dict(found._alignments())
    each = {name: ("model", list(pair)) for name in ("loss", "accuracy") if (pair := getattr(found, name))}
    values, residuals, vectors = (
        [to_numpy(getattr(modes, name)) for modes in found.modes] for name in ("values", "residuals", "vectors")
    )
    data = {
        **_with_stderr("alignment", "operator", [alike.get(name) for name in found.ranks]),
        **_with_stderr("effective_rank", ("operator", "model"), list(found.ranks.values())),
        "principal_angle": ("mode", found.angles, {"units": "radians"}),
        "eigenvalues": (("model", "mode"), values),
        "residuals": (("model", "mode"), residuals),
        "vectors": (("model", "mode", *axes), vectors),
        "step_cosine": ((), found.step),
        **each,
    }
    coords = {"model": list(found.names), "operator": list(found.ranks), "mode": 1 + np.arange(len(found.angles))}
    title = f"{found.names[0]} and {found.names[1]}{under}"
    return xr.Dataset(data, coords, {"title": title, **versions_of(())})


def _with_stderr(name: str, dims: Any, found: Any) -> dict[str, Any]:
    """The numbers of estimates, NaN where there is none, and their standard errors."""
    numbers = [
        np.vectorize(lambda one, part=part: math.nan if one is None else getattr(one, part), otypes=[float])(found)
        for part in ("value", "stderr")
    ]
    return {name: (dims, numbers[0]), f"{name}_stderr": (dims, numbers[1])}
