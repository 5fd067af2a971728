"""Metrics of preconditioned optimisers, theta' = -M^{-1} g: learning rates, Kronecker factors, reparametrisations.

Each gives an R with M^{-1} = R R*, one block for each parameter, so that the kernel of what the optimiser does is

    ntk = J M^{-1} J* = (J R)(J R)*
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from scipy.linalg import solve_triangular

from kpflow_dyn._arrays import Array, like_numpy, to_numpy
from kpflow_dyn._arrays.complex_numbers import count, in_pairs, is_complex
from kpflow_dyn._backend import backend_for, backend_of
from kpflow_dyn._flows.preconditioner import Block, elementwise, identity
from kpflow_dyn._shown import Shown, type_name

Parameters = Mapping[str, Array]


@runtime_checkable
class Metric(Protocol):
    """A metric of the parameters, theta' = -M^{-1} g: anything that has this method."""

    def preconditioner(self, parameters: Parameters) -> list[Block]:
        """The blocks of R, with M^{-1} = R R*, one for each of these parameters in their order."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class LearningRates(Shown):
    """theta' = -rate g, with a rate for each parameter, or for each entry of it: M^{-1} = diag(rate).

    Rates of one number per parameter scale the columns of V in the core, whose spectrum they keep known.

    Args:
        rates: one positive number for all; or by name a number or an array of the parameter's shape (of a complex one
            also [..., 2], for real and imaginary parts). Names of parameters that do not learn are passed over.

    Raises:
        ValueError: a rate that is not positive and finite; and in `linearize` a parameter that learns without a rate,
            or a rate of another shape.
    Source: docs/theory.md, "Learning rules and optimisers".

    >>> import torch, kpflow_dyn as kp
    >>> cell = torch.nn.RNNCell(3, 8)
    >>> solution = kp.solve(kp.DiscreteProblem(cell, torch.randn(2, 5, 3)))
    >>> metric = kp.LearningRates.from_optimizer(torch.optim.SGD(cell.parameters(), lr=0.1), cell)
    >>> slow, plain = kp.linearize(solution, metric=metric), kp.linearize(solution)
    >>> round(kp.trace(slow.ntk).value / kp.trace(plain.ntk).value, 4)
    0.1
    """

    rates: Any

    def __post_init__(self) -> None:
        for name, rate in self._named().items():
            values = to_numpy(rate)
            if values.dtype.kind not in "iuf" or not (np.isfinite(values).all() and (values > 0).all()):
                raise ValueError(f"the learning rate{name and f' of {name}'} is {rate!r}, expected positive numbers")

    @classmethod
    def from_optimizer(cls, optimizer: Any, module: Any) -> LearningRates:
        """The rates of a torch optimiser, with second moments frozen as they are: lr / (sqrt(v_hat) + eps).

        Momentum, weight decay and the change of the second moment are left out.

        Args:
            optimizer: SGD, Adam, AdamW, Adagrad or RMSprop; all but SGD after their first step.
            module: whose parameters it trains.

        Raises:
            TypeError: another optimiser.
            ValueError: parameters that have not been stepped yet, or maximize=True.
        """
        if (backend := backend_of(module)) is None:
            raise TypeError(f"module is {type_name(module)}, expected the torch module that the optimiser trains")
        return cls(backend.training.learning_rates(optimizer, module))

    @classmethod
    def from_second_moment(cls, second_moment: Parameters, rate: float, eps: float = 1e-8) -> LearningRates:
        """rate / (sqrt(v_hat) + eps), as of Adam, from its second moment, such as that of an optax state.

        It is given by name, v_hat >= 0 in the parameter's shape; with a correction of bias nu / (1 - b2**count).
        """
        return cls({name: rate / (np.sqrt(to_numpy(v)) + eps) for name, v in second_moment.items()})

    def preconditioner(self, parameters: Parameters) -> list[Block]:
        """sqrt(rate) of each parameter."""
        known = self._named()
        missing = [] if "" in known else [name for name in parameters if name not in known]
        if missing:
            raise ValueError(f"no learning rate for {', '.join(missing)}; give one, or leave them out by params=")
        return [_scaling(name, known.get(name, known.get("")), value) for name, value in parameters.items()]

    def _named(self) -> dict[str, Any]:
        """Rates by name; that of all parameters has none."""
        return dict(self.rates) if isinstance(self.rates, Mapping) else {"": self.rates}


@dataclass(frozen=True, eq=False, repr=False)
class KroneckerMetric(Shown):
    """M = left (x) right on weights [m, d], as of Shampoo and K-FAC: theta' = -left^{-1} G right^{-1}.

    The core of such a weight is V right^{-1} V^T (x) left^{-1}. Parameters without factors move by their gradient.

    Args:
        factors: by name (left [m, m], right [d, d]), symmetric and positive definite; d counts all axes but the first.
            Those of Shampoo are the fourth roots of its sums G G^T and G^T G.

    Raises:
        ValueError: factors that are not symmetric and positive definite; and in `linearize` unknown names or factors
            of other sizes than the weight's.
    Source: Gupta, Koren, Singer, "Shampoo", arXiv:1802.09568; Martens, Grosse, "K-FAC", arXiv:1503.05671.

    >>> import numpy as np, torch, kpflow_dyn as kp
    >>> solution = kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 8, bias=False), torch.randn(2, 5, 3)))
    >>> metric = kp.KroneckerMetric({"weight_hh": (2 * np.eye(8), np.eye(8))})
    >>> halved, plain = (kp.linearize(solution, params="weight_hh", metric=m) for m in (metric, None))
    >>> round(kp.trace(halved.ntk).value / kp.trace(plain.ntk).value, 4)
    0.5
    """

    factors: Mapping[str, tuple[Array, Array]]

    def __post_init__(self) -> None:
        for name, pair in self.factors.items():
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ValueError(f"the factors of {name} are {pair!r}, expected a pair (left, right)")
            for side, factor in zip(("left", "right"), pair, strict=True):
                _inverse_cholesky(factor, f"the {side} factor of {name}")

    def preconditioner(self, parameters: Parameters) -> list[Block]:
        """X -> L^{-T} X C^{-1}, for left = L L^T and right = C C^T."""
        return _blocks(self.factors, parameters, "Kronecker factors", _kronecker)


@dataclass(frozen=True, eq=False, repr=False)
class Reparametrization(Shown):
    """Parameters theta = g(phi) whose phi moves by its gradient: M^{-1} = Dg Dg^T at the current phi.

    Parameters without a map move by their own gradient.

    Args:
        maps: by name (g, phi), where g is a function of one array in the framework of the model with g(phi) = theta.

    Raises:
        ValueError: in `linearize`, unknown names, or a g(phi) that is not the parameter.
    Source: docs/theory.md, "Learning rules and optimisers".

    >>> import torch, kpflow_dyn as kp
    >>> cell = torch.nn.RNNCell(3, 8)
    >>> solution = kp.solve(kp.DiscreteProblem(cell, torch.randn(2, 5, 3)))
    >>> metric = kp.Reparametrization({"bias_hh": (lambda phi: phi / 2, 2 * cell.bias_hh.detach())})
    >>> halves, plain = (kp.linearize(solution, params="bias_hh", metric=m) for m in (metric, None))
    >>> round(kp.trace(halves.ntk).value / kp.trace(plain.ntk).value, 4)
    0.25
    """

    maps: Mapping[str, tuple[Callable[[Array], Array], Array]]

    def preconditioner(self, parameters: Parameters) -> list[Block]:
        """Dg of each parameter."""
        return _blocks(self.maps, parameters, "maps", _derivative)


def _blocks(given: Mapping[str, Any], parameters: Parameters, what: str, block: Callable[..., Block]) -> list[Block]:
    """The block of each parameter: identity where nothing is given."""
    if unknown := [name for name in given if name not in parameters]:
        raise ValueError(f"{what} of unknown parameters {unknown}; those that learn are {[*parameters]}")
    return [
        block(name, *given[name], value) if name in given else identity(count(value))
        for name, value in parameters.items()
    ]


def _scaling(name: str, rate: Any, value: Array) -> Block:
    rate, pairs = np.asarray(to_numpy(rate), np.float64), in_pairs(value)
    if rate.shape == tuple(value.shape) and is_complex(value):  # one for both parts of a number
        rate = rate[..., None]
    elif rate.ndim and rate.shape != tuple(pairs.shape):
        raise ValueError(f"the learning rate of {name} has shape {rate.shape}, expected a number or {(*value.shape,)}")
    return elementwise(np.sqrt(np.broadcast_to(rate, tuple(pairs.shape))), pairs)


def _kronecker(name: str, left: Array, right: Array, value: Array) -> Block:
    _check_real(name, value, "Kronecker factors")
    left, right = _inverse_cholesky(left, name), _inverse_cholesky(right, name)
    rows, columns = value.shape[0] if value.ndim else 1, math.prod(value.shape[1:])
    if (len(left), len(right)) != (rows, columns):
        sizes = f"{len(left)} and {len(right)}, expected {rows} and {columns} for {(*value.shape,)}"
        raise ValueError(f"the factors of {name} have sizes {sizes}")
    left, right = like_numpy(left, value), like_numpy(right, value)

    def between(a: Array, b: Array) -> Callable[[Array], Array]:
        return lambda q: (a @ q.reshape((-1, rows, columns)) @ b).reshape((-1, rows * columns))

    nowhere = np.full(rows * columns, np.nan)
    return Block(rows * columns, between(left.T, right), between(left, right.T), nowhere)


def _check_real(name: str, value: Array, what: str) -> None:
    if is_complex(value):
        raise ValueError(f"{name} is {value.dtype}, which takes no {what}; keep its parts as two real parameters")


def _inverse_cholesky(factor: Array, what: str) -> np.ndarray:
    """L^{-1} of a factor L L^T, in float64."""
    matrix = np.asarray(to_numpy(factor), np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{what} has shape {matrix.shape}, expected a square matrix")
    symmetric = np.isfinite(matrix).all() and np.abs(matrix - matrix.T).max() <= 1e-5 * np.abs(matrix).max()
    try:
        lower = np.linalg.cholesky((matrix + matrix.T) / 2) if symmetric else None
    except np.linalg.LinAlgError:
        lower = None
    if lower is None:
        raise ValueError(
            f"{what} is not symmetric and positive definite; add damping, such as 1e-6 of its largest entry"
        )
    return solve_triangular(lower, np.eye(len(lower)), lower=True)


def _derivative(name: str, g: Callable[[Array], Array], phi: Array, value: Array) -> Block:
    _check_real(name, value, "map")
    of, found = backend_for(value, "the parameter", "").transforms, g(phi)
    if tuple(found.shape) != tuple(value.shape) or not np.allclose(to_numpy(found), to_numpy(value), rtol=1e-4):
        raise ValueError(f"g(phi) is not the parameter {name} {(*value.shape,)}; give the phi that it comes from now")
    size, pull = math.prod(phi.shape), of.vjp(g, phi)[1]

    def push(change: Array) -> Array:
        return of.jvp(g, (phi,), (change.reshape(phi.shape),))[1].reshape(-1)

    def back(gradient: Array) -> Array:
        return pull(gradient.reshape(value.shape))[0].reshape(-1)

    return Block(size, of.vmap(push), of.vmap(back), np.full(math.prod(value.shape), np.nan))
