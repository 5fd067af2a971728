"""Which units of a state a readout reads."""

from typing import Any


def units_read(model: Any, readout: Any, units: int) -> slice:
    """All units of the state, or the h of the last layer, whichever has the width of the readout.

    A state [unit] has all layers' h one after another, then all layers' c.

    Args:
        readout: a Linear layer, or a weight [out, unit] itself; what has neither `in_features` nor a weight reads all.

    Raises:
        ValueError: a readout of another width.
    """
    hidden, width = hidden_of(model, units), width_of(readout, units)
    if width == units:
        return slice(0, units)
    if width == hidden:
        end = getattr(_recurrent(model), "num_layers", 1) * hidden
        return slice(end - hidden, end)
    either = (
        f"{units} units" if hidden == units else f"{hidden} units (the last layer's h) or {units} (the whole state)"
    )
    raise ValueError(f"the readout takes {width} units, expected one of {either}")


def width_of(readout: Any, units: int) -> int:
    """How many units a readout takes."""
    shape = getattr(getattr(readout, "weight", readout), "shape", ())
    return int(getattr(readout, "in_features", shape[-1] if len(shape) == 2 else units))


def hidden_of(model: Any, units: int) -> int:
    """How many units one layer's h has; all, where the model does not say so."""
    layer = _recurrent(model)
    return units if getattr(layer, "bidirectional", False) else getattr(layer, "hidden_size", units)


def _recurrent(model: Any) -> Any:
    """The cell itself, where its start learns beside it."""
    return getattr(model, "of_states", model)
