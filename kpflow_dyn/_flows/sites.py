"""Weight sites and the Kronecker core: what each weight multiplies, and the Gram matrix that it makes."""

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, to_numpy
from kpflow_dyn._arrays.dots import gram, row_dots
from kpflow_dyn._spaces.operators import GramOperator, Operator
from kpflow_dyn._spaces.scaling import Size, divided, divided_gram, finite, largest


@dataclass(frozen=True)
class WeightSite:
    """A place where weights multiply data, q = W v.

    Attributes:
        name: the parameters that act here, such as "weight_hh + weight_ih + bias_hh".
        kind: "matrix" (q = W v), "scale" (q_i = c_i w_i), "lookup" (q_i is the element of a table that data choose, as
            in an embedding) or "opaque" (any other operation, by its derivative).
        weight: W [m, d] for a matrix (biases are columns of it), else the weights as they are.
        inputs: the weight-site variables v at every row: [trial, time, d], or [trial, time, inner row, d] where a step
            uses W more than once; for a scale the coefficients c [trial, time, m]; for a lookup which element of
            `weight` each output is [trial, time, m], counted from 1, or 0 for none.
        entries: the number of each of the weights among all weights, in the shape of `weight`.
        measure: how much each row counts, broadcastable to [trial, time, 1]; None counts each as one.

    >>> import torch, kpflow_dyn as kp
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 8), torch.randn(2, 5, 3))))
    >>> flow.sites[0].inputs.shape  # 8 units, 3 inputs, 2 biases
    torch.Size([2, 5, 13])
    """

    name: str
    kind: str
    weight: Array = field(repr=False)
    inputs: Array = field(repr=False)
    entries: np.ndarray = field(repr=False)
    measure: Array | None = field(default=None, repr=False)

    @property
    def multiplicity(self) -> int:
        """How often the core repeats each of `gram_eigenvalues`: m for a matrix."""
        return self.entries.shape[0] if self.kind == "matrix" else 1

    def gram_eigenvalues(self) -> np.ndarray:
        """The nonzero spectrum of this site's part of the core, without multiplicity, descending, in float64.

        For a matrix these are the d eigenvalues of V^T W V, with V [rows, d] all rows that the weight ever sees and W
        the measure; the core has each of them m times. For a scale there is one for each weight: the sum of the squares
        of its coefficients. For a lookup there is one for each weight that is looked up: how often.

        An opaque site, whose Gram matrix is not that of its operands, is a ValueError.
        """
        if self.kind == "opaque":
            raise ValueError(f"the site {self.name} is opaque: its spectrum does not follow from its operands alone")
        if self.kind == "lookup":
            return self._counts()
        if self.kind == "matrix":
            return np.maximum(np.linalg.eigvalsh(self.gram()), 0)[::-1].copy()
        _, place = np.unique(self.entries, return_inverse=True)
        columns = self._columns()
        return np.sort(np.bincount(place, to_numpy(row_dots(columns, columns))))[::-1].copy()

    def gram(self) -> np.ndarray:
        """V^T W V of a matrix, in float64: the products of each two of the d variables, summed over the rows."""
        columns = self._columns()
        return to_numpy(gram(columns, columns))

    def _counts(self) -> np.ndarray:
        """How often each element is looked up, of those that are, descending."""
        found = to_numpy(self.inputs)
        rows = np.ones(1) if self.measure is None else to_numpy(self.measure).astype(np.float64)
        rows = np.broadcast_to(rows.reshape((1,) * (3 - rows.ndim) + rows.shape), found.shape)
        counts = np.bincount(found.reshape(-1), rows.reshape(-1), minlength=1)[1:]
        return np.sort(counts[counts > 0])[::-1].copy()

    def _columns(self) -> Array:
        """The inputs at every row, times the root of the measure [d, row]."""
        inputs = self.inputs
        if self.measure is not None:
            root = array_namespace(self.measure).sqrt(self.measure)
            root = root.reshape((1,) * (3 - root.ndim) + tuple(root.shape))
            inputs = inputs * root.reshape((*root.shape[:2], *(1,) * (inputs.ndim - 2)))
        return inputs.reshape((-1, inputs.shape[-1])).T


class CoreOperator(GramOperator):
    """The Kronecker core: blockdiag over sites of V V^T (x) I, on the outputs of all sites [trial, time, site]."""

    def __init__(self, factor: Operator, sites: list[WeightSite], untraced: str = "") -> None:
        super().__init__(factor)
        self.sites, self.untraced = sites, untraced

    @cached_property
    def separate(self) -> list[bool]:
        """For each site, whether its block is that of its Gram matrix, apart from all others."""
        return follow_from_inputs(self.sites, self.factor.domain.size)

    def spectrum(self) -> tuple[np.ndarray, np.ndarray] | None:
        """All nonzero eigenvalues with their multiplicities, or None where V alone does not give them."""
        if self.untraced or not all(self.separate):
            return None
        values = [site.gram_eigenvalues() for site in self.sites]
        counts = [np.full(len(v), site.multiplicity) for v, site in zip(values, self.sites, strict=True)]
        return np.concatenate([np.zeros(0), *values]), np.concatenate([np.zeros(0, int), *counts])


@divided.register
def _(op: CoreOperator, size: Size) -> Operator:
    if op.untraced or not all(op.separate):
        return divided_gram(op, size)
    numbers = [finite(site.inputs) for site in op.sites if site.kind != "lookup"]
    for inputs in sorted(numbers, key=largest, reverse=True)[:1]:
        size.measure(inputs, array_namespace(inputs).ones_like(inputs[:1]))
    if size.exponent == 0:
        return op
    if len(numbers) < len(op.sites):
        return divided_gram(op, size)
    factor = divided(op.factor, size)
    size.order = 2
    sites = [replace(site, inputs=size.divide(site.inputs)) for site in op.sites]
    return CoreOperator(factor, sites, op.untraced)


def follow_from_inputs(sites: list[WeightSite], parameters: int) -> list[bool]:
    """Whether each site's block of the core is that of its Gram matrix, apart from all others.

    No weight of it is computed, used at another site, or twice in its matrix.
    """
    used = [np.unique(site.entries) for site in sites]
    numbers, counts = np.unique(np.concatenate([np.zeros(0, int), *used]), return_counts=True)
    own = numbers[(counts == 1) & (numbers < parameters)]
    return [
        site.kind != "opaque"
        and bool(np.isin(here, own).all())
        and (site.kind == "scale" or len(here) == site.entries.size)
        for site, here in zip(sites, used, strict=True)
    ]
