"""Tasks by their names."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from kpflow_dyn._shown import type_name
from kpflow_dyn.tasks._array_file import ArrayFile
from kpflow_dyn.tasks._by_path import made_by
from kpflow_dyn.tasks._circle import DelayAnti, DelayPro, FourTasks, MemoryAnti, MemoryPro
from kpflow_dyn.tasks._data import Task, TaskData, check_options, nearest
from kpflow_dyn.tasks._decisions import ContextIntegration, EvidenceIntegration, Romo
from kpflow_dyn.tasks._gym import Neurogym, environments
from kpflow_dyn.tasks._memory import FlipFlop, Lag
from kpflow_dyn.tasks._reaching import Reaching
from kpflow_dyn.tasks._signals import LowRankForecast, Sine

_TASKS = (MemoryPro, FlipFlop, MemoryAnti, DelayPro, DelayAnti, FourTasks, ContextIntegration, EvidenceIntegration)
_TASKS += (Lag, Romo, LowRankForecast, Sine, Reaching)
BUILT_IN: dict[str, Callable[..., Task]] = {task.__name__.lower(): task for task in _TASKS}


def make_task(spec: str | Task, trials: int | None = None, seed: int = 0, **options: Any) -> TaskData:
    """Trials of the task that a string names, or of a task.

    Args:
        spec: the name of a task of this package, in any case, with dashes, underscores or without ("memorypro",
            "memory-anti", "four_tasks", "flipflop"); "neurogym:NAME-v0"; "npz:PATH", or a path that ends in .npz;
            "module:Name" or "file.py:Name" for a `Task` of your own, or its class; or such an object itself.
        trials: how many; by default 32, and all of those in a file.
        seed: the same seed gives the same trials. A file has no use for it.
        options: the fields of the task's class, or what the neurogym environment's constructor takes.

    Raises:
        ValueError: an unknown task or option (with the nearest known ones), no trials, a file without usable arrays.
        TypeError: trials or steps that are no whole number; something else than a task, or one that samples something
            else than `TaskData`.
        FileNotFoundError: no such .npz file.
        ModuleNotFoundError: a neurogym task, and neurogym is not installed.

    >>> make_task("flipflop", trials=8, seed=1, bits=2).inputs.shape
    (8, 60, 2)
    """
    data = find_task(spec, options).sample(trials, seed)
    if not isinstance(data, TaskData):
        raise TypeError(f"the task {spec!r} sampled {type_name(data)}, expected a kp.tasks.TaskData")
    return data


def find_task(spec: str | Task, options: dict[str, Any]) -> Task:
    """The task that a string names, with its options, or the one that was given."""
    if not isinstance(spec, str):
        if isinstance(spec, type) or not hasattr(spec, "sample"):
            raise TypeError(f"the task is {spec!r}, expected its name, or an object with sample(trials, seed)")
        check_options(type(spec).__name__, options, ())
        return spec
    kind, colon, rest = spec.partition(":")
    if kind == "neurogym" and colon:
        return Neurogym(rest, options)
    if (kind == "npz" and colon) or spec.endswith(".npz"):
        check_options(f"a file ({spec})", options, ())
        return ArrayFile(rest if kind == "npz" and colon else spec)
    if colon:
        return made_by(spec, "the task", "sample", options)
    name = spec.lower().replace("-", "").replace("_", "")
    if name not in BUILT_IN:
        raise ValueError(_unknown_task(spec))
    task = BUILT_IN[name]
    check_options(name, options, [option.name for option in fields(task)])  # type: ignore[arg-type]
    return task(**options)


def _unknown_task(spec: str) -> str:
    names = [*BUILT_IN, *(f"neurogym:{name}" for name in environments())]
    known = f"{', '.join(BUILT_IN)}, neurogym:NAME-v0, module:Name, or a path that ends in .npz"
    return f"unknown task {spec!r}.{nearest(spec, names)} Known: {known}."
