"""Row functions in torch: function transforms, maps over rows in chunks, and the glue with its derivatives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import jacfwd, jvp, vjp, vmap

from kpflow_dyn._arrays import Rows as Blocks
from kpflow_dyn._arrays import joined
from kpflow_dyn._arrays.memory import rows_at_once
from kpflow_dyn._backend import RowFunction
from kpflow_dyn._torch.glue import StepProduct
from kpflow_dyn.tracing._graph import ancestors, evaluate, run
from kpflow_dyn.tracing._rows import RowFunctions
from kpflow_dyn.tracing._uses import as_matrices

ROWS_AT_ONCE = 8192

with warnings.catch_warnings():  # torch's first forward derivative in a process calls its own deprecated torch.jit
    warnings.simplefilter("ignore", DeprecationWarning)
    jvp(torch.tanh, (torch.zeros(1),), (torch.zeros(1),))


@torch.no_grad()
def each_row(function: RowFunction, *rows: Tensor) -> list[Tensor]:
    """A row function on [time, trial, ...] data -> its outputs as [time, trial, ...], some thousand rows at a time."""
    lead = rows[0].shape[:2]
    flat = [r.reshape(-1, *r.shape[2:]) for r in rows]  # [time * trial, ...]
    parts = [vmap(function)(*chunk) for chunk in zip(*(r.split(ROWS_AT_ONCE) for r in flat), strict=True)]
    return [torch.cat(outputs).reshape(*lead, *outputs[0].shape[1:]) for outputs in zip(*parts, strict=True)]


def index(numbers: np.ndarray, like: Tensor) -> Tensor:
    """Element numbers as a tensor on the same device."""
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(like.device)


@torch.no_grad()
def linearised(function: Callable[[Tensor], Tensor], point: Tensor) -> tuple[Blocks, Blocks]:
    """The derivative of a function at a point, and its transpose, on blocks of probes.

    The values on the way are kept for the transpose, and computed anew by each forward application.
    """
    value, pull = vjp(function, point)[:2]
    push = vmap(lambda tangent: jvp(function, (point,), (tangent,))[1])
    return _in_blocks(push, value), _in_blocks(vmap(lambda q: pull(q)[0]), value)


def _in_blocks(function: Blocks, like: Tensor) -> Blocks:
    """So many probes at a time as make a block of vectors like this one."""

    @torch.no_grad()
    def apply(block: Tensor) -> Tensor:
        return joined((function(part) for part in block.split(rows_at_once(like.numel(), like))), len(block))

    return apply


class TorchTransforms:
    """The function transforms of torch; see `kpflow_dyn._backend.Transforms`."""

    jvp, vjp, vmap = staticmethod(jvp), staticmethod(vjp), staticmethod(vmap)
    each_row, index, linearised = staticmethod(each_row), staticmethod(index), staticmethod(linearised)

    @staticmethod
    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return function


TORCH = TorchTransforms()


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
    found = each_row(lambda *row: [d for pair in jacfwd(sinks, argnums=(1, 2))(*row) for d in pair], x, z, a)
    return list(zip(found[::2], found[1::2], strict=True))


def tangents(sinks: Callable, x: Tensor, z: Tensor, a: Tensor, dz: Tensor, da: Tensor) -> Tensor:
    """The sinks' tangents in one direction (dz [unit], da [kick]) for all rows, side by side [time, trial, sink]."""

    def row(x: Tensor, z: Tensor, a: Tensor) -> list[Tensor]:
        return [torch.cat(jvp(lambda z, a: sinks(x, z, a), (z, a), (dz, da))[1])]

    return each_row(row, x, z, a)[0]
