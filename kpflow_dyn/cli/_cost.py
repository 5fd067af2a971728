"""What an analysis takes, in time and memory, before it begins.

Both are plural in vectors of the size of all states. How many there are was measured on recurrent networks in both
frameworks; how long one takes is measured here, on this problem.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kpflow_dyn._progress import in_time
from kpflow_dyn._shown import plural

if TYPE_CHECKING:
    from kpflow_dyn._flows.flow import Flow
    from kpflow_dyn._problems.problems import Problem

GB = 1e9
LIBRARIES = 0.6 * GB  # of the process itself
LINEARISED, LEARNING_VECTORS = 40, 90  # vectors held by a flow, and by what says what will be learnt
PER_MODE = 6.5  # applications, and vectors, for each eigenvalue
PER_SAMPLE = 1.3
DRAWING, LEARNING = 4.0, 3.0  # seconds
LEARNING_APPLICATIONS = 250
COMPILATIONS = 8  # each as long as the first application, where programs are compiled
PROBES = 8  # in the application that is timed


@dataclass(frozen=True)
class Work:
    """What is asked of an analysis: how many modes and samples, what is learnt, steps of an optimiser."""

    modes: int
    samples: int
    learning: bool
    steps: int = 0

    @property
    def vectors(self) -> float:
        """How many of them are held at once."""
        of_modes = PER_MODE * self.modes + self.samples
        return LINEARISED + (max(of_modes, LEARNING_VECTORS) if self.learning else of_modes)

    @property
    def applications(self) -> float:
        """Of the NTK, or of something as large."""
        of_numbers = PER_MODE * self.modes + PER_SAMPLE * self.samples
        return of_numbers + LEARNING_APPLICATIONS * self.learning + 1.1 * self.steps


@dataclass(frozen=True)
class Cost:
    """An estimate, good to a factor of about three."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    parameters: int
    seconds: float
    bytes: float

    def __str__(self) -> str:
        names = ("step" if name == "time" else name for name in self.axes)
        sizes = " x ".join(plural(size, name) for size, name in zip(self.shape, names, strict=True))
        took = f"about {in_time(self.seconds)} and {self.bytes / GB:.2g} GB"
        return f"{sizes}, {plural(self.parameters, 'parameter')}: {took}"


def check_memory(problem: Problem, shape: tuple[int, ...] | None, work: Work) -> None:
    """Raise a MemoryError for an analysis of states of this shape that would not fit; None is of any size."""
    from kpflow_dyn._arrays.memory import available, on_device

    if shape is None or on_device(problem.data):
        return
    needed, free = _bytes(problem, shape, work), available()
    if needed > free:
        sizes = " x ".join(f"{size:,}" for size in shape)
        raise MemoryError(
            f"states of {sizes} (trials x times x units) take about {needed / GB:.3g} GB to analyse, and "
            f"{free / GB:.3g} GB of memory are free; lower --trials, --modes or --samples, or take --dtype float32"
        )


def shape_before(problem: Problem) -> tuple[int, ...] | None:
    """That of the states, as far as it is known before the model is run."""
    from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem

    if isinstance(problem, DiscreteProblem) and problem.encoder is None:
        return (*problem.x.shape[:2], problem._start().shape[-1])
    if isinstance(problem, ODEProblem) and problem.encoder is None and len(problem.t) > 2:
        return (problem.z0.shape[0], len(problem.t), problem.z0.shape[-1])
    return None


def cost_of(flow: Flow, work: Work, spent: float = 0.0) -> Cost:
    """What the analysis of a flow takes, from one application of its NTK, and what was spent to get it, in seconds."""
    space, problem = flow.ntk.domain, flow.solution.problem
    first, second = (_seconds(flow) for _ in range(2))
    seconds = spent + DRAWING + LEARNING * work.learning + work.applications * second / PROBES
    seconds += COMPILATIONS * max(0.0, first - second)
    return Cost(space.shape, space.axes, flow.J.domain.size, seconds, _bytes(problem, space.shape, work))


def _bytes(problem: Problem, shape: tuple[int, ...], work: Work) -> float:
    return LIBRARIES + work.vectors * math.prod(shape) * problem.data.dtype.itemsize


def _seconds(flow: Flow) -> float:
    """Of one application to some probes."""
    from kpflow_dyn._arrays import Random, to_numpy

    space = flow.ntk.domain
    probes = Random(0).normal((PROBES, *space.shape), space.like)
    begin = time.perf_counter()
    to_numpy(flow.ntk.mv(probes)[..., :1])  # which waits for the device
    return time.perf_counter() - begin
