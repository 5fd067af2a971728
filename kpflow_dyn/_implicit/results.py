"""What a network or one of its modules gives: an array, or one somewhere in tuples, mappings and dataclasses."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kpflow_dyn._arrays import Array, is_array
from kpflow_dyn._shown import type_name

Path = tuple[Any, ...]


class Unknown(ValueError):
    """A name in `state` that the network does not have."""


@dataclass(frozen=True)
class Value:
    """A value that makes the state.

    Attributes:
        name: what its user calls it.
        module: the submodule that gives it; "" is the network.
        path: where it stands in what that gives.
        modules: the names of all submodules.
        axes: those of a value of one trial, where its user names them.
    """

    name: str
    module: str
    path: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    axes: tuple[str, ...] | None = None

    def of(self, out: Any) -> Array:
        """The value in what its module gives."""
        return taken(out, self.place(out))

    def place(self, out: Any) -> Path:
        """Where in what its module gives it stands, down to the array itself."""
        steps: list[Any] = []
        for name in self.path:
            steps.append(_step(out, name, self))
            out = _taken(out, steps[-1])
        while not is_array(out):
            steps.append(_only(out, self))
            out = _taken(out, steps[-1])
        return tuple(steps)


def values_named(names: Sequence[str], modules: Sequence[str], axes: Sequence[str] | None = None) -> tuple[Value, ...]:
    """The values of these names: of a submodule, of a part "module:part" of what it gives, or of the result."""
    known, own = tuple(modules), None if axes is None else tuple(name for name in axes if name != "trial")

    def value(name: str) -> Value:
        module, colon, path = name.partition(":")
        if module and colon and module not in known:
            raise Unknown(_unknown(name, known))
        if colon:
            return Value(name, module, tuple(path.split(".")), known, own)
        is_module = name in ("", *known)
        return Value(name, *((name, ()) if is_module else ("", tuple(name.split(".")))), known, own)

    return tuple(map(value, dict.fromkeys(names)))


def _unknown(name: str, modules: Sequence[str]) -> str:
    return f"unknown modules [{name!r}]; the network has {', '.join(modules) or 'none'}"


def taken(out: Any, place: Path) -> Any:
    """What stands at a place."""
    for step in place:
        out = _taken(out, step)
    return out


def replaced(out: Any, place: Path, value: Any) -> Any:
    """The same result with another value at this place."""
    if not place:
        return value
    step, *rest = place
    part = replaced(_taken(out, step), tuple(rest), value)
    if isinstance(out, tuple | list):
        parts = [*out[:step], part, *out[step + 1 :]]
        return type(out)(*parts) if hasattr(out, "_fields") else type(out)(parts)
    whole = copy.copy(out)
    if isinstance(out, Mapping):
        whole[step] = part  # type: ignore[index]
    else:
        object.__setattr__(whole, step, part)
    return whole


def _taken(out: Any, step: Any) -> Any:
    return getattr(out, step) if _is_record(out) else out[step]


def _is_record(out: Any) -> bool:
    """Whether its parts are attributes."""
    return not isinstance(out, Mapping | tuple | list)


def _parts(out: Any) -> list[Any]:
    """The steps to the parts of a result."""
    if isinstance(out, Mapping):
        return [key for key in out if out[key] is not None]
    if isinstance(out, tuple | list):
        return list(range(len(out)))
    if dataclasses.is_dataclass(out):
        return [field.name for field in dataclasses.fields(out) if getattr(out, field.name, None) is not None]
    return []


def _step(out: Any, name: str, value: Value) -> Any:
    """The step to the part of this name."""
    for step in _parts(out):
        if str(step) == name:
            return step
    fields = getattr(out, "_fields", ())
    if name in fields:
        return fields.index(name)
    if _is_record(out) and hasattr(out, name):
        return name
    gives = ", ".join(map(str, _parts(out))) or f"no parts, as it is {type_name(out)}"
    if value.module or ":" in value.name:
        raise Unknown(f"state {value.name!r}: what {_giver(value)} gives has no {name!r}; it has {gives}")
    raise Unknown(f"{_unknown(value.name, value.modules)}; and what it gives has {gives}")


def _giver(value: Value) -> str:
    return f"the module {value.module!r}" if value.module else "the network"


def _only(out: Any, value: Value) -> Any:
    """The step to the first part of a tuple or list, or to the only part that holds an array."""
    steps = [step for step in _parts(out) if _holds_array(_taken(out, step))]
    if isinstance(out, tuple | list) and steps:
        return steps[0]
    if len(steps) == 1:
        return steps[0]
    if not steps:
        raise Unknown(f"{_giver(value)} gave {type_name(out)}, expected an array, or something that holds one")
    examples = ", ".join(f"{value.module}:{step}" if value.module else str(step) for step in steps)
    raise Unknown(f"{_giver(value)} gave {type_name(out)} with several arrays; name one of them in state: {examples}")


def _holds_array(out: Any) -> bool:
    return is_array(out) or any(_holds_array(_taken(out, step)) for step in _parts(out))
