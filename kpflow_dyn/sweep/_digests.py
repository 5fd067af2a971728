"""Digests of values: the same where the values are, in every process."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np

from kpflow_dyn._arrays import array_namespace, is_array, to_numpy
from kpflow_dyn.sweep._own import closure_of, defaults_of, fields_of, is_own, wrapped_by

PLAIN = (bool, int, float, complex, str, bytes, bytearray, type(None), type(Ellipsis), type(NotImplemented), range)


class Digests:
    """Takes values apart as pickle would, and makes digests of the parts.

    Args:
        source: called with each function and class of the user's own code that is met, for the name that it goes by.

    Attributes:
        part: what is taken apart now, in words.
        opaque: what could not be taken apart.
    """

    def __init__(self, source: Callable[[Any], str]) -> None:
        self.source, self.part = source, ""
        self.opaque: list[str] = []
        self.known: dict[int, tuple[Any, str]] = {}  # by id; the value is kept, so that its id stays its own

    def of(self, value: Any) -> str:
        """The same where the value is, in every process."""
        if id(value) not in self.known:
            self.known[id(value)] = value, "itself"  # where it holds itself
            self.known[id(value)] = value, hashed(self.content(value))
        return self.known[id(value)][1]

    def content(self, value: Any) -> str:
        """A text of what a value is made of."""
        kind = type(value)
        if isinstance(value, PLAIN):
            return f"{kind.__name__} {value!r}"
        if isinstance(value, FunctionType | BuiltinFunctionType | type | ModuleType):
            return self.of_named(value)
        if is_array(value):
            return self.of_array(value)
        if kind in (set, frozenset):
            return f"set {sorted(self.of_all(value))}"
        if isinstance(value, Mapping) and kind.__module__ in ("builtins", "collections"):
            return f"dict {sorted((self.of(key), self.of(held)) for key, held in value.items())}"
        if kind in (tuple, list):
            return f"{kind.__name__} {self.of_all(value)}"
        return self.of_object(value)

    def of_array(self, value: Any) -> str:
        """The kind, the shape and the numbers of an array of any library."""
        try:
            array = _numbers(value)
        except Exception:  # such as sparse ones and JAX's random keys
            return self.of_object(value)
        entries = self.of_all(array.ravel().tolist()) if array.dtype.hasobject else hashed(array.tobytes())
        return f"{type(value).__name__} {value.dtype} {array.shape} {entries}"

    def of_all(self, values: Iterable[Any] | None) -> list[str]:
        return [self.of(value) for value in values or ()]

    def of_named(self, value: Any) -> str:
        """A function, class or module, by its name, and what a function holds."""
        if isinstance(value, ModuleType):
            return value.__name__
        own = not isinstance(value, BuiltinFunctionType) and is_own(value)
        name = self.source(value) if own else f"{value.__module__}.{value.__qualname__}"
        if isinstance(value, BuiltinFunctionType):
            return f"{name} {self.of(value.__self__)}"
        held = (closure_of(value), defaults_of(value)) if isinstance(value, FunctionType) else ()
        return f"{name} {self.of(held)}"

    def of_object(self, value: Any) -> str:
        """What pickle would take an object apart to, or the function that it wraps."""
        if (wrapped := wrapped_by(value)) is not None:
            return f"{type(value).__qualname__} {self.of(wrapped)}"
        if dataclasses.is_dataclass(value):
            return f"{self.of(type(value))} {self.of(fields_of(value))}"
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:
            held = getattr(value, "__dict__", None)
            return f"{self.of(type(value))} {self.of(held)}" if held else self.unknown(value)
        if isinstance(reduced, str):
            return f"{type(value).__qualname__} {reduced}"
        made, given, state, *items = (*reduced, None, None, None)[:5]
        return f"{self.of_all([made, given, state])} {[self.of_all(each) for each in items]}"

    def unknown(self, value: Any) -> str:
        self.opaque.append(f"{self.part} ({type(value).__qualname__})")
        return type(value).__qualname__


def _numbers(value: Any) -> np.ndarray:
    try:
        return to_numpy(value)
    except (TypeError, ValueError):  # numpy knows no bfloat16
        space = array_namespace(value)
        return to_numpy(space.astype(value, space.float64))


def hashed(content: str | bytes) -> str:
    """A short hash."""
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()[:16]
