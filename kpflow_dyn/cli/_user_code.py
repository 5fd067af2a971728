"""A problem out of the user's own Python code, named as module:function or file.py:function."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

FORM = "module:function, or file.py:function"


def problem_from(reference: str) -> Any:
    """What the user's function returns: a DiscreteProblem, an ODEProblem or a Solution.

    The code runs as it would in `python file.py`, or after `import module` in the current folder.

    Args:
        reference: module:function, or file.py:function; the function is called without arguments.

    Raises:
        ValueError: a reference of another form, no such module or function, code that raises, or another result.

    Example:
        >>> problem_from("math:pi")
        Traceback (most recent call last):
        ...
        ValueError: math:pi is a float, expected a function without arguments that returns a problem
    """
    from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem
    from kpflow_dyn._problems.solutions import Solution

    function = _function(reference)
    found = _run(function, f"{reference} raised")
    if not isinstance(found, DiscreteProblem | ODEProblem | Solution):
        raise ValueError(
            f"{reference} returned {_a(found)}, expected a kp.DiscreteProblem, a kp.ODEProblem or a kp.Solution"
        )
    return found


def _function(reference: str) -> Callable[[], Any]:
    place, _, name = reference.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(f"--problem is {reference!r}, expected {FORM}")
    module = _run(lambda: _from_file(Path(place)) if place.endswith(".py") else _module(place), f"{place} raised")
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        nearest = "".join(f"; the nearest is {near}" for near in difflib.get_close_matches(name, own, n=1))
        raise ValueError(f"{place} has no function {name!r}{nearest}")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"{reference} is {_a(function)}, expected a function without arguments that returns a problem")
    return function


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise _NotFoundError(f"no file {path}; --problem takes {FORM}")
    sys.path.insert(0, str(path.parent.absolute()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise _NotFoundError(
            f"no module {error.name!r} in {Path.cwd()} or among the installed ones; --problem takes {FORM}"
        ) from error


class _NotFoundError(ValueError):
    """A module that is not there, as opposed to one that fails."""


def _run(code: Callable[[], Any], what: str) -> Any:
    """Run the user's code; whatever it raises becomes one error that names it."""
    try:
        return code()
    except _NotFoundError:
        raise
    except SystemExit as error:
        if error.code == 128 + signal.SIGTERM:  # this process was told to end
            raise
        raise ValueError(f"{what} SystemExit; keep what a script does under `if __name__ == '__main__':`") from error
    except Exception as error:
        raise ValueError(f"{what} {type(error).__name__}: {error}; --debug shows where") from error


def _a(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
