"""The sparsity of the glue: which elements hang on which, as segments, and how few derivatives find all of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

MAX_SEGMENTS = 32


@dataclass(frozen=True)
class Segment:
    """sink[sink + i sink_step] += c[i] source[source + i source_step], i < length.

    `from_state` says whether the source is z or the kicks; `coefficient` is where c starts, None for c = 1.
    """

    from_state: bool
    sink: int
    source: int
    length: int
    sink_step: int
    source_step: int
    coefficient: int | None


@dataclass(frozen=True)
class Stage:
    """The pattern of one sink: a product's operand, or the next state.

    ids: the number of each sink element in the graph. (rows, columns): sink element hangs on source element, where the
    sources are z followed by the kicks. unit: the sink element is a copy of the source.
    """

    ids: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    unit: np.ndarray


@dataclass(frozen=True)
class Colouring:
    """How to read all coefficients off a few derivatives: of sinks, each pulled back to the sources, or of sources.

    That of colour c is of all sinks (or sources) with colours == c together; coefficient k is then number places[k] of
    the sources (or sinks, stages one after another) of the colour hues[k].
    """

    of_sinks: bool
    count: int
    colours: np.ndarray
    places: np.ndarray
    hues: np.ndarray


def plan(stages: list[Stage], state_size: int, source_size: int) -> tuple[list[list[Segment]], Colouring | None]:
    """Each stage's segments, and the colouring that finds their coefficients.

    No segments and None when the pattern is no short list of segments.
    """
    sinks, sources, offset = [], [], 0
    found: list[list[Segment]] = [[] for _ in stages]
    for base, stage, segments in zip(_bases(stages), stages, found, strict=True):
        for unit, from_state in product((True, False), (True, False)):
            here = (stage.unit == unit) & ((stage.columns < state_size) == from_state)
            shift = 0 if from_state else state_size
            for rows, columns, steps in _runs(stage.rows[here], stage.columns[here]):
                where = (int(rows[0]), int(columns[0]) - shift, len(rows), *steps)
                segments.append(Segment(from_state, *where, None if unit else offset))
                if len(segments) > MAX_SEGMENTS:
                    return [[] for _ in stages], None
                if not unit:
                    sinks.append(base + rows)
                    sources.append(columns)
                    offset += len(rows)
    return found, _coloured(stages, sinks, sources, source_size)


def colour_entries(stages: list[Stage], source_size: int) -> Colouring:
    """How to read all entries of all stages off a few derivatives, in their order."""
    sinks = [base + stage.rows for base, stage in zip(_bases(stages), stages, strict=True)]
    return _coloured(stages, sinks, [stage.columns for stage in stages], source_size)


def _coloured(stages: list[Stage], sinks: list[np.ndarray], sources: list[np.ndarray], source_size: int) -> Colouring:
    """By sinks where that takes no more colours: a sink of a GRU hangs on five sources, each of these on one."""
    sink, source = (np.concatenate(parts) if parts else np.zeros(0, int) for parts in (sinks, sources))
    of_sinks = _colour(source, sink, sum(len(stage.ids) for stage in stages))
    of_sources = _colour(sink, source, source_size)
    if of_sinks.max(initial=-1) <= of_sources.max(initial=-1):
        return Colouring(True, int(of_sinks.max(initial=-1)) + 1, of_sinks, source, of_sinks[sink])
    return Colouring(False, int(of_sources.max(initial=-1)) + 1, of_sources, sink, of_sources[source])


def _bases(stages: list[Stage]) -> list[int]:
    return np.cumsum([0, *(len(stage.ids) for stage in stages)])[:-1].tolist()


def _runs(rows: np.ndarray, columns: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[int, int]]]:
    """Split pairs into runs, longest first: along diagonals, down a column (a broadcast) or along a row (a sum)."""
    while len(rows):
        candidates = [(_longest(columns - rows, rows), (1, 1)), (_longest(columns, rows), (1, 0))]
        candidates.append((_longest(rows, columns), (0, 1)))
        run, steps = max(candidates, key=lambda candidate: len(candidate[0]))
        yield rows[run], columns[run], steps if len(run) > 1 else (1, 1)
        rest = np.ones(len(rows), bool)
        rest[run] = False
        rows, columns = rows[rest], columns[rest]


def _longest(line: np.ndarray, along: np.ndarray) -> np.ndarray:
    """The longest run of consecutive `along` on one line, as indices in order."""
    order = np.lexsort((along, line))
    breaks = np.flatnonzero((np.diff(line[order]) != 0) | (np.diff(along[order]) != 1)) + 1
    return max(np.split(order, breaks), key=len)


def _colour(sinks: np.ndarray, sources: np.ndarray, source_size: int) -> np.ndarray:
    """Greedy colours such that no two sources of one colour meet in a sink."""
    colours = np.full(source_size, -1)
    taken: dict[int, int] = {}
    order = np.argsort(sources, kind="stable")
    starts = np.flatnonzero(np.diff(sources[order], prepend=-1))
    for part in np.split(order, starts[1:]) if len(order) else []:
        rows = sinks[part].tolist()
        used = 0
        for row in rows:
            used |= taken.get(row, 0)
        free = ~used & (used + 1)
        for row in rows:
            taken[row] = taken.get(row, 0) | free
        colours[sources[part[0]]] = free.bit_length() - 1
    return colours
