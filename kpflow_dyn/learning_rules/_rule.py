"""A learning rule as an operator on the states, with how it moves the weights."""

from __future__ import annotations

from kpflow_dyn._flows.flow import Flow
from kpflow_dyn._spaces.operators import Operator


class Rule(Operator):
    """A = J G: where the loss has the gradient q in the states, the weights move by -eta G q, the states by -eta A q.

    Args:
        J: changes of the weights -> states, `flow.ntk.factor`; with a metric these are in its coordinates.
        gradient: G, states -> changes of the weights, in the place of J*.
        symmetric: whether A is its own adjoint.
    Source: docs/theory.md, "Learning rules and optimisers".

    >>> import torch, kpflow_dyn as kp
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 8), torch.randn(2, 6, 3))))
    >>> kp.learning_rules.truncated_bptt(flow, 2).gradient.codomain.axes
    ('parameter',)
    """

    def __init__(self, J: Operator, gradient: Operator, *, symmetric: bool = False) -> None:
        both = J @ gradient
        super().__init__(both.domain, both.codomain, both.mv, None if symmetric else both.T.mv)
        self.J, self.gradient = J, gradient


def gradient_of(rule: Operator, flow: Flow) -> Operator | None:
    """How a rule moves the weights; None of an operator that says only what the states do."""
    if isinstance(rule, Rule):
        return rule.gradient
    return flow.ntk.factor.T if rule is flow.ntk else None
