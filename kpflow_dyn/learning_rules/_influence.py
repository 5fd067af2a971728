"""Real-time recurrent learning, the influence matrix itself forward in time, and its sparse and random forms."""

from __future__ import annotations

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, like_numpy, to_numpy
from kpflow_dyn._flows.flow import Flow, RecurrentFlow
from kpflow_dyn._spaces.operators import MatrixOperator, Operator, on_spaces
from kpflow_dyn.learning_rules._paths import check_count, check_fits, jacobians, rule_along, steps_of
from kpflow_dyn.learning_rules._rule import Rule


def rtrl(flow: Flow) -> Rule:
    """J E* with E = J, real-time recurrent learning: the influence of each parameter on each state, forward in time.

        E_t = A_t E_{t-1} + B_t V_t        G q = sum_t E_t^T q_t

    The same operator as `bptt`, to round-off, by the way that an online learner takes. The matrices A_t [unit, unit]
    and E_t [unit, parameter] of all trials and times are formed: for small networks.

    Args:
        flow: of a discrete problem, or `flow.nodal` of an ODE.

    Raises:
        ValueError: a flow that is not of steps, or matrices of more than 2 GiB.
    Source: Williams, Zipser, "A learning algorithm for continually running fully recurrent neural networks" (1989).

    >>> import torch, kpflow_dyn as kp
    >>> _ = torch.manual_seed(0)
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(2, 6, 3))))
    >>> rules, q = kp.learning_rules, torch.randn(2, 6, 8)
    >>> [torch.allclose(rule.mv(q), flow.ntk.mv(q), atol=1e-4) for rule in (rules.rtrl(flow), rules.snap(flow, 1))]
    [True, False]
    """
    flow = steps_of(flow)
    return _rule_of(flow, _influence(*_steps(flow.recurrence.flow())))


def snap(flow: Flow, k: int) -> Rule:
    """J E* with the influence matrix cut to its entries that a parameter reaches within k steps, SnAp-k.

        E_t = M_k * (A_t E_{t-1} + B_t V_t)        M_k[i, p] = 1 where p reaches unit i within k steps

    The step itself is the first. What reaches what is read from the entries of B_t V_t and A_t that are not zero at any
    trial and time. SnAp-1 of an RNN or GRU keeps for each weight the unit that it writes to, and of A_t the diagonal,
    with a unit's weight onto itself, which `eprop` leaves out. With a large k it is `rtrl`.

    Args:
        flow: of a discrete problem, or `flow.nodal` of an ODE.
        k: how many steps, 1 or more.

    Raises:
        ValueError: a k that is not a whole number >= 1, or as for `rtrl`, whose arrays are formed.
    Source: Menick, Elsen, Evci, Osindero, Simonyan, Graves, "Practical real time recurrent learning with a sparse
    approximation" (2021).
    Example as `rtrl`.
    """
    check_count(k, "k", "steps", 1)
    flow = steps_of(flow)
    A, kicks = _steps(flow.recurrence.flow())
    steps, first = (A != 0).any((0, 1)).astype(float), (kicks != 0).any((0, 1))
    reached = first
    for _ in range(int(k) - 1):
        further = first | (steps @ reached > 0)
        if (further == reached).all():
            break
        reached = further
    return _rule_of(flow, _influence(A, kicks, reached))


def uoro(flow: Flow, seed: int | Random = 0, rank: int = 1) -> Rule:
    """P K P_U*, unbiased online recurrent optimisation: one random vector pair in the place of the influence matrix.

        E_t = s_t w_t^T      s_t = r_t A_t s_{t-1} + c_t n_t      w_t = w_{t-1} / r_t + (B_t V_t)^T n_t / c_t

    with random signs n_t, and r_t, c_t that balance the lengths of what is added, of each trial its own. The mean of E
    over the signs is J. It is linear in q for one seed. To prepare a copy, B_t V_t is applied once for each trial and
    time, and the matrices A_t are formed; an application then costs what one of `bptt` does.

    Args:
        flow: of a discrete problem, or `flow.nodal` of an ODE.
        seed: of the signs.
        rank: how many independent copies are averaged.

    Raises:
        ValueError: a rank that is not a whole number >= 1, a flow that is not of steps, or arrays of more than 2 GiB.
    Source: Tallec, Ollivier, "Unbiased online recurrent optimization" (2017).

    >>> import torch, kpflow_dyn as kp
    >>> _ = torch.manual_seed(0)
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(2, 6, 3))))
    >>> found = [kp.alignment(kp.learning_rules.uoro(flow, 0, rank), flow.ntk).value for rank in (1, 300)]
    >>> found[0] < found[1]
    True
    """
    check_count(rank, "rank", "copies", 1)
    flow, rng = steps_of(flow), Random(seed)
    whole = flow.recurrence.flow()
    A, kick, state = jacobians(whole.P), whole.K.factor, whole.P.domain
    trials, times, _ = state.shape
    entries = trials * times * (kick.domain.size + int(rank) * times) + times * state.size
    check_fits(entries, state.like, f"the lengths of the kicks in {trials * times} steps")
    copies = []
    for _ in range(int(rank)):
        signs = np.where(to_numpy(rng.normal(state.shape, state.like)) < 0, -1.0, 1.0)
        copies.append((*_rank_one(A, signs, _kicked(kick, signs)), signs))
    s, between, signs = (like_numpy(np.stack(parts), state.like) for parts in zip(*copies, strict=True))
    sum_of, swapped = array_namespace(s).sum, between.swapaxes(-1, -2)

    def apply(to: Array, between: Array, of: Array, q: Array) -> Array:
        along = sum_of(of * q[:, None], axis=-1)  # [probe, copy, trial, time]
        return sum_of(to * (along[..., None, :] @ between)[..., 0, :, None], axis=1) / len(s)

    path = on_spaces(state, state, lambda q: apply(s, between, signs, q), lambda q: apply(signs, swapped, s, q))
    return rule_along(flow, path)


def _steps(whole: RecurrentFlow) -> tuple[np.ndarray, np.ndarray]:
    """A_t [trial, time, unit, unit] and B_t V_t [trial, time, unit, parameter]."""
    state, parameters = whole.P.domain, whole.K.factor.domain.size
    check_fits(2 * state.size * parameters, state.like, f"the influence of {parameters} parameters on all states")
    return jacobians(whole.P), to_numpy(whole.K.factor.dense()).reshape(*state.shape, parameters)


def _influence(A: np.ndarray, kicks: np.ndarray, kept: np.ndarray | float = 1.0) -> np.ndarray:
    """E_t = kept * (A_t E_{t-1} + B_t V_t) [trial, time, unit, parameter]."""
    E = np.zeros_like(kicks)
    for t in range(kicks.shape[1]):
        E[:, t] = kept * (A[:, t] @ E[:, t - 1] + kicks[:, t] if t else kicks[:, t])
    return E


def _rule_of(flow: RecurrentFlow, E: np.ndarray) -> Rule:
    state, parameters = flow.P.domain, flow.J.domain if flow.R is None else flow.R.codomain
    matrix = like_numpy(E.reshape(state.size, parameters.size), state.like)
    return Rule(flow.ntk.factor, flow.gradient(MatrixOperator(matrix, parameters, state).T))


def _kicked(kick: Operator, signs: np.ndarray) -> np.ndarray:
    """(B_t V_t)^T n_t [trial, time, parameter] of each step by itself."""
    trials, times, _ = signs.shape
    each = np.eye(times)[:, None, :, None]
    blocks = (each * signs * (np.arange(trials) == b)[:, None, None] for b in range(trials))
    return np.stack([to_numpy(kick.T.mv(like_numpy(block, kick.domain.like))) for block in blocks])


def _rank_one(A: np.ndarray, signs: np.ndarray, kicked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """s_t [trial, time, unit], and what (B_r V_r)^T n_r is multiplied by in w_t [trial, r, t]."""
    trials, times, _ = signs.shape
    found, between = np.zeros_like(signs), np.zeros((trials, times, times))
    s, w = np.zeros_like(signs[:, 0]), np.zeros_like(kicked[:, 0])
    for t in range(times):
        moved = np.einsum("bij,bj->bi", A[:, t], s)
        r, c = _balance(w, moved), _balance(kicked[:, t], signs[:, t])
        s, w = r * moved + c * signs[:, t], w / r + kicked[:, t] / c
        between[:, :t, t] = between[:, :t, t - 1] / r
        between[:, t, t], found[:, t] = 1 / c[:, 0], s
    return found, between


def _balance(parameters: np.ndarray, states: np.ndarray) -> np.ndarray:
    """sqrt(|parameters| / |states|) of each trial [trial, 1], 1 where one of them is zero."""
    sizes = np.linalg.norm(parameters, axis=-1, keepdims=True), np.linalg.norm(states, axis=-1, keepdims=True)
    both = (sizes[0] > 0) & (sizes[1] > 0)
    return np.sqrt(np.divide(*sizes, out=np.ones_like(sizes[0]), where=both))
