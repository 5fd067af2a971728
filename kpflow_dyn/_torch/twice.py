"""Operations with a backward pass that torch cannot differentiate, or at twice the cost, as ones where it can.

A convolution y = w * x is linear in each of the two, and with g_x, g_w what g pulls back, v_x, v_w pull back through
that as v_x * w + x * v_w. Torch also finds the derivatives of g_x, g_w in x and w, which nobody asked for.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten
Options = tuple[Any, ...]


class TwiceDifferentiable(TorchFunctionMode):
    """While it is entered, these stand in the place of such operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function, or what stands in its place."""
        if func is aten.convolution.default and args[2] is None:
            return Convolution.apply(*args[:2], tuple(args[3:]))
        if func is aten.hardsigmoid.default:
            return _hardsigmoid(*args)
        return func(*args, **(kwargs or {}))


def _hardsigmoid(x: Tensor) -> Tensor:
    """f(u) + f'(u) (x - u) at u = x without a derivative, with the slope that torch takes, which is a rounded one."""
    u = x.detach()
    return aten.hardsigmoid(u) + aten.hardsigmoid_backward(torch.ones_like(u), u) * (x - u)


class Convolution(Function):
    """y = w * x."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, options: Options) -> Tensor:
        """Its value."""
        return aten.convolution(x, weight, None, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep the operands."""
        x, weight, ctx.options = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """What a gradient pulls back, itself differentiable where a graph of it is made."""
        x, weight = ctx.saved_tensors
        function = PulledBack.apply if torch.is_grad_enabled() else _pulled_back
        return *function(gradients[0], x, weight, ctx.options, ctx.needs_input_grad[:2]), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        """Trials [trial, 1, channel, ...] as one batch; kernels of each trial as torch takes them."""
        x, weight, options = args
        if in_dims[1] is not None:
            plain = torch.vmap(Convolution.forward, (*in_dims[:2], None), randomness=info.randomness)
            return plain(x, weight, options), 0
        x = x.movedim(in_dims[0], 0)
        return Convolution.apply(x.flatten(0, 1), weight, options).unflatten(0, x.shape[:2]), 0


class PulledBack(Function):
    """(g, x, w) -> g_x and g_w."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, options: Options, needed: tuple[bool, bool]) -> Any:
        """Their values."""
        ctx.options = options
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return _pulled_back(g, x, weight, options, needed)

    @staticmethod
    def backward(ctx: Any, *moved: Any) -> Any:
        """The derivative in g alone."""
        (x, weight), (of_x, of_weight) = ctx.saved_tensors, moved
        pairs = [(v, w) for v, w in ((of_x, weight), (x, of_weight)) if v is not None and w is not None]
        return sum(aten.convolution(v, w, None, *ctx.options) for v, w in pairs), None, None, None, None


def _pulled_back(g: Tensor, x: Tensor, weight: Tensor, options: Options, needed: tuple[bool, bool]) -> Any:
    return aten.convolution_backward(g, x, weight, None, *options, [*needed, False])[:2]
