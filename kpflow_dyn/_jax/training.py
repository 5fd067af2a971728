"""A JAX model and its readout in training, each step giving new ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kpflow_dyn._jax.cells import Step, as_step
from kpflow_dyn._jax.checks import check_parameters, named_parameters
from kpflow_dyn._jax.rollout import check_step, run
from kpflow_dyn._learning.supervised import mean_squared_error, units_read

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"adam": optax.adam, "sgd": optax.sgd}


class Trainee:
    """A model and its readout, on data [trial, time, ...] in their dtype.

    Attributes:
        model, readout: as they are by now.
    """

    def __init__(
        self,
        model: Any,
        readout: Any,
        data: Sequence[np.ndarray],
        z0: Any,
        optimizer: Callable[..., optax.GradientTransformation],
        lr: float,
        clip: float | None,
    ) -> None:
        like = next(iter(named_parameters(model).values()))
        self._data = [jnp.asarray(array, like.dtype) for array in data]
        check_parameters(model, like)
        check_parameters(readout, like)
        self._step, self._start = as_step(model, self._data[0], z0)
        check_step(self._step, model, self._data[0][0, 0], self._start[0])
        read = units_read(model, readout, self._start.shape[-1])
        self._read = (read.start, read.stop)
        self._change = optax.chain(optax.identity() if clip is None else optax.clip_by_global_norm(clip), optimizer(lr))
        self.model, self.readout = model, readout
        self._state = self._change.init(eqx.filter((model, readout), eqx.is_inexact_array))

    def evaluate(self, trials: np.ndarray | slice) -> float:
        """The loss on these trials, whose gradient is kept for `step`."""
        rows = [array[trials] for array in (*self._data, self._start)]
        loss, self._gradient = _loss_and_gradient((self.model, self.readout), self._step, self._read, *rows)
        return float(loss)

    def step(self) -> None:
        """Change the parameters by the optimiser's step."""
        models = (self.model, self.readout)
        (self.model, self.readout), self._state = _changed(self._change, models, self._gradient, self._state)


@eqx.filter_jit
def _loss_and_gradient(
    models: Any, step: Step, read: tuple[int, int], x: jax.Array, targets: jax.Array, mask: jax.Array, z0: jax.Array
) -> tuple[jax.Array, Any]:
    @eqx.filter_value_and_grad
    def loss(models: Any) -> jax.Array:
        model, readout = models
        states = run(step, model, x, z0)[..., slice(*read)]
        return mean_squared_error(jax.vmap(jax.vmap(readout))(states), targets, mask)

    return loss(models)


@eqx.filter_jit
def _changed(change: optax.GradientTransformation, models: Any, gradient: Any, state: Any) -> tuple[Any, Any]:
    updates, state = change.update(gradient, state, eqx.filter(models, eqx.is_inexact_array))
    return eqx.apply_updates(models, updates), state
