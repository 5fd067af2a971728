"""Backpropagation through time, whole and truncated, and descent in the space of functions."""

from __future__ import annotations

from kpflow_dyn._flows.flow import Flow
from kpflow_dyn._spaces.operators import GramOperator, Operator
from kpflow_dyn.learning_rules._paths import along, check_count, neumann, rule_along, steps_of


def bptt(flow: Flow) -> GramOperator:
    """A = P K P*, gradient descent by backpropagation through time: the ntk itself.

    Args:
        flow: what `linearize` gives.
    Source: Werbos, "Backpropagation through time: what it does and how to do it" (1990).
    Example as `truncated_bptt`.
    """
    return flow.ntk


def truncated_bptt(flow: Flow, k: int) -> Operator:
    """P K P_k*, where each error goes back only k steps: (P_k* q)_t = sum_{j <= k} A_{t+1}^T ... A_{t+j}^T q_{t+j}.

    An application takes k products with all steps' Jacobians, besides those of J.

    Args:
        flow: of a discrete problem, or `flow.nodal` of an ODE.
        k: how many steps; 0 gives P K, and one less than there are times gives `bptt`.

    Raises:
        ValueError: a k that is not a whole number >= 0, or a flow whose P is not that of steps.
    Source: Williams, Peng, "An efficient gradient-based algorithm for on-line training of recurrent networks" (1990).

    >>> import torch, kpflow_dyn as kp
    >>> _ = torch.manual_seed(0)
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 8), torch.randn(2, 6, 3))))
    >>> likeness = [kp.alignment(kp.learning_rules.truncated_bptt(flow, k), flow.ntk).value for k in (0, 5)]
    >>> likeness[0] < 1, round(likeness[1], 4), kp.learning_rules.bptt(flow) is flow.ntk
    (True, 1.0, True)
    >>> kp.alignment(kp.learning_rules.functional_gradient_descent(flow), flow.ntk).value < 1
    True
    """
    check_count(k, "k", "steps", 0)
    flow = steps_of(flow)
    if k >= flow.P.domain.shape[1] - 1:
        return flow.ntk
    whole = flow.recurrence.flow().P
    return rule_along(flow, neumann(whole, along(whole.domain, 0.0), int(k)))


def functional_gradient_descent(flow: Flow) -> GramOperator:
    """A = P P*, gradient descent on a separate kick to every state, as if any function could be learnt (K = 1).

    Args:
        flow: what `linearize` gives.
    Source: docs/theory.md, "Learning rules and optimisers".
    Example as `truncated_bptt`.
    """
    return GramOperator(flow.P)
