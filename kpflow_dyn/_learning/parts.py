"""The parts of a loss, by name, and how each is learnt: under the kernel as it is, and by an optimiser.

A part is Pi f of the parabola of the loss (`parabolas`), its loss |Pi f|^2 / 2. Outputs, classes and principal
components are orthogonal, so that their losses add up. How they fall is that of the loss itself (`courses`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, full_precision, like_numpy, to_numpy
from kpflow_dyn._flows.flow import Output
from kpflow_dyn._learning.courses import Course, Followed, of_linearised, of_modes, of_training
from kpflow_dyn._learning.decay import Decay, certain
from kpflow_dyn._learning.descent import GradientFlow
from kpflow_dyn._learning.forecasting import check_rate
from kpflow_dyn._learning.learnable import NULL, time_to
from kpflow_dyn._learning.linearised import LinearisedObjective, fastest_rate
from kpflow_dyn._learning.losses import Loss, OutputLoss, full_mask, output_loss
from kpflow_dyn._learning.obstacles import Obstacles, obstacles
from kpflow_dyn._learning.parabolas import by_place, parabola, probabilities
from kpflow_dyn._learning.projections import energies, projections

if TYPE_CHECKING:
    import xarray as xr

CONFLICT = 10.0  # times later than alone, a part has others against it
MANY = 1000
NOTED = 0.01  # share of an error out of reach from which on it is named
SOON = 100.0  # a part is late that has not fallen to a tenth in as many times of the fastest direction
FRACTIONS = (0.5, 0.2, 0.1)  # of the whole loss, at which an optimiser's steps are given


@dataclass(frozen=True, eq=False)
class Parts:
    """The whole loss, and its parts.

    Attributes:
        names: `EVERYTHING`, then outputs or classes, then principal components of the error.
        loss, share: of each part now over the least that there is, and over the whole [part].
        accuracy: at the places of each class, for losses of classes; else NaN [part].
        course: how they fall under the kernel as it is.
        alone: tau to its half if the rest of the error were not there, of the parabola [part].
        slowed: how much later this is beside the rest, of the parabola [part]; NaN of classes, each of which is learnt
            at once alone, by giving the same answer everywhere.
        unreached: its share in directions that the kernel does not reach: rates below 1e-6 of the largest [part].
        reach: the change of the outputs along the part's error at each trial and time, in one step of gradient descent
            on it over the learning rate and |e|^2; the sum is `rate` [part, trial, time].
        largest_rate: the largest eigenvalue of h^{1/2} ntk h^{1/2} with the Hessian h of the loss in the outputs, as in
            `forecast`: descent is stable below a learning rate of 2 over it, as long as the kernel stays as it is.
        obstacles: what stands in the way of each.
        training: by an optimiser, and how they fall in it; None where there is none.
    """

    names: tuple[str, ...]
    loss: np.ndarray
    share: np.ndarray
    accuracy: np.ndarray
    course: Course
    alone: np.ndarray
    slowed: np.ndarray
    unreached: np.ndarray
    reach: np.ndarray
    largest_rate: float
    obstacles: Obstacles
    training: tuple[GradientFlow, Course] | None

    @property
    def half(self) -> np.ndarray:
        """tau at which each first has fallen to a half when all is trained; inf where never, NaN where it is later than
        the course was followed.
        """
        return self.course.time_to(0.5)

    @property
    def tenth(self) -> np.ndarray:
        """The same to a tenth."""
        return self.course.time_to(0.1)

    @property
    def words(self) -> list[str]:
        """What stands in the way of each part that is late; "" for those that are learnt soon."""
        soon = self.tenth * self.largest_rate < SOON
        found = zip(soon, map(_against, self.slowed), self.obstacles.words, self.unreached, strict=True)
        return [
            "" if early else "; ".join(filter(None, (other, text))) or _slow(unreached)
            for early, other, text, unreached in found
        ]

    def variables(self) -> dict[str, Any]:
        """As variables of a dataset, their names beginning with "part", those of an optimiser with "optimizer"."""
        columns = ("loss", "share", "accuracy", "half", "tenth", "alone", "unreached", "words")
        found: dict[str, Any] = {f"part_{name}": ("part", getattr(self, name)) for name in columns}
        shown = self.course.shown
        found |= {"tau": shown.time, "part_curve": (("part", "tau"), shown.curve)}
        found |= {"part_reach": (("part", "trial", "time"), self.reach)}
        way: xr.Dataset = self.obstacles.to_xarray().rename(error="part").assign_coords(part=list(self.names))
        found |= {f"part_{name}": way[name] for name in ("rate", "own", "kept", "factors", "relative")}
        found |= {"factor_typical": way["typical"]}
        return found | ({} if self.training is None else _of_optimizer(*self.training))


def _against(slowed: float) -> str:
    if not slowed > CONFLICT:
        return ""
    sooner = f"{slowed:.0f}" if slowed < MANY else f"over {MANY}"
    return f"other parts pull against it (alone it is halved {sooner} times sooner)"


def _slow(unreached: float) -> str:
    """What to say of a late part that no factor alone stands against."""
    if unreached > NOTED:
        return f"{unreached:.0%} of its error lies in directions that the kernel hardly moves"
    return "its error lies in slow directions of the kernel"


def _of_optimizer(flow: GradientFlow, course: Course) -> dict[str, Any]:
    """A training as variables: when the whole loss and its parts have fallen, and the losses at its steps."""
    intervals = np.array([flow.interval_to(fraction) for fraction in FRACTIONS])
    return {
        "fraction": list(FRACTIONS),
        "step": course.time,
        "optimizer_steps": ("fraction", [flow.time_to(fraction) for fraction in FRACTIONS]),
        "optimizer_earliest": ("fraction", intervals[:, 0]),
        "optimizer_latest": ("fraction", intervals[:, 1]),
        "optimizer_half": ("part", course.stays_from(0.5)),
        "optimizer_tenth": ("part", course.stays_from(0.1)),
        "optimizer_curve": (("part", "step"), course.curve),
    }


def parts_of(
    output: Output,
    loss: OutputLoss,
    names: Sequence[str] = (),
    seed: int = 0,
    training: Mapping[str, Any] | None = None,
) -> Parts:
    """What of a loss of these outputs [trial, time, out] gradient descent will learn, and when.

    Args:
        output: a readout of a flow.
        loss: of its values.
        names: of the outputs, or of the classes.
        seed: of random probes.
        training: options of `of_training`, for the times of an optimiser.

    Raises:
        ValueError: a loss that is at its least already; a rate of plain gradient descent at which it is unstable.
    """
    space = output.ntk.domain
    now = parabola(output.values, loss, space)
    if not now.f.any():
        raise ValueError("the loss is at its least already, so that nothing is left to be learnt")
    parts = projections(now.f, loss, names)
    f = np.stack([project(now.f) for project in parts.values()])
    losses, root = energies(parts, now.f), like_numpy(now.root, space.like)  # [part], [trial time, out, out]
    with full_precision(output.values):
        decay = Decay(output.ntk, space.from_euclidean(like_numpy(f, space.like)), lambda rows: by_place(root, rows))
        decay.settle(_halves)
        objective = LinearisedObjective(output.ntk, output.values, loss)
        fastest = fastest_rate(objective)
        _check_training(training or {}, fastest)  # before what takes longer
        of_parabola = of_modes(decay, parts, f.shape[1:])
        course = of_parabola if loss.quadratic else of_linearised(objective, Followed(output, loss, parts), fastest)
    e = space.from_euclidean(by_place(root, like_numpy(f, space.like).reshape((len(f), -1))).reshape(f.shape))
    alone = certain(_halves, decay.lower, decay.upper)[0]
    return Parts(
        names=tuple(parts),
        loss=losses,
        share=losses / losses[0],
        accuracy=np.array([_accuracy(output, loss, one, f[0]) for one in f]),
        course=course,
        alone=alone,
        slowed=alone + np.nan if loss.of_classes else of_parabola.time_to(0.5) / alone,
        unreached=_unreached(decay),
        reach=_reach(output, e),
        largest_rate=fastest,
        obstacles=obstacles(output, dict(zip(parts, e, strict=True)), seed=seed, largest=False),
        training=None if training is None else of_training(output, loss, parts, **training),
    )


def _check_training(training: Mapping[str, Any], fastest: float) -> None:
    """Raise for a learning rate at which plain gradient descent is unstable."""
    lr = training.get("lr")
    if training.get("optimizer") == "sgd" and lr is not None and training.get("clip") is None:
        check_rate(lr, np.array([fastest]))


WORDS = {
    "loss": ("Loss", "Of the outputs on these trials, as the network is now."),
    "accuracy": ("Accuracy", "How often the largest output is that of the right class, over all places that count."),
}


def learning_of(
    output: Output,
    loss: Loss,
    target: Any,
    mask: Any,
    names: Sequence[str],
    seed: int,
    training: Mapping[str, Any] | None = None,
) -> xr.Dataset:
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
    parts = parts_of(output, of_outputs, names, seed, training)
    about |= {"largest_rate": parts.largest_rate, "followed": parts.course.followed}
    about |= _said_of_optimizer(parts, training or {})
    return xr.Dataset(scalars | parts.variables(), {"part": list(parts.names)}, about)


def _said_of_optimizer(parts: Parts, options: Mapping[str, Any]) -> dict[str, str]:
    """Which one it is, and by which road its times were found."""
    if parts.training is None:
        return {}
    flow, _course = parts.training
    given = [f"{name} {options[name]:g}" for name in ("lr", "clip") if options.get(name) is not None]
    said = f"{flow.optimizer} ({', '.join(given)})" if given else flow.optimizer
    return {"optimizer": said, "optimizer_road": flow.road}


def _weighed(mask: Any, output: Output) -> Any:
    """The mask [trial, time] with the weights of the measure, by which losses over times of an ODE are integrals."""
    space = output.ntk.domain
    if space.measure is None:
        return mask
    return full_mask(mask, (*space.shape[:-1], 1))[..., 0] * to_numpy(space.measure)[..., 0]


def _accuracy(output: Output, loss: OutputLoss, part: np.ndarray, whole: np.ndarray) -> float:
    """At the places that a part is made of; NaN for one that is a direction."""
    here = part.any(-1)
    if not loss.of_classes or not np.array_equal(part[here], whole[here]):
        return np.nan
    p, m = probabilities(loss, part.shape)
    here = m * here
    right = to_numpy(output.values).argmax(-1) == p.argmax(-1)
    return float((here * right).sum() / here.sum())


def _halves(rates: np.ndarray, energies: np.ndarray) -> np.ndarray:
    """tau to half and to a tenth of each loss, alone [2, part]."""
    return np.array([[time_to(one, rates, part) for one in energies] for part in (0.5, 0.1)])


def _unreached(decay: Decay) -> np.ndarray:
    """Shares out of reach, NaN where they are not known to a hundredth."""
    bounds = (decay.lower, decay.upper)
    low, high = (e[:, rates < NULL * rates.max()].sum(1) / e.sum(1) for rates, e in bounds)
    return np.where(np.abs(high - low) < 1e-2, low, np.nan)


def _reach(output: Output, e: Array) -> np.ndarray:
    """[part, trial, time], for any axes of places: of a unit error, <e, ntk e> place by place."""
    space = output.ntk.domain
    w = 1.0 if space.measure is None else to_numpy(space.measure)
    error, moved = (to_numpy(array).astype(np.float64) for array in (e, output.ntk.mv(e)))
    sizes = (w * error**2).reshape((len(error), -1)).sum(1)
    found = (w * error * moved).sum(-1) / sizes.reshape((-1,) + (1,) * (error.ndim - 2))
    return found if space.mask is None else np.where(to_numpy(space.mask)[..., 0], found, np.nan)
