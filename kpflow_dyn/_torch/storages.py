"""The nodes of recorded tensors, where a write to one changes all that share its storage.

A storage that was written to is one row of numbers, those of the tensor that was known first. A write puts numbers into
it, and what else lies in the storage is read anew from it when it is next used: views of views, whatever their strides.
What is written without gradients has no derivative, and the tensors that it changes keep the one that they had.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Graph

aten = torch.ops.aten
FxNode = Any  # torch.fx.Node, whose fields are unions that a type checker cannot narrow
ELSEWHERE = "the model writes to memory that it reads as numbers of another type, or by no tensor of its own"


@dataclass
class Storage:
    """What a recording knows of a storage.

    tensors: those in it; they stay alive, so that ids stay those of their tensors.
    numbers: its numbers, as the last write left them; None where they are those of the first tensor.
    writes: how often it was written to.
    """

    tensors: list[Tensor] = field(default_factory=list)
    numbers: FxNode | None = None
    writes: int = 0

    @property
    def first(self) -> Tensor:
        """The tensor whose numbers, in their order, the storage counts."""
        return self.tensors[0]

    @property
    def has_derivative(self) -> bool:
        """Whether anything in it hangs on what requires gradients."""
        return any(tensor.requires_grad for tensor in self.tensors)


class Storages:
    """All storages of a recording, and the nodes of the tensors in them."""

    def __init__(self, graph: Graph, constant: Callable[[Tensor], FxNode]) -> None:
        self._graph, self._constant = graph, constant
        self._each: dict[int, Storage] = {}
        self._nodes: dict[int, tuple[FxNode, int]] = {}  # by the ids of tensors, with the writes that they know of

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._nodes

    def holds(self, tensor: Tensor) -> bool:
        """Whether it lies where a known tensor lies: as one of another class does, which torch makes unheard."""
        return storage_of(tensor) in self._each and self._order(tensor) is not None

    def know(self, tensor: Tensor, node: FxNode) -> None:
        """Let a node stand for a tensor from now on."""
        storage = self._each.setdefault(storage_of(tensor), Storage())
        if tensor not in self:
            storage.tensors.append(tensor)
        self._nodes[id(tensor)] = node, storage.writes

    def node(self, tensor: Tensor) -> FxNode:
        """The node of a known tensor, as the last write leaves it."""
        node, writes = self._nodes[id(tensor)]
        storage = self._each[storage_of(tensor)]
        if writes < storage.writes:
            self.know(tensor, node := self.view(tensor, tensor))
        return node

    def view(self, source: Tensor, tensor: Tensor) -> FxNode:
        """A view of a known tensor, with a derivative where that has one."""
        node, storage = self.read(tensor), self._each[storage_of(tensor)]
        if storage.has_derivative and not source.requires_grad:
            return self._add(aten.detach.default, node)
        return node

    def write(self, tensor: Tensor, node: FxNode, with_derivative: bool) -> None:
        """Let a node stand for a known tensor that was written to."""
        storage = self._each[storage_of(tensor)]
        if keeps := storage.has_derivative and not with_derivative:
            node = self._with_derivative_of(self.read(tensor), node)
        if is_same_place(tensor, storage.first):
            storage.numbers, storage.writes = None, storage.writes + 1
            self.know(storage.first, node)
        else:
            parts = self._numbers(storage), [self._places(tensor)], self._flat(tensor, node)
            storage.numbers, storage.writes = self._add(aten.index_put.default, *parts), storage.writes + 1
        if not keeps:
            self.know(tensor, node)

    def read(self, tensor: Tensor) -> FxNode:
        """A tensor by the numbers of its storage."""
        storage = self._each[storage_of(tensor)]
        same = is_same_place(tensor, storage.first)
        if same and storage.numbers is None:
            return self.node(storage.first)
        node, shape = self._numbers(storage), list(tensor.shape)
        if not same:
            node = self._add(aten.index.Tensor, node, [self._places(tensor)])
        if tensor.is_complex():
            node = self._add(aten.view_as_complex.default, self._add(aten.reshape.default, node, [*shape, 2]))
            return self._add(aten.conj_physical.default, node) if tensor.is_conj() else node
        node = self._add(aten.reshape.default, node, shape)
        return self._add(aten.neg.default, node) if tensor.is_neg() else node

    def _add(self, function: Any, *args: Any) -> FxNode:
        return self._graph.call_function(function, args)

    def _with_derivative_of(self, before: FxNode, node: FxNode) -> FxNode:
        change = self._add(aten.sub.Tensor, before, self._add(aten.detach.default, before))
        return self._add(aten.add.Tensor, self._add(aten.detach.default, node), change)

    def _numbers(self, storage: Storage) -> FxNode:
        """All numbers of a storage, [number]."""
        known = storage.numbers
        return self._flat(storage.first, self.node(storage.first)) if known is None else known

    def _flat(self, tensor: Tensor, node: FxNode) -> FxNode:
        """The numbers of a tensor as its storage holds them, from its node."""
        if tensor.is_complex():
            node = self._add(aten.conj_physical.default, node) if tensor.is_conj() else node
            node = self._add(aten.view_as_real.default, node)
        elif tensor.is_neg():
            node = self._add(aten.neg.default, node)
        return self._add(aten.reshape.default, node, [-1])

    def _places(self, tensor: Tensor) -> FxNode:
        """Which numbers of its storage a tensor is."""
        if (order := self._order(tensor)) is None:
            raise ValueError(ELSEWHERE)
        return self._constant(torch.from_numpy(order).to(tensor.device))

    def _order(self, tensor: Tensor) -> np.ndarray | None:
        """The same; None where it is others, or numbers of another type."""
        first = self._each[storage_of(tensor)].first
        if tensor.dtype.to_real() is not first.dtype.to_real():
            return None
        wanted, known = places_of(tensor), places_of(first)
        order = np.full(max(wanted.max(initial=0), known.max(initial=0)) + 1, -1)
        order[known] = np.arange(len(known))
        return None if (order[wanted] < 0).any() else order[wanted]


def places_of(tensor: Tensor) -> np.ndarray:
    """Where in its storage the real numbers of a tensor lie, [number], in bytes over those of one number."""
    places = np.array(tensor.storage_offset())
    for length, step in zip(tensor.shape, tensor.stride(), strict=True):
        places = places[..., None] + step * np.arange(length)
    return (2 * places[..., None] + np.arange(2) if tensor.is_complex() else places).reshape(-1)


def is_same_place(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same order."""
    return (a.is_conj(), a.is_neg(), place_of(a)) == (b.is_conj(), b.is_neg(), place_of(b))


def place_of(tensor: Tensor) -> tuple:
    """Where its numbers are, and how they are read."""
    if tensor.layout is not torch.strided:
        return (id(tensor),)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def storage_of(tensor: Tensor) -> int:
    """The identity of its storage."""
    return id(tensor) if tensor.layout is not torch.strided else tensor.untyped_storage()._cdata
