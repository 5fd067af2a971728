"""Operations that have a rule stay whole in a graph: one operation of torch.library stands for all of them."""

from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

CALLS: dict[int, tuple[Any, Any, list[int], list[Any]]] = {}  # number -> what is called, and how its arguments lie
NUMBERS = count()


@torch.library.custom_op("kpflow_dyn::whole", mutates_args=())
def whole(number: int, values: Sequence[Tensor]) -> Tensor:
    """The operation of that number on these tensors."""
    op, args, kwargs = called(number, list(values))
    return op(*args, **kwargs).clone()


def numbered(op: Any, args: Any, kwargs: Any) -> tuple[int, list[Tensor]]:
    """The number of a call, and its tensors."""
    leaves, form = tree_flatten((args, kwargs))
    tensors = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    others = [None if n in tensors else leaf for n, leaf in enumerate(leaves)]
    CALLS[number := next(NUMBERS)] = op, form, tensors, others
    return number, [leaves[n] for n in tensors]


def called(number: int, values: list[Any]) -> tuple[Any, Any, Any]:
    """What is called with these values in the place of its tensors: the operation, its arguments, those by name."""
    op, form, places, others = CALLS[number]
    given = dict(zip(places, values, strict=True))
    args, kwargs = tree_unflatten([given.get(n, leaf) for n, leaf in enumerate(others)], form)
    return op, args, kwargs
