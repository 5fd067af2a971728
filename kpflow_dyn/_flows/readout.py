"""The kernel of a readout y = C s of a flow's states, with the readout's own weights as a site or without."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, device, like_numpy, to_numpy
from kpflow_dyn._backend import Backend
from kpflow_dyn._problems.problems import Problem
from kpflow_dyn._problems.units import units_read
from kpflow_dyn._shown import Row, Shown, axes_sizes, plain, sizes, some
from kpflow_dyn._spaces.operators import GramOperator, Operator, on_spaces
from kpflow_dyn._spaces.space import Space

LAYER = ("weight", "bias")


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Readout(Shown):
    """The operators of a readout of states that move by some ntk; see `Output`."""

    values: Array
    C: Operator
    J: Operator
    ntk: GramOperator
    parts: dict[str, int]
    weight: Array = field(repr=False)
    bias: Array | None = field(repr=False)
    rate: float = 0.0

    def _shown(self) -> tuple[str, list[Row]]:
        space = self.ntk.domain
        rows: list[Row] = [("ntk", f"{axes_sizes(space.axes, space.shape)} {plain(space.dtype)}")]
        rows += [("values", sizes(space.axes, self.values))]
        rows += [("parameters", f"{self.J.domain.size}: {some(list(self.parts))}")]
        return type(self).__name__, [*rows, ("readout", "learns" if self.rate else "does not learn")]

    @property
    def learnt(self) -> tuple[str, ...]:
        """Which of weight and bias learn."""
        return tuple(name for name in LAYER if f"readout.{name}" in self.parts)


def readout(
    ntk: GramOperator, problem: Problem, state: Array, parts: dict[str, int], C: Any, learn: bool | float
) -> Readout:
    """A readout of states of a problem that move by this ntk; see `Flow.output`."""
    space = ntk.domain
    (weight, units), bias = _matrix(C, problem.model, space), getattr(C, "bias", None)
    if not isinstance(learn, int | float | np.number | np.bool_) or not 0 <= learn < math.inf:
        raise ValueError(f"learn is {learn!r}, expected True, False or a learning rate")
    axes, shape = (*space.axes[:-1], "out"), (*space.shape[:-1], weight.shape[0])
    out = Space(axes, shape, space.like, space.measure, space.mask, times=space.times)
    of_state = _beside_zeros(weight, units, space)
    read = on_spaces(space, out, lambda s: s @ of_state.T, lambda y: y @ of_state)
    J, apart = read @ ntk.factor, None if ntk.apart is None else read @ ntk.apart
    if learnt := _learnt(C, problem.backend) if learn else ():
        V = _variables(state, units, space, learnt) * float(learn) ** 0.5
        J = _beside(J, _site(V, out, ()))
        apart = None if apart is None else _beside(apart, _site(V, out, out.shape[:1]))
        sizes = {"weight": weight.shape[0] * weight.shape[1], "bias": weight.shape[0]}
        parts = parts | {f"readout.{name}": sizes[name] for name in learnt}
    bias = None if bias is None else like_numpy(np.array(to_numpy(bias)), space.like)
    values = state @ of_state.T + (0 if bias is None else bias)
    moved, rate = GramOperator(J, None, apart), float(learn) if learnt else 0.0
    return Readout(values=values, C=read, J=J, ntk=moved, parts=parts, weight=weight, bias=bias, rate=rate)


def _learnt(C: Any, backend: Backend) -> tuple[str, ...]:
    """Which of its weight and bias learn: a matrix, and of a layer what is not frozen."""
    if isinstance(C, Readout):
        return C.learnt
    layer = {name: value for name in LAYER if (value := getattr(C, name, None)) is not None}
    return tuple(name for name, value in layer.items() if backend.models.learns(value)) if layer else ("weight",)


def _matrix(C: Any, model: Any, space: Space) -> tuple[Array, slice]:
    """A copy of C [out, unit] like the states, and which units of them it reads."""
    if space.axes[0] != "trial" or space.axes[-1] != "unit":
        raise ValueError(f"a readout takes states [trial, ..., unit], and these are {space}")
    weight = np.array(to_numpy(getattr(C, "weight", C)))
    expected = f"C has shape {weight.shape}, expected [out, unit] with unit = {space.shape[-1]}, or a Linear"
    if weight.ndim != 2:
        raise ValueError(expected)
    if weight.dtype.kind not in "iuf" or not np.isfinite(weight).all():
        raise ValueError("C holds other things than finite numbers")
    try:
        units = units_read(model, weight, space.shape[-1])
    except ValueError as error:
        raise ValueError(f"{expected}: {error}") from error
    return like_numpy(weight, space.like), units


def _beside_zeros(weight: Array, units: slice, space: Space) -> Array:
    """C of the whole state [out, unit]."""
    xp, (out, _width) = array_namespace(weight), weight.shape
    before, after = (
        xp.zeros((out, n), dtype=weight.dtype, device=device(weight))
        for n in (units.start, space.shape[-1] - units.stop)
    )
    return xp.concat([before, weight, after], axis=1)


def _variables(state: Array, units: slice, space: Space, learnt: tuple[str, ...]) -> Array:
    """What the readout's parameters multiply: [s], [s, 1] or [1] at each trial and time that counts."""
    if tuple(state.shape) != space.shape:
        raise ValueError(
            f"the flow's states {space.shape} are not those of the solution {(*state.shape,)}; take .output of the "
            "flow itself, not of flow.nodal"
        )
    xp = array_namespace(state)
    of = {"weight": state[..., units], "bias": xp.ones_like(state[..., :1])}
    return space.counted(xp.concat([of[name] for name in learnt], axis=-1))


def _site(V: Array, out: Space, trials: tuple[int, ...]) -> Operator:
    """[dW, dc] v: changes of the weights, where `trials` is not empty of each trial's own, -> output.

    Changes are [..., column, out], so that those of W and of the bias lie one after another.
    """
    xp, width = array_namespace(V), out.shape[-1]
    V = V.reshape((V.shape[0], -1, V.shape[-1]))  # [trial, row, column]
    domain = Space(("trial", "parameter")[1 - len(trials) :], (*trials, V.shape[-1] * width), out.like)

    def forward(theta: Array) -> Array:
        change = theta.reshape((len(theta), *trials, V.shape[-1], width))
        return xp.matmul(V, change if trials else change[:, None]).reshape((len(theta), *out.shape))

    def transpose(y: Array) -> Array:
        found = xp.matmul(xp.permute_dims(V, (0, 2, 1)), y.reshape((len(y), *V.shape[:2], width)))
        return (found if trials else xp.sum(found, axis=1)).reshape((len(y), *domain.shape))

    return on_spaces(domain, out, forward, transpose)


def _beside(left: Operator, right: Operator) -> Operator:
    """[A, B]: changes of the flow's parameters and then of the readout's."""
    size, (*trials, more) = left.domain.shape[-1], right.domain.shape
    domain = Space(left.domain.axes, (*trials, size + more), left.domain.like)
    return Operator(
        domain,
        left.codomain,
        lambda theta: left.mv(theta[..., :size]) + right.mv(theta[..., size:]),
        lambda y: domain.xp.concat([left.T.mv(y), right.T.mv(y)], axis=-1),
    )
