"""Gramians of many units, as operators that are never formed."""

from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, like_numpy
from kpflow_dyn._flows.flow import Flow
from kpflow_dyn._problems.solutions import DiscreteSolution
from kpflow_dyn._shown import type_name
from kpflow_dyn._spaces.operators import Operator
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.control._gramians import check_kind
from kpflow_dyn.control._linearisation import along_steps_inputs
from kpflow_dyn.control._systems import output_matrix


def gram_operator(flow: Flow, kind: str, step: int, *, inputs: str | None = None, C: Any = None) -> Operator:
    """The Gramian at one step of a recurrent model, [trial, unit] -> [trial, unit], through sweeps of `flow.P`.

        Wc(t) q = [P B B^T P^T q at t] at t        Wo(t) q = [P^T C^T C P q at t] at t

    An application costs one sweep forward and one backward, and no [unit, unit] matrix is kept. `kp.eigs` gives the
    leading directions, `kp.trace` and `kp.effective_rank` numbers. It does not couple trials.

    Args:
        flow: `kp.linearize` of a `DiscreteProblem`'s solution.
        kind: "c" for reachability, "o" for observability.
        step: the number of the step, 1 to T.
        inputs: "x", also when None, or "kicks" to the state, B = 1.
        C: the outputs [output, unit], or a Linear layer; all states when None.

    Raises:
        TypeError, ValueError: the flow of another problem (for an ODE take `gram(sol, kind, rank=)`), an unknown kind,
            or a step outside of the trial.
    Source: docs/theory.md, "P: how kicks travel"; Moore, IEEE Trans. Automatic Control 26, 17 (1981).

    >>> import torch
    >>> import kpflow_dyn as kp
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(2, 5, 3))))
    >>> leading = kp.eigs(kp.control.gram_operator(flow, "c", step=5), k=2)
    >>> leading.vectors.shape
    torch.Size([2, 2, 8])
    """
    check_kind(kind)
    if kind.endswith("f"):
        raise ValueError(f"kind is {kind!r}, expected 'c' or 'o': an operator has no factor here")
    if not isinstance(flow, Flow):
        raise TypeError(f"gram_operator takes the Flow that kp.linearize returns, got {type_name(flow)}")
    solution, times = flow.solution, flow.P.domain.shape[1]
    if not isinstance(solution, DiscreteSolution):
        raise ValueError(
            f"gram_operator takes the flow of a DiscreteProblem, got one of a {type(solution.problem).__name__}; "
            "gram(sol, kind, rank=...) keeps factors along other solutions"
        )
    if not isinstance(step, int | np.integer) or not 1 <= step <= times:
        raise ValueError(f"step is {step!r}, expected the number of a step, 1 to {times}")
    state = flow.P.domain
    at = Space(("trial", "unit"), (state.shape[0], state.shape[2]), solution.state)
    propagate, middle = (flow.P, flow.P.T) if kind == "c" else (flow.P.T, flow.P), _middle(solution, kind, inputs, C)

    def apply(q: Array) -> Array:
        kicks = array_namespace(q).zeros((len(q), *state.shape), dtype=q.dtype, device=q.device)
        return propagate[0].mv(middle(propagate[1].mv(_put(kicks, q, int(step) - 1))))[:, :, int(step) - 1]

    return Operator(at, at, apply, None)


def _middle(solution: DiscreteSolution, kind: str, inputs: str | None, C: Any) -> Any:
    """B B^T, or C^T C, on vectors [probe, trial, time, unit]."""
    like = solution.state
    if kind == "o":
        outputs = like_numpy(output_matrix(C, like.shape[-1]), like)
        return lambda q: (q @ outputs.T) @ outputs
    if inputs == "kicks":
        return lambda q: q
    B = like_numpy(along_steps_inputs(solution, inputs), like)
    xp = array_namespace(B)
    return lambda q: xp.matmul(B, xp.matmul(xp.permute_dims(B, (0, 1, 3, 2)), q[..., None]))[..., 0]


def _put(kicks: Array, q: Array, place: int) -> Array:
    """q [probe, trial, unit] at one time of kicks."""
    xp = array_namespace(q)
    return xp.concat([kicks[:, :, :place], q[:, :, None], kicks[:, :, place + 1 :]], axis=2)
