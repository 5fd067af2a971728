"""Rules whose errors go back through other matrices than the transposed weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, like_numpy, to_numpy
from kpflow_dyn._flows.flow import Draw, Flow, RecurrentFlow
from kpflow_dyn._spaces.operators import Operator
from kpflow_dyn.learning_rules._paths import check_count
from kpflow_dyn.learning_rules._rule import Rule


class Feedback(Rule):
    """What `feedback_alignment` gives: a rule that keeps its `matrices`, B of each weight by name."""

    def __init__(self, J: Operator, gradient: Operator, matrices: Mapping[str, Array]) -> None:
        super().__init__(J, gradient)
        self.matrices = matrices


def feedback_alignment(
    flow: Flow,
    seed: int | Random = 0,
    matrices: Mapping[str, Array] | None = None,
    previous: Feedback | None = None,
) -> Feedback:
    """J J_B*: errors go back through fixed random matrices B instead of the weights' transposes.

    J_B is J with B for each parameter W of two axes or more where it multiplies values that depend on the state; gates,
    derivatives of activations and the data that the weights multiply stay as they are. Where no weight acts between a
    kick and the end of its step, as in a single layer, this is P K P_B*, l_t = A_{t+1}(B)^T l_{t+1} + q_t. It is not
    symmetric; with B = W it is `bptt`.

    Args:
        flow: of a discrete problem, or `flow.nodal` of an ODE.
        seed: of matrices B with independent normal entries of the same mean square as those of W.
        matrices: B by the name of the parameter, in its shape, instead; a parameter without one keeps its own W.
        previous: this rule at the step before of a training, whose matrices it keeps.

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
    rng, used = Random(seed), {}
    if matrices is None and previous is not None:
        matrices = previous.matrices

    def draw(name: str, W: Array) -> Array:
        if matrices is None:
            used[name] = rng.normal(tuple(W.shape), W) * array_namespace(W).mean(W**2) ** 0.5
            return used[name]
        used[name] = B = matrices.get(name, W)
        if tuple(B.shape) != tuple(W.shape):
            raise ValueError(f"the feedback matrix of {name} has shape {(*B.shape,)}, expected {(*W.shape,)}")
        return like_numpy(np.array(to_numpy(B)), W)

    gradient = _fed_back(flow, draw)
    unknown = sorted(set(matrices or ()) - set(used))
    if unknown:
        raise ValueError(f"feedback matrices of unknown parameters {unknown}; the matrices are {sorted(used)}")
    return Feedback(flow.ntk.factor, gradient, used)


def weight_mirror(flow: Flow, samples: int = 100, seed: int | Random = 0) -> Rule:
    """J J_B*, feedback alignment with matrices B that noise through the weights W has shown.

        B = (1 / samples) sum_n (W x_n) x_n^T -> W        x_n ~ N(0, 1)

    Args:
        flow: of a discrete problem, or `flow.nodal` of an ODE.
        samples: how many noise vectors x_n, which enter at the last axis of each W; of a d x d matrix
            |B - W| / |W| is about sqrt((d + 1) / samples).
        seed: of the noise.

    Raises:
        ValueError: samples that are not a whole number >= 1, or as `feedback_alignment`.
    Source: Akrout, Wilson, Humphreys, Lillicrap, Tweed, "Deep learning without weight transport" (2019).

    >>> import torch, kpflow_dyn as kp
    >>> _ = torch.manual_seed(0)
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 8), torch.randn(2, 6, 3))))
    >>> found = [kp.alignment(kp.learning_rules.weight_mirror(flow, n), flow.ntk).value for n in (1, 10000)]
    >>> found[0] < found[1], round(found[1], 2)
    (True, 1.0)
    """
    check_count(samples, "samples", "noise vectors", 1)
    rng = Random(seed)

    def mirrored(_: str, W: Array) -> Array:
        x = rng.normal((int(samples), W.shape[-1]), W)
        return (W @ x.T) @ x / int(samples)

    return Rule(flow.ntk.factor, _fed_back(flow, mirrored))


def _fed_back(flow: Flow, draw: Draw) -> Operator:
    if not isinstance(flow, RecurrentFlow):
        raise ValueError("feedback needs the steps that errors go back through; take flow.nodal")
    return flow.feedback(draw)
