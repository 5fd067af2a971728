"""Linearise a solution: the operators by which gradient descent moves its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn.arrays import Array, to_numpy
from kpflow_dyn.operators import GramOperator, Operator
from kpflow_dyn.sites import CoreOperator, WeightSite, follows_from_inputs
from kpflow_dyn.solution import Solution
from kpflow_dyn.space import Space

if TYPE_CHECKING:
    from kpflow_dyn.torch_backend.tangent import Tangent


@dataclass(frozen=True)
class DiscreteAdjoint:
    """The exact tangent and transpose of the steps that were taken."""


class Propagator(Operator):
    """P = (D_S F)^{-1}: s_t = A_t s_{t-1} + q_t, with s_0 = 0."""

    def __init__(self, space: Space, tangent: Tangent) -> None:
        super().__init__(space, space, tangent.propagate, tangent.propagate_adjoint)
        self.inv = Operator(space, space, tangent.unpropagate, tangent.unpropagate_adjoint)
        """D_S F itself: q_t = s_t - A_t s_{t-1}."""


@dataclass(frozen=True, eq=False)
class Flow:
    """A solution's linearisation: how changes of the parameters and kicks to the state move the whole state.

    With the state S [trial, time, unit], parameters theta and the implicit constraint F(S, theta) = 0,

        J = dS/dtheta = P B V       ntk = J J* = P K P*       K = B core B*       core = V V^T (x) I

    and one step of gradient descent theta -= eta dL/dtheta moves S by -eta ntk grad_S L + O(eta^2).

    Attributes:
        P: the propagator, state -> state; `P.inv` is its inverse.
        K: the parameter operator of one step, state -> state.
        core: the Kronecker core on the weight-site outputs.
        B: site outputs -> state, how each enters its step.
        J: parameters [p] -> state; `J.T` is backpropagation through time.
        ntk: the global empirical neural tangent kernel, state -> state.
        sites: the weight sites, in the order of the core's outputs.
        solution: what was linearised.
        parameters: the parameters that learn, by name, as they were when linearised.
    """

    P: Propagator
    K: GramOperator
    core: CoreOperator
    B: Operator
    J: Operator
    ntk: GramOperator
    sites: list[WeightSite]
    solution: Solution
    parameters: dict[str, Array]

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


def linearize(
    sol: Solution,
    *,
    sensealg: DiscreteAdjoint | None = None,
    params: str | Sequence[str] | Callable[[str, Any], bool] | None = None,
) -> Flow:
    """The operators of a solution; see `Flow`.

    The parameters are copied: training the model afterwards changes nothing in an existing flow.

    Args:
        sol: a solution of `solve`.
        sensealg: how sensitivities are taken; `DiscreteAdjoint()` when None.
        params: which parameters learn: names, or a function (name, parameter) -> bool; all that require a gradient when
            None.

    Raises:
        ValueError: for unknown names, when no parameter learns, or when the step cannot be traced.

    Example:
        >>> import torch
        >>> import kpflow_dyn as kp
        >>> problem = kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(2, 5, 3))
        >>> flow = kp.linearize(kp.solve(problem))
        >>> flow.ntk.domain.shape
        (2, 5, 8)
    """
    if not isinstance(sol, Solution):
        raise TypeError(f"linearize takes the Solution that solve returns, got {type(sol).__name__}")
    if not isinstance(sensealg, DiscreteAdjoint | None):
        raise TypeError(f"sensealg is {sensealg!r}, expected DiscreteAdjoint()")
    from kpflow_dyn.torch_backend.linearise import linearise

    tangent, parameters = linearise(sol, params)
    return _flow(tangent, parameters, sol)


def _flow(tangent: Tangent, parameters: dict[str, Array], solution: Solution) -> Flow:
    trials, times, units = solution.state.shape
    state = Space(("trial", "time", "unit"), (trials, times, units), tangent.like)
    outputs = Space(("trial", "time", "site"), (trials, times, len(tangent.site_kicks)), tangent.like)
    theta = Space(("parameter",), (tangent.parameter_size,), tangent.like)

    V = Operator(theta, outputs, tangent.write, tangent.read)
    B = Operator(outputs, state, tangent.enter, tangent.enter_adjoint)
    J = Operator(theta, state, tangent.push_forward, tangent.pull_back)
    sites = _weight_sites(tangent)
    return Flow(
        P=Propagator(state, tangent),
        K=GramOperator(B @ V),
        core=CoreOperator(V, sites, follows_from_inputs(sites, tangent.parameter_size)),
        B=B,
        J=J,
        ntk=GramOperator(J, tangent.descend),
        sites=sites,
        solution=solution,
        parameters=parameters,
    )


def _weight_sites(tangent: Tangent) -> list[WeightSite]:
    sites = []
    for _, site in tangent.sites:
        entries, inputs = to_numpy(site.entries), site.variables.transpose(0, 1)
        weight = tangent.weights[site.entries.reshape(-1)].reshape(site.entries.shape)
        if site.kind == "matrix":
            inputs = inputs[:, :, 0] if inputs.shape[2] == 1 else inputs
            entries, weight = entries.T, weight.T
        sites.append(WeightSite(site.name, site.kind, weight, inputs, entries))
    return sites
