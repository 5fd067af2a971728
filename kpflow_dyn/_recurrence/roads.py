"""Two roads to the tangent of a model's steps: its trace, which autograd checks, and autograd alone.

The trace knows the weight sites and is fast. Where there is none, or one that autograd through the model contradicts,
the same maps are taken from autograd itself.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, eps_of
from kpflow_dyn._flows.referee import (
    LESS_PRECISE,
    Answer,
    Derivative,
    Mismatch,
    Probe,
    answer_of,
    ask,
    check_any,
    compare,
    departure,
    drawn,
    in_words,
    sizes_of,
    with_derivative,
)
from kpflow_dyn._problems.checks import check_finite
from kpflow_dyn._recurrence.autodiff import AutodiffTangent
from kpflow_dyn._recurrence.tangent import StepsTangent, Tangent

Step = Callable[..., Array]


def tangent_of(
    model: Any,
    solving: Any,
    step: Step,
    rows: Array,
    before: Array,
    check: Callable[[Array, float], None] = lambda after, rounding: None,
    alone: bool = False,
    from_start: bool = True,
) -> StepsTangent:
    """The recurrence z -> step(model, row, z) along rows [trial, time, ...] from the states before each step.

    Args:
        model: a backend's `Model`.
        solving: the same backend's part.
        check: raises where the states after each step are not what they should be, to this rounding.
        alone: whether each step is asked for by itself alone, without those after it.
        from_start: whether the derivative in the states before the first step is asked for.
    """
    own = _OwnSteps(model, solving, step, rows, before)
    answer, sizes = own.answer(), sizes_of(model.parameters)
    check_finite(answer.value, "the state")
    check(answer.value, LESS_PRECISE * answer.rounding)
    try:
        with_derivative(answer)
    except ValueError:
        if not from_start:
            with suppress(ValueError):
                return _after_start(model, solving, step, rows, before)
        raise
    reason: Exception | None = None
    try:
        for traced in model.tangents(step, rows, before):
            try:
                compare(_EachStep(traced), answer, sizes)
                return traced
            except Mismatch as error:
                reason = error
    except Exception as error:  # whatever stops a trace, autograd answers
        reason = error
    assert reason is not None
    untraced = in_words(reason, model.causes(own.whole), model.decided)
    return _by_autograd(model, solving, step, rows, before, own.whole, untraced, alone)


def _by_autograd(
    model: Any,
    solving: Any,
    step: Step,
    rows: Array,
    before: Array,
    apart: Derivative,
    untraced: str,
    alone: bool = False,
) -> StepsTangent:
    _check_apart(solving, step, model, rows, before, apart)
    check_any(apart, untraced)
    whole = None if alone else _whole(model, solving, step, rows, before, apart.value)
    return AutodiffTangent(apart, whole, model.parameters, untraced)


def _after_start(model: Any, solving: Any, step: Step, rows: Array, before: Array) -> StepsTangent:
    """By autograd, where the first step has no derivative in z0, such as the norm of zeros: that one counts as 0."""

    def states(call: Any, z: Array) -> Array:
        z = array_namespace(z).concat([before[:, :1], z[:, 1:]], axis=1)
        return solving.each_step(step, call, _copied(rows), z)

    apart = model.derivative(states, before)
    ask(apart)
    untraced = "the derivative of the first step in z0 holds NaN or inf"
    return _by_autograd(model, solving, step, rows, before, apart, untraced)


@dataclass(frozen=True)
class _OwnSteps:
    """The model's own steps, each by itself, as autograd differentiates them: some at once, as its graphs hold much."""

    model: Any
    solving: Any
    step: Step
    rows: Array
    before: Array

    @cached_property
    def whole(self) -> Derivative:
        """That of all of them."""
        return self._derivative(slice(None))

    def answer(self) -> Answer:
        """What the referee asks for."""
        if self._at_once >= self.before.shape[1]:
            return answer_of(self.whole)
        (q,) = drawn([(1, *self.before.shape)], self.before)
        value, rounding, theta, argument = self._by_spans(q)
        return Answer(value, Probe(q, theta, argument), lambda q: self._by_spans(q)[2:], rounding)

    @cached_property
    def _at_once(self) -> int:
        return self.solving.times_at_once(self.before)

    def _by_spans(self, q: Array) -> tuple[Array, float, Array, Array]:
        """The states, the rounding, and what q pulls back; written in place, which a framework with spans can."""
        xp = array_namespace(q)
        value, argument, theta, rounding = xp.empty_like(self.before), xp.empty_like(q), 0, 0.0
        for start in range(0, self.before.shape[1], self._at_once):
            span = slice(start, start + self._at_once)
            value[:, span], found, (more, argument[:, :, span]) = self._of(span, q)
            theta, rounding = theta + more, max(rounding, found)
        return value, rounding, theta, argument

    def _of(self, span: slice, q: Array) -> tuple[Array, float, tuple[Array, Array]]:
        """The same of some times; their graph is gone before that of the next."""
        own = self._derivative(span)
        return own.value, own.rounding, own.pull(q[:, :, span])

    def _derivative(self, span: slice) -> Derivative:
        rows = self.rows[:, span]
        each_step = self.solving.each_step
        return self.model.derivative(lambda call, z: each_step(self.step, call, _copied(rows), z), self.before[:, span])


@dataclass(frozen=True)
class _EachStep:
    """A tangent's steps, each by itself, as a derivative in the parameters and the states before."""

    tangent: Tangent

    @property
    def value(self) -> Array:
        return self.tangent.next_state

    def push(self, theta: Array, argument: Array) -> Array:
        return self.tangent.step_jvp(theta, argument)

    def pull(self, q: Array) -> tuple[Array, Array]:
        return self.tangent.step_vjp(q)


def _whole(model: Any, solving: Any, step: Step, rows: Array, before: Array, after: Array) -> Derivative:
    """All states, with kicks added to each as it arises: their derivatives are J and P.

    The kicks are such that the states pass through those before each step, where these are not quite those after.
    """
    kicks = array_namespace(before).concat([before[:, 1:] - after[:, :-1], 0 * after[:, -1:]], axis=1)

    def states(call: Any, kicks: Array) -> Array:
        return solving.run(step, call, _copied(rows), before[:, 0], kicks)

    return model.derivative(states, kicks)


def _copied(rows: Array) -> Array:
    """Inputs of a graph that is kept, whose user may write to them later."""
    return 1 * rows


def check_as_called(model: Any, tangent: Tangent, outputs: Callable[..., Array], units: slice) -> None:
    """Raise where a layer as its user calls it, over all times at once, is not what its steps are.

    Args:
        outputs: (model, an argument of no size) -> what the layer gives [trial, time, unit].
        units: where the outputs are in the state.
    """
    state, name = tangent.next_state, type(model.call).__name__
    own = model.derivative(outputs, state[:, 0, :0])
    if departure(own.value, state[..., units]):
        raise ValueError(
            f"{name} gives something else than its hidden state, which a forward of its own or a hook makes of it; "
            "pose StaticProblem(module, x, state='') for its output, or write it as a cell(x_t, z)"
        )
    q, expected, _ = own.probe
    whole = array_namespace(state).zeros_like(state)[None]
    before, after = whole[..., : units.start], whole[..., units.stop :]
    found = tangent.vjp(array_namespace(q).concat([before, q, after], axis=-1))
    error = float(abs(found - expected).max() / abs(expected).max())
    if error > 100 * eps_of(state) ** 0.5:  # rounding grows with the time; it is NaN where gradients overflow
        seen = f"; the likely cause: {', '.join(causes)}" if (causes := model.causes(own)) else ""
        raise ValueError(
            f"{name} over the whole sequence has other gradients than step by step, by {error:.1e} of their size{seen}"
            ". Take the hooks off, or write the layer as a cell(x_t, z)"
        )


def _check_apart(solving: Any, step: Step, model: Any, rows: Array, before: Array, apart: Derivative) -> None:
    """Raise where the first or the last trial by itself, its last step first, is not what it is among the others."""
    after, backward = apart.value, np.arange(rows.shape[1])[::-1].copy()
    size = max(1.0, float(abs(after).max()))
    for trial in (slice(0, 1), slice(len(rows) - 1, len(rows))):
        with solving.without_gradients():
            alone = solving.each_step(step, model.call, rows[trial][:, backward], before[trial][:, backward])
        if error := departure(alone, after[trial][:, backward], size, apart.rounding):
            raise ValueError(
                f"a step of one trial by itself differs from the same among the others by {error:.1e}: the "
                "trials influence each other, as batch statistics do, or as an adaptive ODE solver that chooses its "
                "steps for all of them (give it fixed ones, or call it on each trial in a loop), or the model holds "
                "numbers for each trial (give them as inputs x), or the step remembers what it was called with before, "
                "or it is random; call model.eval(), or rewrite the step"
            )
