"""What Python knows of the user's own functions, classes and modules: what they hold, name and import."""

import dataclasses
import dis
import importlib
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import kpflow_dyn


def is_own(value: Any) -> bool:
    """Whether a function, class or module is of the user's own code: not Python's, a package's, or this package's."""
    if isinstance(value, FunctionType):  # where it was written, which its __module__ need not say
        return _is_own(value.__globals__.get("__name__", "__main__"))
    return _is_own(value.__name__ if isinstance(value, ModuleType) else value.__module__)


def _is_own(name: str) -> bool:
    top = name.partition(".")[0]
    if top == kpflow_dyn.__name__:
        return False
    files = (getattr(sys.modules.get(module), "__file__", None) for module in (name, top))
    file = next(filter(None, files), None)
    return top not in sys.stdlib_module_names if file is None else _is_own_file(file)


def _is_own_file(file: str) -> bool:
    path = Path(file)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not installed and not path.is_relative_to(sysconfig.get_path("stdlib"))


def methods_of(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """The methods that were written, also behind a decorator; what a dataclass generates follows from its fields."""
    for name, value in sorted(vars(kind).items()):
        for function in _functions_in(value):
            generated = name.startswith("__") and function.__code__.co_filename == "<string>"
            if is_own(function) and not (generated and dataclasses.is_dataclass(kind)):
                yield name, function


def _functions_in(value: Any) -> Iterator[FunctionType]:
    """The functions that an entry of a class is made of: a method, a property, what a decorator wraps."""
    found = [value, *(getattr(value, name, None) for name in _WRAPPED)]
    return (function for function in found if isinstance(function, FunctionType))


_WRAPPED = ("__func__", "__wrapped__", "fget", "fset", "func", "method")


def values_in(kind: type) -> dict[str, Any]:
    """What stands in the body of a class beside methods and what Python puts there."""
    entries = sorted(vars(kind).items())
    plain = {name: value for name, value in entries if not name.startswith(("__", "_abc_"))}
    return {n: v for n, v in plain.items() if not any(_functions_in(v)) and not inspect.isdatadescriptor(v)}


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, None where one is not set."""
    return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}


def closure_of(function: FunctionType) -> dict[str, Any]:
    """What a function holds of the function that it was made in."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: _cell(cell) for name, cell in cells}


def defaults_of(function: FunctionType) -> list[Any]:
    """The values of its arguments, of those that are given by name with their names."""
    return [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a function that refers to itself, before it is there
        return None


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of those that are made inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def names_in(code: CodeType) -> set[str]:
    """All names of globals and attributes in a code."""
    return {name for each in _codes(code) for name in each.co_names}


def imports_of(function: FunctionType) -> list[ModuleType]:
    """The modules of the user's own that a function imports when it is called."""
    package = function.__globals__.get("__package__")
    found = set()
    for code in _codes(function.__code__):
        steps = list(dis.get_instructions(code))
        for level, _taken, step in zip(steps, steps[1:], steps[2:], strict=False):
            if step.opname == "IMPORT_NAME":
                found.add("." * (level.argval or 0) + str(step.argval))
    modules = (_own_module(name, package) for name in sorted(found))
    return [module for module in modules if module is not None]


def _own_module(name: str, package: str | None) -> ModuleType | None:
    """The module of this name, None where it is not of the user's own code, or not there."""
    try:
        full = importlib.util.resolve_name(name, package)
        spec = importlib.util.find_spec(full.partition(".")[0])
        file = spec and (spec.origin or next(iter(spec.submodule_search_locations or ()), None))
        if file is None or file in ("built-in", "frozen") or full.split(".")[0] == kpflow_dyn.__name__:
            return None
        return importlib.import_module(full) if _is_own_file(file) else None
    except (ImportError, ValueError):  # run will fail, or does without
        return None


def wrapped_by(value: Any) -> FunctionType | None:
    """The function behind a decorator, such as a cache or a compilation."""
    found = None if isinstance(value, type) else getattr(value, "__wrapped__", None)
    return found if isinstance(found, FunctionType) else None
