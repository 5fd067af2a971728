"""A problem out of the user's own Python code, named as module:function or file.py:function."""

from typing import Any

from kpflow_dyn.tasks._by_path import object_at, run


def problem_from(reference: str) -> Any:
    """What the user's function returns: a problem or a Solution.

    The code runs as it would in `python file.py`, or after `import module` in the current folder.
    """
    from kpflow_dyn._problems.problems import Problem
    from kpflow_dyn._problems.solutions import Solution

    found = _made(reference, "--problem", "returns a problem")
    if not isinstance(found, Problem | Solution):
        raise ValueError(
            f"{reference} returned {_a(found)}, expected a problem (kp.DiscreteProblem, kp.ODEProblem, "
            "kp.StaticProblem(..., axes=...)) or a kp.Solution"
        )
    return found


def module_from(reference: str) -> Any:
    """The module that the user's function makes: a torch module, or a pytree of JAX."""
    from kpflow_dyn._backend import backend_of

    found = _made(reference, "--module", "makes the module")
    if backend_of(found) is None:
        raise ValueError(f"{reference} made {_a(found)}, expected a torch module or a pytree with arrays of JAX")
    return found


def _made(reference: str, option: str, purpose: str) -> Any:
    """What the function of this name returns."""
    function = object_at(reference, option, "function")
    if not callable(function):
        raise ValueError(f"{reference} is {_a(function)}, expected a function without arguments that {purpose}")
    return run(function, f"{reference} raised")


def _a(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
