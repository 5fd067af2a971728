"""What JAX and equinox say when a model cannot be run, in one line, with the line of the model and the way out."""

import site
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

KINDS = (  # of errors of JAX where Python needs the numbers of what is traced, the narrower ones first
    (
        jax.errors.TracerBoolConversionError,
        "a Python branch or loop (if, while, and, or, not, min, max) hangs on a value; use jnp.where(condition, a, b), "
        "jax.lax.cond or jax.lax.while_loop in its place",
    ),
    (
        jax.errors.NonConcreteBooleanIndexError,
        "the shape of values[mask] hangs on a value; use jnp.where(mask, values, 0) in its place",
    ),
    (
        jax.errors.TracerIntegerConversionError,
        "range() or the index of a list is a value; use jax.lax.fori_loop, or jnp.stack(list)[index], in its place",
    ),
    (
        jax.errors.TracerArrayConversionError,
        "numpy, or another library, is given a value; use that of jax.numpy of the same name, jnp.sin for np.sin",
    ),
    (
        jax.errors.ConcretizationTypeError,
        "float(), int(), .item() or a function of math asks for the number of a value; leave it an array, use "
        "jnp.where, jax.lax and jax.numpy",
    ),
)
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
    for kind, way in KINDS:
        if isinstance(error, kind):
            return f"; {way}"
    found = [way for words, way in ADVICE.items() if words in str(error)]
    return f"; {found[0]}" if found else ""


def of_all_trials(call: Callable[..., Any], *rows: Any, trials: int = 2) -> str:
    """What to do about a model that fails on rows of one trial, in shapes, where it takes those of all at once."""
    try:
        out = jax.eval_shape(call, *(jax.ShapeDtypeStruct((trials, *row.shape), row.dtype) for row in rows))
        fits = all(leaf.shape[:1] == (trials,) for leaf in jax.tree.leaves(out))
    except Exception:  # of the user's model
        return ""
    return ". It takes all trials at once: write it for one, without the axis of trials" if fits else ""


def _line_of(error: BaseException) -> str:
    """Where in the user's own code it arose, as " (model.py, line 12)"."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(LIBRARIES)]
    own = [frame for frame in frames if Path(frame.filename).is_absolute()]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
