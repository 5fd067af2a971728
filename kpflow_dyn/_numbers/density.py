"""The spectral density of symmetric operators, by stochastic Lanczos quadrature."""

from dataclasses import dataclass

import numpy as np

from kpflow_dyn._arrays import Array, Random, Rows, array_namespace, to_numpy
from kpflow_dyn._arrays.dots import row_norms
from kpflow_dyn._shown import Row, Shown, numbers
from kpflow_dyn._spaces.operators import Operator, smaller_of
from kpflow_dyn._spaces.rows import is_symmetric, on_counted, require_square
from kpflow_dyn._spaces.scaling import at_unit_size
from kpflow_dyn.solvers import BlockLanczos, Eigenpairs, Estimate
from kpflow_dyn.solvers._moments import LEAST_SAMPLES, student
from kpflow_dyn.solvers._orthogonalise import project_out, to_like


@dataclass(frozen=True, eq=False, repr=False)
class SpectralDensity(Shown):
    """How the eigenvalues of an operator are spread: sum_i delta(l - l_i), estimated.

    The leading eigenvalues and the zeros of a low rank are counted exactly. For the rest each probe x gives a Gauss
    quadrature, with sum_j weights_j p(nodes_j) = x^T p(A) x for polynomials p up to the degree 2 steps - 1.

    Attributes:
        leading: the eigenvalues that were taken out [k].
        zeros: how many eigenvalues vanish because of the operator's shape.
        nodes, weights: of the rest [probe, step].
        applications: how many applications to one vector it took.

    Example as `spectral_density`.
    """

    leading: np.ndarray
    zeros: int
    nodes: np.ndarray
    weights: np.ndarray
    applications: int

    def _shown(self) -> tuple[str, list[Row]]:
        probes, steps = self.nodes.shape
        rows: list[Row] = [("leading", numbers(self.leading)), ("zeros", str(self.zeros))]
        rows += [("the rest", f"{probes} probes of {steps} Lanczos steps")]
        return "SpectralDensity", [*rows, ("applications", str(self.applications))]

    def count(self, low: float = -np.inf, high: float = np.inf) -> Estimate:
        """How many eigenvalues lie in (low, high]; the error bar is that of the probes, not of the quadrature.

        A quadrature resolves intervals that hold some of its nodes; take more steps for shorter intervals.
        """
        each = (self.weights * ((self.nodes > low) & (self.nodes <= high))).sum(1)
        known = ((self.leading > low) & (self.leading <= high)).sum() + self.zeros * (low < 0 <= high)
        stderr = student(len(each)) * each.std(ddof=1) / len(each) ** 0.5
        return Estimate(float(known + each.mean()), float(stderr), self.applications, "Lanczos quadrature")

    def density(self, values: np.ndarray, width: float) -> np.ndarray:
        """Eigenvalues per unit length at these values, each smoothed by a Gaussian of this standard deviation."""
        if not width > 0:
            raise ValueError(f"width is {width!r}, expected the standard deviation of a Gaussian, a positive number")
        at = np.concatenate([self.leading, [0.0], self.nodes.ravel()])
        mass = np.concatenate([np.ones(len(self.leading)), [self.zeros], self.weights.ravel() / len(self.weights)])
        bumps = np.exp(-(((np.asarray(values)[:, None] - at) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
        return bumps @ mass


def spectral_density(
    op: Operator, k: int = 10, probes: int = 20, steps: int = 60, seed: int | Random = 0
) -> SpectralDensity:
    """The spectral density rho(l) = sum_i delta(l - l_i) of a symmetric operator A with eigenvalues l_i.

    Args:
        op: A; where J J* has fewer parameters than states, J*J is taken and the zeros are counted.
        k: how many leading eigenpairs to find and count exactly.
        probes: how many random vectors estimate the rest.
        steps: how many steps of Lanczos' recurrence each vector takes.
        seed: an int, or a `Random` to continue.

    Raises:
        ValueError: an operator that is not symmetric, k not below its dimension, or too few probes or steps.
    Source: Golub, Meurant, "Matrices, moments and quadrature" (1994); Ubaru, Chen, Saad (2017).

    >>> import numpy as np, kpflow_dyn as kp
    >>> unit = kp.Space(("unit",), (300,), np.zeros(1))
    >>> A = kp.MatrixOperator(np.diag(np.linspace(0, 1, 300)), unit, unit, symmetric=True)
    >>> found = kp.spectral_density(A, probes=40).count(0.5, 1.0)
    >>> bool(abs(found.value - 150) < 4 * found.stderr + 2)
    True
    """
    require_square(op, "a spectral density")
    op, size = at_unit_size(op)
    rng = Random(seed)
    if not is_symmetric(op, rng):
        raise ValueError(f"spectral_density needs a symmetric operator, got {op!r}; take op @ op.T")
    if probes < LEAST_SAMPLES or steps < 2:
        raise ValueError(f"got probes = {probes}, steps = {steps}; expected at least {LEAST_SAMPLES} and 2")
    space, apply = (smaller := smaller_of(op)).domain, on_counted(smaller)
    if not 0 <= k < space.dimension:
        raise ValueError(
            f"k = {k} leading pairs of an operator of rank {space.dimension} at most; expected 0 <= k < that"
        )
    pairs = BlockLanczos().solve(apply, space.dimension, k, like=space.like, seed=rng) if k else None
    rows = rng.normal((probes, space.dimension), space.like)
    nodes, weights = _quadrature(apply, rows, pairs, min(steps, space.dimension - k))
    applications = probes * nodes.shape[1] + (pairs.applications if pairs else 0)
    leading, nodes = size.times(to_numpy(pairs.values) if pairs else np.zeros(0)), size.times(nodes)
    return SpectralDensity(leading, op.domain.dimension - space.dimension, nodes, weights, applications)


def _quadrature(apply: Rows, rows: Array, pairs: Eigenpairs | None, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights [row, step] by Lanczos' recurrence on each row, apart from known eigenvectors."""
    known = [] if pairs is None else [pairs.vectors]
    rows, _c = project_out(rows, known)
    sizes = to_numpy(row_norms(rows))
    before, diagonal, beside = 0 * rows, [], [sizes]
    now = rows / to_like(sizes, rows)[:, None]
    for _ in range(steps):
        image, _c = project_out(apply(now), known)
        image = image - to_like(beside[-1], rows)[:, None] * before if diagonal else image
        diagonal.append(to_numpy(array_namespace(rows).sum(image * now, axis=1)).astype(np.float64))
        image = image - to_like(diagonal[-1], rows)[:, None] * now
        beside.append(to_numpy(row_norms(image)))
        before, now = now, image / to_like(np.where(beside[-1] > 0, beside[-1], 1), rows)[:, None]
    rows_of = zip(np.stack(diagonal, 1), np.stack(beside[1:-1], 1), strict=True)
    nodes, vectors = np.linalg.eigh(np.stack([np.diag(d) + np.diag(e, 1) + np.diag(e, -1) for d, e in rows_of]))
    return nodes, vectors[:, 0] ** 2 * sizes[:, None] ** 2
