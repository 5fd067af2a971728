"""One step of an SDE on a given Brownian path: Euler-Maruyama, Milstein, Heun, Euler-Heun."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, like_numpy, side_by_side, to_numpy
from kpflow_dyn._problems.forms import called_as
from kpflow_dyn._problems.inputs import input_width, inputs_at
from kpflow_dyn._problems.stepped import SteppedSolution
from kpflow_dyn._problems.steps import call_field
from kpflow_dyn._problems.stochastic import SDEProblem
from kpflow_dyn._stepping.brownian import increments
from kpflow_dyn._stepping.grid import given_steps, inputs_at_start, linear_between, run_steps, step_times

CONVERGES_TO = {"euler": ("ito",), "milstein": ("ito", "stratonovich")}
CONVERGES_TO |= {"heun": ("stratonovich",), "euler_heun": ("stratonovich",)}
CHECKED = 8  # of the steps, whether their noise is diagonal
OTHER_NAMES = {  # of diffrax's solvers and of Julia's, by their class
    "Euler": "euler",
    "EulerMaruyama": "euler",
    "EM": "euler",
    "Heun": "heun",
    "EulerHeun": "euler_heun",
    "ItoMilstein": "milstein",
    "StratonovichMilstein": "milstein",
    "RKMil": "milstein",
}


@dataclass(frozen=True)
class StochasticStep:
    """(model, row, z) -> z after a step of length h, with f, g the drift and the diffusion of the model.

    A row is [h, t, t + h, dW, x(t), x(t + h)]. In torch, where a model takes all trials at once, they share the times.
    """

    method: str
    ito: bool
    noise: int  # how many dW there are
    diagonal: bool  # whether there is one for each unit
    inputs: int | None  # the width of x, None where there is none
    jvp: Callable[..., tuple[Array, Array]]

    def __call__(self, model: Any, row: Array, z: Array) -> Array:
        """The step of `model` on this row."""
        first = row if row.ndim == 1 else row[0]  # all trials of torch have the times of the first
        h, (t, end), dW = first[0], (first[1], first[2]), row[..., 3 : 3 + self.noise]
        width = self.inputs or 0
        here, there = (
            None if self.inputs is None else row[..., k : k + width] for k in (3 + self.noise, 3 + self.noise + width)
        )
        drift = h * call_field(model.f, t, z, here)
        g = call_field(model.g, t, z, here)
        noise = self._times(g, dW)
        if self.method == "euler":
            return z + drift + noise
        if self.method == "milstein":
            b = g if self.diagonal else g[..., 0]
            slope = self.jvp(lambda z: self._vector(call_field(model.g, t, z, here)), (z,), (b,))[1]
            return z + drift + noise + slope * (dW**2 - (h if self.ito else 0)) / 2
        guess = z + noise + (drift if self.method == "heun" else 0)
        noise = (noise + self._times(call_field(model.g, end, guess, there), dW)) / 2
        if self.method == "heun":
            drift = (drift + h * call_field(model.f, end, guess, there)) / 2
        return z + drift + noise

    def _times(self, g: Array, dW: Array) -> Array:
        """g dW."""
        return g * dW if self.diagonal else array_namespace(g).matmul(g, dW[..., None])[..., 0]

    def _vector(self, g: Array) -> Array:
        return g if self.diagonal else g[..., 0]


def solve_sde(problem: SDEProblem, alg: Any, options: dict[str, Any]) -> SteppedSolution:
    """The solution of an SDE on its paths; see `kpflow_dyn.solve`."""
    method, ends = _method(problem, alg), step_times(problem, given_steps(problem, options))
    with problem.backend.solving.without_gradients():
        step = _step(problem, method)
        rows = _rows(problem, ends, increments(problem, ends, step.noise))
        start = problem.backend.models.snapshot(problem.z0)[problem.trials]
        found = run_steps(problem, method, step, rows, start, ends, options, linear_between(ends))
        if method == "milstein" and step.diagonal:
            _check_diagonal(problem, step, found)
        return found


def _method(problem: SDEProblem, alg: Any) -> str:
    """The name of the method, which converges to the solution that is asked for."""
    default = "euler" if problem.sde_type == "ito" else "heun"
    name = default if alg is None else alg if isinstance(alg, str) else type(alg).__name__
    name = OTHER_NAMES.get(name, name)
    known = ", ".join(f"{method!r} ({' and '.join(to)})" for method, to in CONVERGES_TO.items())
    if name not in CONVERGES_TO:
        raise ValueError(f"{alg!r} is no method for an SDE here; take one of {known}, by its name")
    exact = {"ItoMilstein": "ito", "StratonovichMilstein": "stratonovich"}.get(type(alg).__name__, problem.sde_type)
    if problem.sde_type not in CONVERGES_TO[name] or exact != problem.sde_type:
        raise ValueError(
            f"{name!r} does not converge to the {problem.sde_type} solution; take one of {known}, or say sde_type= if "
            "the equation is meant otherwise (where g does not hang on z, both are the same)"
        )
    return name


def _step(problem: SDEProblem, method: str) -> StochasticStep:
    """The step, by what the drift and the diffusion give at the start."""
    width, backend = input_width(problem), problem.backend
    units, trials = problem.z0.shape[1], problem.trials
    given = tuple(part[trials] for part in (problem.z0, *inputs_at_start(problem)))
    called = called_as(["t", "z", *["x_t"] * (width is not None)], problem.args is not None)
    form = f"{called} and {called.replace('f', 'g', 1)}"
    form += f", where the number of trials is no constant of theirs ({len(trials)} here, all paths)"
    check = backend.solving.check_called
    drift = check("the drift f", problem.model, "f", problem.t[0], given, form)
    if drift != (units,):
        raise ValueError(f"the drift f gives {list(drift)} for each trial, expected [unit] = {[units]}, like z0")
    g = check("the diffusion g", problem.model, "g", problem.t[0], given, form)
    diagonal = g == (units,)
    if not diagonal and not (len(g) == 2 and g[0] == units and g[1] > 0):
        raise ValueError(
            f"the diffusion g gives {list(g)} for each trial, expected [unit] = {[units]} for diagonal noise, or "
            f"[unit, noise] = [{units}, ...]"
        )
    if method == "milstein" and not diagonal and g[1] > 1:
        raise ValueError(
            f"'milstein' needs Levy areas where g is a matrix [unit, noise] of {g[1]} noises, which are not supported; "
            "take 'euler' (ito; of order 1 where g does not hang on z) or 'heun' (stratonovich), or diagonal noise"
        )
    return StochasticStep(method, problem.sde_type == "ito", g[-1], diagonal, width, backend.transforms.jvp)


def _rows(problem: SDEProblem, ends: np.ndarray, dW: Array) -> Array:
    """The rows [trial, step, ...], the first of length zero at t_0."""
    begins = np.concatenate([ends[:1], ends[:-1]])
    times = np.stack([ends - begins, begins, ends], -1)
    trials = problem.trials
    parts = [like_numpy(np.broadcast_to(times, (len(trials), *times.shape)).copy(), problem.z0), dW]
    if problem.x is not None:
        for at in (begins, ends):
            x: Any = inputs_at(problem, np.broadcast_to(at, (len(problem.z0), len(at))))
            parts.append(x[trials])
    return side_by_side(parts, axes=2)


def _check_diagonal(problem: SDEProblem, step: StochasticStep, found: SteppedSolution) -> None:
    """Raise where dg_i / dz_j is not zero for other units j: then the step is not of order one."""
    some = np.unique(np.linspace(0, len(found.ends) - 1, CHECKED).astype(int))
    rows, states = found.rows[:, some], found.steps_state[:, some]
    check = _Diagonal(step)
    q = Random(0).normal(tuple(states.shape), problem.z0)
    images = to_numpy(problem.backend.solving.each_step(check, problem.pair, side_by_side([rows, q], axes=2), states))
    error, size = abs(images[..., 0, :]).max(), abs(images[..., 1, :]).max()
    if error > 1e-3 * max(size, np.finfo(images.dtype).tiny) and size > 0:
        raise ValueError(
            "'milstein' takes the noise for diagonal, and g_i hangs on other units than z_i; take 'euler' (ito) or "
            "'heun' (stratonovich), which need no derivatives of g"
        )


@dataclass(frozen=True)
class _Diagonal:
    """(model, row with a random v behind it, z) -> what of D_z g v is not D_z g 1 times v, and D_z g v."""

    step: StochasticStep

    def __call__(self, model: Any, row: Array, z: Array) -> Array:
        xp, units, noise = array_namespace(z), z.shape[-1], self.step.noise
        first, v = (row if row.ndim == 1 else row[0]), row[..., -units:]
        x = None if self.step.inputs is None else row[..., 3 + noise : 3 + noise + self.step.inputs]

        def along(v: Array) -> Array:
            return self.step.jvp(lambda z: call_field(model.g, first[1], z, x), (z,), (v,))[1]

        image = along(v)
        return xp.stack([image - v * along(xp.ones_like(v)), image], axis=-2)
