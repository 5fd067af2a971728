"""Operators that are direct sums, such as K over the units of a cell: spectra and moments of all parts at once."""

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, device, to_numpy
from kpflow_dyn._arrays.dots import row_dots, row_norms
from kpflow_dyn._arrays.memory import budget, bytes_of
from kpflow_dyn._spaces.operators import GramOperator, Operator
from kpflow_dyn._spaces.parts import DirectSum, Parts
from kpflow_dyn._spaces.rows import on_rows
from kpflow_dyn.solvers import BlockLanczos, Eigenpairs, EigenSolver
from kpflow_dyn.solvers._counted import Counted, Product
from kpflow_dyn.solvers._direct_sum import Bases, Leading, leading_of
from kpflow_dyn.solvers._lanczos import Callback
from kpflow_dyn.solvers._orthogonalise import relative, to_like

LARGE = 2**30  # bytes of a basis of so many rows, above which the parts are not taken apart
ROWS = 24
TIGHTER = (0.5, 0.1, 0.02)  # of the tolerance, by the recurrence, until the true residuals are within it


def bases_of(op: Operator, rng: Random) -> Bases | None:
    """Bases of all parts of A = L L*, or of L* L where that is smaller; None where A is no direct sum."""
    if not isinstance(op, GramOperator):
        return None
    space, left = op.domain, budget()
    if not (space.mask is None or space.mask.shape[-1] == 1) or (apart := op.direct_sum) is None:
        return None
    of_domain = op.factor.domain.size < space.size and apart.of_domain
    parts = of_domain or apart.of_rows(space.size)
    if bytes_of(ROWS * parts.order.size, space.like) > (LARGE if left is None else min(LARGE, left)):
        return None
    return Bases(_operator(op, parts), parts, rng, space.like)


def pairs_by_parts(op: Operator, k: int, alg: EigenSolver, rng: Random, callback: Callback | None) -> Eigenpairs | None:
    """The k leading eigenpairs of A = L L*, each in one part; None where A is no direct sum, or one that takes long."""
    if not isinstance(op, GramOperator) or not isinstance(alg, BlockLanczos) or alg.products is not None:
        return None
    bases = None if min(op.domain.dimension, op.factor.domain.size) <= alg.dense else bases_of(op, rng)
    if bases is None or op.direct_sum is None:
        return None
    for tighter in TIGHTER:
        leading = leading_of(bases, k, tighter * alg.tol)
        found = None if leading is None else _certified(op, op.direct_sum, bases, leading, alg.tol)
        if found is not None and callback is not None:
            callback(found.calls, to_numpy(found.residuals))
        if found is None or bool(found.converged.all()):
            return found
    return None


def _operator(op: GramOperator, parts: Parts) -> Counted:
    if parts.order.size == op.domain.size:
        return Counted(on_rows(op))
    return Product(on_rows(op.factor), on_rows(op.factor.T))


def _certified(op: GramOperator, apart: DirectSum, bases: Bases, leading: Leading, tol: float) -> Eigenpairs | None:
    """Pairs of A with true residuals; those of different parts share their applications."""
    operator = bases.operator
    sheets = bases.sheets(leading)
    if isinstance(operator, Product):
        sheets = operator.forward(sheets)
    images = on_rows(op)(sheets)
    operator.halves += 2 * len(sheets)
    u, image = (_of_pairs(rows, leading, apart.count) for rows in (sheets, images))
    sizes = row_norms(u)
    if not bool((sizes > 0).all()):
        return None
    u, image = (rows / to_like(sizes, rows)[:, None] for rows in (u, image))
    values = row_dots(u, image)
    residuals = relative(row_norms(image - to_like(values, image)[:, None] * u), float(values.max()))
    converged = residuals <= tol
    return Eigenpairs(values, u, residuals, converged, operator.applications, operator.calls)


def _of_pairs(rows: Array, leading: Leading, count: int) -> Array:
    """Sheets [sheet, n] -> the part of each pair alone [k, n], with zeros elsewhere."""
    xp = array_namespace(rows)
    own = to_like(np.arange(count) == leading.part[:, None], rows)
    taken = xp.take(rows, xp.asarray(leading.sheet, device=device(rows)), axis=0)
    return (taken.reshape((len(own), -1, count)) * own[:, None]).reshape(taken.shape)
