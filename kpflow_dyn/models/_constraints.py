"""What the recurrent weights of a start must keep: signs of columns, zeros, a largest spectral radius."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._shown import type_name
from kpflow_dyn.models._constants import Constants
from kpflow_dyn.models._laws import Law


@dataclass(frozen=True)
class Constraint(Constants):
    """A change W -> C(W) of a drawn matrix, after which it has a property; C(W) = W where it has it already.

    Example as `Constrained`.
    """

    place = 0  # in which order constraints are applied, so that a later one keeps what an earlier one made

    def applied(self, W: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The matrix [n, n] with the property."""
        raise NotImplementedError


@dataclass(frozen=True)
class Signs(Constraint):
    """Dale's law: the first units, the part `excitatory` of all, have columns >= 0, the others columns <= 0.

        W_ij <- +-s_j |W_ij|    s_E = sqrt((1 - f) / f)    s_I = sqrt(f / (1 - f))

    so that excitation and inhibition balance on average.

    Args:
        excitatory: the part f, rounded to whole units, at least one of each kind.

    Raises:
        TypeError, ValueError: f is no number between 0 and 1; when drawn, fewer than 2 units.
    Source: Rajan, Abbott, Phys. Rev. Lett. 97, 188104 (2006).

    >>> np.sign(Signs(0.5).applied(np.array([[-1.0, 2.0], [3.0, 4.0]]), np.random.default_rng(0))).tolist()
    [[1.0, -1.0], [1.0, -1.0]]
    """

    excitatory: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_part("excitatory", self.excitatory, most=False)

    def applied(self, W: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        n = len(W)
        if n < 2:
            raise ValueError("Signs needs a unit of each kind, so 2 units at least")
        count = min(max(round(self.excitatory * n), 1), n - 1)
        odds = count / (n - count)
        scale = np.where(np.arange(n) < count, odds**-0.5, -(odds**0.5))
        return W if (W * scale >= 0).all() else scale * np.abs(W)


@dataclass(frozen=True)
class Sparse(Constraint):
    """At most m = round(density n^2) entries are left, drawn at random of the c that are not zero; they grow by
    (c / m)^1/2, which keeps the radius.

        W_ij <- (c / m)^1/2 m_ij W_ij,    m_ij in {0, 1}

    Args:
        density: the part of the entries that may differ from zero, 0 < density <= 1.

    Raises:
        TypeError, ValueError: the density is no such number.
    Source: Girko, Theory Probab. Appl. 29, 694 (1985), for the circular law.

    >>> int((Sparse(0.25).applied(np.ones((4, 4)), np.random.default_rng(0)) != 0).sum())
    4
    """

    density: float = 0.1
    place = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_part("density", self.density)

    def applied(self, W: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        left = round(self.density * W.size)
        nonzero = np.flatnonzero(W)
        if len(nonzero) <= left:
            return W
        kept = np.zeros(W.size)
        kept[rng.permutation(nonzero)[:left]] = (len(nonzero) / max(left, 1)) ** 0.5
        return W * kept.reshape(W.shape)


@dataclass(frozen=True)
class MaxRadius(Constraint):
    """The largest |eigenvalue| is at most rho: a larger one is scaled down to it, in float64.

        W <- min(1, rho / max |eigenvalue|) W

    Args:
        rho: > 0.

    Raises:
        TypeError, ValueError: rho is no such number.
    Source: as reservoirs are scaled, Jaeger, GMD report 148 (2001).

    >>> np.linalg.eigvals(MaxRadius(0.5).applied(np.diag([2.0, 1.0]), np.random.default_rng(0))).tolist()
    [0.5, 0.25]
    """

    rho: float = 1.0
    place = 2

    def applied(self, W: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        radius = np.abs(np.linalg.eigvals(W)).max()
        return W if radius <= self.rho else self.rho / radius * W


@dataclass(frozen=True)
class Constrained(Law):
    """A law whose draws keep constraints, each made by `Constraint.applied` after the draw.

        W <- C_k(... C_1(W))

    Signs come first, then zeros, then the radius, in whatever order they are given. They hold at the start: training
    need not keep them.

    Args:
        law: a `Law`, or what has its `matrix(n, seed)`.
        constraints: of `Signs`, `Sparse`, `MaxRadius`.

    Raises:
        TypeError: another law or constraint.
        ValueError: `Planted`, whose points would not stay fixed.
    Source: Rajan, Abbott, Phys. Rev. Lett. 97, 188104 (2006), for signs; Jaeger, GMD report 148 (2001), for radii.

    >>> from kpflow_dyn.models import Gaussian
    >>> W = Constrained(Gaussian(1.5), [Sparse(0.2), MaxRadius(0.9)]).matrix(20)
    >>> int((W != 0).sum()), abs(np.linalg.eigvals(W)).max().round(12)
    (80, np.float64(0.9))
    """

    law: Any
    constraints: Sequence[Constraint]

    def __post_init__(self) -> None:
        for one in self.constraints:
            if not isinstance(one, Constraint):
                raise TypeError(f"a constraint is {type_name(one)}, expected Signs, Sparse or MaxRadius")
        if not hasattr(self.law, "matrix") or isinstance(self.law, type):
            raise TypeError(f"law is {self.law!r}, expected an object such as Gaussian(g=1.5)")
        if hasattr(self.law, "weights"):
            raise ValueError(f"{self.law!r} depends on its exact weights, which constraints change; leave one of them")
        object.__setattr__(self, "constraints", tuple(sorted(self.constraints, key=lambda one: one.place)))

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        W = self.law.matrix(n, rng)
        for one in self.constraints:
            W = one.applied(W, rng)
        return W

    def words(self) -> str:
        return f"{self.law!r}, changed to keep {', '.join(map(repr, self.constraints))}"


def _check_part(name: str, value: float, most: bool = True) -> None:
    if not (value <= 1 if most else value < 1) or not math.isfinite(value):
        raise ValueError(f"{name} must be a part between 0 and 1, got {value}")
