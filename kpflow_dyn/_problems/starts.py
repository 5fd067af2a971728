"""Starts z_0 that learn: as a parameter that all trials share, or computed from data by an encoder."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kpflow_dyn._arrays import Array, array_namespace, is_array
from kpflow_dyn._arrays.complex_numbers import in_halves
from kpflow_dyn._backend import Backend
from kpflow_dyn._problems.checks import check_rows

_DROPPED = (
    "{} carries a gradient, and what computed it does not learn. Pass its data as z0, and the model that computes the "
    "start from them as encoder=; or call .learn_start() on the problem, where the start is a parameter by itself. "
    "z0.detach() says that it is to stay as it is"
)


class StartWarning(UserWarning):
    """A start z0 that carries a gradient, of which J = dS/dtheta knows nothing: what computed it does not learn.

    In JAX, whose arrays do not say where they come from, there is no such warning.

    Source: docs/theory.md, "P: how kicks travel".

    >>> import warnings, kpflow_dyn as kp
    >>> warnings.simplefilter("error", kp.StartWarning)  # for whoever wants no such kernel
    """


def check_encoded(data: Any, trials: int | None = None) -> Array:
    """The data of an encoder [trial, ...], finite floats or integers, of this number of trials."""
    data = check_rows(data, "z0, the data of the encoder,", "[trial, ...]")
    if trials is not None and len(data) != trials:
        raise ValueError(f"z0, the data of the encoder, has {len(data)} trials, but x has {trials}")
    return data


def encoded_start(backend: Backend, encoder: Any, data: Array) -> Array:
    """The numbers of z_0 [trial, unit] that an encoder gives, or a parameter."""
    if is_array(encoder):
        if encoder.ndim != 1:
            raise ValueError(
                f"encoder is an array of shape {tuple(encoder.shape)}, expected z_0 [unit], a parameter that all "
                "trials share; or a model that is called on z0, the data"
            )
        return backend.models.snapshot(_of_all(encoder, len(data)))
    start = encode(backend, encoder, data)
    if not is_array(start):
        raise ValueError(
            f"the encoder returned a {type(start).__name__}, expected z_0 [trial, unit] (in JAX of one trial, [unit]); "
            "of what a recurrent layer gives, (output, h_n), return h_n[-1]"
        )
    if start.ndim != 2 or len(start) != len(data):
        raise ValueError(
            f"the encoder returned shape {tuple(start.shape)}, expected z_0 [trial, unit] of {len(data)} trials"
        )
    return start


def encode(backend: Backend, encoder: Any, data: Array) -> Any:
    """What the encoder gives of all trials, as numbers alone: z_0 [trial, unit], or a tuple of such."""
    with backend.models.left_alone(encoder), backend.solving.without_gradients():
        return backend.models.encoded(encoder, data)


@contextmanager
def start_named(problem: Any) -> Iterator[None]:
    """Errors about z0 say that it is what the encoder gives."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if problem.encodes and str(error).startswith(("z0 ", "the parts of z0 ")):
            raise type(error)(f"the encoder does not fit: what it gives as {error}") from error
        raise


def start_map(problem: Any) -> Callable[..., Array] | None:
    """(the problem's model, the numbers of some trials) -> z_0 [trial, unit]; None where it does not learn."""
    if problem.encoder is None:
        return None
    trials, data = len(problem.data), getattr(problem, "encoded", problem.z0)

    def start(model: Any, chosen: Any = None) -> Array:
        if is_array(problem.encoder):
            return _of_all(in_halves(model.start), trials if chosen is None else len(chosen))
        return _flat(problem.backend.models.encoded(model.start, data if chosen is None else data[chosen]))

    return start


@dataclass(frozen=True)
class OfStates:
    """The step of a cell, as one of the model that holds it beside what gives its start."""

    step: Callable[..., Array]

    def __call__(self, model: Any, x: Array, z: Array) -> Array:
        """The next state."""
        return self.step(model.of_states, x, z)


def _of_all(start: Array, trials: int) -> Array:
    """[trial, unit] of [unit]."""
    return array_namespace(start).broadcast_to(start, (trials, *start.shape))


def _flat(start: Any) -> Array:
    """The parts of a start side by side, of complex ones all real parts first."""
    parts = [in_halves(part) for part in (start if isinstance(start, tuple | list) else [start])]
    return parts[0] if len(parts) == 1 else array_namespace(parts[0]).concat(parts, axis=-1)


def without_gradient(problem: Any, stacklevel: int) -> Any:
    """The problem itself; where its start carries a gradient, one whose does not, and a `StartWarning`."""
    models, data = problem.backend.models, getattr(problem, "encoded", None)
    given = problem.z0 if data is None else data
    if is_array(problem.encoder) or not models.carries_gradient(given):
        return problem
    what = "z0, the data of the encoder," if problem.encodes else "z0"
    warnings.warn(StartWarning(_DROPPED.format(what)), stacklevel=stacklevel)
    return problem.remake(z0=models.without_gradient(given))
