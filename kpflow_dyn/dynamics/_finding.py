"""The search for fixed and slow points of a recurrent network or a field under a constant input."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from kpflow_dyn._arrays import full_precision, to_numpy
from kpflow_dyn._progress import Progress, stages
from kpflow_dyn.dynamics._missing import Verdict, judged, returning, surroundings
from kpflow_dyn.dynamics._points import FixedPoints
from kpflow_dyn.dynamics._search import Search, merged
from kpflow_dyn.dynamics._starts import Draw, Posed, constant_inputs, posed

AUTO, FIRST, MAX_STARTS, FURTHER = "auto", 256, 4096, 100


def fixed_points(
    model: Any,
    x: Any = None,
    starts: Any = AUTO,
    *,
    noise: float = 0.1,
    slow: float = 1e-8,
    unique: float = 1e-3,
    iterations: int = 300,
    max_starts: int = MAX_STARTS,
    seed: int = 0,
    progress: bool | Progress = False,
) -> FixedPoints:
    """Find the states that stay where they are, or almost, under a constant input x.

        q(z) = 1/2 |F(z, x) - z|^2,  of a field 1/2 |f(t_0, z, x)|^2

    is minimised from many starts at once by the method of Levenberg and Marquardt, with exact Jacobians. Results with q
    <= slow are kept, and polished by Newton's method. Repetitions are dropped, and so are results that ran away (beyond
    ten times the largest start, or ten times a state of ones). A continuum, such as a line attractor, gives one point
    for each different place that starts lead to.

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
        slow: the largest q of a point that is kept. A local minimum with a larger q is not a point.
        unique: points nearer to each other than this are one point. The distance counts both states and inputs.
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
        if not 0 < value < np.inf:
            raise ValueError(f"{name} is {value!r}, expected a positive number")
    given = posed(model, x, starts)
    draw = Draw(given.states, noise, seed)
    if isinstance(starts, str) and x is not None and np.ndim(np.asarray(to_numpy(x))) > 1:
        raise ValueError(
            f"x has shape {np.shape(np.asarray(to_numpy(x)))}, one input for each start, and starts={AUTO!r} draws as "
            "many as it takes; give x [input], or starts as a number or as states [n, unit]"
        )
    first = draw.visited(_count(starts, max_starts)) if given.starts is None else given.starts
    with full_precision(given.like), given.problem.backend.models.left_alone(given.problem.model):
        finding = _Finding(given, x, first, slow, unique, iterations)
        with stages(progress) as show:
            while isinstance(starts, str) and finding.tried < max_starts:
                show("starts", finding.tried, max_starts)
                finding.look_on(draw, min(finding.tried, max_starts - finding.tried))
                if finding.verdict().complete is not False:
                    break
        found = finding.result()
    if not len(found):
        warnings.warn(
            f"none of {found.tried} starts came to a point with q <= {slow:g} (the least was "
            f"{finding.ends.q.min():.1e}) without running away; start elsewhere, allow more iterations, or raise slow",
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
    """All starts so far, the points that they led to, and how many a further round added."""

    def __init__(self, given: Posed, x: Any, z: np.ndarray, slow: float, unique: float, iterations: int) -> None:
        self.x, self.states = constant_inputs(given.problem, x, len(z)), given.states
        self.slow, self.unique, self.iterations = slow, unique, iterations
        self.search = Search(given.problem, self.x, z, given.like)
        self.search.check_starts(self.x, z)
        self.ends = self.search.ends(self.x, z, iterations)
        self._sort_out()
        self.new: int | None = None

    def _sort_out(self) -> None:
        self.numbers, self.counts = self.ends.distinct(self.slow, self.unique)
        x = self.ends.x[self.numbers]
        points = self.search.polished(x, self.ends.z[self.numbers], self.unique)
        kept, self.counts = merged(x, points.z, (points.r**2).sum(1) / 2, self.counts, self.unique)
        self.numbers, self.points = self.numbers[kept], points.some(kept)
        self.box = returning(self.search, self.x[0], self._places()) if self._alike() else None

    def _alike(self) -> bool:
        """Whether all inputs are the same."""
        return bool((self.x == self.x[0]).all())

    def _places(self) -> np.ndarray:
        """The fixed points and the states [n, unit]."""
        return np.concatenate([self.points.z[self.points.isolated], self.states.reshape(-1, self.ends.z.shape[1])])

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
        return judged(self.points, self.counts, self.tried, self.new, bounded)

    def result(self) -> FixedPoints:
        """The points with their eigenvalues, and the verdict."""
        (z, r, J, dq, _), continuous = self.points, self.search.continuous
        J = J if continuous else J + np.eye(z.shape[1])
        values, vectors = (found.astype(complex) for found in np.linalg.eig(J))
        speed = np.real(values) if continuous else np.abs(values)
        order = np.argsort(-speed, axis=1, kind="stable")
        verdict = self.verdict()
        return FixedPoints(
            xstar=z,
            x_init=self.ends.start[self.numbers].astype(np.float64),
            F_xstar=r if continuous else r + z,
            qstar=(r**2).sum(1) / 2,
            dq=dq,
            J_xstar=J,
            eigval_J_xstar=np.take_along_axis(values, order, 1),
            eigvec_J_xstar=np.take_along_axis(vectors, order[:, None], 2),
            is_stable=speed[np.arange(len(z)), order[:, 0]] < (0 if continuous else 1),
            is_fixed=self.points.fixed,
            inputs=self.ends.x[self.numbers].astype(np.float64),
            starts=self.counts,
            continuous=continuous,
            states=self.states,
            tried=self.tried,
            complete=verdict.complete,
            missing=verdict.missing,
        )
