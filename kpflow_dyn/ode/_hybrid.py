"""Solve a hybrid model: from jump to jump, by the library of an algorithm in between."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kpflow_dyn._arrays import eps_of, like_numpy, to_numpy
from kpflow_dyn._problems.events import is_moving, looks_of
from kpflow_dyn._problems.hybrid import HybridSteps
from kpflow_dyn._problems.inputs import sampled, stops_of, take_trials
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._progress import one_by_one
from kpflow_dyn.ode._endless import holding, is_torn, pile_of, spacing
from kpflow_dyn.ode._hybrid_calls import Calls, Steps, beside_of
from kpflow_dyn.ode._libraries import Failed, Library, Options, rate_of
from kpflow_dyn.ode._options import snapped
from kpflow_dyn.ode._surfaces import AT_ONCE, Surfaces, arriving

SHORTEST = 16  # step of a library, in units of the round-off of the time
CLOSE = 1e-6  # part of the span that is left to where a library got stuck
HALVINGS = 20  # of the time to the next mark, where a field has no values behind an event
FINITE = "finite"  # what a library then says


@dataclass(frozen=True)
class Method:
    """An algorithm of a library, and its options; `stops` are the times between which it must step, if it must."""

    library: Library
    alg: Any
    options: Options
    stops: np.ndarray | None


@dataclass
class Taken:
    """The steps of some trials so far, which have them in common [trial, ...] each."""

    values: dict[str, list[np.ndarray]] = field(default_factory=lambda: {name: [] for name in _PARTS})
    nodes: list[int] = field(default_factory=list)

    def add(self, **values: Any) -> None:
        """One step more."""
        for name in _PARTS:
            self.values[name].append(np.asarray(values[name]))

    def jumped(self, event: int, after: np.ndarray, located: bool) -> None:
        """The last step ends in a jump."""
        for name, value in (("event", event), ("after", after), ("located", located)):
            self.values[name][-1] = np.asarray(value)

    @property
    def count(self) -> int:
        """How many steps there are."""
        return len(self.values["t"])


_PARTS = ("t", "end", "before", "reached", "after", "stage_times", "event", "located", "stays")


def solve_hybrid(problem: ODEProblem, method: Method, nodes: np.ndarray) -> tuple[HybridSteps, dict[str, int]]:
    """The steps of all trials, which end at the nodes too, and counts of what was done.

    `Failed` names the trials that did not reach the end.
    """
    alone, runs, failures = is_moving(problem.f), [], {}
    if alone:
        _check_apart(problem)
    with one_by_one("trials", groups_of(problem)) as groups:
        for trials in groups:
            run = _Run(take_trials(problem, trials) if alone else problem, method, nodes)
            try:
                run.run()
            except Failed as failure:
                if not alone:
                    raise
                failures[int(trials[0])] = failure.trials[0]
            runs.append(run)
    if failures:
        raise Failed(failures, apart=True)
    stats = {"steps": max(run.taken.count for run in runs) - 1, "events": max(run.happened for run in runs)}
    return _side_by_side(problem, runs), stats


def groups_of(problem: ODEProblem) -> list[np.ndarray]:
    """Trials that have the times of their steps in common: each is one alone where a condition says when events are."""
    every = np.arange(len(problem.z0))
    return [every[n : n + 1] for n in every] if is_moving(problem.f) else [every]


def _check_apart(problem: ODEProblem) -> None:
    """Raise where trials influence each other, which here are solved one by one."""
    rows = 1 + 0.01 * np.arange(len(problem.z0))[:, None]  # trials that begin alike would hide it
    z, t = problem.z0 * like_numpy(rows, problem.z0), like_numpy(np.asarray(problem.t[0]), problem.z0)
    whole = to_numpy(rate_of(problem)(t, z))
    size = max(1.0, np.abs(whole).max(), np.abs(to_numpy(z)).max())  # of the terms of a rate that may be small
    for n in {0, len(z) - 1}:
        try:
            alone = to_numpy(rate_of(take_trials(problem, np.array([n])))(t, z[n : n + 1]))[0]
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the flow fails on one trial alone: {error}. {_APART}") from error
        if np.abs(alone - whole[n]).max() > 1e3 * eps_of(problem.z0) * size:
            raise ValueError(f"the flow of one trial by itself differs from the same among the others. {_APART}")


_APART = (
    "Trials with events are solved one by one, so they must not influence each other, as means over trials do; numbers "
    "that a model holds for each trial are inputs x"
)


class _Run:
    """One solve, of trials that have their times in common."""

    def __init__(self, problem: ODEProblem, method: Method, nodes: np.ndarray) -> None:
        self.problem, self.method, self.model, self.nodes = problem, method, problem.f, nodes
        self.t0, self.end = float(problem.t[0]), float(problem.t[-1])
        self.now, self.y = self.t0, to_numpy(problem.z0)
        self.taken, self.happened, self.expected = Taken(), 0, 0  # `expected` are the events at given times
        self.barrier: float | None = None  # where a library got stuck
        self.hits: list[float] = []  # the times of events that conditions say
        self.calls = Calls(problem)
        self.given = _given_events(problem, nodes)
        known = sampled(problem)
        self.x = problem.x if known is None else known
        self.surfaces = Surfaces(
            self.model.events, self.calls, eps_of(problem.z0), self.end - self.t0, looks_of(self.model)
        )

    def run(self) -> None:
        """To the last time."""
        try:
            self._run()
        except Failed as failure:
            raise _told(self, failure) from failure

    def _run(self) -> None:
        self._wait()
        self._mark(self.t0)
        self.surfaces.start(self.now, self.y)
        stops = () if self.method.stops is None else self.method.stops
        times = [*self.problem.t, *self.nodes, *stops_of(self.problem), *stops, *self.given]
        for time in np.unique(times)[1:].tolist():
            self._flow_to(time)
            self._mark(time)

    def _still(self) -> dict[str, Any]:
        """A step of length zero here."""
        here = {"t": self.now, "end": self.now, "before": self.y, "reached": self.y, "after": self.y}
        return {**here, "event": -1, "located": False, "stays": False}

    def _mark(self, time: float) -> None:
        """The jumps that are given for this time or that inputs cause then, and whether it is one of the grid."""
        for event in self.given.get(time, ()):
            self.expected += 1
            self._jump(event, located=False)
        if time in self.calls.jumps and not self.surfaces.none:
            self.calls.behind = True
            for event in self.surfaces.thrown(time, self.y):
                self._jump(event, located=False)
            self.calls.behind = False
        if time in self.nodes:
            self.taken.nodes.append(self.taken.count - 1)

    def _flow_to(self, time: float) -> None:
        while self.now < time:
            steps = self._steps(time)
            if self.surfaces.none:
                self._take(steps, len(steps["t"]))
                continue
            found = self.surfaces.first_crossing(steps)
            self._take(steps, len(steps["t"]) if found is None else found.step)
            if found is not None:
                self._take_to(steps, found.step, found.length)
                self.barrier = None
                self.hits.append(self.now)
                self._jump(found.event, located=True)
                self.surfaces.check_goes_on(found.event, self.now)
                _check_flow(self, found.event)
                if self.now >= time:  # a step of its own ends at the grid
                    while (event := arriving(self.surfaces, self.now, self.y)) is not None:  # others, at the same time
                        self._take_to(_one_step(self.calls, self.now, self.y, self.now), 0, 0.0)
                        self._jump(event, located=True)
                    self._wait()

    def _jump(self, event: int, located: bool) -> None:
        """One event, and those that its jump makes happen at the same time."""
        pending, before = [(event, located)], self.happened
        while pending:
            number, where = pending.pop(0)
            if self.taken.values["event"][-1] >= 0:
                self._wait(stays=True)
            old, self.y = self.y, self.calls.after_jump(number, self.now, self.y)
            self.taken.jumped(number, self.y, where)
            self.happened += 1
            if not self.surfaces.none and self.happened - self.expected > self.model.max_events:
                raise Failed({0: (f"has more than max_events = {self.model.max_events} events", self.now)}, apart=True)
            if self.happened - before > AT_ONCE + len(self.model.events):
                raise Failed({0: ("has events that cause each other without end", self.now)}, apart=True)
            pending += [(other, False) for other in self.surfaces.crossed(number, where, self.now, old, self.y)]

    def _wait(self, stays: bool = False) -> None:
        self.taken.add(**{**self._still(), "stays": stays}, stage_times=self.calls.stage_times(self.now, 0.0))

    def _take(self, steps: Steps, count: int) -> None:
        """The first steps of the library, as they are."""
        for n in range(count):
            values = {name: array[n] for name, array in steps.items()}
            self.taken.add(**values, reached=values["after"], event=-1, located=False, stays=False)
        if count:
            self.now, self.y = float(np.max(steps["end"][count - 1])), steps["after"][count - 1]

    def _take_to(self, steps: Steps, place: int, length: float) -> None:
        """A part of one step."""
        begin = float(steps["t"][place, 0])
        self.now = begin + length
        self.y = self.calls.step_to(steps, place, np.array([self.now - begin]))[:, 0]
        times = begin + self.calls.method.c * (self.now - begin)
        self.taken.add(**{**self._still(), "t": begin, "before": steps["before"][place]}, stage_times=times[None])

    def _steps(self, time: float) -> Steps:
        """Those of the library from now to this time [step, trial, ...], or one where that is too near."""
        if self.barrier is not None and self.barrier - self.now > CLOSE * (self.end - self.t0):
            time = min(time, (self.now + self.barrier) / 2)
        round_off = SHORTEST * eps_of(self.problem.z0) * max(abs(self.now), abs(time))
        if time - self.now <= round_off and self.calls.tableau is not None:
            return _one_step(self.calls, self.now, self.y, time)
        failures: list[Failed] = []
        for halved in range(1 if self.surfaces.none else HALVINGS):
            try:
                return self._steps_to(self.now + (time - self.now) / 2**halved)
            except Failed as failure:  # perhaps behind an event, that comes first
                failures.append(failure)
                reason, stuck = failure.trials[0]
                if FINITE not in reason:
                    if self.surfaces.none or self.barrier is not None:
                        break
                    self.barrier = stuck  # closer to it, as there may be an event before
                    return self._steps(time)
        raise failures[-1]

    def _steps_to(self, time: float) -> Steps:
        """Those of the library from now to this time."""
        problem, (begin, end) = copy.copy(self.problem), _within(self.calls, self.now, time)
        problem._set(t=np.array([begin, end]), z0=like_numpy(self.y, self.problem.z0), x=self.x)
        stops = None if self.method.stops is None else problem.t
        options = dataclasses.replace(self.method.options, steps=stops)
        found = self.method.library.solve(problem, self.method.alg, problem.t, options).steps
        if found is None:
            raise ValueError(
                f"{self.method.alg!r} has steps that depend on those before them, so they cannot be cut at a jump; "
                "solve a hybrid model by a Runge-Kutta method, such as 'dopri5' or diffrax.Tsit5()"
            )
        self.calls.tableau = found.tableau
        ends = found.t + found.dt
        ends[:, -1] = time
        values = {"t": found.t, "end": ends, "before": found.before, "after": found.after}
        values["stage_times"] = found.stage_times
        return {name: np.moveaxis(_numpy(array), 1, 0)[1:] for name, array in values.items()}


def _one_step(calls: Calls, now: float, y: np.ndarray, time: float) -> Steps:
    """One of the method, from now to this time."""
    every = np.ones((1, len(y)))
    steps = {"t": now * every, "end": time * every, "before": y[None]}
    after = calls.step_to(steps, 0, np.array([time - now]))[:, 0]
    return {**steps, "after": after[None], "stage_times": calls.stage_times(now, time - now)[None]}


def _within(calls: Calls, begin: float, end: float) -> tuple[float, float]:
    """Two times, moved inwards by round-off where x jumps there."""
    if begin in calls.jumps:
        begin = float(beside_of(calls.problem, begin, np.inf))
    if end in calls.jumps:
        end = float(beside_of(calls.problem, end, -np.inf))
    return begin, end


def _check_flow(run: _Run, event: int) -> None:
    """Raise where behind an event the flow is left to rounding, as it jumps on the surface."""
    near = eps_of(run.problem.z0) ** 0.5 * (run.end - run.t0)
    if run.surfaces.is_on(event) and is_torn(run.y, _rate(run), near):
        raise Failed({0: (f"has a flow that jumps on the surface of event {event}", run.now)}, apart=True)


def _rate(run: _Run) -> Callable[[np.ndarray], np.ndarray]:
    """The flow here and now, of states [trial, unit]."""
    rate, like = rate_of(run.problem), run.problem.z0
    return lambda y: to_numpy(rate(like_numpy(np.asarray(run.now), like), like_numpy(y, like)))


def _told(run: _Run, failure: Failed) -> Failed:
    """A failure by what it comes from."""
    (reason, time), surfaces, problem = failure.trials[0], run.surfaces, run.problem
    if surfaces.none or FINITE in reason:
        return failure
    holds = holding(surfaces, run.now, run.y, _rate(run))
    if holds is not None:
        reason = f"slides along the surface of event {holds}, which pushes it back from both sides"
    elif (end := pile_of(run.hits)) is not None:
        end, time = problem.form.time(end), run.hits[-1]
        reason = f"has events that come ever faster and pile up at about {end:.6g}, the last one"
    elif "max_events" in reason:
        reason += spacing(run.hits)
    return Failed({0: (reason, time)}, apart=True)


def _numpy(values: Any) -> np.ndarray:
    return values if isinstance(values, np.ndarray) else to_numpy(values)


def _given_events(problem: ODEProblem, nodes: np.ndarray) -> dict[float, list[int]]:
    """The events of each given time."""
    found: dict[float, list[int]] = {}
    for number, event in enumerate(problem.f.events):
        times = () if event.condition is not None else event.times(float(problem.t[0]), float(problem.t[-1]))
        for time in snapped(np.asarray(times, np.float64), nodes).tolist():
            same = [other for other in found if abs(other - time) <= 1e-12 * max(abs(time), abs(other))]
            found.setdefault(same[0] if same else time, []).append(number)
    return found


def _side_by_side(problem: ODEProblem, runs: list[_Run]) -> HybridSteps:
    """The steps of all trials, with steps of length zero at t0 before those of trials that have fewer."""
    most = problem.backend.solving.rounded(max(run.taken.count for run in runs))
    found = [_filled_up(run, most - run.taken.count) for run in runs]
    joined = {name: np.concatenate([parts[name] for parts in found]) for name in found[0]}
    states = {name: like_numpy(joined.pop(name), problem.z0) for name in STATES}
    return HybridSteps(tableau=runs[0].calls.method, **states, **joined)


STATES = ("before", "reached", "after")


def _filled_up(run: _Run, more: int) -> dict[str, np.ndarray]:
    """The steps of one solve [trial, step, ...], behind this number more at t0."""
    trials, z0, stages = len(run.y), to_numpy(run.problem.z0), len(run.calls.method.c)
    still = {"t": run.t0, "end": run.t0, "event": -1, "located": False, "stays": False, "stage_times": run.t0}
    first, widths = (
        {**still, **dict.fromkeys(STATES, z0)},
        {"stage_times": (stages,), **dict.fromkeys(STATES, z0.shape[1:])},
    )
    found = {}
    for name, values in run.taken.values.items():
        shape = (trials, *widths.get(name, ()))
        values = [first[name]] * more + [first[name] if value.shape[-1:] == (0,) else value for value in values]
        found[name] = np.stack([np.broadcast_to(np.asarray(value), shape) for value in values], 1)
    return {**found, "nodes": np.tile(np.array(run.taken.nodes) + more, (trials, 1))}
