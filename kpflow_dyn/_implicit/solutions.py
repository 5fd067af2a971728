"""The solutions of models that are no recurrence: networks, fixed points and free-form constraints."""

from dataclasses import dataclass, field

from kpflow_dyn._arrays import Array
from kpflow_dyn._implicit.constraint import TracedConstraint
from kpflow_dyn._implicit.inverse import Inverse
from kpflow_dyn._problems.problems import FixedPointProblem, ImplicitProblem, StaticProblem
from kpflow_dyn._problems.solutions import Solution


@dataclass(frozen=True, kw_only=True)
class ConstraintSolution(Solution):
    """A solution of F(S, theta; x) = 0, with the model as it was traced."""

    traced: TracedConstraint = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class NetworkSolution(ConstraintSolution):
    """The values on the way of a `StaticProblem`, [trial, ...]."""

    problem: StaticProblem

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the values that make the state."""
        assert self.traced.layout is not None
        return self.traced.layout.names


@dataclass(frozen=True, kw_only=True)
class SolvedSolution(ConstraintSolution):
    """A state that was searched for, with P = (D_S F)^{-1} there."""

    inverse: Inverse = field(repr=False)

    @property
    def start(self) -> Array | None:
        """Where the search began."""
        return self.traced.start


@dataclass(frozen=True, kw_only=True)
class FixedPointSolution(SolvedSolution):
    """The states at rest of a `FixedPointProblem` [trial, unit]; `stats` tell how often f was applied, the spectral
    radius of D_z f, and the condition number of 1 - D_z f.
    """

    problem: FixedPointProblem


@dataclass(frozen=True, kw_only=True)
class ImplicitSolution(SolvedSolution):
    """A root S of an `ImplicitProblem`; `stats` tell Newton's steps, and the condition number of D_S F."""

    problem: ImplicitProblem
