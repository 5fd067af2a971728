"""JAX in this process; see `kpflow_dyn._backend.Runtime`."""

from typing import Any

import jax
import numpy as np

PACKAGES = ("jax", "equinox", "diffrax")


def limit_threads(count: int) -> bool:
    """XLA takes its threads when it starts, and cannot be told later."""
    return False


def allow_double() -> None:
    """Let arrays be float64."""
    jax.config.update("jax_enable_x64", True)


def devices() -> list[str]:
    """What can be computed on."""
    return [str(device) for device in _devices()]


def settings() -> dict[str, str]:
    """How JAX computes, in words."""
    double, products = jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return {
        "default precision": "float64" if double else "float32 (jax_enable_x64 is off)",
        "float32 products": str(products or "as the device likes"),
    }


def example(device: str, dtype: str) -> tuple[Any, jax.Array, jax.Array]:
    """A small cell, inputs [trial, time, input] and a start [trial, unit], on a device."""
    rng, place = np.random.default_rng(0), next(other for other in _devices() if str(other) == device)
    shapes = ((8, 3), (8, 8), (8,), (4, 6, 3), (4, 8))
    *weights, x, start = (jax.device_put(rng.normal(0, 0.3, shape).astype(dtype), place) for shape in shapes)
    return jax.tree_util.Partial(_step, *weights), x, start


def _step(U: jax.Array, W: jax.Array, b: jax.Array, u: jax.Array, z: jax.Array) -> jax.Array:
    return jax.numpy.tanh(U @ u + W @ z + b)


def _devices() -> list[Any]:
    own = jax.devices()
    return own if own[0].platform == "cpu" else [*jax.devices("cpu"), *own]
