"""Models whose state flows and jumps, in the framework of their parameters."""

from importlib import import_module
from typing import Any

from kpflow_dyn._backend import backend_of
from kpflow_dyn._problems.checks import refuse_foreign_event
from kpflow_dyn._problems.events import LOOKS, is_hybrid, refuse_jumps
from kpflow_dyn._problems.translations import refuse_unknown
from kpflow_dyn._shown import type_name
from kpflow_dyn.models._discrete import is_discrete
from kpflow_dyn.models._events import Event
from kpflow_dyn.tasks._data import check_at_least

MAX_EVENTS = 1000  # in a trial


def Hybrid(flow: Any, *events: Any, max_events: int | None = None, looks: int | None = None, **unknown: Any) -> Any:
    """A model in continuous time with jumps: z' = flow(t, z), and z <- reset(t, z) at events.

    It is posed and solved like any field, `kp.solve(kp.ODEProblem(hybrid, z0, t, x), alg)`, by any Runge-Kutta method.
    `linearize` includes the derivatives of the times of its events. For a step that ends at an event these give the
    saltation matrix

        Xi = D_z g + (f_after - D_z g f_before - D_t g) D_z c / (D_z c f_before + D_t c)

    with the condition c and the reset g. Steps end at events and at all times of the grid. At the time of a jump the
    solution has the state after the jump; `solution.events` lists all events. If events have a condition, each trial is
    solved by itself, with its own times. Jumps at given times are the same for all trials.

    The state may have any form that `ODEProblem` knows: several arrays, complex numbers, second order, with args. Time
    may run backward. A solve then meets the events from the other side, and applies their resets as they are. To go
    back along a solution, give the inverse resets. On a span (t0, t1) the solution has states at three Gauss points
    between any two neighbouring times at which the trial with the most steps ends a step, or any trial has an event.

    Args:
        flow: the field between jumps, as `ODEProblem` takes it; an ODETerm or MultiTerm of diffrax is allowed. Or a
            model that has events: another hybrid model, or a sampled `ClosedLoop`. The result is then one model, in
            which its events come before the added ones.
        events: the jumps, one by one or in lists. If several are at one given time, they happen in this order. If a
            jump takes the state across the surface of another event, that event happens at once. Around a sampled loop,
            conditions and resets get and give the plant's state alone; memory and controls stay.
        max_events: how many events may happen in a trial, without those at given times. More are an error, for example
            of a ball that comes to rest. None is 1000, or the number that the flow has set.
        looks: the number of points of each step at which conditions are looked at first, 4 or more; 8 when None. They
            are also looked at between these points. If a condition is not where a cubic through its neighbours says,
            and is near enough to zero, twice as many points are used, up to 64 times. If none of this shows a crossing
            and its return between two points, such as for a short pulse of an input, they are missed. More looks, or
            shorter steps, find them.

    Returns:
        A torch nn.Module or an equinox module, called as flow is. The names of its parameters begin with "flow." and
        "events.0.condition.", "events.0.reset." and so on. In JAX, where entries of a list have other names, they begin
        with "events[0].condition.". Around a sampled loop the result is also a sampled loop, with `loop.start`,
        `loop.sampling` and the names of the loop: "policy.", and "plant_events.0.reset." for the first added event.

    Raises:
        TypeError: a part that is not callable, no event, an unknown name, or no part that is a module of torch or a
            pytree with arrays of JAX.
        ValueError: a part contains a hybrid model, whose events would be lost; or the flow is in discrete time.
            `kp.solve` refuses all that has no derivative: a trial that begins on a surface and leaves it in the
            direction of the event (against it is fine); a trial that touches a surface without crossing it; two events
            at one time of which one moves the other's condition; endless events; a surface that a trial slides along;
            and conditions or flows that jump there.
    Source: Goebel, Sanfelice, Teel, "Hybrid Dynamical Systems" (2012); the saltation matrix: arXiv:2306.06862.

    A ball that loses a learnt part of its speed at each bounce:

    >>> import torch, kpflow_dyn as kp
    >>> class Bounce(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.restitution = torch.nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
    ...     def forward(self, t, z):
    ...         return torch.stack([z[:, 0], -self.restitution * z[:, 1]], -1)
    >>> def fall(t, z):
    ...     return torch.stack([z[:, 1], torch.full_like(z[:, 1], -9.81)], -1)
    >>> ground = kp.models.Event(lambda t, z: z[:, 0], Bounce(), direction=-1)
    >>> start = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    >>> solution = kp.solve(kp.ODEProblem(kp.models.Hybrid(fall, ground), start, [0.0, 0.5, 1.0]))
    >>> [(round(time, 3), event) for time, event in solution.events[0]]
    [(0.452, 0)]
    >>> kp.linearize(solution).parameters
    {'events.0.reset.restitution': tensor(0.8000, dtype=torch.float64)}
    """
    refuse_unknown(unknown, ("max_events", "looks"), "Hybrid", "Hybrid")
    given = _checked([event for part in events for event in (part if isinstance(part, list | tuple) else [part])])
    parts = [part for event in given for part in (event.condition, event.reset)]
    backend = backend_of(flow, *parts)
    flow = flow if backend is None else backend.models.field_of(flow)
    if isinstance(flow, type) or not callable(flow):
        got = f"the class {flow.__name__}" if isinstance(flow, type) else type_name(flow)
        raise TypeError(f"flow is {got}, expected a field flow(t, z) -> z', such as kp.models.MLPField(2, 8)")
    if backend is None:
        raise TypeError(
            "no part of the hybrid model has parameters: flow, conditions and resets are plain functions; make one of "
            "them a torch nn.Module, or a pytree with arrays of JAX such as an equinox module. Events of a plant are "
            "given to the loop around it, Hybrid(ClosedLoop(plant, policy), event)"
        )
    if max_events is not None:
        check_at_least("max_events", max_events, 1)
    if looks is not None and (not isinstance(looks, int) or looks < 4):
        raise ValueError(f"looks is {looks!r}, expected 4 or more points of a step")
    for part in parts:
        refuse_jumps(part, "a condition or reset is, or has inside,", "give the events one by one")
    refuse_jumps(flow, "the flow is", "")
    if is_discrete(getattr(flow, "plant", None)):
        raise ValueError("the flow is the loop of a plant in discrete time, whose step may have jumps of its own")
    if not is_hybrid(flow):
        return hybrids_of(backend.name).Hybrid(flow, given, max_events or MAX_EVENTS, looks or LOOKS)
    add: Any = getattr(flow, "with_events", None)
    if add is None:
        raise TypeError(f"the flow is a {type_name(flow)}, which has events of its own; add these to them there")
    return add(given, max_events, looks)


def _checked(events: list[Any]) -> list[Event]:
    for event in events:
        refuse_foreign_event(event)
    if not events or not all(isinstance(event, Event) for event in events):
        got = ", ".join(type_name(event) for event in events) or "none"
        raise TypeError(f"events are {got}, expected kp.models.Event(condition, reset) or Event(reset=..., every=dt)")
    return events


def hybrids_of(framework: str) -> Any:
    """The module with a framework's hybrid models."""
    return import_module(f"kpflow_dyn.models._{framework}_hybrid")
