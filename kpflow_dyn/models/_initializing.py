"""Recurrent weights of a model, drawn from a law."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array
from kpflow_dyn._problems.choice import choose
from kpflow_dyn._problems.parameters import changed, listing, parameters_of
from kpflow_dyn.models._laws import Seed

_TORCH_NAME = re.compile(r"weight_hh(_l\d+(_reverse)?)?")


def initialize(model: Any, law: Any, seed: Seed = 0, which: str | Sequence[str] = "recurrent") -> Any:
    """Draw the recurrent weights of a model from a law; all others stay.

    Of an RNN that is W_hh [n, n]; of a GRU or LSTM each gate's block [n, n] of W_hh, one after another; of nn.RNN,
    nn.GRU and nn.LSTM those of each layer and direction; of a CTRNNCell or CTRNNField W. A low-rank W = m n^T / units
    becomes the nearest one of its rank to a draw (the truncated singular value decomposition, its values shared between
    m and n), whose spectral radius is not the law's. Where there is one block, it is `law.matrix(n, seed)`.

    Args:
        model: a torch module, which is changed in place and returned, or a JAX pytree, of which a new one is made, with
            such weights anywhere inside of it.
        law: one of `Gaussian`, `Orthogonal`, `SpectralRadius`, `TorchDefault`, `Dale`, `Planted`, another `Law`, or
            what has its `matrix(n, seed)`.
        seed: the same int gives the same weights, in both frameworks, rounded to the model's dtype.
        which: "recurrent", or the names of other weights [rows, n], whose blocks [n, n] are drawn.

    Raises:
        TypeError: law is no law, a model without recurrent weights, or `Planted` for another than an RNNCell or
            CTRNNCell.
        ValueError: an unknown name, or a weight that is not square blocks, as of an LSTM with proj_size.
    Source: that of the law; factors of low rank by Eckart, Young, Psychometrika 1, 211 (1936).

    >>> import torch
    >>> from kpflow_dyn.models import Orthogonal
    >>> cell = initialize(torch.nn.GRUCell(3, 8).double(), Orthogonal(g=2.0))
    >>> update = cell.weight_hh[8:16].detach()
    >>> torch.allclose(update @ update.T, 4 * torch.eye(8).double())
    True
    """
    if not hasattr(law, "matrix") or isinstance(law, type):
        raise TypeError(f"law is {law!r}, expected an object such as Gaussian(g=1.5)")
    rng = np.random.default_rng(seed)
    if hasattr(law, "weights"):
        if which != "recurrent":
            raise ValueError(f"{type(law).__name__} is for recurrent weights, got which={which!r}; leave it out")
        return changed(model, law.weights(model, rng))
    known = parameters_of(model)
    values: dict[str, np.ndarray] = {}
    for name in _recurrent(model, known) if which == "recurrent" else choose(known, which):
        values |= _drawn(name, known, law, rng)
    return changed(model, values)


def _recurrent(model: Any, known: dict[str, Array]) -> list[str]:
    """Names of the recurrent weights: W_hh, W beside b, and the n beside the m and b of a low-rank cell."""
    if projected := [name for name in known if "weight_hr" in name]:
        raise ValueError(f"an LSTM with proj_size has no square recurrent weight ({projected[0]}); make it without")
    found = [name for name in known if _is_recurrent(name, known)]
    if not found:
        raise TypeError(
            f"{type(model).__name__} has no recurrent weights, named weight_hh, W or m and n beside b; name what to "
            f"draw with which=, of {listing(known)}"
        )
    return found


def _is_recurrent(name: str, known: dict[str, Array]) -> bool:
    head, dot, last = name.rpartition(".")
    beside_b = f"{head}{dot}b" in known
    return bool(_TORCH_NAME.fullmatch(last)) or (last == "W" and beside_b) or (beside_b and bool(_left(name, known)))


def _left(name: str, known: dict[str, Array]) -> str | None:
    """The name of the m that belongs to an n of a low-rank weight."""
    head, dot, last = name.rpartition(".")
    left = f"{head}{dot}m"
    return left if last == "n" and left in known else None


def _drawn(name: str, known: dict[str, Array], law: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A weight, or both factors of one."""
    left = _left(name, known)
    if left is None:
        return {name: _blocks(name, tuple(known[name].shape), law, rng)}
    units, rank = known[name].shape
    U, s, Vt = np.linalg.svd(law.matrix(units, rng))
    scale = np.sqrt(units * s[:rank])
    return {left: U[:, :rank] * scale, name: Vt[:rank].T * scale}


def _blocks(name: str, shape: tuple[int, ...], law: Any, rng: np.random.Generator) -> np.ndarray:
    if len(shape) != 2 or shape[0] % shape[1]:
        raise ValueError(f"{name} is {list(shape)}, expected square blocks [gates x n, n], since laws are of these")
    return np.concatenate([law.matrix(shape[1], rng) for _ in range(shape[0] // shape[1])])
