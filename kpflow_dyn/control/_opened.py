"""A closed loop linearised and opened at the plant's input, of any kind: continuous, sampled, in discrete time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kpflow_dyn._arrays import Array, full_precision, like_numpy, to_numpy
from kpflow_dyn.control._loops import jacobians
from kpflow_dyn.control._systems import LTI


class Loop(Protocol):
    """A loop of any kind.

    sol      its solution.
    dt       the length of a step, None in continuous time.
    units    how many states the plant has, and `names` what they are called; `memory` of how many the policy's is.
    stored   1 where the policy's answer depends on its last control, else 0.
    answer   (row, x) -> [memory, u] on one trial, of a row [plant, memory, last control if stored].
    moved    (z, u) -> the plant's velocity or next state on one trial.
    acting   (A, B of `moved`) -> the plant's A, and its B for the controls of now and of the samples before.
    """

    @property
    def sol(self) -> Any: ...
    @property
    def dt(self) -> float | None: ...
    @property
    def units(self) -> int: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def memory(self) -> int: ...
    @property
    def stored(self) -> int: ...
    def answer(self, row: Array, x: Array | None) -> Array: ...
    def moved(self, z: Array, u: Array) -> Array: ...
    def acting(self, A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]: ...


@dataclass(frozen=True, eq=False)
class Opened:
    """A loop linearised and opened at the plant's input: s' = A s + B u (or the next s), where the policy has u = F s.

    Of a policy with a memory and of controls that wait, s is [plant, memory, controls of the samples before].
    """

    z: np.ndarray  # of the plant
    u: np.ndarray
    system: LTI
    F: np.ndarray
    memory: int

    @property
    def closed(self) -> np.ndarray:
        """A + B F."""
        return self.system.A + self.system.B @ self.F

    @property
    def loop(self) -> LTI:
        """What returns to the plant's input where it is opened there: u = -L u."""
        return LTI(self.system.A, self.system.B, -self.F, dt=self.system.dt, names=self.system.names)

    @property
    def gain(self) -> np.ndarray:
        """du/dz, of the plant's state alone."""
        return self.F[:, : len(self.z)]

    @property
    def is_static(self) -> bool:
        """Whether the policy is a gain on the plant's state, which acts at once."""
        rest = slice(len(self.z), None)
        return not self.memory and not self.F[:, rest].any() and not self.system.A[: len(self.z), rest].any()


def answers(loop: Loop, rows: Array, x: Array | None) -> tuple[np.ndarray, np.ndarray]:
    """u [trial, time, input], and the derivative of [memory, u] in rows like those of `before`."""
    of = loop.sol.problem.backend.transforms

    def row(row: Array, *x: Array) -> list[Array]:
        found, pull = of.vjp(lambda row: loop.answer(row, x[0] if x else None), row)[:2]
        return [found[loop.memory :], of.vmap(pull)(like_numpy(np.eye(len(found)), row))[0]]

    with full_precision(rows):
        u, slopes = of.each_row(row, rows, *(() if x is None else (x,)))
    return to_numpy(u).astype(float), to_numpy(slopes).astype(float)


def opened(loop: Loop, rows: Array, x: Array | None) -> list[list[Opened]]:
    """The loop linearised at rows [trial, time, ...] like those of `before`, as if it stood still there."""
    of, z = loop.sol.problem.backend.transforms, rows[..., : loop.units]
    u, slopes = answers(loop, rows, x)
    move = lambda _t, z, u: loop.moved(z, u)  # noqa: E731
    A, B = jacobians(of, move, [z[..., 0], z, like_numpy(u, z)], of_state=True)
    states = to_numpy(z).astype(float)
    return [
        [_opened(loop, states[i, k], u[i, k], A[i, k], B[i, k], slopes[i, k]) for k in range(u.shape[1])]
        for i in range(len(u))
    ]


def _opened(loop: Loop, z: np.ndarray, u: np.ndarray, A: np.ndarray, B: np.ndarray, slopes: np.ndarray) -> Opened:
    """With the controls of so many samples before as further states, the last one first."""
    phi, (now, *earlier) = loop.acting(A, B)
    known, inputs = loop.units + loop.memory, len(u)
    waiting = max(len(earlier), loop.stored)
    size = known + waiting * inputs
    system, into, F = np.zeros((size, size)), np.zeros((size, inputs)), np.zeros((inputs, size))
    system[: loop.units, : loop.units], into[: loop.units] = phi, now
    for n, delayed in enumerate(earlier):
        system[: loop.units, known + n * inputs : known + (n + 1) * inputs] = delayed
    system[loop.units : known, : slopes.shape[1]] = slopes[: loop.memory]
    F[:, : slopes.shape[1]] = slopes[loop.memory :]
    if waiting:
        into[known : known + inputs] = np.eye(inputs)
        system[known + inputs :, known : size - inputs] = np.eye(size - known - inputs)
    names = loop.names if size == loop.units else ()
    return Opened(z, u, LTI(system, into, dt=loop.dt, names=names), F, loop.memory)
