"""A plant steered by a learnt policy, in the framework of the policy."""

import inspect
from importlib import import_module
from typing import Any

import numpy as np

from kpflow_dyn._backend import backend_of
from kpflow_dyn._problems.events import refuse_jumps
from kpflow_dyn._problems.translations import refuse_unknown
from kpflow_dyn._shown import type_name
from kpflow_dyn.models._discrete import discrete_loop, is_discrete
from kpflow_dyn.models._hybrid import hybrids_of
from kpflow_dyn.models._memories import is_recurrent, memory_of
from kpflow_dyn.models._sampling import Sampling


def ClosedLoop(
    plant: Any,
    policy: Any,
    *,
    every: float | None = None,
    readout: Any = None,
    memory: int | None = None,
    delay: float = 0.0,
    saturation: Any = None,
    rate_limit: float | None = None,
    state_size: int | None = None,
    control_size: int | None = None,
    **unknown: Any,
) -> Any:
    """The loop of a plant z' = plant(z, u) and a policy u = policy(z), or u = policy([z, x_t]). The policy learns.

    Only the policy (and its readout) learns. The plant is copied as it is now: its parameters become buffers in torch,
    and constants in JAX.

    Without `every` the control acts at every instant, and the loop is a field. With `every = dt` it is sampled: at t0 +
    k dt the policy sees the plant and x_t, and its control is held until the next sample (zero-order hold). The loop is
    then a hybrid model, as `Hybrid` makes. Its state is [plant, memory, held control, controls that wait];
    `loop.sampling` has their sizes. An `ODEProblem` takes as z0 the plant's state alone (all the rest is then zero), or
    the result of `loop.start(z0, memory, control)`. Noise of the measurements, references and similar signals are
    inputs x, with samples at the sampling times. Samples at t0 and at the last time are taken, too. Events of the
    plant, such as contacts, go around the loop: `Hybrid(loop, Event(condition, reset))`, of the plant's state alone.

    A plant in discrete time, such as `MJXPlant`, has a step(z, u) -> z and a `state_size`. The loop is then the cell of
    a `DiscreteProblem`, z_t = [plant.step(z_{t-1}, u), memory]. Its state is [plant, memory of the policy], as wide as
    z0. The policy is u = policy([z, x_t]), policy(memory, [z, x_t]) -> (memory, u), or a cell with its readout. If the
    plant has observe(z, x_t), the policy sees its result in the place of [z, x_t]. If there is no x_t, x of the problem
    has the width 0.

    Args:
        plant: any callable (z, u) -> z', such as those of `kpflow_dyn.models`, or an object with a step(z, u) -> z.
        policy: a torch nn.Module on [trial, state + reference] -> [trial, control]; or a callable JAX pytree with array
            leaves, such as an equinox module, for one trial, without the trial axis. If sampled, or in discrete time,
            it may have a memory. It is then a cell such as nn.GRUCell or eqx.nn.LSTMCell, called as cell(observation,
            memory), with its `readout`. Or it is policy(memory, observation) -> (memory, control); give `memory` if it
            is sampled.
        every: the time between samples, in the unit of t.
        readout: for a cell, a map from its h to the control. (In an LSTM's memory c stands after h.)
        memory: the number of values in the memory of a sampled policy that is not a cell of torch or equinox.
        delay: how long after its sample a control acts, in the unit of t: 1.5 * every for one sample and a half. A
            measurement that is late by tau, with a control that acts at once, is delay=tau too. Times are then counted
            from the measurements, and the policy gets x_t together with z(t). See the guide.
        saturation: (low, high) to clip the policy's control, a number s for (-s, s), or a function of the control such
            as torch.tanh.
        rate_limit: the largest change of the control per unit of t, from sample to sample.
        state_size, control_size: the widths of z and u, if a sampled plant does not say them.

    Returns:
        A torch nn.Module or an equinox module, called as f(t, z) or f(t, z, x_t) on z [trial, state] and the reference
        x_t [trial, reference], or in discrete time as cell(x_t, z). Its parameters are the policy's, and their names
        begin with "policy." (and "readout.").

    Raises:
        TypeError: the plant is not callable and has no step, or has a step but no `state_size`; the policy is neither
            kind of module, or is not called as its options say; or unknown names.
        ValueError: options of sampling without `every`, or that do not fit; a plant or policy that is a hybrid model.
            When called: the policy's output does not have the width of the plant's `control_size`, or its memory does
            not have the width in z.
    Source: Astrom, Murray, Feedback Systems (2008), on state feedback; Astrom, Wittenmark, Computer-Controlled Systems
        (1997), on sampled plants.

    >>> import torch
    >>> import kpflow_dyn as kp
    >>> from kpflow_dyn.models import CartPole
    >>> loop = ClosedLoop(CartPole(), torch.nn.Linear(4 + 1, 1))
    >>> loop(torch.tensor(0.0), torch.zeros(3, 4), torch.ones(3, 1)).shape
    torch.Size([3, 4])
    >>> loop = ClosedLoop(CartPole(), torch.nn.GRUCell(4, 8), readout=torch.nn.Linear(8, 1), every=0.1, delay=0.15)
    >>> kp.solve(kp.ODEProblem(loop, torch.ones(3, 4), [0.0, 0.5, 1.0])).state.shape, loop.sampling.size
    (torch.Size([3, 3, 15]), 15)

    In discrete time, with a plant of one's own:

    >>> class Slider:
    ...     dt, state_size, control_size, state_names = 0.1, 2, 1, ("position", "velocity")
    ...     def step(self, z, u):
    ...         velocity = z[..., 1:] + self.dt * (u - z[..., :1] ** 3)
    ...         return torch.cat([z[..., :1] + self.dt * velocity, velocity], -1)
    >>> loop = ClosedLoop(Slider(), torch.nn.GRUCell(2, 4), readout=torch.nn.Linear(4, 1))
    >>> problem = kp.DiscreteProblem(loop, torch.zeros(3, 10, 0), torch.ones(3, 2 + 4))
    >>> kp.solve(problem).state.shape
    torch.Size([3, 10, 6])
    """
    refuse_unknown(unknown, OPTIONS, "ClosedLoop", "ClosedLoop")
    if isinstance(plant, type) or not (callable(plant) or is_discrete(plant)):
        got = f"the class {plant.__name__}" if isinstance(plant, type) else type_name(plant)
        raise TypeError(f"plant is {got}, expected a callable plant(z, u) such as CartPole(), or one with a step")
    if not is_discrete(plant):
        _check_called(plant)
    backend = backend_of(policy)
    if backend is None or not callable(policy):
        raise TypeError(
            f"policy is {type_name(policy)}, expected an instance of a torch nn.Module, or a callable JAX pytree "
            "with array leaves such as an equinox module; make a function a method of such a module"
        )
    refuse_jumps(plant, "the plant is", _AROUND)
    refuse_jumps(policy, "the policy is", "take its field, or make one loop of both")
    given = {"every": every, "memory": memory, "saturation": saturation, "rate_limit": rate_limit}
    named = [name for name, value in given.items() if value is not None] + ["delay"] * (delay != 0)
    if is_discrete(plant):
        if named:
            raise ValueError(
                f"{_are(named)} of plants in continuous time, and {type(plant).__name__} has steps of its own"
            )
        return discrete_loop(plant, policy, readout, backend.name)
    named += ["readout"] * (readout is not None)
    if every is None:
        if named:
            raise ValueError(f"{_are(named)} of sampled loops; give every=, the time between samples")
        if is_recurrent(policy, backend.models.function_of):
            raise ValueError(f"the policy is a {type_name(policy)}, whose memory moves in steps; give every=")
        memory_of(policy, None, None, backend.models.function_of)
        return models_of(backend.name).ClosedLoop(plant, policy)
    _check_positive("every", every)
    sizes = _size(state_size, plant, "state_size"), _size(control_size, plant, "control_size")
    if not (np.isfinite(delay) and delay >= 0):
        raise ValueError(f"delay is {delay!r}, expected a time >= 0 in the unit of t, such as 1.5 * every")
    if rate_limit is not None:
        _check_positive("rate_limit", rate_limit)
    width = memory_of(policy, readout, memory, backend.models.function_of)
    sampling = Sampling(float(every), *sizes, width, float(delay), _bounds(saturation), rate_limit)
    return hybrids_of(backend.name).SampledLoop(plant, policy, readout, sampling)


def _check_called(plant: Any) -> None:
    """Raise for a plant that cannot be called on (z, u); one that hides what it takes is tried when it is called."""
    try:
        takes = inspect.signature(plant)
    except (TypeError, ValueError):
        return
    try:
        takes.bind(None, None)
    except TypeError:
        raise TypeError(
            f"plant takes {takes}, but is called as plant(z, u), with its state and its control and no time; write "
            "lambda z, u: ... around it, with a time that is held fixed"
        ) from None


OPTIONS = (
    *("every", "readout", "memory", "delay", "saturation", "rate_limit"),
    *("state_size", "control_size"),
)
_AROUND = (
    "give its events to the loop: kp.models.Hybrid(kp.models.ClosedLoop(flow, policy, ...), *events), whose conditions "
    "and resets get the plant's state"
)


def _are(names: list[str]) -> str:
    return f"{', '.join(names)} {'are' if len(names) > 1 else 'is'}"


def _bounds(saturation: Any) -> Any:
    """Low and high, or a function."""
    if saturation is None or callable(saturation):
        return saturation
    try:
        found = tuple(map(float, (-saturation, saturation) if np.ndim(saturation) == 0 else saturation))
    except (TypeError, ValueError):
        found = ()
    if isinstance(saturation, bool) or len(found) != 2 or not found[0] < found[1]:
        raise ValueError(
            f"saturation is {saturation!r}, expected (low, high), a positive number s for (-s, s), or a function of "
            "the control"
        )
    return found


def _size(given: int | None, plant: Any, name: str) -> int:
    size = getattr(plant, name, None) if given is None else given
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"the plant does not say its {name}, got {size!r}; give ClosedLoop(..., {name}=)")
    return size


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 < value < np.inf:
        raise ValueError(f"{name} is {value!r}, expected a positive number")


def models_of(framework: str) -> Any:
    """The module with a framework's models; its `make` gives a cell and a readout."""
    return import_module({"torch": "kpflow_dyn.models._torch_models", "jax": "kpflow_dyn.models.jax"}[framework])
