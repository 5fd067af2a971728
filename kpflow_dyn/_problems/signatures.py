"""What the signature of a model says of how it is called; where it disagrees with how we call it, we say so."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

Parameter = inspect.Parameter
STATES = {"h", "hidden", "hx", "state", "z", "prev_state", "carry"}
INPUTS = {"x", "input", "inputs", "u", "xt", "x_t", "obs"}
TIMES = {"t", "time"}


def positional(function: Any) -> list[Parameter] | None:
    """The arguments that are given by their place; None where the function does not say."""
    try:
        known = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.VAR_POSITIONAL)
    return [p for p in known.values() if p.kind in kinds]


def counted(function: Any) -> int | None:
    """How many arguments it takes by their place; None where that is any number, or it does not say."""
    taken = positional(function)
    return None if taken is None or any(p.kind is Parameter.VAR_POSITIONAL for p in taken) else len(taken)


def begins_with(function: Any, first: set[str], second: set[str]) -> tuple[str, str] | None:
    """The names of the first two arguments, where they are among these."""
    names = [p.name for p in positional(function) or ()][:2]
    return (names[0], names[1]) if len(names) == 2 and names[0] in first and names[1] in second else None


def check_cell(cell: Any, function_of: Callable[[Any], Any], stacklevel: int) -> None:
    """Raise for what takes an input alone, and warn of a cell whose arguments are named the other way round."""
    function = function_of(cell)
    if counted(function) == 1:
        raise TypeError(
            f"a cell is called with an input and a state, cell(x_t, z), and {type(cell).__name__} takes an input "
            "alone, so it is a network over whole sequences: pose "
            'kp.StaticProblem(net, x, axes=("trial", "time", "unit")); or give its recurrent part, '
            "kp.DiscreteProblem(model.rnn, x), and its readout to the flow, flow.output(model.out)"
        )
    if named := begins_with(function, STATES, INPUTS):
        warnings.warn(
            f"cell(x_t, z) is called with the input first; {type(cell).__name__} names its arguments "
            f"({', '.join(named)}): swap them, or their names if the input does come first",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def check_field(function: Any, what: str) -> None:
    """Raise for a field whose arguments are named the other way round, as of scipy's and torch's `odeint(f(y, t))`."""
    if named := begins_with(function, STATES | {"y", "x", "u"}, TIMES):
        raise TypeError(
            f"{what}(t, z) is called with the time first; yours names its arguments ({', '.join(named)}): swap them"
        )
