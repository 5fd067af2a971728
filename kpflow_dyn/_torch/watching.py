"""The outputs of named modules of a torch network: heard, changed as they arise, and laid out by trials."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kpflow_dyn._arrays.complex_numbers import in_halves, of_halves
from kpflow_dyn._implicit.layout import Layout, shape_of_halves, unit_axis

Change = Callable[[int, Tensor], tuple[Tensor, Tensor]]  # (number, value) -> what is kept, what goes on


def as_they_are(_number: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """No change."""
    return value, value


def watched(net: nn.Module, x: Tensor, names: Sequence[str], change: Change) -> list[tuple[str, Tensor]]:
    """The outputs of these modules by name, one for each call, in their order; "" is the network's own, the last."""
    found: list[tuple[str, Tensor]] = []
    onwards: list[tuple[Tensor, int | None]] = []

    def hear(name: str, out: Any) -> Any:
        value = first(out)
        for (_, earlier), (onward, version) in zip(found, onwards, strict=True):
            if value is onward and _version(onward) == version:  # a module that gives what it was given
                value = earlier
        kept, onward = change(len(found), value)
        found.append((name, kept))
        onward = onward.clone()  # what comes after may write into it
        onwards.append((onward, _version(onward)))
        return _with_first(out, onward)

    with ExitStack() as stack:
        for name in filter(None, names):
            stack.enter_context(_heard(net.get_submodule(name), partial(hear, name)))
        out = calling(net)(net, x)
    if "" in names:
        hear("", out)
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


def calling(net: nn.Module) -> Callable[[Any, Tensor], Any]:
    """How a network is called; attention attends to itself, and trials come first."""
    if isinstance(net, nn.MultiheadAttention):
        if not net.batch_first:
            return lambda net, x: net(*(x.transpose(0, 1),) * 3, need_weights=False)[0].transpose(0, 1)
        return lambda net, x: net(x, x, x, need_weights=False)
    if isinstance(net, nn.RNNBase) and not net.batch_first:
        return lambda net, x: net(x.transpose(0, 1))[0].transpose(0, 1)
    return lambda net, x: net(x)


def first(out: Any) -> Tensor:
    """The first tensor of what a module gives."""
    while isinstance(out, tuple | list):
        out = out[0]
    if not isinstance(out, Tensor):
        raise ValueError(f"a module gave {type(out).__name__}, expected a tensor, or a tuple that begins with one")
    return out


def _with_first(out: Any, value: Tensor) -> Any:
    """The same with another first tensor."""
    if isinstance(out, Tensor):
        return value
    parts = [_with_first(out[0], value), *out[1:]]
    return type(out)(*parts) if hasattr(out, "_fields") else type(out)(parts)


@dataclass(frozen=True)
class Place:
    """Where the trials are in a value: on one axis, which holds the rows of one trial after the other."""

    name: str
    of_one: tuple[int, ...]  # its shape in a call on one trial
    axis: int
    is_complex: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a trial, with the real and imaginary parts of complex values side by side on the axis of units."""
        shape = of_one_trial(self.of_one)
        return shape_of_halves(shape) if self.is_complex else shape

    def by_trial(self, value: Tensor) -> Tensor:
        """[trial, ...]."""
        before, rows, after = self._parts
        apart = value.reshape(*before, value.shape[self.axis] // rows, rows, *after).movedim(self.axis, 0)
        trials, shape = len(apart), of_one_trial(self.of_one)
        if self.is_complex:
            apart = in_halves(apart.reshape(trials, *(shape or (1,))), unit_axis(shape))
        return apart.reshape(trials, *self.shape)

    def as_given(self, values: Tensor) -> Tensor:
        """The inverse."""
        before, rows, after = self._parts
        if self.is_complex:
            values = of_halves(values, unit_axis(self.shape))
        whole = values.reshape(len(values), *before, rows, *after).movedim(0, self.axis)
        return whole.reshape(*before, len(values) * rows, *after)

    @property
    def _parts(self) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        return self.of_one[: self.axis], self.of_one[self.axis], self.of_one[self.axis + 1 :]


def of_one_trial(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the batch axis of one, which products of many tokens have lost already."""
    return shape[1:] if shape and shape[0] == 1 else shape


def place_of(name: str, of_one: Tensor, of_all: Tensor, trials: int) -> Place:
    """The axis that is longer in a call on all trials."""
    one, whole = tuple(of_one.shape), tuple(of_all.shape)
    for axis in range(len(one)):
        if whole == (*one[:axis], trials * one[axis], *one[axis + 1 :]):
            return Place(name, one, axis, of_one.is_complex())
    raise ValueError(
        f"{f'the module {name}' if name else 'the network'} gives {list(one)} for one trial and {list(whole)} for "
        f"{trials}, which has no axis of trials: its trials influence each other, or it is no function of one trial"
    )


@dataclass(frozen=True)
class Places:
    """Those of all values that make the state of a network."""

    each: list[Place]

    @property
    def layout(self) -> Layout:
        """Of the values of a trial."""
        return Layout(tuple(place.name for place in self.each), tuple(place.shape for place in self.each))

    def join(self, values: Sequence[Tensor]) -> Tensor:
        """The state [trial, ...] of values as the modules give them."""
        return self.layout.join([place.by_trial(value) for place, value in zip(self.each, values, strict=True)])

    def split(self, state: Tensor) -> list[Tensor]:
        """The inverse."""
        parts = [place.as_given(part) for place, part in zip(self.each, self.layout.split(state), strict=True)]
        return [part.clone(memory_format=torch.contiguous_format) for part in parts]  # as a module gives them
