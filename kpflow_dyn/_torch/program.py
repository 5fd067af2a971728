"""A step's tangent as a straight line of updates, target += M source, between named blocks of values.

The blocks are "z" (the state before the step), "a" (the kicks), "v0", "v1", ... (operands of products) and "out" (the
state after it). Run in order, the updates are the step's tangent; run backwards with each one transposed, they are its
adjoint. Bound to the arrays of a span of times they become plain in-place tensor operations on views made beforehand.

Arrays are laid out [time, trial, probe, width], so that a step is one contiguous matrix of trial x probe rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import vjp, vmap

from kpflow_dyn._torch.transforms import jvp

Run = Callable[[int], object]
Cut = Callable[[Tensor], Sequence[Tensor]]  # data [time, ...] -> those of each field of a span


def each_time(span: slice) -> Cut:
    """One field for each time of a span."""
    return lambda values: values[span].unbind(0)


def all_times(span: slice) -> Cut:
    """One single field for all times of a span."""
    return lambda values: [values[span]]


@dataclass
class Views:
    """Values [time, trial, probe, width], as the fields that a program takes one after another."""

    values: Tensor

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.values.shape[-1]

    def fields(self, start: int, length: int) -> Sequence[Tensor]:
        """The columns start:start+length of each field, [trial, probe, length] (or all times at once)."""
        raise NotImplementedError

    def rows(self, start: int, length: int) -> Sequence[Tensor]:
        """The same as matrices [trial * probe, length]."""
        raise NotImplementedError


class Steps(Views):
    """One time after another."""

    def fields(self, start: int, length: int) -> Sequence[Tensor]:
        return self.values.narrow(-1, start, length).unbind(0)

    def rows(self, start: int, length: int) -> Sequence[Tensor]:
        # [time, trial * probe, width]
        return self.values.view(len(self.values), -1, self.width).narrow(-1, start, length).unbind(0)


class AllTimes(Views):
    """All times as one single field."""

    def fields(self, start: int, length: int) -> list[Tensor]:
        return [self.values.narrow(-1, start, length)]

    def rows(self, start: int, length: int) -> list[Tensor]:
        return [self.values.view(-1, self.width).narrow(-1, start, length)]  # [time * trial * probe, width]


@dataclass(frozen=True)
class Range:
    """Columns start:start+length of a named block."""

    block: str
    start: int
    length: int

    def meets(self, other: Range) -> bool:
        return (
            self.block == other.block
            and self.start < other.start + other.length
            and other.start < self.start + self.length
        )


@dataclass
class Update:
    """sink += M source, or transposed source += M^T sink."""

    sink: Range
    source: Range

    def overwrites(self, transposed: bool) -> bool:
        """Whether it can also write its target, without reading it."""
        return False

    def targets(self, transposed: bool) -> list[Range]:
        """What it adds to."""
        return [self.source if transposed else self.sink]

    def reads(self, transposed: bool) -> list[Range]:
        """What it takes its values from."""
        return [self.sink if transposed else self.source]

    def ends(self, blocks: Mapping[str, Views], transposed: bool) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Target and source, as fields."""
        sink, source = (blocks[r.block].fields(r.start, r.length) for r in (self.sink, self.source))
        return (source, sink) if transposed else (sink, source)

    def bind(self, blocks: Mapping[str, Views], fresh: bool, cut: Cut, transposed: bool) -> Run:
        """The update of a field, as a function of the field's number; `cut` takes its data for each of them."""
        raise NotImplementedError


@dataclass
class ScaledUpdate(Update):
    """sink[i] += sum_g c[g, i] source[g, i]: elementwise, over one or more gates g.

    `coefficients` are c [time, trial, 1, gate * i], None for c = 1. A step of zero stands for one element in the place
    of a range (a broadcast, or a sum).
    """

    gates: int
    sink_step: int
    source_step: int
    coefficients: Tensor | None

    def overwrites(self, transposed: bool) -> bool:
        return self.sink_step == self.source_step == 1 and (self.gates == 1 or transposed)

    def bind(self, blocks: Mapping[str, Views], fresh: bool, cut: Cut, transposed: bool) -> Run:
        target, source = self.ends(blocks, transposed)
        if (self.source_step if transposed else self.sink_step) == 0:
            return self.bind_sum(target, source, cut)
        if self.gates > 1:
            return self.bind_gates(target, source, fresh, cut, transposed)
        return _elementwise(target, source, self.scales(cut), fresh)

    def scales(self, cut: Cut) -> Sequence[Tensor] | None:
        return None if self.coefficients is None else cut(self.coefficients)

    def bind_sum(self, target: Sequence[Tensor], source: Sequence[Tensor], cut: Cut) -> Run:
        c = self.scales(cut)
        if c is None:
            return lambda i: target[i].add_(source[i].sum(-1, keepdim=True))
        return lambda i: target[i].add_((source[i] * c[i]).sum(-1, keepdim=True))

    def bind_gates(self, target, source, fresh: bool, cut: Cut, transposed: bool) -> Run:
        shape = (self.gates, self.sink.length)
        c = [scale.unflatten(-1, shape) for scale in self.scales(cut) or ()]  # [trial, 1, gate, i]
        if transposed:
            # [trial, probe, gate, i] and [trial, probe, 1, i]
            wide, spread = [t.unflatten(-1, shape) for t in target], [s.unsqueeze(-2) for s in source]
            return _elementwise(wide, spread, c, fresh)
        gates = [s.unflatten(-1, shape) for s in source]  # [trial, probe, gate, i]
        each = [([v[..., g, :] for v in gates], [v[..., g, :] for v in c]) for g in range(self.gates)]
        return _in_turn([_elementwise(target, values, scales, False) for values, scales in each])


@dataclass
class DenseUpdate(Update):
    """sink[i] += sum_j D[i, j] source[j] with small blocks D [time, trial, i, j]."""

    block: Tensor

    def bind(self, blocks: Mapping[str, Views], fresh: bool, cut: Cut, transposed: bool) -> Run:
        target, source = self.ends(blocks, transposed)
        steps = cut(self.block.transpose(-1, -2) if transposed else self.block)  # [trial, i, j]
        return lambda i: target[i].add_(torch.einsum("...ij,...pj->...pi", steps[i], source[i]))


@dataclass
class EntriesUpdate(Update):
    """sink[rows[k]] += c[k] source[columns[k]], the few entries c [time, trial, k] of a block that is mostly zero."""

    rows: Tensor
    columns: Tensor
    entries: Tensor

    def bind(self, blocks: Mapping[str, Views], fresh: bool, cut: Cut, transposed: bool) -> Run:
        target, source = self.ends(blocks, transposed)
        to, of = (self.columns, self.rows) if transposed else (self.rows, self.columns)
        steps = cut(self.entries.unsqueeze(-2))  # [trial, 1, k]

        def add(i: int) -> None:
            values = steps[i] * source[i][..., of]  # [trial, probe, k]
            target[i].scatter_add_(-1, to.expand(values.shape), values)

        return add


@dataclass
class FunctionUpdate(Update):
    """sink += derivative of a traced function (x, z, a) -> sink in z and in the kicks, found at each application."""

    kicks: Range
    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    points: tuple[Tensor, Tensor, Tensor]

    def targets(self, transposed: bool) -> list[Range]:
        return [self.source, self.kicks] if transposed else [self.sink]

    def reads(self, transposed: bool) -> list[Range]:
        return [self.sink] if transposed else [self.source, self.kicks]

    def bind(self, blocks: Mapping[str, Views], fresh: bool, cut: Cut, transposed: bool) -> Run:
        sink, z = self.ends(blocks, transposed=False)
        a = blocks[self.kicks.block].fields(self.kicks.start, self.kicks.length)
        row, probes = self.function, z[0].ndim - 2
        for _ in range(probes):  # over trials, or times and trials
            row = vmap(row)
        points = list(zip(*map(cut, self.points), strict=True))

        def at(i: int) -> tuple[Callable[[Tensor, Tensor], Tensor], tuple[Tensor, Tensor]]:
            x, z0, a0 = points[i]
            return lambda z, a: row(x, z, a), (z0, a0)

        def push(i: int) -> None:
            function, here = at(i)
            image = vmap(lambda dz, da: jvp(function, here, (dz, da))[1], probes)(z[i], a[i])
            sink[i].add_(image.movedim(0, probes))  # [probe, trial, sink] -> [trial, probe, sink]

        def pull(i: int) -> None:
            function, here = at(i)
            for target, image in zip((z[i], a[i]), vmap(vjp(function, *here)[1], probes)(sink[i]), strict=True):
                target.add_(image.movedim(0, probes))  # [probe, trial, width] -> [trial, probe, width]

        return pull if transposed else push


@dataclass
class MatrixUpdate(Update):
    """sink += source W for W [d, m], and its transpose `turned` [m, d]; products like columns in one piece best."""

    matrix: Tensor
    turned: Tensor

    def overwrites(self, transposed: bool) -> bool:
        return True

    def bind(self, blocks: Mapping[str, Views], fresh: bool, cut: Cut, transposed: bool) -> Run:
        to, frm = (self.source, self.sink) if transposed else (self.sink, self.source)
        matrix = self.matrix.T if transposed else self.turned.T
        target, source = blocks[to.block].rows(to.start, to.length), blocks[frm.block].rows(frm.start, frm.length)
        beta = 0 if fresh else 1
        return lambda i: target[i].addmm_(source[i], matrix, beta=beta)


@dataclass
class ScatteredUpdate(Update):
    """sink[kicks[i, j]] += sum_k source[i, k] W[k, j], over inner rows i and to kicks anywhere."""

    matrix: Tensor
    kicks: Tensor

    def bind(self, blocks: Mapping[str, Views], fresh: bool, cut: Cut, transposed: bool) -> Run:
        sink, source = self.ends(blocks, transposed=False)
        inner, flat = (self.kicks.shape[0], -1), self.kicks.reshape(-1)

        def push(i: int) -> None:
            # [trial, probe, r, d] @ [d, m] -> [trial, probe, r * m]
            sink[i].index_add_(-1, flat, (source[i].unflatten(-1, inner) @ self.matrix).flatten(-2))

        def pull(i: int) -> None:
            # [trial, probe, r, m] @ [m, d] -> [trial, probe, r * d]
            source[i].add_((sink[i][..., flat].unflatten(-1, inner) @ self.matrix.T).flatten(-2))

        return pull if transposed else push


@dataclass
class LinearUpdate(Update):
    """sink[kicks] += f(source) for a linear function f, the same for every row, too large for a matrix."""

    kicks: Tensor
    function: Callable[[Tensor], Tensor]

    def bind(self, blocks: Mapping[str, Views], fresh: bool, cut: Cut, transposed: bool) -> Run:
        sink, source = self.ends(blocks, transposed=False)
        like = source[0].new_zeros(source[0].shape[-1])
        forward, pull = vmap(self.function), vmap(vjp(self.function, like)[1])

        def push(i: int) -> None:
            rows = source[i].flatten(0, -2)  # [(time, trial,) probe, element] -> [row, element]
            sink[i].index_add_(-1, self.kicks, forward(rows).unflatten(0, source[i].shape[:-1]))

        def back(i: int) -> None:
            rows = sink[i][..., self.kicks].flatten(0, -2)  # [row, kick]
            source[i].add_(pull(rows)[0].unflatten(0, source[i].shape[:-1]))

        return back if transposed else push


def bind(
    updates: Sequence[Update],
    blocks: Mapping[str, Views],
    fresh: Collection[str],
    cut: Cut,
    *,
    transposed: bool = False,
) -> Run:
    """The program of one field, a step or all times of a span, as a function of the field's number.

    The `fresh` targets begin at zero, whatever they hold; the others begin with what they hold.
    """
    ordered = list(reversed(updates)) if transposed else list(updates)
    firsts = _firsts(ordered, fresh, transposed)
    covered = [r for update, first in zip(ordered, firsts, strict=True) if first for r in update.targets(transposed)]
    gaps = [gap for name in fresh for gap in _gaps(name, blocks[name].width, covered)]
    runs = [_zero(blocks[gap.block].fields(gap.start, gap.length)) for gap in gaps]
    runs += [u.bind(blocks, first, cut, transposed) for u, first in zip(ordered, firsts, strict=True)]
    return _in_turn(runs)


def reached(updates: Sequence[Update], names: Collection[str]) -> list[Update]:
    """The updates that anything in these blocks gets to, in order."""
    live = [Range(name, 0, 2**62) for name in names]
    found = []
    for update in updates:
        if any(r.meets(other) for r in update.reads(False) for other in live):
            found.append(update)
            live += update.targets(False)
    return found


def _firsts(updates: Sequence[Update], fresh: Collection[str], transposed: bool) -> list[bool]:
    """Which updates may overwrite: their target begins at zero, and nothing before them has read or written it."""
    firsts, touched = [], []
    for update in updates:
        targets = update.targets(transposed)
        free = not any(target.meets(other) for target in targets for other in touched)
        firsts.append(free and targets[0].block in fresh and update.overwrites(transposed))
        touched += targets + update.reads(transposed)
    return firsts


def _gaps(name: str, width: int, covered: list[Range]) -> list[Range]:
    gaps, end = [], 0
    for r in sorted((r for r in covered if r.block == name), key=lambda r: r.start):
        if r.start > end:
            gaps.append(Range(name, end, r.start - end))
        end = r.start + r.length
    return gaps + ([Range(name, end, width - end)] if end < width else [])


def _zero(target: Sequence[Tensor]) -> Run:
    return lambda i: target[i].zero_()


def _elementwise(target: Sequence[Tensor], source: Sequence[Tensor], c: Sequence[Tensor] | None, fresh: bool) -> Run:
    """target (+)= c source, in one tensor operation."""
    if c is None:
        return lambda i: target[i].copy_(source[i]) if fresh else target[i].add_(source[i])
    if fresh:
        return lambda i: torch.mul(source[i], c[i], out=target[i])
    return lambda i: target[i].addcmul_(source[i], c[i])


def _in_turn(runs: list[Run]) -> Run:
    def step(i: int) -> None:
        for run in runs:
            run(i)

    return step
