"""Autograd through the user's own model, the referee of every linearisation.

J* q for one random q over the whole state is one reverse pass through the model as its user calls it. A linearisation
that is wrong in any entry that q meets differs from it with probability one, and <q, J theta> = <J* q, theta> for a
random theta then fixes J.
"""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from kpflow_dyn._arrays import Array, eps_of, like_numpy, to_numpy
from kpflow_dyn._arrays.complex_numbers import count
from kpflow_dyn._problems.checks import check_finite

PACKAGE = str(Path(__file__).parent.parent)
ROUNDING = 1e4  # of a gradient, in units of the dtype's round-off
OWN = 1e-6  # between two modes of a model itself, which may have a part in float32, as fused attention has
FLOOR = 1e3  # the same of the largest gradient: small ones may be differences of large terms
LESS_PRECISE = 10  # of values, in units of the round-off of the model's least precise part
NOISE = 1e3  # of these, in units of how far rounding moves them
CANCELLED = 30  # of any gradient, in these units, where rounding is what is left of terms that cancel
AT_MOST = 1e-2  # of a gradient may be such rounding
SINGULAR = "look at the weights, or for the sqrt or norm of a zero, to which a small number may be added"
NOT_FINITE = f"the derivative of the model holds NaN or inf; {SINGULAR}"
NOT_LINEAR = (
    "the model's backward pass is not linear, so it is no derivative: {}. Take out what clips gradients or depends on "
    "their values, and compute all of the model in the precision of its states"
)


class Probe(NamedTuple):
    """A random q of the states, and what it pulls back to the parameters [1, p] and to the argument [1, ...]."""

    q: Array
    theta: Array
    argument: Array


class Derivative(Protocol):
    """The derivative of states in the parameters and in an argument like the states, on blocks of probes.

    value   the states [...].
    push    changes of the parameters [probe, p] and of the argument [probe, ...], None for none -> of the states.
    pull    the transpose.
    probe   one random block [1, ...] of states and what it pulls back.
    connected  False where autograd knows of no way from the parameters or the argument to the states.
    rounding  the round-off of the least precise numbers that it computes with.
    """

    @property
    def value(self) -> Array: ...
    @property
    def probe(self) -> Probe: ...
    @property
    def connected(self) -> bool: ...
    @property
    def rounding(self) -> float: ...
    def push(self, theta: Array | None, argument: Array | None) -> Array: ...
    def pull(self, q: Array) -> tuple[Array, Array]: ...


class Mismatch(ValueError):
    """A linearisation that differs from autograd through the model; the message says where and by how much."""


class Linearisation(Protocol):
    """A linearisation that is to be that derivative: its value and both of its maps."""

    @property
    def value(self) -> Array: ...
    def push(self, theta: Array, argument: Array) -> Array: ...
    def pull(self, q: Array, /) -> tuple[Array, Array]: ...


def sizes_of(parameters: Mapping[str, Array]) -> dict[str, int]:
    """How many numbers each parameter has."""
    return {name: count(value) for name, value in parameters.items()}


def drawn(shapes: Sequence[tuple[int, ...]], like: Array, seed: int = 1) -> list[Array]:
    """Random numbers of mean 0 and size 1 of numpy's: JAX compiles its own anew for each shape, for seconds."""
    generator, dtype = np.random.default_rng(seed), np.float64 if eps_of(like) < eps_of(np.float32(0)) else np.float32
    found = []
    for shape in shapes:
        values = generator.random(shape, dtype)
        values -= 0.5  # in place, as they may be as large as all states
        values *= 12**0.5
        found.append(like_numpy(values, like))
    return found


@dataclass(frozen=True)
class Answer:
    """What autograd through the model says: its value, what it pulls back of one random q, how, and how precisely."""

    value: Array
    probe: Probe
    pull: Callable[[Array], tuple[Array, Array]]
    rounding: float = 0.0

    @cached_property
    def noise(self) -> tuple[np.ndarray, np.ndarray]:
        """How far rounding alone moves what is pulled back, of the parameters [p] and of the argument [trial, ...]."""
        q, *first = self.probe
        scaled = [[to_numpy(values)[0] / scale for values in self.pull(scale * q)] for scale in (0.7, 1.1, 1.3)]
        pairs = zip(zip(*scaled, strict=True), first, strict=True)
        parameters, argument = (abs(np.stack(again) - to_numpy(once)[0]).max(0) for again, once in pairs)
        return parameters, argument


def answer_of(own: Derivative) -> Answer:
    """The model's own answer."""
    return Answer(own.value, own.probe, own.pull, own.rounding)


def ask(own: Derivative) -> Answer:
    """The same; a ValueError where it has no derivative."""
    return with_derivative(answer_of(own))


def with_derivative(answer: Answer) -> Answer:
    """The answer itself; a ValueError where the model has no derivative."""
    _, theta, argument = answer.probe
    if argument.ndim > 3:
        check_finite(to_numpy(argument)[0], "the derivative of the step", SINGULAR)
    for gradient in (theta, argument):
        if not np.isfinite(to_numpy(gradient)).all():
            raise ValueError(NOT_FINITE)
    return answer


def departure(found: Array, expected: Array, size: float = 1.0, rounding: float = 0.0) -> float:
    """How far results are from those expected, over the largest of these or a size.

    It is 0 within the rounding of their dtype, or of one of less precision in which they were computed.
    """
    found, expected = to_numpy(found), to_numpy(expected)
    error, size = largest_of(found - expected), max(size, largest_of(expected))
    return 0.0 if error <= tolerance_of(expected, rounding) * size else error / size


def tolerance_of(values: Any, rounding: float = 0.0) -> float:
    """How far two computations of values may differ: by the rounding of their dtype, or of one of less precision."""
    return max(ROUNDING * eps_of(values), LESS_PRECISE * rounding)


def check_any(own: Derivative, untraced: str) -> None:
    """Raise where the states of a model without a trace hang on nothing, as far as autograd can tell."""
    if not own.connected:
        raise ValueError(
            "the states have no derivative, neither in what comes before them nor in a parameter that learns: autograd "
            f"through the model knows of none ({untraced}); look for argmax, .detach(), no_grad or numpy in it, or "
            "give it a straight-through gradient"
        )


def compare(found: Linearisation, answer: Answer, sizes: dict[str, int]) -> None:
    """Raise a `Mismatch` unless a linearisation is that of autograd; sizes are those of the parameters by name.

    It is asked for the same q, and for one random direction.
    """
    rounding = answer.rounding
    if error := departure(found.value, answer.value, rounding=rounding):
        raise Mismatch(f"its values differ from the model's own by {error:.1e} of their size")
    q, *expected = answer.probe
    given = found.pull(q)
    parameters, rows = [(to_numpy(a)[0], to_numpy(b)[0]) for a, b in zip(given, expected, strict=True)]
    compare_gradients(*parameters, sizes, lambda: answer.noise[0], rounding)
    _compare_rows(*rows, lambda: answer.noise[1], rounding)
    moved = drawn([tuple(a.shape) for a in expected], q, seed=2)
    check_transpose(q, found.push(*moved), given, moved, LESS_PRECISE * rounding)


def check_transpose(
    q: Array, pushed: Array, pulled: Sequence[Array], moved: Sequence[Array], tolerance: float = 0.0
) -> None:
    """Raise a `Mismatch` unless <q, pushed> is <pulled, moved>: what q pulls back, and where the moved are pushed.

    To rounding, or to the tolerance above it. A ValueError where they are not finite.
    """
    states, *pairs = [tuple(map(to_numpy, pair)) for pair in [(q, pushed), *zip(pulled, moved, strict=True)]]
    terms = [_dot(*states), *(-_dot(*pair) for pair in pairs)]
    if not np.isfinite(terms).all():
        raise ValueError(NOT_FINITE)
    size = sum(map(abs, terms)) + _norm(states[0]) * _norm(pairs[-1][1])
    if not abs(sum(terms)) <= max(tolerance, ROUNDING * eps_of(states[0])) * size:
        raise Mismatch(
            f"its forward mode is not the transpose of its reverse mode: <q, J theta> and <J* q, theta> differ by "
            f"{abs(sum(terms)) / size:.1e} of their size"
        )


def in_words(reason: Exception, causes: list[str], decided: str = "") -> str:
    """Why there is no trace, or none that agrees.

    Args:
        causes: what of the model a trace may not see.
        decided: what the values of one row decided, and where, which may not be so for all.
    """
    text = (str(reason).strip() or type(reason).__name__).rstrip(".")
    if not isinstance(reason, Mismatch):
        text = text if _is_ours(reason) else f"its trace could not be analysed ({type(reason).__name__}: {text})"
    else:
        seen = f"; the likely cause: {', '.join(causes)}" if causes else ""
        text = f"the trace is not the model: {text}{seen}"
    return f"{decided} ({text})" if decided else text


def _is_ours(reason: Exception) -> bool:
    """Whether an error was raised in words, rather than by an operation that did not expect what it got."""
    frames = traceback.extract_tb(reason.__traceback__)
    return isinstance(reason, ValueError | TypeError) and frames[-1].filename.startswith(PACKAGE)


def compare_gradients(
    found: np.ndarray,
    expected: np.ndarray,
    sizes: dict[str, int],
    noise: Callable[[], np.ndarray] | None = None,
    rounding: float = 0.0,
) -> None:
    """Raise a `Mismatch` unless gradients [p] are alike, parameter by parameter.

    Those that are small beside others may be differences of large terms, of which no more than noise is left. How much
    that is, `noise` knows, and without it they are let pass. All may be such differences, as behind a norm of two
    units, which is +-1. `rounding` is that of the model's least precise part.
    """
    start, wrong, tolerance = 0, {}, tolerance_of(expected, rounding)
    floor = max(FLOOR * eps_of(expected), LESS_PRECISE * rounding) * largest_of(expected)
    for name, size in sizes.items():
        here = slice(start, start + size)
        part, own = found[here], expected[here]
        error, largest, start = largest_of(part - own), largest_of(own), start + size
        known = tolerance * largest
        if error <= known or (noise is None and error <= known + floor):
            continue
        if noise is not None and error <= _rounded(known + floor, largest, largest_of(noise()[here])):
            continue
        wrong[name] = error / max(largest or largest_of(part), 1e-300)
    if wrong:
        worst = max(wrong, key=lambda name: wrong[name])
        others = f" (also in {', '.join(name for name in wrong if name != worst)})" if len(wrong) > 1 else ""
        raise Mismatch(
            f"its gradient in {worst} is off by {wrong[worst]:.1e} of that of autograd through the model{others}"
        )


def _compare_rows(
    found: np.ndarray, expected: np.ndarray, noise: Callable[[], np.ndarray], rounding: float = 0.0
) -> None:
    """Gradients in the argument [trial, (time,) ...], row by row, as those of parameters."""
    last = tuple(range(min(2, expected.ndim - 1), expected.ndim))
    error, size = (np.maximum(values.max(last), -values.min(last)) for values in (found - expected, expected))
    allowed = tolerance_of(expected, rounding) * size
    if (error > allowed).any():
        floor = max(FLOOR * eps_of(expected), LESS_PRECISE * rounding) * size.max()
        allowed = np.maximum(allowed, _rounded(allowed + floor, size, noise().max(last).max(0)))
    if (wrong := ~(error <= allowed)).any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        where = ", ".join(f"{axis} {n}" for axis, n in zip(("trial", "step"), at, strict=False)) or "all of it"
        relative = float(error[at]) / max(float(size[at]), 1e-300)
        raise Mismatch(
            f"its gradient in the state is off by {relative:.1e} of that of autograd "
            f"through the model ({where}, and in {wrong.mean():.0%} of all)"
        )


def _rounded(known: Any, size: Any, noise: Any) -> Any:
    """How far gradients may be off that rounding moves by a noise, small ones beside others or any by itself."""
    return np.maximum(np.minimum(known, NOISE * noise), np.minimum(AT_MOST * size, CANCELLED * noise))


def largest_of(values: np.ndarray) -> float:
    """The largest absolute value, without a copy of all."""
    return max(float(values.max()), -float(values.min())) if values.size else 0.0


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.dot(a.reshape(-1), b.reshape(-1)))


def _norm(a: np.ndarray) -> float:
    return _dot(a, a) ** 0.5
