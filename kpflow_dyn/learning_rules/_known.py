"""The rules by their names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from kpflow_dyn._flows.flow import Flow
from kpflow_dyn._spaces.operators import Operator
from kpflow_dyn.learning_rules._backpropagation import bptt, functional_gradient_descent, truncated_bptt
from kpflow_dyn.learning_rules._feedback import feedback_alignment, weight_mirror
from kpflow_dyn.learning_rules._influence import rtrl, snap, uoro
from kpflow_dyn.learning_rules._online import duhamel, eprop, rflo
from kpflow_dyn.learning_rules._second_order import gauss_newton, natural_gradient
from kpflow_dyn.learning_rules._updates import muon, shampoo

MakeRule = Callable[..., Operator]

RULES: dict[str, MakeRule] = {
    rule.__name__: rule
    for rule in (
        bptt,
        truncated_bptt,
        duhamel,
        eprop,
        rflo,
        rtrl,
        snap,
        uoro,
        feedback_alignment,
        weight_mirror,
        functional_gradient_descent,
        gauss_newton,
        natural_gradient,
        shampoo,
        muon,
    )
}


def rule_of(given: str | MakeRule) -> MakeRule:
    """A rule, by its name or as it is."""
    if isinstance(given, str) and given in RULES:
        return RULES[given]
    if callable(given) and not isinstance(given, Operator):
        return given
    raise ValueError(f"rule is {given!r}, expected one of {', '.join(RULES)}, or a function flow -> Rule")


def made(make: MakeRule, flow: Flow, offered: Mapping[str, Any], options: Mapping[str, Any]) -> Operator:
    """The rule of this flow, with these options and with what it takes by name of what is offered."""
    takes = inspect.signature(make).parameters
    return make(flow, **{name: value for name, value in offered.items() if name in takes} | dict(options))
