"""The solvers of diffrax as tableaus, with their own dense output, and what chooses their steps."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from kpflow_dyn._problems.steps import Tableau

_CHUNK = 256
"""So many weights at once: one compilation serves any number of them."""


def check_solver(solver: Any) -> diffrax.AbstractSolver:
    """Raise unless this is an instance of a diffrax solver for a field of one term."""
    if inspect.isclass(solver) and issubclass(solver, diffrax.AbstractSolver):
        raise TypeError(f"alg is the class {solver.__name__}, expected an instance: diffrax.{solver.__name__}()")
    if not isinstance(solver, diffrax.AbstractSolver):
        raise TypeError(
            f"alg is {solver!r}; z0 is a jax array, so diffrax solves, expected one of its solvers, diffrax.Tsit5()"
        )
    structure = typing.get_origin(solver.term_structure) or solver.term_structure
    if not (inspect.isclass(structure) and issubclass(diffrax.ODETerm, structure)):
        raise TypeError(
            f"{type(solver).__name__} solves fields that are split into several terms, and f is one; take "
            "diffrax.Tsit5(), or diffrax.Kvaerno5() for a stiff problem"
        )
    return solver


def is_adaptive(solver: diffrax.AbstractSolver) -> bool:
    """Whether the solver estimates its error, and so can choose its steps."""
    tableau = getattr(solver, "tableau", None)
    return isinstance(solver, diffrax.AbstractAdaptiveSolver) and (tableau is None or bool(tableau.b_error.any()))


def tableau_of(solver: diffrax.AbstractSolver) -> Tableau | None:
    """The tableau of a Runge-Kutta solver; None for others, whose steps depend on those before them."""
    return _tableau(type(solver))


@lru_cache
def _tableau(solver: type[diffrax.AbstractSolver]) -> Tableau | None:
    interpolation: Any = solver.interpolation_cls
    known = getattr(solver, "tableau", None)
    if isinstance(known, diffrax.ButcherTableau):
        a = np.zeros((known.num_stages, known.num_stages))
        for row, values in enumerate(known.a_lower, 1):
            a[row, :row] = values
        a += 0 if known.a_diagonal is None else np.diag(known.a_diagonal)
        return Tableau(a, known.b_sol, np.append(known.c1, known.c), _weights(interpolation, known.b_sol))
    if solver in (diffrax.Euler, diffrax.ImplicitEuler):
        implicit = float(solver is diffrax.ImplicitEuler)
        weights = _weights(lambda k, **rest: interpolation(**rest), np.ones(1))
        return Tableau(np.full((1, 1), implicit), np.ones(1), np.full(1, implicit), weights)
    return None


def _weights(interpolation: Callable[..., Any], b: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What diffrax's interpolation, which is linear, makes of unit stages: y_1 = 0, so y_0 = -sum_i b_i k_i."""

    @jax.jit
    def of_chunk(theta: jax.Array) -> jax.Array:
        start, end = jnp.asarray(-b, theta.dtype), jnp.zeros(len(b), theta.dtype)
        k = jnp.eye(len(b), dtype=theta.dtype)
        local = interpolation(t0=jnp.zeros((), theta.dtype), t1=jnp.ones((), theta.dtype), y0=start, y1=end, k=k)
        return jax.vmap(local.evaluate)(theta)

    def weights(theta: np.ndarray) -> np.ndarray:
        theta = np.asarray(theta, np.float64)
        padded = np.pad(theta.ravel(), (0, -theta.size % _CHUNK)).reshape(-1, _CHUNK)
        with jax.enable_x64(True):
            w = np.array([of_chunk(chunk) for chunk in padded]).reshape(-1, len(b))[: theta.size]
        return np.where(theta[..., None] == 1, 0.0, w.reshape(*theta.shape, len(b)))

    return weights


class GivenSteps(diffrax.AbstractAdaptiveStepSizeController):
    """Steps to given times, with tolerances for the root finder of an implicit method."""

    steps: diffrax.StepTo
    rtol: Any
    atol: Any
    norm: Callable[..., Any]

    def wrap(self, direction: Any) -> GivenSteps:
        return dataclasses.replace(self, steps=self.steps.wrap(direction))

    def init(self, *args: Any, **kwargs: Any) -> Any:
        return self.steps.init(*args, **kwargs)

    def adapt_step_size(self, *args: Any, **kwargs: Any) -> Any:
        return self.steps.adapt_step_size(*args, **kwargs)


class ChosenSteps(diffrax.PIDController):
    """Steps by diffrax's controller, ending the solve where they shrink to the round-off of the time."""

    def adapt_step_size(self, *args: Any, **kwargs: Any) -> Any:
        chosen: Any = super().adapt_step_size(*args, **kwargs)
        _, t0, t1, *_, result = chosen
        vanished = t1 - t0 <= 4 * jnp.finfo(t0.dtype).eps * jnp.abs(t0)
        return (*chosen[:-1], diffrax.RESULTS.where(vanished, diffrax.RESULTS.dt_min_reached, result))
