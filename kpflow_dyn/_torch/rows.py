"""The functions of rows that a torch tangent needs: the sinks of the glue, their derivatives, matrices of products."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import jacfwd, vmap

from kpflow_dyn._backend import RowFunction
from kpflow_dyn._torch.glue import StepProduct
from kpflow_dyn._torch.left_alone import ONE_AT_A_TIME
from kpflow_dyn._torch.transforms import each_row, jvp
from kpflow_dyn.tracing._graph import ancestors, evaluate, run
from kpflow_dyn.tracing._rows import RowFunctions
from kpflow_dyn.tracing._uses import as_matrices


def sinks_of(rows: RowFunctions, products: Sequence[StepProduct]) -> RowFunction:
    """(x, z, a) -> the sinks: each product's operand and the next state, with the kicks a in their places."""
    step = rows.step
    sinks = [product.operand for product in products] + [step.graph.output]
    order = rows.order(ancestors(sinks, stop=step.kicks.replaced))
    takes = [rows.index(product.positions.ravel()) for product in products] + [None]
    replaced = {node: rows.index(kicks) for node, kicks in step.kicks.replaced.items()}
    added = {node: rows.index(kicks) for node, kicks in step.kicks.added.items()}

    def row(x: Tensor, z: Tensor, a: Tensor) -> list[Tensor]:
        kicks = torch.cat([a, a.new_zeros(1)])
        env = rows.fixed | rows.arguments(x, z)
        for node in order:
            if node in replaced:
                env[node] = kicks[replaced[node]].reshape(node.shape)
                continue
            run([node], env)
            if node in added:
                env[node] = env[node] + kicks[added[node]].reshape(node.shape)
        flat = [env[node].reshape(-1) for node in sinks]  # [element]
        return [f if take is None else f[take] for f, take in zip(flat, takes, strict=True)]

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


def jacobians(sinks: Callable, x: Tensor, z: Tensor, a: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each sink its derivatives in z and in a, [time, trial, sink, source]."""
    with ONE_AT_A_TIME:
        found = each_row(lambda *row: [d for pair in jacfwd(sinks, argnums=(1, 2))(*row) for d in pair], x, z, a)
    return list(zip(found[::2], found[1::2], strict=True))


def tangents(sinks: Callable, x: Tensor, z: Tensor, a: Tensor, dz: Tensor, da: Tensor) -> Tensor:
    """The sinks' tangents in some directions (dz [direction, unit], da [direction, kick]) for all rows.

    Side by side: [time, trial, direction, sink].
    """

    def row(x: Tensor, z: Tensor, a: Tensor) -> list[Tensor]:
        def along(dz: Tensor, da: Tensor) -> Tensor:
            return torch.cat(jvp(lambda z, a: sinks(x, z, a), (z, a), (dz, da))[1])

        return [along(dz[0], da[0])[None] if len(dz) == 1 else vmap(along)(dz, da)]

    return each_row(row, x, z, a)[0]
