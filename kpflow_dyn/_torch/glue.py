"""The glue of an analysed step: which elements of products' operands and of the next state hang on which z and kicks.

The graph is cut at the products with matrices that do not depend on the row. What is left between them is, for most
cells, elementwise up to a shift: a short list of segments.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kpflow_dyn._torch.pattern import Colouring, Segment, Stage, plan
from kpflow_dyn.tracing._dependence import ON_DATA, Dependence
from kpflow_dyn.tracing._graph import Node, Role
from kpflow_dyn.tracing._steps import AnalysedStep
from kpflow_dyn.tracing._sums import fixed_factor, is_linear
from kpflow_dyn.tracing._uses import as_outputs


@dataclass(frozen=True, eq=False)
class StepProduct:
    """out[i, j] = sum_k v[i, k] W[k, j], with v = operand.flat[positions], and `kicks` in the place of out.

    Without a matrix W is a linear map of the whole operand, such as a mean or a convolution, to be read off the node.
    """

    node: Node
    operand: Node
    factor: Node | None
    matrix: int  # which one of a batch
    positions: np.ndarray  # [r, d]
    kicks: np.ndarray  # [r, m]

    @property
    def has_matrix(self) -> bool:
        """Whether its factor is W, or it is a linear map of its whole operand."""
        return self.factor is not None and self.node.role is Role.PRODUCT


@dataclass(frozen=True)
class Glue:
    """The products that carry the state on; for each of their operands, and the next state, its pattern in segments."""

    products: list[StepProduct]
    stages: list[Stage]
    segments: list[list[Segment]]
    colouring: Colouring | None


def find_glue(step: AnalysedStep) -> Glue:
    """Follow every element back to the state and the kicks that it hangs on."""
    found, elements = _Reach(step), step.elements
    nodes = [node for node in step.graph.nodes if is_linear(node, step.dependence)]
    products = [product for node in nodes for product in _products(node, step)]
    operands = [elements.of(p.operand)[p.positions.ravel()] for p in products]
    moving = [any(found.sources[i] for i in ids) for ids in operands]
    stages = [found.stage(ids) for ids, here in zip(operands, moving, strict=True) if here]
    stages.append(found.stage(elements.of(step.graph.output)))
    segments, colouring = plan(stages, step.state_size, step.state_size + step.kicks.size)
    return Glue([p for p, here in zip(products, moving, strict=True) if here], stages, segments, colouring)


def _products(node: Node, step: AnalysedStep) -> Iterator[StepProduct]:
    factor, kicks = fixed_factor(node, step.dependence), step.kicks.of[node]
    operand = next(o for o in node.operands if o is not factor)
    positions = np.arange(math.prod(operand.shape))
    if factor is None or node.role is Role.CONVOLUTION:
        yield StepProduct(node, operand, factor, 0, positions[None], kicks.reshape(1, -1))
        return
    batches = (as_outputs(node, factor, numbers) for numbers in (positions.reshape(operand.shape), kicks))
    for b, (rows, outputs) in enumerate(zip(*batches, strict=True)):
        yield StepProduct(node, operand, factor, b, rows, outputs)


class _Reach:
    """The set of (z, kicks) that each element hangs on, as the bits of an integer."""

    def __init__(self, step: AnalysedStep) -> None:
        self.step, self.elements = step, step.elements
        self.sources = [0] * step.elements.count
        self.source_of = np.full(step.elements.count, -1)
        for node in step.graph.nodes:
            if step.dependence[node] in ON_DATA:
                self.visit(node)

    def visit(self, node: Node) -> None:
        step, size = self.step, self.step.state_size
        ids = self.elements.of(node)
        if node.role is Role.STATE:
            self.be_source(ids, np.arange(size))
        elif node in step.kicks.replaced:
            kicks = step.kicks.replaced[node]
            self.be_source(ids[kicks >= 0], size + kicks[kicks >= 0])
        elif step.dependence[node] is Dependence.MOVING and node not in self.elements.copied:
            self.depend(node)
        for i, kick in zip(ids, step.kicks.added.get(node, ()), strict=False):
            self.sources[i] |= 1 << (size + int(kick)) if kick >= 0 else 0

    def be_source(self, ids: np.ndarray, sources: np.ndarray) -> None:
        self.source_of[ids] = sources
        for i, source in zip(ids.tolist(), sources.tolist(), strict=True):
            self.sources[i] = 1 << source

    def depend(self, node: Node) -> None:
        numbers = self.elements.numbers
        operands = [ids for o in node.operands for ids in numbers.get(o, ())]
        if node.role in (Role.ADD, Role.POINTWISE):
            out = self.elements.of(node).tolist()
            for ids in operands:
                for i, j in zip(out, np.broadcast_to(ids, node.shape).ravel().tolist(), strict=True):
                    self.sources[i] |= self.sources[j]
            return
        everything = 0
        for j in np.unique(np.concatenate([ids.ravel() for ids in operands])).tolist():
            everything |= self.sources[j]
        for ids in numbers[node]:
            for i in ids.ravel().tolist():
                self.sources[i] = everything

    def stage(self, ids: np.ndarray) -> Stage:
        pairs = [(row, column) for row, i in enumerate(ids.tolist()) for column in _bits(self.sources[i])]
        rows, columns = np.array(pairs, int).reshape(-1, 2).T
        return Stage(ids, rows, columns, self.source_of[ids[rows]] == columns)


def _bits(number: int) -> Iterator[int]:
    while number:
        lowest = number & -number
        yield lowest.bit_length() - 1
        number ^= lowest
