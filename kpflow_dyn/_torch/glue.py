"""The glue of an analysed step: which elements of products' operands and of the next state hang on which z and kicks.

The graph is cut at the products with matrices that do not depend on the row. What is left between them is, for most
cells, elementwise up to a shift: a short list of segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kpflow_dyn._torch.pattern import Colouring, Stage, plan
from kpflow_dyn.tracing._graph import Node, Role
from kpflow_dyn.tracing._structure import Kind, Product, Structure


@dataclass
class Glue:
    """The products that carry the state on, and the pattern of each of their operands and of the next state."""

    products: list[Product]
    stages: list[Stage]
    colouring: Colouring | None


def find_glue(structure: Structure) -> Glue:
    """Follow every element back to the state and the kicks that it hangs on."""
    found = _Dependence(structure)
    operands = [structure.ids[p.operand][0].ravel()[p.positions.ravel()] for p in structure.products]
    moving = [any(found.depends[i] for i in ids) for ids in operands]
    stages = [found.stage(ids) for ids, here in zip(operands, moving, strict=True) if here]
    stages.append(found.stage(structure.ids[structure.graph.output][0].ravel()))
    colouring = plan(stages, structure.state_size, structure.state_size + structure.kick_size)
    return Glue([p for p, here in zip(structure.products, moving, strict=True) if here], stages, colouring)


class _Dependence:
    """The set of (z, kicks) that each element hangs on, as the bits of an integer."""

    def __init__(self, structure: Structure) -> None:
        self.structure, self.ids = structure, structure.ids
        count = 1 + max(int(part.max(initial=0)) for parts in self.ids.values() for part in parts)
        self.depends = [0] * count
        self.source_of = np.full(count, -1)
        for node in structure.graph.nodes:
            if structure.kinds[node] in (Kind.DATA, Kind.MOVING):
                self.visit(node)

    def visit(self, node: Node) -> None:
        structure, size = self.structure, self.structure.state_size
        ids = self.ids[node][0].ravel()
        if node.role is Role.STATE:
            self.be_source(ids, np.arange(size))
        elif node in structure.replaced:
            kicks = structure.replaced[node]
            self.be_source(ids[kicks >= 0], size + kicks[kicks >= 0])
        elif structure.kinds[node] is Kind.MOVING and node not in structure.moved:
            self.depend(node)
        for i, kick in zip(ids, structure.added.get(node, ()), strict=False):
            self.depends[i] |= 1 << (size + int(kick)) if kick >= 0 else 0

    def be_source(self, ids: np.ndarray, sources: np.ndarray) -> None:
        self.source_of[ids] = sources
        for i, source in zip(ids.tolist(), sources.tolist(), strict=True):
            self.depends[i] = 1 << source

    def depend(self, node: Node) -> None:
        operands = [ids for o in node.operands if o.floating for ids in self.ids[o]]
        if node.role in (Role.ADD, Role.POINTWISE):
            out = self.ids[node][0].ravel().tolist()
            for ids in operands:
                for i, j in zip(out, np.broadcast_to(ids, node.shape).ravel().tolist(), strict=True):
                    self.depends[i] |= self.depends[j]
            return
        everything = 0
        for j in np.unique(np.concatenate([ids.ravel() for ids in operands])).tolist():
            everything |= self.depends[j]
        for ids in self.ids[node]:
            for i in ids.ravel().tolist():
                self.depends[i] = everything

    def stage(self, ids: np.ndarray) -> Stage:
        pairs = [(row, column) for row, i in enumerate(ids.tolist()) for column in _bits(self.depends[i])]
        rows, columns = np.array(pairs, int).reshape(-1, 2).T
        return Stage(ids, rows, columns, self.source_of[ids[rows]] == columns)


def _bits(number: int) -> Iterator[int]:
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest
