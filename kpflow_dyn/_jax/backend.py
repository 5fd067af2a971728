"""JAX as a backend; see `kpflow_dyn._backend`. Each part is imported when it is first asked for."""

from __future__ import annotations

from functools import cached_property

from kpflow_dyn._backend import (
    Data,
    Dynamics,
    Models,
    Objectives,
    Solving,
    Tracing,
    Training,
    Transforms,
    backend_named,
)


class JaxBackend:
    """JAX, part by part."""

    name = "jax"
    packages = ("jax", "equinox", "diffrax")

    @cached_property
    def data(self) -> Data:
        from kpflow_dyn._jax import data

        return data

    @cached_property
    def models(self) -> Models:
        from kpflow_dyn._jax import models

        return models

    @cached_property
    def solving(self) -> Solving:
        from kpflow_dyn._jax import solving

        return solving

    @cached_property
    def tracing(self) -> Tracing:
        from kpflow_dyn._jax import tracing

        return tracing

    @cached_property
    def dynamics(self) -> Dynamics:
        from kpflow_dyn._jax import dynamics

        return dynamics

    @cached_property
    def objectives(self) -> Objectives:
        from kpflow_dyn._jax import objectives

        return objectives

    @cached_property
    def training(self) -> Training:
        from kpflow_dyn._jax import training

        return training

    @cached_property
    def transforms(self) -> Transforms:
        from kpflow_dyn._jax.rows import JAX

        return JAX

    def limit_threads(self, count: int) -> bool:
        return False

    def allow_double(self) -> None:
        import jax

        jax.config.update("jax_enable_x64", True)

    def __reduce__(self) -> tuple:
        return backend_named, (self.name,)


BACKEND = JaxBackend()
