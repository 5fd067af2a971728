"""Objects out of the user's own Python code, named as module:name or file.py:name."""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from kpflow_dyn.tasks._data import check_options, options_of


def object_at(reference: str, asked_by: str, kind: str = "name") -> Any:
    """The object of this name in a module or file, which runs as in `python file.py`, or after `import module` here.

    The option that asked for it, and the kind of object expected there, are for messages. A ValueError where there is
    none, or where the code raises.
    """
    place, _, name = reference.rpartition(":")
    form = f"module:{kind}, or file.py:{kind}"
    if not place or not name.isidentifier():
        raise ValueError(f"{asked_by} is {reference!r}, expected {form}")
    takes = f"{asked_by} takes {form}"
    load = (lambda: _from_file(Path(place), takes)) if place.endswith(".py") else (lambda: _module(place, takes))
    module = run(load, f"{place} raised")
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        nearest = "".join(f"; the nearest is {near}" for near in difflib.get_close_matches(name, own, n=1))
        raise ValueError(f"{place} has no {kind} {name!r}{nearest}")
    return getattr(module, name)


def made_by(reference: str, asked_by: str, method: str, options: dict[str, Any]) -> Any:
    """The object with this method under a name, or what the class or function there makes of the options."""
    found = object_at(reference, asked_by)
    if hasattr(found, method) and not isinstance(found, type):
        if options:
            raise TypeError(f"{reference} is made already and takes no {', '.join(options)}; name its class instead")
        return found
    if not callable(found):
        raise TypeError(f"{reference} is {found!r}, expected an object with {method}(...), or a class of such")
    if (taken := options_of(found)) is not None:
        check_options(reference, options, taken)
    if not hasattr(made := run(lambda: found(**options), f"{reference} raised"), method):
        raise TypeError(f"{reference} made {made!r}, expected an object with {method}(...)")
    return made


def _from_file(path: Path, takes: str) -> ModuleType:
    if not path.is_file():
        raise _NotFoundError(f"no file {path}; {takes}")
    sys.path.insert(0, str(path.parent.absolute()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _module(name: str, takes: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        where = f"in {Path.cwd()} or among the installed ones"
        raise _NotFoundError(f"no module {error.name!r} {where}; {takes}") from error


class _NotFoundError(ValueError):
    """A module that is not there, as opposed to one that fails."""


def run(code: Callable[[], Any], what: str) -> Any:
    """Run the user's code; whatever it raises becomes one error that names it."""
    try:
        return code()
    except _NotFoundError:
        raise
    except SystemExit as error:
        raise ValueError(f"{what} SystemExit; keep what a script does under `if __name__ == '__main__':`") from error
    except Exception as error:
        raise ValueError(f"{what} {type(error).__name__}: {error}; --debug shows where") from error
