"""MotorNet's effectors (arms with muscles) as plants in discrete time, and its recurrent policies, in torch."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kpflow_dyn._shown import type_name


class MotorNetPlant(nn.Module):
    """An effector of MotorNet as a plant in discrete time, z_t = step(z_{t-1}, u), by its own `Effector.step`.

        z = [joint positions and velocities, muscle states]    u = the drive of each muscle

    All of the muscles' states count (those of one kind, of all muscles, side by side), since forces are those of the
    geometry one step ago; the geometry itself and the hand's position follow from the joints. Loads are zero. The
    effector clips drives to [0, 1] and joints to their bounds, and derivatives are zero there.

    Args:
        effector: such as motornet.effector.RigidTendonArm26(motornet.muscle.ReluMuscle()). It is copied.
        observe: (plant, z [trial, state], x_t [trial, input]) -> what the policy sees [trial, entry]. When None, that
            of motornet.environment.Environment without delays: x_t (the goal), the hand's position, and each muscle's
            length and velocity over its optimal length and highest velocity.

    Attributes:
        dt: the length of a step, in seconds.
        state_size, control_size, state_names: of z and u.

    Raises:
        TypeError: no effector.
        ValueError: (`start`) joints of another width.
    Source: Codol, Michaels, Kashefi, Pruszynski, Gribble, "MotorNet, a Python toolbox for controlling differentiable
        biomechanical effectors with artificial neural networks", eLife 12:RP88591 (2024).

    >>> import motornet as mn  # doctest: +SKIP
    >>> plant = MotorNetPlant(mn.effector.RigidTendonArm26(mn.muscle.ReluMuscle()))  # doctest: +SKIP
    >>> policy = mn.policy.PolicyGRU(16, 32, plant.control_size, device="cpu")  # doctest: +SKIP
    >>> loop = ClosedLoop(plant, MotorNetPolicy(policy)).double()  # doctest: +SKIP
    >>> z0 = torch.cat([plant.start(joints), torch.zeros(len(joints), 32)], -1)  # doctest: +SKIP
    >>> problem = kp.DiscreteProblem(loop, goals.double(), z0.double())  # doctest: +SKIP
    """

    def __init__(self, effector: Any, observe: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        wanted = ("skeleton", "muscle", "get_geometry", "step", "states")
        if not isinstance(effector, nn.Module) or not all(hasattr(effector, name) for name in wanted):
            raise TypeError(f"effector is {type_name(effector)}, expected one of motornet.effector")
        self.effector: Any = _without_states(effector)
        self._seen, self.dt, self.control_size = observe, float(self.effector.dt), int(self.effector.n_muscles)
        self._joints, self._rows = int(self.effector.state_dim), int(self.effector.muscle.state_dim)
        self.state_size = self._joints + self._rows * self.control_size
        self.state_names = _names(effector, self._joints)

    def step(self, z: Tensor, u: Tensor) -> Tensor:
        """The state [trial, state] after a step from z [trial, state] under the drives u [trial, muscle]."""
        effector = self.effector
        kept = effector.states
        effector.states = self._states(z)
        try:
            effector.step(u)
            found = effector.states
        finally:
            effector.states = kept
        return torch.cat([found["joint"], found["muscle"].flatten(1)], -1)

    def observe(self, z: Tensor, x_t: Tensor) -> Tensor:
        """What the policy sees [trial, entry]."""
        if self._seen is not None:
            return self._seen(self, z, x_t)
        muscle = self._states(z)["muscle"]
        length, velocity = (
            muscle[:, 1] / self.effector.muscle.l0_ce[:, 0],
            muscle[:, 2] / self.effector.muscle.vmax[:, 0],
        )
        return torch.cat([x_t, self.hand(z), length, velocity], -1)

    def hand(self, z: Tensor) -> Tensor:
        """Where the end of the arm is [trial, space], in metres."""
        return self.effector.joint2cartesian(z[:, : self._joints]).chunk(2, dim=-1)[0]

    def start(self, joints: Tensor) -> Tensor:
        """z [trial, state] of joint positions, or positions and velocities, [trial, entry], with muscles at rest."""
        if joints.ndim != 2 or joints.shape[1] not in (self._joints, self._joints // 2):
            raise ValueError(
                f"joints are {tuple(joints.shape)}, expected [trial, {self._joints // 2}] positions, or positions and "
                f"velocities [trial, {self._joints}]"
            )
        joints = torch.cat([joints, torch.zeros_like(joints)], -1) if joints.shape[1] < self._joints else joints
        muscle = self.effector.muscle.get_initial_muscle_state(len(joints), self.effector.get_geometry(joints))
        return torch.cat([joints, muscle.to(joints).flatten(1)], -1)

    def _states(self, z: Tensor) -> dict[str, Tensor]:
        joint, muscle = z[:, : self._joints], z[:, self._joints :]
        geometry = self.effector.get_geometry(joint)
        return {"joint": joint, "muscle": muscle.reshape(-1, self._rows, self.control_size), "geometry": geometry}


class MotorNetPolicy(nn.Module):
    """A policy of MotorNet, policy(observation, h) -> (control, h), as `ClosedLoop` calls one.

        memory, u = policy(memory, observation)    memory = h of all layers side by side

    Args:
        policy: such as motornet.policy.PolicyGRU, whose h is [layer, trial, unit] with `n_layers` layers (one where it
            does not say). It is used as it is, not copied.

    Raises:
        TypeError: no torch module.
    Source as `MotorNetPlant`.

    >>> class Policy(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gru, self.fc = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 2)
    ...     def forward(self, x, h):
    ...         y, h = self.gru(x[:, None], h)
    ...         return torch.sigmoid(self.fc(y))[:, 0], h
    >>> memory, control = MotorNetPolicy(Policy())(torch.zeros(3, 8), torch.zeros(3, 4))
    >>> memory.shape, control.shape
    (torch.Size([3, 8]), torch.Size([3, 2]))
    """

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        if not isinstance(policy, nn.Module):
            raise TypeError(f"policy is {type_name(policy)}, expected a torch module such as motornet's PolicyGRU")
        self.policy, self._layers = policy, int(getattr(policy, "n_layers", 1))

    def forward(self, memory: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The next memory [trial, layer unit] and the control."""
        h = memory.reshape(len(memory), self._layers, -1).transpose(0, 1).contiguous()
        u, h = self.policy(seen, h)
        return h.transpose(0, 1).reshape(memory.shape), u


def _without_states(effector: Any) -> Any:
    """A copy without what it did last, whose graph cannot be copied."""
    kept, effector.states = effector.states, dict.fromkeys(effector.states)
    try:
        return copy.deepcopy(effector)
    finally:
        effector.states = kept


def _names(effector: Any, joints: int) -> tuple[str, ...]:
    places = [f"joint{i}" for i in range(joints // 2)]
    muscles: Sequence[str] = list(effector.muscle_name)
    kinds = [str(name).replace(" ", "_") for name in effector.muscle.state_name]
    return (*places, *(f"{place}_velocity" for place in places), *(f"{m}_{kind}" for kind in kinds for m in muscles))
