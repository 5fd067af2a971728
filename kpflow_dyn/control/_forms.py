"""How others write linear systems: python-control's and scipy.signal's objects, and tuples of matrices.

Nothing is imported: what an object is, it says by its attributes.
"""

from __future__ import annotations

import re
import warnings
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import block_diag
from scipy.signal import tf2ss

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._shown import type_name

EXPECTED = (
    "a kp.control.LTI, a state space or transfer function of python-control or scipy.signal, or a tuple "
    "(A, B, C, D) or (A, B, C, D, dt)"
)


def real(values: Any, what: str) -> np.ndarray:
    """A float64 array of any array; a ValueError where it has an imaginary part, which would be lost."""
    array: Any = np.array(to_numpy(values))
    if np.iscomplexobj(array):
        if array.imag.any():
            raise ValueError(
                f"{what} is complex, with imaginary parts up to {np.abs(array.imag).max():.3g}, expected real numbers; "
                "pose a complex system by its real and imaginary parts, [[A.real, -A.imag], [A.imag, A.real]], or take "
                ".real where these are rounding"
            )
        array = array.real
    return array.astype(np.float64)


class Parts(NamedTuple):
    """A system by its matrices."""

    A: Any
    B: Any
    C: Any = None
    D: Any = None
    dt: float | bool | None = None
    names: tuple[str, ...] = ()


def is_system(value: Any) -> bool:
    """Whether a value is a linear system of any known form, and no matrix.

    A tuple is one where its first entry is a matrix; a tuple of rows is a matrix.
    """
    if isinstance(value, tuple):
        return 2 <= len(value) <= 5 and np.ndim(value[0]) in (0, 2)
    return any(hasattr(value, name) for name in ("den", "gain")) or all(hasattr(value, name) for name in "ABCD")


def parts_of(system: Any) -> Parts:
    """The matrices of a system of any known form; a TypeError for another."""
    if isinstance(system, tuple):
        if not is_system(system):
            raise TypeError(f"system is a tuple of {len(system)}, expected {EXPECTED}")
        return Parts._make([*([*system] + [None] * 3)[:5], ()])
    if all(hasattr(system, name) for name in "ABCD"):
        return Parts(system.A, system.B, system.C, system.D, _step(system), _names(system))
    if hasattr(system, "num") and hasattr(system, "den"):
        A, B, C, D = _realisation(system.num, system.den)
        return Parts(A, B, C, D, _step(system))
    if hasattr(system, "gain"):  # zeros and poles of scipy.signal
        return parts_of(system.to_ss())
    advice = "; ct.linearize it about a state first" if hasattr(system, "updfcn") else "; a matrix A needs its B"
    raise TypeError(f"system is {type_name(system)}, expected {EXPECTED}{advice}")


def _step(system: Any) -> Any:
    return getattr(system, "dt", None) or None


def _names(system: Any) -> tuple[str, ...]:
    """What the states are called, () where python-control numbered them."""
    names = tuple(getattr(system, "names", ()) or getattr(system, "state_labels", ()))
    return () if all(re.fullmatch(r"x\[\d+\]", name) for name in names) else names


def _realisation(num: Any, den: Any) -> tuple[np.ndarray, ...]:
    """Matrices of transfer functions num / den: of one, or as lists [output][input].

    The outputs of one input that have the same denominator share states. Others have their own, so that states may
    stand in it twice; `minreal` takes those away.
    """
    if not isinstance(den[0], list | np.ndarray):  # scipy.signal: one denominator, a numerator or one for each output
        num, den = [[row] for row in np.atleast_2d(num)], [[den]] * len(np.atleast_2d(num))
    blocks = []
    for j in range(len(num[0])):
        for poles in dict.fromkeys(_monic(row[j]) for row in den):
            rows = [i for i in range(len(den)) if _monic(den[i][j]) == poles]
            blocks.append((j, rows, *_one_input([(num[i][j], den[i][j]) for i in rows])))
    A = np.asarray(block_diag(*(block[2] for block in blocks)))
    B, C, D = np.zeros((len(A), len(num[0]))), np.zeros((len(num), len(A))), np.zeros((len(num), len(num[0])))
    at = 0
    for j, rows, a, b, c, d in blocks:
        B[at : at + len(a), j] = b[:, 0]
        C[rows, at : at + len(a)] = c
        D[rows, j] = d[:, 0]
        at += len(a)
    if not at:
        raise ValueError("the transfer function has no states, expected a dynamic system; a gain is a matrix")
    return A, B, C, D


def _monic(den: Any) -> tuple[float, ...]:
    poly = np.trim_zeros(np.atleast_1d(real(den, "a denominator")), "f")
    return tuple((poly / poly[0]).tolist())


def _one_input(entries: list[tuple[Any, Any]]) -> tuple[np.ndarray, ...]:
    """Matrices of transfer functions of one input with the same poles."""
    poles = np.array(_monic(entries[0][1]))
    tops = [np.trim_zeros(np.atleast_1d(real(num, "a numerator")), "f") for num, _ in entries]
    if any(len(top) > len(poles) for top in tops):
        raise ValueError(
            "a transfer function has more zeros than poles, so it has no state space; add fast poles (a filter)"
        )
    leads = [np.trim_zeros(np.atleast_1d(den).astype(float), "f")[0] for _, den in entries]
    padded = [np.pad(top, (len(poles) - len(top), 0)) / lead for top, lead in zip(tops, leads, strict=True)]
    if len(poles) == 1:
        return np.zeros((0, 0)), np.zeros((0, 1)), np.zeros((len(entries), 0)), np.array(padded)
    with warnings.catch_warnings(action="ignore"):  # of leading zeros, which are meant
        return tf2ss(np.array(padded), poles)
