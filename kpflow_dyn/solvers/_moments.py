"""The results of trace estimators: unbiased means of a few moments, such as tr A and |A|_F^2, and their covariance.

There are four kinds of samples, each with its own unbiased estimate of the covariance of their mean.

- Independent samples h_i: cov(mean h) = S / n, with S the sample covariance.
- Samples h_ij of all pairs of n independent groups: E[h_ij h_kl] - (E h)^2 over pairs. The mean of h_ij h_kl over
  disjoint pairs estimates (E h)^2.
- Sums over independent strata, each with a few samples of its own; the sum over pairs h_gi,kj of all strata g and k has
  the noise 4 var(mean h_gi over all others) of first order, and that of each single pair of second order.
- Exchangeable samples (XTrace): probe i tests a basis that all other probes built, so that E[h_i | others] is the
  truth. Let h_ij be h_i with a basis built without probe j as well. Then

      cov(mean h) = S / n + E[(h_i - h_ij) (h_j - h_ji)]

  The second term is there because probe j helped to build the basis of sample i, and probe i that of sample j. The
  usual std / sqrt(n) leaves it out, and is too small by half for spectra that decay fast.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from kpflow_dyn._shown import Row, Shown, number, with_error

LEAST_SAMPLES = 8

Function = Callable[..., float]


@dataclass(frozen=True, repr=False)
class Estimate(Shown):
    """A number that says how good it is; `float(estimate)` is its value, and f"{estimate:.2f}" formats it.

    Attributes:
        value: unbiased, up to terms of second order in the standard error for ratios and roots.
        stderr: standard error; value +- 1.96 stderr covers the truth in about 95% of runs. 0 where exact.
        applications: how many applications to one vector it took, one of J and one of J* counting as one of J J*.
        method: how it was found.

    Example as `solvers.Hutchinson`.
    """

    value: float
    stderr: float
    applications: int
    method: str

    def __float__(self) -> float:
        return self.value

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if spec else str(self)

    def _shown(self) -> tuple[str, list[Row]]:
        if self.stderr == 0 and self.method.startswith("exact"):
            return f"{number(self.value)}, exact", []
        return f"{with_error(self.value, self.stderr)} ({self.applications} applications, {self.method})", []


@dataclass(frozen=True)
class Moments:
    """Estimated moments; the first two are tr A and |A|_F^2.

    Attributes:
        means: [moment].
        covariance: of the means [moment, moment].
        count: how many samples or groups the covariance comes from; 0 for exact moments.
        applications: how many applications of A to one vector it took.
        method: how they were found.
        floor: relative round-off, the least relative error that is reported.

    Raises:
        ValueError: moments that are not finite, or a square that is zero where the trace is not.

    Example as `solvers.Hutchinson`.
    """

    means: np.ndarray
    covariance: np.ndarray
    count: int
    applications: int
    method: str
    floor: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.means).all() and np.isfinite(self.covariance).all()):
            raise ValueError(
                f"the moments {np.asarray(self.means)} are not finite: the operator gave NaN or inf, or its squares "
                "leave the range of float64; look at its inputs and weights, or divide it by a power of two"
            )
        if not self.count and len(self.means) == 2 and self.means[0] and not self.means[1]:
            raise ValueError(
                f"tr A is {self.means[0]:.3g} and |A|_F^2 is zero: squares of the operator are below what float64 "
                "holds; multiply it by a power of two"
            )

    @property
    def trace(self) -> Estimate:
        """tr A."""
        return self.estimate(lambda trace, *_: trace)

    @property
    def norm(self) -> Estimate:
        """|A|_F."""
        return self.estimate(lambda _trace, square, *_: max(square, 0.0) ** 0.5)

    @property
    def effective_rank(self) -> Estimate:
        """(tr A)^2 / |A|_F^2, the effective rank of a positive semi-definite A; 0 for the zero operator."""
        return self.estimate(lambda trace, square, *_: trace**2 / square if square > 0 else 0.0)

    def estimate(self, of: Function) -> Estimate:
        """A function of the moments, less its bias of second order, with its standard error.

        Both come from the changes of the function along the standard deviations of the means. The error is widened by
        Student's factor, so that value +- 1.96 stderr covers 95% of runs with few samples too.
        """
        value = float(of(*self.means))
        if not self.count:
            return Estimate(value, 0.0, self.applications, self.method)
        steps = _root(self.covariance)
        ends = np.array([[of(*(self.means + sign * step)) for sign in (1, -1)] for step in steps])
        spread = float(np.sqrt(np.sum((ends[:, 0] - ends[:, 1]) ** 2))) / 2
        bias = float(np.sum(ends.sum(1) / 2 - value))
        stderr = max(student(self.count) * spread, self.floor * abs(value))
        return Estimate(value - bias, stderr, self.applications, self.method)


def student(count: int) -> float:
    """The factor by which to widen a standard error from few samples, so that 1.96 of it cover 95% of runs."""
    return float(stdtrit(count - 1, 0.975)) / 1.96


def check_samples(samples: int) -> None:
    """Raise where there are too few samples for an error bar."""
    if samples < LEAST_SAMPLES:
        raise ValueError(f"samples = {samples} is too few for an error bar; give at least {LEAST_SAMPLES}")


def exact(means: np.ndarray, applications: int, method: str) -> Moments:
    """Known moments."""
    return Moments(means, np.zeros((len(means), len(means))), 0, applications, method, 0.0)


def of_samples(samples: np.ndarray, applications: int, method: str, eps: float) -> Moments:
    """Means of independent samples [moment, sample]."""
    return Moments(samples.mean(1), *_spread(samples), applications, method, 10 * eps)


def of_strata(samples: np.ndarray, applications: int, method: str, eps: float) -> Moments:
    """The mean over samples [stratum, sample] of the sum over independent strata.

    The variances of many strata add up, so that a few samples tell the error. Its degrees of freedom are those of
    Welch and Satterthwaite.
    """
    variances = samples.var(1, ddof=1) / samples.shape[1]
    means, covariance = samples.sum(0).mean(keepdims=True), np.full((1, 1), variances.sum())
    count = 1 + int(_freedom(variances, samples.shape[1]))
    return Moments(means, covariance, count, applications, method, 10 * eps)


def of_pairs(pairs: np.ndarray, applications: int, method: str, eps: float) -> Moments:
    """Means of symmetric [moment, group, group] over pairs of different groups, of which there are four or more.

    The covariance is at least that of products of independent noise.
    """
    n = pairs.shape[1]
    different = ~np.eye(n, dtype=bool)
    means = (pairs * different).sum((1, 2)) / (n * (n - 1))
    centred = (pairs - means[:, None, None]) * different
    sums, flat = centred.sum(2), centred.reshape(len(pairs), -1)
    rows, entries = sums @ sums.T, flat @ flat.T
    covariance = (2 * rows + _positive(2 * rows - 2 * entries)) / (n * (n - 1) * (n - 2) * (n - 3))
    return Moments(means, covariance, n, applications, method, 10 * eps)


def of_pairs_of_strata(samples: np.ndarray, pairs: np.ndarray, applications: int, method: str, eps: float) -> Moments:
    """Two sums over strata: of the means of samples [g, i], and of those of symmetric pairs [g, i, k, j].

    Pairs are of independent g, i and k, j; those of a sample with itself are not used.
    """
    groups, n = samples.shape
    own = np.eye(groups)[:, None, :, None] > 0
    weights = np.where(own, ~np.eye(n, dtype=bool)[None, :, None] / (n - 1), 1 / n)
    sums = np.stack([samples, (pairs * weights).sum((2, 3))])
    centred = (sums - sums.mean(2, keepdims=True)) * np.array([1, 2])[:, None, None]
    variances = np.einsum("agi,bgi->gab", centred, centred) / (n * (n - 1))
    single = pairs - pairs.mean(1, keepdims=True) - pairs.mean(3, keepdims=True) + pairs.mean((1, 3), keepdims=True)
    noise = np.diag([0, 2 * ((single * ~own) ** 2).sum() / (n * (n - 1)) ** 2])  # the variances hold it twice
    covariance = _positive(variances.sum(0) - 2 * noise) + noise
    freedom = min(_freedom(variances[:, i, i], n) for i in range(2))
    return Moments(sums.sum(1).mean(1), covariance, 1 + int(freedom), applications, method, 10 * eps)


def of_exchangeable(samples: np.ndarray, without: np.ndarray, applications: int, method: str, eps: float) -> Moments:
    """Means of exchangeable samples [moment, i]; without [moment, i, j] is sample i from a basis without probe j."""
    covariance, count = _spread(samples)
    met = (samples[:, :, None] - without) * ~np.eye(count, dtype=bool)
    shared = np.einsum("aij,bji->ab", met, met) / (count * (count - 1))
    return Moments(samples.mean(1), covariance + _positive(shared), count, applications, method, 10 * eps)


def _freedom(variances: np.ndarray, samples: int) -> float:
    """The degrees of freedom of a sum of variances of strata, each from this number of samples."""
    squares = (variances**2).sum()
    return (samples - 1) * (variances.sum() ** 2 / squares if squares else 1.0)


def _spread(samples: np.ndarray) -> tuple[np.ndarray, int]:
    """The covariance of the mean of samples [moment, sample], and how many there are."""
    centred, n = samples - samples.mean(1, keepdims=True), samples.shape[1]
    return centred @ centred.T / (n * (n - 1)), n


def _scaled_eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors of matrix / (scale scale^T), as moments have very different sizes; and the scale."""
    scale = np.sqrt(np.abs(np.diag(matrix)))
    scale = np.where(scale > 0, scale, 1.0)
    values, vectors = np.linalg.eigh(matrix / np.outer(scale, scale))
    return values, vectors, scale


def _positive(matrix: np.ndarray) -> np.ndarray:
    """The positive part of a symmetric matrix."""
    values, vectors, scale = _scaled_eigh((matrix + matrix.T) / 2)
    rows = vectors * scale[:, None]
    return (rows * np.maximum(values, 0)) @ rows.T


def _root(covariance: np.ndarray) -> np.ndarray:
    """Rows whose outer products add up to the covariance."""
    values, vectors, scale = _scaled_eigh(covariance)
    return (vectors * scale[:, None] * np.sqrt(np.maximum(values, 0))).T
