"""The methods of torchdiffeq as tableaus, with its own dense output."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver

from kpflow_dyn._problems.steps import Tableau, hermite, quartic

# The rows of a, then b and c, of the methods that take the steps they are given; torchdiffeq's "rk4" is the 3/8 rule.
_FIXED = {
    "euler": ([[]], [1.0], [0.0]),
    "midpoint": ([[], [1 / 2]], [0.0, 1.0], [0.0, 1 / 2]),
    "heun2": ([[], [1.0]], [1 / 2, 1 / 2], [0.0, 1.0]),
    "heun3": ([[], [1 / 3], [0.0, 2 / 3]], [1 / 4, 0.0, 3 / 4], [0.0, 1 / 3, 2 / 3]),
    "rk4": ([[], [1 / 3], [-1 / 3, 1.0], [1.0, -1.0, 1.0]], [1 / 8, 3 / 8, 3 / 8, 1 / 8], [0.0, 1 / 3, 2 / 3, 1.0]),
}


@dataclass(frozen=True)
class Method:
    """A method of torchdiffeq.

    Attributes:
        name: what torchdiffeq calls it.
        tableau: its tableau, None for methods that are not Runge-Kutta.
        adaptive: whether it chooses its steps.
        fsal: whether its last stage is f at the end of the step. torchdiffeq takes the last stage of an adaptive method
            for the first one of the next step even where it is not, and such steps cannot be replayed one by one.
    """

    name: str
    tableau: Tableau | None
    adaptive: bool
    fsal: bool

    @property
    def embedded(self) -> bool:
        """Whether it is one of torchdiffeq's adaptive Runge-Kutta methods."""
        return self.adaptive and self.tableau is not None


def method_named(name: Any) -> Method:
    """The method of this name.

    Raises:
        TypeError, ValueError: for anything else, listing the names.
    """
    if not isinstance(name, str) or name not in SOLVERS:
        raise (ValueError if isinstance(name, str) else TypeError)(
            f"alg is {name!r}; z0 is a torch tensor, so torchdiffeq solves, expected one of {', '.join(SOLVERS)}"
        )
    return _known(name)


@lru_cache
def _known(name: str) -> Method:
    solver = SOLVERS[name]
    if issubclass(solver, RKAdaptiveStepsizeODESolver):
        tableau = _adaptive_tableau(solver)
        return Method(name, tableau, adaptive=True, fsal=bool((tableau.a[-1] == tableau.b).all()))
    if name in _FIXED:
        return Method(name, _fixed_tableau(*_FIXED[name]), adaptive=False, fsal=True)
    return Method(name, None, adaptive=name == "scipy_solver", fsal=False)


def _adaptive_tableau(solver: type[RKAdaptiveStepsizeODESolver]) -> Tableau:
    """With torchdiffeq's quartic interpolation."""
    alpha, beta, b, _ = (values for values in solver.tableau)
    b = b.double().numpy()
    a = _lower([[], *(row.double().tolist() for row in beta)])
    return Tableau(a, b, np.append(0.0, alpha.double().numpy()), quartic(b, solver.mid.double().numpy()))


def _fixed_tableau(rows: list[list[float]], b: list[float], c: list[float]) -> Tableau:
    """With torchdiffeq's "cubic", which needs f at the end of the step: one more stage, of weight zero."""
    weights = np.append(b, 0.0)
    return Tableau(_lower([*rows, b]), weights, np.append(c, 1.0), hermite(weights))


def _lower(rows: list[list[float]]) -> np.ndarray:
    return np.array([row + [0.0] * (len(rows) - len(row)) for row in rows])
