"""A plant steered by a learnt policy, in the framework of the policy."""

from importlib import import_module
from typing import Any

from kpflow_dyn._backend import backend_of


def ClosedLoop(plant: Any, policy: Any) -> Any:
    """The field z' = plant(z, u) of a plant whose control u = policy(z), or u = policy([z, x_t]), is learnt.

    Only the policy learns. The plant is copied as it is now: parameters that it has become buffers in torch, and
    constants in JAX.

    Args:
        plant: any callable (z, u) -> z', such as those of `kpflow_dyn.models`.
        policy: a torch nn.Module on [trial, state + reference] -> [trial, control], or a callable JAX pytree with array
            leaves such as an equinox module, for one trial, without the trial axis.

    Returns:
        A torch nn.Module or an equinox module, called as f(t, z) or f(t, z, x_t) on z [trial, state] and the reference
        x_t [trial, reference]. Its parameters are the policy's, and their names begin with "policy.".

    Raises:
        TypeError: plant is not callable, or policy is neither kind of module.
        ValueError: when called, if the policy's output is not as wide as the plant's `control_size`.
    Source: Astrom, Murray, Feedback Systems (2008), on state feedback.

    >>> import torch
    >>> from kpflow_dyn.models import CartPole
    >>> loop = ClosedLoop(CartPole(), torch.nn.Linear(4 + 1, 1))
    >>> loop(torch.tensor(0.0), torch.zeros(3, 4), torch.ones(3, 1)).shape
    torch.Size([3, 4])
    """
    if isinstance(plant, type) or not callable(plant):
        got = f"the class {plant.__name__}" if isinstance(plant, type) else type(plant).__name__
        raise TypeError(f"plant is {got}, expected a callable plant(z, u) such as CartPole()")
    backend = backend_of(policy)
    if backend is not None and callable(policy):
        return models_of(backend.name).ClosedLoop(plant, policy)
    raise TypeError(
        f"policy is {type(policy).__name__}, expected an instance of a torch nn.Module, or a callable JAX pytree with "
        "array leaves such as an equinox module; make a function a method of such a module"
    )


def models_of(framework: str) -> Any:
    """The module with a framework's models; its `make` gives a cell and a readout."""
    return import_module({"torch": "kpflow_dyn.models._torch_models", "jax": "kpflow_dyn.models.jax"}[framework])
