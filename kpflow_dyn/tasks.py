"""Tasks: labelled trials of inputs and targets, as numpy arrays [trial, time, channel] in float64.

A task is a frozen dataclass whose fields are its options; `sample(trials, seed)` draws trials from it, the same ones
for the same seed. `make_task` finds a task by its name, as the command line does.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.util
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class TaskData:
    """Trials of a task.

    Attributes:
        inputs: [trial, time, channel].
        targets: [trial, time, out], or None for inputs alone.
        mask: [trial, time], True where the trial is on and its target counts; None where that is everywhere.
        labels: what is known of each trial, by name; the first axis is the trial.
        name: the task's name.
        dt: milliseconds between two times, or None where the source does not say.
    """

    inputs: np.ndarray
    targets: np.ndarray | None
    mask: np.ndarray | None
    labels: dict[str, np.ndarray]
    name: str
    dt: float | None


class Task(Protocol):
    """What a task offers."""

    def sample(self, trials: int | None, seed: int) -> TaskData:
        """The trials that belong to this seed; None is as many as the task thinks right."""
        ...


def make_task(spec: str, trials: int | None = None, seed: int = 0, **options: Any) -> TaskData:
    """Trials of the task that a string names.

    Args:
        spec: "memorypro", "flipflop", "neurogym:NAME-v0", "npz:PATH" or a path that ends in .npz.
        trials: how many; by default 32, and all of those in a file.
        seed: the same seed gives the same trials. A file has no use for it.
        options: the fields of `MemoryPro` or `FlipFlop`, or what the neurogym environment's constructor takes.

    Raises:
        ValueError: an unknown task or option (with the nearest known ones), no trials, a file without usable arrays.
        FileNotFoundError: no such .npz file.
        ModuleNotFoundError: a neurogym task, and neurogym is not installed.

    >>> make_task("flipflop", trials=8, seed=1, bits=2).inputs.shape
    (8, 60, 2)
    """
    return _find_task(spec, options).sample(trials, seed)


@dataclass(frozen=True)
class MemoryPro:
    """Respond, after a delay, in the direction that was shown.

    An angle, uniform on the circle, is shown in the stimulus period and gone in the memory period; the response starts
    when the fixation input goes off.

        inputs   fixation, cos(angle), sin(angle)           3 channels
        targets  fixation, cos(angle), sin(angle)           3 channels, the last two in the response period only

    The four periods are counted in steps of `dt` milliseconds; `noise` is the standard deviation of Gaussian noise on
    every input. `labels` holds "angle" [trial].

    Source: Driscoll, Shenoy, Sussillo, Nature Neuroscience 27, 1349 (2024), after Yang et al., Nature Neuroscience 22,
    297 (2019).

    >>> MemoryPro(memory=30).sample(trials=8, seed=0).inputs.shape
    (8, 80, 3)
    """

    fixation: int = 10
    stimulus: int = 20
    memory: int = 40
    response: int = 20
    noise: float = 0.0
    dt: float = 20.0

    def __post_init__(self) -> None:
        for period in ("stimulus", "response"):
            _check_at_least(period, getattr(self, period), 1)
        for option in ("fixation", "memory", "noise"):
            _check_at_least(option, getattr(self, option), 0)

    def sample(self, trials: int | None = None, seed: int = 0) -> TaskData:
        """Trials of fixation + stimulus + memory + response steps."""
        rng = np.random.default_rng(seed)
        angle = rng.uniform(0, 2 * np.pi, _count(trials))
        shown, go = self.fixation + self.stimulus, self.fixation + self.stimulus + self.memory
        direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)[:, None]  # [trial, 1, 2]
        inputs = np.zeros((len(angle), go + self.response, 3))
        inputs[:, :go, 0] = 1
        targets = inputs.copy()
        inputs[:, self.fixation : shown, 1:] = direction
        targets[:, go:, 1:] = direction
        inputs += self.noise * rng.standard_normal(inputs.shape)
        return TaskData(inputs, targets, None, {"angle": angle}, "memorypro", self.dt)


@dataclass(frozen=True)
class FlipFlop:
    """Remember the sign of the last pulse on each channel.

    At each step each channel carries, with probability `rate`, a pulse of +1 or -1, and 0 otherwise. The first step has
    a pulse on every channel, so that the memory is defined from the start.

        inputs   the pulses                       bits channels
        targets  the sign of the last pulse       bits channels

    Source: Sussillo, Barak, Neural Computation 25, 626 (2013).

    >>> FlipFlop(bits=3).sample(trials=8, seed=0).targets.shape
    (8, 60, 3)
    """

    bits: int = 3
    steps: int = 60
    rate: float = 0.1
    dt: float = 20.0

    def __post_init__(self) -> None:
        _check_at_least("bits", self.bits, 1)
        _check_at_least("steps", self.steps, 1)
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate is a probability, between 0 and 1, got {self.rate}")

    def sample(self, trials: int | None = None, seed: int = 0) -> TaskData:
        """Trials of `steps` steps."""
        rng = np.random.default_rng(seed)
        shape = (_count(trials), self.steps, self.bits)
        pulsed = rng.random(shape) < self.rate
        pulsed[:, 0] = True
        inputs = np.where(pulsed, rng.choice([-1.0, 1.0], shape), 0.0)
        last = np.maximum.accumulate(np.where(pulsed, np.arange(self.steps)[:, None], 0), axis=1)  # time of last pulse
        return TaskData(inputs, np.take_along_axis(inputs, last, axis=1), None, {}, "flipflop", self.dt)


@dataclass(frozen=True)
class Neurogym:
    """Trials of a neurogym environment that says what the right answer is, such as "PerceptualDecisionMaking-v0".

    Every trial comes from the environment's own `new_trial`, so all start afresh. Shorter trials are padded with zeros,
    where the mask is False. A Discrete action becomes a one-hot target, its number standing in labels["class"]
    [trial, time]; a Box action is the target as it is. `labels` also has what the environment records of each trial
    (ground_truth, coh, ...), as far as that is one array.

    >>> Neurogym("PerceptualDecisionMaking-v0", {"sigma": 0.5}).sample(trials=8, seed=0).inputs.shape
    (8, 22, 3)
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def sample(self, trials: int | None = None, seed: int = 0) -> TaskData:
        """Trials as long as the longest of them."""
        count = _count(trials)
        with warnings.catch_warnings():
            # gymnasium warns of how neurogym's own collections use it.
            warnings.filterwarnings("ignore", category=UserWarning, module="gymnasium")
            env = _make_environment(self.name, seed, self.options)
            records = [_new_trial(env, self.name) for _ in range(count)]
        observations, answers, notes = zip(*records, strict=True)
        mask = _pad([np.ones(len(answer), bool) for answer in answers])
        targets, labels = _read_answers(_pad(answers), mask, env.action_space)
        labels |= _tabulate(notes)
        dt = float(env.unwrapped.dt)
        return TaskData(_pad(observations).astype(float), targets, mask, labels, f"neurogym:{self.name}", dt)


@dataclass(frozen=True)
class ArrayFile:
    """Trials from an .npz file with arrays `inputs` and, if you like, `targets` and `mask`, shaped as in `TaskData`.

    The file is read without pickle, so it cannot run code.
    """

    path: str | Path

    def sample(self, trials: int | None = None, seed: int = 0) -> TaskData:
        """The first `trials` trials of the file, or all of them; the seed has no effect."""
        arrays = _read_npz(Path(self.path))
        _check_arrays(arrays, self.path)
        inputs = arrays["inputs"].astype(float)
        count = len(inputs) if trials is None else _count(trials)
        if count > len(inputs):
            raise ValueError(f"asked for {count} trials, but {self.path} has {len(inputs)}")
        targets = arrays["targets"][:count].astype(float) if "targets" in arrays else None
        mask = arrays["mask"][:count].astype(bool) if "mask" in arrays else None
        return TaskData(inputs[:count], targets, mask, {}, Path(self.path).stem, None)


_BUILT_IN = {"memorypro": MemoryPro, "flipflop": FlipFlop}
_DEFAULT_TRIALS = 32


def _find_task(spec: str, options: dict[str, Any]) -> Task:
    kind, colon, rest = spec.partition(":")
    if kind == "neurogym" and colon:
        return Neurogym(rest, options)
    if (kind == "npz" and colon) or spec.endswith(".npz"):
        _check_options(f"a file ({spec})", options, ())
        return ArrayFile(rest if kind == "npz" and colon else spec)
    name = spec.lower().replace("-", "").replace("_", "")
    if name not in _BUILT_IN:
        raise ValueError(_unknown_task(spec))
    task = _BUILT_IN[name]
    _check_options(name, options, [option.name for option in fields(task)])
    return task(**options)


def _unknown_task(spec: str) -> str:
    names = [*_BUILT_IN, *(f"neurogym:{name}" for name in _environments())]
    bare = {name.rpartition(":")[2].lower(): name for name in names}
    near = difflib.get_close_matches(spec.rpartition(":")[2].lower(), bare, n=5, cutoff=0.5)
    nearest = f" Nearest: {', '.join(bare[name] for name in near)}." if near else ""
    known = f"{', '.join(_BUILT_IN)}, neurogym:NAME-v0, or a path that ends in .npz"
    return f"unknown task {spec!r}.{nearest} Known: {known}."


def _check_options(task: str, options: dict[str, Any], known: Sequence[str]) -> None:
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{task} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}")


def _check_at_least(option: str, value: float, least: int) -> None:
    if value < least:
        raise ValueError(f"{option} must be at least {least}, got {value}")


def _count(trials: int | None) -> int:
    if trials is None:
        return _DEFAULT_TRIALS
    if trials < 1:
        raise ValueError(f"trials must be at least 1, got {trials}")
    return trials


def _environments() -> dict[str, str]:
    """Where to find each neurogym environment, as "module:attribute" by name; nothing where neurogym is missing."""
    if importlib.util.find_spec("neurogym") is None:
        return {}
    return importlib.import_module("neurogym.envs.registration").ALL_EXTENDED_ENVS


def _make_environment(name: str, seed: int, options: Mapping[str, Any]) -> Any:
    """The environment itself: `neurogym.make` would put gymnasium's wrappers around it, which warn at each access."""
    if importlib.util.find_spec("neurogym") is None:
        raise ModuleNotFoundError(f"neurogym:{name} needs neurogym: pip install 'kpflow-dyn[neuro]'")
    if name not in (known := _environments()):
        raise ValueError(_unknown_task(f"neurogym:{name}"))
    module, attribute = known[name].split(":")
    factory = getattr(importlib.import_module(module), attribute)
    try:
        env = factory(**_all_options(name, seed, options))
    except TypeError as error:
        raise ValueError(f"neurogym:{name} does not take these options: {error}") from error
    env.seed(seed)
    if hasattr(env, "new_block"):  # its constructor drew the length of the first block before there was a seed
        env.new_block()
    return env


def _all_options(name: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's options, on top of those without which AnnubesEnv cannot be built, or would ignore the seed."""
    needed = {"session": {"v": 0.5, "a": 0.5}, "catch_prob": 0.5, "random_seed": seed}
    return (needed if name == "AnnubesEnv-v0" else {}) | copy.deepcopy(dict(options))


def _new_trial(env: Any, name: str) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Observation [time, channel], right answer [time] or [time, out], and the trial's record."""
    record = env.new_trial()
    task = env.unwrapped
    if not (hasattr(task, "ob") and hasattr(task, "gt")):
        raise ValueError(
            f"neurogym:{name} has no inputs and right answers fixed before the agent acts; take a supervised task"
        )
    return task.ob, task.gt, record


def _pad(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Stack rows [time, ...] of several lengths into [trial, time, ...], with zeros behind the short ones."""
    padded = np.zeros((len(rows), max(map(len, rows)), *rows[0].shape[1:]), rows[0].dtype)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return padded


def _read_answers(answers: np.ndarray, mask: np.ndarray, space: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    if answers.ndim == 3:
        return answers.astype(float), {}
    if answers.max() >= space.n:
        raise ValueError(f"right answer {answers.max()} is not one of the environment's {space.n} actions")
    one_hot = np.eye(int(space.n))[answers]  # [trial, time, class]
    return one_hot * mask[..., None], {"class": answers}


def _tabulate(notes: Sequence[Any]) -> dict[str, np.ndarray]:
    """The trials' records as one array for each key; what does not stack (ragged, nested) is left out."""
    columns = {key: [note[key] for note in notes] for key in notes[0]}
    return {key: np.array(column) for key, column in columns.items() if _stacks(column)}


def _stacks(column: Sequence[Any]) -> bool:
    if any(isinstance(entry, dict) for entry in column) or len({np.shape(entry) for entry in column}) > 1:
        return False
    return np.array(column).dtype.kind in "biufU"


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz file; write one with numpy.savez(path, inputs=..., targets=...)")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("inputs", "targets", "mask") if name in archive}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}); it must hold plain arrays of numbers") from error


def _check_arrays(arrays: dict[str, np.ndarray], path: str | Path) -> None:
    if "inputs" not in arrays:
        raise ValueError(f"{path} has no array named 'inputs'; write it with numpy.savez(path, inputs=...)")
    shape = arrays["inputs"].shape
    for name, array in arrays.items():
        rank = 2 if name == "mask" else 3
        if array.ndim != rank or array.shape[:2] != shape[:2] or 0 in array.shape:
            axes = "[trial, time]" if name == "mask" else "[trial, time, channel]"
            raise ValueError(
                f"{name} in {path} must be {axes}, not empty, with the trials and times of inputs; "
                f"got {array.shape} beside inputs {shape}"
            )
        _check_numbers(name, array, path)


def _check_numbers(name: str, array: np.ndarray, path: str | Path) -> None:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} in {path} must hold real numbers, got dtype {array.dtype}")
    if not (finite := np.isfinite(array)).all():
        first = tuple(int(index) for index in np.argwhere(~finite)[0])
        raise ValueError(f"{name} in {path} has a NaN or infinity, first at {first}; remove or replace such trials")
