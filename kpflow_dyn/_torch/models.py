"""The parameters of modules by name, and modules made of functions; see `kpflow_dyn._backend.Models`."""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves, tree_map

from kpflow_dyn._problems.events import EventsInForm, EventsThrough, is_hybrid
from kpflow_dyn._problems.forms import Form
from kpflow_dyn._torch.called import called
from kpflow_dyn._torch.left_alone import left_alone as left_alone
from kpflow_dyn._torch.starts import Started, carries_gradient, encoded, parameter, parts_of, without_gradient
from kpflow_dyn._torch.trace import Applied

__all__ = ["carries_gradient", "encoded", "left_alone", "parameter", "parts_of", "started", "without_gradient"]

started = Started
Values = dict[str, Tensor]


def parameters_of(model: Any) -> Values:
    """By name; none of what is no module."""
    return dict(model.named_parameters()) if isinstance(model, nn.Module) else {}


@torch.no_grad()
def changed(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """The module itself, with these values of some parameters."""
    known = parameters_of(model)
    for name, value in values.items():
        known[name].copy_(value)
    return model


def copied(model: Any) -> Any:
    """A module of its own, which the user's training does not reach; what is no module stays as it is."""
    try:
        return copy.deepcopy(model) if isinstance(model, nn.Module) else model
    except Exception as error:
        raise ValueError(
            f"the {type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and a flow of gradients "
            "moves a copy; keep no tensors computed from its parameters, and no locks or files, in its attributes"
        ) from error


def in_single(value: Any) -> Any:
    """A copy of a module, a tensor, or a container of these, with float32 in the place of half precision."""
    if isinstance(value, nn.Module):
        return copied(value)._apply(_in_single)
    return tree_map(lambda leaf: _in_single(leaf) if isinstance(leaf, Tensor) else leaf, value)


def _in_single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 2 else tensor


def learns(value: Any) -> bool:
    """Whether a part of a layer learns: all but parameters that require no gradient."""
    return not isinstance(value, nn.Parameter) or value.requires_grad


def snapshot(array: Tensor) -> Tensor:
    """Its numbers alone."""
    return array.detach().clone()


def call(function: Callable[..., Tensor], model: Any, values: Values, *args: Any) -> Tensor:
    """function(model, ...) where the parameters have these values."""
    if not isinstance(model, nn.Module):
        return function(model, *args)
    return called(Applied(function, model), {f"call.{name}": v for name, v in values.items()}, *args)


class OfArrays(nn.Module):
    """A function of arrays by name, and of more arguments; the arrays are its attributes."""

    def __init__(self, function: Callable[..., Tensor], learnt: Values, constants: Values) -> None:
        super().__init__()
        self.function, self._names = function, [*learnt, *constants]
        for name, value in learnt.items():
            setattr(self, name, nn.Parameter(snapshot(value), requires_grad=learns(value)))
        for name, value in constants.items():
            setattr(self, name, snapshot(value))

    def forward(self, *args: Any) -> Tensor:
        return self.function({name: getattr(self, name) for name in self._names}, *args)


def with_arrays(function: Callable[..., Tensor], learnt: Values, constants: Values) -> OfArrays:
    """A module of a function(arrays, ...), whose parameters are copies of `learnt`."""
    return OfArrays(function, learnt, constants)


class InForm(nn.Module):
    """A field as its user wrote it, in the form of the package; its parameters have the same names."""

    form: Form
    args: Any  # a tuple; of a hybrid model its HybridArguments
    field: Any

    def __init__(self, f: nn.Module, form: Form, args: tuple) -> None:
        super().__init__()
        vars(self).update(field=f, form=form, args=args)  # no modules of this one
        self._parameters, self._buffers, self._modules = f._parameters, f._buffers, f._modules
        self.training, self.takes_times = f.training, form.own_times

    def forward(self, t: Tensor, z: Tensor, *x: Tensor) -> Tensor:
        return self.form.rate(self.field, self.args, t, z, *x)


class HybridInForm(EventsInForm, InForm):
    """The same of a hybrid model, of the arguments of its flow and of its events."""

    def forward(self, t: Tensor, z: Tensor, *x: Tensor) -> Tensor:
        return self.form.rate(self.field, self.args.flow, t, z, *x)


def in_form(f: Any, form: Form, args: tuple) -> Any:
    """The field in the form of the package; what is no module is refused later."""
    if not isinstance(f, nn.Module):
        return f
    _check_arguments(f, args)
    return (HybridInForm if is_hybrid(f) else InForm)(f, form, args)


def _check_arguments(f: nn.Module, args: Any) -> None:
    """Raise where arguments would learn, but for parameters of the module."""
    own = {id(parameter) for parameter in f.parameters()}
    for tensor in _tensors_in(args):
        if tensor.requires_grad and id(tensor) not in own:
            raise ValueError(
                f"args hold a tensor {list(tensor.shape)} that requires a gradient, but args are constants; to let it "
                "learn make it a parameter of f, or .detach() it"
            )


class Through(nn.Module):
    """function(model, ...) with the parameters of the model, which have the same names."""

    through_model: Any
    function: Any

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        vars(self).update(through_model=model, function=function)  # no modules of this one
        self._parameters, self._buffers, self._modules = model._parameters, model._buffers, model._modules
        self.training = model.training

    def forward(self, *args: Any) -> Tensor:
        return self.function(self.through_model, *args)


class HybridThrough(EventsThrough, Through):
    """The same of a hybrid model, whose events the function changes as well."""


def through(model: nn.Module, function: Any) -> Through:
    """A model function(model, ...), with the same parameters; a hybrid one where the function has events."""
    return (HybridThrough if hasattr(function, "event") else Through)(model, function)


def _tensors_in(args: Any) -> Iterator[Tensor]:
    """The tensors of a pytree, and those of its modules."""
    for leaf in tree_leaves(args):
        if isinstance(leaf, nn.Module):
            yield from leaf.parameters()
        elif isinstance(leaf, Tensor):
            yield leaf


def field_of(f: Any) -> Any:
    """The field as its user wrote it."""
    return f.field if isinstance(f, InForm) else f


def nodes(model: Any) -> list[Any]:
    """A module and those in it; of a module in another form those of its user."""
    model = field_of(model)
    return list(model.modules()) if isinstance(model, nn.Module) else [model]


def function_of(f: Any) -> Any:
    """What a module computes; of one that is compiled or averages weights what the one inside does."""
    if not isinstance(f, nn.Module):
        return f
    inside = f.module if isinstance(f, AveragedModel) else f._modules.get("_orig_mod")
    return f.forward if inside is None else function_of(inside)


class Controlled(nn.Module):
    """A field of a CDE as that of an ODE whose input is X'; its parameters have the names of the field's own."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        vars(self)["call"] = f  # no module of this one
        self._parameters, self._buffers, self._modules = f._parameters, f._buffers, f._modules
        self.training = f.training

    def forward(self, t: Tensor, z: Tensor, rate: Tensor) -> Tensor:
        matrix = vars(self)["call"](t, z)
        return (matrix.reshape((*z.shape, rate.shape[-1])) @ rate[..., None])[..., 0]


def controlled(f: Any) -> Any:
    """The field with X' as its input; what is no module is refused later."""
    return f if isinstance(f, Controlled) or not isinstance(f, nn.Module) else Controlled(f)


class DriftAndDiffusion(nn.Module):
    """Two functions of (t, z) as `f` and `g`: modules, methods of one module, or one of them a plain function."""

    def __init__(self, f: Any, g: Any) -> None:
        super().__init__()
        for name, part in (("f", f), ("g", g)):
            owner = getattr(part, "__self__", None)
            if isinstance(owner, nn.Module):
                self.model = owner  # whose parameters those of the method are
            setattr(self, name, part)


def drift_and_diffusion(f: Any, g: Any) -> tuple[nn.Module, None]:
    """A module with `f` and `g`; shared parameters have one name."""
    f = f.call if isinstance(f, PairInForm) else f
    if g is not None:
        owners = {id(getattr(part, "__self__", None)) for part in (f, g) if hasattr(part, "__self__")}
        if len(owners) > 1 or not (callable(f) and callable(g)):
            raise TypeError("the drift f and the diffusion g must be modules, or methods of one module")
        return DriftAndDiffusion(f, g), None
    if not (isinstance(f, nn.Module) and callable(getattr(f, "f", None)) and callable(getattr(f, "g", None))):
        raise TypeError(
            f"without a diffusion g, f must be a module with methods f and g, as torchsde has them; got "
            f"{type(f).__name__}. An equation without noise is an ODEProblem"
        )
    return f, None


class PairInForm(nn.Module):
    """Drift and diffusion as their user wrote them, in the form of the package; parameters have the same names."""

    call: Any
    forms: tuple[Form, Form]
    args: tuple[tuple, tuple]

    def __init__(self, pair: nn.Module, forms: tuple[Form, Form], args: tuple[tuple, tuple]) -> None:
        super().__init__()
        vars(self).update(call=pair, forms=forms, args=args)  # no modules of this one
        self._parameters, self._buffers, self._modules = pair._parameters, pair._buffers, pair._modules
        self.training = pair.training

    def f(self, t: Tensor, z: Tensor, *x: Tensor) -> Tensor:
        """The drift."""
        return self.forms[0].rate(self.call.f, self.args[0], t, z, *x)

    def g(self, t: Tensor, z: Tensor, *x: Tensor) -> Tensor:
        """The diffusion."""
        return self.forms[1].rate(self.call.g, self.args[1], t, z, *x)


def pair_in_form(pair: nn.Module, forms: tuple[Form, Form], args: tuple[tuple, tuple]) -> PairInForm:
    """Drift and diffusion in the form of the package."""
    _check_arguments(pair, args)
    return PairInForm(pair, forms, args)


def on_numpy(policy: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """A policy on one observation, from numpy to numpy."""
    like = next(policy.parameters(), torch.zeros(()))

    @torch.no_grad()
    def act(z: np.ndarray) -> np.ndarray:
        row = torch.as_tensor(z[None], dtype=like.dtype, device=like.device)
        return policy(row)[0].cpu().numpy().astype(float)

    return act


def describe(model: Any) -> str:
    """The module as torch prints it."""
    return str(model)
