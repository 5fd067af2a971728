"""What JAX and equinox say when a model cannot be run, in one line, with the line of the model and the way out."""

import site
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

PYTHON = "a Python branch or loop on its values, or numpy; use jnp.where, jax.lax and jax.numpy in their place"
ADVICE = {
    "Dropout requires a key": "it is random; call eqx.nn.inference_mode(model) first, or give it a fixed key",
    "unbound axis name": "statistics over a batch couple the trials; call eqx.nn.inference_mode(model) first, or take "
    "another norm",
    "not functionalized": "leave the checks of checkify out, or write them with eqx.error_if",
    "NYI": "JAX cannot map it over trials; write it with other operations, such as einsum",
    "do not support JVP": "give the function around the callback a jax.custom_vjp",
}
LIBRARIES = tuple({*site.getsitepackages(), sysconfig.get_path("stdlib"), str(Path(__file__).parents[1])})


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Raise whatever a model raises as a ValueError of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}{cause_of(error)}") from error


def cause_of(error: BaseException) -> str:
    """Where in the user's code an error arose, what it says, and the way out where it is known."""
    return f"{_line_of(error)}: {first_line(error)}{_advice(error)}"


def first_line(error: BaseException) -> str:
    """What an error says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _advice(error: BaseException) -> str:
    """The way out, where it is known."""
    if isinstance(error, jax.errors.JAXTypeError | jax.errors.JAXIndexError):
        return f"; it has {PYTHON}"
    found = [way for words, way in ADVICE.items() if words in str(error)]
    return f"; {found[0]}" if found else ""


def _line_of(error: BaseException) -> str:
    """Where in the user's own code it arose, as " (model.py, line 12)"."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(LIBRARIES)]
    own = [frame for frame in frames if Path(frame.filename).is_absolute()]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
