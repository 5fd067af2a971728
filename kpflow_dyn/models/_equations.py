"""The equations of fields and cells, written once for torch and JAX, and the checks that both share."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace
from kpflow_dyn._shown import type_name
from kpflow_dyn.tasks._data import check_at_least

Function = Callable[[Array], Array]


def mlp(layers: Iterable[Function], phi: Function, z: Array, x_t: Array | None) -> Array:
    """layer_out phi(... phi(layer_1 [z, x_t]))."""
    *hidden, last = layers
    v = join(z, x_t)
    for layer in hidden:
        v = phi(layer(v))
    return last(v)


def ctrnn(W: Array, U: Array | None, b: Array, tau: Array, phi: Function, z: Array, x_t: Array | None) -> Array:
    """(-z + W phi(z) + U x_t + b) / tau."""
    return (phi(z) @ W.T + b + drive(U, x_t) - z) / tau


def leaky_step(h: Array, x: Array, recurrent: Array, U: Array, b: Array, leak: Any) -> Array:
    """(1 - a) h + a (recurrent + U x + b) with the leak a."""
    return h + leak * (recurrent + x @ U.T + b - h)


def low_rank(m: Array, n: Array, rates: Array) -> Array:
    """m n^T rates / units, without m n^T."""
    return (rates @ n) @ m.T / m.shape[0]


def drive(U: Array | None, x_t: Array | None) -> Array | float:
    """U x_t, or 0 where there is no input."""
    return 0.0 if U is None or x_t is None else x_t @ U.T


def closed_loop(plant: Callable[[Array, Array], Array], policy: Function, z: Array, x_t: Array | None) -> Array:
    """plant(z, u) with u = policy(z), or u = policy([z, x_t]) where there is a reference."""
    return plant(z, checked_control(plant, policy(join(z, x_t)), z))


def beside_control(
    plant: Callable[[Array, Array], Array], policy: Function, units: int, s: Array, x_t: Array | None
) -> Array:
    """[plant(z, u), u] of states [z, integral of u], z being the first units."""
    z = s[..., :units]
    u = checked_control(plant, policy(join(z, x_t)), z)
    return array_namespace(s, u).concat([plant(z, u), u], axis=-1)


def checked_control(plant: Any, u: Any, z: Array) -> Array:
    """The control, if it is as wide as the plant wants it."""
    size, got = getattr(plant, "control_size", None), tuple(u.shape) if hasattr(u, "shape") else type_name(u)
    if size is None and (isinstance(got, str) or got == tuple(z.shape[:-1])):
        shape = ", ".join([*map(str, z.shape[:-1]), "control"])
        raise ValueError(
            f"the policy returned {got}, expected a control u [{shape}]; a single control has this axis too"
        )
    if size is not None and got != (*z.shape[:-1], size):
        raise ValueError(
            f"the policy returned {got}, expected a control of the shape {(*z.shape[:-1], size)} for "
            f"{type(plant).__name__}; give its last layer {size} outputs"
        )
    return u


def is_lstm(cell: Any) -> bool:
    """Whether a cell of torch or equinox is called on (h, c)."""
    return any(base.__name__ == "LSTMCell" for base in type(cell).__mro__)


def of_cell(cell: Any, readout: Function, memory: Array, seen: Array) -> tuple[Array, Array]:
    """The memory behind a step of a cell, and what is read of its h; c of an LSTM stands behind h."""
    if not is_lstm(cell):
        memory = cell(seen, memory)
        return memory, readout(memory)
    half = memory.shape[-1] // 2
    h, c = cell(seen, (memory[..., :half], memory[..., half:]))
    return array_namespace(h).concat([h, c], axis=-1), readout(h)


def join(z: Array, x_t: Array | None) -> Array:
    """[z, x_t] on the last axis, or z where there is no input."""
    return z if x_t is None else array_namespace(z, x_t).concat([z, x_t], axis=-1)


def check_widths(units: int, inputs: int, z: Array, x_t: Array | None) -> None:
    """Raise ValueError unless z has `units` entries and x_t has `inputs`, or is None where there are none."""
    shape, width = tuple(z.shape), 0 if x_t is None else x_t.shape[-1]
    if shape[-1:] != (units,):
        raise ValueError(f"z has the shape {shape}, expected a last axis of {units} units; change z0 or the field")
    if width != inputs:
        hint = f"give the problem such an x, or make the field with inputs={width}"
        raise ValueError(f"the input x_t has {width} entries, expected {inputs}; {hint}")


def check_sizes(inputs: int, **sizes: int) -> None:
    """Raise ValueError unless every size is at least 1 and inputs at least 0."""
    check_at_least("inputs", inputs, 0)
    for name, size in sizes.items():
        check_at_least(name, size, 1)


def check_leak(alpha: float, learn_alpha: bool) -> None:
    """Raise ValueError unless alpha is a leak that a cell may have, or start from."""
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha = dt / tau must satisfy 0 < alpha <= 1, got {alpha}; take a smaller dt")
    if learn_alpha and alpha == 1:
        raise ValueError("a learnt alpha is a sigmoid and cannot start at 1; take alpha < 1, or learn_alpha=False")


def check_rank(rank: int, hidden_size: int) -> None:
    """Raise ValueError unless a weight of so many units can have this rank."""
    if not 1 <= rank <= hidden_size:
        raise ValueError(f"rank must be between 1 and hidden_size = {hidden_size}, got {rank}")


def choose(nonlinearity: str, known: dict[str, Any]) -> Any:
    """The function of that name, or a ValueError that lists the names."""
    if nonlinearity not in known:
        raise ValueError(f"nonlinearity must be one of {sorted(known)}, got {nonlinearity!r}")
    return known[nonlinearity]


def time_constants(tau: Any, units: int) -> np.ndarray:
    """tau in float64, [] or [units], checked to be positive."""
    values = np.array(tau, dtype=np.float64)
    if values.shape not in ((), (units,)):
        raise ValueError(f"tau has the shape {values.shape}, expected one number or one for each of {units} units")
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"tau must be finite and > 0, got {values.min()}; give times in the unit of t")
    return values
