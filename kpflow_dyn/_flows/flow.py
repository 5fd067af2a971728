"""The operators of a linearised solution, by which gradient descent moves its state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, Random, full_precision
from kpflow_dyn._flows.sites import CoreOperator, WeightSite
from kpflow_dyn._problems.choice import Choice, as_masks, choose
from kpflow_dyn._problems.solutions import Solution
from kpflow_dyn._spaces.operators import GramOperator, Operator
from kpflow_dyn._spaces.space import Space

if TYPE_CHECKING:
    from kpflow_dyn._flows.preconditioner import Root
    from kpflow_dyn._flows.readout import Output
    from kpflow_dyn._flows.truncation import Truncation

Apply = Callable[[Array], Array]
Draw = Callable[[str, Array], Array]  # of a matrix by name: what stands in its place when sweeping backward


@dataclass(frozen=True)
class DiscreteAdjoint:
    """The exact derivative and its transpose of the steps that were taken, dz_t = A_t dz_{t-1} + B_t dtheta.

    Of an ODE these are the accepted steps of its solver: the scheme is differentiated, not the choice of its steps.

    Source: Griewank, Walther, "Evaluating derivatives" (2008).

    Example:
        >>> import torch, kpflow_dyn as kp
        >>> solution = kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 8), torch.randn(2, 5, 3)))
        >>> kp.check_adjoint(kp.linearize(solution, sensealg=kp.DiscreteAdjoint()).J) < 1e-5
        True
    """


@dataclass(frozen=True)
class InterpolatingAdjoint:
    """Sensitivities of an ODE by variational and adjoint equations, each solved adaptively along the dense z(t).

        J theta     d' = A d + F theta,  d(t_0) = 0        A = df/dz,  F = df/dtheta
        J* q        -l' = A^T l,  l += q_j at the nodes    g = int F^T l dt

    They are those of the equation rather than of the solver's steps, which need not be known. J and J* are linear and
    adjoint to each other only to the tolerances: `kp.check_adjoint(flow.J)` tells how far.

    Args:
        rtol: relative tolerance of each solve.
        atol: absolute tolerance, where the largest entry of the vector applied to is one.

    Raises:
        ValueError: tolerances that are not positive.

    Source: Chen, Rubanova, Bettencourt, Duvenaud, "Neural ordinary differential equations", arXiv:1806.07366.

    Example:
        >>> import torch, kpflow_dyn as kp
        >>> field, start = kp.models.CTRNNField(8).double(), torch.randn(2, 8).double()
        >>> solution = kp.solve(kp.ODEProblem(field, start, [0.0, 0.5, 1.0]))
        >>> kp.check_adjoint(kp.linearize(solution, sensealg=kp.InterpolatingAdjoint(rtol=1e-8)).J) < 1e-5
        True
    """

    rtol: float = 1e-6
    atol: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ValueError(f"{name} of InterpolatingAdjoint is {value!r}, expected a positive number")


class Propagator(Operator):
    """P = (D_S F)^{-1}: s_t = A_t s_{t-1} + q_t, with s_0 = 0; `inv` is D_S F itself: q_t = s_t - A_t s_{t-1}."""

    def __init__(self, forward: Operator, inverse: Operator) -> None:
        super().__init__(forward.domain, forward.codomain, forward.mv, forward.T.mv)
        self.inv = inverse


@dataclass(frozen=True, eq=False)
class Flow:
    """A solution's linearisation: how changes of the parameters and kicks to the state move the whole state.

    With the state S [trial, time, unit], parameters theta and the implicit constraint F(S, theta) = 0,

        J = dS/dtheta = P B V       ntk = J J* = P K P*       K = B core B*       core = V V^T (x) I

    and one step of gradient descent theta -= eta dL/dtheta moves S by -eta ntk grad_S L + O(eta^2).

    Of an ODE these are operators between functions of time, with inner products of quadrature weights w = diag W:
    ntk = J J^T W is exact for the discretised model, while P = (P_node - I/2) W, K and core have the field's own sites
    at the nodes, so that P K P* tends to ntk as the mesh is refined. `nodal` has the exact identity.

    With a metric M of the optimiser, theta' = -M^{-1} g, ntk = J M^{-1} J* = (J R)(J R)*, and K and core have M^{-1}
    inside as well; J stays dS/dtheta, and `ntk.factor` is J R.

    Attributes:
        P: the propagator, state -> state; `P.inv` is its inverse where the problem is discrete.
        K: the parameter operator of one step (of an ODE: of the field), state -> state.
        core: the Kronecker core on the weight-site outputs.
        B: site outputs -> state, how each enters its step (of an ODE: the field).
        J: parameters [p] -> state; `J.T` is backpropagation through time.
        ntk: the global empirical neural tangent kernel, state -> state.
        sites: the weight sites, in the order of the core's outputs.
        solution: what was linearised.
        parameters: the parameters that learn, by name, as they were when linearised.
        truncation: how far `truncate` cut the core, else None.
        steps, with_bases, with_feedback, roots: what `nodal`, `truncate`, `learning_rules` and `only` work with.

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
    steps: Flow | None = field(default=None, repr=False)
    truncation: Truncation | None = None
    with_bases: Callable[[list[Array | None]], Flow] | None = field(default=None, repr=False)
    with_feedback: Callable[[Draw], Operator] | None = field(default=None, repr=False)
    roots: tuple[Root, ...] = field(default=(), repr=False)

    @property
    def nodal(self) -> Flow:
        """The flow of the steps themselves, each counted as one, where P K P* = ntk to round-off.

        Of a discrete problem it is the flow itself. Of an ODE its times are the ends of the solver's steps, the first
        one of length zero at t0; where nodes lie inside of steps, its units are followed by h times the stage
        derivatives that they are read from.

        Raises:
            ValueError: where the sensitivities are not those of frozen steps.
        """
        if self.steps is not None:
            return self.steps
        if self.solution.weights is None:
            return self
        raise ValueError(
            "there is no nodal identity without replayed steps; linearize with sensealg=DiscreteAdjoint() and a "
            "Runge-Kutta method"
        )

    def truncate(self, rtol: float = 1e-3, seed: int | Random = 0) -> Flow:
        """The flow with each weight's variables V cut to their leading directions, V Q Q^T, which is faster.

        Q are the eigenvectors of V^T W V with the largest eigenvalues s_1^2, s_2^2, ...; then

            0 <= ntk - truncated ntk,   |ntk - truncated ntk| <= |P B|^2 max s_{r+1}^2 <= rtol |ntk|

        in the operator norm, the maximum over the sites. Each site keeps the fewest directions r that satisfy it, and
        the cost of K falls from d to r. Weights that are computed, or used at several sites, are left whole. The norms
        are found by block Lanczos. Eigenvalues move by no more than the bound, but what is left out adds up in traces.
        It is an approximation: certified pairs come from the flow itself.

        Args:
            rtol: the bound to keep to, relative to |ntk|.
            seed: of the starts of block Lanczos.

        Raises:
            ValueError: an rtol outside of (0, 1); a flow whose ntk is not that of steps with sites of their own (of an
                ODE truncate `flow.nodal`; networks and fixed points have none), that has a metric or some of its
                parameters `only`, or that is truncated already.

        Example:
            >>> import torch, kpflow_dyn as kp
            >>> x = torch.sin(0.1 * torch.arange(60.0))[None, :, None].expand(4, -1, -1)
            >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(1, 20), x)))
            >>> short = flow.truncate(rtol=1e-2)
            >>> short.truncation.bound <= 1e-2, short.truncation.ranks[0] < 22
            (True, True)
        """
        if not isinstance(rtol, int | float) or not 0 < rtol < 1:
            raise ValueError(f"rtol of truncate is {rtol!r}, expected a number between 0 and 1")
        if self.with_bases is None:
            raise ValueError(self._why_whole())
        from kpflow_dyn._flows.truncation import truncation

        with full_precision(self.ntk.domain.like):
            cut = truncation(self, rtol, Random(seed))
            return dataclasses.replace(self.with_bases(cut.bases), truncation=cut, with_bases=None)

    def _why_whole(self) -> str:
        if self.truncation is not None:
            return "this flow is truncated already; truncate the whole one"
        if self.solution.traced is not None:
            return "only the flow of a recurrence can be truncated"
        if self.solution.weights is None or self.steps is None:
            return "a flow with a metric, or of some parameters only, cannot be truncated; truncate the one without"
        return "the ntk of an ODE is not made of the field's sites; truncate flow.nodal, the flow of its steps"

    def only(self, names: Choice | Mapping[str, Any]) -> Flow:
        """The flow in which these parameters alone learn; J, K, core, ntk and `sites` have just their part.

        Nothing is traced anew, and an application costs what one of the whole flow does.

        Args:
            names: names, or a function of the name, or of (name, parameter), that says whether; as `params` of
                `linearize`. Or by name booleans in the parameter's shape, True for the entries that learn, such as the
                rows of one attention head.

        Raises:
            ValueError: an unknown name, no parameter at all, booleans of another shape, a flow that is truncated, or
                one whose metric mixes the entries that should be picked from.

        Example:
            >>> import torch, kpflow_dyn as kp
            >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(2, 5, 3))))
            >>> flow.only("bias_hh").J.domain.shape, flow.only(lambda name: "bias" in name).sites[0].name
            ((24,), 'bias_ih[0:16] + bias_hh[0:16]')
        """
        from kpflow_dyn._flows.preconditioner import restricted

        if self.truncation is not None:
            raise ValueError("this flow is truncated, with a bound for all of its parameters; take .only of the whole")
        if isinstance(names, Mapping):
            masks = as_masks(self.parameters, names)
            return restricted(self, choose(self.parameters, list(masks)), masks)
        return restricted(self, choose(self.parameters, names), {})

    def output(self, C: Any, learn: bool | float = False) -> Output:
        """The flow of a readout y = C s + c: its kernel C ntk C*, on axes such as (trial, time, out).

        Args:
            C: [out, unit], or a Linear layer of torch or equinox, whose bias moves nothing.
            learn: whether the readout's own weights learn, which adds s s' (x) I, and (x) I once more for the bias of
                a layer that has one; a number is their learning rate beside the flow's metric.

        Raises:
            ValueError: a C of another width or not finite, states that are not [trial, ..., unit], or a readout that is
                to learn from `nodal`, whose states are not those of the solution.

        Example:
            >>> import torch, kpflow_dyn as kp
            >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(2, 5, 3))))
            >>> y = flow.output(torch.nn.Linear(8, 2), learn=True)
            >>> y.ntk.domain.shape, list(kp.contributions(y))[-2:]
            ((2, 5, 2), ['readout.weight', 'readout.bias'])
        """
        from kpflow_dyn._flows.readout import output

        return output(self, C, learn)

    @property
    def parts(self) -> dict[str, int]:
        """How many coordinates of `ntk.factor`'s domain each parameter has, in their order."""
        sizes = [root.size for root in self.roots] or [int(np.prod(p.shape)) for p in self.parameters.values()]
        return dict(zip(self.parameters, sizes, strict=True))

    def as_parameters(self, theta: Array) -> dict[str, Array]:
        """A vector of the parameter space [..., p] as one array [..., *shape] for each parameter."""
        self.J.domain.check(theta, "theta")
        parts, start = {}, 0
        for name, value in self.parameters.items():
            size = int(np.prod(value.shape))
            parts[name] = theta[..., start : start + size].reshape((*theta.shape[:-1], *value.shape))
            start += size
        return parts

    def __repr__(self) -> str:
        return f"Flow({self.ntk.domain}, {self.J.domain.size} parameters, {len(self.sites)} sites)"


def on_spaces(domain: Space, codomain: Space, apply: Apply, transpose: Apply) -> Operator:
    """The operator of a map and its plain transpose; its adjoint is taken in the measures of the spaces."""

    def adjoint(q: Array) -> Array:
        image = transpose(q if codomain.measure is None else codomain.measure * q)
        return image if domain.measure is None else image / domain.measure

    return Operator(domain, codomain, apply, adjoint)
