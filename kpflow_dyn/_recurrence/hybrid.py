"""Flows of hybrid models: the steps from jump to jump as one recurrence, and what is between two times of the grid."""

from __future__ import annotations

from typing import Any

import numpy as np

from kpflow_dyn._arrays import (
    Array,
    add_at,
    like_numpy,
    side_by_side,
    take_at,
    taken,
    to_numpy,
    widened,
)
from kpflow_dyn._flows.flow import Draw, RecurrentFlow
from kpflow_dyn._flows.places import zeroed
from kpflow_dyn._flows.referee import drawn
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.hybrid import HybridSolution, HybridSteps
from kpflow_dyn._problems.measure import Weights
from kpflow_dyn._problems.solutions import check_states
from kpflow_dyn._recurrence.roads import tangent_of
from kpflow_dyn._recurrence.steps import Steps
from kpflow_dyn._recurrence.tangent import Tangent
from kpflow_dyn.ode._jumps import JumpingStep, rows_of


def flow_of_hybrid(sol: HybridSolution, params: Choice, weights: Weights) -> RecurrentFlow:
    """The recurrence from one time of the grid to the next one."""
    tangent, parameters = tangent_between_nodes(sol, params)
    return Steps(tangent, sol, parameters, weights.both).flow()


def tangent_between_nodes(sol: HybridSolution, params: Choice) -> tuple[BetweenNodes, dict[str, Array]]:
    """The tangent of that recurrence, and the parameters that learn."""
    model = sol.problem.backend.tracing.Model(sol.problem.f, params)
    step, rows = rows_of(sol.problem, sol.steps)
    if step.moving:
        rows = _with_rates(sol, model, step, rows)
    whole = _tangent(sol, model, step, rows)
    cut, rows = _cut_at_nodes(sol.steps, step, rows)
    return BetweenNodes(whole, _tangent(sol, model, cut, rows), sol.steps.nodes, sol.state), model.parameters


def _with_rates(sol: HybridSolution, model: Any, step: JumpingStep, rows: Array) -> Array:
    """The rows with 1 / (dc/dh) and (dz_1/dh) / (dc/dh) where a condition says the length h of a step."""
    steps = sol.steps
    places = [np.flatnonzero(row) for row in steps.located]
    most = max(map(len, places))
    if not most:
        return rows
    index = np.stack([np.append(row, np.zeros(most - len(row), int)) for row in places])
    lengths = np.take_along_axis(steps.end - steps.t, index, 1)
    given = side_by_side([taken(rows, index), taken(steps.before, index)], axes=2)
    each_step = sol.problem.backend.solving.each_step
    slopes = model.derivative(
        lambda call, h: each_step(step.lengthened, call, given, h), like_numpy(lengths[..., None], rows)
    )
    ones = like_numpy(np.ones((1, *lengths.shape, 1)), rows)
    found = to_numpy(slopes.push(None, ones))[0]  # [trial, n, unit + 1]
    values, start = to_numpy(rows).copy(), sum(step.widths[name] for name in ("step", "end", "jumps")) + 2
    for trial, at in enumerate(places):
        rate = 1 / found[trial, : len(at), -1:]
        values[trial, at, start : start + found.shape[-1]] = np.concatenate(
            [rate, rate * found[trial, : len(at), :-1]], -1
        )
    return like_numpy(values, rows)


def _cut_at_nodes(steps: HybridSteps, step: JumpingStep, rows: Array) -> tuple[JumpingStep, Array]:
    """The same steps, each interval of the grid by itself: the first step in it begins at the known state."""
    counts = np.ones((*steps.t.shape, 1))
    counts[:, 0] = 0
    for trial, nodes in enumerate(steps.nodes):
        counts[trial, nodes[:-1] + 1] = 0
    cut = JumpingStep(step.step, step.of_step, step.events, step.conditions, step.moving, cut=True)
    return cut, side_by_side([rows, like_numpy(counts, rows), _before(steps, step)], axes=2)


def _before(steps: HybridSteps, step: JumpingStep) -> Array:
    """The states of the recurrence before each step."""
    if not step.moving:
        return steps.before
    return side_by_side([steps.before, like_numpy(steps.t[..., None].copy(), steps.before)], axes=2)


def _tangent(sol: HybridSolution, model: Any, step: JumpingStep, rows: Array) -> Tangent:
    steps, units = sol.steps, sol.state.shape[2]
    tolerance = 0.0 if steps.tableau.explicit else 10 * sol.options["rtol"]

    def check(after: Array, rounding: float) -> None:
        check_states(to_numpy(after)[..., :units], steps.after, max(tolerance, rounding))

    return tangent_of(model, sol.problem.backend.solving, step, rows, _before(steps, step), check)


class BetweenNodes:
    """The recurrence from node to node, of that of the steps; see `kpflow_dyn._recurrence.tangent.Tangent`.

    Weight sites are those of the steps. Where one cannot change the state, as in a reset that does not happen, its
    inputs count as zeros.

    Args:
        whole: the tangent of the steps.
        cut: that of the same steps, where each that begins at a node forgets the states before it.
        nodes: the step that ends at each node [trial, time].
        state: the states there [trial, time, unit].
    """

    def __init__(self, whole: Tangent, cut: Tangent, nodes: np.ndarray, state: Array) -> None:
        self.whole, self.cut, self.nodes, self.next_state = whole, cut, nodes, state
        self.site_kicks, self.weights, self.parameter_size = cut.site_kicks, cut.weights, cut.parameter_size
        self.untraced = whole.untraced or cut.untraced
        self.steps = (nodes.shape[0], whole.next_state.shape[1])  # trials and steps, each of which has weight sites
        self.sites, self._acts, self.inputs = cut.sites, None, cut.inputs
        if len(self.sites):
            self._acts, acts = self._where_sites_act()
            self.inputs = [zeroed(inputs, act) for inputs, act in zip(cut.inputs, acts, strict=True)]

    def _where_sites_act(self) -> tuple[Array, list[np.ndarray]]:
        """Whether each site's outputs reach the state: of all outputs [trial, step, kick], and site by site."""
        like = self.cut.next_state
        (q,) = drawn([(1, *like.shape)], like)
        reaches, parts, start = to_numpy(self.cut.enter_adjoint(q))[0] != 0, [], 0
        for _, site in self.sites:
            width = int(np.prod(site.kicks.shape))
            parts.append(reaches[..., start : start + width].any(-1))
            reaches[..., start : start + width] = parts[-1][..., None]
            start += width
        return like_numpy(reaches.astype(np.float64), like), parts

    def _at(self, values: Array) -> Array:
        """Of steps [probe, trial, step, width] those at the nodes [probe, trial, time, unit]."""
        return take_at(values, self.nodes)[..., : self.next_state.shape[-1]]

    def _on(self, q: Array) -> Array:
        """The transpose."""
        more = self.whole.next_state.shape[-1] - q.shape[-1]
        return add_at(widened(q, more) if more else q, self.nodes, self.steps[1])

    # Each interval by itself

    def kick(self, theta: Array) -> Array:
        return self._at(self.cut.jvp(theta))

    def kick_adjoint(self, q: Array) -> Array:
        return self.cut.vjp(self._on(q))

    def advance(self, dz: Array) -> Array:
        """From the state at the node before."""
        return self._at(self.cut.propagate(self.whole.advance(self._before(dz))))

    def advance_adjoint(self, q: Array) -> Array:
        units = self.next_state.shape[-1]
        back = self.whole.advance_adjoint(self.cut.propagate_adjoint(self._on(q)))
        return take_at(back, self._firsts)[..., :units]

    def _before(self, dz: Array) -> Array:
        more = self.whole.next_state.shape[-1] - dz.shape[-1]
        return add_at(widened(dz, more) if more else dz, self._firsts, self.steps[1])

    @property
    def _firsts(self) -> np.ndarray:
        """The first step of each interval; that of the first node is the first of all."""
        return np.concatenate([0 * self.nodes[:, :1], self.nodes[:, :-1] + 1], 1)

    def step_jvp(self, theta: Array, dz: Array) -> Array:
        return self.kick(theta) + self.advance(dz)

    def step_vjp(self, q: Array) -> tuple[Array, Array]:
        return self.kick_adjoint(q), self.advance_adjoint(q)

    def write(self, theta: Array) -> Array:
        values = self.cut.write(theta)
        return values if self._acts is None else self._acts * values

    def read(self, values: Array) -> Array:
        return self.cut.read(values if self._acts is None else self._acts * values)

    def enter(self, values: Array) -> Array:
        return self._at(self.cut.propagate(self.cut.enter(values)))

    def enter_adjoint(self, q: Array) -> Array:
        return self.cut.enter_adjoint(self.cut.propagate_adjoint(self._on(q)))

    # All of them

    def propagate(self, q: Array) -> Array:
        return self._at(self.whole.propagate(self._on(q)))

    def propagate_adjoint(self, q: Array) -> Array:
        return self._at(self.whole.propagate_adjoint(self._on(q)))

    def jvp(self, theta: Array) -> Array:
        return self._at(self.whole.jvp(theta))

    def vjp(self, q: Array) -> Array:
        return self.whole.vjp(self._on(q))

    def gram(self, q: Array) -> Array:
        return self._at(self.whole.gram(self._on(q)))

    def jvp_apart(self, theta: Array) -> Array:
        return self._at(self.whole.jvp_apart(theta))

    def vjp_apart(self, q: Array) -> Array:
        return self.whole.vjp_apart(self._on(q))

    def factorise(self, start: Array, interval: int) -> Array:
        raise ValueError(
            "Lyapunov exponents of a hybrid model are not computed; multiply the matrices of "
            "kp.dynamics.step_jacobians(solution), which have its jumps in them"
        )

    def truncated(self, bases: list[Array | None]) -> BetweenNodes:
        return BetweenNodes(self.whole.truncated(bases), self.cut.truncated(bases), self.nodes, self.next_state)

    def fed_back(self, draw: Draw) -> BetweenNodes:
        return BetweenNodes(self.whole.fed_back(draw), self.cut.fed_back(draw), self.nodes, self.next_state)
