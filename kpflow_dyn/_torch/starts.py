"""Modules whose start learns: a cell or field beside what gives z_0."""

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from kpflow_dyn._shown import type_name


class Started(nn.Module):
    """A cell or field under its name, beside an encoder of the start or the parameter z0; called as the former."""

    def __init__(self, name: str, of_states: Any, start: Any) -> None:
        super().__init__()
        for what, module in ((name, of_states), ("encoder", start)):
            if not isinstance(module, nn.Module | Tensor):
                raise TypeError(
                    f"{what} is {type_name(module)}, expected an nn.Module: a plain function does not name its "
                    "parameters"
                )
        self.training, self._name = False, name
        if isinstance(start, Tensor):
            self.z0 = parameter(start)
        setattr(self, name, of_states)
        if isinstance(start, nn.Module):
            self.encoder = start

    @property
    def of_states(self) -> Any:
        """The cell or field."""
        return getattr(self, self._name)

    @property
    def start(self) -> Any:
        """The encoder or the parameter."""
        return getattr(self, "encoder" if hasattr(self, "encoder") else "z0")

    def forward(self, *args: Any) -> Any:
        return self.of_states(*args)


def parts_of(model: Any) -> tuple[Any, Any]:
    """The cell or field and what gives its start, None where that does not learn."""
    return (model.of_states, model.start) if isinstance(model, Started) else (model, None)


def parameter(value: Tensor) -> nn.Parameter:
    """One with this value, a copy; a parameter itself."""
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone())


def encoded(encoder: nn.Module, data: Tensor) -> Any:
    """What the encoder gives: z_0 [trial, unit], or a pytree of parts."""
    if isinstance(encoder, nn.RNNBase):
        raise ValueError(
            f"the encoder is nn.{type(encoder).__name__}, which returns (output, h_n); write a module that calls it "
            "and returns z_0 [trial, unit], such as h_n[-1]"
        )
    try:
        found = encoder(data)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"the encoder failed on z0 {tuple(data.shape)} of {data.dtype}: {error}. It is called on the data of all "
            "trials [trial, ...], and gives z_0 [trial, unit]"
        ) from error
    return found


def carries_gradient(start: Any) -> bool:
    """Whether some part of it requires a gradient, or a parameter of a module among its parts."""
    parts = tree_leaves(start)
    tensors = [tensor for part in parts for tensor in (part.parameters() if isinstance(part, nn.Module) else [part])]
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


def without_gradient(start: Any) -> Any:
    """The same parts, detached."""
    return tree_map(lambda part: part.detach() if isinstance(part, Tensor) else part, start)
