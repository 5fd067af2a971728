"""Which modes of a linear system nothing reaches, or nothing tells, and what they are made of.

A mode of A is an eigenvalue with its vectors. No input moves it where its left eigenvector w has w^T B = 0; no output
tells it where its right eigenvector v has C v = 0. Both are read off Kalman's decomposition, by rotations alone, which
stays right where eigenvalues repeat or are defective.

Source: Kalman, SIAM J. Control 1, 152 (1963); Van Dooren, "The generalized eigenstructure problem in linear system
theory", IEEE Trans. Automatic Control 26, 111 (1981).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from scipy.linalg import eig, matrix_balance

ROUNDING = 100 * float(np.finfo(float).eps)
DEFECTIVE = 1e-7  # how far, as a part of |A|, rounding moves an eigenvalue that is defective
SHOWN = 0.05  # parts of a vector below this share of its largest entry are left out
MOST = 4  # entries of a vector, and modes, that a message names


@dataclass(frozen=True, eq=False)
class Mode:
    """An eigenvalue of A, with its vector over the states, and how far rounding may have moved it."""

    value: complex
    vector: np.ndarray
    error: float

    def told(self, names: tuple[str, ...]) -> str:
        """Such as: 0.5, made of angle - 0.2 rate."""
        return f"{number(self.value)}, made of {combination(self.vector, names)}"

    def off_boundary(self, dt: float | None) -> float:
        """By how much it grows: Re l, or |l| - 1 in discrete time."""
        return self.value.real if dt is None else abs(self.value) - 1

    def lingers(self, dt: float | None) -> bool:
        """Whether it does not decay, as far as rounding tells."""
        return self.off_boundary(dt) >= -self.error

    def is_on_boundary(self, dt: float | None) -> bool:
        """Whether it neither grows nor decays, as far as rounding tells."""
        return abs(self.off_boundary(dt)) <= self.error


def modes(A: np.ndarray) -> list[Mode]:
    """The modes of A [unit, unit] with their right eigenvectors, the fastest growing first."""
    return _modes(A, np.eye(len(A)))


def unreachable(A: np.ndarray, B: np.ndarray) -> list[Mode]:
    """The modes of A that no column of B reaches, with their left eigenvectors, which are A^T's right ones."""
    balanced, (scale, _) = cast(tuple[np.ndarray, Any], matrix_balance(A, permute=False, separate=True))
    rest = _rest(balanced, B / scale[:, None])
    found = _modes(rest.T @ balanced.T @ rest, rest, float(np.linalg.norm(balanced, 2)))
    return [Mode(mode.value, mode.vector / scale, mode.error) for mode in found]


def untold(A: np.ndarray, C: np.ndarray) -> list[Mode]:
    """The modes of A that no row of C tells, with their right eigenvectors."""
    return unreachable(A.T, C.T)


def reached(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the states that the columns of B reach [unit, dimension]."""
    units, size = len(A), float(np.linalg.norm(A, 2)) or 1.0
    lengths = np.linalg.norm(B, axis=0)
    new = B[:, lengths > 0] / lengths[lengths > 0]
    basis = np.zeros((units, 0))
    while new.shape[1] and basis.shape[1] < units:
        for _ in range(2):  # once more, as the first pass leaves rounding
            new = new - basis @ (basis.T @ new)
        left, values, _ = np.linalg.svd(new, full_matrices=False)
        new = left[:, values > ROUNDING * units]
        basis = np.concatenate([basis, new], 1)
        new = A @ new / size
    return basis


def _rest(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    basis = reached(A, B)
    return np.linalg.svd(basis, full_matrices=True)[0][:, basis.shape[1] :]


def _modes(A: np.ndarray, basis: np.ndarray, size: float | None = None) -> list[Mode]:
    """The modes of A, whose vectors are in terms of a basis [unit, n]."""
    if not len(A):
        return []
    values, left, right = cast(tuple[np.ndarray, ...], eig(A, left=True, right=True))
    condition = np.abs((left.conj() * right).sum(0))
    size = float(np.linalg.norm(A, 2)) if size is None else size
    error = size * np.minimum(len(A) * ROUNDING / np.maximum(condition, ROUNDING), DEFECTIVE)
    found = zip(values, (basis @ right).T, error, strict=True)
    ordered = sorted(found, key=lambda mode: (-mode[0].real, mode[0].imag))
    return [Mode(complex(value), vector, float(error)) for value, vector, error in ordered]


def told(found: list[Mode], names: tuple[str, ...]) -> str:
    """Modes in words; one of each pair of complex ones, and MOST of many."""
    single = [mode for mode in found if mode.value.imag >= -mode.error]
    each = list(dict.fromkeys(mode.told(names) for mode in single))  # a defective one stands there twice
    words, more = "; ".join(each[:MOST]), len(each) - MOST
    return words + (f"; and {more} more" if more > 0 else "")


def number(value: complex) -> str:
    """An eigenvalue in words, a complex one with its conjugate."""
    small = 1e-9 * abs(value)
    if abs(value.imag) <= small:
        return f"{value.real:.4g}"
    return f"{0 if abs(value.real) <= small else value.real:.4g} ± {abs(value.imag):.4g}i"


def combination(vector: Any, names: tuple[str, ...], letter: str = "z") -> str:
    """A vector in words: a real one as a sum of states, a complex one by the states that take part."""
    vector = np.asarray(vector) / vector[np.abs(vector).argmax()]
    called = names or tuple(f"{letter}[{i}]" for i in range(len(vector)))
    large = [i for i in np.argsort(-np.abs(vector), kind="stable") if abs(vector[i]) > SHOWN]
    more = " and others" if len(large) > MOST else ""
    if np.abs(vector.imag).max() > SHOWN:
        shares = np.abs(vector) ** 2 / (np.abs(vector) ** 2).sum()
        return ", ".join(f"{called[i]} ({100 * shares[i]:.0f} %)" for i in large[:MOST]) + more
    terms = [_term(vector[i].real, called[i]) for i in large[:MOST]]
    return "".join(terms).removeprefix(" + ") + more


def _term(factor: float, name: str) -> str:
    size = "" if abs(abs(factor) - 1) < 5e-3 else f"{abs(factor):.2g} "
    return f" {'-' if factor < 0 else '+'} {size}{name}"
