"""Forward passes in torch; see `kpflow_dyn._backend.Solving`."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from kpflow_dyn._arrays import like_numpy
from kpflow_dyn._arrays.memory import bytes_of
from kpflow_dyn._flows.referee import departure
from kpflow_dyn._problems.inputs import input_function
from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem
from kpflow_dyn._problems.starts import start_map
from kpflow_dyn._problems.translations import advice_on
from kpflow_dyn._shown import type_name
from kpflow_dyn._torch import rollout
from kpflow_dyn._torch.checks import check_module
from kpflow_dyn._torch.left_alone import left_alone
from kpflow_dyn._torch.starts import parts_of

PARTS, PART_BYTES = 8, 2**20  # of the states whose derivatives are taken at once

roll_out, run = rollout.roll_out, rollout.run
without_gradients = torch.no_grad


def each_step(
    step: Callable[..., Tensor], model: nn.Module, rows: Tensor, before: Tensor, count: int | None = None
) -> Tensor:
    """step(model, row, z) of rows [trial, time, ...] and the states before each of these steps."""
    found = [step(model, row, z.contiguous()) for row, z in zip(rows.unbind(1), before.unbind(1), strict=True)]
    return torch.stack(found, 1)


def times_at_once(before: Tensor) -> int:
    """An eighth of them, or what has some size: autograd keeps several values of each, which only then are freed.

    Two at least, so that a step is seen that reaches back further than to the state before it.
    """
    times, size = before.shape[1], bytes_of(before[:, :1].numel(), before)
    return max(2, -(-times // PARTS), PART_BYTES // max(1, size))


def rounded(count: int) -> int:
    """The same number: nothing is compiled for it."""
    return count


def ode_library(alg: Any) -> Any:
    """Torchode of its own algorithms, or torchdiffeq."""
    from kpflow_dyn._torch.torchdiffeq_library import TORCHDIFFEQ
    from kpflow_dyn._torch.torchode_library import TORCHODE

    return TORCHODE if TORCHODE.accepts(alg) else TORCHDIFFEQ


def understood(given: dict[str, Any]) -> dict[str, Any]:
    """The `options` of torchdiffeq among those of the package."""
    rest = {name: value for name, value in given.items() if name != "options"}
    inner = given.get("options") or {}
    if not isinstance(inner, dict):
        raise TypeError(f"options is {inner!r}, expected a dict as torchdiffeq has it, such as {{'step_size': 0.1}}")
    inner = dict(inner)
    for theirs, ours in {"step_size": "steps", "max_num_steps": "max_steps"}.items():
        if theirs in inner:
            rest[ours] = inner.pop(theirs)
    if inner:
        raise TypeError(f"options has {sorted(inner)}, which solve does not take{advice_on(inner)}")
    return rest


def default_algorithm() -> str:
    """A method of torchdiffeq."""
    return "dopri5"


def variational_system(*args: Any, own: bool) -> Any:
    """A `System`."""
    from kpflow_dyn._torch.variational import OwnSystem, System

    return (OwnSystem if own else System)(*args)


def rate_of(problem: ODEProblem) -> Callable[[Tensor, Tensor], Tensor]:
    """(t, z [trial, unit]) -> z', with the inputs."""
    f, x = problem.f, input_function(problem)
    return f if x is None else lambda t, z: f(t, z, x(t))


def check_encoder(problem: DiscreteProblem | ODEProblem) -> None:
    """Raise where the encoder is random, or gives a trial by itself another start than among the others."""
    start = start_map(problem)
    if start is None or not problem.encodes:
        return
    check_module(problem.encoder, problem.data, "encoder")
    with left_alone(problem.encoder), torch.no_grad():
        model = problem.model
        whole = start(model)
        if not torch.equal(whole, start(model)):
            raise ValueError(
                "the encoder gave two starts for the same data; make it deterministic (encoder.eval()), and give "
                "noise, as of a variational encoder, as a part of its data"
            )
        for trial in {0, len(whole) - 1}:
            if error := departure(start(model, [trial]), whole[[trial]]):
                raise ValueError(
                    f"the encoder gives trial {trial} by itself another start than among the others, by {error:.1e}: "
                    "its trials influence each other, as in statistics over a batch, or the trials are not its first "
                    "axis; it is called on the data of all trials [trial, ...]"
                )


def check_field(problem: ODEProblem) -> None:
    """Raise unless f is a module that maps t, z [trial, unit] (and x_t) to z' [trial, unit], and does nothing else."""
    z0, f, x = problem.z0.detach(), problem.f, input_function(problem)
    _check_parameters(f, problem.model, z0)
    t = like_numpy(problem.t[0], z0)
    with torch.inference_mode(False):  # where versions are counted
        arguments = tuple(argument.clone() for argument in ((t, z0) if x is None else (t, z0, x(t))))
    versions = [argument._version for argument in arguments]
    rate = _try(problem, arguments)
    if not isinstance(rate, Tensor) or rate.shape != z0.shape or rate.dtype != z0.dtype:
        got = f"{tuple(rate.shape)} of {rate.dtype}" if isinstance(rate, Tensor) else type_name(rate)
        expected = f"z' {tuple(z0.shape)} of {z0.dtype}, like z0 [trial, unit]"
        raise ValueError(f"f returned {got}, expected {expected}{_of_one_trial(f, arguments)}")
    if [argument._version for argument in arguments] != versions:
        raise ValueError("f writes to its arguments in place; work on copies (z = z + ..., not z += ...)")
    if not torch.allclose(rate, _try(problem, arguments), rtol=0, atol=0, equal_nan=True):
        raise ValueError("f gave two results for the same arguments; make it deterministic (f.eval(), fixed noise)")


def check_called(what: str, model: Any, name: str, t: float, arguments: tuple[Any, ...], form: str) -> tuple[int, ...]:
    """The shape [...] of the results [trial, ...]."""
    like, part = arguments[0], parts_of(model)[0]
    _check_parameters(part, model, like)
    function = getattr(part, name) if name else part
    with torch.inference_mode(False):  # where versions are counted
        given = tree_map(lambda argument: argument.detach().clone(), (like_numpy(np.asarray(t), like), *arguments))
    versions = [argument._version for argument in tree_leaves(given)]
    try:
        found, again = function(*given), function(*given)
        with torch.enable_grad():
            hidden = not isinstance(function, nn.Module) and not hasattr(function, "__self__")
            hidden = hidden and getattr(function(*given), "requires_grad", False)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{what} failed: {error}. It is called as {form}, on all trials at once") from error
    if hidden:
        raise TypeError(f"{what} is a plain function of parameters that it does not name; make it an nn.Module")
    if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(like) or found.dtype != like.dtype:
        got = f"{tuple(found.shape)} of {found.dtype}" if isinstance(found, Tensor) else type_name(found)
        raise ValueError(
            f"{what} returned {got}, expected [trial, unit] of {len(like)} trials and {like.dtype}; it is called on "
            "any number of trials, so take that from z"
        )
    if [argument._version for argument in tree_leaves(given)] != versions:
        raise ValueError(f"{what} writes to its arguments in place; work on copies (z = z + ..., not z += ...)")
    if not torch.allclose(found, again, rtol=0, atol=0, equal_nan=True):
        raise ValueError(f"{what} gave two results for the same arguments; its noise comes from the problem alone")
    return tuple(found.shape[1:])


def _check_parameters(f: Any, model: Any, z0: Tensor) -> None:
    if not isinstance(f, nn.Module):
        raise TypeError(
            f"f is {type_name(f)}, expected an nn.Module as z0 is a torch tensor: a plain function does not name "
            "its parameters"
        )
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ValueError("f has no parameters, so there is nothing to learn; make its constants nn.Parameter")
    for name, tensor in parameters.items():
        if tensor.dtype.to_real() != z0.dtype:
            raise TypeError(
                f"parameter {name} is {tensor.dtype} but z0 is {z0.dtype}; use f.to(z0.dtype) or z0.to(...)"
            )
    check_module(f, z0)


def _try(problem: ODEProblem, arguments: tuple[Tensor, ...]) -> Any:
    f = problem.f
    try:
        return f(*arguments)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if "does not require grad" in str(error):
            raise ValueError(
                "f takes a derivative inside of its forward, and ODE solvers run without gradients; decorate forward "
                "with @torch.enable_grad(), or take the derivative by torch.func.grad"
            ) from error
        given = ", ".join(f"{name} {tuple(a.shape)}" for name, a in zip(("t", "z", "x_t"), arguments, strict=False))
        given += ", where z is the start that the encoder gives" * problem.encodes
        raise ValueError(
            f"f failed on {given}: {error}. A field is called as {problem.called('trial, unit', 'trial, input')}"
            f"{_of_one_trial(f, arguments)}"
        ) from error


def _of_one_trial(f: nn.Module, arguments: tuple[Tensor, ...]) -> str:
    """What to do about a field that takes one trial."""
    t, *rows = arguments
    with suppress(Exception):  # of the user's field
        if f(t, *(row[0] for row in rows)).shape == rows[0][0].shape:
            return ". It takes one trial: write it for all at once, with the axis of trials first, z @ W.T for W @ z"
    return ""
