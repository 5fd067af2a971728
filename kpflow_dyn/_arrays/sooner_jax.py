"""How XLA compiles sooner what runs once, or on few numbers."""

from collections.abc import Callable
from functools import cache
from typing import Any

import equinox as eqx
import jax

SOONER = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
SOON = SOONER | {"xla_backend_optimization_level": 1}
FEW = 2**14


def sooner() -> dict[str, Any]:
    """The options with which XLA compiles a large program on a CPU ten times sooner, to a slower one."""
    return _known(SOONER)


def soon(numbers: int) -> dict[str, Any]:
    """Those of a program that runs often on states of so many numbers: with few it is about as fast as others."""
    return _known(SOON) if numbers <= FEW else {}


def jit(function: Callable[..., Any], options: dict[str, Any], **static: Any) -> Callable[..., Any]:
    """`jax.jit` with these options, where it is no part of another program."""
    return _or_within(jax.jit(function, compiler_options=options, **static), jax.jit(function, **static))


@cache
def filter_jit(function: Callable[..., Any], few: bool) -> Callable[..., Any]:
    """`equinox.filter_jit`, where there are few numbers with their options."""
    jitted: Any = eqx.filter_jit  # which passes on what jax.jit takes
    return _or_within(jitted(function, compiler_options=soon(0)), jitted(function)) if few else jitted(function)


def _or_within(outermost: Callable[..., Any], part: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        try:
            return outermost(*args)
        except ValueError as error:
            if "compiler_options" not in str(error):  # so JAX refuses options of a part
                raise
            return part(*args)

    return call


def _known(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _names()}


@cache
def _names() -> list[str]:
    """The names of those options that this version of XLA has, on a CPU."""
    if jax.default_backend() != "cpu":
        return []
    return list(SOONER) if _are_known(SOONER) else [k for k, value in SOONER.items() if _are_known({k: value})]


def _are_known(options: dict[str, Any]) -> bool:
    try:
        jax.jit(lambda x: x, compiler_options=options)(0.0)
    except jax.errors.JaxRuntimeError:
        return False
    return True
