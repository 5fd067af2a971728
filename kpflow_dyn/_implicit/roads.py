"""Two roads to a linearised constraint: its trace, which autograd through the model checks, and autograd alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, to_numpy
from kpflow_dyn._arrays.complex_numbers import by_name, vector_of
from kpflow_dyn._backend import Values
from kpflow_dyn._flows.referee import (
    LESS_PRECISE,
    Derivative,
    Mismatch,
    ask,
    check_any,
    check_transpose,
    compare,
    compare_gradients,
    departure,
    drawn,
    in_words,
    largest_of,
    sizes_of,
    tolerance_of,
)
from kpflow_dyn._flows.sites import WeightSite
from kpflow_dyn._implicit.constraint import named_states
from kpflow_dyn._implicit.form import Form
from kpflow_dyn._implicit.linearised import Linearised, apart_of, own_of, parameters_of, whole_of
from kpflow_dyn._implicit.solutions import ConstraintSolution, NetworkSolution
from kpflow_dyn._implicit.traced import Traced
from kpflow_dyn._problems.choice import Choice


def linearised(sol: ConstraintSolution, params: Choice, measure: Array | None) -> tuple[Linearised, list[WeightSite]]:
    """A solution's derivatives in the parameters that learn, by its trace where autograd says the same; and its sites.

    Args:
        measure: how much each trial counts.
    """
    model = sol.equations.model(params)
    if isinstance(sol, NetworkSolution) and sol.of_uses:
        found = _still(sol, model)
        return found, found.sites(measure)
    own = (whole_of if sol.equations.form is Form.NETWORK else apart_of)(sol.equations, model, sol.state)
    _check_unchanged(own, sol.state)
    answer = ask(own)
    if sol.traced is None:
        found = _by_autograd(sol, model, sol.untraced)
        return found, found.sites(measure)
    try:
        found = Traced(sol.traced, model.parameters, sol.state)
        derivative = found.at_once("whole" if found.whole else "apart", answer.probe.q)
        compare(derivative, answer, sizes_of(model.parameters))
        _check_sites(found, answer.rounding)
        return found, found.sites(measure)
    except Exception as error:  # whatever stops the trace, autograd answers
        found = _by_autograd(sol, model, in_words(error, model.causes(own), sol.traced.graph.decided))
        return found, found.sites(measure)


def _by_autograd(sol: ConstraintSolution, model: Any, untraced: str) -> Linearised:
    check_any(parameters_of(sol.equations, model, sol.state), untraced)
    return replace(own_of(sol.equations, model, sol.state), untraced=untraced)


def _still(sol: NetworkSolution, model: Any) -> Linearised:
    """The outputs of all uses of weights; those that autograd found right at the solve where the same learn."""
    known, now = sol.checked, model.parameters
    if (
        known is not None
        and list(known.parameters) == list(now)
        and all(bool((value == now[name]).all()) for name, value in known.parameters.items())
    ):
        return known
    try:
        return uses_of_weights(sol, model)
    except Mismatch as error:
        raise ValueError(
            f"the trace of the solution is not the network (any more): {error}; solve again, or name the modules whose "
            "outputs are wanted in `state`"
        ) from error


def uses_of_weights(sol: NetworkSolution, model: Any) -> Traced:
    """A network whose state only the trace knows; a `Mismatch` where its output is not that of autograd."""
    equations, traced = sol.equations, sol.traced
    assert traced is not None and equations.layout is not None
    own = whole_of(equations, model, equations.start)
    _check_unchanged(own, equations.start)
    seen = Traced(traced.at_output(equations.layout), model.parameters, equations.start)
    found = Traced(traced, model.parameters, sol.state)
    answer = ask(own)
    compare(seen.at_once("whole", answer.probe.q), answer, sizes_of(model.parameters))
    state = (1, *sol.state.shape)
    q, *moved = drawn([state, (1, found.size), state], sol.state)
    for derivative in (found.at_once("apart", q), found.at_once("whole", q)):
        check_transpose(q, derivative.push(*moved), derivative.pull(q), moved, LESS_PRECISE * own.rounding)
    _check_sites(found, own.rounding)
    return found


def states_of_network(
    sol: NetworkSolution, learnable: list[str], called: Callable[..., Array], gradient: Callable[..., Array]
) -> Callable[[Values], Array]:
    """The states of a network as a function of these of its parameters by name, by a call of the network itself.

    Where only the trace knows the states it is the trace.

    Args:
        called: (function, values, argument) -> function(model, argument) where the parameters have these values.
        gradient: (function(theta) -> number, theta) -> its gradient.

    Raises:
        ValueError: where a call has other gradients than the model itself.
    """
    if not learnable:
        return lambda _values: sol.state
    model, zeros = sol.equations.model(learnable), array_namespace(sol.state).zeros_like(sol.state)
    if sol.of_uses:
        assert sol.traced is not None
        return named_states(sol.traced, list(model.parameters))

    def states(values: Values) -> Array:
        return called(sol.equations.kicked, values, zeros)

    check_call(whole_of(sol.equations, model, sol.state), states, model.parameters, gradient)
    return states


def check_call(
    own: Derivative, states: Callable[[Values], Array], parameters: Values, gradient: Callable[..., Array]
) -> None:
    """Raise where the states as a function of given parameters have other gradients than the model itself.

    Args:
        own: the model's own derivative of the same states.
        gradient: as for `states_of_network`.
    """
    q, expected, _ = ask(own).probe
    try:
        found = _gradient(states, q[0], parameters, gradient)
        compare_gradients(to_numpy(found), to_numpy(expected[0]), sizes_of(parameters))
    except Mismatch as error:
        raise ValueError(
            f"a call of the model with other parameters is not the model: {error}; write it without what reaches a "
            "parameter by another way than its name"
        ) from error


def _gradient(states: Callable[[Values], Array], q: Array, parameters: Values, gradient: Callable[..., Array]) -> Array:
    """That of <q, states> in the parameters [p]."""
    theta = vector_of(parameters.values())
    return gradient(lambda theta: (q * states(by_name(theta, parameters))).sum(), theta)


def _check_sites(found: Traced, rounding: float) -> None:
    """Raise a `Mismatch` unless parameters enter F through the weight sites alone: B V = -D_theta F."""
    if not found.outputs:
        raise Mismatch("no weight meets data in it")
    (q,) = drawn([(1, *found.state.shape)], found.state)
    whole, by_sites = ([*map(to_numpy, part)] for part in found.through_sites(q))
    errors = [largest_of(a - b) for a, b in zip(whole, by_sites, strict=True)]
    error, size = np.max(errors), max(map(largest_of, whole))  # NaN where one of the errors is
    if not error <= tolerance_of(whole[0], rounding) * max(size, 1e-300):
        raise Mismatch(f"its weight sites give {error / max(size, 1e-300):.1e} less than all of its gradient")


def _check_unchanged(own: Derivative, state: Array) -> None:
    """Raise where the model does not give the solved state any more."""
    if error := departure(own.value, state, rounding=own.rounding):
        raise ValueError(
            f"the model differs from the solved state by {error:.1e} of its size: its parameters changed after "
            "solve (solve again), or it is random"
        )
