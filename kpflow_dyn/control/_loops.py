"""What a model does on one trial, with an added input whose derivative is wanted, in torch and JAX.

    row(t, z, v, seen, x)    with v added to the control, to x, or to the velocity (the next state)

The control of a closed loop is policy(seen, x): seen = z closes the loop, and a copy of z leaves it open. Then z and
the velocity (the next state) are those of the plant alone, without a memory of the policy.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, full_precision, like_numpy, to_numpy
from kpflow_dyn._backend import Backend, Transforms
from kpflow_dyn._problems.problems import DiscreteProblem
from kpflow_dyn._problems.steps import call_field
from kpflow_dyn._problems.unit_names import with_memory
from kpflow_dyn.models._discrete import control_of, is_discrete
from kpflow_dyn.models._equations import join

Function = Callable[..., Array]
LOOPS = ("closed", "open")
INPUTS = ("control", "x", "kicks")


@dataclass(frozen=True)
class Loop:
    """A model on one trial."""

    backend: Backend
    call: Function  # (t, z, x) -> velocity or next state, of the whole model
    plant: Function | None  # of a closed loop, whose derivatives are those of plant and policy
    policy: Function | None  # (z, x) -> [memory behind the step, u]
    inputs: str  # where v is added
    is_open: bool  # whether the derivative in z leaves the control as it is
    names: tuple[str, ...]  # of the state's entries, where the plant tells them
    units: int | None = None  # of the plant, where the policy may have a memory behind them

    def row(self, t: Array, z: Array, v: Array, seen: Array, *x: Array) -> Array:
        """The velocity, or the next state."""
        given = self._added("x", x[0], v) if x else None
        if self.plant is None:
            out = self.call(t, z, given)
        else:
            memory, u = self._answer(z, seen, given)
            out = self.plant(z[..., : self.units], self._added("control", u, v))
            if memory.shape[-1] and not self.is_open:
                out = array_namespace(z).concat([out, memory], axis=-1)
        return self._added("kicks", out, v)

    def control(self, z: Array, seen: Array, x: Array | None) -> Array:
        """u of the policy."""
        return self._answer(z, seen, x)[1]

    def _answer(self, z: Array, seen: Array, x: Array | None) -> tuple[Array, Array]:
        """The memory of the policy behind a step, and its control."""
        assert self.policy is not None
        found, memory = self.policy(seen if self.is_open else z, x), 0
        if self.units is not None:
            memory = int(seen.shape[-1]) - self.units
        return found[..., :memory], found[..., memory:]

    def _added(self, name: str, value: Array, v: Array) -> Array:
        return value + v if name == self.inputs else value

    def width(self, z: Array, *x: Array) -> int:
        """How many entries v has, from rows of z and x."""
        if self.inputs == "control":
            return int(self.control(z, z, x[0] if x else None).shape[-1])
        return int((x[0] if self.inputs == "x" else z).shape[-1])


def is_closed_loop(model: Any) -> bool:
    """Whether a model is what `kpflow_dyn.models.ClosedLoop` returns for a policy that acts at all times.

    That of a sampled loop acts at samples alone, and its control is a part of the state.
    """
    is_sampled = hasattr(model, "sampling")
    return hasattr(model, "plant") and hasattr(model, "policy") and not is_sampled and not is_discrete(model.plant)


def loop_of_field(f: Any, backend: Backend, inputs: str | None, loop: str, has_x: bool) -> Loop:
    """A field f(t, z) or f(t, z, x)."""
    form = getattr(f, "form", None)  # of a field in another form, such as one that torchode calls
    model = f if form is None or not form.has_plain_states else backend.models.field_of(f)
    return _loop(lambda t, z, x: call_field(f, t, z, x), model, backend, inputs, loop, has_x)


def is_stepped_loop(model: Any) -> bool:
    """Whether a model is what `kpflow_dyn.models.ClosedLoop` returns for a plant in discrete time."""
    return hasattr(model, "plant") and hasattr(model, "policy") and is_discrete(model.plant)


def loop_of_cell(problem: DiscreteProblem, inputs: str | None, loop: str) -> Loop:
    """The step of a discrete problem."""
    step, start = problem.backend.tracing.discrete_step(problem)
    model = problem.cell if is_stepped_loop(problem.cell) else None
    found = _loop(lambda t, z, x: step(problem.cell, x, z), model, problem.backend, inputs, loop, True)
    memory = 0 if found.units is None or found.is_open else int(start.shape[-1]) - found.units
    return replace(found, names=with_memory(found.names, memory))


def loop_of_plant(plant: Any, backend: Backend, inputs: str | None, loop: str, has_x: bool) -> Loop:
    """A plant(z, u) on one trial, whose control is x."""
    _check(inputs, loop, False, has_x)
    names = tuple(getattr(plant, "state_names", ()))
    call = backend.tracing.on_one_trial(plant.step if is_discrete(plant) else plant)
    return Loop(backend, lambda t, z, u: call(z, u), None, None, inputs or "x", False, names)


def _loop(call: Function, model: Any, backend: Backend, inputs: str | None, loop: str, has_x: bool) -> Loop:
    one_trial, closed = backend.tracing.on_one_trial, hasattr(model, "plant") and hasattr(model, "policy")
    _check(inputs, loop, closed, has_x)
    chosen = inputs or ("control" if closed else "x")
    if not closed:
        return Loop(backend, one_trial(call), None, None, chosen, False, ())
    plant, policy, units = model.plant, lambda z, x: model.policy(join(z, x)), None
    if is_discrete(plant):
        plant, policy, units = plant.step, partial(remembering, model), plant.state_size
    names, plant, policy = tuple(getattr(model.plant, "state_names", ())), one_trial(plant), one_trial(policy)
    return Loop(backend, one_trial(call), plant, policy, chosen, loop == "open", names, units)


def remembering(model: Any, z: Array, x: Array) -> Array:
    """[memory, u] of a policy in discrete time."""
    memory, u = control_of(model.plant, model.policy, model.readout, z, x)
    return u if memory is None else array_namespace(z).concat([memory, u], axis=-1)


def _check(inputs: str | None, loop: str, closed: bool, has_x: bool) -> None:
    if loop not in LOOPS:
        raise ValueError(f"loop is {loop!r}, expected 'closed' (A of the whole field) or 'open' (of the plant alone)")
    if inputs is not None and inputs not in INPUTS:
        raise ValueError(f"inputs is {inputs!r}, expected 'control' (the plant's u), 'x' or 'kicks' (to the state)")
    if loop == "open" and not closed:
        raise ValueError("loop='open' needs a plant and a policy: a kp.models.ClosedLoop(plant, policy)")
    if inputs == "control" and not closed:
        raise ValueError("inputs='control' needs a kp.models.ClosedLoop(plant, policy); take 'x' or 'kicks'")
    if not has_x and (inputs == "x" or (inputs is None and not closed)):
        raise ValueError("the model has no input x; take inputs='kicks' for kicks to the state")


def derivatives(loop: Loop, t: np.ndarray, z: Array, x: Array | None, of_state: bool = True) -> tuple[np.ndarray, ...]:
    """D_z [trial, time, unit, unit] and D_v [trial, time, unit, input] at times t [time], states z and inputs x.

    D_v alone where that of the state is not wanted.
    """
    rows, (seen, *data) = rows_of(loop, t, z, x)
    try:
        return jacobians(loop.backend.transforms, loop.row, [*rows, seen, *data], of_state)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"the model cannot be differentiated row by row, by vmap and forward mode: {error}. A custom derivative "
            "needs these rules as well; without them, take kp.linearize and the P and K of its flow"
        ) from error


def rows_of(loop: Loop, t: np.ndarray, z: Array, x: Array | None) -> tuple[list[Array], list[Array]]:
    """What a row is called on, each [trial, time, ...]: t, z and v = 0; then z as the policy sees it, and x if any."""
    data = [] if x is None else [x]
    width = loop.width(z[0, 0], *(a[0, 0] for a in data))
    times = like_numpy(np.broadcast_to(np.asarray(t, np.float64), z.shape[:2]).copy(), z)
    moved = z[..., : loop.units] if loop.is_open else z
    return [times, moved, like_numpy(np.zeros((*z.shape[:2], width)), z)], [z, *data]


def jacobians(of: Transforms, row: Function, rows: list[Array], of_state: bool) -> tuple[np.ndarray, ...]:
    """The derivatives of row(t, z, v, ...) [out] in z and in v, at rows [trial, time, ...], float64."""
    like = rows[1]

    def of_row(t: Array, z: Array, v: Array, *data: Array) -> list[Array]:
        if of_state:
            out, pull = of.vjp(lambda z, v: row(t, z, v, *data), z, v)[:2]
        else:
            out, pull = of.vjp(lambda v: row(t, z, v, *data), v)[:2]
        return list(of.vmap(pull)(like_numpy(np.eye(len(out)), like)))

    with full_precision(like):
        return tuple(to_numpy(found).astype(np.float64) for found in of.each_row(of_row, *rows))
