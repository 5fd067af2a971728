"""Forward passes in torch; see `kpflow_dyn._backend.Solving`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kpflow_dyn._arrays import like_numpy
from kpflow_dyn._arrays.memory import bytes_of
from kpflow_dyn._flows.referee import departure
from kpflow_dyn._problems.inputs import input_function
from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem
from kpflow_dyn._problems.starts import start_map
from kpflow_dyn._torch import rollout
from kpflow_dyn._torch.checks import check_module
from kpflow_dyn._torch.left_alone import left_alone

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


def ode_library() -> Any:
    """Torchdiffeq."""
    from kpflow_dyn._torch.torchdiffeq_library import TORCHDIFFEQ

    return TORCHDIFFEQ


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
    rate = _try(f, arguments, problem.encodes)
    if not isinstance(rate, Tensor) or rate.shape != z0.shape or rate.dtype != z0.dtype:
        got = f"{tuple(rate.shape)} of {rate.dtype}" if isinstance(rate, Tensor) else type(rate).__name__
        raise ValueError(f"f returned {got}, expected z' {tuple(z0.shape)} of {z0.dtype}, like z0 [trial, unit]")
    if [argument._version for argument in arguments] != versions:
        raise ValueError("f writes to its arguments in place; work on copies (z = z + ..., not z += ...)")
    if not torch.allclose(rate, _try(f, arguments, problem.encodes), rtol=0, atol=0, equal_nan=True):
        raise ValueError("f gave two results for the same arguments; make it deterministic (f.eval(), fixed noise)")


def _check_parameters(f: Any, model: Any, z0: Tensor) -> None:
    if not isinstance(f, nn.Module):
        raise TypeError(
            f"f is {type(f).__name__}, expected an nn.Module as z0 is a torch tensor: a plain function does not name "
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


def _try(f: nn.Module, arguments: tuple[Tensor, ...], encodes: bool) -> Any:
    try:
        return f(*arguments)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if "does not require grad" in str(error):
            raise ValueError(
                "f takes a derivative inside of its forward, and ODE solvers run without gradients; decorate forward "
                "with @torch.enable_grad(), or take the derivative by torch.func.grad"
            ) from error
        given = ", ".join(f"{name} {tuple(a.shape)}" for name, a in zip(("t", "z", "x_t"), arguments, strict=False))
        given += ", where z is the start that the encoder gives" * encodes
        raise ValueError(
            f"f failed on {given}: {error}. A field is called as f(t, z [trial, unit]), or f(t, z, x_t [trial, input]) "
            "where the problem has inputs x"
        ) from error
