"""Rules that know the curvature: Gauss-Newton, and the natural gradient."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, Rows, eps_of, full_precision, like_numpy, to_numpy
from kpflow_dyn._arrays.dots import row_norms, to_double
from kpflow_dyn._arrays.linear_systems import iterate
from kpflow_dyn._flows.flow import Flow
from kpflow_dyn._learning.curvature import curvature
from kpflow_dyn._learning.losses import Loss, output_loss
from kpflow_dyn._numbers.contributions import Learning
from kpflow_dyn._numbers.spectra import eigs
from kpflow_dyn._spaces.operators import Apply, GramOperator, Operator
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
    _check_damping(damping)
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


def natural_gradient(
    flow: Flow,
    damping: float,
    rank: int | None = None,
    *,
    readout: Any = None,
    loss: Loss | None = None,
    target: Any = None,
    mask: Any = None,
) -> Rule:
    """J (J_y* H J_y + damping)^{-1} J*, by the Fisher information J_y* H J_y of the outputs y, where J_y = C J.

    H is the Hessian of the loss in the outputs. With a unit H, as without a loss, and y the states themselves this is
    `gauss_newton`. It is found by the eigenvectors of J_y* H J_y where these are cheap, else by conjugate gradients.

    Args:
        flow: what `linearize` gives.
        damping: a positive number, in units of the eigenvalues of J_y* H J_y.
        rank: keep this many leading eigenpairs of J_y* H J_y alone, and take the rest of its eigenvalues as zero: the
            low-rank natural gradient, and of a unit H low-rank Gauss-Newton. All when None.
        readout: C, as in `Flow.output`; None where the states are the outputs.
        loss, target, mask: the loss that H is of, as in `forecast`; a unit H when loss is None.

    Raises:
        ValueError: a damping that is not positive, more eigenpairs than there are, or a loss that is not convex in the
            outputs.

    Warns:
        UserWarning: conjugate gradients that did not converge.
    Source: Amari, "Natural gradient works efficiently in learning" (1998); Martens, "New insights and perspectives on
    the natural gradient method", arXiv:1412.1193.

    >>> import torch, kpflow_dyn as kp
    >>> _ = torch.manual_seed(0)
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 8), torch.randn(2, 6, 3))))
    >>> full = kp.learning_rules.natural_gradient(flow, damping=0.1)
    >>> round(kp.alignment(full, kp.learning_rules.gauss_newton(flow, damping=0.1)).value, 4)
    1.0
    >>> of_outputs = kp.learning_rules.natural_gradient(flow, damping=0.1, rank=4, readout=torch.nn.Linear(8, 2))
    """
    _check_damping(damping)
    J, of_outputs = flow.ntk.factor, _rooted(flow, readout, loss, target, mask)
    with full_precision(J.domain.like):
        if rank is not None:
            solve = _by_leading(of_outputs, float(damping), rank)
        else:
            make = _by_eigenvectors if J.domain.size <= CHEAP else _by_conjugate_gradients
            solve = make(of_outputs.T @ of_outputs, float(damping))
    return Rule(J, Operator(J.domain, J.domain, solve, None) @ J.T, symmetric=True)


def _check_damping(damping: float) -> None:
    if not isinstance(damping, int | float) or not 0 < damping < math.inf:
        raise ValueError(f"damping is {damping!r}, expected a positive number, such as 0.01 of the largest eigenvalue")


def _rooted(flow: Flow, readout: Any, loss: Loss | None, target: Any, mask: Any) -> Operator:
    """H^{1/2} J_y."""
    read = None if readout is None else flow.output(readout)
    J_y, y = (flow.ntk.factor, flow.solution.state) if read is None else (read.J, read.values)
    if loss is None:
        if target is not None or mask is not None:
            raise ValueError("target and mask are of a loss; name it too, such as loss='cross_entropy'")
        return J_y
    space = J_y.codomain
    found = curvature(output_loss(loss, target, mask, y), y, space)

    def root(q: Array) -> Array:
        rows = found.rooted(space.to_euclidean(q).reshape((-1, space.size)))
        return space.from_euclidean(rows.reshape((-1, *space.shape)))

    return Operator(space, space, root, None) @ J_y


def _by_leading(factor: Operator, damping: float, rank: int) -> Rows:
    """(A + damping)^{-1} on rows, with the leading eigenpairs of A = F* F alone."""
    found = eigs(GramOperator(factor), rank)
    values = to_numpy(found.values)
    kept = values > eps_of(factor.domain.like) * values[0]
    images = to_numpy(factor.T.mv(found.vectors))[kept]
    vectors = like_numpy(images / values[kept, None] ** 0.5, factor.domain.like)
    shrunk = like_numpy(values[kept] / (values[kept] + damping), factor.domain.like)
    return lambda rows: (rows - (rows @ vectors.T * shrunk) @ vectors) / damping


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
