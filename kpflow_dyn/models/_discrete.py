"""A plant that moves in steps, z <- step(z, u), under a policy: the equations, in torch and JAX."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from kpflow_dyn._arrays import Array, array_namespace
from kpflow_dyn._shown import type_name
from kpflow_dyn.models._equations import checked_control, join, of_cell

Function = Callable[..., Any]


def is_discrete(plant: Any) -> bool:
    """Whether a plant gives its next state, not its velocity."""
    return hasattr(plant, "step") and not isinstance(plant, type)


def discrete_loop(plant: Any, policy: Any, readout: Any, framework: str) -> Any:
    """The cell (x_t, z) -> z of a plant and a policy."""
    if not isinstance(getattr(plant, "state_size", None), int):
        raise TypeError(
            f"the plant, a {type(plant).__name__}, has a step but no state_size: give it the number of entries of "
            "its state"
        )
    return import_module(f"kpflow_dyn.models._{framework}_discrete").DiscreteLoop(plant, policy, readout)


def advance(plant: Any, policy: Function, readout: Function | None, z: Array, x_t: Array) -> Array:
    """The state [plant, memory] after a step."""
    return array_namespace(z).concat(parts_after(plant, policy, readout, z, x_t)[:-1], axis=-1)


def parts_after(plant: Any, policy: Function, readout: Function | None, z: Array, x_t: Array) -> list[Array]:
    """The plant behind a step, the policy's memory if it has one, and the control that acted."""
    memory, u = control_of(plant, policy, readout, z, x_t)
    after = plant.step(z[..., : plant.state_size], checked_control(plant, u, z))
    return [after, u] if memory is None else [after, memory, u]


def control_of(
    plant: Any, policy: Function, readout: Function | None, z: Array, x_t: Array
) -> tuple[Array | None, Array]:
    """The policy's memory behind a step, if it has one, and the control that acts during the step."""
    now, memory = z[..., : plant.state_size], z[..., plant.state_size :]
    seen = plant.observe(now, x_t) if hasattr(plant, "observe") else join(now, x_t)
    if not memory.shape[-1]:
        if readout is not None:
            raise ValueError(_no_memory(plant, z))
        return None, policy(seen)
    found = policy(memory, seen) if readout is None else of_cell(policy, readout, memory, seen)
    if not isinstance(found, tuple) or len(found) != 2 or tuple(found[0].shape) != tuple(memory.shape):
        got = [tuple(part.shape) for part in found] if isinstance(found, tuple) else type_name(found)
        raise ValueError(
            f"the policy gave {got}, expected (memory, control) with a memory {tuple(memory.shape)}: z has "
            f"{z.shape[-1]} entries, {plant.state_size} of the plant and {memory.shape[-1]} of the policy's memory"
        )
    return found


def _no_memory(plant: Any, z: Array) -> str:
    return (
        f"z has {z.shape[-1]} entries, the {plant.state_size} of the plant's state and none of the policy's memory; "
        "give z0 = [plant's state, memory], such as zeros behind the plant's start"
    )
