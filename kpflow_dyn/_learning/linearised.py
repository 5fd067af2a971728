"""A loss of outputs about any change of the parameters, where the outputs change by their derivative alone."""

from collections.abc import Callable

import numpy as np

from kpflow_dyn._arrays import Array, Random, Rows, array_namespace, device, eps_of, to_numpy
from kpflow_dyn._arrays.complex_numbers import by_name, vector_of
from kpflow_dyn._arrays.dots import gram
from kpflow_dyn._backend import Values, backend_for
from kpflow_dyn._learning.decay import COLUMNS, TOLERANCE
from kpflow_dyn._spaces.operators import GramOperator
from kpflow_dyn._spaces.rows import on_rows
from kpflow_dyn.solvers._counted import Counted
from kpflow_dyn.solvers._integration import Integration
from kpflow_dyn.solvers._krylov import Krylov
from kpflow_dyn.solvers._landscape import Piece, Point
from kpflow_dyn.solvers._orthogonalise import no_rows

RTOL_FROZEN = 1e-2  # of the gradient flow of a linearised model
HORIZON = 1e12  # times of the fastest direction behind which nothing is looked for: later is never
STILL = 0.01  # part of what is followed that may still be lost where nothing more happens
STRIDE = 0.5  # of the time so far, for a step between whose ends other quantities are interpolated
MOST = 4000  # gradients of a run; beyond, what comes later is not known


class LinearisedObjective:
    """L(y + J delta) as a landscape for `Integration`: the kernel J J* stays as it is, the loss is the whole one.

    Its Hessian is J* h J with the Hessian h of L in the outputs: the generalised Gauss-Newton matrix.

    Args:
        kernel: J J*; delta are its factor's arguments, those of an optimiser's metric where it has one.
        y: the outputs.
        loss: of outputs, y -> number of shape ().
        values: the parameters at delta = 0 by name, where they matter, as to weight decay.
        order: which of their entries the kernel's factor takes at each place; as they are when None.

    Attributes:
        start: the parameters at delta = 0.
    """

    def __init__(
        self,
        kernel: GramOperator,
        y: Array,
        loss: Callable[[Array], Array],
        values: Values | None = None,
        order: np.ndarray | None = None,
    ) -> None:
        self._space = space = kernel.domain
        self._push, self._pull = on_rows(kernel.factor), on_rows(kernel.factor.T)
        self._outputs = space.to_euclidean(y).reshape((-1,))
        backend = backend_for(y, "y", "[trial, time, out]")
        self._derivatives = backend.objectives.Derivatives(
            lambda rows, _scheme: loss(space.from_euclidean(rows.reshape(space.shape)))
        )
        changes = kernel.factor.domain
        zeros = array_namespace(y).zeros(changes.size, dtype=changes.dtype, device=device(y))
        self._like = {"theta": zeros} if values is None else values
        self.start = self.theta(self._like)
        if order is not None:
            self._push, self._pull = _reordered(self._push, self._pull, order, y)

    def __call__(self, theta: Array) -> Point:
        """The loss there."""
        y = self._moved(theta)

        def hessian(rows: Array) -> Array:
            return self._pull(self._derivatives.hessian(y, None)(self._push(rows)))

        return Point(theta, *self._around(theta), hessian, self._around)

    def theta(self, values: Values) -> Array:
        """All parameters [n] that have these values."""
        return vector_of(values.values())

    def outputs(self, theta: Array) -> Array:
        """y + J delta, in its own shape."""
        return self._space.from_euclidean(self._moved(theta).reshape(self._space.shape))

    def values(self, theta: Array) -> Values:
        """The parameters by name."""
        return by_name(theta, self._like)

    def _around(self, theta: Array) -> tuple[float, Array]:
        loss, gradient = self._derivatives.gradient(self._moved(theta), None)
        return loss, self._pull(gradient[None])[0]

    def _moved(self, theta: Array) -> Array:
        return self._outputs + self._push((theta - self.start)[None])[0]


class LongRun(Integration):
    """The gradient flow of a linearised loss, until all that is asked for has happened, or is known never to happen.

    The gradient of a convex loss only shrinks along its flow. So from now on to a time T the loss falls by at most
    |grad L|^2 (T - now): where this is next to nothing, up to the horizon, it stays as it is.

    Args:
        objective: the loss.
        fastest: its largest rate, the unit of the horizon.
        convex: whether it is known to be convex.
        enough: whether all that is asked for has happened at a point.
        smallest: part of the first loss that matters.
    """

    def __init__(
        self,
        objective: LinearisedObjective,
        fastest: float,
        convex: bool,
        enough: Callable[[Point], bool],
        smallest: float,
    ) -> None:
        super().__init__(objective, objective.start, HORIZON / fastest, None, RTOL_FROZEN)
        self._convex, self._enough = convex, enough
        self._noticed = STILL * smallest * self.point.loss
        self._found = False

    def advance(self) -> Piece:
        """Take a step, not longer than a part of the time so far: the span ends behind it for a moment."""
        whole, self.span = self.span, min((1 + STRIDE) * self.time or self.span, self.span)
        piece, self.span = super().advance(), whole
        self._found = self._enough(self.point)
        return piece

    @property
    def finished(self) -> bool:
        """Whether nothing more is to be found, or not at a bearable price."""
        return self._found or self.settled or self.costs.total > MOST

    @property
    def settled(self) -> bool:
        """Whether nothing more happens before the horizon."""
        left = self.span - self.time
        return left <= 0 or (self._convex and -self.slope * left < self._noticed)


def fastest_rate(objective: LinearisedObjective) -> float:
    """The largest eigenvalue of J* h J at the start: descent is stable below a learning rate of 2 over it."""
    return float(spectrum(objective(objective.start))[0].max())


def _reordered(push: Rows, pull: Rows, order: np.ndarray, like: Array) -> tuple[Rows, Rows]:
    """The same maps of changes whose entries stand in another order."""
    index = backend_for(like, "y", "[trial, time, out]").transforms.index
    there, back = index(order, like), index(np.argsort(order), like)
    return lambda rows: push(rows[:, there]), lambda rows: pull(rows)[:, back]


def spectrum(point: Point) -> tuple[np.ndarray, np.ndarray, int]:
    """Rates [k] of J* h J, among them the largest, the parts [k] of the loss at them to second order, applications.

    A part is c^2 / (2 rate) with the gradient's coordinate c along a Ritz vector.
    """
    assert point.hessian is not None
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
