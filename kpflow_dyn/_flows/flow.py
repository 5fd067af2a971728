"""The operators of a linearised solution, by which gradient descent moves its state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self, TypeVar

import numpy as np

from kpflow_dyn._arrays import Array, Random, full_precision
from kpflow_dyn._arrays.complex_numbers import by_name, count
from kpflow_dyn._elsewhere import FLOW, Named
from kpflow_dyn._flows.places import at_places, checked_places, places_of, places_of_steps, reaching
from kpflow_dyn._flows.preconditioner import Block, block_diagonal, chosen_block, for_each_trial, seen_through
from kpflow_dyn._flows.propagator import Propagator
from kpflow_dyn._flows.readout import Readout, readout
from kpflow_dyn._flows.sites import CoreOperator, WeightSite
from kpflow_dyn._flows.truncation import Truncation, truncation
from kpflow_dyn._problems.choice import Choice, as_masks, choose
from kpflow_dyn._problems.solutions import ODESolution, Solution
from kpflow_dyn._problems.stepped import SteppedSolution
from kpflow_dyn._shown import Row, Shown, axes_sizes, plain, some, type_name
from kpflow_dyn._spaces.direct_sums import unit_by_unit
from kpflow_dyn._spaces.operators import GramOperator, Operator

Draw = Callable[[str, Array], Array]  # of a matrix by name: the one that stands in its place in the backward sweep


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Flow(Named, Shown):
    """A solution's linearisation: how changes of the parameters and kicks to the state move the whole state.

    With the state S [trial, time, unit], parameters theta and the implicit constraint F(S, theta) = 0,

        J = dS/dtheta = P B V       ntk = J J* = P K P*       K = B core B*       core = V V^T (x) I

    and one step of gradient descent theta -= eta dL/dtheta moves S by -eta ntk grad_S L + O(eta^2).

    For an ODE these operators act on functions of time. Inner products have quadrature weights w = diag W. Then ntk = J
    J^T W is exact for the discretised model. P = (P_node - I/2) W, K and core have the field's own sites at the nodes,
    so that P K P* tends to ntk as the mesh is refined. `nodal` has the exact identity.

    With a metric M of the optimiser, theta' = -M^{-1} g, ntk = J M^{-1} J* = (J R)(J R)*. K and core then also contain
    M^{-1}; J stays dS/dtheta, and `ntk.factor` is J R.

    Attributes:
        P: the propagator, state -> state; `P.inv` is its inverse where the problem is discrete.
        K: the parameter operator of one step (for an ODE: of the field), state -> state.
        core: the Kronecker core on the weight-site outputs.
        B: site outputs -> state: how each output enters its step (for an ODE: the field).
        J: parameters [p] -> state; `J.T` is backpropagation through time.
        ntk: the global empirical neural tangent kernel, state -> state.
        sites: the weight sites, in the order of the core's outputs; none if `untraced`, when a step counts as one site.
        solution: the solution that was linearised.
        parameters: those that learn, by name, copied at linearisation; a complex number counts as (Re, Im) in J.
        preconditioner: the blocks of R if an optimiser has a metric; else ().
        R: the map of parameter changes before J, from a metric or from a choice of parameters; None for all, unscaled.
        untraced: why the model could not be traced, so that all maps use autograd through it; "" if it was traced.

    Example as `linearize`.
    """

    P: Operator
    K: GramOperator
    core: CoreOperator
    B: Operator
    J: Operator
    ntk: GramOperator
    sites: list[WeightSite]
    solution: Solution
    parameters: dict[str, Array]
    preconditioner: tuple[Block, ...] = field(default=(), repr=False)
    R: Operator | None = field(default=None, repr=False)
    untraced: str = field(default="", repr=False)
    _elsewhere: ClassVar = FLOW

    def _shown(self) -> tuple[str, list[Row]]:
        space = self.ntk.domain
        rows: list[Row] = [("ntk", f"{axes_sizes(space.axes, space.shape)} {plain(space.dtype)}")]
        rows += [("parameters", f"{self.J.domain.size}: {some(list(self.parameters))}"), ("sites", _told(self))]
        rows += [] if self.mask is None else [("where", f"{space.dimension} of {space.size} entries count")]
        rows += [("next", "kp.summary(flow), kp.eigs(flow.ntk, k), flow.output(C)")]
        return f"{type(self).__name__} of {type(self.solution).__name__}", rows

    @property
    def nodal(self) -> Flow:
        """The flow of the steps themselves, where P K P* = ntk to round-off: itself, but for an ODE; see `ODEFlow`."""
        return self

    def truncate(self, rtol: float = 1e-3, seed: int | Random = 0) -> Flow:
        """The flow with fewer directions of each weight's variables; see `RecurrentFlow.truncate`."""
        raise ValueError("only the flow of a recurrence can be truncated")

    def only(self, names: Choice | Mapping[str, Any]) -> Self:
        """The flow in which these parameters alone learn; J, K, core, ntk and `sites` have just their part.

        Nothing is traced anew, and an application costs what one of the whole flow does.

        Args:
            names: names, or a function of the name, or of (name, parameter), that says whether; as `params` of
                `linearize`. Or by name booleans in the parameter's shape, True for the entries that learn, such as the
                rows of one attention head.

        Raises:
            ValueError: an unknown name, no parameter at all, booleans of another shape, a flow that is truncated, or
                one whose metric mixes the entries that should be picked from.

        >>> import torch, kpflow_dyn as kp
        >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(2, 5, 3))))
        >>> flow.only("bias_hh").J.domain.shape, flow.only(lambda name: "bias" in name).sites[0].name
        ((24,), 'bias_ih[0:16] + bias_hh[0:16]')
        """
        if isinstance(names, Mapping):
            masks = as_masks(self.parameters, names)
            return _restricted(self, choose(self.parameters, list(masks)), masks)
        return _restricted(self, choose(self.parameters, names), {})

    def where(self, mask: Any) -> Self:
        """The flow of the states at these trials and times alone: R ntk R, with R the mask as zeros and ones.

        States elsewhere are left out, and also kicks that reach no state that counts, such as those after the end of a
        trial. E selects the times of each trial up to the last one that counts. Then J becomes R J, P R P E, K E K E
        and core E core E, so P K P* = ntk stays exact. Vectors keep their shape, with zeros where nothing counts;
        `ntk.domain.dimension` is the number of entries that count.

        Args:
            mask: booleans [trial, time]; for other flows all axes of the states except that of the units.

        Raises:
            ValueError: a mask of another shape, or one that is nowhere True.

        >>> import torch, kpflow_dyn as kp
        >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(2, 5, 3))))
        >>> mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]) > 0  # the first trial is shorter
        >>> flow.where(mask).ntk.domain.dimension
        64
        """
        places = checked_places(mask, self.ntk.domain, self.mask)
        return self if places.all() else _at(self, places)

    @property
    def mask(self) -> np.ndarray | None:
        """Where states count [trial, time], as `where` was told; None everywhere."""
        return places_of(self.ntk.domain)

    def output(self, C: Any, learn: bool | float = False) -> Output:
        """The flow of a readout y = C s + c: its kernel C ntk C*, on axes such as (trial, time, out).

        Args:
            C: [out, unit], or a Linear layer of torch or equinox; its bias moves nothing. If the state is wider, as for
                an LSTM or several layers, C may read the h of the last layer.
            learn: whether the readout's own weights learn. They add s s' (x) I, and (x) I once more if a layer has a
                bias. A number is their learning rate beside the flow's metric. Frozen weights of a layer do not learn:
                a torch parameter without requires_grad, a numpy array in a layer of JAX.

        Raises:
            ValueError: a C of another width or not finite; states that are not [trial, ..., unit]; or a readout of
                `nodal` that is to learn: the states of `nodal` are not those of the solution.

        >>> import torch, kpflow_dyn as kp
        >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(2, 5, 3))))
        >>> y = flow.output(torch.nn.Linear(8, 2), learn=True)
        >>> y.ntk.domain.shape, list(kp.contributions(y))[-2:]
        ((2, 5, 2), ['readout.weight', 'readout.bias'])
        """
        found = readout(self.ntk, self.solution.problem, self.solution.state, self.parts, C, learn)
        return Output(flow=self, **vars(found))

    @property
    def parts(self) -> dict[str, int]:
        """How many coordinates of `ntk.factor`'s domain each parameter has, in their order."""
        sizes = [block.size for block in self.preconditioner] or map(count, self.parameters.values())
        return dict(zip(self.parameters, sizes, strict=True))

    def as_parameters(self, theta: Array) -> dict[str, Array]:
        """A vector [..., p] as an array [..., *shape] for each parameter; of complex ones Re + i Im, as in torch."""
        self.J.domain.check(theta, "theta")
        return by_name(theta, self.parameters)


class Recurrence(Protocol):
    """The steps behind a flow."""

    def flow(self) -> RecurrentFlow:
        """The flow of all places and parameters, without a metric."""
        ...

    def truncated(self, bases: list[Array | None]) -> RecurrentFlow:
        """The flow with V Q Q^T in the place of each site's variables V, for these Q [d, rank] (None: all)."""
        ...

    def fed_back(self, draw: Draw) -> Operator:
        """J^T with other matrices in the backward sweep."""
        ...

    def propagator(self, draw: Draw) -> Propagator:
        """P with other matrices."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class RecurrentFlow(Flow):
    """The flow of steps z_t = Phi(z_{t-1}, x_t): of a discrete problem, or of the steps that an ODE's solver took.

    Attributes:
        recurrence: the steps.
        truncation: how far `truncate` cut the core, else None.
    """

    P: Propagator
    recurrence: Recurrence
    truncation: Truncation | None = None

    def truncate(self, rtol: float = 1e-3, seed: int | Random = 0) -> RecurrentFlow:
        """The flow with each weight's variables V cut to their leading directions, V Q Q^T, which is faster.

        Q are the eigenvectors of V^T W V with the largest eigenvalues s_1^2, s_2^2, ...; then

            0 <= ntk - truncated ntk,   |ntk - truncated ntk| <= |P B|^2 max s_{r+1}^2 <= rtol |ntk|

        in the operator norm, the maximum over the sites. Each site keeps the fewest directions r that satisfy it, and
        the cost of K falls from d to r. Weights that are computed, or used at several sites, are left whole. The norms
        are found by block Lanczos. Eigenvalues move by no more than the bound, but what is left out adds up in traces.
        It is an approximation: certified pairs come from the flow itself.

        Raises:
            ValueError: an rtol outside of (0, 1); a flow whose ntk is not that of steps with sites of their own (of an
                ODE truncate `flow.nodal`; networks and fixed points have none), that has a metric or some of its
                parameters `only`, or that is truncated already.

        >>> import torch, kpflow_dyn as kp
        >>> x = torch.sin(0.1 * torch.arange(60.0))[None, :, None].expand(4, -1, -1)
        >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(1, 20), x)))
        >>> flow.truncate(rtol=1e-2).truncation.bound <= 1e-2
        True
        """
        if not isinstance(rtol, int | float) or not 0 < rtol < 1:
            raise ValueError(f"rtol of truncate is {rtol!r}, expected a number between 0 and 1")
        self._check_whole("truncate the whole one")
        if self.R is not None:
            raise ValueError(
                "a flow with a metric, or of some parameters only, cannot be truncated; truncate the one without"
            )
        with full_precision(self.ntk.domain.like):
            cut = truncation(self.P @ self.B, self.ntk.factor, self.core, rtol, Random(seed))
            found = dataclasses.replace(self.recurrence.truncated(cut.bases), truncation=cut)
            return found if self.mask is None else found.where(self.mask)

    def only(self, names: Choice | Mapping[str, Any]) -> Self:
        self._check_whole("take .only of the whole, as the bound is one for all parameters")
        return super().only(names)

    def feedback(self, draw: Draw) -> Operator:
        """R* J*, where errors go back through other matrices; see `kpflow_dyn.learning_rules.feedback_alignment`."""
        return self.gradient(self.recurrence.fed_back(draw))

    def gradient(self, back: Operator) -> Operator:
        """R* back of the states that count, for a map of the states to changes of all parameters."""
        counted = Operator(self.ntk.domain, back.domain, self.ntk.domain.counted, self.ntk.domain.counted)
        return (back if self.R is None else self.R.T @ back) @ counted

    def _check_whole(self, advice: str) -> None:
        if self.truncation is not None:
            raise ValueError(f"this flow is truncated already; {advice}")


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ODEFlow(Flow):
    """The flow of an ODE's solution, whose operators act on functions of time.

    Attributes:
        of_steps: makes `steps`.
    """

    of_steps: Callable[[], RecurrentFlow] | None = field(default=None, repr=False)

    @cached_property
    def steps(self) -> RecurrentFlow | None:
        """The flow of the steps that the solver took, made when it is first asked for; None without replayed steps."""
        return None if self.of_steps is None else self.of_steps()

    @property
    def nodal(self) -> RecurrentFlow:
        """The flow of the solver's steps, each counted as one, where P K P* = ntk to round-off.

        Its times are the ends of the steps, the first one of length zero at t0; where nodes lie inside of steps, its
        units are followed by h times the stage derivatives that they are read from. Where the sensitivities are not
        those of frozen steps it is a ValueError.
        """
        if self.steps is None:
            raise ValueError(
                "there is no nodal identity without replayed steps; linearize with sensealg=DiscreteAdjoint() and a "
                "Runge-Kutta method"
            )
        return self.steps

    def truncate(self, rtol: float = 1e-3, seed: int | Random = 0) -> Flow:
        """Refused: the ntk of an ODE is not made of the field's sites."""
        raise ValueError(
            "the ntk of an ODE is not made of the field's sites; truncate flow.nodal, the flow of its steps"
        )


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ConstraintFlow(Flow):
    """The flow of a network, a fixed point or a free-form constraint, which have no steps."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Output(Readout):
    """How gradient descent moves a readout y = C s + c of the states, on their axes with "out" in the place of "unit".

        ntk = C ntk_S C*,    where the readout learns plus  V V^T (x) I,  V = [s] or [s, 1] at each trial and time

    Attributes:
        flow: of the states.
        values: the output y [trial, ..., out].
        C: the readout, state -> output.
        J: changes of the flow's parameters (times the R of their metric), and then of the readout's [unit, out],
            -> output.
        ntk: the neural tangent kernel of the output, J J*.
        parts: how many coordinates of J's domain each parameter has, in their order.
        weight, bias, rate: the readout, [out, unit] and [out], and its learning rate, 0 where it does not learn.

    >>> import torch, kpflow_dyn as kp
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(2, 5, 3))))
    >>> flow.output(torch.nn.Linear(8, 2)).values.shape
    torch.Size([2, 5, 2])
    """

    flow: Flow


AnyFlow = TypeVar("AnyFlow", bound=Flow)


def check_flow(given: Any) -> None:
    """Raise unless this is a flow, or a readout of one."""
    if not isinstance(given, Flow | Output):
        raise TypeError(f"got {type_name(given)}, expected a Flow, as kp.linearize makes it, or flow.output(C)")


def preconditioned(flow: AnyFlow, blocks: Sequence[Block]) -> AnyFlow:
    """The flow whose parameters move by theta' = -R R* g; J stays the derivative in the parameters."""
    changed = dataclasses.replace(_through(flow, blocks), preconditioner=tuple(blocks))
    return _with_steps(changed, lambda steps: preconditioned(steps, blocks))


def _restricted(flow: AnyFlow, names: Sequence[str], masks: Mapping[str, np.ndarray]) -> AnyFlow:
    """The flow of some parameters, which are in its order, or of the entries that a mask of theirs picks."""

    def chosen(sizes: dict[str, int]) -> list[Block]:
        return [chosen_block(size, name in names, masks.get(name), flow.P.domain.like) for name, size in sizes.items()]

    of_parameters = chosen({name: count(value) for name, value in flow.parameters.items()})
    dropped = [name for name in flow.parameters if name not in names]
    blocks = flow.preconditioner or (of_parameters if masks else ())
    changed = dataclasses.replace(
        _through(flow, chosen(flow.parts)),
        sites=[dataclasses.replace(s, name=_without(s.name, dropped)) for s in seen_through(of_parameters, flow.sites)],
        J=flow.J @ block_diagonal(of_parameters, flow.J.domain),
        parameters={name: flow.parameters[name] for name in names},
        preconditioner=tuple(block for block, name in zip(blocks, flow.parameters, strict=False) if name in names),
    )
    return _with_steps(changed, lambda steps: _restricted(steps, names, masks))


def _at(flow: AnyFlow, places: np.ndarray) -> AnyFlow:
    """The flow at these places; of an ODE with the steps that lead to them."""
    reach, solution = None if isinstance(flow, ConstraintFlow) else reaching(places), flow.solution
    several = flow.core.domain.shape[1] != flow.P.domain.shape[1]
    of_sites = solution.leading_to(reach) if several and reach is not None else None  # type: ignore[attr-defined]
    changed = dataclasses.replace(flow, **at_places(flow, places, reach, of_sites))
    if not isinstance(flow, ODEFlow):
        return changed
    if isinstance(solution, SteppedSolution):
        return _with_steps(changed, lambda steps: steps.where(places[:, solution.leads_to]))
    if not isinstance(solution, ODESolution) or solution.steps is None:
        return changed
    of_steps = places_of_steps(places, solution.nodes, solution.steps)
    return _with_steps(changed, lambda steps: steps.where(of_steps))


def _without(name: str, dropped: list[str]) -> str:
    """A site's name without the parameters that do not learn."""
    parts = name.split(" + ")
    gone = [any(part == other or part.startswith(f"{other}[") for other in dropped) for part in parts]
    return " + ".join(part for part, out in zip(parts, gone, strict=True) if not out)


def _with_steps(flow: AnyFlow, change: Callable[[RecurrentFlow], RecurrentFlow]) -> AnyFlow:
    """The flow of an ODE with its steps changed as well."""
    if isinstance(flow, ODEFlow) and flow.of_steps is not None:
        whole = flow.of_steps
        return dataclasses.replace(flow, of_steps=lambda: change(whole()))
    return flow


def _through(flow: AnyFlow, blocks: Sequence[Block]) -> AnyFlow:
    """The flow with R behind the factors of its operators."""
    R, ntk = block_diagonal(blocks, flow.ntk.factor.domain), flow.ntk
    kick = flow.K.factor @ R
    return dataclasses.replace(
        flow,
        K=GramOperator(kick, direct_sum=lambda: unit_by_unit(kick)),
        core=CoreOperator(flow.core.factor @ R, seen_through(blocks, flow.core.sites), flow.core.untraced),
        ntk=GramOperator(ntk.factor @ R, None, None if ntk.apart is None else for_each_trial(ntk.apart, R)),
        R=R if flow.R is None else flow.R @ R,
    )


SHOWN_KINDS = {"scale": "entry by entry"}  # what is no word of everybody's


def _told(flow: Flow) -> str:
    """Its weight sites, or why there are none."""
    sites = [f"{site.name} ({SHOWN_KINDS.get(site.kind, site.kind)})" for site in flow.sites]
    return f"none, autograd alone: {flow.untraced}" if flow.untraced else f"{len(sites)}: {some(sites)}"
