"""Run a torch cell over time, watching for what would make its analysis wrong."""

import torch
from torch import Tensor, nn

from kpflow_dyn._problems.checks import check_finite
from kpflow_dyn._problems.problems import DiscreteProblem
from kpflow_dyn._shown import type_name
from kpflow_dyn._torch.cells import Step, discrete_step, over_sequence


@torch.no_grad()
def roll_out(problem: DiscreteProblem) -> tuple[Tensor, Tensor]:
    """The states z_1 ... z_T [trial, time, unit], and z_0; a ValueError names the first step that is not finite."""
    cell, x, (step, z0) = problem.cell, problem.x, discrete_step(problem)
    check_step(step, cell, x[:, 0], z0)
    state = run(step, cell, x, z0)
    check_finite(state, "the state")
    _check_against_module(cell, x, z0, state)
    return state, z0


def run(step: Step, cell: nn.Module, x: Tensor, z: Tensor, kicks: Tensor | None = None) -> Tensor:
    """The states z_1 ... z_T [trial, time, unit] of inputs [trial, time, input] from z_0, kicked after each step."""
    states = []
    for t, x_t in enumerate(x.unbind(1)):
        z = step(cell, x_t, z) if kicks is None else step(cell, x_t, z) + kicks[:, t]
        states.append(z)
    return torch.stack(states, 1)


@torch.no_grad()
def check_step(step: Step, cell: nn.Module, x: Tensor, z0: Tensor) -> None:
    """Raise unless the step gives a state like z0, the same one each time, and leaves its arguments alone."""
    with torch.inference_mode(False):  # where versions are counted
        x, z0 = x.clone(), z0.clone()
    versions = x._version, z0._version
    try:
        z = step(cell, x, z0)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"the cell failed on x_t {tuple(x.shape)} and z {tuple(z0.shape)}: {error}. A cell is called as "
            "cell(x_t, z) with x_t [trial, input] and z [trial, unit]"
        ) from error
    if not isinstance(z, Tensor) or z.shape != z0.shape or z.dtype != z0.dtype:
        got = f"{tuple(z.shape)} of {z.dtype}" if isinstance(z, Tensor) else type_name(z)
        advice = (
            ". Return the next state alone, without an output beside it; a state of several parts, such as (h, c), "
            "needs a z0 of as many parts"
        )
        advice = advice if isinstance(z, tuple | list) else ""
        if isinstance(z, Tensor) and z.is_complex():
            advice = "; a cell with a complex state needs a complex z0"
        raise ValueError(f"the cell returned {got}, expected the next state {tuple(z0.shape)} of {z0.dtype}{advice}")
    if (x._version, z0._version) != versions:
        raise ValueError("the cell writes to its arguments in place; work on copies (z = z + ..., not z += ...)")
    again = step(cell, x, z0)
    if not torch.allclose(z, again, rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            "the cell gave two results for the same arguments; make it deterministic (cell.eval(), fixed noise)"
        )


def _check_against_module(module: nn.Module, x: Tensor, z0: Tensor, state: Tensor) -> None:
    """nn.RNN, nn.GRU and nn.LSTM run over the whole sequence must agree with our reading of one step."""
    if not isinstance(module, nn.RNNBase):
        return
    final = over_sequence(module, x, z0)[1]
    if not torch.allclose(final, state[:, -1], rtol=1e-3, atol=1e3 * torch.finfo(x.dtype).eps):
        raise RuntimeError(
            f"{type(module).__name__} over the whole sequence differs from its steps; please report this"
        )
