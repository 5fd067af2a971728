"""How much of known features lies in the leading modes of a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._numbers.spectra import Modes
from kpflow_dyn._shown import ShownAsText, type_name
from kpflow_dyn._spaces.space import Space

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True, eq=False, repr=False)
class FeatureShares(ShownAsText):
    """How much of each family of features lies in the leading modes.

    Attributes:
        names: of the families.
        of_modes: the part of each mode inside each family, |F* v_j|^2 [mode, family], where the columns of F are an
            orthonormal basis of the family.
        in_leading: the part of each family inside the first k modes, the sum of `of_modes` over them divided by the
            family's dimension [k, family], k from 1 on. It is the mean squared cosine of the principal angles between
            the family and these modes, with 0 for angles that are missing.
        dimensions: of the families [family].
        size: dimension n of the space.

    Two modes of one eigenvalue are any basis of their eigenspace: their parts add up, but mean little one by one.
    Families that are not orthogonal to one another share parts, so that a row of `of_modes` may exceed 1 in sum.

    Example as `feature_shares`.
    """

    names: tuple[str, ...]
    of_modes: np.ndarray
    in_leading: np.ndarray
    dimensions: np.ndarray
    size: int

    @property
    def chance(self) -> np.ndarray:
        """The mean of `in_leading` for a random subspace of k dimensions, k / n [k]; of `of_modes` it is d / n."""
        return np.arange(1, len(self.in_leading) + 1) / self.size

    def to_xarray(self) -> xr.Dataset:
        """`of_modes`, `in_leading` and `chance` on "mode" (the first k, counted from 1) and "feature"."""
        import xarray

        found = {name: (("mode", "feature"), getattr(self, name)) for name in ("of_modes", "in_leading")}
        found |= {"chance": ("mode", self.chance), "dimension": ("feature", self.dimensions)}
        return xarray.Dataset(found, {"mode": np.arange(1, len(self.chance) + 1), "feature": list(self.names)})

    def __str__(self) -> str:
        width, k = max(7, *map(len, self.names)), len(self.in_leading)
        rows = zip(self.names, self.dimensions, self.in_leading[-1], strict=True)
        table = [f"{name:{width}} {d:9} {share:6.3f}" for name, d, share in rows]
        last = f"share: of the family in the first {k} modes; {self.chance[-1]:.3f} in {k} random directions"
        return "\n".join([f"{'feature':{width}} {'dimension':>9} {'share':>6}", *table, last])


def feature_shares(modes: Modes, features: Mapping[str, Any]) -> FeatureShares:
    """How much of known features, or families of features, lies in the leading eigenvectors of a kernel.

    For a family spanned by the orthonormal columns of F, and modes v_1, v_2, ..., both in the inner product of the
    modes' space:

        of_modes_j = |F* v_j|^2,    in_leading_k = sum_{j <= k} |F* v_j|^2 / dim F

    A single feature f is a family of one dimension, whose in_leading_k is |V_k* f|^2 / |f|^2. Compare with `chance`,
    and with the same features in the modes of an untrained network.

    Args:
        modes: of `kp.eigs(flow.ntk, k)`, or on one axis, such as `kp.modes(flow.ntk, axis="trial", k=k)`.
        features: by name; a feature has the shape of the modes' space, a family [feature, *shape]. For modes over
            trials these are [trial] and [feature, trial]. They are not centred. Members of a
            family that depend on others, up to the precision of their dtype, add no dimension.

    Raises:
        TypeError: modes that are none, or features without names.
        ValueError: features of another shape, complex, not finite, or all zero.
    Source: Lin, arXiv 2510.00468, compares modes and features; these shares are principal angles, Bjorck and Golub
        (1973).

    >>> import torch, kpflow_dyn as kp
    >>> x = torch.randn(50, 3, dtype=torch.float64) * torch.tensor([4.0, 2.0, 1.0])
    >>> flow = kp.linearize(kp.solve(kp.StaticProblem(torch.nn.Linear(3, 2, bias=False).double(), x, state="")))
    >>> found = kp.feature_shares(kp.modes(flow.ntk, axis="trial", k=3), {"inputs": x.T, "first": x[:, 0]})
    >>> bool(abs(found.in_leading[-1] - 1).max() < 1e-10)  # the kernel is x x^T
    True
    """
    if not isinstance(modes, Modes):
        raise TypeError(f"feature_shares takes the Modes of kp.eigs or kp.modes, got {type_name(modes)}")
    if not isinstance(features, Mapping) or not features:
        raise TypeError(f"features by name are expected, {{name: array}}, got {type_name(features)}")
    space = modes.space
    V = _euclidean(to_numpy(modes.vectors), space)
    bases = [_basis(name, family, space) for name, family in features.items()]
    of_modes = np.stack([np.square(V @ basis).sum(1) for basis in bases], 1)
    dimensions = np.array([basis.shape[1] for basis in bases])
    in_leading = of_modes.cumsum(0) / dimensions
    return FeatureShares(tuple(features), of_modes, in_leading, dimensions, space.dimension)


def _euclidean(rows: np.ndarray, space: Space) -> np.ndarray:
    """Rows [k, *shape] in coordinates where the inner product is the plain one [k, n], in float64."""
    weighted = rows if space.measure is None else np.sqrt(to_numpy(space.measure).astype(float)) * rows
    counted = weighted if space.mask is None else np.where(to_numpy(space.mask), weighted, 0)
    return counted.astype(float).reshape((len(rows), -1))


def _basis(name: str, family: Any, space: Space) -> np.ndarray:
    """An orthonormal basis of a family [n, dimension]."""
    given = np.asarray(to_numpy(family))
    if given.shape[given.ndim - len(space.shape) :] != space.shape or given.ndim > len(space.shape) + 1:
        axes = ", ".join(space.axes)
        raise ValueError(
            f"feature {name!r} has shape {given.shape}; expected [{axes}] = {space.shape}, or [feature, {axes}]"
        )
    if np.iscomplexobj(given) or not np.isfinite(given).all():
        raise ValueError(f"feature {name!r} is complex or not finite; give real, finite values")
    rows = _euclidean(given.reshape((-1, *space.shape)), space)
    rows = rows / np.maximum(np.abs(rows).max(1, keepdims=True), np.finfo(float).tiny)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows[lengths[:, 0] > 0] / lengths[lengths > 0][:, None]
    left, sizes, _ = np.linalg.svd(rows.T, full_matrices=False)
    precision = np.finfo(given.dtype if given.dtype.kind == "f" else float).eps
    kept = left[:, sizes > min(max(given.shape) * precision, precision**0.5) * sizes.max(initial=0)]
    if not kept.size:
        raise ValueError(f"feature {name!r} is zero everywhere; leave it out")
    return kept
