"""The mean of the kernels of several Brownian paths, and how well so many paths determine it.

    A = mean_p J_p J_p*,     J_p = dS_p / dtheta of all trials on their p-th paths

A is G G* with G (theta_1, ..., theta_n) = n^{-1/2} sum_p J_p theta_p. Each path is an independent sample of J_p J_p*,
so that functions of the mean have standard errors over paths, as those of estimates from independent groups of probes.
"""

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, device, eps_of, to_numpy
from kpflow_dyn._arrays.dots import dots
from kpflow_dyn._arrays.memory import rows_at_once
from kpflow_dyn._flows.flow import Flow, Output
from kpflow_dyn._numbers.reductions import Keep, MeanOfSamples, PartialTrace, as_matrices, names_of
from kpflow_dyn._problems.stochastic import SDEProblem
from kpflow_dyn._spaces.operators import Operator
from kpflow_dyn._spaces.rows import CHEAP
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.solvers._moments import Moments, of_pairs

LEAST_PATHS, PROBES = 4, 40


class MeanNTK(MeanOfSamples):
    """mean_p J_p J_p* over the Brownian paths of each trial, on states [trial, time, unit]; see `mean_ntk`.

    As an operator it is the mean of the paths that there are, for `kp.eigs` and others. `kp.trace`,
    `kp.frobenius_norm`, `kp.effective_rank`, `kp.partial_trace` and `kp.modes` take its own methods, which say what
    that is worth as the mean over all paths; of fewer than four paths, or with an `alg` or `rtol`, they are of the mean
    of these paths, and their `method` says so.

    Attributes:
        paths: how many.

    Example as `mean_ntk`.
    """

    def __init__(self, factor: Operator, apart: Operator, paths: int) -> None:
        super().__init__(factor)
        self._of_paths, self.paths = apart, paths
        self.samples, self.has_errors = f"{paths} paths", paths >= LEAST_PATHS

    def moments(self, samples: int | None = None, seed: int | Random = 0) -> Moments:
        """tr A and |A|_F^2 of the mean A over all paths, with errors over those that there are.

        Of the squared norm products of different paths alone count: those of a path with itself would add its noise.
        `.trace`, `.norm` and `.effective_rank` are estimates with standard errors.

        Args:
            samples: random vectors behind the products; None for all unit vectors where these are few, else 40.
            seed: an int, or a `Random` to continue.

        Raises:
            ValueError: fewer than four paths.
        """
        self._check("an error bar")
        space = self.domain
        exact = samples is None and space.size <= CHEAP
        count = space.size if exact else samples or PROBES
        rows = _unit(space) if exact else Random(seed).normal((count, space.size), space.like)
        step = rows_at_once(max(self._of_paths.domain.size, self._of_paths.codomain.size), space.like)
        pairs = np.concatenate([self._pairs(rows[i : i + step]) for i in range(0, count, step)])
        whole = pairs.sum(0) if exact else pairs.mean(0)  # [moment, path, path]
        found = of_pairs(whole, count * self.paths, "pairs of paths", eps_of(space.like))
        if exact:
            return found
        means = np.stack([of_pairs(each, 1, "", 0.0).means for each in pairs], 1)
        covariance = found.covariance + np.cov(means) / count
        return Moments(found.means, covariance, found.count, found.applications, found.method, found.floor)

    def partial_trace(self, keep: Keep, samples: int | None = None, seed: int | Random = 0) -> PartialTrace:
        """The partial trace of the mean, whose `stderr` is over paths; its `groups` are those of single paths.

        So are the errors of `kp.modes`, `kp.trace` and `kp.effective_rank` of what is returned.

        Args:
            keep: the axes that are kept, as of `kp.partial_trace`.
            samples: random parameter changes for each path; None for all unit vectors where these are few, else 40.
            seed: an int, or a `Random` to continue.

        Raises:
            ValueError: fewer than four paths, or an unknown axis.
        """
        self._check("an error bar")
        names, space = names_of(keep), self.domain
        kept, axes = space.keep(names), space.positions(names)
        parameters = self._of_paths.domain.shape[-1]
        exact = samples is None and parameters <= CHEAP
        count, rng = parameters if exact else samples or PROBES, Random(seed)
        groups: list = [0.0] * self.paths
        step = rows_at_once(max(self._of_paths.domain.size, self._of_paths.codomain.size), space.like)
        for first in range(0, count, step):
            for path, images in enumerate(self._images(range(first, min(first + step, count)), names, rng, exact)):
                left = array_namespace(images).permute_dims(as_matrices(images, space, axes), (1, 2, 0))
                left = left.reshape((left.shape[0], -1))
                groups[path] = groups[path] + dots(left, left) / (1 if exact else count)
        return PartialTrace(sum(groups) / self.paths, groups, kept, True, count * self.paths)

    def _images(self, numbers: range, names: tuple[str, ...], rng: Random, exact: bool) -> list[Array]:
        """For each path images of vectors of parameters, in plain coordinates [b, size]."""
        domain, space = self._of_paths.domain, self.domain
        xp, (trials, parameters) = array_namespace(space.like), domain.shape
        if exact:
            one = xp.eye(parameters, dtype=space.dtype, device=device(space.like))[numbers.start : numbers.stop, None]
            theta = xp.broadcast_to(one, (len(numbers), *domain.shape))
        elif "trial" in names:  # of which one theta moves all
            drawn = rng.normal((len(numbers), 1, self.paths, parameters), space.like)
            theta = xp.broadcast_to(drawn, (len(numbers), trials // self.paths, self.paths, parameters))
        else:
            theta = rng.normal((len(numbers), *domain.shape), space.like)
        images = self._of_paths.mv(theta.reshape((len(numbers), *domain.shape)))
        images = images.reshape((len(numbers), -1, self.paths, *images.shape[2:]))
        return [space.to_euclidean(images[:, :, path]).reshape((len(numbers), -1)) for path in range(self.paths)]

    def _pairs(self, rows: Array) -> np.ndarray:
        """Of x [b, size] in plain coordinates, (<x, A_p x> + <x, A_q x>) / 2 and <A_p x, A_q x> [b, 2, path, path]."""
        space, xp, b = self.domain, array_namespace(rows), rows.shape[0]
        q = space.from_euclidean(rows.reshape((b, *space.shape)))
        back = _sum_of_trials(self._of_paths.T.mv(_repeated(q, self.paths)), self.paths)  # [b, path, parameter]
        images = self._of_paths.mv(_of_all_trials(back, self._of_paths.domain.shape[0]))
        images = images.reshape((b, -1, self.paths, *images.shape[2:]))
        found = xp.stack([space.to_euclidean(images[:, :, path]).reshape((b, -1)) for path in range(self.paths)])
        found = to_numpy(found).astype(np.float64)  # [path, b, size]
        traces = np.einsum("pbi,bi->bp", found, to_numpy(rows))
        products = np.einsum("pbi,qbi->bpq", found, found)
        return np.stack([(traces[:, :, None] + traces[:, None]) / 2, products], 1)

    def _check(self, what: str) -> None:
        if not self.has_errors:
            raise ValueError(
                f"{what} over paths needs at least {LEAST_PATHS} of them, got {self.paths}; give more paths="
            )


def mean_ntk(flow: Flow | Output) -> MeanNTK:
    """The mean over Brownian paths of the NTK, on states [trial, time, unit] of the trials themselves, or on a readout.

        A = mean_p J_p J_p*,    J_p = dS_p / dtheta of all trials, each on its p-th path

    Trials are coupled where the same numbered paths are: of independent paths, that part is the kernel of the mean J.

    Args:
        flow: of the solution of an `SDEProblem(..., paths=n)`, or its `flow.output(C)`, whose readout may learn too.

    Raises:
        TypeError: a flow of another problem.
        ValueError: a flow whose `where` leaves out different places of the paths of a trial.
    Source: docs/theory.md, "One constraint, one kernel".

    >>> import torch, kpflow_dyn as kp
    >>> f, g = kp.models.MLPField(3, 8), kp.models.MLPField(3, 8)
    >>> problem = kp.SDEProblem(f, g, torch.randn(2, 3), [0.0, 0.5, 1.0], paths=8)
    >>> mean = kp.mean_ntk(kp.linearize(kp.solve(problem)))
    >>> mean.domain.shape, kp.eigs(mean, 2).values.shape
    ((2, 3, 3), torch.Size([2]))
    >>> rank, modes = mean.moments().effective_rank, kp.modes(mean.partial_trace("time"), k=2)
    >>> rank.stderr > 0, modes.stderr.shape
    (True, torch.Size([2]))
    """
    of_states = flow.flow if isinstance(flow, Output) else flow
    problem = of_states.solution.problem if isinstance(of_states, Flow) else None
    apart = flow.ntk.apart if isinstance(problem, SDEProblem) else None
    if not isinstance(problem, SDEProblem) or apart is None:
        raise TypeError(
            "mean_ntk takes the flow of an SDEProblem with paths=, or a readout of it, got "
            f"{type(flow).__name__ if problem is None else f'one of {type(problem).__name__}'}"
        )
    paths, whole = problem.paths, flow.ntk.domain
    space = _of_one_path(whole, paths)
    parameters = Space(("path", "parameter"), (paths, apart.domain.shape[1]), whole.like)

    def forward(theta: Array) -> Array:
        images = apart.mv(_of_all_trials(theta, whole.shape[0]))
        return images.reshape((len(images), -1, paths, *images.shape[2:])).sum(2) / paths**0.5

    def adjoint(q: Array) -> Array:
        return _sum_of_trials(apart.T.mv(_repeated(q, paths)), paths) / paths**0.5

    return MeanNTK(Operator(parameters, space, forward, adjoint), apart, paths)


def _of_one_path(whole: Space, paths: int) -> Space:
    """The space of the trials, of that of their paths."""

    def first(weights: Array | None) -> Array | None:
        if weights is None or weights.ndim < 3 or weights.shape[0] == 1:
            return weights
        found = weights.reshape((-1, paths, *weights.shape[1:]))
        if not bool((found == found[:, :1]).all()):
            raise ValueError("the paths of a trial have different weights or places that count; give them the same")
        return found[:, 0]

    shape = (whole.shape[0] // paths, *whole.shape[1:])
    like = whole.like[::paths] if whole.like.ndim == 3 else whole.like
    return Space(whole.axes, shape, like, first(whole.measure), first(whole.mask), whole.units, whole.times)


def _repeated(q: Array, paths: int) -> Array:
    """[probe, trial, ...] for each path of each trial."""
    xp = array_namespace(q)
    shape = (q.shape[0], q.shape[1], paths, *q.shape[2:])
    return xp.broadcast_to(q[:, :, None], shape).reshape((q.shape[0], q.shape[1] * paths, *q.shape[2:]))


def _sum_of_trials(theta: Array, paths: int) -> Array:
    """[b, trial * path, parameter] -> [b, path, parameter]."""
    return theta.reshape((theta.shape[0], -1, paths, theta.shape[-1])).sum(1)


def _of_all_trials(theta: Array, trials: int) -> Array:
    """[b, path, parameter] -> [b, trial * path, parameter], alike for all trials."""
    b, paths, parameters = theta.shape
    shape = (b, trials // paths, paths, parameters)
    return array_namespace(theta).broadcast_to(theta[:, None], shape).reshape((b, trials, parameters))


def _unit(space: Space) -> Array:
    return array_namespace(space.like).eye(space.size, dtype=space.dtype, device=device(space.like))
