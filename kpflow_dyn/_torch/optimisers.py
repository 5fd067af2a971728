"""The learning rates of torch optimisers, entry by entry."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn, optim

Rate = Callable[[dict[str, Any], dict[str, Any]], Tensor | float]


def learning_rates(optimizer: optim.Optimizer, model: nn.Module) -> dict[str, Tensor | float]:
    """By name, what the optimiser's next step multiplies a gradient by: lr / (sqrt(v_hat) + eps), with v_hat as it is.

    Raises:
        TypeError: an optimiser whose step is no such product.
        ValueError: parameters that have not been stepped yet, or maximize=True.
    """
    rate = next((rate for kind, rate in RATES.items() if isinstance(optimizer, kind)), None)
    if rate is None:
        known = ", ".join(kind.__name__ for kind in RATES)
        raise TypeError(f"the learning rates of {type(optimizer).__name__} are not known, only those of {known}")
    names, found = {parameter: name for name, parameter in model.named_parameters()}, {}
    for group in optimizer.param_groups:
        if group.get("maximize"):
            raise ValueError("the optimiser goes uphill (maximize=True), which no metric does")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if not state and rate is not _sgd:
                raise ValueError(
                    f"{type(optimizer).__name__} has no second moment of {names.get(parameter, 'a parameter')} yet; "
                    "take a step first"
                )
            if parameter in names:
                found[names[parameter]] = rate(group, state)
    return found


def _sgd(group: dict[str, Any], state: dict[str, Any]) -> float:
    return float(group["lr"])


def _adam(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    correction = 1 - float(group["betas"][1]) ** float(state["step"])
    return float(group["lr"]) / ((second.detach() / correction).sqrt() + group["eps"])


def _adagrad(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    decayed = float(group["lr"]) / (1 + float(state["step"]) * group["lr_decay"])
    return decayed / (state["sum"].detach().sqrt() + group["eps"])


def _rmsprop(group: dict[str, Any], state: dict[str, Any]) -> Tensor:
    second = state["square_avg"].detach()
    if group["centered"]:
        second = second - state["grad_avg"].detach() ** 2
    return float(group["lr"]) / (second.sqrt() + group["eps"])


RATES: dict[type[optim.Optimizer], Rate] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.Adagrad: _adagrad,
    torch.optim.RMSprop: _rmsprop,
}
