"""What a function is, so that a change of it is noticed: its source, what it holds, and what it calls of its module."""

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np

import kpflow_dyn


def code_of(run: Callable[..., Any]) -> dict[str, str]:
    """The parts that a result depends on, each with a digest: what `run` is made of, and the version of this package.

    Followed are functions and classes of the module of `run`, its closure, its defaults, and the arguments of a
    partial; not those of other modules, nor what objects hold that are no numbers, strings, arrays or dataclasses.

    >>> code_of(lambda g: {})["kpflow_dyn"] == kpflow_dyn.__version__
    True
    """
    parts: dict[str, str] = {}
    _Walk(parts, getattr(_function(run), "__module__", None)).add(name_of(run), run)
    return parts | {"kpflow_dyn": kpflow_dyn.__version__}


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs, in words.

    >>> changes({"run": "a", "kpflow_dyn": "0.1"}, {"run": "b", "kpflow_dyn": "0.1"})
    ['run']
    """
    found = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    versions = {"kpflow_dyn": f"kpflow_dyn {before.get('kpflow_dyn')} -> {now.get('kpflow_dyn')}"}
    return [versions.get(name, name) for name in found]


def name_of(run: Any) -> str:
    """What a function is called."""
    of = _function(run)
    return getattr(of, "__qualname__", f"the {type(of).__qualname__}")


def _function(run: Any) -> Any:
    return _function(run.func) if isinstance(run, functools.partial) else run


class _Walk:
    """Collects the parts of a function of one module."""

    def __init__(self, parts: dict[str, str], module: str | None) -> None:
        self.parts, self.module = parts, module
        self.seen: set[int] = set()

    def add(self, name: str, value: Any) -> None:
        if name in self.parts or isinstance(value, ModuleType):
            return
        if isinstance(value, functools.partial):
            self.add(f"arguments of {name}", (value.args, value.keywords))
            self.add(name, value.func)
        elif isinstance(value, FunctionType | type):
            self.add_source(name, value)
        elif inspect.ismethod(value):
            self.add(name, value.__func__)
            self.add(f"the object of {name}", value.__self__)
        elif dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                self.add(f"{field.name} of {name}", getattr(value, field.name))
            self.add(type(value).__qualname__, type(value))
        else:
            self.parts[name] = _digest(_content(value))
            if not isinstance(value, _PLAIN):
                self.add(type(value).__qualname__, type(value))

    def add_source(self, name: str, value: FunctionType | type) -> None:
        """A function or class of this module, and what it refers to; of others the name alone."""
        if value.__module__ != self.module:
            self.parts[name] = f"{value.__module__}.{value.__qualname__}"
            return
        if id(value) in self.seen:  # one that refers to itself
            return
        self.seen.add(id(value))
        self.parts[name] = _digest(_source(value))
        for function in [value] if isinstance(value, FunctionType) else _methods(value):
            self.add_held(name, function)

    def add_held(self, name: str, function: FunctionType) -> None:
        held = [function.__defaults__, function.__kwdefaults__]
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for inner, cell in cells:
            self.add(f"{inner} in {name}", _cell(cell))
        if any(held):
            self.add(f"defaults of {name}", held)
        for used in sorted(_names(function.__code__) & set(function.__globals__)):
            self.add(used, function.__globals__[used])


_PLAIN = (bool, int, float, complex, str, bytes, tuple, list, dict, set, np.ndarray, np.generic, type(None))


def _methods(kind: type) -> list[FunctionType]:
    """Those that were written; what a dataclass generates follows from its source."""
    functions = [value for value in vars(kind).values() if isinstance(value, FunctionType)]
    return [function for function in functions if function.__code__.co_filename != "<string>"]


def _names(code: CodeType) -> set[str]:
    """The names in a function's code and in those that are made inside of it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a function that refers to itself, before it is there
        return None


def _source(value: FunctionType | type) -> str:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):  # typed in, without a file
        functions = [value] if isinstance(value, FunctionType) else _methods(value)
        return repr([(f.__code__.co_code.hex(), f.__code__.co_names, _constants(f.__code__)) for f in functions])


def _constants(code: CodeType) -> list[Any]:
    return [_constants(c) if isinstance(c, CodeType) else c for c in code.co_consts]


def _content(value: Any) -> str:
    """A text that is the same where the value is, as far as that can be seen."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{value.shape}{hashlib.sha256(value.tobytes()).hexdigest()}"
    if isinstance(value, Mapping):
        return repr(sorted((repr(key), _content(entry)) for key, entry in value.items()))
    if isinstance(value, tuple | list):
        return repr([_content(entry) for entry in value])
    if isinstance(value, set | frozenset):
        return repr(sorted(_content(entry) for entry in value))
    if isinstance(value, FunctionType):
        return _source(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _content({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    return repr(value) if isinstance(value, _PLAIN) else type(value).__qualname__


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
