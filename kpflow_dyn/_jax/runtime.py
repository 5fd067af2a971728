"""JAX in this process; see `kpflow_dyn._backend.Runtime`."""

import jax

PACKAGES = ("jax", "equinox", "diffrax")


def limit_threads(count: int) -> bool:
    """XLA takes its threads when it starts, and cannot be told later."""
    return False


def allow_double() -> None:
    """Let arrays be float64."""
    jax.config.update("jax_enable_x64", True)
