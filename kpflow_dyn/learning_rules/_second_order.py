"""Rules that know the curvature: Gauss-Newton."""

from __future__ import annotations

import math
import warnings

import numpy as np

from kpflow_dyn._arrays import Array, Rows, eps_of, full_precision, like_numpy, to_numpy
from kpflow_dyn._arrays.dots import row_norms, to_double
from kpflow_dyn._arrays.linear_systems import iterate
from kpflow_dyn._numbers.contributions import Learning
from kpflow_dyn._spaces.operators import Apply, Operator
from kpflow_dyn._spaces.rows import CHEAP, on_rows, unit_rows
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.learning_rules._rule import Rule


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
    forward, back = on_rows(J), on_rows(J.T)

    def between(first: Rows, then: Rows, domain: Space, codomain: Space) -> Apply:
        def apply(q: Array) -> Array:
            rows = then(first(domain.to_euclidean(q).reshape((-1, domain.size))))
            return codomain.from_euclidean(rows.reshape((-1, *codomain.shape)))

        return apply

    states, weights = J.codomain, J.domain
    on_states = small is flow.ntk
    to_weights = between(*((solve, back) if on_states else (back, solve)), states, weights)
    to_states = between(*((forward, solve) if on_states else (solve, forward)), weights, states)
    return Rule(J, Operator(states, weights, to_weights, to_states), symmetric=True)


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
