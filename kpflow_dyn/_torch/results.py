"""Operations as the analysis takes them: with one result each, and with derivatives in both modes.

One with several results gives them side by side, and each is a part of that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vjp
from torch.utils._pytree import tree_flatten, tree_unflatten

from kpflow_dyn._torch.recording import FxNode, tensors_in
from kpflow_dyn.tracing._graph import Node, Role
from kpflow_dyn.tracing._pairs import Form


@dataclass(frozen=True)
class Results:
    """All nodes that an operation becomes, what of them is complex, and those of the results, by their numbers."""

    forms: dict[Node, Form]
    by_number: dict[int, Node]

    @property
    def nodes(self) -> list[Node]:
        """In their order."""
        return list(self.forms)


def several_results(fx: FxNode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Results:
    """The results that are used: those that are numbers of elements, say, by themselves."""
    values, op = fx.meta["val"], in_both_modes(fx.target)
    used = sorted({user.args[1] for user in fx.users})
    floating = [n for n in used if values[n].is_floating_point()]

    def node(name: str, shape: tuple[int, ...], floats: bool, apply: Callable[..., Tensor]) -> Node:
        return Node(name, Role.OTHER, (shape,), floats, apply, args, kwargs)

    alone = [n for n in used if n not in floating or len(floating) == 1]
    found = {n: node(f"{fx.name}_{n}", tuple(values[n].shape), n in floating, partial(_result, op, n)) for n in alone}
    forms = {node: Form([values[n].is_complex()]) for n, node in found.items()}
    if len(floating) < 2:
        return Results(forms, found)
    ends = np.cumsum([0, *(values[n].numel() for n in floating)]).tolist()
    whole = node(fx.name, (ends[-1],), True, partial(_side_by_side, op, floating))
    parts = {
        n: Node(f"{fx.name}_{n}", Role.MOVE, (shape,), True, partial(_part, start, end, shape), (whole,))
        for n, (start, end) in zip(floating, pairwise(ends), strict=True)
        for shape in [tuple(values[n].shape)]
    }
    return Results(forms | dict.fromkeys([whole, *parts.values()], Form([False])), found | parts)


def in_both_modes(op: Callable[..., Any]) -> Callable[..., Any]:
    """The operation; where torch has no forward mode of it, this is the transpose of its reverse mode."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        try:
            return op(*args, **kwargs)
        except NotImplementedError as error:
            if "forward AD" not in str(error):
                raise
            return _by_reverse_mode(op, args, kwargs)

    return apply


def _by_reverse_mode(op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """f(u0) + B(u0, .)^T (u - u0), with B the backward pass and u0 = u without a derivative."""
    leaves, form = tree_flatten((args, kwargs))
    moving = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    fixed = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    given = [fixed[n] for n in moving]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        """The floating results."""
        own = dict(zip(moving, values, strict=True))
        args, kwargs = tree_unflatten([own.get(n, leaf) for n, leaf in enumerate(fixed)], form)
        return tuple(value for value in tensors_in(op(*args, **kwargs)) if value.is_floating_point())

    args, kwargs = tree_unflatten(fixed, form)
    out, leaf_form = tree_flatten(op(*args, **kwargs))
    results, backward = vjp(function, *given)[:2]
    changes = tuple(leaves[n] - fixed[n] for n in moving)
    moved = iter(vjp(backward, tuple(map(torch.zeros_like, results)))[1](changes)[0])
    return tree_unflatten([v + next(moved) if v.is_floating_point() else v for v in out], leaf_form)


def _result(op: Any, n: int, *args: Any, **kwargs: Any) -> Tensor:
    return op(*args, **kwargs)[n]


def _side_by_side(op: Any, numbers: list[int], *args: Any, **kwargs: Any) -> Tensor:
    results = op(*args, **kwargs)
    return torch.cat([results[n].reshape(-1) for n in numbers])


def _part(start: int, end: int, shape: tuple[int, ...], whole: Tensor) -> Tensor:
    return whole[start:end].reshape(shape)
