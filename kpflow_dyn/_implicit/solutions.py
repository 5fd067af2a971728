"""The solutions of models that are no recurrence: networks, fixed points and free-form constraints."""

from dataclasses import dataclass, field

from kpflow_dyn._arrays import Array
from kpflow_dyn._implicit.constraint import TracedConstraint
from kpflow_dyn._implicit.equations import Equations
from kpflow_dyn._implicit.form import axes_of
from kpflow_dyn._implicit.inverse import Inverse
from kpflow_dyn._implicit.layout import Layout
from kpflow_dyn._implicit.linearised import Linearised
from kpflow_dyn._problems.problems import FixedPointProblem, ImplicitProblem, StaticProblem
from kpflow_dyn._problems.solutions import Solution


@dataclass(frozen=True, kw_only=True, repr=False)
class ConstraintSolution(Solution):
    """A solution of F(S, theta; x) = 0.

    Attributes:
        equations: F as the user's model states it.
        traced: the same traced, else None.
        untraced: why there is no trace.
    """

    equations: Equations = field(repr=False)
    traced: TracedConstraint | None = field(default=None, repr=False)
    untraced: str = field(default="", repr=False)

    @property
    def layout(self) -> Layout | None:
        """How values make the state of a network."""
        return self.equations.layout

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the state's axes."""
        return axes_of(self.equations.form, self.state, self.layout)


@dataclass(frozen=True, kw_only=True, repr=False)
class NetworkSolution(ConstraintSolution):
    """The values on the way of a `StaticProblem`, [trial, ...].

    Attributes:
        checked: where only the trace knows the state, its derivatives in all parameters, which autograd found right.
    """

    problem: StaticProblem
    checked: Linearised | None = field(default=None, repr=False)

    @property
    def of_uses(self) -> bool:
        """Whether the state are the outputs of all uses of weights, which only a trace knows."""
        return self.problem.state is None and self.traced is not None

    @property
    def layout(self) -> Layout | None:
        if self.of_uses:
            assert self.traced is not None
            return self.traced.layout
        return self.equations.layout

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the values that make the state."""
        assert self.layout is not None
        return self.layout.names


@dataclass(frozen=True, kw_only=True, repr=False)
class SolvedSolution(ConstraintSolution):
    """A state that was searched for, with P = (D_S F)^{-1} there."""

    inverse: Inverse = field(repr=False)

    @property
    def start(self) -> Array:
        """Where the search began."""
        return self.equations.start


@dataclass(frozen=True, kw_only=True, repr=False)
class FixedPointSolution(SolvedSolution):
    """The states at rest of a `FixedPointProblem` [trial, unit]; `stats` tell how often f was applied, the spectral
    radius of D_z f, and the condition number of 1 - D_z f.
    """

    problem: FixedPointProblem


@dataclass(frozen=True, kw_only=True, repr=False)
class ImplicitSolution(SolvedSolution):
    """A root S of an `ImplicitProblem`; `stats` tell Newton's steps, and the condition number of D_S F."""

    problem: ImplicitProblem
