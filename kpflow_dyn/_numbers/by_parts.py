"""Operators that are direct sums, such as K over the units of a cell: spectra and moments of all parts at once."""

import numpy as np

from kpflow_dyn._arrays import Array, Random
from kpflow_dyn._arrays.dots import row_dots, row_norms
from kpflow_dyn._arrays.memory import budget, bytes_of
from kpflow_dyn._spaces.operators import GramOperator, Operator
from kpflow_dyn._spaces.parts import DirectSum
from kpflow_dyn._spaces.rows import on_rows
from kpflow_dyn.solvers import BlockLanczos, Eigenpairs, EigenSolver
from kpflow_dyn.solvers._counted import Counted, Product
from kpflow_dyn.solvers._direct_sum import Bases, Leading, leading_of
from kpflow_dyn.solvers._lanczos import Callback
from kpflow_dyn.solvers._orthogonalise import concat, relative, to_like

LARGE = 2**30  # bytes of a basis and its work at most
LEAST_ROWS = 32  # that there is room for, or the parts are not taken apart
TIGHTER = (0.5, 0.1, 0.02)  # of the tolerance, by the recurrence, until the true residuals are within it
RESOLVED = 100  # times the round-off of the largest value: smaller ones are left to other roads


def bases_of(op: Operator, rng: Random) -> Bases | None:
    """Bases of all parts of A = L L*, or of L* L where that is smaller; None where A is no direct sum."""
    if not isinstance(op, GramOperator):
        return None
    space, left = op.domain, budget()
    if not (space.mask is None or space.mask.shape[-1] == 1) or (apart := op.direct_sum) is None:
        return None
    if op.factor.domain.size < space.size and apart.of_domain is not None:
        parts, operator = apart.of_domain, Product(on_rows(op.factor), on_rows(op.factor.T))
    else:
        parts, operator = apart.of_rows(space.size), Counted(on_rows(op))
    room = (LARGE if left is None else min(LARGE, left)) // bytes_of(parts.order.size, space.like)
    return Bases(operator, parts, rng, space.like, room) if room >= LEAST_ROWS else None


def pairs_by_parts(op: Operator, k: int, alg: EigenSolver, rng: Random, callback: Callback | None) -> Eigenpairs | None:
    """The k leading eigenpairs of A = L L*, each in one part; None where A is no direct sum, or one that takes long."""
    if not isinstance(op, GramOperator) or not isinstance(alg, BlockLanczos) or alg.products is not None:
        return None
    bases = None if min(op.domain.dimension, op.factor.domain.size) <= alg.dense else bases_of(op, rng)
    if bases is None or op.direct_sum is None:
        return None
    for tighter in TIGHTER:
        leading = leading_of(bases, k, tighter * alg.tol, alg.maxiter, callback)
        if leading is None or leading.values[-1] <= RESOLVED * bases.eps * leading.values[0]:
            return None
        found = _certified(op, op.direct_sum, bases, leading, alg.tol)
        if bool(found.converged.all()):
            return found
    return None


def _certified(op: GramOperator, apart: DirectSum, bases: Bases, leading: Leading, tol: float) -> Eigenpairs:
    """Pairs of A with true residuals; those of different parts share their applications."""
    operator = bases.operator
    sheets = bases.sheets(leading)
    if isinstance(operator, Product):
        sheets = operator.forward(sheets)
    images = on_rows(op)(sheets)
    operator.halves += 2 * sheets.shape[0]
    found = []
    for part, sheet in zip(leading.part.tolist(), leading.sheet.tolist(), strict=True):
        u, image = (_of_part(block[sheet : sheet + 1], part, apart.count) for block in (sheets, images))
        size = to_like(1 / row_norms(u), u)[:, None]
        u, image = u * size, image * size
        value = row_dots(u, image)
        found.append((u, value, row_norms(image - to_like(value, u)[:, None] * u)))
    vectors, values, left = (concat(list(each)) for each in zip(*found, strict=True))
    residuals = relative(left, float(values.max()))
    return Eigenpairs(values, vectors, residuals, residuals <= tol, operator.applications, operator.calls)


def _of_part(row: Array, part: int, count: int) -> Array:
    """A row [1, n] with zeros at all other parts."""
    own = to_like(np.arange(count) == part, row)
    return (row.reshape((-1, count)) * own).reshape(row.shape)
