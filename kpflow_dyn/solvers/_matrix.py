"""The matrix of a small operator, by applying it to the identity, and its eigenpairs."""

from kpflow_dyn._arrays import Array, array_namespace, device, eps_of
from kpflow_dyn._arrays.dots import gram, row_norms, to_double
from kpflow_dyn.solvers._counted import Counted
from kpflow_dyn.solvers._orthogonalise import Which, concat, descending_eigh, ordered_eigh, relative, to_like

BLOCK_ENTRIES = 2**22  # of the identity that are applied at a time
LIMIT = 20_000
"""The largest dimension: a float64 matrix of 3 GiB, three times over in its decomposition."""


def identity(known: Array) -> Array:
    """The rows of the identity, or an orthonormal basis of what is orthogonal to known rows [d, n], for n <= LIMIT."""
    xp, (d, n) = array_namespace(known), known.shape
    if n > LIMIT:
        raise ValueError(
            f"the matrix of an operator of dimension {n} would be needed, {8 * n * n / 2**30:.0f} GiB; the largest "
            f"dimension is {LIMIT}. Ask for fewer pairs, or for estimates such as kp.spectral_density"
        )
    eye = xp.eye(n, dtype=known.dtype, device=device(known))
    if not d:
        return eye
    projector = to_double(eye) - gram(known.T, known.T)
    return to_like(descending_eigh(projector)[1][:, : n - d].T, known)


def matrix_of(operator: Counted, known: Array) -> tuple[Array, Array]:
    """The matrix of a symmetric operator, float64, on rows orthogonal to known ones [d, n]; and these rows."""
    rows, step = identity(known), max(1, BLOCK_ENTRIES // known.shape[1])
    images = (operator(rows[i : i + step]) for i in range(0, rows.shape[0], step))
    matrix = concat([gram(image, rows) if known.shape[0] else to_double(image) for image in images])
    defect, scale = float(abs(matrix - matrix.T).max()), float(row_norms(matrix).max())
    operator.check_symmetry(defect / scale if scale else 0.0, eps_of(known))
    return matrix, rows


def pairs_of_matrix(operator: Counted, known: Array, k: int, which: Which) -> tuple[Array, Array, Array]:
    """The k most wanted eigenvalues, eigenvectors and relative residuals, orthogonal to known rows [d, n]."""
    matrix, rows = matrix_of(operator, known)
    values, rotation = ordered_eigh(matrix, which)
    inside = to_double(to_like(rotation[:, :k].T, known))
    residuals = relative(row_norms(inside @ matrix - values[:k, None] * inside), float(abs(values).max()))
    return values[:k], to_like(inside @ to_double(rows) if known.shape[0] else inside, known), residuals
