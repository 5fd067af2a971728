"""How alike are networks of any size, and recordings? Their kernels on common trials and times say it.

Units of two networks have no common order, and their numbers differ. What both have are trials and times. A kernel on
these is the partial trace of an operator over the units,

    A[(b, t), (b', t')] = sum_i ntk[(b, t, i), (b', t', i)]        or of K, or of P P*

and of states or recordings S, less their mean over trials and times, A = S S^T. Each is the same for units in another
order, and that of states for any orthogonal map of the units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from kpflow_dyn._arrays import Random
from kpflow_dyn._learning.kernels import Pairs, all_pairs, jackknifed, states_in
from kpflow_dyn._learning.measures import measure_of
from kpflow_dyn._numbers.reductions import names_of
from kpflow_dyn._problems.versions import versions_of
from kpflow_dyn._shown import Row, Shown, plural, with_bar
from kpflow_dyn.solvers import Estimate

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

Of = Literal["ntk", "K", "PP", "states"]
SIMILAR = ("cka", "alignment")  # measures that are 1 of what is the same, the others are distances
FEW = 7  # distances are printed for so many items


@dataclass(frozen=True, eq=False, repr=False)
class Similarities(Shown):
    """All pairs of some networks and recordings.

    Attributes:
        names: of the items.
        of: what was compared, "ntk", "K", "PP" or "states".
        measure: by what measure.
        axes: on which axes the kernels are.
        values: [item, item], the measure itself.
        stderr: [item, item], its standard errors; 0 where exact.
        distance: [item, item]: the values, or one less the values where they are similarities.
        method: where the errors come from.

    Example as `similarities`.
    """

    names: tuple[str, ...]
    of: str
    measure: str
    axes: tuple[str, ...]
    values: np.ndarray
    stderr: np.ndarray
    distance: np.ndarray
    method: str

    def _shown(self) -> tuple[str, list[Row]]:
        pairs = list(combinations(range(len(self.names)), 2))
        near, far = (pick(pairs, key=lambda pair: self.distance[pair]) for pick in (min, max))
        title = f"Distances of {plural(len(self.names), 'item')}: {self.measure} of {self.of} on {', '.join(self.axes)}"
        rows: list[Row] = [("nearest", self._pair(*near)), ("farthest", self._pair(*far))]
        rows += [("errors", self.method), ("in order", ", ".join(self.names[i] for i in self.order))]
        if len(self.names) <= FEW:
            width = max(map(len, self.names))
            rows += [
                f"{self.names[i]:{width}}  " + " ".join(f"{self.distance[i, j]:6.3f}" for j in self.order)
                for i in self.order
            ]
        return title, rows

    def _pair(self, i: int, j: int) -> str:
        found = Estimate(self.distance[i, j], self.stderr[i, j], 0, self.method)
        return f"{self.names[i]} and {self.names[j]}, {with_bar(found, 4)}"

    @cached_property
    def linkage(self) -> np.ndarray:
        """Clusters by their average distance, as `scipy.cluster.hierarchy.linkage` has them."""
        from scipy.cluster.hierarchy import linkage
        from scipy.spatial.distance import squareform

        condensed = squareform(self.distance.clip(0), checks=False)
        return linkage(condensed, "average", optimal_ordering=True)

    @property
    def order(self) -> list[int]:
        """The items in the order of the tree, so that near ones are neighbours."""
        from scipy.cluster.hierarchy import leaves_list

        return leaves_list(self.linkage).tolist()

    def mantel(self, other: Similarities, permutations: int = 9999, seed: int = 0) -> Mantel:
        """Are items that are near in one sense near in the other? The correlation of two distance matrices.

        The p-value counts the orders of the items, among random ones, that correlate at least as much; the standard
        error is a jackknife over items, since the distances of an item depend on each other.

        Args:
            other: of the same items, such as of another operator.
            permutations: how many random orders.
            seed: of these.

        Raises:
            ValueError: other items, or fewer than 4.
        Source: Mantel, Cancer Res. 27, 209 (1967).
        Example as `similarities`.
        """
        return _mantel(self, other, permutations, seed)

    def to_xarray(self) -> xr.Dataset:
        """`value`, `stderr` and `distance` on "item" and "other", by name."""
        import xarray as xr

        numbers = {"value": self.values, "stderr": self.stderr, "distance": self.distance}
        found = {name: (("item", "other"), matrix) for name, matrix in numbers.items()}
        about = {"of": self.of, "measure": self.measure, "axes": ", ".join(self.axes), "errors": self.method}
        names = list(self.names)
        return xr.Dataset(found, {"item": names, "other": names}, about | versions_of(()))

    def plot(self, dark: bool = False) -> Figure:
        """The tree of the items, and their distances in its order."""
        from kpflow_dyn.figures import _learning as figures

        return figures.similarities(self, dark=dark)


@dataclass(frozen=True, repr=False)
class Mantel(Shown):
    """How two distance matrices of the same items go together.

    Attributes:
        correlation: of the distances of all pairs (Pearson's).
        stderr: of the correlation, by leaving out one item at a time.
        pvalue: the share of random orders of the items that correlate at least as much.

    All three are NaN where the distances of one do not differ.

    Example as `similarities`.
    """

    correlation: float
    stderr: float
    pvalue: float

    def _shown(self) -> tuple[str, list[Row]]:
        found = Estimate(self.correlation, self.stderr, 0, "")
        return f"correlation {with_bar(found, 3)}, p = {self.pvalue:.2g}", []


def similarity(
    a: Any,
    b: Any,
    of: Of = "ntk",
    measure: str = "cka",
    axes: str | Sequence[str] = ("trial", "time"),
    *,
    k: int = 4,
    unbiased: bool = False,
    over: Literal["probes", "trials"] = "probes",
    samples: int | None = None,
    seed: int | Random = 0,
    dsa: Mapping[str, Any] | None = None,
) -> Estimate:
    """How alike two networks of any sizes are, or a network and a recording, on common trials and times.

    Compared are kernels A [n, n] on the axes kept: the partial traces over all other axes of the NTK, of K, or of P P*,
    and S S^T of states S less their mean over trials and times. Places count by the quadrature weights w of an ODE's
    times, else alike. With H = 1 - r r^T, r^2 = w / sum w:

    | measure | value | of A and A |
    |---|---|---|
    | "cka" | tr(HAH HBH) / (|HAH|_F |HBH|_F) | 1 |
    | "alignment" | tr(A B) / (|A|_F |B|_F) | 1 |
    | "angles" | mean principal angle of the spans of the k leading eigenvectors, in radians | 0 |
    | "spectrum" | half the summed difference of the eigenvalues, each over their sum | 0 |
    | "bures" | (2 - 2 tr (A^1/2 B A^1/2)^1/2)^1/2, of A and B over their traces | 0 |
    | "procrustes" | 2 arcsin(bures / 2): the angle of the roots X, A = X X^T, once rotated onto each other | 0 |

    "dsa" is Dynamical Similarity Analysis of states, by the package dsa-metric, without an error.

    No measure knows the sizes of the two, nor the order of units. Silent units change nothing in states. In ntk they
    count where their weights can learn, and in P P* always, as a kick to a unit stays there.

    Args:
        a, b: flows on the same trials and times, their readouts `flow.output(C)` (of="ntk" then compares outputs), or,
            of states, arrays [trial, time, unit] such as recordings.
        of: "ntk", "K", "PP" (P P*) or "states".
        measure: as above.
        axes: which axes to keep: ("trial", "time"), or "time" or "trial" for the temporal or trial modes.
        k: how many eigenvectors "angles" compares.
        unbiased: of "cka", without the bias of few places: diagonals are left out (U-centering).
        over: what the standard error is about. "probes": the random vectors of estimated kernels; 0 where all is exact.
            "trials": which trials were drawn, as well.
        samples: as in `partial_trace`, of each kernel.
        seed: an int, or a `Random` to continue.
        dsa: options of `DSA.DSA` for measure="dsa", such as {"n_delays": 3, "rank": 8}.

    Returns:
        the value, whose bias by probes of first order is removed, and its jackknife error.

    Raises:
        TypeError: an item that is no flow, readout or array.
        ValueError: other trials or times, other places left out by `flow.where`, a recording with another `of` than
            "states", an unknown name, NaN, a kernel that is zero, or k above its rank.
    Source: Kornblith et al., arXiv 1905.00414 (CKA); Bjorck, Golub, Math. Comp. 27, 579 (1973) (angles); Bhatia, Jain,
        Lim, arXiv 1712.01504 (Bures); Williams et al., arXiv 2110.14739 (Procrustes).

    >>> import torch, kpflow_dyn as kp
    >>> x, recorded = torch.randn(4, 6, 3), torch.randn(4, 6, 50)
    >>> a, b = (kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, n), x))) for n in (5, 8))
    >>> 0 < kp.similarity(a, b).value < 1
    True
    >>> kp.similarity(a, recorded, of="states", measure="procrustes", over="trials").stderr > 0
    True
    """
    found = _pairs([a, b], of, measure, axes, k, unbiased, over, samples, seed, dsa)
    return Estimate(float(found.values[0, 1]), float(found.stderr[0, 1]), found.applications, found.method)


def similarities(
    items: Sequence[Any],
    of: Of = "ntk",
    measure: str = "cka",
    axes: str | Sequence[str] = ("trial", "time"),
    *,
    names: Sequence[str] | None = None,
    k: int = 4,
    unbiased: bool = False,
    over: Literal["probes", "trials"] = "probes",
    samples: int | None = None,
    seed: int | Random = 0,
    dsa: Mapping[str, Any] | None = None,
) -> Similarities:
    """The distances of all pairs of networks and recordings, for a tree of what is like what.

        distance = 1 - value of "cka" and "alignment";    distance = value of the other measures

    Each kernel is estimated once, so the errors of pairs that share an item depend on each other.

    Args:
        items: at least two, as in `similarity`.
        names: of the items; 1, 2, ... when None.
        of, measure, axes, k, unbiased, over, samples, seed, dsa: as in `similarity`.

    Raises:
        ValueError: as `similarity`, or fewer than two items, or names that are not as many, or not different.
    Source: Williams et al., "Generalized shape metrics on neural representations", arXiv 2110.14739.

    >>> import numpy as np, kpflow_dyn as kp
    >>> recordings = [np.random.default_rng(i // 2).standard_normal((4, 5, 3)) * (1 + i) for i in range(4)]
    >>> found = kp.similarities(recordings, of="states", names=["a", "a twice", "b", "b more"])
    >>> float(abs(found.distance[0, 1]).round(6)), round(found.mantel(found).correlation, 6)
    (0.0, 1.0)
    """
    items = list(items)
    names = [str(1 + i) for i in range(len(items))] if names is None else list(map(str, names))
    if len(items) < 2 or len(names) != len(items) or len(set(names)) < len(names):
        raise ValueError(f"{len(items)} items with names {names}, expected at least two, each with a name of its own")
    found = _pairs(items, of, measure, axes, k, unbiased, over, samples, seed, dsa)
    distance = 1 - found.values if measure in SIMILAR else found.values
    return Similarities(tuple(names), of, measure, names_of(axes), found.values, found.stderr, distance, found.method)


def _pairs(
    items: Sequence[Any],
    of: str,
    measure: str,
    axes: Any,
    k: int,
    unbiased: bool,
    over: str,
    samples: Any,
    seed: Any,
    dsa: Mapping[str, Any] | None,
) -> Pairs:
    if measure == "dsa":
        return _by_dsa(items, of, dsa or {})
    if dsa is not None:
        raise ValueError(f"dsa holds options of measure='dsa', not of {measure!r}")
    return all_pairs(items, of, measure_of(measure, k, unbiased), names_of(axes), over, samples, seed)


def _by_dsa(items: Sequence[Any], of: str, options: Mapping[str, Any]) -> Pairs:
    """The distances of dsa-metric, of states alone, without errors."""
    if of != "states":
        raise ValueError(f"measure='dsa' compares states, not {of!r}: take of='states'")
    try:
        from DSA import DSA  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("measure='dsa' needs dsa-metric: pip install 'kpflow-dyn[dsa]'") from error
    values = np.asarray(DSA([states_in(one) for one in items], **options).fit_score(), float)
    stderr = np.where(np.eye(len(values)), 0.0, np.nan)
    return Pairs(values, stderr, "dsa-metric, which gives no errors", 0)


def _mantel(a: Similarities, b: Similarities, permutations: int, seed: int) -> Mantel:
    count = len(a.names)
    if a.names != b.names or count < 4:
        raise ValueError(f"items {a.names} and {b.names}: expected the same in both, at least 4")
    pairs = np.triu_indices(count, 1)
    first, rng = a.distance[pairs], np.random.default_rng(seed)
    found = _correlation(first, b.distance[pairs])
    if np.isnan(found):
        return Mantel(found, np.nan, np.nan)
    orders = (rng.permutation(count) for _ in range(permutations))
    chance = [_correlation(first, b.distance[np.ix_(order, order)][pairs]) for order in orders]
    above = sum(one >= found - 1e-12 for one in chance)
    kept = [(pairs[0] != i) & (pairs[1] != i) for i in range(count)]
    without = np.array([_correlation(first[keep], b.distance[pairs][keep]) for keep in kept])
    return Mantel(found, float(np.sqrt(jackknifed(without))), (1 + above) / (1 + permutations))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(a, b)[0, 1])
