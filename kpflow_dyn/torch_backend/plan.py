"""Turn an analysed step and its data into the straight line of updates that is its tangent."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kpflow_dyn.pattern import Colouring, Segment
from kpflow_dyn.structure import Product as StepProduct
from kpflow_dyn.structure import Structure
from kpflow_dyn.torch_backend.program import Dense, Product, Range, Scaled, ScatteredProduct, Traced, Update
from kpflow_dyn.torch_backend.rows import Rows, jacobians, tangents

DENSE_BYTES = 2**28


def plan_updates(
    structure: Structure, rows: Rows, x: Tensor, z: Tensor, kicks: Tensor
) -> tuple[list[Update], dict[str, int]]:
    """The updates of the step's tangent at x, z, kicks [time, trial, ...], and the widths of its work blocks."""
    glue = _glue(structure, rows, x, z, kicks)
    updates: list[Update] = []
    widths: dict[str, int] = {}
    for k, product in enumerate(structure.products):
        source = _whole(structure.stages[k].segments, len(structure.stages[k].ids))
        if source is None:
            source = Range(f"v{k}", 0, len(structure.stages[k].ids))
            widths[source.block] = source.length
            updates += glue(k, source)
        updates.append(_product(product, source, structure.kick_size, rows))
    updates += glue(len(structure.products), Range("out", 0, structure.state_size))
    return updates, widths


def _product(product: StepProduct, source: Range, kick_size: int, rows: Rows) -> Update:
    matrix, numbers = rows.matrix(product), product.kicks.ravel().tolist()
    consecutive = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    if product.kicks.shape[0] == 1 and consecutive:
        return Product(Range("a", numbers[0], len(numbers)), source, matrix, matrix.T.contiguous())
    return ScatteredProduct(Range("a", 0, kick_size), source, matrix, rows.index(product.kicks))


def _whole(segments: list[Segment], size: int) -> Range | None:
    """Where a sink is simply a range of z or of the kicks: that range."""
    if len(segments) == 1:
        (s,) = segments
        if s.coefficient is None and s.length == size and s.source_step == 1:
            return Range("z" if s.from_state else "a", s.source, s.length)
    return None


def _glue(
    structure: Structure, rows: Rows, x: Tensor, z: Tensor, kicks: Tensor
) -> Callable[[int, Range], list[Update]]:
    """(stage, sink) -> its updates, in the cheapest form that the glue has."""
    function, sources = rows.glue(), (Range("z", 0, z.shape[-1]), Range("a", 0, kicks.shape[-1]))
    if structure.colouring is not None:
        coefficients = _coefficients(function, structure.colouring, x, z, kicks)
        return lambda k, sink: [_scaled(run, sink, coefficients) for run in _gates(structure.stages[k].segments)]
    sinks = sum(len(stage.ids) for stage in structure.stages)
    if sinks * (z.shape[-1] + kicks.shape[-1]) * z.shape[0] * z.shape[1] * z.element_size() <= DENSE_BYTES:
        blocks = jacobians(function, x, z, kicks)
        return lambda k, sink: [Dense(sink, s, block) for s, block in zip(sources, blocks[k], strict=True)]
    return lambda k, sink: [Traced(sink, sources, lambda *row: function(*row)[k], (x, z, kicks))]


def _gates(segments: list[Segment]) -> Iterator[list[Segment]]:
    """Neighbouring segments onto one and the same range, such as the gates of a GRU, together."""
    ordered = sorted(segments, key=lambda s: (not s.from_state, s.sink, s.source))
    run = ordered[:1]
    for s in ordered[1:]:
        if _continues(run[-1], s):
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


def _scaled(run: list[Segment], sink: Range, coefficients: Tensor) -> Scaled:
    """The update of one run of gates, with their coefficients side by side."""
    s, gates = run[0], len(run)
    starts = [gate.coefficient for gate in run if gate.coefficient is not None]
    parts = [coefficients[:, :, None, start : start + s.length] for start in starts]
    return Scaled(
        Range(sink.block, sink.start + s.sink, s.length if s.sink_step else 1),
        Range("z" if s.from_state else "a", s.source, gates * s.length if s.source_step else 1),
        *(gates, s.sink_step, s.source_step, torch.cat(parts, -1).contiguous() if parts else None),
    )


def _coefficients(function: Callable, colouring: Colouring, x: Tensor, z: Tensor, kicks: Tensor) -> Tensor:
    """Every segment's coefficients [time, trial, all], from one tangent for each colour."""
    found = x.new_empty(*x.shape[:2], len(colouring.sinks))
    colours, sinks = (torch.from_numpy(numbers).to(x.device) for numbers in (colouring.colours, colouring.sinks))
    for colour in range(colouring.count):
        direction = (colours == colour).to(z.dtype)
        image = tangents(function, x, z, kicks, direction[: z.shape[-1]], direction[z.shape[-1] :])
        here = torch.from_numpy((colouring.hues == colour).nonzero()[0]).to(x.device)
        found[..., here] = image[..., sinks[here]]
    return found
