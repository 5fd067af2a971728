"""Optimisers that change the gradient of each weight before it moves it: Shampoo and Muon.

For the gradient that they see, both are linear with a metric that is frozen, G -> left G right on each weight [m, d]:

    A = J M^{-1} J*,    A q is what the optimiser's step does to the states
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from kpflow_dyn._arrays import Array, like_numpy, to_numpy
from kpflow_dyn._arrays.complex_numbers import count, is_complex
from kpflow_dyn._flows.flow import Flow
from kpflow_dyn._flows.preconditioner import Block, block_diagonal, identity
from kpflow_dyn._shown import type_name
from kpflow_dyn._spaces.operators import Operator
from kpflow_dyn.learning_rules._rule import Rule

Sides = dict[str, tuple[np.ndarray, np.ndarray]]  # left [m, m] and right [d, d] of each weight, by its name

QUINTIC = (3.4445, -4.7750, 2.0315)  # the coefficients that Muon was published with


class Shampoo(Rule):
    """What `shampoo` gives: a rule that keeps its `sums`, (L, R) of each weight by name."""

    def __init__(self, J: Operator, gradient: Operator, sums: Sides) -> None:
        super().__init__(J, gradient, symmetric=True)
        self.sums = sums


def shampoo(flow: Flow, q: Array, eps: float = 1e-4, previous: Shampoo | None = None) -> Shampoo:
    """J (L^{-1/4} (x) R^{-1/4}) J*, the step of Shampoo: G -> L^{-1/4} G R^{-1/4} for each weight's gradient G.

        L = eps + sum G G^T,    R = eps + sum G^T G,    over this step and those before

    Weights have two axes or more, [m, d] with d all axes but the first. Other parameters move by their gradient.

    Args:
        flow: what `linearize` gives.
        q: the gradient of the loss in the states, [*flow.ntk.domain.shape]; G is that of J* q.
        eps: a positive number, in units of G^2.
        previous: this rule at the step before, whose sums go on; None at the first step.

    Raises:
        ValueError: an eps that is not positive, a q of another shape, a flow with a metric of its own, or complex
            weights.
    Source: Gupta, Koren, Singer, "Shampoo: Preconditioned stochastic tensor optimization", arXiv:1802.09568.

    >>> import torch, kpflow_dyn as kp
    >>> _ = torch.manual_seed(0)
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 8), torch.randn(2, 6, 3))))
    >>> q = flow.solution.state
    >>> rule = kp.learning_rules.shampoo(flow, q)
    >>> after = kp.learning_rules.shampoo(flow, q, previous=rule)  # the same gradient once more
    >>> bool(after.gradient.mv(q).norm() < rule.gradient.mv(q).norm())
    True
    """
    if not isinstance(eps, int | float) or not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps!r}, expected a positive number")
    gradients = _gradients(flow, q)
    before = {name: tuple(eps * np.eye(n) for n in G.shape) for name, G in gradients.items()}
    before |= {} if previous is None else previous.sums
    sums = {name: (before[name][0] + G @ G.T, before[name][1] + G.T @ G) for name, G in gradients.items()}
    M = _between(flow, {name: (_fourth_root(left), _fourth_root(right)) for name, (left, right) in sums.items()})
    return Shampoo(flow.ntk.factor, M @ flow.ntk.factor.T, sums)


def muon(flow: Flow, q: Array, newton_schulz: int | None = None) -> Rule:
    """J M^{-1} J*, the step of Muon: G -> (G G^T)^{-1/2} G, the orthogonal factor of each weight's gradient G.

    With the singular value decomposition G = U s V^T the step is U V^T; singular values of zero stay zero. Weights and
    other parameters as in `shampoo`. Momentum, weight decay and a factor for the shape of the weight, such as torch's
    sqrt(max(1, m / d)), are left out.

    Args:
        flow: what `linearize` gives.
        q: the gradient of the loss in the states, [*flow.ntk.domain.shape]; G is that of J* q.
        newton_schulz: that many steps of the quintic iteration that optimisers take, G / |G|_F -> (a + b G G^T +
            c (G G^T)^2) G with a, b, c = 3.4445, -4.7750, 2.0315, instead of the exact factor; they take 5. In this
            way singular values end between some 0.7 and 1.2.

    Raises:
        ValueError: a number of steps below 1; else as `shampoo`.
    Source: Jordan and others, "Muon: An optimizer for hidden layers in neural networks" (2024); `torch.optim.Muon`.

    >>> import torch, kpflow_dyn as kp
    >>> _ = torch.manual_seed(0)
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 8), torch.randn(2, 6, 3))))
    >>> q = flow.solution.state
    >>> step = flow.as_parameters(kp.learning_rules.muon(flow, q).gradient.mv(q))["weight_ih"]
    >>> torch.linalg.svdvals(step)
    tensor([1.0000, 1.0000, 1.0000])
    """
    if newton_schulz is not None and (not isinstance(newton_schulz, int) or newton_schulz < 1):
        raise ValueError(
            f"newton_schulz is {newton_schulz!r}, expected a number of steps, or None for the exact factor"
        )
    M = _between(flow, {name: _orthogonaliser(G, newton_schulz) for name, G in _gradients(flow, q).items()})
    return Rule(flow.ntk.factor, M @ flow.ntk.factor.T, symmetric=True)


def _gradients(flow: Flow, q: Array) -> dict[str, np.ndarray]:
    """The gradient of each weight [m, d] where the loss has the gradient q in the states."""
    if not isinstance(flow, Flow):
        raise TypeError(f"got {type_name(flow)}, expected a Flow, as kp.linearize makes it")
    if flow.preconditioner:
        raise ValueError("this rule has a metric of its own; linearize without metric, and choose whole parameters")
    if tuple(q.shape) != flow.ntk.domain.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected one vector {flow.ntk.domain.shape}")
    found = {}
    for name, g in flow.as_parameters(flow.ntk.factor.T.mv(q)).items():
        if g.ndim > 1:
            if is_complex(g):
                raise ValueError(
                    f"{name} is {g.dtype}, and the rule is for real weights; keep its parts as two of them"
                )
            found[name] = np.asarray(to_numpy(g), np.float64).reshape(len(g), -1)
    return found


def _between(flow: Flow, sides: Sides) -> Operator:
    """M^{-1}, G -> left G right on the weights that have such sides; identity on other parameters."""

    def block(left: np.ndarray, right: np.ndarray) -> Block:
        m, d = len(left), len(right)
        a, b = (like_numpy(side, flow.J.domain.like) for side in (left, right))

        def apply(q: Array) -> Array:
            return (a @ q.reshape((-1, m, d)) @ b).reshape((-1, m * d))

        return Block(m * d, apply, apply, np.full(m * d, np.nan))

    values: Mapping[str, Array] = flow.parameters
    blocks = [block(*sides[name]) if name in sides else identity(count(values[name])) for name in values]
    both = block_diagonal(blocks, flow.ntk.factor.domain)
    return Operator(both.codomain, both.codomain, both.mv, None)


def _fourth_root(sum_: np.ndarray) -> np.ndarray:
    """A^{-1/4} of a positive definite matrix."""
    values, vectors = np.linalg.eigh(sum_)
    least = np.finfo(float).eps * values[-1]  # what eigh can resolve
    return (vectors * values.clip(least) ** -0.25) @ vectors.T


def _orthogonaliser(G: np.ndarray, steps: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(left, right) with left G right = U V^T, or what so many steps of Newton and Schulz make of G."""
    left, right = map(np.eye, G.shape)
    wide = G.shape[0] <= G.shape[1]
    U, s, Vt = np.linalg.svd(G, full_matrices=False)
    factors = _inverse(s, max(G.shape)) if steps is None else _by_newton_schulz(s, steps)
    vectors = U if wide else Vt.T
    small = (vectors * factors) @ vectors.T
    return (small, right) if wide else (left, small)


def _inverse(s: np.ndarray, size: int) -> np.ndarray:
    """1 / s, and zero where s is zero to round-off."""
    kept = s > size * np.finfo(float).eps * s[0]
    return np.where(kept, 1 / np.where(kept, s, 1), 0)


def _by_newton_schulz(s: np.ndarray, steps: int) -> np.ndarray:
    """By which factor the quintic iteration on G / |G|_F scales each singular value."""
    a, b, c = QUINTIC
    if not s.any():
        return np.zeros(len(s))
    factors = np.full(len(s), 1 / np.linalg.norm(s))
    for _ in range(steps):
        squares = (factors * s) ** 2
        factors = factors * (a + b * squares + c * squares**2)
    return factors
