"""The outputs of named modules of a torch network: heard, changed as they arise, and laid out by trials."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from kpflow_dyn._arrays.complex_numbers import of_halves
from kpflow_dyn._implicit.layout import Layout, axes_of_value, layout_of, unit_axis
from kpflow_dyn._implicit.results import Value, replaced, taken

QKV = {"query", "key", "value"}
Given = tuple[tuple, dict[str, Any]]
Heard = list[tuple[str, Tensor]]  # values by name
Change = Callable[[int, Tensor], tuple[Tensor, Tensor]]  # (number, value) -> what is kept, what goes on


def as_they_are(_number: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """No change."""
    return value, value


def watched(net: nn.Module, given: Given, values: Sequence[Value], change: Change) -> Heard:
    """These values of a call by name, one for each call of their module, in their order; the network's own come last.

    Args:
        given: the arguments by their place and by their name.
    """
    found: Heard = []
    onwards: list[tuple[Tensor, int | None]] = []

    def hear(these: Sequence[Value], out: Any) -> Any:
        for asked in these:
            place = asked.place(out)
            value: Tensor = taken(out, place)
            for (_, earlier), (onward, version) in zip(found, onwards, strict=True):
                if value is onward and _version(onward) == version:  # a module that gives what it was given
                    value = earlier
                    break
            else:
                value = value if value is out else value.clone()  # so that it is not on the way to another part
            kept, onward = change(len(found), value)
            found.append((asked.name, kept))
            onward = onward.clone()  # what comes after may write into it
            onwards.append((onward, _version(onward)))
            out = replaced(out, place, onward)
        return out

    modules = {value.module: [other for other in values if other.module == value.module] for value in values}
    own = modules.pop("", [])
    with ExitStack() as stack:
        for module, these in modules.items():
            stack.enter_context(_heard(net.get_submodule(module), partial(hear, these)))
        args, kwargs = given
        out = calling(net)(net, *args, **kwargs)
    for value in own if len(own) > 1 else ():
        out = replaced(out, value.place(out), value.of(out).clone())  # so that none is on the way to another
    hear(own, out)
    return found


def _version(value: Tensor) -> int | None:
    """How often it was written to; None where torch does not count."""
    return None if value.is_inference() else value._version


@contextmanager
def _heard(module: nn.Module, hear: Callable[[Any], Any]) -> Iterator[None]:
    """Let `hear` stand behind a module, its hooks of both directions included, which a forward hook would not do."""
    whole = module._compiled_call_impl or module._call_impl
    before = vars(module).get("_compiled_call_impl")
    vars(module)["_compiled_call_impl"] = lambda *args, **kwargs: hear(whole(*args, **kwargs))
    try:
        yield
    finally:
        del vars(module)["_compiled_call_impl"]
        if before is not None:
            vars(module)["_compiled_call_impl"] = before


def calling(net: nn.Module) -> Callable[..., Any]:
    """How a network is called, (call, *args, **kwargs): torch's attention attends to itself, and trials come first.

    A class with a forward of its own is called as it is.
    """
    if isinstance(net, nn.MultiheadAttention) and type(net).forward is nn.MultiheadAttention.forward:
        return partial(_attending, net.batch_first)
    if isinstance(net, nn.RNNBase) and type(net).forward in (nn.RNN.forward, nn.GRU.forward, nn.LSTM.forward):
        return partial(_rolling, net.batch_first)
    return lambda call, *args, **kwargs: call(*args, **kwargs)


def _attending(batch_first: bool, call: Any, *args: Any, **kwargs: Any) -> Any:
    """Attention of [trial, token, unit]; with one argument that of it to itself."""
    args, kwargs = (args * 3, {"need_weights": False, **kwargs}) if len(args) == 1 else (args, kwargs)
    swap = _unchanged if batch_first else _swapped
    y, *rest = call(*map(swap, args[:3]), *args[3:], **{n: swap(v) if n in QKV else v for n, v in kwargs.items()})
    return swap(y), *rest


def _rolling(batch_first: bool, call: Any, x: Tensor, *start: Any, **kwargs: Any) -> Any:
    """torch's own recurrence over [trial, time, input], from starts [trial, layer, unit]."""
    swap = _unchanged if batch_first else _swapped
    starts = [tuple(map(_swapped, part)) if isinstance(part, tuple | list) else _swapped(part) for part in start]
    y, *rest = call(swap(x), *starts, **kwargs)
    return swap(y), *rest


def _unchanged(value: Any) -> Any:
    return value


def _swapped(value: Any) -> Any:
    """With trials in front, or behind the first axis; what has no trials stays as it is."""
    return value.transpose(0, 1) if isinstance(value, Tensor) and value.ndim == 3 else value


@dataclass(frozen=True)
class Place:
    """Where the trials are in a value: on one axis, which holds the rows of one trial after the other."""

    name: str
    of_one: tuple[int, ...]  # its shape in a call on one trial
    axis: int
    shape: tuple[int, ...]  # of a trial
    halved: int | None = None  # the axis of a trial where a complex value has its real parts, then its imaginary ones

    def by_trial(self, value: Tensor) -> Tensor:
        """[trial, ...]."""
        before, rows, after = self._parts
        apart = value.reshape(*before, value.shape[self.axis] // rows, rows, *after).movedim(self.axis, 0)
        if self.halved is None:
            return apart.reshape(len(apart), *self.shape)
        halves = [part.reshape(len(apart), *self._half) for part in (apart.real, apart.imag)]
        return torch.cat(halves, self.halved)

    def as_given(self, values: Tensor) -> Tensor:
        """The inverse."""
        before, rows, after = self._parts
        values = values if self.halved is None else of_halves(values, self.halved)
        whole = values.reshape(len(values), *before, rows, *after).movedim(0, self.axis)
        return whole.reshape(*before, len(values) * rows, *after)

    @property
    def _half(self) -> tuple[int, ...]:
        """The shape of the real parts of a trial."""
        halved = -1 if self.halved is None else self.halved
        return tuple(n // 2 if i - len(self.shape) == halved else n for i, n in enumerate(self.shape))

    @property
    def _parts(self) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        return self.of_one[: self.axis], self.of_one[self.axis], self.of_one[self.axis + 1 :]


def of_one_trial(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the batch axis of one, which products of many tokens have lost already."""
    return shape[1:] if shape and shape[0] == 1 else shape


def _place(name: str, of_one: Tensor, axis: int, shape: tuple[int, ...], names: Sequence[str] | None = None) -> Place:
    """The place of a value whose trials have this shape, and axes of these names if they are given."""
    if not of_one.is_complex():
        return Place(name, tuple(of_one.shape), axis, shape)
    shape, halved = shape or (1,), unit_axis(shape, names)
    doubled = tuple(2 * n if i - len(shape) == halved else n for i, n in enumerate(shape))
    return Place(name, tuple(of_one.shape), axis, doubled, halved)


def place_of(name: str, of_one: Tensor, of_all: Tensor, trials: int) -> Place:
    """The axis that is longer in a call on all trials."""
    one, whole = tuple(of_one.shape), tuple(of_all.shape)
    for axis in range(len(one)):
        if whole == (*one[:axis], trials * one[axis], *one[axis + 1 :]):
            return _place(name, of_one, axis, of_one_trial(one))
    raise ValueError(
        f"{named_giver(name)} gives {list(one)} for one trial and {list(whole)} for "
        f"{trials}, which has no axis of trials: its trials influence each other, or it is no function of one trial"
    )


def place_named(name: str, of_one: Tensor, of_all: Tensor, trials: int, axes: Sequence[str]) -> Place:
    """The axis that is called "trial"; where none is, the value is that of the only one."""
    one, whole = tuple(of_one.shape), tuple(of_all.shape)
    if "trial" not in axes:
        return _place(name, of_one, 0, one, axes)
    axis = axes_of_value(axes, len(one)).index("trial")
    own = [name for name in axes if name != "trial"]
    longer = (*one[:axis], trials * one[axis], *one[axis + 1 :])
    if len(own) == len(one) and own[axis] == "time" and one[axis] > 1 and whole == longer:
        return _place(name, of_one, axis, one, own)  # the times of one trial after those of the other
    if one[axis : axis + 1] != (1,) or whole != (*one[:axis], trials, *one[axis + 1 :]):
        raise ValueError(
            f"{named_giver(name)} gives {list(one)} for one trial and {list(whole)} for {trials}, which does not fit "
            f"the axes {tuple(axes)}: name them as they come, the trials among them; x itself has its trials first"
        )
    return _place(name, of_one, axis, (*one[:axis], *one[axis + 1 :]), own)


def named_giver(name: str) -> str:
    """Who gives a value of this name."""
    return f"the module {name}" if name else "the network"


@dataclass(frozen=True)
class Places:
    """Those of all values that make the state of a network."""

    each: list[Place]
    axes: Sequence[str] | None

    @cached_property
    def layout(self) -> Layout:
        """Of the values of a trial."""
        axes = None if self.axes is None else [name for name in self.axes if name != "trial"]
        return layout_of([place.name for place in self.each], [place.shape for place in self.each], axes)

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """The state [trial, ...] of values as the modules give them."""
        return self.layout.join([place.by_trial(value) for place, value in zip(self.each, values, strict=True)])

    def split(self, state: Tensor) -> list[Tensor]:
        """The inverse."""
        parts = [place.as_given(part) for place, part in zip(self.each, self.layout.split(state), strict=True)]
        return [part.clone(memory_format=torch.contiguous_format) for part in parts]  # as a module gives them
