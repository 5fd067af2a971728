"""Operations of torch as simpler ones, in which the weights are products, sums and scales of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _convolution_and_sum(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    if bias is None:
        return NotImplemented
    return aten.convolution(x, weight, None, *options) + bias.reshape([-1] + [1] * (weight.ndim - 2))


def _sum_and_product(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Apart, since the product is one weight site and the bias another."""
    product = left @ right if alpha == 1 else alpha * (left @ right)
    return product + (bias if beta == 1 else beta * bias)


def _standardised(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sd through means, which are fixed linear maps, so that the rest is elementwise; mean and 1 / sd."""
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    scale = torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
    return centred * scale, mean, scale


def _along_channels(out: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Weights and biases of the second axis."""
    shape = [1, -1] + [1] * (out.ndim - 2)
    out = out if weight is None else out * weight.reshape(shape)
    return out if bias is None else out + bias.reshape(shape)


def _layer_norm(x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple:
    out, mean, scale = _standardised(x, list(range(-len(shape), 0)), eps)
    out = out if weight is None else out * weight
    return out if bias is None else out + bias, mean, scale


def _batch_norm_in_eval(x, weight, bias, mean, var, momentum, eps) -> tuple:
    shape = [1, -1] + [1] * (x.ndim - 2)
    out = (x - mean.reshape(shape)) * torch.rsqrt(var + eps).reshape(shape)
    return _along_channels(out, weight, bias), x.new_empty(0), x.new_empty(0)


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, channels: int, places: int, groups: int, eps: float
) -> tuple:
    out, mean, scale = _standardised(x.reshape(n, groups, -1), [-1], eps)
    return _along_channels(out.reshape(x.shape), weight, bias), mean, scale


def _norm_of_batch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> tuple:
    """As an instance norm calls it, with trials among the channels."""
    out, mean, scale = _standardised(x, [0, *range(2, x.ndim)], eps)
    return _along_channels(out, weight, bias), mean, scale


def _embedding(weight: Tensor, tokens: Tensor, padding: int = -1, *options: Any) -> Tensor:
    """The row that stands for no token has no gradient."""
    if padding < 0:
        return NotImplemented
    rows = aten.embedding(weight, tokens)
    return torch.where((tokens == padding)[..., None], rows.detach(), rows)


def _embedding_bag(
    weight: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    scale_by_frequency: bool = False,
    mode: int = 0,
    sparse: bool = False,
    by_token: Tensor | None = None,
    include_last: bool = False,
    padding: int = -1,
) -> Any:
    """Sums or means of rows of a table, each bag from its offset to the next; not the largest of each."""
    if mode > 1 or scale_by_frequency:
        return NotImplemented
    starts = offsets[:-1] if include_last else offsets
    places = torch.arange(len(tokens), device=tokens.device)[:, None]
    bag = (places >= starts).sum(1) - 1  # of each token
    counts = (bag[:, None] == torch.arange(len(starts), device=tokens.device)) & (tokens != padding)[:, None]
    share = counts.to(weight.dtype)  # [token, bag]
    number = counts.sum(0)
    if mode == 1:
        share = share / number.clamp(min=1)
    if by_token is not None:
        share = share * by_token[:, None]
    return share.T @ aten.embedding(weight, tokens), bag, number, offsets


def _windows(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    """The windows [..., size] of an axis, by an index: torch has no rule to map the backward pass of unfold."""
    starts = torch.arange(0, x.shape[dim] - size + 1, step, device=x.device)
    places = starts[:, None] + torch.arange(size, device=x.device)
    return x.movedim(dim, -1)[..., places].movedim(-2, dim % x.ndim)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.addmm.default: _sum_and_product,
    aten.baddbmm.default: _sum_and_product,
    aten.convolution.default: _convolution_and_sum,
    aten.native_layer_norm.default: _layer_norm,
    aten._native_batch_norm_legit_no_training.default: _batch_norm_in_eval,
    aten.native_group_norm.default: _group_norm,
    aten._native_batch_norm_legit.no_stats: _norm_of_batch,
    aten.embedding.default: _embedding,
    aten._embedding_bag.default: _embedding_bag,
    aten._embedding_bag_forward_only.default: _embedding_bag,
    aten.unfold.default: _windows,
    aten._neg_view.default: torch.neg,  # which torch.func cannot map
}
WHOLE = [aten.hardsigmoid.default]  # its own backward pass rounds, which its parts would not do
