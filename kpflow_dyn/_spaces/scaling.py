"""Scale before squaring: numbers are found of an operator over a power of two that makes it about one.

|A|_F^2 of A = 1e-200 is zero in float64, and of A = 1e23 it is inf in float32. So numbers are those of A / 2^e, and are
multiplied by 2^e at the end, in float64. A power of two changes no digit. e is known from the first image, so that it
costs no application.
"""

import math
from collections.abc import Callable
from functools import singledispatch
from typing import Any, TypeVar, cast

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, is_finite
from kpflow_dyn._spaces.operators import Apply, GramOperator, MatrixOperator, Operator, check_operator

ORDINARY = 16  # operators between 2^-16 and 2^16 are left as they are
REACH = 0.8  # of a dtype's exponents may be taken as a size: 2^102 in float32, 2^819 in float64
TINY = 2.0**-1022  # numbers below it lose digits
Number = TypeVar("Number")
AnyOperator = TypeVar("AnyOperator", bound=Operator)


class Size:
    """The power of two 2^exponent by which an operator is divided; of J J* the square of that of J."""

    def __init__(self) -> None:
        self.order, self._root = 1, None

    @property
    def exponent(self) -> int:
        """0 until an image was seen that is not zero."""
        return self.order * (self._root or 0)

    def measure(self, image: Array, vector: Array, order: int = 1) -> None:
        """Take the size from the first image that tells it, of A or, where the order is 2, of A A*."""
        above, below = largest(image), largest(vector)
        if self._root is None and math.isfinite(above) and above > 0 and below > 0:
            root = round((math.log2(above) - math.log2(below)) / order)
            most = int(REACH * math.log2(float(array_namespace(image).finfo(image.dtype).max)))
            self._root = 0 if abs(root) <= ORDINARY else max(-most, min(root, most))

    def divide(self, image: Array) -> Array:
        """An array over the size of the factor, where that is out of the ordinary."""
        return image * 2.0**-self._root if self._root else image

    def over(self, apply: Apply) -> Apply:
        """A map over the size of the factor."""

        def applied(q: Array) -> Array:
            image = finite(apply(q))
            if self._root is None:
                self.measure(image, q)
            return self.divide(image)

        return applied

    def over_squared(self, apply: Apply, adjoint: Apply) -> Apply:
        """A map J J* over the square of the size of J; its vectors are divided first, so that J J* may be out of range.

        J* tells the size where J J* is out of range.
        """

        def applied(q: Array) -> Array:
            if self._root is None:
                image = apply(q)
                self.measure(image, q, 2)
                if self._root is None:
                    self.measure(adjoint(q), q)
                if not self._root:
                    return finite(image)
            return self.divide(finite(apply(self.divide(q))))

        return applied

    def times(self, number: Number) -> Number:
        """A number or array of A / 2^exponent as that of A; a ValueError where float64 cannot hold it."""
        half = self.exponent // 2
        with np.errstate(over="ignore", under="ignore"):
            found: Any = cast(Any, number) * 2.0**half * 2.0 ** (self.exponent - half)
        before, after = largest(number), largest(found)
        if self.exponent and before and not TINY <= after < math.inf:
            raise ValueError(
                f"a number of the operator is 2^{self.exponent} times {before:.4g}, which float64 cannot hold; measure "
                "the states or the parameters in other units, or take a shorter horizon"
            )
        return found


def at_unit_size(op: AnyOperator) -> tuple[AnyOperator, Size]:
    """A over a power of two, of the same class, and that power. It is known once a first vector was applied."""
    check_operator(op)
    size, of_any_class = Size(), cast(Callable[[AnyOperator, Size], AnyOperator], divided)
    return of_any_class(op, size), size


@singledispatch
def divided(op: Operator, size: Size) -> Operator:
    """A over its size, with all that is known of A."""
    adjoint = None if op.symmetric else size.over(op.T.mv)
    return Operator(op.domain, op.codomain, size.over(op.mv), adjoint)


@divided.register
def divided_gram(op: GramOperator, size: Size) -> Operator:
    """J J* from J over its size."""
    factor = divided(op.factor, size)
    size.order = 2
    apart = None if op.apart is None else divided(op.apart, size)
    return GramOperator(factor, size.over_squared(op.mv, op.factor.T.mv), apart, lambda: op.direct_sum)


@divided.register
def divided_matrix(op: MatrixOperator, size: Size) -> Operator:
    """A matrix over its size, which is that of its largest entry."""
    size.measure(finite(op.matrix), array_namespace(op.matrix).ones_like(op.matrix[:1]))
    if size.exponent == 0:
        return op
    return MatrixOperator(size.divide(op.matrix), op.domain, op.codomain, symmetric=op.symmetric)


def largest(values: Array | float) -> float:
    """max |x|, NaN where one is; 0 of nothing."""
    if isinstance(values, int | float):
        return float(abs(values))
    return float(array_namespace(values).max(abs(values))) if 0 not in values.shape else 0.0


def finite(image: Array) -> Array:
    """An image; a ValueError where it holds NaN or inf."""
    if not is_finite(image):
        raise ValueError(
            "the operator gave NaN or inf; look for them in its inputs and weights. If its numbers leave the range of "
            f"{image.dtype}, take float64, a shorter horizon, or a flow that grows less"
        )
    return image
