"""Matrix-free linear operators between spaces.

An operator is two callables on blocks of vectors [probe, *shape]: its action and its adjoint's, where the adjoint is
taken in the inner products of the two spaces: <y, A x> = <A.T y, x>.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, Random, device, full_precision, like_numpy, reshaped, to_numpy
from kpflow_dyn._arrays.memory import bytes_of, rows_at_once
from kpflow_dyn._elsewhere import OPERATOR, Named
from kpflow_dyn._shown import type_name
from kpflow_dyn._spaces.parts import DirectSum
from kpflow_dyn._spaces.space import Space

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

Apply = Callable[[Array], Array]
DENSE_BYTES = 2**31


class Operator(Named):
    """A linear operator `domain -> codomain`, applied without forming its matrix; <y, A x> = <A.T y, x>.

    Args:
        domain: the space of the vectors that it takes.
        codomain: the space of the vectors that it gives.
        apply: the action on a block, [probe, *domain.shape] -> [probe, *codomain.shape].
        adjoint: the adjoint's action, [probe, *codomain.shape] -> [probe, *domain.shape]; None for a self-adjoint
            operator, whose `.T` is itself.
    Source: Conway, "A course in functional analysis" (1990); the interface follows `scipy` and lineax.

    >>> import numpy as np, kpflow_dyn as kp
    >>> line = kp.Space(("time",), (3,), np.zeros(1))
    >>> running_sum = kp.Operator(line, line, lambda q: q.cumsum(-1), lambda q: q[:, ::-1].cumsum(-1)[:, ::-1])
    >>> (running_sum @ running_sum.T).dense()
    array([[1., 1., 1.],
           [1., 2., 2.],
           [1., 2., 3.]])
    """

    _elsewhere = OPERATOR

    def __init__(self, domain: Space, codomain: Space, apply: Apply, adjoint: Apply | None) -> None:
        self.domain, self.codomain = domain, codomain
        self._apply, self._adjoint = apply, adjoint

    @property
    def symmetric(self) -> bool:
        """Whether the operator was built self-adjoint."""
        return self._adjoint is None

    def mv(self, q: Array) -> Array:
        """The image of `q` [..., *domain.shape] -> [..., *codomain.shape]; leading axes are probes.

        Tokens may lie on several axes, as the positions of an image do.
        """
        if tuple(q.shape[-len(self.domain.shape) :]) != self.domain.shape:
            q = self.domain.with_tokens(q)
        self.domain.check(q)
        probes = tuple(q.shape[: q.ndim - len(self.domain.shape)])
        if 0 in probes:
            return self.codomain.xp.zeros((*probes, *self.codomain.shape), dtype=q.dtype, device=device(q))
        with full_precision(q):
            block = self._apply(reshaped(self.domain.placed(q), (math.prod(probes), *self.domain.shape)))
        return self.codomain.placed(reshaped(block, (*probes, *self.codomain.shape)))

    @property
    def T(self) -> Operator:
        """The adjoint in the inner products of the spaces."""
        if self._adjoint is None:
            return self
        return Operator(self.codomain, self.domain, self._adjoint, self._apply)

    def __matmul__(self, other: Operator) -> Operator:
        if not isinstance(other, Operator):
            raise TypeError(f"operator @ {type(other).__name__}: use op.mv(q) for vectors, @ composes operators")
        if not self.domain.matches(other.codomain):
            raise ValueError(f"cannot compose: the left takes {self.domain}, the right gives {other.codomain}")
        return Operator(other.domain, self.codomain, lambda q: self.mv(other.mv(q)), lambda q: other.T.mv(self.T.mv(q)))

    def __add__(self, other: Operator) -> Operator:
        if not isinstance(other, Operator):
            return NotImplemented
        if not (self.domain.matches(other.domain) and self.codomain.matches(other.codomain)):
            raise ValueError(f"cannot add {self!r} and {other!r}: their spaces differ")
        adjoint = None if self.symmetric and other.symmetric else lambda q: self.T.mv(q) + other.T.mv(q)
        return Operator(self.domain, self.codomain, lambda q: self.mv(q) + other.mv(q), adjoint)

    def __mul__(self, scalar: float) -> Operator:
        if not isinstance(scalar, int | float | np.integer | np.floating):
            raise TypeError(f"operator * {type(scalar).__name__}: only a real scalar scales; @ composes, op.mv applies")
        factor = float(scalar)
        adjoint = None if self.symmetric else lambda q: factor * self.T.mv(q)
        return Operator(self.domain, self.codomain, lambda q: factor * self.mv(q), adjoint)

    __rmul__ = __mul__

    def __neg__(self) -> Operator:
        return -1.0 * self

    def __sub__(self, other: Operator) -> Operator:
        return self + (-other)

    def dense(self) -> Array:
        """The matrix [codomain.size, domain.size] on flattened vectors; a ValueError above 2 GiB."""
        m, n = self.codomain.size, self.domain.size
        needed = bytes_of(m * n, self.domain.like)
        if needed > DENSE_BYTES:
            raise ValueError(
                f"the dense {m} x {n} matrix takes {needed / 2**30:.1f} GiB, more than {DENSE_BYTES / 2**30:.0f} GiB; "
                "use eigs, trace or partial_trace, or a smaller problem"
            )
        xp, step = self.domain.xp, rows_at_once(max(m, n), self.domain.like)
        eye = xp.eye(n, dtype=self.domain.dtype, device=device(self.domain.like))
        blocks = [self.mv(eye[i : i + step].reshape((-1, *self.domain.shape))) for i in range(0, n, step)]
        return xp.concat([b.reshape((-1, m)) for b in blocks]).T

    def to_scipy(self) -> LinearOperator:
        """A scipy LinearOperator on flat numpy vectors, in coordinates where both inner products are the plain ones.

        A symmetric operator stays symmetric there, whatever its measure; eigenvalues and singular values are its own.
        """
        from scipy.sparse.linalg import LinearOperator

        def on_numpy(op: Operator) -> Callable[[np.ndarray], np.ndarray]:
            def matmat(columns: np.ndarray) -> np.ndarray:
                rows = np.array(columns.reshape(op.domain.size, -1).T, order="C")
                q = like_numpy(rows, op.domain.like).reshape((-1, *op.domain.shape))
                image = op.codomain.to_euclidean(op.mv(op.domain.from_euclidean(q)))
                return to_numpy(image).reshape(-1, op.codomain.size).T.reshape(op.codomain.size, *columns.shape[1:])

            return matmat

        forward, backward, shape = on_numpy(self), on_numpy(self.T), (self.codomain.size, self.domain.size)
        actions = {"matvec": forward, "rmatvec": backward, "matmat": forward, "rmatmat": backward}
        make: Any = LinearOperator  # scipy builds a subclass from these keywords, which its types do not say
        return make(shape, **actions, dtype=to_numpy(self.domain.like).dtype)

    def __repr__(self) -> str:
        to = "" if self.domain is self.codomain else f" -> {self.codomain}"
        return f"{type(self).__name__}({self.domain}{to})"


class GramOperator(Operator):
    """A = L L*, positive semi-definite, with its factor kept: spectra and traces may work on the smaller side.

    Args:
        factor: L.
        apply: a fused action of L L*; the composition when None.
        apart: where L L* acts on trials, each trial's own L_b: [trial, ...] -> codomain, if it is known. Then
            `apart @ apart.T` is the part of L L* inside the trials, all that sums over trials need.
        direct_sum: finds whether L L* couples units; asked when that is first wanted.

    Source as `Operator`.

    >>> import numpy as np, kpflow_dyn as kp
    >>> unit = kp.Space(("unit",), (2,), np.zeros(1))
    >>> kp.GramOperator(kp.MatrixOperator(np.array([[1.0, 0.0], [1.0, 1.0]]), unit, unit)).dense()
    array([[1., 1.],
           [1., 2.]])
    """

    def __init__(
        self,
        factor: Operator,
        apply: Apply | None = None,
        apart: Operator | None = None,
        direct_sum: Callable[[], DirectSum | None] = lambda: None,
    ) -> None:
        space = factor.codomain
        super().__init__(space, space, apply or (lambda q: factor.mv(factor.T.mv(q))), None)
        self.factor, self.apart, self._direct_sum = factor, apart, direct_sum

    @cached_property
    def direct_sum(self) -> DirectSum | None:
        """The parts that L L* is a direct sum of; None where it is not known to be one."""
        return self._direct_sum()


class MatrixOperator(Operator):
    """An operator given by its matrix, which acts on values: image = matrix @ q.

    Args:
        matrix: [codomain.size, domain.size]; the adjoint takes the measures of the spaces into account.
        domain, codomain: the spaces.
        symmetric: whether the operator is its own adjoint; this is not checked.

    Raises:
        ValueError: a matrix of another shape.

    Source and Example as `GramOperator`.
    """

    def __init__(self, matrix: Array, domain: Space, codomain: Space, *, symmetric: bool = False) -> None:
        if tuple(matrix.shape) != (codomain.size, domain.size):
            raise ValueError(f"the matrix has shape {tuple(matrix.shape)}, expected {(codomain.size, domain.size)}")

        def apply(q: Array) -> Array:
            return (q.reshape((-1, domain.size)) @ matrix.T).reshape((-1, *codomain.shape))

        def adjoint(q: Array) -> Array:
            weighted = q if codomain.measure is None else q * codomain.measure
            image = (weighted.reshape((-1, codomain.size)) @ matrix).reshape((-1, *domain.shape))
            return image if domain.measure is None else image / domain.measure

        super().__init__(domain, codomain, apply, None if symmetric else adjoint)
        self.matrix = matrix

    def dense(self) -> Array:
        """The matrix itself."""
        return self.matrix


def check_operator(given: Any) -> None:
    """Raise unless this is an operator, and say how to get one."""
    if not isinstance(given, Operator):
        raise TypeError(
            f"got {type_name(given)}, expected an operator: pass flow.ntk (or flow.K, flow.P) of "
            "flow = kp.linearize(kp.solve(problem)), or kp.MatrixOperator of a matrix"
        )


def smaller_of(op: Operator) -> Operator:
    """J*J in the place of A = J J* where that is smaller: it has the same nonzero eigenvalues."""
    if isinstance(op, GramOperator) and op.factor.domain.size < op.domain.size:
        return op.factor.T @ op.factor
    return op


def check_adjoint(op: Operator, seed: int | Random = 0) -> float:
    """The defect |<y, A x> - <A.T y, x>| / (|A x| |y|) for random x and y; = 0 to round-off for a true adjoint pair.

    Args:
        op: A.
        seed: an int, or a `Random` to continue.

    Raises:
        TypeError: no operator.
        ValueError: images that hold NaN or inf.
    Source: the dot-product test of Claerbout, "Earth soundings analysis" (1992).
    Example as `DiscreteAdjoint`.
    """
    check_operator(op)
    rng = Random(seed)
    x, y = op.domain.normal(1, rng), op.codomain.normal(1, rng)
    image, back = op.mv(x), op.T.mv(y)
    size = max(float(a.xp.max(abs(b))) for a, b in ((op.codomain, image), (op.domain, back)))
    if not math.isfinite(size):
        raise ValueError("the operator gave NaN or inf; look for them in its inputs and weights, or take float64")
    power = 2.0 ** round(math.log2(size)) if size else 1.0
    image, back = image / power, back / power  # so that squares stay in range
    defect = op.codomain.inner(y, image) - op.domain.inner(back, x)
    scale = (op.codomain.inner(image, image) * op.codomain.inner(y, y)) ** 0.5
    return float(abs(defect[0]) / scale[0]) if float(scale[0]) else power * float(abs(defect[0]))


def on_spaces(domain: Space, codomain: Space, apply: Apply, transpose: Apply) -> Operator:
    """The operator of a map and its plain transpose; its adjoint is taken in the measures of the spaces."""

    def adjoint(q: Array) -> Array:
        image = transpose(q if codomain.measure is None else codomain.measure * q)
        return image if domain.measure is None else image / domain.measure

    return Operator(domain, codomain, apply, adjoint)


def restriction(space: Space, mask: Array) -> Operator:
    """R, which puts zeros where a mask, or one that the space has already, is False."""
    kept = replace(space, mask=mask if space.mask is None else space.mask & mask)
    return Operator(kept, kept, kept.counted, None)
