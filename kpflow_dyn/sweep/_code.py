"""What a function is, so that a change of it is noticed: its code, what it holds, and whatever it reaches.

Code is compared as Python runs it, so that comments and layout do not count, and a file that is edited while a session
runs does not pass for what the session computed with.
"""

import dataclasses
import dis
import functools
import hashlib
import importlib
import importlib.util
import inspect
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

import kpflow_dyn
from kpflow_dyn._arrays import array_namespace, is_jax_array, is_torch_array, to_numpy

VERSIONS = ("kpflow_dyn", "Python")


class Code:
    """The code of a function over time: what its own calls change, as a list that they fill, is no change of it."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run
        self._before = self._after = code_of(run)

    def now(self) -> dict[str, str]:
        """The parts, as they were before its calls, but those that were changed since."""
        found = code_of(self.run)
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
    versions = dict(zip(VERSIONS, (kpflow_dyn.__version__, platform.python_version()[:4]), strict=True))
    return _walked(run).parts | versions


def unnoticed(run: Callable[..., Any]) -> list[str]:
    """What a function reaches and nothing can take apart, such as a lock, so that a change of it is not seen."""
    return _walked(run).opaque


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
    return walk


class _Walk:
    """Collects the parts of a function, each with the digest of what it is."""

    def __init__(self, module: str | None) -> None:
        self.module = module  # whose globals go by their plain names
        self.parts: dict[str, str] = {}
        self.opaque: list[str] = []
        self.part = ""  # that is taken apart now
        self.sources: dict[Any, str] = {}  # the part that a function or class of the user's own is
        self.holders: set[int] = set()  # functions whose closures are parts already
        self.known: dict[int, tuple[Any, str]] = {}  # digests by id; the value is kept, so that its id stays its own

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
        elif (wrapped := _wrapped(value)) is not None:
            self.add(name, wrapped)
            self.holds(f"what wraps {name}", value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field, held in _fields(value).items():
                self.add(f"{field} of {name}", held)
            self.digest(type(value))
        else:
            self.part = name
            self.put(name, self.digest(value))

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
        codes = [(name, self.of_code(function.__code__)) for name, function in _methods(kind)]
        return _hash(f"{kind.__qualname__} {list(vars(kind).get('__annotations__', {}))} {codes}")

    def of_code(self, code: CodeType) -> str:
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        constants = [self.of_code(c) if isinstance(c, CodeType) else self.digest(c) for c in code.co_consts]
        return _hash(f"{code.co_code.hex()} {code.co_exceptiontable.hex()} {counts} {names} {constants}")

    def reach_of_class(self, kind: type) -> None:
        """Its bases, what its methods reach and hold, and the values in its body."""
        for base in (*kind.__bases__, type(kind)):
            self.digest(base)
        for name, function in _methods(kind):
            self.reach(function)
            self.holds(f"{kind.__qualname__}.{name}", function)
        for name, value in _values_in(kind).items():
            self.add(f"{kind.__qualname__}.{name}", value)

    def reach(self, function: FunctionType) -> None:
        """The globals that a function names, and the modules that it imports."""
        names, space = _names(function.__code__), function.__globals__
        module = space.get("__name__")
        prefix = "" if module == self.module else f"{module}."
        for used in sorted(names & set(space)):
            self.reached(prefix + used, space[used], names)
        for imported in _imported(function):
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
            for inner, held in _closure(value).items():
                self.add(f"{inner} in {name}", held)
            if defaults := _defaults(value):
                self.add(f"defaults of {name}", defaults)

    def digest(self, value: Any) -> str:
        """The same where the value is, in every process."""
        if id(value) not in self.known:
            self.known[id(value)] = value, "itself"  # where it holds itself
            self.known[id(value)] = value, _hash(self.content(value))
        return self.known[id(value)][1]

    def content(self, value: Any) -> str:
        """A text of what a value is made of."""
        kind = type(value)
        if isinstance(value, _PLAIN):
            return f"{kind.__name__} {value!r}"
        if isinstance(value, FunctionType | BuiltinFunctionType | type | ModuleType):
            return self.of_named(value)
        if isinstance(value, np.ndarray | np.generic) or is_torch_array(value) or is_jax_array(value):
            return self.of_array(value)
        if kind in (set, frozenset):
            return f"set {sorted(self.digests(value))}"
        if isinstance(value, Mapping) and kind.__module__ in ("builtins", "collections"):
            return f"dict {sorted((self.digest(key), self.digest(held)) for key, held in value.items())}"
        if kind in (tuple, list):
            return f"{kind.__name__} {self.digests(value)}"
        return self.of_object(value)

    def of_array(self, value: Any) -> str:
        """The kind, the shape and the numbers of an array of any library."""
        try:
            array = _numbers(value)
        except Exception:  # such as sparse ones and JAX's random keys
            return self.of_object(value)
        entries = self.digests(array.ravel().tolist()) if array.dtype.hasobject else _hash(array.tobytes())
        return f"{type(value).__name__} {value.dtype} {array.shape} {entries}"

    def digests(self, values: Iterable[Any] | None) -> list[str]:
        return [self.digest(value) for value in values or ()]

    def of_named(self, value: Any) -> str:
        """A function, class or module, by its name, and what a function holds."""
        if isinstance(value, ModuleType):
            return value.__name__
        own = not isinstance(value, BuiltinFunctionType) and is_own(value)
        name = self.source(value) if own else f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, BuiltinFunctionType):
            return f"{name} {self.digest(value.__self__)}"
        held = (_closure(value), _defaults(value)) if isinstance(value, FunctionType) else ()
        return f"{name} {self.digest(held)}"

    def of_object(self, value: Any) -> str:
        """What pickle would take an object apart to, or the function that it wraps."""
        if (wrapped := _wrapped(value)) is not None:
            return f"{type(value).__qualname__} {self.digest(wrapped)}"
        if dataclasses.is_dataclass(value):
            return f"{self.digest(type(value))} {self.digest(_fields(value))}"
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:
            held = getattr(value, "__dict__", None)
            return f"{self.digest(type(value))} {self.digest(held)}" if held else self.unknown(value)
        if isinstance(reduced, str):
            return f"{type(value).__qualname__} {reduced}"
        made, given, state, *items = (*reduced, None, None, None)[:5]
        return f"{self.digests([made, given, state])} {[self.digests(each) for each in items]}"

    def unknown(self, value: Any) -> str:
        self.opaque.append(f"{self.part} ({type(value).__qualname__})")
        return type(value).__qualname__


_PLAIN = (bool, int, float, complex, str, bytes, bytearray, type(None), type(Ellipsis), type(NotImplemented), range)


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


def _methods(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """Those that were written, also behind a decorator; what a dataclass generates follows from its fields."""
    for name, value in sorted(vars(kind).items()):
        for function in _functions_in(value):
            generated = name.startswith("__") and function.__code__.co_filename == "<string>"
            if is_own(function) and not (generated and dataclasses.is_dataclass(kind)):
                yield name, function


def _functions_in(value: Any) -> Iterator[FunctionType]:
    """The functions that an entry of a class is made of: a method, a property, what a decorator wraps."""
    found = [value, *(vars(type(value)) and getattr(value, name, None) for name in _WRAPPED)]
    return (function for function in found if isinstance(function, FunctionType))


_WRAPPED = ("__func__", "__wrapped__", "fget", "fset", "func", "method")


def _values_in(kind: type) -> dict[str, Any]:
    """What stands in the body of a class beside methods and what Python puts there."""
    entries = sorted(vars(kind).items())
    plain = {name: value for name, value in entries if not name.startswith(("__", "_abc_"))}
    return {n: v for n, v in plain.items() if not any(_functions_in(v)) and not inspect.isdatadescriptor(v)}


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}


def _closure(function: FunctionType) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: _cell(cell) for name, cell in cells}


def _defaults(function: FunctionType) -> list[Any]:
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


def _names(code: CodeType) -> set[str]:
    return {name for each in _codes(code) for name in each.co_names}


def _imported(function: FunctionType) -> list[ModuleType]:
    """The modules of the user's own that a function imports when it is called."""
    package = function.__globals__.get("__package__")
    found = set()
    for code in _codes(function.__code__):
        steps = list(dis.get_instructions(code))
        for level, _names, step in zip(steps, steps[1:], steps[2:], strict=False):
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


def _wrapped(value: Any) -> FunctionType | None:
    """The function behind a decorator, such as a cache or a compilation."""
    found = None if isinstance(value, type) else getattr(value, "__wrapped__", None)
    return found if isinstance(found, FunctionType) else None


def _numbers(value: Any) -> np.ndarray:
    try:
        return to_numpy(value)
    except (TypeError, ValueError):  # numpy knows no bfloat16
        space = array_namespace(value)
        return to_numpy(space.astype(value, space.float64))


def _hash(content: str | bytes) -> str:
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()[:16]
