"""The squared error as an equinox module."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import numpy as np

from kpflow_dyn._learning.losses import weighted_squares


class SquaredError(eqx.Module):
    """A weighted squared error of the states, or of a readout of them; arrays of numpy are constants."""

    weight: Any
    bias: Any
    target: np.ndarray
    weights: np.ndarray

    def __init__(self, target: jax.Array, weights: jax.Array, weight: Any, bias: Any, learn: bool) -> None:
        self.weight, self.bias = (a if a is None or learn else np.asarray(a) for a in (weight, bias))
        self.target, self.weights = np.asarray(target), np.asarray(weights)

    def __call__(self, state: jax.Array) -> jax.Array:
        return weighted_squares(state, self)
