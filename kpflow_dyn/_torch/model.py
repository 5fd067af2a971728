"""A torch module and the parameters of it that learn, ready to be linearised in any step that is made of it."""

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kpflow_dyn._backend import BACKENDS
from kpflow_dyn._problems.choice import Choice, choose
from kpflow_dyn._torch.kept_traces import KeptTraces
from kpflow_dyn._torch.tangent import Tangent
from kpflow_dyn._torch.trace import Applied
from kpflow_dyn.tracing._graph import Graph, Role
from kpflow_dyn.tracing._steps import analyse

TRACES = KeptTraces()  # of the steps of all models in this process


class Model:
    """A module; `parameters` are copies of those that learn, by name."""

    def __init__(self, call: nn.Module, params: Choice) -> None:
        known = dict(call.named_parameters())
        self.call = call
        self.parameters = {name: known[name].detach().clone() for name in choose(known, params)}

    def tangent(
        self,
        step: Callable[..., Tensor],
        rows: Tensor,
        before: Tensor,
        check: Callable[[Tensor], None] = lambda after: None,
    ) -> Tangent:
        """The recurrence z -> step(model, row, z) along rows [trial, time, ...] from the states before each step.

        `check` raises where the states after each step are not what they should be.
        """
        module = Applied(step, self.call)
        one = (Role.INPUT, rows[:1, 0]), (Role.STATE, before[:1, 0])
        known = TRACES.known(module, *one)
        if known is not None:
            with suppress(ValueError, RuntimeError):  # then the step hangs on more than it is known by
                return self._tangent(known, module, rows, before, check)
        return self._tangent(TRACES.new(module, *one), module, rows, before, check)

    def _tangent(self, graph: Graph, module: Applied, rows: Tensor, before: Tensor, check: Callable) -> Tangent:
        tangent = Tangent(analyse(graph, set(self.parameters), BACKENDS["torch"].transforms), rows, before)
        self._check(tangent, module, rows, before)
        check(tangent.next_state)
        return tangent

    def _check(self, tangent: Tangent, module: nn.Module, rows: Tensor, before: Tensor) -> None:
        """Compare a few rows with reverse mode through the module itself: the trace may have lost a part of it."""
        generator = torch.Generator(rows.device).manual_seed(1)
        values = {f"call.{name}": value.clone().requires_grad_() for name, value in self.parameters.items()}
        directions = [_normal(value, generator) for value in values.values()]
        dz = _normal(before, generator)
        found = tangent.derivative(dz.transpose(0, 1), torch.cat([d.reshape(-1) for d in directions])).transpose(0, 1)
        trials, times = before.shape[:2]
        for at in {(0, 0), (trials // 2, times // 2), (trials - 1, times - 1)}:
            z, weights = before[at][None].clone().requires_grad_(), _normal(before[at], generator)
            out = functional_call(module, values, (rows[at][None], z))
            self._check_value(tangent.next_state[at], out[0].detach())
            gradients = torch.autograd.grad((out[0] * weights).sum(), [z, *values.values()], allow_unused=True)
            pairs = zip(gradients, [dz[at], *directions], strict=True)
            terms = torch.stack([(weights * found[at]).sum(), *(-(g * d).sum() for g, d in pairs if g is not None)])
            if float(terms.sum().abs()) > 1e4 * torch.finfo(z.dtype).eps * float(terms.abs().sum()):
                raise RuntimeError(
                    f"the linearised step is off by {float(terms.sum() / terms.abs().sum()):.1e} of its size from "
                    "reverse mode through the module; write it without torch.no_grad and the like, or report it"
                )

    @staticmethod
    def _check_value(found: Tensor, expected: Tensor) -> None:
        error = float((found - expected).abs().max())
        if not error <= 1e4 * torch.finfo(found.dtype).eps * max(1.0, float(expected.abs().max())):
            raise RuntimeError(
                f"the traced step is off by {error:.1e} from the module itself; please report this model"
            )


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
