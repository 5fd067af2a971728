"""Torch as a backend; see `kpflow_dyn._backend`. Each part is imported when it is first asked for."""

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


class TorchBackend:
    """Torch, part by part."""

    name = "torch"
    packages = ("torch", "torchdiffeq")

    @cached_property
    def data(self) -> Data:
        from kpflow_dyn._torch import data

        return data

    @cached_property
    def models(self) -> Models:
        from kpflow_dyn._torch import models

        return models

    @cached_property
    def solving(self) -> Solving:
        from kpflow_dyn._torch import solving

        return solving

    @cached_property
    def tracing(self) -> Tracing:
        from kpflow_dyn._torch import tracing

        return tracing

    @cached_property
    def dynamics(self) -> Dynamics:
        from kpflow_dyn._torch import dynamics

        return dynamics

    @cached_property
    def objectives(self) -> Objectives:
        from kpflow_dyn._torch import objectives

        return objectives

    @cached_property
    def training(self) -> Training:
        from kpflow_dyn._torch import training

        return training

    @cached_property
    def transforms(self) -> Transforms:
        from kpflow_dyn._torch.rows import TORCH

        return TORCH

    def limit_threads(self, count: int) -> bool:
        import torch

        torch.set_num_threads(count)
        return True

    def allow_double(self) -> None:
        """Nothing is to be done."""

    def __reduce__(self) -> tuple:
        return backend_named, (self.name,)


BACKEND = TorchBackend()
