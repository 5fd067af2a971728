"""The functions of rows that a torch tangent needs: the glue and its derivatives, and matrices of products."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, vjp, vmap

from kpflow_dyn._backend import RowFunction
from kpflow_dyn._torch.glue import StepProduct
from kpflow_dyn._torch.left_alone import ONE_AT_A_TIME
from kpflow_dyn._torch.pattern import Colouring
from kpflow_dyn._torch.transforms import each_row, jvp
from kpflow_dyn.tracing._graph import ancestors, evaluate, run
from kpflow_dyn.tracing._rows import RowFunctions
from kpflow_dyn.tracing._uses import as_matrices

MANY_PIECES = 16  # of a tensor, where its elements are taken by their numbers
COLOURS_TOGETHER = 16
Take = Callable[[Tensor], Tensor]


def point_of(rows: RowFunctions) -> RowFunction:
    """(x, z) -> the next state, and the values of all kicks' places."""
    step = rows.step
    hubs = [node for node, kicks in step.kicks.replaced.items() if (kicks >= 0).any()]
    values = rows.values([step.graph.output, *hubs])
    numbers = np.concatenate([np.zeros(0, int), *(step.kicks.replaced[node].ravel() for node in hubs)])
    place = np.full(step.kicks.size, -1)
    place[numbers[numbers >= 0]] = np.flatnonzero(numbers >= 0)
    take = taking(place, rows)

    def row(x: Tensor, z: Tensor) -> list[Tensor]:
        after, *hubs = values(x, z)
        flat = [z.new_zeros(0), *(hub.reshape(-1).to(z.dtype) for hub in hubs)]
        return [after.reshape(-1), take(torch.cat(flat))]

    return row


def taking(numbers: np.ndarray, rows: RowFunctions) -> Take:
    """A flat tensor -> its elements of these numbers, 0 where one is negative; piece by piece, if these are few."""
    pieces = list(_pieces(numbers))
    if len(pieces) > MANY_PIECES:
        at = rows.index(np.where(numbers < 0, 0, numbers + 1))
        return lambda flat: torch.cat([flat.new_zeros(1), flat])[at]

    def take(flat: Tensor) -> Tensor:
        parts = [flat.new_zeros(n) if first < 0 else flat.narrow(0, first, n) for first, n in pieces]
        return parts[0] if len(parts) == 1 else torch.cat([flat[:0], *parts])

    return take


def _pieces(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of consecutive numbers, or of negative ones, as (first, length)."""
    steps, negative = np.diff(numbers), numbers < 0
    joined = np.where(negative[1:] | negative[:-1], negative[1:] & negative[:-1], steps == 1)
    starts = [0, *(np.flatnonzero(~joined) + 1).tolist(), len(numbers)]
    yield from ((int(numbers[a]), b - a) for a, b in pairwise(starts) if b > a)


def sinks_of(rows: RowFunctions, products: Sequence[StepProduct], kicked: bool = False) -> RowFunction:
    """(x, z, a) -> the sinks: each product's operand and the next state, with the kicks a in their places.

    Where it is `kicked`, a is not what stands there but added to what does, which then has no other derivative.
    """
    step = rows.step
    sinks = [product.operand for product in products] + [step.graph.output]
    order = rows.order(ancestors(sinks, stop=() if kicked else step.kicks.replaced))
    takes = [taking(product.positions.ravel(), rows) for product in products] + [lambda flat: flat]
    replaced = {node: taking(kicks.ravel(), rows) for node, kicks in step.kicks.replaced.items()}
    added = {node: taking(kicks.ravel(), rows) for node, kicks in step.kicks.added.items()}
    kicking = {node for node, kicks in step.kicks.replaced.items() if (kicks >= 0).any()}

    def row(x: Tensor, z: Tensor, a: Tensor) -> list[Tensor]:
        env = rows.fixed | rows.arguments(x, z)
        for node in order:
            if node in replaced and not kicked:
                env[node] = replaced[node](a).reshape(node.shape)
                continue
            run([node], env)
            if node in replaced:
                env[node] = env[node].detach()
            if node in kicking:
                env[node] = env[node] + replaced[node](a).reshape(node.shape)
            if node in added:
                env[node] = env[node] + added[node](a).reshape(node.shape)
        flat = [env[node].reshape(-1) for node in sinks]  # [element]
        return [take(f) for f, take in zip(flat, takes, strict=True)]

    return row


def matrix(rows: RowFunctions, product: StepProduct) -> Tensor:
    """The product's matrix [d, m]."""
    if product.factor is not None and product.has_matrix:
        return as_matrices(product.node, product.factor, rows.fixed[product.factor])[product.matrix].contiguous()
    like = rows.like
    return vmap(linear_map(rows, product))(torch.eye(product.positions.size, dtype=like.dtype, device=like.device))


def linear_map(rows: RowFunctions, product: StepProduct) -> Callable[[Tensor], Tensor]:
    """The product without a matrix, from its operand to its result, both flat."""
    fixed = {} if product.factor is None else {product.factor: rows.fixed[product.factor]}
    shape = product.operand.shape
    return lambda v: evaluate(product.node, fixed | {product.operand: v.reshape(shape)}).reshape(-1)


def jacobians(sinks: Callable, x: Tensor, z: Tensor, a: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """For each sink its derivatives in z and in a, [time, trial, sink, source].

    By reverse mode where the elements of all sinks, `count`, are fewer than the sources.
    """
    sources = z.shape[-1] + a.shape[-1]
    jacobian = jacrev if count < sources else jacfwd
    with ONE_AT_A_TIME:
        found = each_row(
            lambda *row: [d for pair in jacobian(sinks, argnums=(1, 2))(*row) for d in pair],
            *(x, z, a),
            width=count * sources,
        )
    return list(zip(found[::2], found[1::2], strict=True))


def coefficients(
    sinks: RowFunction, colouring: Colouring, wanted: Sequence[np.ndarray], rows: RowFunctions
) -> RowFunction:
    """(x, z) -> the next state, and the coefficients of these numbers, one tensor for each set of them.

    They come from as many derivatives as there are colours, of one evaluation of the sinks, which are to be kicked.
    """
    places, kicks = int(colouring.places.max(initial=-1)) + 1, rows.step.kicks.size
    colours = np.arange(colouring.count)[:, None] == colouring.colours  # [colour, sink or source]
    directions = rows.index(colours).to(rows.like.dtype)
    takes = [taking(places * colouring.hues[numbers] + colouring.places[numbers], rows) for numbers in wanted]

    def row(x: Tensor, z: Tensor) -> list[Tensor]:
        value, along = _along(lambda z, a: torch.cat(sinks(x, z, a)), z, z.new_zeros(kicks), colouring.of_sinks)
        if colouring.count > COLOURS_TOGETHER:
            images = vmap(along, chunk_size=COLOURS_TOGETHER)(directions)[:, :places].reshape(-1)
        else:
            images = torch.cat([z[:0], *(along(direction)[:places] for direction in directions)])
        return [value[-rows.step.state_size :], *(take(images) for take in takes)]

    return row


def _along(
    function: Callable[..., Tensor], z: Tensor, a: Tensor, of_sinks: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Its value at (z, a); and its derivative of a direction of its results, pulled back to both, or of one of both."""
    if of_sinks:
        value, pull, *_ = vjp(function, z, a)
        return value, lambda direction: torch.cat(pull(direction))
    split = [len(z), len(a)]
    return function(z, a), lambda direction: jvp(function, (z, a), direction.split(split))[1]
