"""The search for fixed and slow points of a recurrent network or a field under a constant input."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from kpflow_dyn._arrays import full_precision, to_numpy
from kpflow_dyn._progress import Progress, stages
from kpflow_dyn.dynamics._missing import Verdict, crowded, judged, on_a_continuum, returning, surroundings
from kpflow_dyn.dynamics._neutral import neutral
from kpflow_dyn.dynamics._points import FixedPoints
from kpflow_dyn.dynamics._search import Search, merged, size
from kpflow_dyn.dynamics._starts import Draw, Posed, constant_inputs, posed

AUTO, FIRST, MAX_STARTS, FURTHER = "auto", 256, 4096, 100
SLOW, UNIQUE = 1e-8, 1e-3  # in the search's own units


def fixed_points(
    model: Any,
    x: Any = None,
    starts: Any = AUTO,
    *,
    noise: float = 0.1,
    slow: float | None = None,
    unique: float | None = None,
    iterations: int = 300,
    max_starts: int = MAX_STARTS,
    seed: int = 0,
    progress: bool | Progress = False,
) -> FixedPoints:
    """Find the states that stay where they are, or almost, under a constant input x.

        q(z) = 1/2 |F(z, x) - z|^2,  of a field 1/2 |f(t_0, z, x)|^2

    is minimised from many starts at once by the method of Levenberg and Marquardt, with exact Jacobians. Results with q
    <= slow are kept, and polished by Newton's method. Repetitions are dropped, and so are results that ran away (beyond
    ten times the largest start, or ten times a state whose entries are all the largest entry of the states, and beyond
    the box of (3) below). A continuum, such as a line attractor, gives one point for each different place that starts
    lead to. The units of states and time do not matter: the search is scaled by the largest entry of the states, and
    by the usual speed and slope of a field.

    Few starts lead to unstable points. So starts are drawn in rounds, each as large as all rounds before. The rounds
    end when the index sum is 1, the last round found no new point, and nearly every point was found more than once; or
    at `max_starts`. `FixedPoints.complete` and `.missing` say which. From the second round on there are five kinds of
    starts:

    (1) as in the first round; (2) from a Gaussian with the covariance of the states, but wider; (3) anywhere in a box
    on whose faces states were seen to move inwards, because the given states may all be at rest; (4) sums z_i + z_j -
    z_k of points that were found; (5) near such points, with these deflated, so that the search ends at another point.

    Args:
        model: a DiscreteProblem, an ODEProblem or a Solution of either. Or a cell as a DiscreteProblem takes it; then
            give `starts`.
        x: the constant input [input], or one for each of a known number of starts [n, input]; zeros when None.
        starts: where to start. "auto" draws starts in rounds. A number draws this many from the solution's states, and
            from means of two, four and eight of them: unstable points lie between the states that are approached. Or
            give the states [n, unit].
        noise: the standard deviation of the noise on drawn starts, relative to that of the states themselves.
        slow: the largest q of a point that is kept. A local minimum with a larger q is not a point. By default
            1e-8 z^2, where z is the largest entry of the states and starts; of a field 1e-8 (z k)^2, k its usual rate.
        unique: points nearer to each other than this are one point. The distance counts both states and inputs. By
            default a thousandth of the largest entry, of states and of inputs.
        iterations: the largest number of steps.
        max_starts: the largest number of starts, if `starts` is "auto".
        seed: for drawing the starts and their noise. The same seed finds the same points.
        progress: show on a terminal how many of `max_starts` starts were made; or a function that is called with it, as
            in `kp.analyze`.

    Raises:
        TypeError: a problem without dynamics.
        ValueError: starts or inputs of another width, or not finite; a start at which the Jacobian is NaN or inf; or
            options that are not positive.

    Warns:
        UserWarning: no start led to a point. The result is empty.
    Source: Sussillo, Barak, Neural Computation 25, 626 (2013); Golub, Sussillo, "FixedPointFinder", JOSS 3, 1003
    (2018); deflation: Farrell, Birkisson, Funke, SIAM J. Sci. Comput. 37, A2026 (2015).

    >>> import torch
    >>> import kpflow_dyn as kp
    >>> cell = torch.nn.RNNCell(1, 1, bias=False).double()
    >>> _ = cell.weight_hh.data.fill_(2.0)  # z = tanh(2 z)
    >>> found = kp.dynamics.fixed_points(cell, starts=torch.linspace(-1, 1, 20)[:, None].double())
    >>> [(round(float(z[0]), 4), bool(stable)) for z, stable in sorted(zip(found.xstar, found.is_stable))]
    [(-0.9575, True), (0.0, False), (0.9575, True)]
    >>> found.tried, int(found.index.sum()), found.missing  # of starts that are given, `complete` is None at best
    (20, 1, 'only starts as given were tried: starts="auto" also tries others')
    """
    for name, value in {"slow": slow, "unique": unique, "iterations": iterations, "max_starts": max_starts}.items():
        if value is not None and not 0 < value < np.inf:
            raise ValueError(f"{name} is {value!r}, expected a positive number")
    given = posed(model, x, starts)
    length = size(given.states, *([] if given.starts is None else [given.starts]))
    draw = Draw(given.states / length, noise, seed)
    if isinstance(starts, str) and x is not None and np.ndim(np.asarray(to_numpy(x))) > 1:
        raise ValueError(
            f"x has shape {np.shape(np.asarray(to_numpy(x)))}, one input for each start, and starts={AUTO!r} draws as "
            "many as it takes; give x [input], or starts as a number or as states [n, unit]"
        )
    first = draw.visited(_count(starts, max_starts)) if given.starts is None else given.starts / length
    with full_precision(given.like), given.problem.backend.models.left_alone(given.problem.model):
        finding = _Finding(given, x, first, length, slow, unique, iterations)
        with stages(progress) as show:
            while isinstance(starts, str) and finding.tried < max_starts:
                show("starts", finding.tried, max_starts)
                finding.look_on(draw, min(finding.tried, max_starts - finding.tried))
                if finding.verdict().complete is not False:
                    break
        found = finding.result()
    if not len(found):
        warnings.warn(
            f"none of {found.tried} starts came to a point with q <= {finding.q(finding.slow):g} (the least was "
            f"{finding.q(finding.ends.q.min()):.1e}) without running away; start elsewhere, allow more iterations, or "
            "raise slow",
            stacklevel=2,
        )
    return found


def _count(starts: Any, max_starts: int) -> int:
    """How many starts the first round has."""
    if isinstance(starts, str) and starts != AUTO:
        raise ValueError(f"starts is {starts!r}, expected {AUTO!r}, a number of starts, or states [n, unit]")
    count = min(FIRST, max_starts) if isinstance(starts, str) else int(starts)
    if count < 1:
        raise ValueError(f"starts is {count}, expected at least one start")
    return count


class _Finding:
    """All starts so far, the points that they led to, and how many a further round added; in the search's units."""

    def __init__(
        self,
        given: Posed,
        x: Any,
        z: np.ndarray,
        length: float,
        slow: float | None,
        unique: float | None,
        iterations: int,
    ) -> None:
        self.x, self.states = constant_inputs(given.problem, x, len(z)), given.states
        self.search = Search(given.problem, self.x, z, given.like, length)
        self.search.begin(self.x, z)
        self.slow = SLOW if slow is None else slow / self.search.units.speed**2
        self.unique = UNIQUE if unique is None else unique / length
        self.of_inputs = size(self.x) if unique is None else length
        self.iterations = iterations
        self.new: int | None = None
        self.box = returning(self.search, self.x, self._seen())
        self.ends = self.search.ends(self.x, z, iterations)
        self._sort_out()

    def _sort_out(self) -> None:
        (x, _, z, q), unique = self.ends, self.unique
        self.kept = (q <= self.slow) & self.ends.near(self.box)
        x = x / self.of_inputs
        self.numbers, self.counts = merged(x, z, q, self.kept.astype(int), unique)
        points = self.search.polished(self.ends.x[self.numbers], z[self.numbers], unique)
        x, q = x[self.numbers], (points.r**2).sum(1) / 2
        kept, self.counts = merged(x, points.z, q, self.counts, np.maximum(unique, points.errors))
        self.numbers, self.points = self.numbers[kept], points.some(kept)
        self.box = returning(self.search, self.x, self._places())

    def _alike(self) -> bool:
        """Whether all inputs are the same."""
        return bool((self.x == self.x[0]).all())

    def _seen(self) -> np.ndarray:
        """The states [n, unit]."""
        return self.states.reshape(-1, self.states.shape[2]) / self.search.units.length

    def _places(self) -> np.ndarray:
        """The fixed points and the states [n, unit]."""
        return np.concatenate([self.points.z[self.points.isolated], self._seen()])

    @property
    def tried(self) -> int:
        return len(self.ends.z)

    def look_on(self, draw: Draw, count: int) -> None:
        """From further starts of all kinds; slow points are only looked for where the states are."""
        known, few, eps = self.points.z[self.points.isolated], min(self.iterations, FURTHER), self.search.eps
        quarter, others = count // 4, []
        if quarter:
            anywhere = quarter // 2 if len(known) > 1 else 2 * quarter + quarter // 2
            box = surroundings(self._places()) if self.box is None else self.box
            others += [draw.around(quarter - quarter // 2), draw.inside(anywhere, box)]
        if quarter and len(known) > 1:
            others.append(draw.combined(quarter, known))
            near = draw.near(quarter, known)
            self.ends += self.search.others(self._inputs(quarter), near, few, known, draw.deviation(known)).fixed(eps)
        visited = draw.visited(count - 3 * quarter)
        self.ends += self.search.ends(self._inputs(len(visited)), visited, few)
        if others:
            z = np.concatenate(others)
            self.ends += self.search.ends(self._inputs(len(z)), z, few).fixed(eps)
        self._sort_out()
        found = self.points.z[self.points.isolated]
        self.new = int((np.linalg.norm(found[:, None] - known, axis=2) > self.unique).all(1).sum())

    def _inputs(self, count: int) -> np.ndarray:
        return np.repeat(self.x[:1], count, 0)

    def verdict(self) -> Verdict:
        """What is missing, as far as can be told."""
        bounded = self.box is not None if self._alike() else None
        near = crowded(self.search, self.ends.some(self.kept), self.points, self.unique) if self._alike() else 0
        line = on_a_continuum(self.search, self.x[0], self.points) if self._alike() else False
        return judged(self.points, self.counts, self.tried, self.new, bounded, near, line)

    def q(self, of_search: Any) -> Any:
        """In the model's units."""
        return of_search * self.search.units.speed**2

    def result(self) -> FixedPoints:
        """The points with their eigenvalues, and the verdict, in the model's units."""
        (z, r, J, dq, _), continuous, units = self.points, self.search.continuous, self.search.units
        values, vectors = _eigen(J if continuous else J + np.eye(z.shape[1]), continuous)
        still, verdict = neutral(self.points, values, vectors, continuous), self.verdict()
        decays = values.real < 0 if continuous else np.abs(values) < 1
        xstar, change = units.length * z, units.speed * r
        return FixedPoints(
            xstar=xstar,
            x_init=units.length * self.ends.start[self.numbers].astype(np.float64),
            F_xstar=change if continuous else change + xstar,
            qstar=self.q((r**2).sum(1) / 2),
            dq=self.q(dq),
            J_xstar=units.rate * J if continuous else J + np.eye(z.shape[1]),
            eigval_J_xstar=units.rate * values,
            eigvec_J_xstar=vectors,
            is_stable=np.all(decays & ~still, axis=1),
            is_fixed=self.points.fixed,
            inputs=self.ends.x[self.numbers].astype(np.float64),
            starts=self.counts,
            is_neutral=still,
            is_degenerate=self.points.degenerate,
            continuous=continuous,
            states=self.states,
            tried=self.tried,
            complete=verdict.complete,
            missing=verdict.missing,
        )


def _eigen(J: np.ndarray, continuous: bool) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [n, unit] and eigenvectors [n, unit, eigenvalue], the slowest to decay first."""
    values, vectors = (found.astype(complex) for found in np.linalg.eig(J))
    order = np.argsort(-(np.real(values) if continuous else np.abs(values)), axis=1, kind="stable")
    return np.take_along_axis(values, order, 1), np.take_along_axis(vectors, order[:, None], 2)
