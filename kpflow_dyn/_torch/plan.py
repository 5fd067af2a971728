"""Turn an analysed step and its data into the straight line of updates that is its tangent.

The kicks are cut into blocks of their own, one for each site where sites do not overlap, so that the products with a
site's variables are one matrix product for all probes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kpflow_dyn._torch.glue import Glue, StepProduct
from kpflow_dyn._torch.pattern import Colouring, Segment, Stage, colour_entries
from kpflow_dyn._torch.program import (
    DenseUpdate,
    EntriesUpdate,
    FunctionUpdate,
    LinearUpdate,
    MatrixUpdate,
    Range,
    ScaledUpdate,
    ScatteredUpdate,
    Update,
)
from kpflow_dyn._torch.rows import COLOURS_TOGETHER, coefficients, jacobians, linear_map, matrix, point_of, sinks_of
from kpflow_dyn._torch.transforms import each_row
from kpflow_dyn.tracing._rows import RowFunctions
from kpflow_dyn.tracing._steps import AnalysedStep

LARGEST_MATRIX = 2**24  # elements; of a linear map that is no matrix by itself
BLOCKS_BYTES = 2**28
SPARSE = 16  # where no more than one entry in so many is there, others are left out


@dataclass(frozen=True)
class KickBlock:
    """The kicks start:stop, held in a block of that name."""

    name: str
    start: int
    stop: int


def kick_blocks(step: AnalysedStep, glue: Glue) -> list[KickBlock]:
    """A cut of the kicks such that every site, and every product with inner rows, lies in one block."""
    together = [site.kicks for site in step.sites]
    together += [p.kicks for p in glue.products if len(p.kicks) > 1 or is_matrix_free(p)]
    if glue.colouring is None:
        together.append(np.arange(step.kicks.size))
    inside = np.zeros(step.kicks.size + 1, bool)  # a cut before this kick would part what is together
    for kicks in together:
        inside[kicks.min() + 1 : kicks.max() + 1] = True
    edges = {0, step.kicks.size} | {int(edge) for kicks in together for edge in (kicks.min(), kicks.max() + 1)}
    cuts = sorted(edge for edge in edges if not inside[edge])
    return [KickBlock(f"a{i}", *ends) for i, ends in enumerate(pairwise(cuts))]


def plan_updates(
    glue: Glue, rows: RowFunctions, blocks: list[KickBlock], x: Tensor, z: Tensor
) -> tuple[list[Update], dict[str, int], Tensor]:
    """The updates of the step's tangent at x, z [time, trial, ...]; the widths of its work blocks; the next state."""
    stages = [list(_gates(_cut(segments, blocks), blocks)) for segments in glue.segments]
    onto, after = _updates_onto(glue, stages, rows, blocks, x, z)
    updates: list[Update] = []
    widths: dict[str, int] = {}
    for k, product in enumerate(glue.products):
        size = product.positions.size
        source = _whole(stages[k], size, blocks)
        if source is None:
            source, widths[f"v{k}"] = Range(f"v{k}", 0, size), size
            updates += onto(k, source)
        updates += products_of(product, source, blocks, rows)
    updates += onto(len(glue.products), Range("out", 0, rows.step.state_size))
    return updates, widths, after


def products_of(product: StepProduct, source: Range, blocks: list[KickBlock], rows: RowFunctions) -> Iterator[Update]:
    """The product onto the kicks that it feeds: one for each run of consecutive kicks of one block."""
    block = _block_of(int(product.kicks.min()), blocks)
    whole, inside = Range(block.name, 0, block.stop - block.start), product.kicks - block.start
    if is_matrix_free(product):
        yield LinearUpdate(whole, source, rows.index(inside[0]), linear_map(rows, product))
        return
    weight = matrix(rows, product)
    if len(product.kicks) > 1:
        yield ScatteredUpdate(whole, source, weight, rows.index(inside))
        return
    kicks, edges = product.kicks[0], [block.start for block in blocks]
    breaks = np.flatnonzero((np.diff(kicks) != 1) | np.isin(kicks[1:], edges)) + 1
    for first, stop in pairwise([0, *breaks.tolist(), len(kicks)]):
        block, part = _block_of(int(kicks[first]), blocks), weight[:, first:stop].contiguous()
        yield MatrixUpdate(
            Range(block.name, int(kicks[first]) - block.start, stop - first), source, part, part.T.contiguous()
        )


def is_matrix_free(product: StepProduct) -> bool:
    """Whether it is a linear map, such as a convolution, whose matrix would be too large."""
    return not product.has_matrix and product.positions.size * product.kicks.size > LARGEST_MATRIX


def _block_of(kick: int, blocks: list[KickBlock]) -> KickBlock:
    return next(block for block in blocks if block.start <= kick < block.stop)


def _cut(segments: list[Segment], blocks: list[KickBlock]) -> list[Segment]:
    """The segments, cut where their sources go from one block of kicks to the next."""
    parts = []
    for s in segments:
        while not s.from_state and s.source_step and s.source + s.length > (end := _block_of(s.source, blocks).stop):
            here = end - s.source
            parts.append(replace(s, length=here))
            after = None if s.coefficient is None else s.coefficient + here
            sink = s.sink + here * s.sink_step
            s = replace(s, sink=sink, source=end, length=s.length - here, coefficient=after)
        parts.append(s)
    return parts


def _source(s: Segment, length: int, blocks: list[KickBlock]) -> Range:
    if s.from_state:
        return Range("z", s.source, length)
    block = _block_of(s.source, blocks)
    return Range(block.name, s.source - block.start, length)


def _whole(runs: list[list[Segment]], size: int, blocks: list[KickBlock]) -> Range | None:
    """Where a sink is simply a range of z or of one block of kicks: that range."""
    if [len(run) for run in runs] == [1]:
        ((s,),) = runs
        if s.coefficient is None and s.length == size and s.source_step == 1:
            return _source(s, size, blocks)
    return None


def _updates_onto(
    glue: Glue, stages: list[list[list[Segment]]], rows: RowFunctions, blocks: list[KickBlock], x: Tensor, z: Tensor
) -> tuple[Callable[[int, Range], list[Update]], Tensor]:
    """(stage, sink) -> its updates, in the cheapest form that the glue has; and the next state [time, trial, unit]."""
    units, kicks = z.shape[-1], rows.step.kicks.size
    if glue.colouring is not None:
        runs = [[run for run in stage if run[0].coefficient is not None] for stage in stages]
        wanted = [np.concatenate([_numbers(s) for s in run]) for stage in runs for run in stage]
        after, *found = _with_coefficients(glue.products, glue.colouring, wanted, rows, x, z)
        scales = dict(zip((id(run) for stage in runs for run in stage), found, strict=True))
        return lambda k, sink: [_scaled(run, sink, scales.get(id(run)), blocks) for run in stages[k]], after
    sources = (Range("z", 0, units), Range(blocks[0].name, 0, kicks))
    sinks, entries = (sum(map(len, parts)) for parts in zip(*((s.ids, s.rows) for s in glue.stages), strict=True))
    if entries * SPARSE <= sinks * (units + kicks):
        colouring = colour_entries(glue.stages, units + kicks)
        starts = np.cumsum([0, *(len(stage.rows) for stage in glue.stages)])
        wanted = [np.arange(*ends) for ends in pairwise(starts)]
        after, *found = _with_coefficients(glue.products, colouring, wanted, rows, x, z)
        return _entries_onto(found, glue.stages, sources), after
    function = sinks_of(rows, glue.products)
    after, a = each_row(point_of(rows), x, z, width=units + kicks)
    if sinks * (units + kicks) * z.shape[0] * z.shape[1] * z.element_size() <= BLOCKS_BYTES:
        dense = jacobians(function, x, z, a, sinks)
        return lambda k, sink: [DenseUpdate(sink, s, block) for s, block in zip(sources, dense[k], strict=True)], after
    return lambda k, sink: [FunctionUpdate(sink, *sources, lambda *row: function(*row)[k], (x, z, a))], after


def _with_coefficients(
    products: list[StepProduct],
    colouring: Colouring,
    wanted: list[np.ndarray],
    rows: RowFunctions,
    x: Tensor,
    z: Tensor,
) -> list[Tensor]:
    """The next state, and each set of coefficients [time, trial, number], of one evaluation of each row's step."""
    row = coefficients(sinks_of(rows, products, kicked=True), colouring, wanted, rows)
    width = (z.shape[-1] + rows.step.kicks.size) * max(1, min(colouring.count, COLOURS_TOGETHER))
    return each_row(row, x, z, width=width)


def _entries_onto(
    found: list[Tensor], stages: list[Stage], sources: tuple[Range, Range]
) -> Callable[[int, Range], list[Update]]:
    """(stage, sink) -> its updates, entry by entry."""
    units = sources[0].length

    def update(k: int, sink: Range, source: Range, first: int) -> EntriesUpdate:
        rows, columns = stages[k].rows, stages[k].columns - first
        here = np.flatnonzero((columns >= 0) & (columns < source.length))
        to, of, taken = (torch.from_numpy(numbers).to(found[k].device) for numbers in (rows[here], columns[here], here))
        return EntriesUpdate(sink, source, to, of, found[k][..., taken])

    return lambda k, sink: [update(k, sink, *source) for source in zip(sources, (0, units), strict=True)]


def _numbers(s: Segment) -> np.ndarray:
    """Those of its coefficients."""
    assert s.coefficient is not None
    return np.arange(s.coefficient, s.coefficient + s.length)


def _gates(segments: list[Segment], blocks: list[KickBlock]) -> Iterator[list[Segment]]:
    """Neighbouring segments onto one and the same range, such as the gates of a GRU, together."""
    ordered = sorted(segments, key=lambda s: (not s.from_state, s.sink, s.source))
    run = ordered[:1]
    for s in ordered[1:]:
        if _continues(run[-1], s) and _source(run[-1], 1, blocks).block == _source(s, 1, blocks).block:
            run.append(s)
        else:
            yield run
            run = [s]
    if run:
        yield run


def _continues(s: Segment, after: Segment) -> bool:
    same = ("from_state", "sink", "length", "sink_step", "source_step")
    return (
        all(getattr(s, name) == getattr(after, name) for name in same)
        and s.sink_step == s.source_step == 1
        and None not in (s.coefficient, after.coefficient)
        and after.source == s.source + s.length
    )


def _scaled(run: list[Segment], sink: Range, coefficients: Tensor | None, blocks: list[KickBlock]) -> ScaledUpdate:
    """The update of one run of gates, with their coefficients [time, trial, gate * i] side by side."""
    s, gates = run[0], len(run)
    return ScaledUpdate(
        Range(sink.block, sink.start + s.sink, s.length if s.sink_step else 1),
        _source(s, gates * s.length if s.source_step else 1, blocks),
        *(gates, s.sink_step, s.source_step, None if coefficients is None else coefficients.unsqueeze(2)),
    )
