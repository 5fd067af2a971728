"""Rules whose gradient G = E* has an approximation E of the influence matrix J that runs forward in time.

    J_t = A_t J_{t-1} + B_t V_t        E_t = D_t E_{t-1} + B_t V_t        A = J E* = P K P_D*

B_t V_t is how the weights kick the step itself, exactly; a rule says which D_t stands for A_t, from step to step.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, like_numpy, to_numpy
from kpflow_dyn._flows.flow import Flow, RecurrentFlow
from kpflow_dyn._spaces.operators import Operator
from kpflow_dyn.learning_rules._paths import along, check_count, neumann, own_decay, own_path, rule_along, steps_of
from kpflow_dyn.learning_rules._rule import Rule


def eprop(flow: Flow) -> Rule:
    """P K P_D*, eligibility propagation: traces follow each unit's own path D_t, with no weight on it.

        E_t = D_t E_{t-1} + B_t V_t        D_t = A_t with zeros in the place of the weights

    D_t is the leak of a leaky unit, 1 - z of a GRU, f of an LSTM's cell c, 0 of a plain RNN; gates and derivatives have
    the values that they have with the weights. Weights are parameters of two axes or more, also those between layers. A
    spike's reset is on the path unless the cell detaches it. What a weight does within the step B_t V_t is exact, and
    so is how a learnt start enters the first step. The errors q of the states are yours: with those of a readout,
    q = C* grad_y L, this is symmetric e-prop; with other matrices for C it is random e-prop.

    Args:
        flow: of a discrete problem, or `flow.nodal` of an ODE.

    Raises:
        ValueError: a flow that is not of steps, a model that was not traced, or own paths that are not finite.

    Warns:
        UserWarning: a unit's own path that comes from many others, as through a normalisation or a matrix in a buffer.
    Source: Bellec, Scherr, Subramoney, Hajek, Salaj, Legenstein, Maass, "A solution to the learning dilemma for
    recurrent networks of spiking neurons" (2020).

    >>> import torch, kpflow_dyn as kp
    >>> _ = torch.manual_seed(0)
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(2, 6, 3))))
    >>> rules = kp.learning_rules
    >>> found = [kp.alignment(rule, flow.ntk).value for rule in (rules.truncated_bptt(flow, 0), rules.eprop(flow))]
    >>> found[0] < found[1] < 1
    True
    """
    flow = steps_of(flow)
    return rule_along(flow, own_path(flow))


def rflo(flow: Flow, decay: float | None = None) -> Rule:
    """P K P_D* with D = decay, random feedback local online learning (the feedback is in the errors q).

        E_t = decay E_{t-1} + B_t V_t

    For h' = (1 - a) h + a phi(W h + ...) and decay = 1 - a, E is Murray's p_t = (1 - a) p_{t-1} + a phi'(u_t) v_t.

    Args:
        flow: of a discrete problem, or `flow.nodal` of an ODE.
        decay: of the traces in one step; None for that of the model's own path, which must be one constant.

    Raises:
        ValueError: a flow that is not of steps, a decay that is not finite, or own paths that are not one constant.
    Source: Murray, "Local online learning in recurrent networks with random feedback" (2019).

    >>> import torch, kpflow_dyn as kp
    >>> cell = kp.models.CTRNNCell(3, 8, alpha=0.25)
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.randn(2, 6, 3))))
    >>> q = torch.randn(2, 6, 8)
    >>> torch.allclose(kp.learning_rules.rflo(flow).mv(q), kp.learning_rules.rflo(flow, 0.75).mv(q), atol=1e-5)
    True
    """
    flow = steps_of(flow)
    return rule_along(flow, along(flow.P.domain, own_decay(flow) if decay is None else _number(decay)))


def duhamel(flow: Flow, k: int, base: str | float | Array = "own") -> Rule:
    """P K P_k*, the exact propagator of a part A_0 of the Jacobians and k insertions of the rest.

        P_k = sum_{j <= k} (P_0 (A - A_0))^j P_0        P_0 = (1 - A_0)^{-1}

    where A acts from each step to the next. With the units' own paths, k counts how many times an error may cross from
    unit to unit by the weights between steps. k = 0 is the online rule of that path; one less than there are times, or
    more, gives `bptt`.

    Args:
        flow: of a discrete problem, or `flow.nodal` of an ODE.
        k: how many insertions.
        base: A_0: "own" for each unit's own path, so that k = 0 is `eprop`; "decay" for that of `rflo`; a number, the
            same for all units; or a matrix [unit, unit] for all steps. 0.0 gives `truncated_bptt`.

    Raises:
        ValueError: a k that is not a whole number >= 0, a base of another shape or not finite, or as for `eprop` and
            `rflo`.
    Source: Hazelden, Driscoll, Shlizerman, Shea-Brown, "KPFlow" (arXiv 2507.06381); the Dyson series of Duhamel's
    formula.

    >>> import torch, kpflow_dyn as kp
    >>> _ = torch.manual_seed(0)
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(2, 6, 3))))
    >>> found = [kp.alignment(kp.learning_rules.duhamel(flow, k), flow.ntk).value for k in (0, 1, 5)]
    >>> found[0] < found[1] < found[2], round(found[2], 5)
    (True, 1.0)
    """
    check_count(k, "k", "insertions", 0)
    flow = steps_of(flow)
    whole, most = flow.recurrence.flow().P, flow.P.domain.shape[1] - 1
    return rule_along(flow, neumann(whole, _base(flow, base), min(int(k), most)))


def _base(flow: RecurrentFlow, base: Any) -> Operator:
    """P_0."""
    state = flow.P.domain
    if isinstance(base, str):
        if base not in ("own", "decay"):
            raise ValueError(f'base is {base!r}, expected "own", "decay", a number or a matrix [unit, unit]')
        return own_path(flow) if base == "own" else along(state, own_decay(flow))
    if np.ndim(base) == 0:
        return along(state, _number(base))
    units, matrix = state.shape[2], np.array(to_numpy(base))
    if matrix.shape != (units, units) or not np.isfinite(matrix).all():
        raise ValueError(f"base has shape {matrix.shape}, expected finite numbers [unit, unit] = {(units, units)}")
    return along(state, like_numpy(matrix, state.like))


def _number(decay: Any) -> float:
    if not isinstance(decay, int | float | np.number) or isinstance(decay, bool) or not math.isfinite(decay):
        raise ValueError(f"a decay is {decay!r}, expected a finite number, such as 1 - dt / tau")
    return float(decay)
