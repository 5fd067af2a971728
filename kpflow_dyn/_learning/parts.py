"""The parts of a loss, by name, and how each is learnt under the kernel as it is.

At each trial and time that counts the loss is replaced by the parabola that has its value and its slope, with its
minimum at the least loss that there is, in the directions and proportions of its own Hessian h:

    L = |f|^2 / 2        e = grad_y L = h^{1/2} f        de/dtau = -h ntk e

For the squared error this is exact. Parts of f that are orthogonal have losses that add up: outputs, classes, and
principal components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, full_precision, like_numpy, to_numpy
from kpflow_dyn._backend import backend_for
from kpflow_dyn._flows.flow import Output
from kpflow_dyn._learning.decay import Decay, certain
from kpflow_dyn._learning.learnable import NULL, time_to
from kpflow_dyn._learning.losses import Loss, OutputLoss, full_mask, output_loss
from kpflow_dyn._learning.obstacles import Obstacles, obstacles

if TYPE_CHECKING:
    import xarray as xr

EVERYTHING = "everything"
MOST_OUTPUTS, MOST_COMPONENTS = 8, 4
SMALLEST = 1e-6  # share of the loss of a part that is shown
STILL = 1e-12  # part of the largest rate below which nothing moves
FIRST, LAST, GRID = 0.03, 1e9, 600  # points of curves, in times of the fastest direction
CONFLICT = 10.0  # times later than alone, a part has others against it
SOON = 100.0  # a part is late that has not fallen to a tenth in as many times of the fastest direction


@dataclass(frozen=True, eq=False)
class Parts:
    """The whole loss, and its parts.

    Attributes:
        names: `EVERYTHING`, then outputs or classes, then principal components of the error.
        loss, share: of each part now, and over the whole [part].
        accuracy: at the places of each class, for losses of classes; else NaN [part].
        half, tenth: tau at which it first has fallen so far when all is trained; inf where it never does, NaN where
            that was not found [part].
        alone: tau to its half if the rest of the error were not there [part].
        unreached: its share in directions that the kernel does not reach: rates below 1e-6 of the largest [part].
        tau, curve: predicted losses over their first values when all is trained [part, point]; NaN where not known.
        reach: the change of the outputs along the part's error at each trial and time, in one step of gradient descent
            on it over the learning rate and |e|^2; the sum is `rate` [part, trial, time].
        largest_rate: of h^{1/2} ntk h^{1/2}.
        obstacles: what stands in the way of each.
    """

    names: tuple[str, ...]
    loss: np.ndarray
    share: np.ndarray
    accuracy: np.ndarray
    half: np.ndarray
    tenth: np.ndarray
    alone: np.ndarray
    unreached: np.ndarray
    tau: np.ndarray
    curve: np.ndarray
    reach: np.ndarray
    largest_rate: float
    obstacles: Obstacles

    @property
    def words(self) -> list[str]:
        """What stands in the way of each part that is late; "" for those that are learnt soon."""
        against = [
            f"other parts pull against it (alone it is halved at tau = {alone:.2g})" if half > CONFLICT * alone else ""
            for half, alone in zip(self.half, self.alone, strict=True)
        ]
        soon = self.tenth * self.largest_rate < SOON
        found = zip(soon, against, self.obstacles.words, strict=True)
        return ["" if early else "; ".join(filter(None, (other, text))) for early, other, text in found]

    def variables(self) -> dict[str, Any]:
        """As variables of a dataset, their names beginning with "part"."""
        columns = ("loss", "share", "accuracy", "half", "tenth", "alone", "unreached", "words")
        found: dict[str, Any] = {f"part_{name}": ("part", getattr(self, name)) for name in columns}
        found |= {"part_curve": (("part", "tau"), self.curve), "part_reach": (("part", "trial", "time"), self.reach)}
        way: xr.Dataset = self.obstacles.to_xarray().rename(error="part").assign_coords(part=list(self.names))
        found |= {f"part_{name}": way[name] for name in ("rate", "own", "kept", "factors", "relative")}
        return found | {f"factor_{name}": way[name] for name in ("typical", "largest")}


def parts_of(output: Output, loss: OutputLoss, names: Sequence[str] = (), seed: int = 0) -> Parts:
    """What of a loss of these outputs [trial, time, out] gradient descent will learn, and when.

    Args:
        output: a readout of a flow.
        loss: of its values.
        names: of the outputs, or of the classes.
        seed: of random probes.

    Raises:
        ValueError: a loss that is at its least already.
    """
    space = output.ntk.domain
    parabola = _parabola(output, loss)
    projections = _projections(parabola.f, loss, tuple(names))
    f = np.stack([project(parabola.f) for project in projections.values()])
    losses = (f**2).sum((1, 2, 3)) / 2
    root = like_numpy(parabola.root, space.like)  # [trial time, out, out]
    with full_precision(output.values):
        decay = Decay(output.ntk, space.from_euclidean(like_numpy(f, space.like)), lambda rows: _by_place(root, rows))
        decay.settle(_halves)
        together = _together(decay, projections, f.shape[1:])
    half, tenth = (together.time_to(part) for part in (0.5, 0.1))
    e = space.from_euclidean(_by_place(root, like_numpy(f, space.like).reshape((len(f), -1))).reshape(f.shape))
    shown = _shown(together.tau, half, tenth)
    return Parts(
        names=tuple(projections),
        loss=losses,
        share=losses / losses[0],
        accuracy=np.array([_accuracy(output, loss, one, f[0]) for one in f]),
        half=half,
        tenth=tenth,
        alone=certain(_halves, decay.lower, decay.upper)[0],
        unreached=_unreached(decay),
        tau=together.tau[shown],
        curve=together.curve[:, shown],
        reach=_reach(output, e),
        largest_rate=float(decay.lower[0].max()),
        obstacles=obstacles(output, dict(zip(projections, e, strict=True)), seed=seed),
    )


WORDS = {
    "loss": ("Loss", "Of the outputs on these trials, as the network is now."),
    "accuracy": ("Accuracy", "How often the largest output is that of the right class, over all places that count."),
}


def learning_of(output: Output, loss: Loss, target: Any, mask: Any, names: Sequence[str], seed: int) -> xr.Dataset:
    """The numbers of `parts_of` as a dataset, with the loss as it is now, and the accuracy where there are classes."""
    import xarray as xr

    of_outputs = output_loss(loss, target, mask if callable(loss) else _weighed(mask, output), output.values)
    now = {"loss": float(to_numpy(of_outputs(output.values)))}
    now |= {"accuracy": of_outputs.accuracy(output.values)} if of_outputs.of_classes else {}
    exact = {"stderr": 0.0, "method": "exact", "applications": 0}
    named = {name: dict(zip(("long_name", "description"), WORDS[name], strict=True)) for name in now}
    scalars = {name: ((), value, named[name] | exact) for name, value in now.items()}
    learning = "with its weights" if output.rate else "as it is"
    about = {"loss": of_outputs.name, "readout": f"{output.weight.shape[0]} outputs, {learning}"}
    if now["loss"] == 0:
        return xr.Dataset(scalars, attrs=about)
    parts = parts_of(output, of_outputs, names, seed)
    coordinates = {"part": list(parts.names), "tau": parts.tau}
    return xr.Dataset(scalars | parts.variables(), coordinates, about | {"largest_rate": parts.largest_rate})


def _weighed(mask: Any, output: Output) -> Any:
    """The mask [trial, time] with the weights of the measure, by which losses over times of an ODE are integrals."""
    space = output.ntk.domain
    if space.measure is None:
        return mask
    return full_mask(mask, (*space.shape[:-1], 1))[..., 0] * to_numpy(space.measure)[..., 0]


# The loss as a parabola


@dataclass(frozen=True, eq=False)
class Parabola:
    """f [trial, time, out], and h^{1/2} at each place [trial time, out, out], where inner products are plain."""

    f: np.ndarray
    root: np.ndarray


def _parabola(output: Output, loss: OutputLoss) -> Parabola:
    space = output.ntk.domain
    w = np.ones(1) if space.measure is None else to_numpy(space.measure).astype(np.float64)
    y = to_numpy(output.values).astype(np.float64)
    of = {"squared_error": _of_squares, "cross_entropy": _of_classes}.get(loss.name)
    f, root = _of_function(output, loss) if of is None else of(y, loss)
    if not f.any():
        raise ValueError("the loss is at its least already, so that nothing is left to be learnt")
    return Parabola(f, root / np.broadcast_to(w, y.shape).reshape((len(root), -1, 1)) ** 0.5)


def _of_squares(y: np.ndarray, loss: OutputLoss) -> tuple[np.ndarray, np.ndarray]:
    """Of sum m (y - target)^2 / Z: f and h^{1/2} in y."""
    target, m = (to_numpy(array).astype(np.float64) for array in (loss.target, loss.mask))
    root = np.broadcast_to((2 * m / m.sum()) ** 0.5, y.shape)
    return root * (y - target), root.reshape((-1, 1, y.shape[-1])) * np.eye(y.shape[-1])


def _of_classes(y: np.ndarray, loss: OutputLoss) -> tuple[np.ndarray, np.ndarray]:
    """Of sum m KL / Z, with h = (diag p - p p^T) m / Z times what makes the parabola as high as the loss."""
    p = np.exp(y - y.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    target, m = _probabilities(loss, y.shape)
    m = (m / m.sum())[..., None]
    values, vectors = np.linalg.eigh(p[..., None] * np.eye(y.shape[-1]) - p[..., None] * p[..., None, :])
    roots = np.where(values > 1e-14, values, 0) ** 0.5
    error = np.einsum("...ij,...i->...j", vectors, p - target)
    along = np.where(roots > 0, error / np.where(roots > 0, roots, 1), 0)
    logs = np.log(np.maximum(p, 1e-300))
    least = np.where(target > 0, target * np.log(np.where(target > 0, target, 1)), 0).sum(-1)
    height = np.maximum(least - (target * logs).sum(-1), 0)  # of the loss over its least
    energy = (along**2).sum(-1) / 2
    scale = np.where((height > 0) & (energy > 0), (energy / np.where(height > 0, height, 1)) ** 0.5, 1)[..., None]
    f = m**0.5 * np.einsum("...ij,...j->...i", vectors, along) / scale
    root = np.einsum("...ij,...j,...kj->...ik", vectors, roots * scale * m**0.5, vectors)
    return f, root.reshape((-1, *root.shape[-2:]))


def _of_function(output: Output, loss: OutputLoss) -> tuple[np.ndarray, np.ndarray]:
    """Of any loss: one parabola for all outputs, with its minimum at zero."""
    y = output.values
    derivatives = backend_for(y, "y", "[trial, time, out]").objectives.Derivatives
    of_rows = derivatives(lambda rows, _scheme: loss(rows.reshape(tuple(y.shape))))
    e = to_numpy(of_rows.gradient(y.reshape((-1,)), None)).astype(np.float64).reshape(tuple(y.shape))
    value = float(to_numpy(loss(y)))
    if not value > 0:
        raise ValueError(f"the loss is {value:.3g}; to speak of half of it, it must be positive, and 0 at its least")
    scale = (np.square(e).sum() / (2 * value)) ** 0.5
    roots = scale * np.broadcast_to(np.eye(y.shape[-1]), (e.size // y.shape[-1], y.shape[-1], y.shape[-1]))
    return to_numpy(output.ntk.domain.counted(output.ntk.domain.placed(like_numpy(e, y)))) / (scale or 1.0), roots


def _probabilities(loss: OutputLoss, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of the classes [trial, time, out], zeros where nothing counts, and weights [trial, time]."""
    target, m = (to_numpy(array) for array in (loss.target, loss.mask))
    if target.shape != shape:
        target = target.reshape(shape[:-1])[..., None] == np.arange(shape[-1])
    return target.astype(np.float64), m.astype(np.float64).reshape(shape[:-1])


def _by_place(root: Array, rows: Array) -> Array:
    """Rows [b, trial time out] with this matrix applied at each place."""
    shaped = rows.reshape((len(rows), *root.shape[:1], 1, root.shape[-1]))
    return (shaped @ root).reshape((len(rows), -1))


# Its parts


Projection = Callable[[np.ndarray], np.ndarray]
"""The part of arrays [..., trial, time, out]."""


def _projections(f: np.ndarray, loss: OutputLoss, names: tuple[str, ...]) -> dict[str, Projection]:
    """Onto the whole, the largest outputs or classes, and the largest principal components."""
    named = [names[i] if i < len(names) else f"{_what(loss)} {i + 1}" for i in range(f.shape[-1])]
    own = dict(zip(named, _of_each(f, loss), strict=True))
    found: dict[str, Projection] = {EVERYTHING: lambda all: all}
    found |= _largest(own, f, MOST_OUTPUTS) if f.shape[-1] > 1 else {}
    return found | _largest(_components(f), f, MOST_COMPONENTS)


def _what(loss: OutputLoss) -> str:
    return "class" if loss.of_classes else "output"


def _of_each(f: np.ndarray, loss: OutputLoss) -> list[Projection]:
    """Onto each output; of classes, onto the places where each is the right one."""
    if loss.of_classes:
        right = _probabilities(loss, f.shape)[0].argmax(-1)[..., None]
        return [_masked(right == number) for number in range(f.shape[-1])]
    return [_masked(np.arange(f.shape[-1]) == number) for number in range(f.shape[-1])]


def _masked(mask: np.ndarray) -> Projection:
    return lambda all: all * mask


def _components(f: np.ndarray) -> dict[str, Projection]:
    """Onto principal components over trials and times: patterns over the outputs; of one output patterns over times."""
    _, _, patterns = np.linalg.svd(f.reshape((-1, f.shape[-1])) if f.shape[-1] > 1 else f[..., 0], full_matrices=False)
    onto = _along_outputs if f.shape[-1] > 1 else _along_times
    return {f"error PC {i + 1}": onto(pattern) for i, pattern in enumerate(patterns[:MOST_COMPONENTS])}


def _along_outputs(pattern: np.ndarray) -> Projection:
    return lambda all: (all @ pattern)[..., None] * pattern


def _along_times(pattern: np.ndarray) -> Projection:
    return lambda all: np.einsum("...bto,t,s->...bso", all, pattern, pattern)


def _largest(parts: dict[str, Projection], f: np.ndarray, most: int) -> dict[str, Projection]:
    """So many parts that are not zero, in their order."""
    shares = {name: float((project(f) ** 2).sum() / (f**2).sum()) for name, project in parts.items()}
    kept = sorted((name for name in parts if shares[name] > SMALLEST), key=lambda name: -shares[name])[:most]
    return {name: one for name, one in parts.items() if name in kept}


def _accuracy(output: Output, loss: OutputLoss, part: np.ndarray, whole: np.ndarray) -> float:
    """At the places that a part is made of; NaN for one that is a direction."""
    here = part.any(-1)
    if not loss.of_classes or not np.array_equal(part[here], whole[here]):
        return np.nan
    p, m = _probabilities(loss, part.shape)
    here = m * here
    right = to_numpy(output.values).argmax(-1) == p.argmax(-1)
    return float((here * right).sum() / here.sum())


# How they decay


def _halves(rates: np.ndarray, energies: np.ndarray) -> np.ndarray:
    """tau to half and to a tenth of each loss, alone [2, part]."""
    return np.array([[time_to(one, rates, part) for one in energies] for part in (0.5, 0.1)])


@dataclass(frozen=True, eq=False)
class Together:
    """The losses of parts over their first values, when all is trained: at tau [point] and in the end."""

    tau: np.ndarray
    curve: np.ndarray
    end: np.ndarray

    def time_to(self, part: float) -> np.ndarray:
        """tau at which each loss first is this part of its first value [part]."""
        return np.array([self._first(curve, end, part) for curve, end in zip(self.curve, self.end, strict=True)])

    def _first(self, curve: np.ndarray, end: float, part: float) -> float:
        below = np.flatnonzero(curve <= part)
        if not below.size:
            return np.inf if end > part else np.nan
        i = below[0]
        if i == 0 or np.isnan(curve[i - 1]):
            return np.nan
        step = (curve[i - 1] - part) / (curve[i - 1] - curve[i])
        return float(self.tau[i - 1] * (self.tau[i] / self.tau[i - 1]) ** step)


def _together(decay: Decay, projections: dict[str, Projection], shape: tuple[int, ...]) -> Together:
    """|Pi f(tau)|^2 with f(tau) = sum_j c_j exp(-rate_j tau) v_j, where the whole is certain."""
    (rates, _), (vectors, c) = decay.lower, decay.vectors()
    vectors = vectors.astype(np.float64).reshape((-1, *shape))
    tau, still = np.geomspace(FIRST, LAST, GRID) / rates.max(), rates < STILL * rates.max()
    along = np.exp(-np.outer(tau, np.where(still, 0, rates))) * c
    coordinates = np.concatenate([[c], along, [still * c]])  # now, at each tau, in the end
    flat = vectors.reshape((len(c), -1))
    grams = (project(vectors).reshape(flat.shape) @ flat.T for project in projections.values())
    losses = np.array([((coordinates @ gram) * coordinates).sum(1) for gram in grams])
    ratio = losses[:, 1:] / losses[:, :1]
    known = ~np.isnan(certain(lambda rates, energies: _curve(rates, energies[0], tau), decay.lower, decay.upper))
    return Together(tau, np.where(known, ratio[:, :-1], np.nan), ratio[:, -1])


def _curve(rates: np.ndarray, energies: np.ndarray, tau: np.ndarray) -> np.ndarray:
    return energies @ np.exp(-2 * np.outer(rates, tau)) / energies.sum()


def _unreached(decay: Decay) -> np.ndarray:
    """Shares out of reach, NaN where they are not known to a hundredth."""
    bounds = (decay.lower, decay.upper)
    low, high = (e[:, rates < NULL * rates.max()].sum(1) / e.sum(1) for rates, e in bounds)
    return np.where(np.abs(high - low) < 1e-2, low, np.nan)


def _shown(tau: np.ndarray, half: np.ndarray, tenth: np.ndarray) -> np.ndarray:
    """Which points are shown: up to some time after the last half or tenth that there is."""
    known = np.concatenate([half, tenth])
    known = known[np.isfinite(known)]
    return tau <= 3 * (known.max() if known.size else tau[-1])


def _reach(output: Output, e: Array) -> np.ndarray:
    """[part, trial, time], for any axes of places: of a unit error, <e, ntk e> place by place."""
    space = output.ntk.domain
    w = 1.0 if space.measure is None else to_numpy(space.measure)
    error, moved = (to_numpy(array).astype(np.float64) for array in (e, output.ntk.mv(e)))
    sizes = (w * error**2).reshape((len(error), -1)).sum(1)
    found = (w * error * moved).sum(-1) / sizes.reshape((-1,) + (1,) * (error.ndim - 2))
    return found if space.mask is None else np.where(to_numpy(space.mask)[..., 0], found, np.nan)
