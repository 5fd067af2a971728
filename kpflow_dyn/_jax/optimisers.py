"""Optimisers of optax as functions of their state."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import optax

from kpflow_dyn._arrays.complex_numbers import by_name, vector_of
from kpflow_dyn._backend import Values
from kpflow_dyn._jax.programs import Shared
from kpflow_dyn._shown import type_name

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
        unreached: those that the loss does not hang on; optax decays them like all others.
    """

    def __init__(
        self, optimizer: Any, lr: float | None, clip: float | None, like: Values, unreached: Collection[str] = ()
    ) -> None:
        found = made(optimizer, lr)
        change = optax.with_extra_args_support(
            found if clip is None else optax.chain(optax.clip_by_global_norm(clip), found)
        )

        def step(state: Any, theta: jax.Array, gradient: jax.Array) -> tuple[Any, jax.Array]:
            values = by_name(theta, like)
            updates, state = change.update(by_name(gradient, like), state, values)
            moved: Any = optax.apply_updates(values, updates)
            return state, vector_of(moved[name] for name in like)

        self.rate = lr if optimizer is optax.sgd and clip is None else None
        self.begin = lambda theta: change.init(by_name(theta, like))
        self._step = Shared(step)

    def step(self, state: Any, theta: jax.Array, gradient: jax.Array) -> tuple[Any, jax.Array]:
        """The state and the parameters after one more step."""
        with by_one_gradient():
            return self._step(state, theta, gradient)


def made(optimizer: Any, lr: float | None) -> Any:
    """The transformation of gradients that this makes, or is.

    Raises:
        TypeError: where that is none.
    """
    expected = "expected a name, a transformation of optax, or what makes one"
    try:
        made_already = hasattr(optimizer, "update") or not callable(optimizer)
        found = optimizer if made_already else optimizer(*(() if lr is None else (lr,)))
    except TypeError as error:
        raise TypeError(f"optimizer({'' if lr is None else 'lr'}) fails ({error}); {expected}") from error
    if isinstance(found, optax.MultiSteps):
        return found.gradient_transformation()
    if not (hasattr(found, "init") and hasattr(found, "update")):
        raise TypeError(f"optimizer is {type_name(found)}, {expected}")
    return found


@contextmanager
def by_one_gradient() -> Iterator[None]:
    """Say so where the update of an optimiser wants more than the gradient, such as the loss as a function."""
    try:
        yield
    except TypeError as error:
        raise TypeError(
            f"the optimizer does not step by plain gradients alone ({error}); take another optimiser"
        ) from error


def learning_rates(optimizer: Any, model: Any) -> NoReturn:
    """A TypeError: an optimiser of optax is a pair of functions, and its second moment is in a state beside it."""
    raise TypeError(
        f"the learning rates of {type(optimizer).__name__} are not known, as its state is not in it; take "
        "LearningRates.from_second_moment of the state"
    )
