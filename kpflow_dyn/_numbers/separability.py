"""How far an operator is from a product over two groups of axes."""

from math import perm

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, eps_of, full_precision, to_numpy
from kpflow_dyn._arrays.dots import gram, to_double
from kpflow_dyn._numbers.reductions import Keep, as_matrices, names_of, probe_images
from kpflow_dyn._spaces.operators import GramOperator, MatrixOperator, Operator
from kpflow_dyn._spaces.rows import CHEAP, euclidean_matrix, on_rows, require_square
from kpflow_dyn._spaces.scaling import at_unit_size
from kpflow_dyn.solvers import Estimate, Moments
from kpflow_dyn.solvers._moments import check_samples
from kpflow_dyn.solvers._orthogonalise import concat, orthonormalise

PROBES, LEADING = 16, 4


def schmidt_rank(op: Operator, keep: Keep, samples: int | None = None, seed: int | Random = 0) -> Estimate:
    """The Schmidt effective rank of A across the cut X | Y, with X the axes kept: 1 for a product A = B (x) C.

    With R[(x, x'), (y, y')] = A[(x, y), (x', y')], whose singular values s are those of A = sum_i s_i B_i (x) C_i,

        rank = (sum s^2)^2 / sum s^4 = |R|_F^4 / |R R^T|_F^2

    Exact where the matrix is small. Else A = J J* = E u u*, with u = J xi the matrix U [x, y], so R = E U (x) U and

        |R|_F^2 = E <U_1, U_2>^2        |R R^T|_F^2 = E (tr U_1 U_2^T U_3 U_4^T)^2

    over independent probes, the mean over all pairs and quadruples of different ones; the leading range of J* is taken
    out and treated exactly.

    Args as `partial_trace`, but 16 samples when None; the work grows with their fourth power.

    Raises:
        ValueError: an unknown axis, none or all axes kept, fewer than 8 samples, the zero operator, or an operator that
            is neither small nor J J*.
    Source: Van Loan, Pitsianis, "Approximation with Kronecker products" (1993), for R.

    >>> import numpy as np, kpflow_dyn as kp
    >>> space = kp.Space(("time", "unit"), (2, 2), np.zeros(1))
    >>> product = np.kron([[2.0, 1.0], [1.0, 2.0]], np.eye(2))
    >>> round(kp.schmidt_rank(kp.MatrixOperator(product, space, space), keep="time").value, 6)
    1.0
    """
    require_square(op, "a Schmidt rank")
    op, _size = at_unit_size(op)
    space, kept = op.domain, op.domain.positions(names_of(keep))
    if not 0 < len(kept) < len(space.shape):
        raise ValueError(f"keep is {keep!r}, expected some but not all of the axes {space.axes}")
    if samples is None and (isinstance(op, MatrixOperator) or space.size <= CHEAP):
        return _of_matrix(op, kept)
    if not isinstance(op, GramOperator):
        raise ValueError(f"estimates need A = J J*, got {op!r}; take op @ op.T, or a smaller problem")
    samples = PROBES if samples is None else samples
    check_samples(samples)
    return _sampled(op, kept, samples, Random(seed))


def _of_matrix(op: Operator, kept: tuple[int, ...]) -> Estimate:
    """From the matrix itself."""
    space = op.domain
    rows = as_matrices(to_double(euclidean_matrix(op)), space, kept)  # [(x y), x', y']
    turned = array_namespace(rows).permute_dims(rows, (1, 2, 0)).reshape((-1, space.size))
    both = to_numpy(as_matrices(turned, space, kept))  # [(x' y'), x, y]
    x, y = both.shape[1:]
    R = both.reshape(x, y, x, y).transpose(2, 0, 3, 1).reshape(x * x, y * y)
    squares = np.linalg.svd(R, compute_uv=False) ** 2
    applications = 0 if isinstance(op, MatrixOperator) else space.size
    return Estimate(_rank(squares.sum(), (squares**2).sum()), 0.0, applications, "exact: matrix")


def _sampled(op: GramOperator, kept: tuple[int, ...], samples: int, rng: Random) -> Estimate:
    """From the leading range of J* and probes of the rest."""
    J = op.factor
    start = rng.normal((min(LEADING, J.domain.size), J.codomain.size), J.codomain.like)
    q, _c, _r = orthonormalise(on_rows(J.T)(start), [], 0.0)
    images = [on_rows(J)(q), *(image for _first, image in probe_images(J, q, samples, rng))]
    matrices = as_matrices(concat(images), op.domain, kept)
    means, without = zip(*(_over_different(powers, len(q)) for powers in _powers(matrices)), strict=True)
    spread = np.stack(without) - np.mean(without, axis=1, keepdims=True)
    covariance = (samples - 1) / samples * spread @ spread.T
    applications = len(start) + (samples + 1) // 2
    found = Moments(np.array(means), covariance, samples, applications, "leading range and probes", 10 * eps_of(q))
    return found.estimate(_rank)


def _powers(U: Array) -> tuple[np.ndarray, np.ndarray]:
    """(tr U_i U_j^T)^2 [i, j] and (tr U_i U_j^T U_k U_l^T)^2 [i, j, k, l] of matrices U [i, x, y]."""
    xp, count = array_namespace(U), U.shape[0]
    U = U if U.shape[1] <= U.shape[2] else xp.permute_dims(U, (0, 2, 1))
    side = U.shape[1]
    flat = U.reshape((count * side, -1))
    with full_precision(U):
        pairs = xp.permute_dims((flat @ flat.T).reshape((count, side, count, side)), (0, 2, 1, 3))  # U_i U_j^T
        rows = pairs.reshape((count**2, side**2))
        four = to_numpy(to_double(rows @ rows.T)).reshape((count,) * 4).swapaxes(2, 3)
    return to_numpy(gram(*(U.reshape((count, -1)),) * 2)) ** 2, four**2


def _over_different(values: np.ndarray, known: int) -> tuple[float, np.ndarray]:
    """The mean over tuples of different probes, and without each of them.

    The first `known` entries of every axis are no probes: each of their terms belongs to every tuple.
    """
    for axis in range(values.ndim):
        first, rest = np.split(values, [known], axis)
        values = first.sum(axis, keepdims=True) + rest
    count, order = len(values), values.ndim
    index = np.indices(values.shape).reshape(order, -1)
    different = (np.diff(np.sort(index, axis=0), axis=0) != 0).all(0).reshape(values.shape)
    values = values * different
    held = sum(values.sum(tuple(other for other in range(order) if other != axis)) for axis in range(order))
    return values.sum() / perm(count, order), (values.sum() - held) / perm(count - 1, order)


def _rank(square: float, fourth: float) -> float:
    if fourth <= 0:
        raise ValueError("the Schmidt rank of the zero operator is not defined, nor one whose norm is below its noise")
    return float(square**2 / fourth)
