"""Starts z_0 that learn: as a parameter that all trials share, or computed from data by an encoder."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kpflow_dyn._arrays import Array, array_namespace, is_array
from kpflow_dyn._backend import Backend
from kpflow_dyn._problems.checks import check_rows, laid_out_start
from kpflow_dyn._problems.layouts import Layout

_DROPPED = (
    "{what} carries a gradient, and what computed it does not learn. Pass its data as {name}, and the model that "
    "computes the start from them as encoder=; or call .learn_start() on the problem, where the start is a parameter "
    "by itself. {name}.detach() says that it is to stay as it is"
)
_VARIES = (
    "the history is a function of time whose parameters, or what it closes over, carry a gradient, and it does not "
    "learn. A constant history does: pass it as history= and call .learn_start(), or the data that a model gives it "
    "from, with the model as encoder=. Without requires_grad, in JAX as a plain function, it stays as it is"
)


class StartWarning(UserWarning):
    """A start z0 that carries a gradient, of which J = dS/dtheta knows nothing: what computed it does not learn.

    In JAX, whose arrays do not say where they come from, there is such a warning of histories that hold arrays alone.

    Source: docs/theory.md, "P: how kicks travel".

    >>> import warnings, kpflow_dyn as kp
    >>> warnings.simplefilter("error", kp.StartWarning)  # for whoever wants no such kernel
    """


def check_encoded(data: Any, name: str = "z0", trials: int | None = None) -> Array:
    """The data of an encoder [trial, ...], finite floats or integers, of this number of trials."""
    data = check_rows(data, f"{name}, the data of the encoder,", "[trial, ...]")
    if trials is not None and len(data) != trials:
        raise ValueError(f"z0, the data of the encoder, has {len(data)} trials, but x has {trials}")
    return data


def whole_start(f: Any, z0: Any) -> Any:
    """The start, that of a sampled loop made whole where it is the plant's alone."""
    if not (hasattr(f, "sampling") and is_array(z0) and z0.ndim == 2):
        return z0
    width, sampling = z0.shape[1], f.sampling
    if width not in (sampling.state, sampling.size):
        raise ValueError(
            f"z0 has {width} entries, expected the {sampling.state} of the plant's state, or the {sampling.size} of "
            f"loop.start(z0, memory, control): {sampling.sizes}"
        )
    return f.start(z0) if width == sampling.state else z0


def laid_out_encoded(backend: Backend, f: Any, encoder: Any, data: Array, order: int) -> tuple[Layout, Array]:
    """How the start of an ODE that an encoder gives lies on the units, and its numbers z_0 [trial, unit]."""
    given = whole_start(f, encode(backend, encoder, data))
    try:
        layout, start = laid_out_start(given, backend, order)
    except (TypeError, ValueError) as error:
        raise _unfit(error) from error
    if len(start) != len(data):
        raise _unfit(f"z0 is of {len(start)} trials, expected {len(data)}")
    return layout, start


def rows_of_parameter(backend: Backend, parameter: Array, like: Array) -> Array:
    """z_0 [trial, unit] of a parameter [unit] that all trials share, for starts like these."""
    if tuple(parameter.shape) != tuple(like.shape[1:]):
        raise ValueError(
            f"encoder is an array of shape {tuple(parameter.shape)}, expected z_0 {list(like.shape[1:])} [unit], a "
            "parameter that all trials share; or a model that is called on z0, the data"
        )
    return backend.models.snapshot(_of_all(parameter, len(like)))


def encode(backend: Backend, encoder: Any, data: Array) -> Any:
    """What the encoder gives of all trials, as numbers alone: z_0 [trial, unit], or a tuple of such."""
    with backend.models.left_alone(encoder), backend.solving.without_gradients():
        return backend.models.encoded(encoder, data)


def _unfit(error: Any) -> ValueError:
    return ValueError(
        f"the encoder does not fit: of what it gives, {error}. It gives z_0 [trial, unit], in JAX of one trial; of a "
        "recurrent layer, which returns (output, h_n), h_n[-1]"
    )


@contextmanager
def start_named(problem: Any) -> Iterator[None]:
    """Errors about z0 say that it is what the encoder gives."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if problem.encodes and str(error).startswith(("z0 ", "the parts of z0 ")):
            raise _unfit(error) from error
        raise


def start_map(problem: Any) -> Callable[..., Array] | None:
    """(the problem's model, the numbers of some trials) -> z_0 [trial, unit]; None where it does not learn."""
    if problem.encoder is None:
        return None
    trials, data = len(problem.data), getattr(problem, "encoded", problem.z0)

    def start(model: Any, chosen: Any = None) -> Array:
        if is_array(problem.encoder):
            return _of_all(model.start, trials if chosen is None else len(chosen))
        given = problem.backend.models.encoded(model.start, data if chosen is None else data[chosen])
        return problem.backend.tracing.flat_start(problem, whole_start(getattr(problem, "f", None), given))

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


def without_gradient(problem: Any, stacklevel: int) -> Any:
    """The problem itself; where its start carries a gradient, one whose does not, and a `StartWarning`."""
    models, encoder, name = problem.backend.models, problem.encoder, problem.given_as
    given = getattr(problem, "start_given", problem.z0)
    if is_array(encoder) or not models.carries_gradient(given):
        return problem
    if getattr(problem, "varies", False):
        warnings.warn(StartWarning(_VARIES), stacklevel=stacklevel)
        return problem
    what = name if encoder is None else f"{name}, the data of the encoder,"
    warnings.warn(StartWarning(_DROPPED.format(what=what, name=name)), stacklevel=stacklevel)
    if encoder is None:
        given = problem.unflatten(given) if hasattr(problem, "unflatten") else given
    return problem.remake(**{name: models.without_gradient(given)})
