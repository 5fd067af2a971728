"""A plant steered by a learnt policy, in the framework of the policy."""

from importlib import import_module
from typing import Any

from kpflow_dyn._backend import backend_of
from kpflow_dyn.models._discrete import discrete_loop, is_discrete


def ClosedLoop(plant: Any, policy: Any, *, readout: Any = None) -> Any:
    """The field z' = plant(z, u) of a plant whose control u = policy(z), or u = policy([z, x_t]), is learnt.

    Of a plant in discrete time, which has a step(z, u) -> z and a `state_size`, such as `MJXPlant`, it is the cell of a
    `DiscreteProblem`, z_t = [plant.step(z_{t-1}, u), memory]. The state is [plant, memory of the policy], as wide as z0
    is, and the policy is u = policy([z, x_t]), policy(memory, [z, x_t]) -> (memory, u), or a cell with its readout. It
    sees plant.observe(z, x_t) in the place of [z, x_t] where the plant has that. Without any x_t, x of the problem has
    the width 0.

    Only the policy learns. The plant is copied as it is now: parameters that it has become buffers in torch, and
    constants in JAX.

    Args:
        plant: any callable (z, u) -> z', such as those of `kpflow_dyn.models`, or what has a step(z, u) -> z.
        policy: a torch nn.Module on [trial, state + reference] -> [trial, control], or a callable JAX pytree with array
            leaves such as an equinox module, for one trial, without the trial axis.
        readout: of a policy that is a cell such as nn.GRUCell or eqx.nn.LSTMCell, on a plant in discrete time: its h ->
            the control. (c of an LSTM stands behind h in the memory.)

    Returns:
        A torch nn.Module or an equinox module, called as f(t, z) or f(t, z, x_t) on z [trial, state] and the reference
        x_t [trial, reference], or in discrete time as cell(x_t, z). Its parameters are the policy's, and their names
        begin with "policy." (and "readout.").

    Raises:
        TypeError: plant is not callable and has no step, or has one and no `state_size`; policy is neither kind of
            module.
        ValueError: when called, if the policy's output is not as wide as the plant's `control_size`, or its memory not
            as z has it; a readout for a plant in continuous time.
    Source: Astrom, Murray, Feedback Systems (2008), on state feedback.

    >>> import torch
    >>> from kpflow_dyn.models import CartPole
    >>> loop = ClosedLoop(CartPole(), torch.nn.Linear(4 + 1, 1))
    >>> loop(torch.tensor(0.0), torch.zeros(3, 4), torch.ones(3, 1)).shape
    torch.Size([3, 4])

    In discrete time, with a plant of one's own:

    >>> import kpflow_dyn as kp
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
    if isinstance(plant, type) or not (callable(plant) or is_discrete(plant)):
        got = f"the class {plant.__name__}" if isinstance(plant, type) else type(plant).__name__
        raise TypeError(f"plant is {got}, expected a callable plant(z, u) such as CartPole(), or one with a step")
    backend = backend_of(policy)
    if backend is not None and callable(policy):
        if is_discrete(plant):
            return discrete_loop(plant, policy, readout, backend.name)
        if readout is not None:
            raise ValueError(
                f"a readout is that of a policy with a memory, on a plant in discrete time, not on {plant}"
            )
        return models_of(backend.name).ClosedLoop(plant, policy)
    raise TypeError(
        f"policy is {type(policy).__name__}, expected an instance of a torch nn.Module, or a callable JAX pytree with "
        "array leaves such as an equinox module; make a function a method of such a module"
    )


def models_of(framework: str) -> Any:
    """The module with a framework's models; its `make` gives a cell and a readout."""
    return import_module({"torch": "kpflow_dyn.models._torch_models", "jax": "kpflow_dyn.models.jax"}[framework])
