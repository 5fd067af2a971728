"""Optimisers of optax as functions of their state."""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import optax

from kpflow_dyn._backend import Values
from kpflow_dyn.tracing._rows import split

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "rmsprop": optax.rmsprop,
    "sgd": optax.sgd,
}


class Rule:
    """An optimiser as a function of its state, on parameters [n], which are all of `like` in their order.

    Args:
        optimizer: what makes one, called as optimizer(lr); or a transformation of gradients itself.
        lr: the learning rate; None for an optimiser that has its own.
        clip: scales the gradient down to this norm where it is larger.
        like: the parameters by name.
    """

    def __init__(self, optimizer: Any, lr: float | None, clip: float | None, like: Values) -> None:
        found: Any = optimizer if hasattr(optimizer, "update") else optimizer(*(() if lr is None else (lr,)))
        if not hasattr(found, "update"):
            raise TypeError(f"optimizer gives {type(found).__name__}, expected one of optax, or what makes one")
        change = optax.with_extra_args_support(
            found if clip is None else optax.chain(optax.clip_by_global_norm(clip), found)
        )

        def by_name(theta: jax.Array) -> Values:
            return dict(zip(like, split(theta, list(like.values())), strict=True))

        def step(state: Any, theta: jax.Array, gradient: jax.Array) -> tuple[Any, jax.Array]:
            values = by_name(theta)
            updates, state = change.update(by_name(gradient), state, values)
            moved: Any = optax.apply_updates(values, updates)
            return state, jnp.concatenate([moved[name].ravel() for name in like])

        self.rate = lr if optimizer is optax.sgd and clip is None else None
        self.begin = lambda theta: change.init(by_name(theta))
        self.step = jax.jit(step)


def learning_rates(optimizer: Any, model: Any) -> NoReturn:
    """A TypeError: an optimiser of optax is a pair of functions, and its second moment is in a state beside it."""
    raise TypeError(
        f"the learning rates of {type(optimizer).__name__} are not known, as its state is not in it; take "
        "LearningRates.from_second_moment of the state"
    )
