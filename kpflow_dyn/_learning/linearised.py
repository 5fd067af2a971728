"""A loss of outputs about any change of the parameters, where the outputs change by their derivative alone."""

from collections.abc import Callable

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, device, eps_of, to_numpy
from kpflow_dyn._arrays.dots import gram
from kpflow_dyn._backend import Values, backend_for
from kpflow_dyn._learning.decay import COLUMNS, TOLERANCE
from kpflow_dyn._spaces.operators import GramOperator
from kpflow_dyn._spaces.rows import on_rows
from kpflow_dyn.solvers._counted import Counted
from kpflow_dyn.solvers._krylov import Krylov
from kpflow_dyn.solvers._orthogonalise import no_rows
from kpflow_dyn.solvers._rosenbrock import Point


class LinearisedObjective:
    """L(y + J delta) as a landscape for `Integration`: the kernel J J* stays as it is, the loss is the whole one.

    Its Hessian is J* h J with the Hessian h of L in the outputs: the generalised Gauss-Newton matrix.

    Args:
        kernel: J J*; delta are its factor's arguments, those of an optimiser's metric where it has one.
        y: the outputs.
        loss: of outputs, y -> number of shape ().

    Attributes:
        start: delta = 0.
    """

    def __init__(self, kernel: GramOperator, y: Array, loss: Callable[[Array], Array]) -> None:
        space = kernel.domain
        self._push, self._pull = on_rows(kernel.factor), on_rows(kernel.factor.T)
        self._outputs = space.to_euclidean(y).reshape((-1,))
        backend = backend_for(y, "y", "[trial, time, out]")
        self._derivatives = backend.objectives.Derivatives(
            lambda rows, _scheme: loss(space.from_euclidean(rows.reshape(space.shape)))
        )
        changes = kernel.factor.domain
        self.start = array_namespace(y).zeros(changes.size, dtype=changes.dtype, device=device(y))

    def __call__(self, delta: Array) -> Point:
        """The loss there."""
        loss, gradient, hessian = self._derivatives.both(self._moved(delta), None)
        pulled = self._pull(gradient[None])[0]
        return Point(delta, loss, pulled, lambda rows: self._pull(hessian(self._push(rows))), self._gradient)

    def values(self, delta: Array) -> Values:
        """The changes by name."""
        return {"delta": delta}

    def _gradient(self, delta: Array) -> Array:
        return self._pull(self._derivatives.gradient(self._moved(delta), None)[None])[0]

    def _moved(self, delta: Array) -> Array:
        return self._outputs + self._push(delta[None])[0]


def spectrum(point: Point) -> tuple[np.ndarray, np.ndarray, int]:
    """Rates [k] of J* h J, among them the largest, the parts [k] of the loss at them to second order, applications.

    A part is c^2 / (2 rate) with the gradient's coordinate c along a Ritz vector.
    """
    operator, gradient = Counted(point.hessian), point.gradient[None]
    krylov = Krylov(operator, no_rows(gradient.shape[1], gradient), Random(0), "LM")
    krylov.begin(gradient, 1)
    krylov.inject(1)
    while krylov.active and krylov.size < COLUMNS and not krylov.converged(1, TOLERANCE):
        krylov.expand()
    rates = to_numpy(krylov.values)
    in_basis = np.concatenate([to_numpy(gram(gradient, rows)) for rows in krylov.basis], 1)[0]
    squares, moving = (in_basis @ to_numpy(krylov.rotation)) ** 2, rates > eps_of(gradient) * np.abs(rates).max()
    return rates[moving], squares[moving] / (2 * rates[moving]), operator.applications
