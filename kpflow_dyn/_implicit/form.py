"""What a model says of its state, and how the axes of that are called."""

from enum import Enum

from kpflow_dyn._arrays import Array
from kpflow_dyn._implicit.layout import Layout

FREE_AXES = {1: ("unit",), 2: ("trial", "unit"), 3: ("trial", "time", "unit")}


class Form(Enum):
    """What a model says of the state S."""

    FREE = "its output is F(S)"
    FIXED_POINT = "its output is f(S), and F = S - f(S)"
    NETWORK = "S are values on the way, and F = S - G(S), where G computes each from the others as they are given"


def axes_of(form: Form, state: Array, layout: Layout | None) -> tuple[str, ...]:
    """The names of a state's axes."""
    if form is Form.FREE:
        return FREE_AXES[state.ndim]
    return ("trial", *(layout.axes if layout else ("unit",)))
