"""A solved closed loop of any kind, as `analyze` sees it: its times, its plant, its policy, and what it costs.

`Continuous` is a field, `Sampled` a plant under a control that is held from sample to sample, `Stepped` a plant in
discrete time. The latter two may have a policy with a memory; of all three the states are those of the plant.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.linalg import block_diag, expm

from kpflow_dyn._arrays import Array, array_namespace, like_numpy, to_numpy
from kpflow_dyn._flows.flow import Flow
from kpflow_dyn._linearize import linearize
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.hybrid import HybridSolution
from kpflow_dyn._problems.inputs import inputs_at
from kpflow_dyn._problems.problems import DiscreteProblem
from kpflow_dyn._problems.solutions import DiscreteSolution, ODESolution
from kpflow_dyn._shown import type_name
from kpflow_dyn._solve import solve
from kpflow_dyn.control._beside import AtRest, beside_cost
from kpflow_dyn.control._costates import (
    Cost,
    Costates,
    QuadraticCost,
    Swept,
    adjoint,
    again,
    along_jumps,
    along_loop,
    terminal_of,
)
from kpflow_dyn.control._linearisation import linearize_ltv, mesh_edges, plant_at_rest
from kpflow_dyn.control._loops import is_closed_loop, is_stepped_loop, remembering
from kpflow_dyn.control._opened import answers
from kpflow_dyn.control._regulators import Regulator, dlqr, lqr
from kpflow_dyn.control._systems import LTI
from kpflow_dyn.models._closed_loop import ClosedLoop
from kpflow_dyn.models._equations import join

Rows = tuple[np.ndarray, np.ndarray]


def steered(sol: Any, cost: Cost | None, terminal: Cost | None, params: Choice, who: str = "analyze") -> Steered:
    """The loop of a solution; raise for what is none, by the name of the function that was called."""
    problem = getattr(sol, "problem", None)
    if getattr(problem, "encoder", None) is not None:
        raise ValueError(f"the start of the problem learns; {who} takes a loop with a given one, remake(encoder=None)")
    if isinstance(sol, ODESolution) and is_closed_loop(sol.problem.f):
        return Continuous(sol, cost, terminal, params)
    if isinstance(sol, HybridSolution) and hasattr(sol.problem.f, "sampling"):
        if len(sol.problem.f.plant_events):
            raise ValueError(
                "the plant of the loop has events, and a comparison with a regulator that knows of none would say "
                "little; take the parts: training_cost, adjoint, gram, kp.contributions"
            )
        return Sampled(sol, cost, terminal, params)
    if isinstance(sol, DiscreteSolution) and is_stepped_loop(sol.problem.cell):
        return Stepped(sol, cost, terminal, params)
    if isinstance(sol, ODESolution | HybridSolution | DiscreteSolution):
        raise ValueError(
            f"{who} needs a plant and a policy, kp.models.ClosedLoop(plant, policy), as the problem's f or cell; got "
            f"{type_name(problem.model)}"  # type: ignore[union-attr]
        )
    raise TypeError(
        f"{who} takes the solution of an ODEProblem or a DiscreteProblem of a ClosedLoop, got {type_name(sol)}; "
        "of noise and delays take its parts: training_cost, gram, adjoint, kp.contributions"
    )


@dataclass(frozen=True, eq=False)
class Steered:
    """What all kinds have in common.

    Those below say `dt`, `units`, `sol` (on the times of the analysis), `costates`, `flow` and `covector` (whose
    product is the gradient), `before` (what the policy sees at each time), `answer`, `moved`, `acting`, `resting`.
    """

    given: Any
    cost: Cost | None
    terminal: Cost | None
    params: Choice

    dt = 1.0
    memory = stored = 0

    @property
    def model(self) -> Any:
        """The loop."""
        return self.given.problem.model

    @property
    def units(self) -> int:
        """How many states the plant has."""
        raise NotImplementedError

    @cached_property
    def sol(self) -> Any:
        """On the times of the analysis."""
        return self.given

    @property
    def names(self) -> tuple[str, ...]:
        """Of the plant's states."""
        return tuple(getattr(self.model.plant, "state_names", ()))

    @property
    def time(self) -> np.ndarray:
        """The times."""
        return np.asarray(to_numpy(self.sol.t), float)

    def gradient(self, sensitivities: np.ndarray) -> np.ndarray:
        """That of the mean cost [parameter]; in discrete time the sum of what each time contributes."""
        return sensitivities.sum(0)

    @cached_property
    def swept(self) -> Swept:
        """Costates of all that the flow has as its state."""
        raise NotImplementedError

    @cached_property
    def costates(self) -> Costates:
        """Of the plant's states and the policy's."""
        return self.swept.costates

    @property
    def flow(self) -> Flow:
        """Whose first states are the plant's, and which has what the cost needs."""
        return self.swept.flow

    @property
    def covector(self) -> np.ndarray:
        """How a kick to each state of the flow changes the cost [trial, time, unit]."""
        return self.swept.whole

    @cached_property
    def x(self) -> Array | None:
        """Inputs at the times [trial, time, input]."""
        problem = self.sol.problem
        return inputs_at(problem, np.broadcast_to(self.time, (len(self.sol.state), len(self.time))))

    @cached_property
    def before(self) -> Array:
        """What the policy's answer depends on [trial, time, ...]: [plant, memory, the last control if it counts]."""
        raise NotImplementedError

    @cached_property
    def u(self) -> np.ndarray:
        """The policy's control [trial, time, input]."""
        return answers(self, self.before, self.x)[0]

    @property
    def z(self) -> np.ndarray:
        """The plant's states that the policy sees [trial, time, unit]."""
        return to_numpy(self.before)[..., : self.units].astype(float)

    def system(self, C: Any) -> Any:
        """The plant along the trajectories."""
        return linearize_ltv(self.sol, loop="open", C=C)

    # The loop at some states

    def answer(self, row: Array, x: Array | None) -> Array:
        """[memory, u] of a row of `before` on one trial."""
        raise NotImplementedError

    def moved(self, z: Array, u: Array) -> Array:
        """The plant's velocity, or its next state, on one trial."""
        return self.sol.problem.backend.tracing.on_one_trial(self.model.plant)(z, u)

    def acting(self, A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """The plant's A, and its B for the controls of now and of the samples before."""
        return A, [B]

    # Its rest, and the regulator

    def resting(self) -> tuple[Any, np.ndarray]:
        """A problem whose fixed points [plant, memory, ...] are the loop's, and where its trials end [trial, unit]."""
        raise NotImplementedError

    def row_of_rest(self, point: np.ndarray) -> np.ndarray:
        """A row of `before`, of such a fixed point."""
        return point

    def standing(self, z: Array, x: Array | None) -> Array:
        """A row of `before`, of a policy without a memory that has seen the plant stand at z for long."""
        return z

    def regulator(self, at: LTI, cost: QuadraticCost) -> tuple[Regulator, np.ndarray]:
        """That of the plant about its target, and what it weighs an error of the control with."""
        found = dlqr(at, cost.Q, cost.R)
        return found, cost.R + at.B.T @ found.X @ at.B

    def target(self, cost: QuadraticCost) -> LTI:
        """The plant, linearised about the cost's target."""
        like = self.sol.state
        z, u = (like_numpy(np.asarray(a), like) for a in (cost.target, cost.u_target))
        return plant_at_rest(self.model.plant, self.sol.problem.backend, z, u, None)

    def with_policy(self, law: Any) -> Steered:
        """The same plant from the same starts under another policy, of its state."""
        raise NotImplementedError


class Continuous(Steered):
    """A field, z' = plant(z, policy(z))."""

    dt = None

    @property
    def units(self) -> int:
        return int(self.given.problem.z0.shape[-1])

    @cached_property
    def sol(self) -> ODESolution:
        problem = self.given.problem
        if not problem.is_span:
            return self.given
        return again(self.given, problem.remake(t=mesh_edges(self.given)[1]))

    @property
    def time(self) -> np.ndarray:
        return self.sol.problem.t

    def gradient(self, sensitivities: np.ndarray) -> np.ndarray:
        """By the solver's own steps: the times of the analysis are too few."""
        flow, units, trials = self.flow, self.units, len(self.sol.state)
        state, of = flow.solution.state, self.sol.problem.backend.transforms
        q = np.zeros(state.shape)
        q[:, -1, units:] = 1 / trials
        q[:, -1, :units] = terminal_of(self.terminal, state[:, -1:, :units], of)[1] / trials
        measure: Any = flow.J.codomain.measure
        return to_numpy(flow.J.T.mv(like_numpy(q / to_numpy(measure).astype(float), state))).astype(float)

    @cached_property
    def costates(self) -> Costates:
        return adjoint(self.sol, self.cost, self.terminal, t=self.time)

    @cached_property
    def swept(self) -> Swept:
        """Of the loop with the integral of its cost: the covector of [z, int L]' is [l, 1]."""
        problem, found = self.sol.problem, self.costates
        whole = found.costate.values
        if self.cost is not None:
            problem = beside_cost(problem, self.cost, has_control=True)
            whole = np.concatenate([whole, np.ones((*whole.shape[:2], 1))], -1)
        return Swept(found, whole, linearize(again(self.sol, problem), params=self.params))

    @cached_property
    def before(self) -> Array:
        return self.sol(self.time)

    def system(self, C: Any) -> Any:
        return linearize_ltv(self.sol, loop="open", C=C, t=self.time)

    def answer(self, row: Array, x: Array | None) -> Array:
        on_one = self.sol.problem.backend.tracing.on_one_trial
        return on_one(lambda z, x: self.model.policy(join(z, x)))(row, x)

    def resting(self) -> tuple[Any, np.ndarray]:
        return self.sol.problem, to_numpy(self.sol.state)[:, -1]

    def regulator(self, at: LTI, cost: QuadraticCost) -> tuple[Regulator, np.ndarray]:
        return lqr(at, cost.Q, cost.R), cost.R

    def with_policy(self, law: Any) -> Steered:
        problem = self.sol.problem
        return replace(self, params=None, given=again(self.sol, problem.remake(f=ClosedLoop(self.model.plant, law))))


class Sampled(Steered):
    """A plant in continuous time under a policy that is asked at samples; analysed at these, in discrete time."""

    @property
    def sampling(self) -> Any:
        """The sizes and the times."""
        return self.model.sampling

    @property
    def dt(self) -> float:  # type: ignore[override]
        return self.sampling.every

    @property
    def units(self) -> int:
        return self.sampling.state

    @property
    def memory(self) -> int:  # type: ignore[override]
        return self.sampling.memory

    @property
    def stored(self) -> int:  # type: ignore[override]
        """Whether the answer depends on the control before."""
        return int(self.sampling.rate_limit is not None)

    @cached_property
    def sol(self) -> HybridSolution:
        problem, sampling = self.given.problem, self.sampling
        begin, end = float(problem.t[0]), float(problem.t[-1])
        samples = self.model.events[0].times(begin, end)
        times = np.append(samples, [] if end - samples[-1] <= 1e-9 * sampling.every else [end])
        if len(times) == len(problem.t) and np.allclose(times, problem.t, rtol=0, atol=1e-9 * sampling.every):
            return self.given
        every = np.broadcast_to(times, (len(problem.z0), len(times)))
        return again(self.given, problem.remake(t=times, x=inputs_at(problem, every)))

    @cached_property
    def swept(self) -> Swept:
        return along_jumps(self.sol, self.cost, self.terminal, "control", params=self.params)

    @cached_property
    def before(self) -> Array:
        xp, state, sampling = array_namespace(self.sol.state), self.sol.state, self.sampling
        earlier = xp.concat([self.sol.start[:, None], state[:, :-1]], axis=1)
        parts = [state[..., : self.units], earlier[..., self.units : self.units + self.memory]]
        return xp.concat([*parts, earlier[..., -sampling.control :][..., : self.stored * sampling.control]], axis=-1)

    @cached_property
    def u(self) -> np.ndarray:
        return to_numpy(self.sol.state)[..., -self.sampling.control :].astype(float)

    def answer(self, row: Array, x: Array | None) -> Array:
        on_one = self.sol.problem.backend.tracing.on_one_trial
        return on_one(self._answer)(row, x)

    def _answer(self, row: Array, x: Array | None) -> Array:
        known = self.units + self.memory
        z, memory, before = row[..., : self.units], row[..., self.units : known], row[..., known:]
        found = self.sampling.after_sample(self.model.policy, self.model.readout, join(z, x), memory, before)
        return array_namespace(row).concat([part for part in found if part.shape[-1]], axis=-1)

    def acting(self, A: np.ndarray, B: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Exactly, by the exponential; between two samples the control may change once, by the delay."""
        whole, rest = self.sampling.delayed
        phi, late = _held(A, B, self.dt - rest)
        parts = [np.zeros_like(B)] * whole + [late]
        if rest:
            first, early = _held(A, B, rest)
            parts, phi = [*parts, phi @ early], phi @ first
        return phi, parts

    def resting(self) -> tuple[Any, np.ndarray]:
        problem, sampling, state = self.sol.problem, self.sampling, to_numpy(self.sol.state)
        ends = np.concatenate([state[:, -1, : sampling.of_held.start], state[:, -1, -sampling.control :]], -1)
        width = 0 if self.x is None else self.x.shape[-1]
        cell = problem.backend.models.through(self.model, AtRest())
        x = like_numpy(np.zeros((1, 1, width)), self.sol.state)
        return DiscreteProblem(cell, x, like_numpy(ends[:1], self.sol.state)), ends

    def row_of_rest(self, point: np.ndarray) -> np.ndarray:
        return point[: len(point) - (1 - self.stored) * self.sampling.control]

    def standing(self, z: Array, x: Array | None) -> Array:
        if not self.stored:
            return z
        unlimited, on_one = replace(self.sampling, rate_limit=None), self.sol.problem.backend.tracing.on_one_trial
        held = on_one(
            lambda z, x: unlimited.after_sample(self.model.policy, self.model.readout, join(z, x), z[..., :0], z)[1]
        )
        return array_namespace(z).concat([z, held(z, x)], axis=-1)

    def regulator(self, at: LTI, cost: QuadraticCost) -> tuple[Regulator, np.ndarray]:
        """Of the plant between samples and of the integral of its cost there, both exactly."""
        phi, held = _held(at.A, at.B, self.dt)
        weights, units = _weights_held(at.A, at.B, np.asarray(block_diag(cost.Q, cost.R)), self.dt), self.units
        Q, N, R = weights[:units, :units], weights[:units, units:], weights[units:, units:]
        found = dlqr(LTI(phi, held, dt=self.dt, names=at.names), Q, R, N)
        return found, R + held.T @ found.X @ held

    def with_policy(self, law: Any) -> Steered:
        sampling, problem = self.sampling, self.sol.problem
        sizes = {"state_size": sampling.state, "control_size": sampling.control}
        loop = ClosedLoop(self.model.plant, law, every=sampling.every, **sizes)
        found = again(self.sol, problem.remake(f=loop, z0=problem.z0[:, : self.units]))
        return replace(self, params=None, given=found)


class Stepped(Steered):
    """A plant in discrete time."""

    @property
    def dt(self) -> float:  # type: ignore[override]
        return float(getattr(self.model.plant, "dt", None) or 1.0)

    @property
    def units(self) -> int:
        return int(self.model.plant.state_size)

    @property
    def memory(self) -> int:  # type: ignore[override]
        return int(self.sol.state.shape[-1]) - self.units

    @property
    def x(self) -> Array:  # type: ignore[override]
        return self.sol.problem.x

    @cached_property
    def swept(self) -> Swept:
        return along_loop(self.sol, self.cost, self.terminal, self.params)

    @property
    def before(self) -> Array:  # type: ignore[override]
        return self.sol.before

    def answer(self, row: Array, x: Array | None) -> Array:
        return self.sol.problem.backend.tracing.on_one_trial(lambda z, x: remembering(self.model, z, x))(row, x)

    def moved(self, z: Array, u: Array) -> Array:
        return self.sol.problem.backend.tracing.on_one_trial(self.model.plant.step)(z, u)

    def resting(self) -> tuple[Any, np.ndarray]:
        return self.sol.problem, to_numpy(self.sol.state)[:, -1]

    def target(self, cost: QuadraticCost) -> LTI:
        z, u = (like_numpy(np.asarray(a), self.sol.state) for a in (cost.target, cost.u_target))
        return plant_at_rest(self.model.plant, self.sol.problem.backend, z, u, self.dt)

    def with_policy(self, law: Any) -> Steered:
        start = self.sol.start[:, : self.units]
        loop = ClosedLoop(_Unobserved(self.model.plant), law)
        return replace(self, params=None, given=solve(self.sol.problem.remake(cell=loop, z0=start)))


class _Unobserved:
    """A plant in discrete time whose policy sees [z, x]."""

    def __init__(self, plant: Any) -> None:
        self.step, self.state_size = plant.step, plant.state_size


def _held(A: np.ndarray, B: np.ndarray, time: float) -> Rows:
    """A and B of a plant under a control that is held for some time."""
    whole = expm(_with_held(A, B) * time)
    return whole[: len(A), : len(A)], whole[: len(A), len(A) :]


def _with_held(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Of [z, u] with u' = 0."""
    return np.pad(np.concatenate([A, B], 1), ((0, B.shape[1]), (0, 0)))


def _weights_held(A: np.ndarray, B: np.ndarray, weight: np.ndarray, time: float) -> np.ndarray:
    """int exp(M s)^T weight exp(M s) ds over this time, of [z, u] with u' = 0 (Van Loan, 1978)."""
    M = _with_held(A, B)
    whole = expm(np.block([[-M.T, weight], [np.zeros_like(M), M]]) * time)
    found = whole[len(M) :, len(M) :].T @ whole[: len(M), len(M) :]
    return (found + found.T) / 2
