"""Which parameters learn."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._arrays.complex_numbers import is_complex

Choice = str | Sequence[str] | Callable[..., bool] | None  # a function takes the name, or (name, parameter)


def choose(known: Mapping[str, Any], params: Choice) -> list[str]:
    """The names of the parameters that learn, in the order of the model: all, or those that `params` picks.

    A torch parameter that requires no gradient learns only when it is picked.
    """
    if params is None:
        chosen = [name for name, parameter in known.items() if getattr(parameter, "requires_grad", True)]
    elif callable(params):
        by_name = len(inspect.signature(params).parameters) == 1
        chosen = [name for name, parameter in known.items() if (params(name) if by_name else params(name, parameter))]
    else:
        chosen = [params] if isinstance(params, str) else list(params)
        if unknown := [name for name in chosen if name not in known]:
            raise ValueError(f"unknown parameters {unknown}; the model has {', '.join(known)}")
    if not chosen:
        raise ValueError(f"no parameter learns: all of {', '.join(known) or 'none'} are frozen or left out by params=")
    return [name for name in known if name in chosen]


def as_masks(known: Mapping[str, Any], masks: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Booleans that say which entries of parameters learn, checked against these; of complex ones, of both parts."""
    found = {name: to_numpy(mask) for name, mask in masks.items()}
    for name, mask in found.items():
        shape = tuple(known[name].shape) if name in known else mask.shape
        if mask.dtype != bool or mask.shape != shape:
            raise ValueError(f"the mask of {name} is {mask.dtype}{list(mask.shape)}, expected bool{list(shape)}")
    if not any(mask.any() for mask in found.values()):
        raise ValueError("no entry learns: the masks are empty or all False")
    complexes = [name for name in found if name in known and is_complex(known[name])]
    return found | {name: np.repeat(found[name], 2) for name in complexes}
