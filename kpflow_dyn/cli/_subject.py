"""What is analysed: a network on a task, a module on inputs, or a problem of the user's own, posed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kpflow_dyn.cli._found import GIVEN, Choice, choice, in_checkpoint
from kpflow_dyn.cli._sources import (
    Network,
    attributes_of,
    limit_threads,
    load,
    load_module,
    posed,
    readout_of,
    said_of_options,
)
from kpflow_dyn.cli._terminal import notes

if TYPE_CHECKING:
    from kpflow_dyn._problems.problems import Problem
    from kpflow_dyn._problems.solutions import Solution
    from kpflow_dyn.tasks import TaskData

NO_THREADS = (
    "--threads has no effect on JAX; leave it out, and limit the process itself (on Linux: taskset -c 0-3 kpflow-dyn "
    "...)"
)


@dataclass(frozen=True)
class Subject:
    """A problem, or one that is solved; its task and readout, if it has them; and what the results say of it.

    Attributes:
        about: attributes of the results.
        found: the choices that were made, by subject.
    """

    problem: Problem | Solution
    task: TaskData | None
    readout: Any
    about: dict[str, str]
    found: dict[str, Choice] = field(default_factory=dict)


def subject_of(source: Network | str, seed: int, threads: int | None, loss: str | None) -> Subject:
    """What a source names. Warnings of the user's own code are shown as they come."""
    limit_threads(threads)
    if isinstance(source, str):
        return _own_problem(source, threads)
    if source.module is not None:
        return _module_on_inputs(source, seed, threads)
    with warnings.catch_warnings(record=True) as caught:  # of other packages none is about the numbers
        warnings.simplefilter("always")
        found = _network_on_task(source, seed, loss)
    found.about["warnings"] = "\n".join(notes(caught))
    return found


def _own_problem(reference: str, threads: int | None) -> Subject:
    """The problem of the user's own code."""
    import kpflow_dyn as kp
    from kpflow_dyn.cli._user_code import problem_from

    problem = problem_from(reference)
    _limit_threads(problem.problem if isinstance(problem, kp.Solution) else problem, threads)
    about = {"title": f"Analysis of {reference}", "code": reference}
    return Subject(problem, None, None, about, {"problem": choice(reference, GIVEN, "--problem")})


def _limit_threads(problem: Problem, threads: int | None) -> None:
    if threads is not None and not problem.backend.runtime.limit_threads(threads):
        raise ValueError(NO_THREADS)


def _network_on_task(source: Network, seed: int, loss: str | None) -> Subject:
    network, data = load(source, seed, loss)
    readout, said = readout_of(network, data, source.readout is not None)
    attributes = {
        "title": f"{network.model.upper()} of {network.cell.hidden_size} units on {data.name}",
        "checkpoint": source.checkpoint.name,
        "model": str(network.cell),
        "task": data.name,
        **said_of_options(source),
        "learning": said,
    } | attributes_of(network)
    problem = posed(network, data, source.carry_state)
    return Subject(problem, data, readout, attributes, in_checkpoint(source, network, data))


def _module_on_inputs(source: Network, seed: int, threads: int | None) -> Subject:
    """The user's own module with the weights of the file."""
    network, problem, data = load_module(source, seed)
    _limit_threads(problem, threads)
    attributes = {
        "title": f"Analysis of {source.module}",
        "checkpoint": source.checkpoint.name,
        "code": str(source.module),
        **({} if data is None else {"task": data.name}),
        **said_of_options(source),
        "learning": "nothing is said, as a module of your own comes without a readout",
    } | attributes_of(network)
    return Subject(problem, data, None, attributes, in_checkpoint(source, network, data))
