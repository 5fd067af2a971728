"""Laws that recurrent weights are drawn from at the start, as objects that results can name.

"g" means different things in the literature. For n units:

    law                 g or rho is                     variance of an entry    spectral radius
    Gaussian(g)         sqrt(n) standard deviations     g^2 / n                 g for n -> infinity
    Orthogonal(g)       every singular value            g^2 / n                 g: all |eigenvalues| = g
    SpectralRadius(rho) the spectral radius             rho^2 / n, n -> inf.    rho for every n
    TorchDefault(g)     sqrt(n) times the bound         g^2 / (3 n)             g / sqrt(3) for n -> infinity
    Dale(g)             as in Gaussian, about a mean    g^2 / n, by columns     g for n -> infinity
    Planted(points, g)  of Gaussian, before planting    g^2 / n, before         not set by g

With n -> infinity a matrix of independent entries of variance v has the spectral radius sqrt(n v), whatever else is the
law of the entries (the circular law). That torch starts its recurrent cells with g / sqrt(3) = 0.58 is easy to miss.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, to_numpy
from kpflow_dyn.models._constants import Constants, at_least_zero, checked
from kpflow_dyn.tasks._data import check_count

Seed = int | np.random.Generator


@dataclass(frozen=True)
class Law(Constants):
    """What all laws share: a square matrix for a seed, and words for the results.

    A law of your own derives from it, is a frozen dataclass of numbers, and writes `draw` and `words`. `initialize`,
    `make_model` and `kp.analyze` also take any other object with `matrix(n, seed)`. A law that depends on the rest of
    the model has a method `weights(model, rng)` besides, which gives new values by the names of the parameters.

    >>> @dataclass(frozen=True)
    ... class Identity(Law):
    ...     g: float = 1.0
    ...     def draw(self, n, rng):
    ...         return self.g * np.eye(n)
    ...     def words(self):
    ...         return "g times the identity"
    >>> Identity(0.5).describe()
    'Identity(g=0.5): g times the identity'
    """

    def matrix(self, n: int, seed: Seed = 0) -> np.ndarray:
        """A draw [n, n] in float64; the same int gives the same matrix, a numpy Generator goes on."""
        check_count("n", n, 1)
        return self.draw(n, np.random.default_rng(seed))

    def describe(self) -> str:
        """The law with its options and in words, as results record it."""
        return f"{self!r}: {self.words()}"

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """A draw [n, n]."""
        raise NotImplementedError

    def words(self) -> str:
        """What it is, in a line."""
        raise NotImplementedError


@dataclass(frozen=True)
class Gaussian(Law):
    """Independent entries W_ij = g N(0, 1) / sqrt(n); the spectral radius tends to g as n grows.

    Args:
        g: the gain, >= 0. Without input, a leaky-current network with tanh is chaotic above 1.

    Raises:
        TypeError, ValueError: an option is not such a number.
    Source: Sompolinsky, Crisanti, Sommers, Phys. Rev. Lett. 61, 259 (1988).

    >>> Gaussian(g=1.5).describe()
    'Gaussian(g=1.5): entries N(0, g^2 / n), spectral radius about g'
    >>> Gaussian(g=1.5).matrix(400, seed=1).shape
    (400, 400)
    """

    g: float = at_least_zero(1.0)

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return self.g / math.sqrt(n) * rng.standard_normal((n, n))

    def words(self) -> str:
        return "entries N(0, g^2 / n), spectral radius about g"


@dataclass(frozen=True)
class Orthogonal(Law):
    """W = g Q with Q uniform (Haar) among the orthogonal matrices; all singular values and all |eigenvalues| are g.

    Args:
        g: the gain, >= 0.

    Raises as `Gaussian`.
    Source: Saxe, McClelland, Ganguli, ICLR (2014); the signs make Q uniform, Mezzadri, Notices AMS 54, 592 (2007).

    >>> W = Orthogonal(g=2.0).matrix(5)
    >>> np.allclose(W @ W.T, 4 * np.eye(5))
    True
    """

    g: float = at_least_zero(1.0)

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        Q, R = np.linalg.qr(rng.standard_normal((n, n)))
        return self.g * Q * np.sign(np.diag(R))

    def words(self) -> str:
        return "g times a Haar orthogonal matrix, every |eigenvalue| g"


@dataclass(frozen=True)
class SpectralRadius(Law):
    """W = rho G / max |eigenvalue of G| with G Gaussian: the spectral radius is rho exactly.

    Args:
        rho: the spectral radius, >= 0.

    Raises as `Gaussian`.
    Source: as reservoirs are scaled, Jaeger, GMD report 148 (2001).

    >>> abs(np.linalg.eigvals(SpectralRadius(rho=0.9).matrix(20))).max().round(12)
    np.float64(0.9)
    """

    rho: float = at_least_zero(1.0)

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        W = rng.standard_normal((n, n))
        return self.rho / np.abs(np.linalg.eigvals(W)).max() * W

    def words(self) -> str:
        return "Gaussian, scaled to the spectral radius rho"


@dataclass(frozen=True)
class TorchDefault(Law):
    """Independent entries W_ij = g U(-1, 1) / sqrt(n), uniform; the spectral radius tends to g / sqrt(3).

    Args:
        g: the gain, >= 0; with 1 that is how torch and equinox start their recurrent weights.

    Raises as `Gaussian`.
    Source: the documentation of torch.nn.RNN.

    >>> bool(abs(TorchDefault().matrix(100)).max() <= 0.1)
    True
    """

    g: float = at_least_zero(1.0)

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return self.g / math.sqrt(n) * rng.uniform(-1, 1, (n, n))

    def words(self) -> str:
        return "entries uniform in +-g / sqrt(n), spectral radius about g / sqrt(3)"


@dataclass(frozen=True)
class Dale(Law):
    """Excitatory and inhibitory units in balance: columns of one sign, rows of sum 0, spectral radius tending to g.

        W_ij = +-s_j |N(0, 1)| / sqrt(1 - 2 / pi)    s_E = g sqrt((1 - f) / (f n))    s_I = g sqrt(f / ((1 - f) n))

    The first units, the part f of all, excite, the others inhibit. Means balance, f mu_E = (1 - f) mu_I, and the bulk
    of the eigenvalues fills the disc of radius sqrt(n (f s_E^2 + (1 - f) s_I^2)) = g. Balance on average alone leaves
    eigenvalues outside of it (up to 1.9 g in eight draws of 400 units); so in every row excitation and inhibition are
    scaled to their geometric mean, which makes its sum 0 and keeps all signs.

    Args:
        g: the gain, >= 0.
        excitatory: the part f of units that excite, rounded to whole units, at least one of each kind.

    Raises:
        TypeError, ValueError: an option is not such a number; n < 2.
    Source: Rajan, Abbott, Phys. Rev. Lett. 97, 188104 (2006), with their condition that rows sum to 0.

    >>> W = Dale(g=1.2).matrix(10)
    >>> np.sign(W[0]).tolist(), bool(abs(W.sum(axis=1)).max() < 1e-12)
    ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0], True)
    """

    g: float = at_least_zero(1.0)
    excitatory: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.excitatory < 1:
            raise ValueError(f"excitatory must be a part of the units, between 0 and 1, got {self.excitatory}")

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        check_count("n of Dale", n, 2)
        count = min(max(round(self.excitatory * n), 1), n - 1)
        odds = count / (n - count)
        scale = np.where(np.arange(n) < count, odds**-0.5, -(odds**0.5)) / math.sqrt(n * (1 - 2 / math.pi))
        return self.g * _balanced(scale * np.abs(rng.standard_normal((n, n))), count)

    def words(self) -> str:
        return "columns of one sign, rows of sum 0, entries of mean variance g^2 / n, spectral radius about g"


def _balanced(W: np.ndarray, count: int) -> np.ndarray:
    """Rows of sum 0, whose first entries are positive, the others negative."""
    ratio = np.sqrt(-W[:, count:].sum(1) / W[:, :count].sum(1))[:, None]
    return np.concatenate([W[:, :count] * ratio, W[:, count:] / ratio], axis=1)


@dataclass(frozen=True)
class Planted(Law):
    """A Gaussian matrix W0, changed by as little as possible so that the network has these fixed points.

        W = D S^+ + W0 (I - S S^+)

    In a model, by `plant_fixed_points`, with its own input weights, biases and nonlinearity; so CTRNNCell and RNNCell
    alone can have it. `matrix(n, seed)` is what a CTRNNCell with tanh gets where biases and input are 0.

    Args:
        points: the states [point, unit], or how many to draw: from N(0, spread^2), of an RNNCell through tanh, or the
            absolute value for relu, since its states are in that range.
        g: of the Gaussian matrix before planting, >= 0.
        spread: standard deviation of drawn points.
        x: the constant input [input] under which they are fixed; zeros when None.

    Raises:
        TypeError, ValueError: an option is not of that kind, or more points than units.

    Source as `plant_fixed_points`.

    >>> W, z = Planted(points=[[1.0, -1.0, 0.5]], g=0.8).matrix(3), np.array([1.0, -1.0, 0.5])
    >>> np.allclose(W @ np.tanh(z), z)
    True
    """

    points: Any = 1
    g: float = at_least_zero(1.0)
    spread: float = 1.0
    x: Any = None

    def __post_init__(self) -> None:
        for option in fields(self):
            if option.name in ("g", "spread"):
                object.__setattr__(self, option.name, checked(option, getattr(self, option.name)))
        object.__setattr__(self, "points", _points(self.points))
        object.__setattr__(self, "x", None if self.x is None else tuple(_floats("x", self.x, 1).tolist()))

    def states(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """The points [point, n], before they are brought into the range of an RNNCell if they are drawn."""
        if isinstance(self.points, int):
            return self.spread * rng.standard_normal((self.points, n))
        return np.array(self.points)

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        from kpflow_dyn.models._planting import planted_weight

        W, z = Gaussian(self.g).matrix(n, rng), self.states(n, rng)
        if z.shape[1] != n:
            raise ValueError(f"the points have {z.shape[1]} units, expected {n}; give points [point, {n}]")
        return planted_weight(W, np.tanh(z), z)

    def weights(self, model: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The recurrent weight of a cell, by its name: with the cell's own input weights, biases and nonlinearity."""
        from kpflow_dyn.models._planting import planted, recurrent_weight

        name, units = recurrent_weight(model), model.hidden_size
        start, states = Gaussian(self.g).matrix(units, rng), self.states(units, rng)
        if name == "weight_hh" and isinstance(self.points, int):
            states = np.tanh(states) if model.nonlinearity == "tanh" else np.abs(states)
        return planted(model, states, self.x, start)

    def words(self) -> str:
        return "Gaussian, changed by least so that the points are fixed"

    def __repr__(self) -> str:
        points = self.points if isinstance(self.points, int) else f"{len(self.points)} given"
        at = "" if self.x is None else f", x={self.x}"
        return f"Planted(points={points}, g={self.g}, spread={self.spread}{at})"


def _points(points: Any) -> int | tuple[tuple[float, ...], ...]:
    if isinstance(points, int | np.integer):
        check_count("points", points, 1)
        return int(points)
    return tuple(map(tuple, _floats("points", points, 2).tolist()))


def _floats(name: str, values: Array, ndim: int) -> np.ndarray:
    axes = {1: "[input]", 2: "[point, unit], or how many"}[ndim]
    array = np.asarray(to_numpy(values), np.float64)
    if array.ndim != ndim or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} has the shape {array.shape}, expected finite numbers {axes}")
    return array
