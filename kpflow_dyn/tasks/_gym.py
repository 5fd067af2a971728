"""Trials of neurogym's environments."""

import copy
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kpflow_dyn.tasks._data import TaskData, check_memory, check_options, count, nearest, options_of


@dataclass(frozen=True)
class Neurogym:
    """Trials of a neurogym environment that says what the right answer is, such as "PerceptualDecisionMaking-v0".

    Every trial comes from the environment's own `new_trial`, so all start afresh. Shorter trials are padded with zeros,
    where the mask is False. A Discrete action becomes a one-hot target, its number standing in labels["class"]
    [trial, time]; a Box action is the target as it is. `labels` also has what the environment records of each trial
    (ground_truth, coh, ...), as far as that is one array.

    Args:
        name: as neurogym has it registered; it and the options are checked when trials are sampled.
        options: what the environment's constructor takes, such as dt=20, sigma=0.5, timing={"stimulus": 500}.

    Raises:
        ValueError: an environment, an option or a period of `timing` that is not there; the message lists those that
            are.
    Source: neurogym, Molano-Mazon et al., PsyArXiv (2022), doi 10.31234/osf.io/aqc9n.

    >>> Neurogym("PerceptualDecisionMaking-v0", {"sigma": 0.5}).sample(trials=8, seed=0).inputs.shape
    (8, 22, 3)
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def sample(self, trials: int | None = None, seed: int = 0) -> TaskData:
        """Trials as long as the longest of them."""
        size = count(trials)
        with warnings.catch_warnings():
            # gymnasium warns of how neurogym's own collections use it.
            warnings.filterwarnings("ignore", category=UserWarning, module="gymnasium")
            env = _make_environment(self.name, seed, self.options)
            first = _new_trial(env, self.name, self.options)
            check_memory(size, first[0].size)
            records = [first, *(_new_trial(env, self.name, self.options) for _ in range(size - 1))]
        observations, answers, notes = zip(*records, strict=True)
        mask = _pad([np.ones(len(answer), bool) for answer in answers])
        targets, labels = _read_answers(_pad(answers), mask, env.action_space)
        labels |= _tabulate(notes)
        dt = float(env.unwrapped.dt)
        name, of_outputs = f"neurogym:{self.name}", _outputs_of(env.action_space, targets.shape[2])
        return TaskData(_pad(observations).astype(float), targets, mask, labels, name, dt, of_outputs)


def environments() -> dict[str, str]:
    """Where to find each neurogym environment, as "module:attribute" by name; nothing where neurogym is missing."""
    if importlib.util.find_spec("neurogym") is None:
        return {}
    return importlib.import_module("neurogym.envs.registration").ALL_EXTENDED_ENVS


def _make_environment(name: str, seed: int, options: Mapping[str, Any]) -> Any:
    """The environment itself: `neurogym.make` would put gymnasium's wrappers around it, which warn at each access."""
    if importlib.util.find_spec("neurogym") is None:
        raise ModuleNotFoundError(f"neurogym:{name} needs neurogym: pip install 'kpflow-dyn[neuro]'")
    if name not in (known := environments()):
        near = nearest(name, [f"neurogym:{other}" for other in known])
        raise ValueError(f"unknown task {f'neurogym:{name}'!r}.{near} `neurogym.all_envs()` lists what there is.")
    module, attribute = known[name].split(":")
    factory = getattr(importlib.import_module(module), attribute)
    if (taken := options_of(factory)) is not None:
        check_options(f"neurogym:{name}", options, taken)
    with _blamed(name, options):
        periods = _periods(factory, _all_options(name, seed, options))
        env = factory(**_all_options(name, seed, options))
    if periods is not None:  # the environment would pass over others in silence
        check_options(f"timing of neurogym:{name}", options["timing"], periods)
    env.seed(seed)
    if hasattr(env, "new_block"):  # its constructor drew the length of the first block before there was a seed
        env.new_block()
    return env


@contextmanager
def _blamed(name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """An error of the environment's own code that says which options it was given."""
    try:
        yield
    except Exception as error:
        if not options:
            raise
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise ValueError(
            f"neurogym:{name} with {given} failed: {type(error).__name__}: {error}; check these options (--task-option)"
        ) from error


def _periods(factory: Callable[..., Any], options: dict[str, Any]) -> list[str] | None:
    """The periods of the environment, where some are given."""
    given = options.pop("timing", None)
    return list(factory(**options).unwrapped.timing) if isinstance(given, Mapping) else None


def _all_options(name: str, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's options, on top of those without which AnnubesEnv cannot be built, or would ignore the seed."""
    needed = {"session": {"v": 0.5, "a": 0.5}, "catch_prob": 0.5, "random_seed": seed}
    return (needed if name == "AnnubesEnv-v0" else {}) | copy.deepcopy(dict(options))


def _new_trial(env: Any, name: str, options: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Observation [time, channel], right answer [time] or [time, out], and the trial's record."""
    with _blamed(name, options):
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


def _outputs_of(space: Any, count: int) -> tuple[str, ...]:
    """The names that the environment gives to its actions, numbered where several share one; () for any other."""
    named = {}
    for name, places in (getattr(space, "name", None) or {}).items():
        several = np.atleast_1d(np.asarray(places, dtype=object))
        labels = [str(name)] if len(several) == 1 else [f"{name} {i + 1}" for i in range(len(several))]
        named |= dict(zip(several.tolist(), labels, strict=True))
    return tuple(named[place] for place in range(count)) if set(named) == set(range(count)) else ()


def _tabulate(notes: Sequence[Any]) -> dict[str, np.ndarray]:
    """The trials' records as one array for each key; what does not stack (ragged, nested) is left out."""
    columns = {key: [note[key] for note in notes] for key in notes[0]}
    return {key: np.array(column) for key, column in columns.items() if _stacks(column)}


def _stacks(column: Sequence[Any]) -> bool:
    if any(isinstance(entry, dict) for entry in column) or len({np.shape(entry) for entry in column}) > 1:
        return False
    return np.array(column).dtype.kind in "biufU"
