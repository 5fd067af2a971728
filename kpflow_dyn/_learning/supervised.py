"""Training, as far as it is the same in both frameworks: the units that a readout reads, and the loss."""

from __future__ import annotations

from typing import Any

from kpflow_dyn._arrays import Array


def units_read(model: Any, readout: Any, units: int) -> slice:
    """All units of the state, or the h of the last layer, whichever has the width of the readout.

    A state [unit] has all layers' h one after another, then all layers' c.

    Raises:
        ValueError: a readout of another width.
    """
    hidden = getattr(model, "hidden_size", units)
    width = getattr(readout, "in_features", units)
    if width == units:
        return slice(0, units)
    if width == hidden:
        end = getattr(model, "num_layers", 1) * hidden
        return slice(end - hidden, end)
    either = (
        f"{units} units" if hidden == units else f"{hidden} units (the last layer's h) or {units} (the whole state)"
    )
    raise ValueError(f"the readout takes {width} units, expected one of {either}")


def mean_squared_error(output: Array, targets: Array, mask: Array) -> Array:
    """sum of m (y - y*)^2 over trials, times and outputs, divided by their number where m = 1.

    Args:
        output: y [trial, time, out].
        targets: y* [trial, time, out].
        mask: m [trial, time], ones and zeros.

    Raises:
        ValueError: output and targets of two shapes.
    """
    if output.shape != targets.shape:
        raise ValueError(
            f"the readout gives {tuple(output.shape)} [trial, time, out], expected {tuple(targets.shape)} as the "
            "task's targets have; take a readout of as many outputs"
        )
    return (mask[..., None] * (output - targets) ** 2).sum() / (mask.sum() * targets.shape[-1])
