"""How XLA compiles sooner what runs once, or on few numbers."""

from functools import cache
from typing import Any

import jax

SOONER = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


@cache
def sooner() -> dict[str, Any]:
    """The options with which XLA compiles a large program on a CPU ten times sooner, to a slower one."""
    if jax.default_backend() != "cpu":
        return {}
    return SOONER if _are_known(SOONER) else {k: value for k, value in SOONER.items() if _are_known({k: value})}


def _are_known(options: dict[str, Any]) -> bool:
    """Whether this version of XLA has them."""
    try:
        jax.jit(lambda x: x, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:
        return False
    return True
