"""Steps of a pair (q, v) whose parts move in turn: symplectic Euler, and the leapfrog of Stoermer and Verlet."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, like_numpy, side_by_side
from kpflow_dyn._problems.checks import jumps_of
from kpflow_dyn._problems.events import refuse_hybrid
from kpflow_dyn._problems.inputs import input_width, inputs_at, stops_of
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.stepped import SteppedSolution
from kpflow_dyn._problems.steps import call_field
from kpflow_dyn._stepping.grid import given_steps, linear_between, merged, run_steps, step_times

SYMPLECTIC_EULER, LEAPFROG = "symplectic_euler", "leapfrog"
NAMES: dict[str, str] = dict.fromkeys(("symplecticeuler", "semiimpliciteuler"), SYMPLECTIC_EULER)  # in small letters
NAMES |= dict.fromkeys(("leapfrog", "velocityverlet", "stormerverlet", "stoermerverlet", "verletleapfrog"), LEAPFROG)


def split_method(alg: Any) -> str | None:
    """Which of these methods is meant, by its name here, in diffrax or in SciML; None for others."""
    name = alg if isinstance(alg, str) else type(alg).__name__
    return NAMES.get(name.lower().replace("_", "").removesuffix("()"))


@dataclass(frozen=True)
class SplitStep:
    """(f, row, z) -> z, with z = (q, v) side by side.

        symplectic Euler:   q_1 = q + h q'(t, q, v),    v_1 = v + h v'(t, q_1, v)
        leapfrog:           w = v + h/2 v'(t, q, v),    q_1 = q + h q'(t + h/2, q, w),
                            v_1 = w + h/2 v'(t + h, q_1, w)

    A row is [h, t, t + h/2, t + h], and the inputs at these times. In torch all trials share the former.
    """

    leaps: bool
    place: int  # how many units q has
    inputs: int | None  # the width of x, None where there is none

    def __call__(self, f: Any, row: Array, z: Array) -> Array:
        """The step of f on this row."""
        first, q, v = (row if row.ndim == 1 else row[0]), z[..., : self.place], z[..., self.place :]
        h = first[0]
        if not self.leaps:
            q = q + h * self._rate(f, first, row, 0, q, v)[..., : self.place]
            return self._joined(q, v + h * self._rate(f, first, row, 0, q, v)[..., self.place :])
        v = v + h / 2 * self._rate(f, first, row, 0, q, v)[..., self.place :]
        q = q + h * self._rate(f, first, row, 1, q, v)[..., : self.place]
        return self._joined(q, v + h / 2 * self._rate(f, first, row, 2, q, v)[..., self.place :])

    def _rate(self, f: Any, first: Array, row: Array, number: int, q: Array, v: Array) -> Array:
        at = 4 + number * (self.inputs or 0)
        x = None if self.inputs is None else row[..., at : at + self.inputs]
        return call_field(f, first[1 + number], self._joined(q, v), x)

    def _joined(self, q: Array, v: Array) -> Array:
        return array_namespace(q).concat([q, v], axis=-1)


def solve_split(problem: ODEProblem, method: str, options: dict[str, Any]) -> SteppedSolution:
    """The solution of an ODE of a pair (q, v) by steps of given lengths."""
    refuse_hybrid(problem.f, f"{method!r} has no steps of", "take a Runge-Kutta method, which locates its events")
    place, solving = _place(problem, method), problem.backend.solving
    if problem.form.backward:
        raise ValueError(f"the times t decrease, and {method!r} steps forward; take a Runge-Kutta method")
    if callable(problem.x) and len(jumps_of(problem.x)):
        raise ValueError("x jumps, and these steps take it from both of their ends; give samples of it")
    options = solving.understood(options)
    steps = given_steps(problem, options)
    ends = step_times(problem, steps)
    ends = merged(ends, stops_of(problem)) if steps is None else ends
    with solving.without_gradients():
        solving.check_field(problem)
        step = SplitStep(method == LEAPFROG, place, input_width(problem))
        start = problem.backend.models.snapshot(problem.z0)
        return run_steps(problem, method, step, _rows(problem, ends), start, ends, options, linear_between(ends))


def _place(problem: ODEProblem, method: str) -> int:
    """How many units q has."""
    layout = problem.form.layout
    pair = layout.structure.unflatten(range(len(layout.shapes)))
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ValueError(
            f"{method!r} moves the parts of a pair (q, v) in turn, and z0 is {layout}; pose kp.SecondOrderProblem(f, "
            "q, v, t), or kp.ODEProblem(f, (q, v), t) with f(t, (q, v)) = (q', v')"
        )
    return sum(layout.sizes[number] for number in problem.backend.data.flattened(pair[0])[0])


def _rows(problem: ODEProblem, ends: np.ndarray) -> Array:
    """The rows [trial, step, ...], the first of length zero at t_0."""
    begins = np.concatenate([ends[:1], ends[:-1]])
    times, trials = np.stack([begins, (begins + ends) / 2, ends], -1), len(problem.z0)
    numbers = np.concatenate([(ends - begins)[:, None], times], -1)
    rows = like_numpy(np.broadcast_to(numbers, (trials, *numbers.shape)).copy(), problem.z0)
    x = inputs_at(problem, np.broadcast_to(times.reshape(-1), (trials, times.size)))
    return rows if x is None else side_by_side([rows, x.reshape((trials, len(ends), -1))], axes=2)
