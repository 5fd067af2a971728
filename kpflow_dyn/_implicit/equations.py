"""F(S, theta; x) = 0 as the user's own model states it: what a backend says of a problem that is no recurrence."""

from collections.abc import Callable
from typing import Any, Protocol

from kpflow_dyn._arrays import Array
from kpflow_dyn._flows.referee import departure
from kpflow_dyn._implicit.constraint import TracedConstraint
from kpflow_dyn._implicit.form import Form
from kpflow_dyn._implicit.layout import Layout
from kpflow_dyn._problems.choice import Choice


class Equations(Protocol):
    """A model as its user calls it, on all trials.

    form      how it states the constraint.
    call      the model.
    start     where a solve begins; of a network its state.
    layout    how named values make the state of a network, else None.
    model     a backend's `Model` of it, where these parameters learn.
    residual  F at a state, of this model or of one with other parameters.
    kicked    the state of a network where kicks are added to each value as it arises.
    at        F at a state without gradients.
    check     raise where trials influence each other, or the model is random.
    traced    the same model traced.
    """

    form: Form
    call: Any
    start: Array
    layout: Layout | None

    def model(self, params: Choice) -> Any: ...
    def residual(self, call: Any, state: Array) -> Array: ...
    def kicked(self, call: Any, kicks: Array) -> Array: ...
    def at(self, state: Array) -> Array: ...
    def check(self, state: Array) -> None: ...
    def traced(self) -> TracedConstraint: ...


def check_alone(of_trials: Callable[[slice], Array], whole: Array, rounding: Callable[[], float]) -> None:
    """Raise where the first or the last trial by itself gives something else than among the others [trial, ...].

    Args:
        rounding: the round-off of the model's least precise part.
    """
    for trial in (slice(0, 1), slice(len(whole) - 1, len(whole))):
        check_same(of_trials(trial), whole[trial], float(abs(whole).max()), rounding)


def check_same(alone: Array, among: Array, size: float, rounding: Callable[[], float] = lambda: 0.0) -> None:
    """Raise where two results for the same trials differ; size is that of the largest of all."""
    size = max(1.0, size)
    if departure(alone, among, size) and (error := departure(alone, among, size, rounding())):
        raise ValueError(
            f"the model on one trial alone differs from the same among all trials by {error:.1e} of its size: "
            "its trials influence each other, or it is random or changes itself; call model.eval(), put the trials in "
            "front (batch_first=True), or rewrite it"
        )
