"""Hybrid models as torch modules; see `kpflow_dyn.models.Hybrid` and `ClosedLoop`."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from kpflow_dyn._problems.events import LOOKS
from kpflow_dyn.models._events import Event
from kpflow_dyn.models._hybrid import MAX_EVENTS
from kpflow_dyn.models._sampling import Sampling
from kpflow_dyn.models._torch_models import with_buffers


class _Event(nn.Module):
    """An event whose condition and reset are modules of this one, where they are modules."""

    def __init__(self, event: Event) -> None:
        super().__init__()
        self.condition, self.reset, self.direction, self.times = (
            event.condition,
            event.reset,
            event.direction,
            event.times,
        )


def _as_module(event: Any) -> _Event:
    return event if isinstance(event, _Event) else _Event(event)


class Hybrid(nn.Module):
    """What `kpflow_dyn.models.Hybrid` returns where a part is torch's."""

    def __init__(self, flow: Callable[..., Tensor], events: Sequence[Any], max_events: int, looks: int) -> None:
        super().__init__()
        self.flow, self.events = flow, nn.ModuleList(map(_as_module, events))
        self.max_events, self.looks = max_events, looks

    def with_events(self, events: Sequence[Event], max_events: int | None, looks: int | None) -> "Hybrid":
        """The same model with more events behind its own."""
        return Hybrid(self.flow, [*self.events, *events], max_events or self.max_events, looks or self.looks)

    def forward(self, t: Tensor, z: Tensor, *given: Any) -> Any:
        """z' [trial, unit], by a flow of t, z, and of what else it takes."""
        return self.flow(t, z, *given)


class SampledLoop(nn.Module):
    """What `kpflow_dyn.models.ClosedLoop(..., every=dt)` returns for a torch policy."""

    def __init__(self, plant: Any, policy: nn.Module, readout: Any, sampling: Sampling) -> None:
        super().__init__()
        self.plant = with_buffers(plant) if isinstance(plant, nn.Module) else plant
        self.policy, self.readout, self.sampling = policy, readout, sampling
        self.plant_events, self.max_events, self.looks = nn.ModuleList(), MAX_EVENTS, LOOKS

    @property
    def events(self) -> tuple[Any, ...]:
        """The samples, when their controls act where that is at no sample, and the events of the plant."""
        return self.sampling.events(self.policy, self.readout, self.plant_events)

    def with_events(self, events: Sequence[Event], max_events: int | None, looks: int | None) -> "SampledLoop":
        """The same loop with more events of the plant."""
        loop = SampledLoop(self.plant, self.policy, self.readout, self.sampling)
        loop.plant_events = nn.ModuleList([*self.plant_events, *map(_as_module, events)])
        loop.max_events, loop.looks = max_events or self.max_events, looks or self.looks
        return loop

    def forward(self, t: Tensor, z: Tensor, x_t: Tensor | None = None) -> Tensor:
        """z' [trial, unit]: the plant's under the held control, and zeros."""
        return self.sampling.flow(self.plant, z)

    def start(self, z0: Tensor, memory: Tensor | None = None, control: Tensor | None = None) -> Tensor:
        """The state [trial, unit] of plants in z0 [trial, state]; memory and control are zeros where None."""
        return self.sampling.start(z0, memory, control)

    def extra_repr(self) -> str:
        """The plant, where it is not a module and so printed anyway, and the sampling."""
        return f"plant={self.plant}, {self.sampling}" if not isinstance(self.plant, nn.Module) else str(self.sampling)
