"""What a model does on one trial, with an added input whose derivative is wanted, in torch and JAX.

    row(t, z, v, seen, x)    with v added to the control, to x, or to the velocity (the next state)

The control of a closed loop is policy(seen, x): seen = z closes the loop, and a copy of z leaves it open.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, full_precision, is_jax_array, is_torch_array, like_numpy, to_numpy
from kpflow_dyn._backend import Transforms
from kpflow_dyn._problems.problems import DiscreteProblem
from kpflow_dyn.models._equations import join
from kpflow_dyn.ode._discretise import call_field

Function = Callable[..., Array]
LOOPS = ("closed", "open")
INPUTS = ("control", "x", "kicks")


@dataclass(frozen=True)
class Loop:
    """A model on one trial.

    Attributes:
        call: (t, z, x) -> velocity or next state, without a control of its own.
        plant, policy: of a closed loop, whose `call` is not used; else None.
        inputs: where v is added.
        is_open: whether the derivative in z leaves the control as it is.
        names: of the state's entries, where the plant tells them.
    """

    call: Function
    plant: Function | None
    policy: Function | None
    inputs: str
    is_open: bool
    names: tuple[str, ...]

    def row(self, t: Array, z: Array, v: Array, seen: Array, *x: Array) -> Array:
        """The velocity, or the next state."""
        given = self._added("x", x[0], v) if x else None
        if self.plant is None:
            out = self.call(t, z, given)
        else:
            out = self.plant(z, self._added("control", self.control(z, seen, given), v))
        return self._added("kicks", out, v)

    def control(self, z: Array, seen: Array, x: Array | None) -> Array:
        """u of the policy."""
        assert self.policy is not None
        return self.policy(join(seen if self.is_open else z, x))

    def _added(self, name: str, value: Array, v: Array) -> Array:
        return value + v if name == self.inputs else value

    def width(self, z: Array, *x: Array) -> int:
        """How many entries v has, from rows of z and x."""
        if self.inputs == "control":
            return int(self.control(z, z, x[0] if x else None).shape[-1])
        return int((x[0] if self.inputs == "x" else z).shape[-1])


def is_closed_loop(model: Any) -> bool:
    """Whether a model is what `kpflow_dyn.models.ClosedLoop` returns."""
    return hasattr(model, "plant") and hasattr(model, "policy")


def loop_of_field(f: Any, like: Array, inputs: str | None, loop: str, has_x: bool) -> Loop:
    """A field f(t, z) or f(t, z, x)."""
    whole = _on_one_trial(lambda t, z, x: call_field(f, t, z, x), like)
    return _loop(whole, f, like, inputs, loop, has_x)


def loop_of_cell(problem: DiscreteProblem, like: Array, inputs: str | None, loop: str) -> Loop:
    """The step of a discrete problem."""
    if is_jax_array(like):
        from kpflow_dyn._jax.linearise import discrete_step
    else:
        from kpflow_dyn._torch.linearise import discrete_step
    step = discrete_step(problem)
    return _loop(_on_one_trial(lambda t, z, x: step(problem.cell, x, z), like), None, like, inputs, loop, True)


def loop_of_map(call: Function, names: tuple[str, ...], inputs: str | None, loop: str, has_x: bool) -> Loop:
    """A function of (t, z, x) on one trial, such as a plant whose control is x."""
    _check(inputs, loop, False, has_x)
    return Loop(call, None, None, inputs or "x", False, names)


def _loop(whole: Function, model: Any, like: Array, inputs: str | None, loop: str, has_x: bool) -> Loop:
    closed = is_closed_loop(model)
    _check(inputs, loop, closed, has_x)
    chosen = inputs or ("control" if closed else "x")
    if not closed:
        return Loop(whole, None, None, chosen, False, ())
    policy = _on_one_trial(model.policy, like)
    names = tuple(getattr(model.plant, "state_names", ()))
    return Loop(whole, model.plant, policy, chosen, loop == "open", names)


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


def _on_one_trial(function: Function, like: Array) -> Function:
    """A module of torch, which takes all trials at once, on one of them; t has no trial axis."""
    if not is_torch_array(like):
        return function

    def on_one(*arguments: Array | None) -> Array:
        return function(*(a if a is None or a.ndim == 0 else a[None] for a in arguments))[0]

    return on_one


def derivatives(loop: Loop, t: np.ndarray, z: Array, x: Array | None, of_state: bool = True) -> tuple[np.ndarray, ...]:
    """D_z [trial, time, unit, unit] and D_v [trial, time, unit, input] at times t [time], states z and inputs x.

    D_v alone where that of the state is not wanted.
    """
    rows, (seen, *data) = rows_of(loop, t, z, x)
    return jacobians(loop.row, [*rows, seen, *data], of_state)


def rows_of(loop: Loop, t: np.ndarray, z: Array, x: Array | None) -> tuple[list[Array], list[Array]]:
    """What a row is called on, each [trial, time, ...]: t, z and v = 0; then z as the policy sees it, and x if any."""
    data = [] if x is None else [x]
    width = loop.width(z[0, 0], *(a[0, 0] for a in data))
    times = like_numpy(np.broadcast_to(np.asarray(t, np.float64), z.shape[:2]).copy(), z)
    return [times, z, like_numpy(np.zeros((*z.shape[:2], width)), z)], [z, *data]


def jacobians(row: Function, rows: list[Array], of_state: bool = True) -> tuple[np.ndarray, ...]:
    """The derivatives of row(t, z, v, ...) [out] in z and in v, at rows [trial, time, ...], float64."""
    framework, like = framework_of(rows[1]), rows[1]

    def of_row(t: Array, z: Array, v: Array, *data: Array) -> list[Array]:
        if of_state:
            out, pull = framework.vjp(lambda z, v: row(t, z, v, *data), z, v)[:2]
        else:
            out, pull = framework.vjp(lambda v: row(t, z, v, *data), v)[:2]
        return list(framework.vmap(pull)(like_numpy(np.eye(len(out)), like)))

    with full_precision(like):
        return tuple(to_numpy(found).astype(np.float64) for found in framework.each_row(of_row, *rows))


def framework_of(like: Array) -> Transforms:
    """The function transforms of an array's framework."""
    if is_jax_array(like):
        from kpflow_dyn._jax.rows import JAX

        return JAX
    from kpflow_dyn._torch.rows import TORCH

    return TORCH
