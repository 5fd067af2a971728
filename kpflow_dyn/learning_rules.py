"""Learning rules as operators: what each does to the states where the loss has the gradient q = grad_S L.

A rule moves the states by -eta A q + O(eta^2). With J = P B V and K = B V V* B*,

    backpropagation through time    A = P K P* = J J*
    truncated after k steps         A = P K P_k*
    in the space of functions       A = P P*
    Gauss-Newton                    A = J (J* J + damping)^{-1} J*
    feedback alignment              A = J J_B* = P K P_B*

`kp.alignment` compares them, and they are analysed as any other operator. With a metric M^{-1} = R R* of the flow, J R
stands for J, and V R for V.

Source: Hazelden, Driscoll, Shlizerman, Shea-Brown, "The Global Empirical NTK" (arXiv 2605.08746).
"""

import math
import warnings
from collections.abc import Callable, Mapping

import numpy as np

from kpflow_dyn._arrays import Array, Random, Rows, array_namespace, eps_of, full_precision, like_numpy, to_numpy
from kpflow_dyn._arrays.dots import row_norms, to_double
from kpflow_dyn._arrays.linear_systems import iterate
from kpflow_dyn._flows.flow import Flow, RecurrentFlow
from kpflow_dyn._flows.propagator import Propagator
from kpflow_dyn._numbers.contributions import Learning
from kpflow_dyn._spaces.operators import GramOperator, Operator
from kpflow_dyn._spaces.rows import CHEAP, on_rows, unit_rows

__all__ = ["bptt", "feedback_alignment", "functional_gradient_descent", "gauss_newton", "truncated_bptt"]


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
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or k < 0:
        raise ValueError(f"k is {k!r}, expected a number of steps, 0 or more")
    if not isinstance(flow.P, Propagator) or "time" not in flow.P.domain.axes:
        raise ValueError("only steps of a recurrence can be counted, and this flow has none; of an ODE take flow.nodal")
    if k >= flow.P.domain.shape[1] - 1:
        return flow.ntk
    return flow.ntk.factor @ flow.K.factor.T @ _truncated(flow.P, int(k)).T


def _truncated(P: Propagator, k: int) -> Operator:
    """P_k = 1 + N + ... + N^k for P = (1 - N)^{-1}, at the places that count."""

    def summed(inverse: Operator) -> Callable[[Array], Array]:
        def apply(q: Array) -> Array:
            s = q
            for _ in range(k):
                s = q + s - inverse.mv(s)
            return s

        return apply

    forward, backward, counted = summed(P.inv), summed(P.inv.T), P.codomain.counted
    return Operator(P.domain, P.codomain, lambda q: counted(forward(q)), lambda q: backward(counted(q)))


def functional_gradient_descent(flow: Flow) -> GramOperator:
    """A = P P*, gradient descent on a separate kick to every state, as if any function could be learnt (K = 1).

    Args:
        flow: what `linearize` gives.
    Source: docs/theory.md, "Learning rules and optimisers".
    Example as `truncated_bptt`.
    """
    return GramOperator(flow.P)


def gauss_newton(flow: Learning, damping: float) -> Operator:
    """J (J* J + damping)^{-1} J* = ntk (ntk + damping)^{-1}: the eigenvalues of the ntk become l / (l + damping).

    By the eigenvectors of the smaller of J* J and J J* where that is cheap, else by conjugate gradients, which torch
    runs on the host.

    Args:
        flow: what `linearize` gives, or `Flow.output`.
        damping: a positive number, in units of the eigenvalues of the ntk. Conjugate gradients take some
            sqrt(|ntk| / damping) applications of the ntk.

    Raises:
        ValueError: a damping that is not positive.

    Warns:
        UserWarning: conjugate gradients that did not converge.
    Source: Nocedal, Wright, "Numerical optimization" (2006).

    >>> import torch, kpflow_dyn as kp
    >>> _ = torch.manual_seed(0)
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 8), torch.randn(2, 6, 3))))
    >>> largest = float(kp.eigs(flow.ntk, 1).values)
    >>> round(float(kp.eigs(kp.learning_rules.gauss_newton(flow, damping=largest), 1).values), 4)
    0.5
    """
    if not isinstance(damping, int | float) or not 0 < damping < math.inf:
        raise ValueError(f"damping is {damping!r}, expected a positive number, such as 0.01 of the largest eigenvalue")
    J = flow.ntk.factor
    small = J.T @ J if J.domain.size < J.codomain.size else flow.ntk
    make = _by_eigenvectors if small.domain.size <= CHEAP else _by_conjugate_gradients
    with full_precision(J.domain.like):
        solve = make(small, float(damping))
    forward, backward, on_states = on_rows(J), on_rows(J.T), on_rows(flow.ntk)

    def apply(q: Array) -> Array:
        rows = J.codomain.to_euclidean(q).reshape((-1, J.codomain.size))
        image = on_states(solve(rows)) if small is flow.ntk else forward(solve(backward(rows)))
        return J.codomain.from_euclidean(image.reshape((-1, *J.codomain.shape)))

    return Operator(J.codomain, J.codomain, apply, None)


def _by_eigenvectors(op: Operator, damping: float) -> Rows:
    """(A + damping)^{-1} on rows, by its matrix."""
    apply = on_rows(op)
    matrix = np.concatenate([to_numpy(to_double(apply(rows))) for rows in unit_rows(op.domain)])
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    inverse = like_numpy((vectors / (values.clip(0) + damping)) @ vectors.T, op.domain.like)
    return lambda rows: rows @ inverse


def _by_conjugate_gradients(op: Operator, damping: float) -> Rows:
    """(A + damping)^{-1} on rows, which are solved for together, each at the length of one."""
    apply, tolerance = on_rows(op), 10 * eps_of(op.domain.like) ** 0.75

    def system(rows: Array) -> Array:
        return apply(rows) + damping * rows

    def solve(rows: Array) -> Array:
        lengths = like_numpy(np.maximum(to_numpy(row_norms(rows)), 1e-300)[:, None], rows)
        unit = rows / lengths
        found = iterate("cg", system, unit, tolerance)
        left = float(row_norms(unit - system(found)).max())
        if not left <= 10 * tolerance * len(rows) ** 0.5:
            warnings.warn(
                f"conjugate gradients left {left:.1e} of the right-hand side; raise the damping ({damping:g})",
                stacklevel=2,
            )
        return found * lengths

    return solve


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

    found = flow.ntk.factor @ flow.feedback(draw)
    unknown = sorted(set(matrices or ()) - known)
    if unknown:
        raise ValueError(f"feedback matrices of unknown parameters {unknown}; the matrices are {sorted(known)}")
    return found
