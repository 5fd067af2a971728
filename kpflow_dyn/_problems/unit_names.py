"""What the entries of a state are called, where the model tells."""

from typing import Any


def with_memory(names: tuple[str, ...], memory: int) -> tuple[str, ...]:
    """The names of the entries of a plant's state, and of a memory behind it."""
    return (*names, *(f"memory[{i}]" for i in range(memory))) if names else ()


def names_of_state(problem: Any, width: int) -> tuple[str, ...]:
    """What the entries [unit] of a solution's state are called, () where the plant does not tell, or there is none.

    The plant's, then memory[i] of the policy, held[i] of a sampled loop and waiting[i], the oldest control first. Where
    a step also begins with earlier states, these have their place behind the name: angle[-1].
    """
    model: Any = getattr(problem, "cell", getattr(problem, "f", None))
    plant = getattr(getattr(model, "flow", model), "plant", None)
    names = tuple(getattr(plant, "state_names", ()))
    if names and hasattr(model, "sampling"):
        sizes = model.sampling
        more = {"memory": sizes.memory, "held": sizes.control, "waiting": sizes.control * sizes.waiting}
        names += tuple(f"{name}[{i}]" for name, count in more.items() for i in range(count))
    elif hasattr(plant, "step"):
        names = with_memory(names, width - len(names))
    earlier = width // len(names) if names else 1
    found = (*names, *(f"{name}[{-k}]" for k in range(1, earlier) for name in names))
    return found if len(found) == width else ()
