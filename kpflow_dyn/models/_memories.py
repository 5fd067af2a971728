"""How many numbers a policy keeps from sample to sample, and how it must be called for that."""

import inspect
from collections.abc import Callable
from typing import Any

from kpflow_dyn.models._equations import is_lstm

CELLS = {"RNNBase", "RNNCellBase", "GRUCell", "LSTMCell"}  # classes of torch and equinox


def is_recurrent(policy: Any, function_of: Callable[[Any], Any]) -> bool:
    """Whether a policy is a cell or a recurrent layer."""
    known = any(base.__name__ in CELLS for base in type(policy).__mro__)
    return known or (hasattr(policy, "hidden_size") and _arguments(function_of(policy))[0] > 1)


def memory_of(policy: Any, readout: Any, memory: int | None, function_of: Callable[[Any], Any]) -> int:
    """The width of the memory of a sampled policy; `function_of` is what a model computes.

    Raises:
        TypeError: a policy that is called otherwise.
        ValueError: a memory of another width than its cell, or one that is missing.
    """
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 1):
        raise ValueError(f"memory is {memory!r}, expected how many numbers the policy keeps from sample to sample")
    if any(base.__name__ == "RNNBase" for base in type(policy).__mro__):
        layer = type(policy).__name__
        raise TypeError(
            f"the policy is a torch.nn.{layer}, which runs over a whole sequence; a sample is a step of its cell: give "
            f"torch.nn.{layer}Cell({getattr(policy, 'input_size', 'inputs')}, {policy.hidden_size})"
        )
    hidden: Any = getattr(policy, "hidden_size", None)
    if readout is not None:
        return _of_cell(policy, hidden, memory)
    if memory is None and is_recurrent(policy, function_of):
        raise ValueError("the policy is a cell, whose h is no control; give readout=, such as Linear(hidden, control)")
    least, most = _arguments(function_of(policy))
    if memory is None and least > 1:
        raise TypeError(
            f"the policy takes {least} arguments, and without a memory it is called on [z, x_t] alone; for a "
            "policy(memory, observation) -> (memory, control) give every=, and memory=, how many numbers it keeps"
        )
    if memory is not None and most < 2:
        raise TypeError(
            "the policy takes one argument, and with memory= it is called as policy(memory, observation) -> (memory, "
            "control); leave out memory=, or give a cell with its readout="
        )
    return memory or 0


def _of_cell(policy: Any, hidden: Any, memory: int | None) -> int:
    if hidden is None and memory is None:
        raise ValueError("a policy with a readout is a cell; give memory=, the width of its hidden state")
    if hidden is None:
        assert memory is not None
        return memory
    width = int(hidden) * (2 if is_lstm(policy) else 1)
    if memory not in (None, width):
        raise ValueError(
            f"memory is {memory}, but the {type(policy).__name__} keeps {width} numbers; leave memory= out"
        )
    return width


def _arguments(function: Any) -> tuple[int, float]:
    """How many arguments a function must have, and may have, by their place."""
    try:
        given = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return 0, float("inf")
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in given):
        return 0, float("inf")
    places = [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return sum(p.default is p.empty for p in places), len(places)
