"""A JAX model and its readout in training, each step giving new ones."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kpflow_dyn._jax.cells import Step, as_step
from kpflow_dyn._jax.checks import check_parameters, named_parameters, with_parameters
from kpflow_dyn._jax.optimisers import OPTIMIZERS, Rule, by_one_gradient, learning_rates, made
from kpflow_dyn._jax.rollout import check_step, run

__all__ = ["OPTIMIZERS", "Rule", "Trainee", "learning_rates"]


class Trainee:
    """A model and its readout, on data [trial, time, ...] in their dtype."""

    def __init__(
        self,
        model: Any,
        readout: Any,
        data: Sequence[np.ndarray],
        z0: Any,
        optimizer: Callable[..., optax.GradientTransformation],
        lr: float,
        clip: float | None,
        read: Callable[[int], slice],
        loss: Callable[..., jax.Array],
    ) -> None:
        like = next(iter(named_parameters(model).values())).real
        self._data = [jnp.asarray(array, None if array.dtype.kind == "i" else like.dtype) for array in data]
        check_parameters(model, like)
        check_parameters(readout, like)
        self._step, self._start = as_step(model, self._data[0], z0)
        check_step(self._step, model, self._data[0][0, 0], self._start[0])
        units = read(self._start.shape[-1])
        self._loss, self._read = loss, (units.start, units.stop)
        clipped = optax.identity() if clip is None else optax.clip_by_global_norm(clip)
        self._change = optax.chain(clipped, made(optimizer, lr))
        self.model, self.readout = model, readout
        self._state = self._change.init(eqx.filter((model, readout), eqx.is_inexact_array))

    def evaluate(self, trials: np.ndarray | slice) -> float:
        """The loss on these trials, whose gradient is kept for `step`, and the outputs as `output`."""
        rows = [*self.rows(trials), self._start[trials]]
        models = (self.model, self.readout)
        (loss, self.output), self._gradient = _loss_and_gradient(models, self._loss, self._step, self._read, *rows)
        return float(loss)

    def rows(self, trials: np.ndarray | slice) -> list[jax.Array]:
        """Inputs, targets and mask of these trials."""
        return [array[trials] for array in self._data]

    def follow(self, gradient: Mapping[str, jax.Array]) -> None:
        """Put this in the place of the gradient of the model's parameters, by name."""
        self._gradient = with_parameters(self._gradient[0], dict(gradient)), self._gradient[1]

    def step(self) -> None:
        """Change the parameters by the optimiser's step."""
        models = (self.model, self.readout)
        with by_one_gradient():
            (self.model, self.readout), self._state = _changed(self._change, models, self._gradient, self._state)


@eqx.filter_jit
def _loss_and_gradient(
    models: Any,
    loss: Callable[..., jax.Array],
    step: Step,
    read: tuple[int, int],
    x: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    z0: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    @partial(eqx.filter_value_and_grad, has_aux=True)
    def of_models(models: Any) -> tuple[jax.Array, jax.Array]:
        model, readout = models
        states = run(step, model, x, z0)[..., slice(*read)]
        output = jax.vmap(jax.vmap(readout))(states)
        return loss(output, targets, mask), output

    found, gradient = of_models(models)
    return found, jax.tree.map(jnp.conj, gradient)  # of a complex parameter JAX gives the conjugate of the slope


@eqx.filter_jit
def _changed(change: optax.GradientTransformation, models: Any, gradient: Any, state: Any) -> tuple[Any, Any]:
    updates, state = change.update(gradient, state, eqx.filter(models, eqx.is_inexact_array))
    return eqx.apply_updates(models, updates), state
