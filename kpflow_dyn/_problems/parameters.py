"""Parameters of a model by their names, in either framework: taken out, compared with those of a file, put back."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, like_numpy
from kpflow_dyn._backend import backend_of
from kpflow_dyn._shown import type_name


class CheckpointError(ValueError):
    """A checkpoint that cannot be used as asked; the message says why and what to do."""


def parameters_of(model: Any) -> dict[str, Array]:
    """The parameters of a torch module, or the floating arrays of a jax pytree, named as in `Flow.parameters`."""
    backend = backend_of(model)
    found = {} if backend is None else backend.models.parameters_of(model)
    if not found:
        raise TypeError(f"{type_name(model)} has no parameters, expected a torch module or a pytree of jax arrays")
    return found


def with_values(model: Any, values: Mapping[str, np.ndarray]) -> Any:
    """The model with these values of all of its parameters: a torch module itself, or a new pytree."""
    known = parameters_of(model)
    check_names(values, known, "these are not the parameters of the model", "pass the model that was recorded")
    for name, parameter in known.items():
        kept, dtype = dtype_name(parameter), values[name].dtype
        if not np.can_cast(dtype, kept):
            raise CheckpointError(
                f"{name} is {dtype} in the file but {kept} in the model; convert the model to {dtype}"
            )
    return changed(model, {name: values[name] for name in known})


def changed(model: Any, values: Mapping[str, np.ndarray]) -> Any:
    """The model with these values of some parameters, rounded to its dtype: a torch module itself, or a new pytree."""
    known, backend = parameters_of(model), backend_of(model)
    assert backend is not None  # or there were no parameters
    return backend.models.changed(model, {name: like_numpy(value, known[name]) for name, value in values.items()})


def dtype_name(array: Array) -> str:
    """ "float32" and the like."""
    return str(array.dtype).removeprefix("torch.")


def check_names(
    found: Mapping[str, Any], expected: Mapping[str, Any], problem: str, advice: str, prefix: str = ""
) -> None:
    """Raise a CheckpointError unless names and shapes are those expected; the file has the prefix before each name."""
    if wrong := sorted(set(found) ^ set(expected)):
        missing, extra = ([name for name in wrong if name in names] for names in (expected, found))
        raise CheckpointError(f"{problem}: {differing(missing, extra)}; {advice}")
    for name, array in expected.items():
        if found[name].shape != array.shape:
            raise CheckpointError(f"{prefix}{name} must be {list(array.shape)}, got {list(found[name].shape)}")


def differing(missing: Sequence[str], extra: Sequence[str], where: str = "") -> str:
    """Which names are missing, and which are left over; only what there is."""
    parts = {"missing ": missing, f"left over {where}": extra}
    return ", ".join(f"{what}{listing(names)}" for what, names in parts.items() if names)


def listing(names: Iterable[str]) -> str:
    """The names, the first twelve of them where there are many."""
    names = [repr(name) for name in names]
    rest = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + rest if names else "nothing"


@contextmanager
def opened(path: Path, framework: str) -> Iterator[Any]:
    """A safetensors file, whose tensors are those of "pt" or "numpy"."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework) as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file, or is damaged ({error})") from error
