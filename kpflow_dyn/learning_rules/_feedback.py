"""Rules whose errors go back through other matrices than the transposed weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, like_numpy, to_numpy
from kpflow_dyn._flows.flow import Flow, RecurrentFlow
from kpflow_dyn._spaces.operators import Operator
from kpflow_dyn.learning_rules._rule import Rule


def feedback_alignment(flow: Flow, seed: int | Random = 0, matrices: Mapping[str, Array] | None = None) -> Operator:
    """J J_B*: errors go back through fixed random matrices B instead of the weights' transposes.

    J_B is J with B for each parameter W of two axes or more where it multiplies values that depend on the state; gates,
    derivatives of activations and the data that the weights multiply stay as they are. Where no weight acts between a
    kick and the end of its step, as in a single layer, this is P K P_B*, l_t = A_{t+1}(B)^T l_{t+1} + q_t. It is not
    symmetric; with B = W it is `bptt`.

    Args:
        flow: of a discrete problem, or `flow.nodal` of an ODE.
        seed: of matrices B with independent normal entries of the same mean square as those of W.
        matrices: B by the name of the parameter, in its shape, instead; a parameter without one keeps its own W.

    Raises:
        ValueError: a flow that is not of steps, unknown names or other shapes.
    Source: Lillicrap, Cownden, Tweed, Akerman, "Random synaptic feedback weights support error backpropagation for
    deep learning" (2016).

    >>> import torch, kpflow_dyn as kp
    >>> _ = torch.manual_seed(0)
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 8), torch.randn(2, 6, 3))))
    >>> rule = kp.learning_rules.feedback_alignment(flow, seed=1)
    >>> 0 < kp.alignment(rule, flow.ntk).value < 1
    True
    """
    if not isinstance(flow, RecurrentFlow):
        raise ValueError("feedback needs the steps that errors go back through; take flow.nodal")
    rng, known = Random(seed), set()

    def draw(name: str, W: Array) -> Array:
        known.add(name)
        if matrices is None:
            return rng.normal(tuple(W.shape), W) * array_namespace(W).mean(W**2) ** 0.5
        B = matrices.get(name, W)
        if tuple(B.shape) != tuple(W.shape):
            raise ValueError(f"the feedback matrix of {name} has shape {(*B.shape,)}, expected {(*W.shape,)}")
        return like_numpy(np.array(to_numpy(B)), W)

    found = Rule(flow.ntk.factor, flow.feedback(draw))
    unknown = sorted(set(matrices or ()) - known)
    if unknown:
        raise ValueError(f"feedback matrices of unknown parameters {unknown}; the matrices are {sorted(known)}")
    return found
