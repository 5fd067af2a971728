"""Models of JAX, traced; see `kpflow_dyn._backend.Tracing`."""

from collections.abc import Callable
from functools import cached_property

import jax

from kpflow_dyn._jax.cells import discrete_step
from kpflow_dyn._jax.model import Model
from kpflow_dyn._jax.networks import FixedPoint, FreeForm, Network
from kpflow_dyn._jax.through_solver import ThroughSolver
from kpflow_dyn._problems.problems import DiscreteProblem
from kpflow_dyn._recurrence.tangent import Propagation

__all__ = ["FixedPoint", "FreeForm", "Model", "Network", "ThroughSolver"]
__all__ += ["as_called", "discrete_step", "on_one_trial", "when_applied"]


def as_called(_problem: DiscreteProblem) -> None:
    """None: JAX's cells are called step by step."""
    return None


def on_one_trial(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The same: models of JAX are called on one trial."""
    return function


def when_applied(make: Callable[[], Propagation]) -> Propagation:
    """What it makes, when that is first applied: models of JAX do not change."""
    return _WhenApplied(make)


class _WhenApplied:
    def __init__(self, make: Callable[[], Propagation]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> Propagation:
        with jax.ensure_compile_time_eval():  # inside of a jit too it is compared by its numbers
            return self._make()

    def propagate(self, q: jax.Array) -> jax.Array:
        return self._made.propagate(q)

    def propagate_adjoint(self, q: jax.Array) -> jax.Array:
        return self._made.propagate_adjoint(q)
