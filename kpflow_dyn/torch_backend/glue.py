"""The glue's tangent and its transpose, in three forms: elementwise segments, dense blocks, or the traced function.

Each form has the same two methods. `t` is a time, or slice(None) for all times at once; arrays are [probe, trial, ...]
at one time and [probe, trial, time, ...] at all times. `forward` adds the tangent of sink number k to `out` (or writes
it, when `out` holds nothing yet); `adjoint` adds the cotangents that a sink's cotangent sends to z and to the kicks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from kpflow_dyn.pattern import Colouring, Segment, Stage
from kpflow_dyn.torch_backend.rows import jacobians, tangents

DENSE_BYTES = 2**28
Time = int | slice


class Glue(Protocol):
    """The linearised glue of all rows."""

    def forward(self, k: int, t: Time, dz: Tensor, da: Tensor, out: Tensor, fresh: bool) -> None: ...

    def adjoint(self, k: int, t: Time, cotangent: Tensor, z_bar: Tensor, a_bar: Tensor) -> None: ...


def make_glue(
    function: Callable, stages: list[Stage], colouring: Colouring | None, x: Tensor, z: Tensor, a: Tensor
) -> Glue:
    """The cheapest form that this glue has, at the points x, z, a [trial, time, ...]."""
    if colouring is not None:
        return SegmentGlue(function, stages, colouring, x, z, a)
    sinks, sources = sum(len(stage.ids) for stage in stages), z.shape[-1] + a.shape[-1]
    if sinks * sources * x.shape[0] * x.shape[1] * x.element_size() <= DENSE_BYTES:
        return DenseGlue(function, x, z, a)
    return ClosureGlue(function, x, z, a)


class SegmentGlue:
    """sink[i] += c[t, i] source[i], a short list of such runs; the coefficients come from one tangent per colour."""

    def __init__(
        self, function: Callable, stages: list[Stage], colouring: Colouring, x: Tensor, z: Tensor, a: Tensor
    ) -> None:
        self.stages = [stage.segments for stage in stages]
        self.first = [_first_writers(segments) for segments in self.stages]
        self.gaps = [_gaps(stage.segments, len(stage.ids)) for stage in stages]
        coefficients = _coefficients(function, colouring, x, z, a)
        self.at = {
            segment.coefficient: _by_time(coefficients[..., segment.coefficient :][..., : segment.length])
            for segments in self.stages
            for segment in segments
            if segment.coefficient is not None
        }

    def forward(self, k: int, t: Time, dz: Tensor, da: Tensor, out: Tensor, fresh: bool) -> None:
        for start, stop in self.gaps[k] if fresh else ():
            out[..., start:stop] = 0
        for segment, first in zip(self.stages[k], self.first[k], strict=True):
            source = _piece(dz if segment.from_state else da, segment.source, segment.length, segment.source_step)
            target = _piece(out, segment.sink, segment.length, segment.sink_step)
            _accumulate(target, source, self.coefficient(segment, t), segment.sink_step, fresh and first)

    def adjoint(self, k: int, t: Time, cotangent: Tensor, z_bar: Tensor, a_bar: Tensor) -> None:
        for segment in self.stages[k]:
            target = _piece(z_bar if segment.from_state else a_bar, segment.source, segment.length, segment.source_step)
            source = _piece(cotangent, segment.sink, segment.length, segment.sink_step)
            _accumulate(target, source, self.coefficient(segment, t), segment.source_step, False)

    def coefficient(self, segment: Segment, t: Time) -> Tensor | None:
        if segment.coefficient is None:
            return None
        steps, every = self.at[segment.coefficient]
        return steps[t] if isinstance(t, int) else every

    def whole(self, k: int) -> Segment | None:
        """The segment by which sink k is simply a range of z or of the kicks, if it is."""
        segments = self.stages[k]
        plain = len(segments) == 1 and segments[0].coefficient is None and segments[0].source_step == 1
        return segments[0] if plain else None


class DenseGlue:
    """Small Jacobian blocks [trial, time, sink, source]."""

    def __init__(self, function: Callable, x: Tensor, z: Tensor, a: Tensor) -> None:
        self.blocks = jacobians(function, x, z, a)

    def forward(self, k: int, t: Time, dz: Tensor, da: Tensor, out: Tensor, fresh: bool) -> None:
        in_z, in_a = (block[:, t] for block in self.blocks[k])
        image = torch.einsum("b...ij,pb...j->pb...i", in_z, dz) + torch.einsum("b...ij,pb...j->pb...i", in_a, da)
        out.copy_(image) if fresh else out.add_(image)

    def adjoint(self, k: int, t: Time, cotangent: Tensor, z_bar: Tensor, a_bar: Tensor) -> None:
        for block, target in zip(self.blocks[k], (z_bar, a_bar), strict=True):
            target.add_(torch.einsum("b...ij,pb...i->pb...j", block[:, t], cotangent))


class ClosureGlue:
    """The traced function itself, differentiated at each application."""

    def __init__(self, function: Callable, x: Tensor, z: Tensor, a: Tensor) -> None:
        self.function, self.points = function, (x, z, a)

    def forward(self, k: int, t: Time, dz: Tensor, da: Tensor, out: Tensor, fresh: bool) -> None:
        sink = self.sink(k, t)
        _, *at = (p[:, t] for p in self.points)
        image = vmap(lambda z, a: jvp(sink, tuple(at), (z, a))[1])(dz, da)
        out.copy_(image) if fresh else out.add_(image)

    def adjoint(self, k: int, t: Time, cotangent: Tensor, z_bar: Tensor, a_bar: Tensor) -> None:
        _, *at = (p[:, t] for p in self.points)
        _, pull = vjp(self.sink(k, t), *at)
        for target, image in zip((z_bar, a_bar), vmap(pull)(cotangent), strict=True):
            target.add_(image)

    def sink(self, k: int, t: Time) -> Callable[[Tensor, Tensor], Tensor]:
        row = vmap(self.function) if isinstance(t, int) else vmap(vmap(self.function))
        x = self.points[0][:, t]
        return lambda z, a: row(x, z, a)[k]


def _coefficients(function: Callable, colouring: Colouring, x: Tensor, z: Tensor, a: Tensor) -> Tensor:
    """Every segment's coefficients [trial, time, all]."""
    found = x.new_empty(*x.shape[:2], len(colouring.sinks))
    colours = torch.from_numpy(colouring.colours).to(x.device)
    for colour in range(colouring.count):
        direction = (colours == colour).to(z.dtype)
        sinks = tangents(function, x, z, a, direction[: z.shape[-1]], direction[z.shape[-1] :])
        here = torch.from_numpy((colouring.hues == colour).nonzero()[0]).to(x.device)
        found[..., here] = sinks[..., torch.from_numpy(colouring.sinks).to(x.device)[here]]
    return found


def _by_time(coefficients: Tensor) -> tuple[list[Tensor], Tensor]:
    """The coefficients of each time [trial, length], contiguous, and the same of all times [trial, time, length]."""
    by_time = coefficients.transpose(0, 1).contiguous()
    return list(by_time.unbind(0)), by_time.transpose(0, 1)


def _piece(values: Tensor, start: int, length: int, step: int) -> Tensor:
    return values.narrow(-1, start, length if step else 1)


def _accumulate(target: Tensor, source: Tensor, coefficient: Tensor | None, target_step: int, new: bool) -> None:
    """target += coefficient * source, summed where the target is one element; `new` overwrites."""
    if target_step == 0:
        total = (source if coefficient is None else coefficient * source).sum(-1, keepdim=True)
        target.copy_(total) if new else target.add_(total)
    elif coefficient is None:
        target.copy_(source) if new else target.add_(source)
    elif new:
        torch.mul(source, coefficient, out=target)
    else:
        target.addcmul_(source, coefficient)


def _range(segment: Segment) -> tuple[int, int]:
    return segment.sink, segment.sink + (segment.length if segment.sink_step else 1)


def _first_writers(segments: list[Segment]) -> list[bool]:
    """Which segments meet none of those before them, so that they may overwrite what stands in the sink."""
    ranges = [_range(segment) for segment in segments]
    return [all(stop <= a or b <= start for a, b in ranges[:i]) for i, (start, stop) in enumerate(ranges)]


def _gaps(segments: list[Segment], size: int) -> list[tuple[int, int]]:
    """The ranges of the sink that no first writer covers."""
    gaps, end = [], 0
    writers = [segment for segment, first in zip(segments, _first_writers(segments), strict=True) if first]
    for start, stop in sorted(map(_range, writers)):
        if start > end:
            gaps.append((end, start))
        end = max(end, stop)
    return gaps + ([(end, size)] if end < size else [])
