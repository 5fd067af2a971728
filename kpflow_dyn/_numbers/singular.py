"""Singular triplets of operators."""

import dataclasses
from dataclasses import dataclass

from kpflow_dyn._arrays import Array, Random, to_numpy
from kpflow_dyn._numbers.spectra import certified, check_count, room_for
from kpflow_dyn._shown import Row, Shown, axes_sizes, described, numbers
from kpflow_dyn._spaces.operators import Operator, check_operator
from kpflow_dyn._spaces.rows import on_rows
from kpflow_dyn._spaces.scaling import at_unit_size
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.solvers import BlockLanczos, EigenSolver
from kpflow_dyn.solvers._doors import triplets
from kpflow_dyn.solvers._lanczos import Callback


@dataclass(frozen=True, eq=False, repr=False)
class SingularModes(Shown):
    """Singular triplets A v = s u, A* u = s v.

    Attributes:
        values: s [k], descending, float64.
        left: u [k, *codomain.shape], orthonormal in the inner product of the codomain; for flow.J, state modes.
        right: v [k, *domain.shape], orthonormal in the inner product of the domain; for flow.J, the changes of the
            parameters that drive these modes (`flow.as_parameters(right)` gives the arrays of each parameter).
        residuals: [k], the true (|A v - s u|^2 + |A* u - s v|^2)^(1/2) / s_1.
        converged: [k], whether the residual is within the requested tolerance.
        applications: how many applications to one vector it took. One of A and one of A* count as one.
        spaces: those of the left and the right vectors, which name their axes.

    Example as `svds`.
    """

    values: Array
    left: Array
    right: Array
    residuals: Array
    converged: Array
    applications: int
    spaces: tuple[Space, Space] | None = None

    def _shown(self) -> tuple[str, list[Row]]:
        rows: list[Row] = [("values", numbers(to_numpy(self.values)))]
        sides = zip(("left", "right"), (self.left, self.right), self.spaces or (None, None), strict=True)
        rows += [(side, _sized(vectors, space)) for side, vectors, space in sides]
        return f"{len(self.values)} singular triplets", [*rows, *certified(self)]


def svds(
    op: Operator, k: int, alg: EigenSolver | None = None, seed: int | Random = 0, callback: Callback | None = None
) -> SingularModes:
    """The k largest singular values of any operator A, with their left and right vectors: A v = s u, A* u = s v.

    They come from the eigenvectors of A*A, or of A A* if that is smaller. Squares lose half of the digits: values s
    below sqrt(eps) s_1 are noise. If a dimension is at most 512, A itself is decomposed, and no digits are lost.

    Args, Warns and Source as `eigs`, but for any A.

    Raises:
        ValueError: k below 1 or above the smaller dimension.

    >>> import numpy as np, kpflow_dyn as kp
    >>> left, right = (kp.Space((name,), (n,), np.zeros(1)) for name, n in (("out", 2), ("in", 3)))
    >>> kp.svds(kp.MatrixOperator(np.array([[0.0, 0.0, 2.0], [1.0, 0.0, 0.0]]), right, left), k=2).values
    array([2., 1.])
    """
    check_operator(op)
    alg = BlockLanczos() if alg is None else alg
    check_count(k, min(op.domain.dimension, op.codomain.dimension))
    if op.domain.size > op.codomain.size:
        found = svds(op.T, k, alg, seed, callback)
        return dataclasses.replace(found, left=found.right, right=found.left, spaces=(op.codomain, op.domain))
    op, size = at_unit_size(op)
    with room_for(k, op.codomain):
        sides = on_rows(op), on_rows(op.T)
        found = triplets(alg, *sides, op.domain.size, k, op.domain.like, Random(seed), callback=callback)
    sides = ((op.codomain, found.left), (op.domain, found.right))
    left, right = (space.from_euclidean(rows.reshape((k, *space.shape))) for space, rows in sides)
    about = found.residuals, found.converged, found.applications
    return SingularModes(size.times(found.values), left, right, *about, (op.codomain, op.domain))


def _sized(vectors: Array, space: Space | None) -> str:
    return described(vectors) if space is None else axes_sizes(("mode", *space.axes), (len(vectors), *space.shape))
