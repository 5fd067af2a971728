"""What a model gives once its parameters have moved."""

from __future__ import annotations

import math

from kpflow_dyn.arrays import Array
from kpflow_dyn.flow import Flow
from kpflow_dyn.objective import states_with
from kpflow_dyn.output import Output
from kpflow_dyn.roots import block_diagonal


def moved(flow: Flow | Output, change: Array) -> Array:
    """The outputs after the parameters moved by `change` [p], coordinates of ntk.factor's domain."""
    if isinstance(flow, Output):
        size = sum(flow.flow.parts.values())
        return flow.moved(change, moved(flow.flow, change[:size]))
    if flow.roots:
        change = block_diagonal(flow.roots, flow.J.domain).mv(change)
    values, start = {}, 0
    for name, value in flow.parameters.items():
        size = math.prod(value.shape)
        values[name] = value + change[start : start + size].reshape(value.shape)
        start += size
    return states_with(flow.solution, values)
