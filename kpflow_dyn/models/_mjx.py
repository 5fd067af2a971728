"""MuJoCo's physics in JAX (MJX) as a plant in discrete time."""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kpflow_dyn._shown import type_name

Step = Callable[[Array, Array], Array]
PLACES, TURNS = ("x", "y", "z"), ("qw", "qx", "qy", "qz")
ENTRIES = {  # of qpos and of qvel, by MuJoCo's number of the kind of joint: free, ball, slide, hinge
    0: ((*PLACES, *TURNS), ("vx", "vy", "vz", "wx", "wy", "wz")),
    1: (TURNS, ("wx", "wy", "wz")),
    2: (("",), ("velocity",)),
    3: (("",), ("velocity",)),
}
SHIFT, WRONG = 1e-5, 1e-3  # of differences, in units of 1 + |z|; and by how much of its size a derivative may differ


class MJXPlant:
    """A model of MuJoCo as a plant in discrete time, z_t = step(z_{t-1}, u), by `mujoco.mjx.step`, for policies in JAX.

        z = [qpos, qvel, act]    u = ctrl, held during the step

    The derivative of a step is a matrix that forward mode through MJX makes: MJX's solver is a `while_loop`, of which
    JAX has no reverse mode, and what goes in are few numbers. Each step starts its solver anew, since the last
    acceleration is no part of z; a rollout by mjx.step alone may differ by the solver's tolerance.

    Of a `ClosedLoop` around it `kp.linearize` first compares this derivative, at all states, with differences of the
    step. NaN is an error that names the state, what in the model may be the cause, and what to set. Some derivatives
    MJX gets wrong without a NaN, which is a warning: those in the angular velocity of a free or ball joint where it is
    0, and those of a solver that had nothing to do, or that stopped before its derivative was right.

    Args:
        model: a `mujoco.MjModel`.
        substeps: how many steps of MuJoCo a step is.
        data: a `mujoco.mjx.Data` or `mujoco.MjData` with what else counts, such as mocap bodies or forces from outside;
            that of the model at rest when None.

    Attributes:
        dt: substeps times the model's timestep [s].
        state_size, control_size, state_names: of z and u, by the names of the model's joints and actuators.
        start: z of the model's own position, at rest [state].

    Raises:
        ModuleNotFoundError: MJX is missing.
        TypeError: no MjModel; when called, a z in another precision than JAX had when the plant was made.
        ValueError: substeps below 1, or `data` of another model.

    Warns:
        UserWarning: `kp.linearize`, where MJX's derivative is not that of its step.
    Source: Todorov, Erez, Tassa, "MuJoCo: a physics engine for model-based control", IROS (2012); in JAX by MJX.

    >>> import mujoco  # doctest: +SKIP
    >>> plant = MJXPlant(mujoco.MjModel.from_xml_path("hopper.xml"), substeps=4)  # doctest: +SKIP
    >>> loop = ClosedLoop(plant, eqx.nn.MLP(plant.state_size, plant.control_size, 32, 1, key=key))  # doctest: +SKIP
    >>> problem = kp.DiscreteProblem(loop, jnp.zeros((8, 50, 0)), plant.start + noise)  # doctest: +SKIP
    """

    def __init__(self, model: Any, substeps: int = 1, data: Any = None) -> None:
        mujoco, mjx = _packages()
        if not isinstance(model, mujoco.MjModel):
            raise TypeError(f"model is {type_name(model)}, expected a mujoco.MjModel, as of MjModel.from_xml_path")
        if isinstance(substeps, bool) or not isinstance(substeps, int) or substeps < 1:
            raise ValueError(f"substeps is {substeps!r}, expected a whole number of at least 1")
        self.model, self.substeps, self.dt = model, substeps, substeps * float(model.opt.timestep)
        self.state_size, self.control_size = model.nq + model.nv + model.na, model.nu
        self.state_names = _names(model)
        on_device = mjx.put_model(model)
        data = mjx.make_data(on_device) if data is None else data
        data = mjx.put_data(model, data) if isinstance(data, mujoco.MjData) else data
        if data.qpos.shape != (model.nq,):
            raise ValueError(f"data has {data.qpos.shape} positions, expected the {model.nq} of one copy of the model")
        self._dtype = data.qpos.dtype
        step = jax.jit(_step_of(model, mjx.step, on_device, data, substeps))  # Python goes through MJX once
        self._by_matrix, self._in_rows = _by_matrix(step), _in_rows(step)

    def __repr__(self) -> str:
        return f"MJXPlant({self.state_size} states, {self.control_size} controls, dt={self.dt:g})"

    @property
    def start(self) -> Array:
        """z of the model's own position, at rest."""
        return jnp.zeros(self.state_size, self._dtype).at[: self.model.nq].set(self.model.qpos0)

    def step(self, z: Array, u: Array) -> Array:
        """The state [state] after a step from z [state] under u [control]."""
        if z.shape != (self.state_size,):
            raise ValueError(f"z has the shape {z.shape}, expected the {self.state_size} entries of {self}")
        if z.dtype != self._dtype:
            raise TypeError(
                f"z is {z.dtype}, but JAX had {self._dtype} when this MJXPlant was made; set jax_enable_x64 before the "
                "plant is made, and give z0 in the same precision"
            )
        return self._by_matrix(z, u.astype(z.dtype))

    def check_derivative(self, z: Array, u: Array) -> None:
        """Raise where the derivative of a step is NaN at rows of z and u, and warn where it is not that of the step."""
        slopes, differences = _both(self._in_rows, z, u)
        names = (*self.state_names, *(f"control {i}" for i in range(self.control_size)))
        lost = np.asarray(~np.isfinite(slopes).all(2))  # [row, entry of z and u]
        if lost.any():
            row, entry = map(int, np.argwhere(lost)[0])
            raise ValueError(
                f"MJX's derivative of a step is NaN in {_listed(names, lost.any(0))}, first at state {row} of "
                f"{len(lost)}, where {names[entry]} is {float(np.concatenate([z[row], u[row]])[entry]):.4g}. "
                f"{_causes(self.model)}"
            )
        size = np.abs(differences).max(2, keepdims=True)
        size = np.maximum(size, WRONG * size.max(1, keepdims=True))
        wrong = (np.abs(slopes - differences) > WRONG * size).any(2)
        if wrong.any():
            warnings.warn(
                f"MJX's derivative of a step is not that of the step at {int(wrong.any(1).sum())} of {len(wrong)} "
                f"states, first at {int(wrong.any(1).argmax())}, in {_listed(names, wrong.any(0))}. It is 0 in the "
                "angular velocity of a free or ball joint at rest (start it at 1e-6, not at 0); wrong where the "
                "solver has nothing to do or stops early (solver='Newton', more iterations, a smaller tolerance); and "
                "one-sided where a contact or a limit begins",
                stacklevel=4,
            )


def _packages() -> tuple[Any, Any]:
    if importlib.util.find_spec("mujoco") is None or importlib.util.find_spec("mujoco.mjx") is None:
        raise ModuleNotFoundError("MJXPlant needs mujoco and mujoco-mjx: pip install 'kpflow-dyn[jax,mujoco]'")
    return importlib.import_module("mujoco"), importlib.import_module("mujoco.mjx")


def _names(model: Any) -> tuple[str, ...]:
    """Of the entries of qpos, qvel and act."""
    joints = [(model.joint(i).name or f"joint{i}", ENTRIES[int(model.jnt_type[i])]) for i in range(model.njnt)]
    pairs = [(name, entry) for part in (0, 1) for name, entries in joints for entry in entries[part]]
    owners = [i for i in range(model.nu) for _ in range(int(model.actuator_actnum[i]))]
    pairs += [(model.actuator(i).name or f"actuator{i}", "activation") for i in owners]
    return tuple(f"{name}_{entry}" if entry else name for name, entry in pairs)


def _step_of(model: Any, mjx_step: Any, on_device: Any, data: Any, substeps: int) -> Step:
    nq, nv = model.nq, model.nv

    def step(z: Array, u: Array) -> Array:
        now = data.replace(qpos=z[:nq], qvel=z[nq : nq + nv], act=z[nq + nv :], ctrl=u)
        if substeps == 1:
            now = mjx_step(on_device, now)
        else:
            now, _ = jax.lax.scan(lambda now, _: (mjx_step(on_device, now), None), now, None, length=substeps)
        return jnp.concatenate([now.qpos, now.qvel, now.act])

    return step


def _forward(step: Step) -> Callable[[Array, Array, Array], tuple[Array, Array]]:
    """The state after a step, and how fast it moves where z and u do, by forward mode."""

    def moved(z: Array, u: Array, tangent: Array) -> tuple[Array, Array]:
        return jax.jvp(step, (z, u), (tangent[: len(z)], tangent[len(z) :]))

    return moved


def _by_matrix(step: Step) -> Step:
    """The same step, whose derivative is the matrix of forward mode: it has a transpose where the step has none."""
    with_rule = jax.custom_jvp(step)
    columns = jax.jit(jax.vmap(_forward(step), (None, None, 0), (None, 1)))

    @with_rule.defjvp
    def rule(at: tuple[Array, Array], moved: tuple[Array, Array]) -> tuple[Array, Array]:
        value, matrix = columns(*at, jnp.eye(len(at[0]) + len(at[1]), dtype=at[0].dtype))
        return value, matrix @ jnp.concatenate(moved)

    return with_rule


def _in_rows(step: Step) -> Callable[[Array, Array], tuple[Array, Array]]:
    """`_forward` at rows [row, point, z and u] and as many tangents, one row after the other."""

    def of_point(size: Array, v: Array, tangent: Array) -> tuple[Array, Array]:
        return _forward(step)(v[: len(size)], v[len(size) :], tangent)

    def of_row(row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        return jax.vmap(of_point, (None, 0, 0))(*row)

    return jax.jit(lambda size, v, tangents: jax.lax.map(of_row, (size, v, tangents)))


def _both(program: Any, z: Array, u: Array) -> tuple[np.ndarray, np.ndarray]:
    """The derivative of a step and its central differences [row, z and u, next state], by one program."""
    rows = jnp.concatenate([z, u], axis=1)
    unit, shift = jnp.eye(rows.shape[1], dtype=rows.dtype), SHIFT if rows.dtype == jnp.float64 else 1e-2
    lengths = shift * (1 + abs(rows))[..., None] * unit  # [row, z and u, z and u]
    slopes = program(z, rows[:, None] + 0 * lengths, jnp.broadcast_to(unit, lengths.shape))[1]
    ahead, behind = (program(z, rows[:, None] + sign * lengths, 0 * lengths)[0] for sign in (1, -1))
    return np.asarray(slopes), np.asarray((ahead - behind) / (2 * lengths.sum(-1, keepdims=True)))


def _listed(names: tuple[str, ...], where: Any, most: int = 6) -> str:
    found = [name for name, there in zip(names, where, strict=True) if there]
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def _causes(model: Any) -> str:
    """What in a model may have no derivative, and what to set."""
    mujoco, _ = _packages()
    off = bool(model.opt.disableflags & mujoco.mjtDisableBit.mjDSBL_CONTACT)
    touching = not off and bool(((model.geom_contype != 0) | (model.geom_conaffinity != 0)).any())
    causes = [
        (
            touching and model.opt.cone == mujoco.mjtCone.mjCONE_ELLIPTIC,
            "elliptic cones have none at a contact that does not slide: set cone='pyramidal' in <option>",
        ),
        (
            touching,
            "contacts may have none where centres or axes meet, or too stiff: leave out geoms that need not touch "
            "(contype='0' conaffinity='0'), set <flag contact='disable'/>, or soften them (solref, solimp)",
        ),
        (model.neq > 0, "equality constraints may have none where their bodies coincide: leave them out (<equality>)"),
        (
            model.ntendon > 0,
            "tendons may have none where two of their sites coincide: move one, or take limits off (limited='false')",
        ),
        (
            touching or model.neq + model.ntendon > 0,
            "a solver that diverges has none: change iterations, ls_iterations or the timestep",
        ),
    ]
    found = [advice for holds, advice in causes if holds] or ["look for the norm of a zero vector in the model"]
    return "In this model " + "; ".join(found)
