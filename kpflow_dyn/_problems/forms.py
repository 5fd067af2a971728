"""The forms that a field may be written in, and how it becomes z' = f(t, z [unit]) of real z and increasing t.

A field of a state of several arrays, of second order, with arguments, and backward in time: each is a part of one
`Form`, so that they go together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, to_numpy
from kpflow_dyn._problems.checks import jumps_of
from kpflow_dyn._problems.layouts import Layout


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
class Reversed:
    """An input x(-s); a pytree to JAX."""

    of: Callable[[Array], Array]

    @property
    def jumps(self) -> np.ndarray:
        """In the order of s."""
        return -jumps_of(self.of)[::-1]

    def __call__(self, s: Array) -> Array:
        return self.of(-s)


def arguments_for(f: Any, args: Any, order: int, has_x: bool, what: str = "f") -> tuple:
    """What f is called with after t, its state and its inputs.

    Nothing where args is None, but None for a field that must have `args`; args as they are; or, as scipy has it, a
    tuple's parts one by one where f takes so many arguments more.

    Raises:
        TypeError: an f that does not take args.
    """
    taken = _parameters(f)
    count = 1 + order + has_x
    if taken is None:  # it does not say
        return () if args is None else (args,)
    if args is None:
        return (None,) if _needs(taken, count + 1) and _is_args([*taken.values()][count]) else ()
    if _takes(taken, count + 1) and not _is_inputs([*taken.values()], count):
        return (args,)
    if isinstance(args, tuple) and _takes(taken, count + len(args)):
        return args
    called = called_as(order, has_x, True, what)
    raise TypeError(
        f"{what} takes ({', '.join(taken)}), but with args it is called as {called}, args being one argument, or "
        "the parts of a tuple one by one"
    )


def called_as(order: int, has_x: bool, has_args: bool, what: str = "f") -> str:
    """How a field is called."""
    state = ["z"] if order == 1 else ["z", "z'"]
    return f"{what}({', '.join(['t', *state, *['x_t'] * has_x, *['args'] * has_args])})"


Parameters = dict[str, inspect.Parameter]


def _parameters(f: Any) -> Parameters | None:
    """Those that are given by their place."""
    try:
        known = inspect.signature(getattr(f, "forward", f)).parameters
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {name: p for name, p in known.items() if p.kind in (*kinds, inspect.Parameter.VAR_POSITIONAL)}


def _takes(taken: Parameters, count: int) -> bool:
    """Whether it can be called with so many."""
    named = [p for p in taken.values() if p.kind is not inspect.Parameter.VAR_POSITIONAL]
    least = sum(p.default is inspect.Parameter.empty for p in named)
    return least <= count and (count <= len(named) or len(named) < len(taken))


def _needs(taken: Parameters, count: int) -> bool:
    """Whether it can be called with no fewer than so many."""
    return _takes(taken, count) and not _takes(taken, count - 1)


def _is_args(parameter: inspect.Parameter) -> bool:
    """Whether its name says that it holds constants, or nothing."""
    return parameter.name in ("args", "p", "params") or parameter.name.startswith("_")


def _is_inputs(taken: list[inspect.Parameter], place: int) -> bool:
    """Whether what stands at a place are inputs that a problem without any leaves out."""
    return place < len(taken) and taken[place].name in ("x", "x_t") and taken[place].default is None
