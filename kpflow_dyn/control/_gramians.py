"""Gramians: which states inputs can reach, and which states outputs can tell apart.

They are sums over time of one recursion, W <- Phi W Phi^T + G, forward for Wc and backward, through the transposed
system, for Wo. In discrete time Phi = A_t and G = B_t B_t^T.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from numpy.lib.mixins import NDArrayOperatorsMixin
from scipy.linalg import solve_continuous_lyapunov, solve_discrete_lyapunov

from kpflow_dyn._problems.solutions import Solution
from kpflow_dyn._shown import ShownAsRepr
from kpflow_dyn.control._linearisation import linearize_ltv
from kpflow_dyn.control._magnus import spread, transposed
from kpflow_dyn.control._modes import modes, told
from kpflow_dyn.control._systems import LTI, LTV, Mesh, as_system, coordinates, leading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

System = Any  # a Solution, an LTV, or what LTI takes
KINDS = {"c": "reachability", "o": "observability", "cf": "the factor of c", "of": "that of o"}


@dataclass(frozen=True, eq=False)
class Gramian(ShownAsRepr, NDArrayOperatorsMixin):
    """A Gramian W, or its factor L with W = L L^T.

    In numpy it acts as the array that python-control returns: W, or R if "cf" or "of" asked for a factor. Examples:
    `np.linalg.eigvals(found)`, `found @ z`, `found[0]`.

    Attributes:
        kind: "c" for reachability (controllability), "o" for observability; with an "f" for their Cholesky factors.
        factor: L [trial, time, unit, rank] if a rank was given, else None.
        cut: [trial, time], the part of the trace that the factor leaves out, added up over its steps.
        matrix: W if it was computed whole, else None.

    Example as `gram`.
    """

    kind: str
    factor: xr.DataArray | None = None
    cut: xr.DataArray | None = None
    matrix: xr.DataArray | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        values = self.eigenvalues
        sizes = ", ".join(f"{dim} {n}" for dim, n in (self.W if self.factor is None else self.factor).sizes.items())
        last = {"trial": 0, "time": -1 if self.kind[0] == "c" else 0}
        shown = values.isel({dim: at for dim, at in last.items() if dim in values.dims}).values
        at = "" if "time" not in values.dims else f" of trial 0 at t = {values.time.values[last['time']]:.6g}"
        return f"Gramian({self.kind!r}, {KINDS[self.kind]}; {sizes}; eigenvalues {leading(shown)}{at})"

    @property
    def W(self) -> xr.DataArray:
        """[trial, time, unit, other_unit]; of an infinite horizon [unit, other_unit]."""
        if self.matrix is not None:
            return self.matrix
        assert self.factor is not None
        other = self.factor.rename({"unit": "other_unit"})
        return xr.dot(self.factor, other, dim="rank")

    @property
    def R(self) -> xr.DataArray:
        """The upper triangular factor with W = R^T R and no negative diagonal [..., rank, unit]."""
        W = self.W
        upper = np.linalg.qr(transposed(root(W.values)), mode="r")
        signs = np.where(np.diagonal(upper, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
        lead = W.dims[:-2]
        coords = {name: W.coords[name] for name in (*lead, "unit") if name in W.coords}
        return xr.DataArray(upper * signs[..., None], coords, (*lead, "rank", "unit"))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """W, or R."""
        return np.array((self.R if self.kind.endswith("f") else self.W).values, dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = [np.asarray(a) if isinstance(a, Gramian) else a for a in inputs]
        return getattr(ufunc, method)(*arrays, **options)

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array."""
        return np.asarray(self).shape

    @property
    def T(self) -> np.ndarray:
        """The transpose of the array."""
        return np.asarray(self).T

    @property
    def eigenvalues(self) -> xr.DataArray:
        """Descending, [trial, time, mode]."""
        return self._decomposed()[0]

    @property
    def directions(self) -> xr.DataArray:
        """The eigenvectors, orthonormal, leading ones first [trial, time, unit, mode]."""
        return self._decomposed()[1]

    def _decomposed(self) -> tuple[xr.DataArray, xr.DataArray]:
        array = self.W if self.factor is None else self.factor
        if self.factor is None:
            values, vectors = (found[..., ::-1].copy() for found in np.linalg.eigh(array.values))
        else:
            vectors, values, _ = np.linalg.svd(array.values, full_matrices=False)
            values = values**2
        lead = array.dims[:-2]
        coords = {name: array.coords[name] for name in lead if name in array.coords}
        units = {"unit": array.coords["unit"]} if "unit" in array.coords else {}
        of_vectors = xr.DataArray(vectors, coords | units, (*lead, "unit", "mode"))
        return xr.DataArray(values, coords, (*lead, "mode")), of_vectors

    def to_xarray(self) -> xr.Dataset:
        """A dataset of `W`, its `eigenvalues` and `directions`; where a rank was asked for with `factor` and `cut`."""
        import xarray as xr

        found = {"W": self.W, "eigenvalues": self.eigenvalues, "directions": self.directions}
        found |= {} if self.factor is None else {"factor": self.factor}
        found |= {} if self.cut is None else {"cut": self.cut}
        return xr.Dataset(found, attrs={"kind": self.kind})

    def plot(self, dark: bool = False) -> Figure:
        """The leading eigenvalues over time, or of an infinite horizon against their rank."""
        from kpflow_dyn.figures import _control as figures

        return figures.gramian(self, dark=dark)


def gram(system: System, kind: str, *, t: Any = None, rank: int | None = None, **options: Any) -> Gramian:
    """The reachability ("c") or observability ("o") Gramian as a function of time.

        Wc(t) = int_0^t Phi(t, s) B B^T Phi(t, s)^T ds        Wo(t) = int_t^T Phi(s, t)^T C^T C Phi(s, t) ds

    They are diagonal blocks of (P B)(P B)* and (C P)*(C P). In discrete time the integrals are sums.

    Args:
        system: a solution, an `LTV`, an `LTI`, or anything that `LTI` takes.
        kind: "c" or "o", as in python-control. With "cf" or "of" the array is `Gramian.R`, upper triangular with W =
            R^T R, also as there. In discrete time Wc at a time counts the input of the step that ends there, and Wo
            counts the output at that time.
        t: for an LTI the horizon, as `LTI.along` takes it: increasing times, or a number of steps; None for the
            infinite horizon of a stable system. For a solution the times, as `linearize_ltv` takes them.
        rank: how many columns of a factor W = L L^T to keep instead of W. They are the leading singular directions
            after each step. Exact if W has no larger rank; `Gramian.cut` tells how much was left out.
        **options: those of `linearize_ltv`, if a solution is given: `loop`, `inputs`, `C`.

    Raises:
        ValueError: an unknown kind; an infinite horizon for a system that is not stable (the message lists its modes);
            a horizon over which an unstable system overflows; or a rank that is not between 1 and the number of units.
    Source: Moore, IEEE Trans. Automatic Control 26, 17 (1981); Van Loan, IEEE Trans. Automatic Control 23, 395 (1978).

    >>> from kpflow_dyn import control
    >>> decay = control.LTI([[-1.0]], [[1.0]])
    >>> control.gram(decay, "c").W.item(), control.gram(decay, "c", t=[0.0, 0.5, 20.0]).W.values.ravel().round(4)
    (0.5, array([0.    , 0.3161, 0.5   ]))
    """
    check_kind(kind)
    if rank is not None and kind.endswith("f"):
        raise ValueError(f"kind {kind!r} is a whole factor; leave rank=None, or take kind {kind[0]!r}")
    if not isinstance(system, Solution | LTV):
        system = as_system(system)
    if isinstance(system, LTI) and t is None and not options:
        return _infinite(system, kind, rank)
    if isinstance(system, Solution) and kind[0] == "o":  # which hangs on no inputs
        options = {"inputs": "kicks"} | options
    return _over(as_ltv(system, t, options), kind, rank)


def _over(ltv: LTV, kind: str, rank: int | None) -> Gramian:
    _check_rank(rank, ltv.A.sizes["unit"])
    with np.errstate(over="ignore", invalid="ignore"):
        found, cut = _reached(ltv if kind[0] == "c" else dual(ltv), rank)
    backward = slice(None, None, 1 if kind[0] == "c" else -1)
    found, cut = found[:, backward].copy(), None if cut is None else cut[:, backward].copy()
    _check_finite(found, ltv.time, kind)
    coords = {"time": ltv.time, **coordinates(ltv.names, "unit")}
    if rank is not None:
        factor = xr.DataArray(found, coords, ("trial", "time", "unit", "rank"))
        return Gramian(kind, factor, xr.DataArray(cut, {"time": ltv.time}, ("trial", "time")))
    coords |= coordinates(ltv.names, "other_unit")
    return Gramian(kind, matrix=xr.DataArray(found, coords, ("trial", "time", "unit", "other_unit")))


def check_kind(kind: str) -> None:
    """Raise unless a Gramian is called by one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected 'c' (reachability), 'o' (observability), or 'cf' or 'of'")


def as_ltv(system: System, t: Any, options: dict[str, Any]) -> LTV:
    """The linear system along trials of whatever has one, with the options that this takes."""
    if isinstance(system, Solution):
        return linearize_ltv(system, t=t, **options)
    if not isinstance(system, LTV):
        system = as_system(system)
    if options:
        kind = type(system).__name__
        raise ValueError(f"{sorted(options)} are options of linearize_ltv, which a {kind} has behind it")
    if isinstance(system, LTI):
        if t is None:
            raise ValueError("an LTI has no trial of its own; give a horizon t=, times or a number of steps")
        return system.along(t)
    if t is not None:
        raise ValueError("an LTV has its times already; give t to linearize_ltv")
    return system


def _infinite(system: LTI, kind: str, rank: int | None) -> Gramian:
    lingering = [mode for mode in modes(system.A) if mode.lingers(system.dt)]
    if lingering:
        unstable = "a real part >= 0" if system.dt is None else "a size >= 1"
        raise ValueError(
            f"the system is not stable (the mode at {told(lingering, system.names)} has {unstable}), so it has no "
            "Gramian over infinite time; give a horizon t=, or close a loop (lqr)"
        )
    if rank is not None:
        raise ValueError("over infinite time the Gramian is found whole; leave rank=None, or give a horizon t=")
    A, Q = (system.A, system.B @ system.B.T) if kind[0] == "c" else (system.A.T, system.C.T @ system.C)
    W = solve_continuous_lyapunov(A, -Q) if system.dt is None else solve_discrete_lyapunov(A, Q)
    coords = coordinates(system.names, "unit", "other_unit")
    return Gramian(kind, matrix=xr.DataArray((W + W.T) / 2, coords, ("unit", "other_unit")))


def _check_rank(rank: int | None, units: int) -> None:
    if rank is not None and not (isinstance(rank, int | np.integer) and 1 <= rank <= units):
        raise ValueError(f"rank is {rank!r}, expected a number of columns between 1 and {units}, or None")


def _check_finite(found: np.ndarray, time: np.ndarray, kind: str) -> None:
    bad = ~np.isfinite(found).all((2, 3))
    if bad.any():
        trial, step = np.argwhere(bad)[0 if kind == "c" else -1]
        raise ValueError(
            f"the {KINDS[kind]} Gramian overflows at t = {time[step]:.6g} (trial {trial}): the system is unstable, and "
            "the horizon too long for it; take a shorter one, or close the loop"
        )


def dual(ltv: LTV) -> LTV:
    """The transposed system, which runs backward: its reachability is the observability of this one."""
    A, C = transposed(ltv.A.values)[:, ::-1], transposed(ltv.C.values)[:, ::-1]
    if ltv.mesh is None:
        # z_t reaches z_{t+1} by A_{t+1}: the matrices move by one step; the first acts on nothing.
        return _of_arrays(ltv, np.concatenate([A[:, :1], A[:, :-1]], 1), C, None)
    mesh = ltv.mesh
    inside = transposed(mesh.A)[:, ::-1, ::-1]
    outputs = np.broadcast_to(C[:, :1, None], (*inside.shape[:3], *C.shape[2:]))
    turned = Mesh(mesh.edges[-1] - mesh.edges[::-1], len(mesh.edges) - 1 - mesh.at[::-1], inside, outputs)
    return _of_arrays(ltv, A, C, turned)


def _of_arrays(like: LTV, A: np.ndarray, B: np.ndarray, mesh: Mesh | None) -> LTV:
    arrays = [xr.DataArray(M, dims=("trial", "time", *dims)) for M, dims in ((A, ("unit", "from")), (B, ("unit", "u")))]
    return LTV(*arrays, C=like.C, D=like.D, dt=like.dt, mesh=mesh)


def _reached(ltv: LTV, rank: int | None) -> tuple[np.ndarray, np.ndarray | None]:
    """W at the times of a system [trial, time, unit, unit], or its factor with what was cut."""
    if ltv.mesh is None:
        B = ltv.B.values
        if rank is None:
            return _summed(ltv.A.values, B @ transposed(B)), None
        return _factors(ltv.A.values, B, rank)
    mesh = ltv.mesh
    phi, G = spread(mesh.A, mesh.B @ transposed(mesh.B), np.diff(mesh.edges))
    if rank is None:
        W = _summed(phi, G)
        return np.concatenate([0 * W[:, :1], W], 1)[:, mesh.at], None
    factor, cut = _factors(phi, root(G), rank)
    return np.concatenate([0 * factor[:, :1], factor], 1)[:, mesh.at], np.pad(cut, ((0, 0), (1, 0)))[:, mesh.at]


def _summed(phi: np.ndarray, G: np.ndarray) -> np.ndarray:
    """W_k = Phi_k W_{k-1} Phi_k^T + G_k from W_0 = 0 [trial, step, n, n]."""
    W, found = np.zeros_like(G[:, 0]), []
    for k in range(phi.shape[1]):
        W = phi[:, k] @ W @ transposed(phi[:, k]) + G[:, k]
        found.append((W + transposed(W)) / 2)
    return np.stack(found, 1)


def _factors(phi: np.ndarray, roots: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the same, L_k = the leading columns of [Phi_k L_{k-1}, root_k]."""
    L, cut = np.zeros((*roots[:, 0].shape[:2], rank)), np.zeros(len(roots))
    found, cuts = [], []
    for k in range(phi.shape[1]):
        L, lost = _compressed(np.concatenate([phi[:, k] @ L, roots[:, k]], -1), rank)
        found.append(L)
        cuts.append(cut := cut + lost)
    return np.stack(found, 1), np.stack(cuts, 1)


def _compressed(L: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The leading columns U S of L [trial, n, m], and the part of the trace in the others."""
    if not np.isfinite(L).all():
        return np.full((*L.shape[:2], rank), np.nan), np.full(len(L), np.nan)
    left, values, _ = np.linalg.svd(L, full_matrices=False)
    total = (values**2).sum(-1)
    kept = (left * values[:, None])[..., :rank]
    padded = np.pad(kept, ((0, 0), (0, 0), (0, rank - kept.shape[-1])))
    return padded, (values[:, rank:] ** 2).sum(-1) / np.where(total > 0, total, 1)


def root(G: np.ndarray) -> np.ndarray:
    """L with L L^T = G for positive semi-definite G, where round-off may have made eigenvalues negative."""
    values, vectors = np.linalg.eigh(G)
    return vectors * np.sqrt(np.maximum(values, 0))[..., None, :]
