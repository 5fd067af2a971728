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


def _copy(into: Tensor, source: Tensor, *options: Any) -> Tensor:
    return source.to(into.dtype).expand(into.shape)


def _slice_scatter(
    x: Tensor, source: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """What is written, and what stays, out of both side by side."""
    places = list(range(x.shape[dim]))
    taken = list(places)
    for n, place in enumerate(places[slice(start, end, step)]):
        taken[place] = len(places) + n
    return torch.cat([x, source], dim).index_select(dim, torch.tensor(taken, device=x.device))


def _select_scatter(x: Tensor, source: Tensor, dim: int, index: int) -> Tensor:
    index %= x.shape[dim]
    return _slice_scatter(x, source.unsqueeze(dim), dim, index, index + 1)


def _write_at(x: Tensor, indices: list[Tensor | None], value: Tensor, accumulate: bool = False) -> Tensor:
    """One value where a mask says so; the recorder knows no other masks."""
    if not any(i is not None and i.dtype == torch.bool for i in indices):
        return NotImplemented
    masks = [i for i in indices if i is not None]
    mask = masks[0].reshape(masks[0].shape + (1,) * (x.ndim - masks[0].ndim - indices.index(masks[0])))
    return torch.where(mask, x + value if accumulate else value, x)


def _places(x: Tensor, size: list[int], stride: list[int], start: int | None) -> Tensor:
    """The elements of x, counted as they lie, that a view of its storage takes."""
    places = torch.full((), start or 0, device=x.device)
    for length, step in zip(size, stride, strict=True):
        places = places.unsqueeze(-1) + step * torch.arange(length, device=x.device)
    return places


def _as_strided_scatter(
    x: Tensor, source: Tensor, size: list[int], stride: list[int], start: int | None = None
) -> Tensor:
    if not x.is_contiguous():
        return NotImplemented
    places = _places(x, size, stride, start).reshape(-1)
    return x.reshape(-1).index_put((places,), source.reshape(-1)).reshape(x.shape)


def _full_like(x: Tensor, value: float, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """It hangs on nothing."""
    return torch.full(x.shape, value, dtype=dtype or x.dtype, device=x.device)


def _solve(A: Tensor, B: Tensor, *, left: bool = True, check_errors: bool = False) -> tuple[Tensor, ...]:
    """Through the inverse, which is a weight where A is one; what autograd keeps of A is that of torch."""
    vector = B.ndim == 1 or (B.ndim == A.ndim - 1 and B.shape == A.shape[:-1])
    inverse, columns = torch.linalg.inv_ex(A)[0], B.unsqueeze(-1) if vector else B
    found = inverse @ columns if left else columns @ inverse
    factors = torch.linalg.lu_factor_ex(A.mT if A.is_contiguous() else A)
    return found.squeeze(-1) if vector else found, *factors


def _distances(a: Tensor, b: Tensor, p: float, *options: Any) -> Tensor:
    """cdist."""
    return torch.linalg.vector_norm(a.unsqueeze(-2) - b.unsqueeze(-3), p, -1)


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
    """Sums, means or maxima of rows of a table, each bag from its offset to the next."""
    if scale_by_frequency:
        return NotImplemented
    starts = offsets[:-1] if include_last else offsets
    places = torch.arange(len(tokens), device=tokens.device)[:, None]
    bag = (places >= starts).sum(1) - 1  # of each token
    counts = (bag[:, None] == torch.arange(len(starts), device=tokens.device)) & (tokens != padding)[:, None]
    number, rows = counts.sum(0), aten.embedding(weight, tokens)
    if mode == 2:  # a last bag takes what counts for nothing
        places = torch.where(tokens == padding, len(starts), bag)[:, None].expand(rows.shape)
        none = weight.new_zeros(len(starts) + 1, weight.shape[1])
        return none.scatter_reduce(0, places, rows, "amax", include_self=False)[:-1], bag, number, offsets
    share = counts.to(weight.dtype)  # [token, bag]
    if mode == 1:
        share = share / number.clamp(min=1)
    if by_token is not None:
        share = share * by_token[:, None]
    return share.T @ rows, bag, number, offsets


def _windows(x: Tensor, dim: int, size: int, step: int) -> Tensor:
    """The windows [..., size] of an axis, by an index: torch has no rule to map the backward pass of unfold."""
    starts = torch.arange(0, x.shape[dim] - size + 1, step, device=x.device)
    places = starts[:, None] + torch.arange(size, device=x.device)
    return x.movedim(dim, -1)[..., places].movedim(-2, dim % x.ndim)


def _trilinear(
    a: Tensor, b: Tensor, c: Tensor, wide_a: list[int], wide_b: list[int], wide_c: list[int], summed: list[int], *_: Any
) -> Tensor:
    """Products of three, summed over some axes; each operand lacks the axes on which it is wide."""
    axes = range(a.ndim + len(wide_a))
    operands = ((a, wide_a), (b, wide_b), (c, wide_c))
    parts = [part for x, wide in operands for part in (x, [n for n in axes if n not in wide])]
    return torch.einsum(*parts, [n for n in axes if n not in summed])


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
    aten.copy.default: _copy,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.index_put.default: _write_at,
    aten.as_strided_scatter.default: _as_strided_scatter,
    aten.full_like.default: _full_like,
    aten.zeros_like.default: lambda x, **options: _full_like(x, 0, **options),
    aten.ones_like.default: lambda x, **options: _full_like(x, 1, **options),
    aten._linalg_solve_ex.default: _solve,
    aten._cdist_forward.default: _distances,
    aten._trilinear.default: _trilinear,
}
WHOLE = [aten.hardsigmoid.default]  # its own backward pass rounds, which its parts would not do
