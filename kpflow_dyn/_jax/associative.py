"""`jax.lax.associative_scan` in a jaxpr, found again as one operation.

JAX writes it out in Python, as 2 log2(T) calls of the function that combines two elements, between slices and pads.
Only the lines of source that the equations come from tell of it. On a CPU a loop over time is faster than these, and is
compiled ten times sooner; elsewhere they stay, and with them their depth of O(log T).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from kpflow_dyn._jax.custom import sample
from kpflow_dyn._jax.equations import Equation, Jaxpr, bind
from kpflow_dyn._jax.transforms import once

Variables = Sequence[Any]


class _Place(NamedTuple):
    """How often these functions of JAX's are among those that an equation was written in."""

    scan: int  # how deep the recursion is, in which each level has half of the elements
    combine: int
    interleave: int


@dataclass(frozen=True)
class Step:
    """The equations that combine two elements of length 1, `before` and `here`, to `after`; each has several parts."""

    equations: Sequence[Equation]
    before: Variables
    here: Variables
    after: Variables
    constants: Variables  # what the equations take besides

    def __call__(self, constants: Sequence[Any], before: Sequence[Any], here: Sequence[Any]) -> list[Any]:
        given = [*self.constants, *self.before, *self.here]
        return evaluated(self.equations, given, [*constants, *before, *here], self.after)

    def is_associative(self) -> bool:
        """Whether it is, tried at a random point."""
        generator = np.random.default_rng(0)
        constants, *elements = (
            [sample(variable, generator) for variable in variables]
            for variables in (self.constants, self.here, self.here, self.here)
        )

        def both(constants: list[Any], a: list[Any], b: list[Any], c: list[Any]) -> tuple[list[Any], list[Any]]:
            return self(constants, self(constants, a, b), c), self(constants, a, self(constants, b, c))

        pairs = zip(*once(both)(constants, *elements), strict=True)
        return all(jnp.allclose(left, right, 1e-4, 1e-4, equal_nan=True) for left, right in pairs)

    def behind(self, parts: Sequence[int]) -> Sequence[int]:
        """These parts and those before that they depend on, after any number of steps."""
        needed = {self.after[part] for part in parts}
        for equation in reversed(self.equations):
            if needed.intersection(equation.outvars):
                needed.update(_reads([equation]))
        found = [part for part, var in enumerate(self.before) if part in parts or var in needed]
        return found if len(found) == len(parts) else self.behind(found)


_Placed = tuple[Equation, _Place]


@dataclass(frozen=True)
class AssociativeScan:
    """One of them, an operation from `invars`, the constants of a step and the elements, to `outvars`.

    Attributes:
        equations: what it is written out to.
        step: how it combines two elements.
        elements: what it combines, each part along one of the axes.
        results: one for each part; outvars are those that are used.
    """

    equations: Sequence[Equation]
    step: Step
    elements: Variables
    axes: Sequence[int]
    results: Variables
    outvars: Variables

    @property
    def invars(self) -> Variables:
        """What it takes."""
        return [*self.step.constants, *self.elements]

    def __call__(self, *args: Any) -> Any:
        """Its results: a list, or the only one."""
        if jax.default_backend() == "cpu":
            found = self._in_order(*args)
        else:
            found = evaluated(self.equations, self.invars, args, self.outvars)
        return found if len(found) > 1 else found[0]

    def _in_order(self, *args: Any) -> list[Any]:
        """One element after another; of these before only the parts that matter for the results."""
        count, used = len(self.step.constants), [self.results.index(var) for var in self.outvars]
        constants, elements = args[:count], zip(args[count:], self.axes, strict=True)
        rows = [jnp.expand_dims(jnp.moveaxis(element, axis, 0), 1 + axis) for element, axis in elements]
        parts = self.step.behind(used)

        def step(before: dict[int, Any], here: list[Any]) -> tuple[dict[int, Any], list[Any]]:
            after = self.step(constants, [before.get(part, other) for part, other in enumerate(here)], here)
            return {part: after[part] for part in parts}, [after[part] for part in used]

        _, later = lax.scan(step, {part: rows[part][0] for part in parts}, [row[1:] for row in rows])
        return [self._joined(part, rows[part][:1], after) for part, after in zip(used, later, strict=True)]

    def _joined(self, part: int, first: jax.Array, later: jax.Array) -> jax.Array:
        """A result from its rows [time, ...]."""
        axis = self.axes[part]
        return jnp.moveaxis(jnp.concatenate([first, later]).squeeze(1 + axis), 0, axis)


def grouped(jaxpr: Jaxpr) -> Iterator[Equation | AssociativeScan]:
    """The equations of an open jaxpr in their order, those of an associative scan as one."""
    if not any(equation.primitive.name == "pad" for equation in jaxpr.eqns):
        yield from jaxpr.eqns
        return
    run: list[_Placed] = []
    for equation in jaxpr.eqns:
        place = _place(equation)
        if run and (not place.scan or (_is_last(run[-1][1]) and not place.interleave)):
            yield from _scan_or_equations(run, jaxpr)
            run = []
        if place.scan:
            run.append((equation, place))
        else:
            yield equation
    yield from _scan_or_equations(run, jaxpr)


def evaluated(equations: Sequence[Equation], given: Variables, args: Sequence[Any], wanted: Variables) -> list[Any]:
    """The values of some variables of equations, from those of others."""
    env = dict(zip(given, args, strict=True))
    for equation in equations:
        values = [var.val if isinstance(var, Literal) else env[var] for var in equation.invars]
        out = bind(equation, range(len(equation.outvars)), *values)
        env.update(zip(equation.outvars, out if isinstance(out, list | tuple) else [out], strict=True))
    return [env[var] for var in wanted]


def _place(equation: Equation) -> _Place:
    frames = getattr(equation.source_info.traceback, "frames", ())
    names = [frame.function_name for frame in frames if frame.file_name.endswith("loops.py")]
    scan = "associative_scan.<locals>."
    return _Place(*map(names.count, (f"{scan}_scan", f"{scan}combine", "_interleave")))


def _is_last(place: _Place) -> bool:
    """Whether a scan ends here, but for others like it: its outermost level is put together."""
    return place.scan == 1 and bool(place.interleave)


def _scan_or_equations(run: list[_Placed], jaxpr: Jaxpr) -> Sequence[Equation | AssociativeScan]:
    found = _found(run, jaxpr) if run else None
    return [equation for equation, _ in run] if found is None else [found]


def _found(run: list[_Placed], jaxpr: Jaxpr) -> AssociativeScan | None:
    """The scan that was written out to these equations; None where they are not what JAX writes."""
    innermost = max(place.scan for _, place in run)
    step = _step([(equation, place) for equation, place in run if place.scan == innermost])
    equations = [equation for equation, _ in run]
    elements = [equation.invars[0] for equation in _first_slices(equations)]
    results = [e.outvars[0] for e in _interleaved([e for e, place in run if _is_last(place)])[2::3]]
    if step is None or not len(elements) == 2 * len(step.here) == 2 * len(results):
        return None
    elements, inside = elements[: len(results)], {var for e in equations for var in e.outvars}
    alike = all(map(_alike, [*elements, *step.here], [*results, *step.after]))
    if not alike or inside.intersection(step.constants) or not step.is_associative():
        return None
    axes = [_axis(*pair) for pair in zip(elements, step.here, strict=True)]
    outside = _reads([e for e in jaxpr.eqns if not inside.intersection(e.outvars)])
    used = {*outside, *(var for var in jaxpr.outvars if not isinstance(var, Literal))}
    if inside.intersection(used).difference(results):  # a reverse mode through the scan takes what is on the way
        return None
    return AssociativeScan(equations, step, elements, axes, results, [var for var in results if var in used])


def _step(innermost: list[_Placed]) -> Step | None:
    """How two elements of length 1 are combined, by the equations of the level that has two or three of them."""
    slices = _first_slices([equation for equation, _ in innermost])
    combining = takewhile(lambda placed: placed[1].combine, innermost[len(slices) :])
    equations = [equation for equation, _ in combining]
    given, half = [equation.outvars[0] for equation in slices], len(slices) // 2
    after = [e.invars[0] for e in _interleaved([e for e, place in innermost if place.interleave])[1::3]]
    known = {*given, *(var for equation in equations for var in equation.outvars)}
    if len(after) != half or not known.issuperset(after):
        return None
    constants = [var for var in dict.fromkeys(_reads(equations)) if var not in known]
    return Step(equations, given[:half], given[half:], after, constants)


def _first_slices(equations: Sequence[Equation]) -> list[Equation]:
    """Those of even and then those of odd elements."""
    return list(takewhile(lambda equation: equation.primitive.name == "slice", equations))


def _interleaved(equations: Sequence[Equation]) -> Sequence[Equation]:
    """A pad of even and a pad of odd elements and their sum, for each element; none where they are anything else."""
    pads = [equation.primitive.name == "pad" for equation in equations]
    return equations if pads == [True, True, False] * (len(pads) // 3) else []


def _reads(equations: Sequence[Equation]) -> list[Any]:
    """The variables that equations take."""
    return [var for equation in equations for var in equation.invars if not isinstance(var, Literal)]


def _alike(a: Any, b: Any) -> bool:
    return (a.aval.shape, a.aval.dtype) == (b.aval.shape, b.aval.dtype)


def _axis(element: Any, one: Any) -> int:
    """The axis along which only one is left."""
    pairs = enumerate(zip(element.aval.shape, one.aval.shape, strict=True))
    return next(axis for axis, (many, left) in pairs if many != left)
