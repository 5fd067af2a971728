"""What a function is, so that a change of it is noticed: its code, what it holds, and whatever it reaches.

Code is compared as Python runs it, so that comments and layout do not count, and a file that is edited while a session
runs does not pass for what the session computed with.
"""

import dataclasses
import functools
import platform
from collections.abc import Callable, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import kpflow_dyn
from kpflow_dyn.sweep._digests import Digests, hashed
from kpflow_dyn.sweep._own import (
    closure_of,
    defaults_of,
    fields_of,
    imports_of,
    is_own,
    methods_of,
    names_in,
    values_in,
    wrapped_by,
)

VERSIONS = ("kpflow_dyn", "Python")


class Code:
    """The code of a function over time: what its own calls change, as a list that they fill, is no change of it.

    Attributes:
        opaque: what it reaches and nothing can take apart, such as a lock, so that a change of it is not seen.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self.opaque: list[str] = []
        self._before: dict[str, str] = {}
        self._after: dict[str, str] = {}

    def now(self) -> dict[str, str]:
        """The parts, as they were before its calls, but those that were changed since."""
        walk = _walked(self.run)
        found, self.opaque = walk.parts, walk.digests.opaque
        kept = {name for name in found if found[name] == self._after.get(name)} & set(self._before)
        return {name: self._before[name] if name in kept else found[name] for name in found}

    def called(self, before: dict[str, str]) -> None:
        """Calls have ended, before which the code was this."""
        self._before, self._after = before, code_of(self.run)


def code_of(run: Callable[..., Any]) -> dict[str, str]:
    """The parts that a result depends on, each with a digest: what `run` is made of, and the versions.

    Followed are the functions, classes and modules of the user's own code, and the values that these reach as globals,
    closures, defaults, attributes and fields, taken apart as pickle would. Of Python and of installed packages the name
    alone counts. The digests are the same in every process.

    >>> code_of(lambda g: {})["kpflow_dyn"] == kpflow_dyn.__version__
    True
    """
    return _walked(run).parts


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs, in words.

    >>> changes({"run": "a", "kpflow_dyn": "0.1"}, {"run": "b", "kpflow_dyn": "0.1"})
    ['run']
    """
    found = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    versions = {name: f"{name} {before.get(name)} -> {now.get(name)}" for name in VERSIONS}
    return [versions.get(name, name) for name in found]


def name_of(run: Any) -> str:
    """What a function is called."""
    of = _function(run)
    return getattr(of, "__qualname__", f"the {type(of).__qualname__}")


def _function(run: Any) -> Any:
    return _function(run.func) if isinstance(run, functools.partial) else run


def _walked(run: Any) -> "_Walk":
    of = _function(run)
    walk = _Walk(getattr(of, "__module__", None))
    walk.add(name_of(run), run)
    walk.parts |= {"kpflow_dyn": kpflow_dyn.__version__, "Python": ".".join(platform.python_version_tuple()[:2])}
    return walk


class _Walk:
    """Collects the parts of a function, each with the digest of what it is."""

    def __init__(self, module: str | None) -> None:
        self.module = module  # whose globals go by their plain names
        self.parts: dict[str, str] = {}
        self.digests = Digests(self.source)
        self.sources: dict[Any, str] = {}  # the part that a function or class of the user's own is
        self.holders: set[int] = set()  # functions whose closures are parts already

    def add(self, name: str, value: Any) -> None:
        """A part, or as many as have names of their own."""
        if isinstance(value, functools.partial):
            self.add(f"arguments of {name}", (value.args, value.keywords))
            self.add(name, value.func)
        elif isinstance(value, MethodType):
            self.add(name, value.__func__)
            self.add(f"the object of {name}", value.__self__)
        elif isinstance(value, FunctionType | type) and is_own(value):
            self.source(value, name)
            self.holds(name, value)
        elif (wrapped := wrapped_by(value)) is not None:
            self.add(name, wrapped)
            self.holds(f"what wraps {name}", value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field, held in fields_of(value).items():
                self.add(f"{field} of {name}", held)
            self.digests.of(type(value))
        else:
            self.digests.part = name
            self.put(name, self.digests.of(value))

    def put(self, name: str, digest: str) -> str:
        """Note a part, under another name where this one is taken by another."""
        while self.parts.setdefault(name, digest) != digest:
            name += "'"
        return name

    def source(self, value: Any, name: str = "") -> str:
        """A function or class of the user's own is a part, and what it reaches are others; the name of the part."""
        is_class = isinstance(value, type)
        key = value if is_class else value.__code__
        if key not in self.sources:
            code = self.of_class_body(value) if is_class else self.of_code(value.__code__)
            self.sources[key] = self.put(name or value.__qualname__, code)
            (self.reach_of_class if is_class else self.reach)(value)
        return self.sources[key]

    def of_class_body(self, kind: type) -> str:
        codes = [(name, self.of_code(function.__code__)) for name, function in methods_of(kind)]
        return hashed(f"{kind.__qualname__} {list(vars(kind).get('__annotations__', {}))} {codes}")

    def of_code(self, code: CodeType) -> str:
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        constants = [self.of_code(c) if isinstance(c, CodeType) else self.digests.of(c) for c in code.co_consts]
        return hashed(f"{code.co_code.hex()} {code.co_exceptiontable.hex()} {counts} {names} {constants}")

    def reach_of_class(self, kind: type) -> None:
        """Its bases, what its methods reach and hold, and the values in its body."""
        for base in (*kind.__bases__, type(kind)):
            self.digests.of(base)
        for name, function in methods_of(kind):
            self.reach(function)
            self.holds(f"{kind.__qualname__}.{name}", function)
        for name, value in values_in(kind).items():
            self.add(f"{kind.__qualname__}.{name}", value)

    def reach(self, function: FunctionType) -> None:
        """The globals that a function names, and the modules that it imports."""
        names, space = names_in(function.__code__), function.__globals__
        module = space.get("__name__")
        prefix = "" if module == self.module else f"{module}."
        for used in sorted(names & set(space)):
            self.reached(prefix + used, space[used], names)
        for imported in imports_of(function):
            self.reached(imported.__name__, imported, names)

    def reached(self, name: str, value: Any, names: set[str]) -> None:
        """A global; of a module of the user's own the attributes that could be meant."""
        if not isinstance(value, ModuleType):
            self.add(name, value)
        elif is_own(value) and id(value) not in self.holders:
            self.holders.add(id(value))
            for used in sorted(names & set(vars(value))):
                self.reached(f"{value.__name__}.{used}", vars(value)[used], names)
            self.holders.discard(id(value))

    def holds(self, name: str, value: Any) -> None:
        """The closure and the defaults of a function."""
        if isinstance(value, FunctionType) and id(value) not in self.holders:
            self.holders.add(id(value))
            for inner, held in closure_of(value).items():
                self.add(f"{inner} in {name}", held)
            if defaults := defaults_of(value):
                self.add(f"defaults of {name}", defaults)
