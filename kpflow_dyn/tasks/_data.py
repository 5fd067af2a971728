"""What a task gives, what it offers, and the checks that all tasks share."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from kpflow_dyn._arrays.memory import require_machine
from kpflow_dyn._flows.places import span_of_weights
from kpflow_dyn._learning.losses import classes_that_count
from kpflow_dyn._shown import Row, Shown, axes_sizes, number, some, type_name

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

DEFAULT_TRIALS = 32
AXES = {"inputs": "[trial, time, channel]", "targets": "[trial, time, channel]", "mask": "[trial, time]"}


@dataclass(frozen=True, repr=False)
class TaskData(Shown):
    """Trials of a task.

    Attributes:
        inputs: [trial, time, channel].
        targets: [trial, time, out]; or the right class at each place, integers [trial, time] or [trial, time, 1], of
            which negative ones do not count (of [trial, time, 1], which may be plain numbers, only -100); or None for
            inputs alone.
        mask: [trial, time], True where the trial is on and its target counts, or weights m >= 0 of the loss; None where
            all count alike. It is zero where a class does not count.
        labels: what is known of each trial, by name; the first axis is the trial.
        name: the task's name.
        dt: milliseconds between two times, or None where the source does not say.
        outputs: a name for each output of the targets, or for each class; () where they have none.

    Raises:
        TypeError, ValueError: arrays that are no finite numbers of these shapes, a mask that is negative somewhere or
            zero everywhere, or another number of names than of outputs; targets may hold NaN where the mask is zero.

    >>> TaskData(np.zeros((8, 60, 2)), targets=np.ones((8, 60, 1))).mask is None
    True
    """

    inputs: np.ndarray
    targets: np.ndarray | None = None
    mask: np.ndarray | None = None
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    name: str = "task"
    dt: float | None = None
    outputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        arrays = {"inputs": self.inputs, "targets": self.targets, "mask": self.mask}
        check_arrays({name: array for name, array in arrays.items() if array is not None}, f"the task {self.name}")
        if self.targets is not None and (counts := classes_that_count(self.targets)) is not None:
            object.__setattr__(self, "mask", counts if self.mask is None else self.mask * counts)
        if self.mask is not None and not self.mask.any():
            raise ValueError(f"no step of the task {self.name} counts: all are masked, or of negative class")
        if self.outputs and not self.fits(len(self.outputs)):
            raise ValueError(
                f"outputs of the task {self.name} are {self.outputs}, expected {self.expected_outputs} names, or none"
            )

    def _shown(self) -> tuple[str, list[Row]]:
        trial_time = ("trial", "time")
        rows: list[Row] = [("inputs", axes_sizes((*trial_time, "channel"), self.inputs.shape))]
        if self.targets is not None:
            kind = f" classes, {self.classes}" if self.classes else ""
            rows += [("targets", axes_sizes((*trial_time, "out")[: self.targets.ndim], self.targets.shape) + kind)]
        if self.mask is not None:
            weights = f", with weights from {span}" if (span := span_of_weights(self.mask)) else ""
            rows += [("mask", f"{np.mean(self.mask != 0):.0%} of the trials and times count{weights}")]
        rows += [("labels", some(list(self.labels)))] if self.labels else []
        rows += [("outputs", some(self.outputs))] if self.outputs else []
        return f"TaskData of {self.name}", rows + ([] if self.dt is None else [("dt", f"{number(self.dt)} ms")])

    def to_xarray(self) -> xr.Dataset:
        """A dataset of `inputs`, `targets` and `mask` on "trial", "time", "channel" and "out".

        What is known of the trials are coordinates such as `label_angle`. Times are in ms where `dt` is known.
        """
        import xarray as xr

        axes = {"inputs": ("trial", "time", "channel"), "targets": ("trial", "time", "out"), "mask": ("trial", "time")}
        given = {name: np.asarray(array) for name in axes if (array := getattr(self, name)) is not None}
        data = {name: (axes[name][: array.ndim], array) for name, array in given.items()}
        coords: dict[str, Any] = {f"label_{name}": _of_trials(name, label) for name, label in self.labels.items()}
        steps = np.arange(self.inputs.shape[1])
        coords["time"] = steps if self.dt is None else ("time", self.dt * steps, {"units": "ms"})
        if self.targets is not None and self.targets.shape[2:] == (len(self.outputs),):
            coords["out"] = list(self.outputs)
        return xr.Dataset(data, coords, {"task": self.name})

    def plot(self, dark: bool = False) -> Figure:
        """The inputs and targets of the first trial over time."""
        from kpflow_dyn.figures import _results as figures

        return figures.task(self, dark=dark)

    @property
    def classes(self) -> int:
        """How many classes the targets tell apart, at least; 0 where these are no class indices."""
        if self.targets is None or not is_indices(self.targets):
            return 0
        return 1 + int(self.targets[... if self.mask is None else self.mask != 0].max(initial=-1))

    def fits(self, outputs: int) -> bool:
        """Whether a readout with this number of outputs has one for each of the targets, or for each class."""
        numbers = () if self.targets is None else self.targets.shape[2:]
        return numbers == (outputs,) or 0 < self.classes <= outputs

    @property
    def expected_outputs(self) -> str:
        """How many outputs a readout must have, in words."""
        numbers = [] if self.targets is None else [str(width) for width in self.targets.shape[2:]]
        return ", or ".join([*numbers, *([f"at least {self.classes} of classes"] if self.classes else [])]) or "none"


def _of_trials(name: str, label: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """What is known of each trial, with its axes; texts as numpy's own."""
    values = np.asarray(label)
    values = values.astype(str) if values.dtype == object else values
    return ("trial", *(f"{name}_{axis}" for axis in range(1, values.ndim))), values


class Task(Protocol):
    """What a task offers; an object of your own with this method is one too.

    `make_task` takes it as it is, or by "module:Name" where there are only strings: in the command line, and in the
    file of a sweep. `kp.train.fit` and `kp.analyze` take what it samples.

    >>> class Echo:
    ...     def sample(self, trials, seed):
    ...         inputs = np.random.default_rng(seed).standard_normal((trials or 32, 20, 1))
    ...         return TaskData(inputs, targets=np.roll(inputs, 3, axis=1), name="echo")
    >>> from kpflow_dyn.tasks import make_task
    >>> make_task(Echo(), trials=4).inputs.shape
    (4, 20, 1)
    """

    def sample(self, trials: int | None, seed: int) -> TaskData:
        """Trials with inputs [trial, time, channel] in float64, and targets [trial, time, out] where there are any.

        Args:
            trials: how many; None is as many as the task thinks right.
            seed: the same seed gives the same trials.
        """
        ...


Trials = tuple[np.ndarray, np.ndarray, np.ndarray | None, dict[str, np.ndarray]]


class Generated:
    """What tasks share that draw their trials: checks of their options, noise, and the name of their samples.

    Attributes:
        noise: the standard deviation of independent Gaussian noise on every input.
        dt: milliseconds of a step.
    """

    noise: float
    dt: float
    _least: ClassVar[dict[str, int]]  # of each field that is a whole number

    def __post_init__(self) -> None:
        for option, least in self._least.items():
            check_count(option, getattr(self, option), least)
        for option in fields(self):  # type: ignore[arg-type]
            if option.type in (float, "float"):
                check_number(option.name, getattr(self, option.name))
        check_at_least("noise", self.noise, 0)
        if not 0 < self.dt < np.inf:
            raise ValueError(f"dt must be a time of a step in ms, more than 0, got {self.dt}")

    def sample(self, trials: int | None = None, seed: int = 0) -> TaskData:
        """Trials of as many steps as the task's periods have together; the same ones for the same seed."""
        check_count("seed", seed, 0)
        check_memory(count(trials), self._entries())
        rng = np.random.default_rng(seed)
        inputs, targets, mask, labels = self._draw(count(trials), rng)
        noisy = inputs + self.noise * rng.standard_normal(inputs.shape)
        return TaskData(noisy, targets, mask, labels, type(self).__name__.lower(), self.dt, self._named_outputs())

    def _named_outputs(self) -> tuple[str, ...]:
        """A name for each output, where they have any."""
        return ()

    def _draw(self, trials: int, rng: np.random.Generator) -> Trials:
        """Inputs without noise, targets, mask and labels."""
        raise NotImplementedError

    def _entries(self) -> int:
        """How many numbers the inputs of one trial have."""
        raise NotImplementedError


def check_memory(trials: int, entries: int) -> None:
    """Raise a MemoryError for trials that could never fit: inputs of this many numbers, and their noise."""
    what = f"{trials:.3g} trials with {entries:.3g} inputs each"
    require_machine(2 * 8 * trials * entries, what, "take fewer trials, or shorter ones")


def count(trials: int | None) -> int:
    """How many trials, the default for None."""
    check_count("trials", trials := DEFAULT_TRIALS if trials is None else trials, 1)
    return trials


def check_count(option: str, value: object, least: int) -> None:
    """Raise unless the value is a whole number, at least this."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{option} must be a whole number, got {value!r}")
    check_at_least(option, int(value), least)


def check_number(option: str, value: object) -> None:
    """Raise unless the value is a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{option} must be a number, got {value!r}")


def check_at_least(option: str, value: float, least: float) -> None:
    """Raise unless the value is at least this, and finite."""
    if not least <= value < np.inf:
        raise ValueError(f"{option} must be at least {least}, got {value}")


def nearest(spec: str, names: Sequence[str]) -> str:
    """What an error adds on names like this one, the part before a colon apart; nothing where there is none."""
    bare = {name.rpartition(":")[2].lower(): name for name in names}
    near = difflib.get_close_matches(spec.rpartition(":")[2].lower(), bare, n=5, cutoff=0.5)
    return f" Nearest: {', '.join(bare[name] for name in near)}." if near else ""


def check_options(name: str, options: Iterable[str], known: Sequence[str]) -> None:
    """Raise unless all options are known."""
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{name} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")


def options_of(maker: Callable[..., Any]) -> list[str] | None:
    """The names of the arguments that a class or function takes; None where it does not say, as with **kwargs."""
    parameters = list(inspect.signature(maker.__init__ if isinstance(maker, type) else maker).parameters.values())
    own = parameters[1:] if isinstance(maker, type) else parameters  # without self
    return None if any(p.kind is p.VAR_KEYWORD for p in own) else [p.name for p in own]


def is_indices(targets: np.ndarray) -> bool:
    """Whether these may be class indices: integers [trial, time] or [trial, time, 1]."""
    return targets.dtype.kind in "biu" and (targets.ndim == 2 or targets.shape[2:] == (1,))


def check_arrays(arrays: dict[str, np.ndarray], where: object) -> None:
    """Raise unless inputs [trial, time, channel], targets and mask [trial, time] fit each other; see `TaskData`."""
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{name} in {where} is {type_name(array)}, expected a numpy array")
    shape = arrays["inputs"].shape
    for name, array in arrays.items():
        axes = AXES[name]
        classes = name == "targets" and array.ndim == 2 and is_indices(array)
        if not (array.ndim == axes.count(",") + 1 or classes) or array.shape[:2] != shape[:2] or 0 in array.shape:
            axes += ", or class indices, integers [trial, time]" * (name == "targets")
            raise ValueError(
                f"{name} in {where} must be {axes}, not empty, with the trials and times of inputs; "
                f"got {array.shape} beside inputs {shape}"
            )
    everywhere = np.ones(shape[:2], bool)
    for name, array in arrays.items():
        counts = arrays["mask"] != 0 if name == "targets" and "mask" in arrays else everywhere
        _check_numbers(name, array, counts, where)
    if "mask" in arrays and (arrays["mask"] < 0).any():
        first = tuple(int(index) for index in np.argwhere(arrays["mask"] < 0)[0])
        raise ValueError(f"mask in {where} is negative, first at {first}; expected weights >= 0, or True and False")


def _check_numbers(name: str, array: np.ndarray, counts: np.ndarray, where: object) -> None:
    """Raise unless there are real numbers, and finite ones at the trials and times that count."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} in {where} must hold real numbers, got dtype {array.dtype}")
    if not (finite := np.isfinite(array) | ~counts.reshape(counts.shape + (1,) * (array.ndim - 2))).all():
        first = tuple(int(index) for index in np.argwhere(~finite)[0])
        raise ValueError(f"{name} in {where} has a NaN or infinity, first at {first}; remove or replace such trials")
