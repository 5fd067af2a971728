"""The forms that a field may be written in, and how it becomes z' = f(t, z [unit]) of real z and increasing t.

A field of a state of several arrays, of second order, with arguments, and backward in time: each is a part of one
`Form`, so that they go together.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, to_numpy
from kpflow_dyn._problems.checks import jumps_of
from kpflow_dyn._problems.layouts import Layout
from kpflow_dyn._problems.signatures import check_field, positional


@dataclass(frozen=True)
class Form:
    """How a field is called, and what it makes of a state [..., unit].

    Attributes:
        layout: of the state.
        order: 1 of y' = f(t, y, ...), 2 of q'' = f(t, q, q', ...), whose state is the pair (q, q').
        backward: whether time runs backward: then s = -t increases, and dz/ds = -f(-s, z).
        own_times: whether f takes a time for each trial, t [trial].
    """

    layout: Layout
    order: int = 1
    backward: bool = False
    own_times: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether a field without arguments is called as it is."""
        return self.has_plain_states and not (self.backward or self.own_times)

    @property
    def has_plain_states(self) -> bool:
        """Whether a field gets and gives [..., unit] as it is."""
        return self.layout.is_plain and self.order == 1

    def called(self, f: Callable[..., Any], args: tuple, t: Array, z: Array, *x: Array) -> Any:
        """f(t, y, ...) of y as the user has it."""
        t, y = self.time(t), self.layout.split(z)
        if self.own_times:
            t = array_namespace(z).broadcast_to(t, z.shape[:1])
        return f(t, *(y if self.order == 2 else (y,)), *x, *args)

    def rate(self, f: Callable[..., Any], args: tuple, t: Array, z: Array, *x: Array) -> Array:
        """dz/ds [..., unit], by f(t, y, ...)."""
        found = self.called(f, args, t, z, *x)
        rate = self.layout.join(found if self.order == 1 else (self.layout.split(z)[1], found), "what f returns")
        return -rate if self.backward else rate

    def state(self, f: Callable[..., Any], args: tuple, t: Array, z: Array, *x: Array) -> Array:
        """The state [..., unit] that f(t, y, ...) gives."""
        return self.layout.join(self.called(f, args, t, z, *x), "what it returns")

    def time(self, s: Any) -> Any:
        """The user's time, of the time that increases; and back."""
        return -s if self.backward else s

    def inputs(self, x: Any) -> Any:
        """The user's inputs as those of the time that increases; and back."""
        if not self.backward or x is None:
            return x
        if callable(x):
            return x.of if isinstance(x, Reversed) else Reversed(x)
        if not isinstance(x, tuple | list) or len(x) != 2:
            return x  # samples on the grid, in its order
        times, samples = -np.asarray(to_numpy(x[0]), np.float64), x[1]
        down = times.ndim == 1 and times[-1] < times[0] and getattr(samples, "ndim", 0) == 3
        return (times[::-1].copy(), array_namespace(samples).flip(samples, axis=1)) if down else (times, samples)


@dataclass(frozen=True)
class DelayedForm(Form):
    """The same of a field f(t, y, (y(t - tau_1), ...), ...) that also sees earlier states."""

    def rate(self, f: Callable[..., Any], args: tuple, t: Array, z: Array, *x: Any) -> Array:
        delayed, *others = x
        return super().rate(f, args, t, z, tuple(map(self.layout.split, delayed)), *others)


@dataclass(frozen=True)
class DiffusionForm(Form):
    """The same of the diffusion g of an SDE, [..., unit] or [..., unit, noise]."""

    def rate(self, f: Callable[..., Any], args: tuple, t: Array, z: Array, *x: Array) -> Array:
        return self.layout.join_noise(f(t, self.layout.split(z), *x, *args), z.ndim - 1)


@dataclass(frozen=True)
class Reversed:
    """An input x(-s); a pytree to JAX."""

    of: Callable[[Array], Array]

    @property
    def jumps(self) -> np.ndarray:
        """In the order of s."""
        return -jumps_of(self.of)[::-1]

    def __call__(self, s: Array) -> Array:
        return self.of(-s)


def arguments_for(f: Any, args: Any, given: Sequence[str], what: str = "f") -> tuple:
    """What a function f is called with after what is given, such as t, z and x_t.

    Nothing where args is None, but None for a field that must have `args`; args as they are; or, as scipy has it, the
    parts of a tuple one by one where f takes so many arguments more, with or without defaults. A tuple stays whole for
    a field that takes one more argument, or whose next one has the name of constants. Arguments that may be left out
    stay what they are: inputs without x, and those before one with the name of constants.

    Raises:
        TypeError: an f that does not take args, or takes others before the inputs, or the state before the time.
    """
    check_field(f, what)
    taken = positional(f)
    if taken is None:  # it does not say
        return () if args is None else (args,)
    named = [p for p in taken if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    more, most = named[len(given) :], math.inf if len(named) < len(taken) else len(named) - len(given)
    form = ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in taken)
    instead = named[given.index("x_t") :][:1] if "x_t" in given else []
    others = [p for p in instead if _is_constants(p) or not (_is_inputs(p) or p.default is inspect.Parameter.empty)]
    if others and any(map(_is_inputs, more)):
        raise TypeError(
            f"{what} takes ({form}), {others[0].name} before the inputs, but is called as "
            f"{called_as(given, args is not None, what)}; change the order"
        )
    least = sum(p.default is inspect.Parameter.empty for p in more)
    if args is None:
        return (None,) if least == 1 and _is_args(more[0]) else ()
    before = _left_out(more, "x_t" in given)
    more, most = more[len(before) :], most - len(before)
    whole = not isinstance(args, tuple) or most == 1 or (len(more) > 0 and least <= 1 and _is_args(more[0]))
    parts = (args,) if whole else args
    if least <= len(parts) <= most:
        return before + parts
    raise TypeError(
        f"{what} takes ({form}), but with args it is called as {called_as(given, True, what)}, args being "
        "one argument, or the parts of a tuple one by one; what it takes by name alone is set beforehand"
    )


def _left_out(more: Sequence[inspect.Parameter], has_inputs: bool) -> tuple:
    """The defaults of the arguments before those that args are for."""
    defaults = tuple(p.default for p in more)
    for n, parameter in enumerate(more):
        before = defaults[:n]
        fits = all(d is None for d in before) or (defaults[n] is None and before[0] is not inspect.Parameter.empty)
        if fits and _is_constants(parameter):
            return defaults[:n]
    return (None,) if more and not has_inputs and _is_inputs(more[0]) and defaults[0] is None else ()


def called_as(given: Sequence[str], has_args: bool, what: str = "f") -> str:
    """How a field is called."""
    return f"{what}({', '.join([*given, *['args'] * has_args])})"


def _is_args(parameter: inspect.Parameter) -> bool:
    """Whether its name says that it holds constants, or nothing."""
    return _is_constants(parameter) or parameter.name.startswith("_")


def _is_constants(parameter: inspect.Parameter) -> bool:
    return parameter.name in ("args", "p", "params")


def _is_inputs(parameter: inspect.Parameter) -> bool:
    return parameter.name in ("x", "x_t", "u", "u_t")
