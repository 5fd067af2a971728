"""Optimisers of torch: as functions of their state, and their learning rates entry by entry."""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn, optim

from kpflow_dyn._arrays.complex_numbers import as_flat, count, in_pairs, vector_of
from kpflow_dyn._backend import Values
from kpflow_dyn._shown import type_name

Rate = Callable[[dict[str, Any], dict[str, Any]], Tensor | float]
State = tuple[dict[Tensor, dict[str, Any]], list[dict[str, Any]]]  # of each parameter, and of each group

OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "rmsprop": optim.RMSprop,
    "sgd": optim.SGD,
}


class Rule:
    """An optimiser as a function of its state, on parameters [n] of its own, which are all of `like` in their order.

    Args:
        optimizer: what makes one, called as optimizer(parameters, lr=lr); or one of the user's, which is copied.
        lr: the learning rate; None for an optimiser that has its own.
        clip: scales the gradient down to this norm where it is larger.
        like: the parameters by name.
        unreached: those that the loss does not hang on; they have no gradient, and torch leaves them alone.
    """

    def __init__(
        self, optimizer: Any, lr: float | None, clip: float | None, like: Values, unreached: Collection[str] = ()
    ) -> None:
        self._parameters, self._clip = [nn.Parameter(value.detach().clone()) for value in like.values()], clip
        self._reached = [name not in unreached for name in like]
        own = made(optimizer, self._parameters, lr)
        self._optimizer = own if callable(optimizer) else _on_copies(own, like, self._parameters)

    @property
    def rate(self) -> float | None:
        """The learning rate of plain descent; None where a step is more than that."""
        groups = self._groups
        plain = type(self._optimizer) is optim.SGD and self._clip is None and len(groups) == 1
        more = any(groups[0].get(name) for name in ("momentum", "weight_decay", "maximize"))
        return float(groups[0]["lr"]) if plain and not more else None

    def begin(self, theta: Tensor) -> State:
        """Its state as it was given: empty, but for an optimiser that has stepped before."""
        return self._now()

    @torch.no_grad()
    def step(self, state: State, theta: Tensor, gradient: Tensor) -> tuple[State, Tensor]:
        """The state and the parameters after one more step."""
        own, sizes = self._parameters, [*map(count, self._parameters)]
        split = zip(own, self._reached, theta.split(sizes), gradient.split(sizes), strict=True)
        for parameter, reached, value, slope in split:
            parameter.copy_(as_flat(value, parameter))
            parameter.grad = as_flat(slope.clone(), parameter) if reached else None
        if self._clip is not None:
            nn.utils.clip_grad_norm_(own, self._clip)
        of_parameters, of_groups = state
        self._optimizer.state = defaultdict(dict, {one: _copied(kept) for one, kept in of_parameters.items()})
        for group, kept in zip(self._groups, of_groups, strict=True):
            parameters = group["params"]
            group.clear()
            group.update(_copied(kept), params=parameters)
        stepped(self._optimizer)
        return self._now(), vector_of(own)

    def _now(self) -> State:
        """The state as it is, which the next step does not change."""
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self._groups]
        return dict(self._optimizer.state), groups

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups


def made(optimizer: Any, parameters: list[nn.Parameter], lr: float | None) -> optim.Optimizer:
    """The optimiser that this makes of the parameters, or is.

    Raises:
        TypeError: where that is none, or one whose step is more than a function of the gradient.
    """
    expected = "expected a name, one of torch.optim, or what makes one"
    try:
        found = optimizer(parameters, **({} if lr is None else {"lr": lr})) if callable(optimizer) else optimizer
    except TypeError as error:
        called = "optimizer(parameters)" if lr is None else "optimizer(parameters, lr=lr)"
        raise TypeError(f"{called} fails ({error}); {expected}") from error
    if not isinstance(found, optim.Optimizer):
        raise TypeError(f"optimizer is {type_name(found)}, {expected}")
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(found).__name__} evaluates the loss itself; give an optimiser that steps by one gradient"
        )
    return found


def stepped(optimizer: optim.Optimizer) -> None:
    """Take its step by the gradients that its parameters have.

    Raises:
        TypeError: where it wants more than that.
    """
    try:
        optimizer.step()
    except (TypeError, RuntimeError) as error:
        name = type(optimizer).__name__
        raise TypeError(f"{name} does not step by plain gradients alone ({error}); take another optimiser") from error


def _on_copies(optimizer: optim.Optimizer, like: Values, copies: list[nn.Parameter]) -> optim.Optimizer:
    """The optimiser of these copies, in the place of the parameters that they are copies of."""
    theirs = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    memo, free = {}, dict(zip(like, copies, strict=True))
    for alike in (_is, _equals):  # those of the model first: a loss copies its readout
        for parameter in theirs:
            same = [name for name in free if id(parameter) not in memo and alike(like[name], parameter)]
            if len(same) > 1 and len(optimizer.param_groups) > 1:
                raise ValueError(
                    f"{same} have the same values and cannot be told apart; give them one group of options"
                )
            if same:
                memo[id(parameter)] = free.pop(same[0])
    if free or len(memo) < len(theirs):
        raise ValueError(
            f"the optimiser has {len(theirs)} parameters, of which {len(memo)} are among the {len(like)} that learn "
            f"here{f', without {[*free]}' if free else ''}; give one of the same parameters, or choose them by params="
        )
    return copy.deepcopy(optimizer, memo)


def _is(value: Tensor, parameter: Tensor) -> bool:
    return value is parameter


def _equals(value: Tensor, parameter: Tensor) -> bool:
    return value.shape == parameter.shape and value.equal(parameter)


def _copied(kept: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in kept.items()}


# Learning rates


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
                own = {name: in_pairs(v) if isinstance(v, Tensor) else v for name, v in state.items()}
                found[names[parameter]] = rate(group, own)
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
