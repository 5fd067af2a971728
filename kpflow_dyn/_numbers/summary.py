"""Every scalar of a flow and its leading modes, from one pass of applications.

The leading eigenpairs l, u of A = J J* come first, with the changes v of the parameters that drive them, so that
J v = sqrt(l) u. What they carry is known exactly. For the rest, with y = (1 - sum v v*) xi, u = J y and z = J* u, each
random vector xi gives

    tr A     = sum l   + E |u|^2             tr A K = sum l <u, K u> + E <u, K u>
    |A|_F^2  = sum l^2 + E |(1 - sum v v*) z|^2           tr_Y A = sum l tr_Y u u* + E tr_Y u u*

Sums over trials take further vectors, of each trial's own. Where J has few columns, all pairs are leading ones.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, Random, eps_of, to_numpy
from kpflow_dyn._arrays.dots import row_dots
from kpflow_dyn._arrays.memory import rows_at_once
from kpflow_dyn._flows.flow import Flow, check_flow
from kpflow_dyn._flows.sites import CoreOperator
from kpflow_dyn._numbers.estimate import Scalars, cosine, effective_rank, restored
from kpflow_dyn._numbers.growing import growing
from kpflow_dyn._numbers.moments import moments_of
from kpflow_dyn._numbers.reductions import GROUPS, PartialTrace, Sums, probe_images
from kpflow_dyn._numbers.spectra import Modes, modes, modes_and_drives
from kpflow_dyn._progress import Progress
from kpflow_dyn._shown import Row, Shown, numbers, with_bar
from kpflow_dyn._spaces.operators import Apply, GramOperator, Operator
from kpflow_dyn._spaces.rows import CHEAP, on_rows
from kpflow_dyn._spaces.scaling import Size, at_unit_size
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.solvers import BlockLanczos, Dense, EigenSolver, Estimate, Moments
from kpflow_dyn.solvers._moments import exact, of_samples
from kpflow_dyn.solvers._orthogonalise import project_out, to_like

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

KERNELS = {"temporal": "time", "spatial": "unit", "trial": "trial"}
"""The partial traces of the NTK of a model with time by name, and the axis that each keeps."""

SAMPLES = LEAST_SAMPLES = 40
RTOL = 0.01  # of the scalars of operators without a sweep
EXACT_BYTES = 2**30  # of all eigenpairs, up to which they are found instead of estimates
TINY = 1e-150
MANY_TRIALS = 10
METHOD = "leading eigenpairs and probes"


@dataclass(frozen=True, eq=False, repr=False)
class Summary(Shown):
    """The scalars and the leading modes of a flow.

    Attributes:
        ntk, K, core: trace, Frobenius norm and effective rank of each operator.
        alignment: cos(K, NTK).
        kernels: the partial traces of the NTK that keep one axis: by "temporal" (time), "spatial" (unit), "trial", and
            by the name of the axis for others, such as "token".
        ranks: their effective ranks, by the same names.
        modes_of: all modes of each, by the same names.
        modes: the leading eigenpairs of the NTK.
        applications: of J J* in total; one J and one J* count as one.

    `found.temporal_rank` is short for `found.ranks["temporal"]`, and `found.temporal` for `found.modes_of["temporal"]`.
    The same holds for "spatial", "trial" and "token".

    Example as `summary`.
    """

    ntk: Scalars
    K: Scalars
    core: Scalars
    alignment: Estimate
    kernels: dict[str, PartialTrace]
    ranks: dict[str, Estimate]
    modes_of: dict[str, Modes]
    modes: Modes
    applications: int

    @property
    def temporal_rank(self) -> Estimate:
        return self._named("temporal", self.ranks)

    @property
    def spatial_rank(self) -> Estimate:
        return self._named("spatial", self.ranks)

    @property
    def trial_rank(self) -> Estimate:
        return self._named("trial", self.ranks)

    @property
    def token_rank(self) -> Estimate:
        return self._named("token", self.ranks)

    @property
    def temporal(self) -> Modes:
        return self._named("temporal", self.modes_of)

    @property
    def spatial(self) -> Modes:
        return self._named("spatial", self.modes_of)

    @property
    def trial(self) -> Modes:
        return self._named("trial", self.modes_of)

    @property
    def token(self) -> Modes:
        return self._named("token", self.modes_of)

    def numbers(self) -> dict[str, Estimate]:
        """All scalars by name, such as "ntk_effective_rank" and "temporal_effective_rank"."""
        found = {}
        for name in ("core", "K", "ntk"):
            of = getattr(self, name)
            found |= {f"{name}_trace": of.trace, f"{name}_norm": of.norm, f"{name}_effective_rank": of.effective_rank}
        ranks = {f"{name}_effective_rank": rank for name, rank in self.ranks.items()}
        return found | ranks | {"K_ntk_alignment": self.alignment}

    def __getitem__(self, name: str) -> Estimate:
        found = self.numbers()
        if name not in found:
            raise KeyError(f"{name!r} is no scalar of this summary; it has {', '.join(found)}")
        return found[name]

    def __str__(self) -> str:
        rows = [f"{name:24} {with_bar(found)}" for name, found in self.numbers().items()]
        values = ", ".join(f"{value:.4g}" for value in to_numpy(self.modes.values)[:5])
        return "\n".join([*rows, f"{'ntk_eigenvalue':24} {values}, ...", f"{self.applications} applications"])

    def _shown(self) -> tuple[str, list[Row]]:
        rows: list[Row] = [(name, _in_words(getattr(self, name))) for name in ("core", "K", "ntk")]
        rows += [(f"{name}_rank", with_bar(rank)) for name, rank in self.ranks.items()]
        rows += [("alignment", with_bar(self.alignment)), ("modes.values", numbers(to_numpy(self.modes.values)))]
        return "Summary", [*rows, ("applications", str(self.applications))]

    def to_xarray(self) -> xr.Dataset:
        """A dataset of all scalars, with their standard errors as attributes, and of the eigenvalues and modes of all
        kernels, such as `temporal_eigenvalue` and `temporal_mode`.
        """
        import xarray as xr

        data: dict[str, Any] = {
            name: ((), found.value, {"stderr": found.stderr, "method": found.method})
            for name, found in self.numbers().items()
        }
        for name, pairs in {**self.modes_of, "ntk": self.modes}.items():
            found = pairs.to_xarray().rename({"mode": f"{name}_number", "eigenvalues": f"{name}_eigenvalue"})
            data |= {f"{name}_eigenvalue": found[f"{name}_eigenvalue"], f"{name}_mode": found.vectors}
        return xr.Dataset(data, attrs={"applications": self.applications})

    def plot(self, dark: bool = False) -> Figure:
        """Effective ranks with error bars of two standard errors, and the leading eigenvalues of the NTK."""
        from kpflow_dyn.figures import _results as figures

        return figures.summary(self, dark=dark)

    def _named(self, name: str, found: dict[str, Any]) -> Any:
        if name not in found:
            raise AttributeError(f"there are no {name} modes of these states; there are those of {', '.join(found)}")
        return found[name]


def _in_words(found: Scalars) -> str:
    return f"effective rank {with_bar(found.effective_rank)}, trace {with_bar(found.trace)}"


def summary(
    flow: Flow,
    k: int = 10,
    samples: int = SAMPLES,
    seed: int | Random = 0,
    alg: EigenSolver | None = None,
    progress: Progress | None = None,
) -> Summary:
    """All scalars of a flow with error bars, and the leading modes, from one set of applications.

    Exact if J has few columns or rows. Else the k leading eigenvalues l_i are found first. Random vectors u then
    estimate the rest: tr ntk = sum_i l_i + E |u|^2.

    Args:
        flow: the result of `linearize`.
        k: how many eigenpairs of the NTK to find. Only the rest is then estimated.
        samples: random vectors for each estimate of the NTK; K and the core take at most this number.
        seed: an int, or a `Random` to continue.
        alg: how the eigenpairs are found; `solvers.BlockLanczos()` when None.
        progress: called while the work goes on.

    Raises:
        ValueError: k < 1, or fewer than 40 samples.

    Warns:
        UserWarning: some eigenpairs did not converge. They are returned with a flag.
    Source: docs/theory.md, "Estimates".

    >>> import torch, kpflow_dyn as kp
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(4, 5, 3))))
    >>> found = kp.summary(flow, k=3)
    >>> found.temporal_rank.value <= 5, found.modes.vectors.shape
    (True, torch.Size([3, 4, 5, 8]))
    """
    check_flow(flow)
    if k < 1:
        raise ValueError(f"k = {k} eigenpairs asked for, expected at least 1")
    if samples < LEAST_SAMPLES:
        raise ValueError(f"samples = {samples} is too few for error bars; give at least {LEAST_SAMPLES}")
    one = _Pass(flow, samples + -samples % GROUPS, Random(seed), progress or (lambda *_done: None))
    return one.summary(k, alg or BlockLanczos())


def kernels_of(space: Space) -> dict[str, str]:
    """The partial traces of an operator by name, and the axis of its space that each keeps."""
    known = {name: axis for name, axis in KERNELS.items() if axis in space.axes}
    return known | {axis: axis for axis in space.axes if axis not in known.values()}


class _Pass:
    """One pass of applications over the operators of a flow."""

    def __init__(self, flow: Flow, samples: int, rng: Random, progress: Progress) -> None:
        self.flow, self.samples, self.rng, self.progress = flow, samples, rng, progress
        self.halves: Counter[str] = Counter()
        self.ntk, self.size = at_unit_size(flow.ntk)
        self.K, self.size_of_K = at_unit_size(flow.K)
        self.kick = on_rows(self.K.factor.T)
        self.axes = kernels_of(flow.ntk.domain)
        self.sums = {name: Sums(flow.ntk.domain, (axis,), True, self.size) for name, axis in self.axes.items()}
        self.probes = dict.fromkeys(self.sums, 0)

    def summary(self, k: int, alg: EigenSolver) -> Summary:
        """Leading pairs first, then what they leave, then the operators that need no sweep."""
        most, largest = sorted((self.flow.J.domain.size, self.flow.ntk.domain.dimension))
        small = most <= CHEAP and 8 * most * largest <= EXACT_BYTES
        leading = self.watched("leading eigenpairs of ntk", self.ntk, None)
        found, v = modes_and_drives(leading, most if small else min(k, most), Dense() if small else alg, self.rng)
        self.halves["leading eigenpairs of ntk"] = 2 * found.applications  # without calls that were for timing only
        known = self.add_leading(found)
        if small:
            ntk = exact(known, self.applications, "exact: all eigenpairs")
            trace = ntk.trace
        else:
            ntk, trace = self.add_probes(known, v[: int((to_numpy(found.values) > 0).sum())])
        kernels = {name: kept.partial_trace(self.probes[name], self.applications) for name, kept in self.sums.items()}
        core, size_of_core = at_unit_size(self.flow.core)
        K, core = self.moments("K", self.K), self.moments("core", core)
        return Summary(
            ntk=_scalars(ntk, self.size, trace),
            K=_scalars(K, self.size_of_K, K.trace),
            core=_scalars(core, size_of_core, core.trace),
            alignment=_alignment(ntk, K),
            modes=replace(leading := found.first(k), values=self.size.times(leading.values)),
            kernels=kernels,
            ranks={name: effective_rank(kernel) for name, kernel in kernels.items()},
            modes_of={name: modes(of, self.axes[name], k=of.domain.dimension) for name, of in kernels.items()},
            applications=self.applications,
        )

    @property
    def applications(self) -> int:
        """Of J J* so far."""
        return (sum(count for stage, count in self.halves.items() if stage.endswith(" ntk")) + 1) // 2

    def add_leading(self, found: Modes) -> np.ndarray:
        """What the leading pairs carry of tr A, |A|_F^2 and tr A K."""
        values, space = to_numpy(found.values), found.space
        roots, kicked = to_like(np.sqrt(abs(values)), found.vectors), 0.0
        step = rows_at_once(space.size, found.vectors)
        for i in range(0, len(values), step):
            u = space.to_euclidean(found.vectors[i : i + step]).reshape((-1, space.size))
            w = roots[i : i + step, None] * u
            kicked += _squares(self.kick(w)).sum()  # <w, K w>
            for kept in self.sums.values():
                kept.add(w, w)
        return np.array([values.sum(), (values**2).sum(), kicked])

    def add_probes(self, known: np.ndarray, q: Array) -> tuple[Moments, Estimate]:
        """tr A, |A|_F^2 and tr A K; and the trace, of which each trial's own vectors tell more."""
        apart = self.probes_apart()
        ntk = self.watched("probes of ntk", self.ntk, self.samples + (apart + 1) // 2)
        inside = [name for name in self.sums if apart and name != "trial"]
        self.probes = {name: apart if name in inside else self.samples for name in self.sums}
        backward, rows, eps = on_rows(ntk.factor.T), [], eps_of(q)
        for first, u in probe_images(ntk.factor, q, self.samples, self.rng):
            rest, _c = project_out(backward(u), [q])
            rows.append(np.stack([_squares(u), _squares(rest), _squares(self.kick(u))]))
            for name in set(self.sums) - set(inside):
                self.sums[name].add_probes(u, u, first)
        found = of_samples(known[:, None] + np.concatenate(rows, 1), self.applications, METHOD, eps)
        if ntk.apart is None:
            return found, found.trace
        traces = []
        for first, u in probe_images(ntk.apart, q, apart, self.rng):
            traces.append(_squares(u))
            for name in inside:
                self.sums[name].add_probes(u, u, first)
        own = of_samples(known[:1, None] + np.concatenate(traces)[None], self.applications, METHOD, eps)
        return found, _together(found.trace, own.trace)

    def probes_apart(self) -> int:
        """How many vectors of each trial's own: fewer where they average over many trials, as they cost more."""
        if self.flow.ntk.apart is None:
            return 0
        share = 3 if self.flow.ntk.domain.shape[0] > MANY_TRIALS else 1
        return max(1, self.samples // share // GROUPS) * GROUPS

    def moments(self, name: str, op: GramOperator) -> Moments:
        """tr and |.|_F^2 of an operator that needs no sweep, exact where that is cheap."""
        if isinstance(op, CoreOperator) and op.spectrum() is not None:
            return moments_of(op, None, self.rng)
        cheap = min(op.domain.size, op.factor.domain.size) <= CHEAP
        stage = f"trace, norm and effective rank of {name}"
        watched = self.watched(stage, op, None if cheap else self.samples)
        found = moments_of(watched, None, self.rng) if cheap else self.to_one_percent(watched)
        done = self.halves[stage] // 2  # fewer than at most
        self.progress(stage, done, None if cheap else done)
        return found

    def to_one_percent(self, op: GramOperator) -> Moments:
        """tr and |.|_F^2 from as few samples as show all their scalars to 1%, or from all."""
        course = growing(op, self.rng, only_trace=False)
        count = min(course.first, self.samples)
        found = course(count)
        while count < self.samples and any(
            each.stderr > RTOL * abs(each.value) for each in (found.trace, found.norm, found.effective_rank)
        ):
            count = min(2 * count, self.samples)
            found = course(count)
        return found

    def watched(self, stage: str, op: GramOperator, total: int | None) -> GramOperator:
        """The same operator, which counts and reports what is applied in this stage, a factor being one half."""

        def counted(factor: Operator) -> Operator:
            return Operator(factor.domain, factor.codomain, note(factor.mv), note(factor.T.mv))

        def note(apply: Apply) -> Apply:
            def applied(q: Array) -> Array:
                image = apply(q)
                self.halves[stage] += len(q)
                self.progress(stage, self.halves[stage] // 2, total)
                return image

            return applied

        self.progress(stage, 0, total)
        apart = None if op.apart is None else counted(op.apart)
        return GramOperator(counted(op.factor), None, apart, lambda: op.direct_sum)


def _scalars(found: Moments, size: Size, trace: Estimate) -> Scalars:
    """Those of an operator from its moments over its size, and its trace."""
    return Scalars(restored(trace, size), restored(found.norm, size), found.effective_rank)


def _together(a: Estimate, b: Estimate) -> Estimate:
    """The mean of independent estimates, each weighted by its precision."""
    weights = np.array([1 / max(e.stderr, TINY) ** 2 for e in (a, b)])
    value = float(weights @ [a.value, b.value] / weights.sum())
    return Estimate(value, float(weights.sum() ** -0.5), b.applications, b.method)


def _squares(rows: Array) -> np.ndarray:
    return to_numpy(row_dots(rows, rows))


def _alignment(ntk: Moments, K: Moments) -> Estimate:
    """cos(K, A) from tr A K and |A|_F^2, which were found together, and from |K|_F^2; NaN where one of them is zero."""
    if not (ntk.means[1] > 0 and K.means[1] > 0):
        warnings.warn(
            "the alignment of K and the NTK is not known, as "
            + ("K is zero: no parameter changes a step" if not K.means[1] > 0 else "the NTK is zero: nothing is learnt")
            + ". Check what the operators learn from. K of an ODE whose start alone learns is zero, and flow.nodal has "
            "that of its steps, with the start",
            stacklevel=4,
        )
        return Estimate(math.nan, math.nan, ntk.applications, ntk.method)
    covariance = np.zeros((3, 3))
    covariance[:2, :2], covariance[2, 2] = ntk.covariance[np.ix_([2, 1], [2, 1])], K.covariance[1, 1]
    means, count = np.array([ntk.means[2], ntk.means[1], K.means[1]]), max(ntk.count, K.count)
    floor = max(ntk.floor, K.floor)
    return Moments(means, covariance, count, ntk.applications, ntk.method, floor).estimate(cosine)
