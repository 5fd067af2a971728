"""What stands in the way of learning an error: the readout, the dynamics, or that nothing is written along it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, full_precision, like_numpy, to_numpy
from kpflow_dyn._flows.flow import ConstraintFlow, Flow, ODEFlow, Output
from kpflow_dyn._learning.forecasting import checked_target
from kpflow_dyn._numbers.estimate import trace
from kpflow_dyn._numbers.singular import svds
from kpflow_dyn._numbers.spectra import eigs
from kpflow_dyn._shown import ShownAsText, type_name
from kpflow_dyn._spaces.operators import GramOperator
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.solvers import BlockLanczos

if TYPE_CHECKING:
    import xarray as xr

FACTORS = ("readout", "dynamics", "written")
WEAK = 0.3  # a factor below this part of its reference stands in the way
SOLVER = BlockLanczos(tol=1e-2)  # of the largest values, which it finds to 1%
RTOL = 0.01  # of typical values, unless the caller says how many probes
EXPLODES = 100.0  # and one of the dynamics above this multiple explodes


@dataclass(frozen=True, eq=False, repr=False)
class Obstacles(ShownAsText):
    """How fast gradient descent moves the outputs along errors, as a product of three factors and a sum.

        rate = <e, NTK e> / |e|^2 = readout dynamics written + own

    Attributes:
        names: of the errors.
        rate: the speed of the outputs along e [error].
        own: the part of the readout's own weights [error]; 0 if they do not learn.
        factors: `readout` |C* e|^2 / |e|^2, `dynamics` |l|^2 / |C* e|^2, `written` <l, K l> / |l|^2, l = P* C* e
            [error, factor].
        kept: the value of `dynamics` if kicks stayed as they are, A_t = 1 (for an ODE A = 0); NaN if the model has no
            steps [error].
        typical: the mean of each factor over random directions, tr(C C*) / out, tr(P P*) / n, tr(K) / n [factor].
        largest: the largest possible value of each factor [factor]; NaN if it was not asked for.

    Example as `obstacles`.
    """

    names: tuple[str, ...]
    rate: np.ndarray
    own: np.ndarray
    factors: np.ndarray
    kept: np.ndarray
    typical: np.ndarray
    largest: np.ndarray

    @property
    def relative(self) -> np.ndarray:
        """The factors over what they are compared with: typical values, and `kept` for the dynamics [error, factor]."""
        reference = np.broadcast_to(self.typical, self.factors.shape).copy()
        reference[:, 1] = np.where(np.isnan(self.kept), reference[:, 1], self.kept)
        return self.factors / np.maximum(reference, 1e-300)

    @property
    def words(self) -> tuple[str, ...]:
        """What stands in the way of each, the worst first, in plain words; "" for nothing."""
        return tuple(_words(one, math.isnan(kept)) for one, kept in zip(self.relative, self.kept, strict=True))

    def to_xarray(self) -> xr.Dataset:
        """All numbers, labelled."""
        import xarray as xr

        columns = {name: ("error", list(getattr(self, name))) for name in ("rate", "own", "kept", "words")}
        tables = {name: (("error", "factor"), getattr(self, name)) for name in ("factors", "relative")}
        ends = {name: ("factor", getattr(self, name)) for name in ("typical", "largest")}
        return xr.Dataset(columns | tables | ends, {"error": list(self.names), "factor": list(FACTORS)})

    def __str__(self) -> str:
        width = max(7, *map(len, self.names))
        head = f"{'error':{width}} {'rate':>9} {'own':>9} {'readout':>9} {'dynamics':>9} {'kept':>9} {'written':>9}"
        rows = [
            _row(name, width, (rate, own, *f[:2], kept, f[2])) + f"  {words}"
            for name, rate, own, f, kept, words in zip(
                self.names, self.rate, self.own, self.factors, self.kept, self.words, strict=True
            )
        ]
        ends = [("typical", self.typical)] + [("largest", self.largest)] * (not np.isnan(self.largest).any())
        beside = [_row(name, width, (math.nan, math.nan, *f[:2], math.nan, f[2])) for name, f in ends]
        return "\n".join([head, *rows, *beside]).replace("nan", "  ·")


def obstacles(
    output: Output,
    errors: Mapping[str, Array] | Array,
    *,
    samples: int | None = None,
    seed: int = 0,
    largest: bool = True,
) -> Obstacles:
    """Find why an error is hard to learn: the parameters do not write along it, or it is forgotten, or not read.

    Take an error e of the outputs, the readout C, and l = P* C* e, the kicks that would move the outputs along e. Then

        <e, NTK e>   |C* e|^2   |P* C* e|^2   <l, K l>
        ---------- = -------- x ----------- x --------  + |V* e|^2 / |e|^2  where the readout's own weights learn,
          |e|^2       |e|^2      |C* e|^2      |l|^2

    The three factors are the gain of the readout, the gain of the dynamics, and how much the parameters write along l.
    K is the obstacle if they write less than along a random direction. P is the obstacle if kicks are forgotten, so
    that its gain is less than if they stayed as they are, or if it explodes. C is the obstacle if the readout reads
    those directions less than others. The equation is exact except for an ODE, whose P and K are those of the field:
    there it holds to the order of the mesh (see `Flow`).

    Args:
        output: a readout of a flow, `flow.output(C, learn=...)`.
        errors: by name, as one block [error, ...], or one error alone. Each is [trial, time, out], such as y - target,
            or the gradient of another loss in y. For a `StaticProblem` it has the axes of the outputs.
        samples: random probes for the typical values, as in `trace`. By default these are exact for small models, and
            else right to 1%.
        seed: of the probes.
        largest: whether to find the largest values too. This may cost more than all the rest.

    Raises:
        TypeError: the argument is not a readout of a flow.
        ValueError: no errors, or errors that have another shape, are not finite, or are zero everywhere.
    Source: docs/theory.md, "What it predicts".

    >>> import torch, kpflow_dyn as kp
    >>> cell, x = torch.nn.RNNCell(2, 32).double(), torch.randn(4, 6, 2, dtype=torch.float64)
    >>> y = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).output(torch.nn.Linear(32, 1))
    >>> found = kp.obstacles(y, {"constant": torch.ones(4, 6, 1).double()})
    >>> bool(abs(found.factors.prod() / found.rate[0] - 1) < 1e-10)
    True
    """
    if not isinstance(output, Output):
        raise TypeError(f"got {type_name(output)}, expected a readout of a flow, flow.output(C)")
    named = errors if isinstance(errors, Mapping) else _numbered(errors, output.ntk.domain.shape)
    if not named:
        raise ValueError("no errors given; expected a mapping of names to arrays like the outputs")
    with full_precision(output.values):
        e = _unit_errors(named, output.ntk.domain)
        pulled = to_numpy(output.J.T.mv(e)).astype(np.float64) ** 2
        states = sum(output.flow.parts.values())
        factors, kept = _factors(output, e)
        typical, most = _references(output, samples, Random(seed), largest)
    rate, own = pulled.sum(1), pulled[:, states:].sum(1)
    return Obstacles(tuple(named), rate, own, factors, kept, typical, most)


def _numbered(errors: Array, shape: tuple[int, ...]) -> dict[str, Array]:
    """The errors of a block [error, ...], or the only one."""
    is_one = tuple(getattr(errors, "shape", ())) == shape
    return {str(i): error for i, error in enumerate([errors] if is_one else errors)}


def _unit_errors(named: Mapping[str, Array], space: Space) -> Array:
    """Errors of norm one [error, *shape]."""
    found = [space.counted(checked_target(e, None, space, f"error {name!r}")) for name, e in named.items()]
    block, norms = _unit(array_namespace(space.like).stack(found), space)
    if not norms.all():
        raise ValueError(f"the error {list(named)[int(norms.argmin())]!r} is zero everywhere; leave it out")
    return block


def _factors(output: Output, e: Array) -> tuple[np.ndarray, np.ndarray]:
    """The factors [error, factor] of errors of norm one, and `kept` [error]."""
    flow, space = output.flow, output.flow.ntk.domain
    read, of_readout = _unit(output.C.T.mv(e), space)
    kicks, of_dynamics = _unit(flow.P.T.mv(read), flow.P.domain)
    written = to_numpy(flow.K.domain.inner(kicks, flow.K.mv(kicks))).astype(np.float64)
    kept = np.full(len(written), math.nan) if isinstance(flow, ConstraintFlow) else _kept(read, flow)
    return np.stack([of_readout**2, of_dynamics**2, written], 1), kept


def _unit(vectors: Array, space: Space) -> tuple[Array, np.ndarray]:
    """Vectors [b, *shape] of norm one, and their norms; zeros stay."""
    flat = space.to_euclidean(vectors)
    most = np.abs(to_numpy(flat)).reshape((len(flat), -1)).max(1).astype(np.float64)
    shape = (-1,) + (1,) * len(space.shape)
    scaled = vectors / like_numpy(np.where(most > 0, most, 1.0).reshape(shape), space.like)
    norms = to_numpy(space.inner(scaled, scaled)).astype(np.float64) ** 0.5
    return scaled / like_numpy(np.where(norms > 0, norms, 1.0).reshape(shape), space.like), most * norms


def _kept(read: Array, flow: Flow) -> np.ndarray:
    """|l|^2 of vectors of norm one [b, trial, time, unit] with P of kicks that stay: sums over all later times."""
    space = flow.ntk.domain
    axis = 1 + space.axes.index("time")
    w = np.ones(1) if space.measure is None else to_numpy(space.measure).astype(np.float64)
    weighted = w * to_numpy(read).astype(np.float64)
    sums = np.flip(np.cumsum(np.flip(weighted, axis), axis), axis)
    kicks = sums - weighted / 2 if isinstance(flow, ODEFlow) else sums / w
    return (w * kicks**2).reshape((len(kicks), -1)).sum(1)


def _references(output: Output, samples: int | None, rng: Random, largest: bool) -> tuple[np.ndarray, np.ndarray]:
    """Each factor in the mean over random directions, and the largest, if that is wanted [factor]."""
    flow, weight = output.flow, to_numpy(output.weight).astype(np.float64)
    P, K, n = flow.P, flow.K, flow.P.domain.dimension
    rtol = RTOL if samples is None else None
    traces = [trace(op, samples, rng, rtol).value for op in (GramOperator(P), K)]
    typical = np.array([(weight**2).sum() / len(weight), *(found / n for found in traces)])
    if not largest:
        return typical, np.full(len(FACTORS), math.nan)
    gains = float(svds(P, 1, SOLVER, rng).values[0]) ** 2, float(eigs(K, 1, SOLVER, rng).values[0])
    return typical, np.array([np.linalg.norm(weight, 2) ** 2, *gains])


def _words(relative: np.ndarray, static: bool) -> str:
    readout, dynamics, written = relative
    forgotten = "P: what is written fades on the way" if static else "P: what is written is forgotten"
    compared = "of a typical direction" if static else "of what lasting kicks would do"
    found = [
        (written, f"K: little is written along it ({written:.2g} of a typical direction)"),
        (dynamics, f"{forgotten} ({dynamics:.2g} {compared})"),
        (readout, f"C: the readout hardly reads it ({readout:.2g} of a typical direction)"),
    ]
    weak = [text for value, text in sorted(found) if value < WEAK]
    exploding = (
        [f"P: what is written explodes ({_round(dynamics)} times {compared.removeprefix('of ')})"]
        if dynamics > EXPLODES
        else []
    )
    return "; ".join(exploding + weak)


def _round(value: float) -> str:
    """To two digits, without an exponent where one reads it better so."""
    return f"{float(f'{value:.2g}'):.0f}" if value < 1e5 else f"{value:.2g}"


def _row(name: str, width: int, numbers: tuple[float, ...]) -> str:
    return " ".join([f"{name:{width}}", *(f"{number:9.3g}" for number in numbers)])
