"""How alike two models learn: their operators and the modes in which each can change, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kpflow_dyn._arrays import Array, Random, eps_of, to_numpy
from kpflow_dyn._arrays.dots import gram
from kpflow_dyn._flows.flow import Flow
from kpflow_dyn._numbers.estimate import alignment
from kpflow_dyn._numbers.spectra import Modes, eigs
from kpflow_dyn.solvers import BlockLanczos, Estimate
from kpflow_dyn.solvers._orthogonalise import combine

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two flows on the same states.

    Attributes:
        ntk, K, P: the alignment of each operator with its like, tr(A^T B) / (|A|_F |B|_F); that of P is the similarity
            of Green's operators.
        angles: the principal angles [k] between the spans of the k leading modes of the two NTKs, ascending, in
            radians: 0 for a direction that they share, pi/2 for one that only one of them has. NaN for those that an
            NTK of lower rank lacks.
        modes: the leading modes of each.

    Example as `compare`.
    """

    ntk: Estimate
    K: Estimate
    P: Estimate
    angles: np.ndarray
    modes: tuple[Modes, Modes]

    def __str__(self) -> str:
        rows = {"NTK": self.ntk, "K": self.K, "P": self.P}
        table = [f"alignment of {name:4} {found.value:8.4f} +- {found.stderr:.2g}" for name, found in rows.items()]
        degrees = ", ".join(f"{angle:.1f}" for angle in np.degrees(self.angles))
        return "\n".join([*table, f"principal angles of {len(self.angles)} leading modes, in degrees: {degrees}"])

    def plot(self, dark: bool = False) -> Figure:
        """Principal angles, and the leading eigenvalues of both."""
        from kpflow_dyn.figures import _learning as figures

        return figures.comparison(self, dark=dark)


def compare(
    a: Flow, b: Flow, k: int = 8, samples: int | None = None, seed: int | Random = 0, alg: BlockLanczos | None = None
) -> Comparison:
    """How alike gradient descent moves two models, or two checkpoints of one: cos(A, B) = tr(A^T B) / (|A|_F |B|_F).

    Args:
        a, b: flows on the same inputs, whose states have the same axes and lengths; unit i is compared with unit i.
        k: how many leading modes to compare.
        samples: how many applications of each operator to spend on an alignment; None for exact values where these are
            cheap.
        seed: an int, or a `Random` to continue.
        alg: how the modes are found; `solvers.BlockLanczos(tol=1e-4)` when None.

    Raises:
        ValueError: states of other shapes, or a k that is larger than the ranks.
    Source: Bjorck, Golub, Math. Comp. 27, 579 (1973), for the angles; `alignment` for the cosines.

    >>> import torch, kpflow_dyn as kp
    >>> x = torch.randn(2, 5, 3)
    >>> a, b = (kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), x))) for _ in range(2))
    >>> found = kp.compare(a, b, k=3)
    >>> found.angles.shape, found.ntk.value < 1
    ((3,), True)
    """
    if not a.ntk.domain.matches(b.ntk.domain):
        raise ValueError(f"the states differ: {a.ntk.domain} and {b.ntk.domain}; compare models on the same inputs")
    rng, alg = Random(seed), BlockLanczos(tol=1e-4) if alg is None else alg
    leading = eigs(a.ntk, k, alg, seed=rng), eigs(b.ntk, k, alg, seed=rng)
    of = [alignment(getattr(a, name), getattr(b, name), samples, rng) for name in ("ntk", "K", "P")]
    return Comparison(*of, angles=principal_angles(*leading), modes=leading)


def principal_angles(a: Modes, b: Modes) -> np.ndarray:
    """The principal angles between the spans of two sets of modes, ascending.

    Source: Bjorck, Golub, Math. Comp. 27, 579 (1973): by their sines where these are small.
    """
    second, first = sorted(map(_span, (a, b)), key=len)
    missing = np.full(min(len(a.values), len(b.values)) - len(second), np.nan)
    if not len(second):
        return missing
    products = gram(second, first)
    rest = second - combine(products, [first])
    cosines = np.clip(np.linalg.svd(to_numpy(products), compute_uv=False), 0, 1)
    sines = np.clip(np.linalg.eigvalsh(to_numpy(gram(rest, rest))), 0, 1) ** 0.5
    return np.append(np.where(cosines**2 > 0.5, np.arcsin(sines), np.arccos(cosines)), missing)


def _span(modes: Modes) -> Array:
    """The modes [b, n] whose values are not zero to round-off, as the vectors of others are any."""
    values = abs(to_numpy(modes.values))
    count = int((values > 10 * eps_of(modes.vectors) * values.max()).sum())
    return modes.space.to_euclidean(modes.vectors[:count]).reshape((count, -1))
