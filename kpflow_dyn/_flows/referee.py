"""Autograd through the user's own model, the referee of every linearisation.

J* q for one random q over the whole state is one reverse pass through the model as its user calls it. A linearisation
that is wrong in any entry that q meets differs from it with probability one, and <q, J theta> = <J* q, theta> for a
random theta then fixes J.
"""

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, eps_of, to_numpy
from kpflow_dyn._problems.checks import check_finite

PACKAGE = str(Path(__file__).parent.parent)
ROUNDING = 1e4  # of a gradient, in units of the dtype's round-off
FLOOR = 1e3  # the same of the largest gradient: small ones may be differences of large terms


class Derivative(Protocol):
    """The derivative of states in the parameters and in an argument like the states, on blocks of probes.

    value   the states [...].
    push    changes of the parameters [probe, p] and of the argument [probe, ...], None for none -> of the states.
    pull    the transpose.
    """

    @property
    def value(self) -> Array: ...
    def push(self, theta: Array | None, argument: Array | None) -> Array: ...
    def pull(self, q: Array) -> tuple[Array, Array]: ...


class Mismatch(ValueError):
    """A linearisation that differs from autograd through the model; the message says where and by how much."""


@dataclass(frozen=True)
class Answer:
    """What autograd through the model says of one random q: its value, and its gradients [1, p] and [1, ...]."""

    value: Array
    q: Array
    theta: Array
    argument: Array


def ask(own: Derivative) -> Answer:
    """The model's own answer; a ValueError where it has no derivative."""
    q = Random(1).normal((1, *own.value.shape), like=own.value)
    answer = Answer(own.value, q, *own.pull(q))
    if answer.argument.ndim > 3:
        check_finite(answer.argument[0], "the derivative of the step")
    for gradient in (answer.theta, answer.argument):
        if not bool(array_namespace(gradient).isfinite(gradient).all()):
            raise ValueError("the derivative of the model holds NaN or inf; look at its weights, or for a sqrt(0)")
    return answer


def compare(found: Derivative, answer: Answer, sizes: dict[str, int]) -> None:
    """Raise a `Mismatch` unless a linearisation is that of autograd; sizes are those of the parameters by name.

    It is asked for the same q, and for one random direction.
    """
    _compare_values(found.value, answer.value)
    given, random = found.pull(answer.q), Random(2)
    compare_gradients(given[0][0], answer.theta[0], sizes)
    _compare_rows(given[1][0], answer.argument[0])
    theta, dz = (random.normal(a.shape, like=a) for a in given)
    check_transpose(found, answer.q, theta, dz, given)


def check_transpose(found: Derivative, q: Array, theta: Array, dz: Array, pulled: tuple[Array, Array]) -> None:
    """Raise a `Mismatch` unless <q, push(theta, dz)> is <pull(q), (theta, dz)>."""
    terms = [_dot(q, found.push(theta, dz)), -_dot(pulled[0], theta), -_dot(pulled[1], dz)]
    size = sum(abs(term) for term in terms) + _norm(q) * _norm(dz)
    if not abs(sum(terms)) <= ROUNDING * eps_of(q) * size:
        raise Mismatch(
            f"its forward mode is not the transpose of its reverse mode: <q, J theta> and <J* q, theta> differ by "
            f"{abs(sum(terms)) / size:.1e} of their size"
        )


def in_words(reason: Exception, causes: list[str]) -> str:
    """Why there is no trace, or none that agrees; causes are what of the model a trace may not see."""
    text = (str(reason).strip() or type(reason).__name__).rstrip(".")
    if not isinstance(reason, Mismatch):
        return text if _is_ours(reason) else f"its trace could not be analysed ({type(reason).__name__}: {text})"
    seen = f"; the likely cause: {', '.join(causes)}" if causes else ""
    return f"the trace is not the model: {text}{seen}"


def _is_ours(reason: Exception) -> bool:
    """Whether an error was raised in words, rather than by an operation that did not expect what it got."""
    frames = traceback.extract_tb(reason.__traceback__)
    return isinstance(reason, ValueError | TypeError) and frames[-1].filename.startswith(PACKAGE)


def _compare_values(found: Array, expected: Array) -> None:
    error, size = _largest(found - expected), max(1.0, _largest(expected))
    if not error <= ROUNDING * eps_of(expected) * size:
        raise Mismatch(f"its values differ from the model's own by {error / size:.1e} of their size")


def compare_gradients(found: Array, expected: Array, sizes: dict[str, int]) -> None:
    """Raise a `Mismatch` unless gradients [p] are alike, parameter by parameter."""
    start, wrong, floor = 0, {}, FLOOR * eps_of(expected) * _largest(expected)
    for name, size in sizes.items():
        part, own = (gradient[start : start + size] for gradient in (found, expected))
        error, largest, start = _largest(part - own), _largest(own), start + size
        if not error <= ROUNDING * eps_of(expected) * largest + floor:
            wrong[name] = error / max(largest or _largest(part), 1e-300)
    if wrong:
        worst = max(wrong, key=lambda name: wrong[name])
        others = f" (also in {', '.join(name for name in wrong if name != worst)})" if len(wrong) > 1 else ""
        raise Mismatch(
            f"its gradient in {worst} is off by {wrong[worst]:.1e} of that of autograd through the model{others}"
        )


def _compare_rows(found: Array, expected: Array) -> None:
    """Gradients in the argument [trial, (time,) ...], row by row."""
    xp, last = array_namespace(expected), tuple(range(min(2, expected.ndim - 1), expected.ndim))
    error, size = (to_numpy(xp.max(abs(values), axis=last)) for values in (found - expected, expected))
    allowed = eps_of(expected) * (ROUNDING * size + FLOOR * size.max())
    if (wrong := ~(error <= allowed)).any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        where = ", ".join(f"{axis} {n}" for axis, n in zip(("trial", "step"), at, strict=False)) or "all of it"
        relative = float(error[at]) / max(float(size[at]), 1e-300)
        raise Mismatch(
            f"its gradient in the state is off by {relative:.1e} of that of autograd "
            f"through the model ({where}, and in {wrong.mean():.0%} of all)"
        )


def _largest(values: Array) -> float:
    return float(abs(values).max()) if values.shape[0] else 0.0


def _dot(a: Array, b: Array) -> float:
    return float((a * b).sum())


def _norm(a: Array) -> float:
    return _dot(a, a) ** 0.5
