"""What a pickle says, read without making or calling anything that it names.

A pickle is a program for a small stack machine. The one here knows the containers, numbers and texts of Python; of a
class or function that is named it keeps the name, and of a call the name with its arguments (`Foreign`). No module is
imported, so that no file can run code.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from kpflow_dyn._problems.parameters import CheckpointError

OPCODES = 5_000_000
MADE = 400_000
"""More instructions, and more containers and objects, than any checkpoint has; they alone would fill the memory."""


class Readable(Protocol):
    """A file that is open for bytes."""

    def read(self, size: int = -1, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


@dataclass(eq=False)
class Foreign:
    """A class or function that a pickle names, or what calling it would give.

    Attributes:
        name: module and name, such as "torch._utils._rebuild_tensor_v2".
        arguments: those of the call; None where it is only named.
        state: what the object's attributes, or its __setstate__, would be given.
        items: what would be set in it by keys.
        elements: what would be added to it.
    """

    name: str
    arguments: tuple[Any, ...] | None = None
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    @property
    def given(self) -> Any:
        """The arguments of the call, a tuple."""
        return self.arguments or ()


def read_pickle(file: Readable) -> Any:
    """What the pickle that begins here stands for, with a `Foreign` in the place of whatever is no plain value."""
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(cast(Any, file))):
            if count > OPCODES:
                raise CheckpointError(f"more than {OPCODES:,} instructions in a pickle; no checkpoint has so many")
            machine.step(opcode.name, argument)
        return machine.stack[-1]
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"a damaged pickle: {type(error).__name__} {error}") from error


class _Machine:
    """The stack, the stacks below the marks, and the memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.made = 0

    def step(self, name: str, argument: Any) -> None:
        self.made += name in _MAKES
        if self.made > MADE:
            raise CheckpointError(f"more than {MADE:,} containers and objects in a pickle; no checkpoint has so many")
        if name in _STEPS:
            _STEPS[name](self, argument)
        elif name in _VALUES:
            self.stack.append(argument)
        else:
            raise ValueError(f"{name} is no instruction of a checkpoint")

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_many(self, count: int) -> list[Any]:
        taken = [self.stack.pop() for _ in range(count)]
        return taken[::-1]

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def above_mark(self) -> list[Any]:
        above, self.stack = self.stack, self.below.pop()
        return above

    def replace(self, count: int, make: Callable[..., Any]) -> None:
        """The last so many values give way to what is made of them."""
        self.push(make(*self.pop_many(count)))

    def add(self, values: list[Any]) -> None:
        target = self.stack[-1]
        (target.elements if isinstance(target, Foreign) else target).extend(values)

    def add_to_set(self, _: Any) -> None:
        values = self.above_mark()
        self.stack[-1].update(filter(_is_key, values))

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        items = target.items if isinstance(target, Foreign) else target
        items.update(_items(values))

    def set_state(self, _: Any) -> None:
        state = self.pop()
        if isinstance(self.stack[-1], Foreign):
            self.stack[-1].state = state

    def remember(self, place: int | None) -> None:
        self.memo[len(self.memo) if place is None else place] = self.stack[-1]

    def instance(self, name: str) -> None:
        self.push(Foreign(_dotted(name), tuple(self.above_mark())))

    def instance_above(self, _: Any) -> None:
        kind, *arguments = self.above_mark()
        self.push(_called(kind, tuple(arguments)))


def _items(values: list[Any]) -> dict[Any, Any]:
    """Keys and values by turns; keys of checkpoints are texts and numbers, others are left out."""
    return {key: value for key, value in zip(values[::2], values[1::2], strict=True) if _is_key(key)}


def _is_key(value: Any) -> bool:
    """Hashing a tuple of tuples of tuples can take for ever."""
    return isinstance(value, str | bytes | int | float | None)


def _called(function: Any, arguments: Any) -> Foreign:
    name = function.name if isinstance(function, Foreign) else type(function).__name__
    return Foreign(name, arguments if isinstance(arguments, tuple) else ())  # never copied: there may be many of one


def _named(module: Any, name: Any) -> Foreign:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise ValueError("a name that is no text")
    return Foreign(f"{module}.{name}")


def _dotted(name: str) -> str:
    return name.replace(" ", ".", 1)


_MAKES = {
    *("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "LIST", "DICT", "FROZENSET", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("GLOBAL", "STACK_GLOBAL", "PERSID", "BINPERSID", "REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ"),
}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    **dict.fromkeys(["PROTO", "FRAME", "STOP", "READONLY_BUFFER"], lambda machine, _: None),
    **dict.fromkeys(["PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"], _Machine.remember),
    **dict.fromkeys(["GET", "BINGET", "LONG_BINGET"], lambda machine, place: machine.push(machine.memo[place])),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "EMPTY_SET": lambda machine, _: machine.push(set()),
    "LIST": lambda machine, _: machine.push(machine.above_mark()),
    "DICT": lambda machine, _: machine.push(_items(machine.above_mark())),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.above_mark())),
    "FROZENSET": lambda machine, _: machine.push(frozenset(filter(_is_key, machine.above_mark()))),
    "TUPLE1": lambda machine, _: machine.push(tuple(machine.pop_many(1))),
    "TUPLE2": lambda machine, _: machine.push(tuple(machine.pop_many(2))),
    "TUPLE3": lambda machine, _: machine.push(tuple(machine.pop_many(3))),
    "APPEND": lambda machine, _: machine.add([machine.pop()]),
    "APPENDS": lambda machine, _: machine.add(machine.above_mark()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop_many(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.above_mark()),
    "ADDITEMS": _Machine.add_to_set,
    "MARK": _Machine.mark,
    "POP": lambda machine, _: machine.pop() if machine.stack else machine.above_mark(),
    "POP_MARK": lambda machine, _: machine.above_mark(),
    "DUP": lambda machine, _: machine.push(machine.stack[-1]),
    "GLOBAL": lambda machine, name: machine.push(Foreign(_dotted(name))),
    "STACK_GLOBAL": lambda machine, _: machine.replace(2, _named),
    "PERSID": lambda machine, name: machine.push(Foreign("persistent", (name,))),
    "BINPERSID": lambda machine, _: machine.replace(1, lambda name: Foreign("persistent", (name,))),
    "REDUCE": lambda machine, _: machine.replace(2, _called),
    "NEWOBJ": lambda machine, _: machine.replace(2, _called),
    "NEWOBJ_EX": lambda machine, _: machine.replace(3, lambda kind, arguments, _: _called(kind, arguments)),
    "INST": _Machine.instance,
    "OBJ": _Machine.instance_above,
    "BUILD": _Machine.set_state,
}
"""What each instruction of a pickle does, as in the module pickletools; EXT1 and the like are none of a checkpoint."""
