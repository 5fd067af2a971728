"""Where a traced model uses its weights: the operations on data that have a weight among their operands."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, device, like_numpy
from kpflow_dyn.tracing._dependence import Dependence, Dependences, is_copy
from kpflow_dyn.tracing._graph import Node, Role, evaluate


@dataclass(frozen=True, eq=False)
class Use:
    """An operation on data with a weight among its operands."""

    node: Node  # the operation
    weight: Node  # what it takes that depends on parameters alone
    # "matrix" (a product with it, or a convolution, which is its product with patches), "scale" (each result depends on
    # one element of it), "lookup" (each result is an element of it that data choose) or "opaque" (any other operation)
    kind: str

    @property
    def operand(self) -> Node:
        """What a matrix multiplies."""
        return next(o for o in self.node.args[:2] if o is not self.weight)

    @property
    def others(self) -> list[Node]:
        """All operands but the weight."""
        return [o for o in dict.fromkeys(self.node.operands) if o is not self.weight]


def find_uses(order: Iterable[Node], dependence: Dependences) -> tuple[Use, ...]:
    """All uses of weights among these nodes."""
    return tuple(
        Use(node, weight, _kind(node, weight, dependence))
        for node in order
        if dependence[node] is Dependence.MOVING  # not what only decides, such as a comparison
        for weight in dict.fromkeys(node.operands)
        if dependence[weight] is Dependence.WEIGHT
    )


def _kind(node: Node, weight: Node, dependence: Dependences) -> str:
    if len(node.shapes) > 1:
        raise ValueError(
            f"the operation {node.name} takes a parameter and has several results; write it with simpler operations"
        )
    if node.role is Role.PRODUCT or is_convolution_with(node, weight):
        return "matrix"
    if node.role in (Role.ADD, Role.POINTWISE) or is_copy(node, dependence):
        return "scale"
    alone = {o for o in node.operands if o.floating} == {weight}
    return "lookup" if node.role is Role.MOVE and alone else "opaque"


def is_convolution_with(node: Node, kernel: Node) -> bool:
    """Whether this is the kernel of a convolution, and not what it runs over."""
    return node.role is Role.CONVOLUTION and node.args[1] is kernel and node.args[0] is not kernel


# Products and convolutions as V [matrix, row, d] times W [matrix, d, m]


def as_matrices(node: Node, weight: Node, values: Any) -> Any:
    """A weight's values, or their numbers, as W [matrix, d, m]."""
    if node.role is Role.CONVOLUTION:
        return values.reshape((1, len(values), -1)).swapaxes(1, 2)  # [1, patch, out]
    values = values if values.ndim == 3 else values[None]
    return values.swapaxes(1, 2) if node.args[0] is weight else values


def as_outputs(node: Node, weight: Node, values: Any) -> Any:
    """What the operation gives, as V W [matrix, row, m]; of what a product multiplies, V."""
    if node.role is Role.CONVOLUTION:  # [batch, out, ...position]
        batch, out = values.shape[:2]
        return values.reshape((batch, out, -1)).swapaxes(1, 2).reshape((1, -1, out))
    return as_matrices(node, weight, values)


def variables_of_matrix(use: Use, env: Mapping[Node, Array]) -> Array:
    """V [matrix, row, d]; patches are what a convolution gives for the unit kernels, channel by channel."""
    operand = env[use.operand]
    if use.node.role is not Role.CONVOLUTION:
        return as_outputs(use.node, use.weight, operand)
    batch, channels, *positions = operand.shape
    kernel = use.weight.shape[2:]
    unit = like_numpy(np.eye(math.prod(kernel)), operand).reshape((-1, 1, *kernel))
    single = operand.reshape((batch * channels, 1, *positions))
    patches = evaluate(use.node, {use.weight: unit, use.operand: single})  # [batch * channel, place in patch, ...]
    return as_outputs(use.node, use.weight, patches.reshape((batch, -1, *patches.shape[2:])))


def elements_of_lookup(use: Use, env: Mapping[Node, Array]) -> Array:
    """Which element of the weight each result [element] is, counted from 1; 0 for those that are filled up."""
    weight = env[use.weight]
    xp, size = array_namespace(weight), math.prod(use.weight.shape)
    numbers = xp.arange(1, size + 1, dtype=xp.int32, device=device(weight)).reshape(use.weight.shape)
    return evaluate(use.node, {**env, use.weight: numbers}).reshape(-1)


def coefficients_of_scale(use: Use, env: Mapping[Node, Array], jvp: Callable[..., Any]) -> Array:
    """The derivative of each result [element] in the one element of the weight that it depends on."""
    weight = env[use.weight]
    ones = array_namespace(weight).ones_like(weight)
    return jvp(lambda w: evaluate(use.node, {**env, use.weight: w}), (weight,), (ones,))[1].reshape(-1)
