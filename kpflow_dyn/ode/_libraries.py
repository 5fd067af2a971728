"""What a library that solves ODEs is, and which one an algorithm belongs to."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

import numpy as np

from kpflow_dyn._arrays import Array
from kpflow_dyn._backend import BACKENDS, Backend
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.steps import AcceptedSteps
from kpflow_dyn._shown import type_name


@dataclass(frozen=True)
class Options:
    """How an ODE is to be solved.

    Attributes:
        rtol, atol: the tolerances.
        max_steps: how many steps may be tried.
        steps: the times between which the solver must step, from t0 to the end; None where it chooses itself.
        controller: what else chooses the steps, of a library that has such; None for its own choice.

    Example as `Library`.
    """

    rtol: float
    atol: float
    max_steps: int
    steps: Any = None
    controller: Any = None

    def given(self) -> dict[str, Any]:
        """By name, as `kp.solve` takes them."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        controller = found.pop("controller")
        return found if controller is None else found | {"stepsize_controller": controller}


@dataclass(frozen=True, eq=False)
class Solved:
    """What a library found.

    Attributes:
        steps: the steps that it took, `AcceptedSteps.between(tableau, times, states)`; None where they cannot be
            replayed one by one, as those of a method with memory.
        state: the state at the times that were asked for [trial, time, unit]; None for the dense output of the steps.
        stats: counts of what was done.
        edges: on a span, where the steps cannot be replayed: the times between which all trials stepped [step + 1].

    Example as `Library`.
    """

    steps: AcceptedSteps | None
    state: Array | None = None
    stats: dict[str, Any] | None = None
    edges: np.ndarray | None = None


class Failed(Exception):
    """Raised by a library whose solve stopped before the end.

    Args:
        trials: for each trial that failed the reason, such as "left the finite numbers", and the time.
        apart: whether each trial was solved by itself. If not, all are one system, and `kp.solve` finds by solves of
            single trials which of them fail.

    >>> from kpflow_dyn import ode
    >>> ode.Failed({1: ("left the finite numbers", 0.5)}, apart=True).trials
    {1: ('left the finite numbers', 0.5)}
    """

    def __init__(self, trials: dict[int, tuple[str, float]], apart: bool) -> None:
        super().__init__(f"trials {list(trials)} failed")
        self.trials, self.apart = trials, apart


@runtime_checkable
class Library(Protocol):
    """A library that solves ODEs, as `kp.solve` sees it: any object with these members.

    name           what it is called; adding another one of this name replaces it.
    framework      whose arrays it takes, "torch" or "jax".
    accepts        whether an algorithm is one of its own.
    chooses_steps  whether an algorithm that it accepts chooses its steps; if not, `options.steps` are always given.
                   TypeError or ValueError for one that cannot be used, saying what can.
    solve          the steps and states of a problem whose field has been checked, at `times`, which increase from t0 to
                   the end; `rate_of(problem)` is its right-hand side. Where the algorithm chooses its steps, one must
                   end at each of `stops_of(problem)`; given ones do. Trials may have steps of their own, padded at the
                   end with steps of length zero; in torch a field is then mapped over the trials. In JAX
                   all share their steps on a span (`problem.is_span`). `Failed` where it does not reach the end, or the
                   state does not stay finite.
    posed          of a library that has it: the problem as its users write fields, before these are checked.

    Example:
        Two steps of Heun's method in each interval, with the cubic dense output:

        >>> import numpy as np, torch
        >>> import kpflow_dyn as kp
        >>> from kpflow_dyn import ode
        >>> class Heun:
        ...     pass
        >>> class HeunLibrary:
        ...     name, framework = "heun", "torch"
        ...     b = np.array([0.5, 0.5, 0.0])
        ...     a = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
        ...     tableau = ode.Tableau(a, b, a.sum(1), ode.hermite(b))
        ...     def accepts(self, alg):
        ...         return isinstance(alg, Heun)
        ...     def chooses_steps(self, alg):
        ...         return False
        ...     def solve(self, problem, alg, times, options):
        ...         f, states = ode.rate_of(problem), [problem.z0]
        ...         t = torch.as_tensor(options.steps)
        ...         for start, end in zip(t, t[1:]):
        ...             first = f(start, states[-1])
        ...             second = f(end, states[-1] + (end - start) * first)
        ...             states.append(states[-1] + (end - start) * (first + second) / 2)
        ...         return ode.Solved(ode.AcceptedSteps.between(self.tableau, options.steps, torch.stack(states, 1)))
        >>> ode.add_library(HeunLibrary())
        >>> field, start = kp.models.MLPField(3, 8).double(), torch.ones(2, 3, dtype=torch.float64)
        >>> solution = kp.solve(kp.ODEProblem(field, start, [0.0, 0.5, 1.0]), Heun(), steps=0.25)
        >>> kp.linearize(solution).ntk.domain.shape, solution(0.3).shape
        ((2, 3, 3), torch.Size([2, 3]))
        >>> ode.remove_library("heun")
    """

    @property
    def name(self) -> str: ...
    @property
    def framework(self) -> str: ...
    def accepts(self, alg: Any) -> bool: ...
    def chooses_steps(self, alg: Any) -> bool: ...
    def solve(self, problem: ODEProblem, alg: Any, times: np.ndarray, options: Options) -> Solved: ...


_added: dict[str, Library] = {}


def add_library(library: Library) -> None:
    """Let `kp.solve` use a library for the algorithms that it accepts, before the package's own.

    Args:
        library: an object with the members of `Library`; it replaces an earlier one of the same name.

    Raises:
        TypeError, ValueError: for an object without the members of `Library`, or of an unknown framework.

    >>> from kpflow_dyn import ode
    >>> ode.add_library("torchode")
    Traceback (most recent call last):
    TypeError: library is 'torchode', expected an object with the members of kpflow_dyn.ode.Library
    """
    if not isinstance(library, Library):
        raise TypeError(f"library is {library!r}, expected an object with the members of kpflow_dyn.ode.Library")
    if library.framework not in BACKENDS:
        raise ValueError(
            f"the framework of {library.name} is {library.framework!r}, expected one of {', '.join(BACKENDS)}"
        )
    _added[library.name] = library


def remove_library(name: str) -> None:
    """Undo `add_library`.

    Args:
        name: of the library.

    Raises:
        KeyError: for a name that was not added.

    Example as `Library`.
    """
    del _added[name]


def library_of(alg: Any, backend: Backend) -> Library:
    """The library that accepts an algorithm; the backend's own one where none was added that does."""
    own = added(alg, backend)
    return own[-1] if own else backend.solving.ode_library(alg)


def added(alg: Any, backend: Backend) -> list[Library]:
    """The libraries that were added and accept an algorithm."""
    return [library for library in _added.values() if library.framework == backend.name and library.accepts(alg)]


def rate_of(problem: ODEProblem) -> Callable[[Array, Array], Array]:
    """The right-hand side of a problem, its inputs included, as a function of t and z [trial, unit].

    Args:
        problem: z' = f(t, z), or z' = f(t, z, x(t)).

    Raises:
        TypeError: a problem of another kind.

    >>> import torch, kpflow_dyn as kp
    >>> problem = kp.ODEProblem(kp.models.MLPField(3, 8), torch.ones(2, 3), [0.0, 1.0, 2.0])
    >>> kp.ode.rate_of(problem)(torch.tensor(0.0), problem.z0).shape
    torch.Size([2, 3])
    """
    if not isinstance(problem, ODEProblem):
        raise TypeError(f"rate_of takes an ODEProblem, got {type_name(problem)}")
    return problem.backend.solving.rate_of(problem)
