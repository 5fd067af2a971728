"""The weight sites of a step: where weights meet data linearly, all that meet at the same places in one."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from kpflow_dyn.tracing._graph import Node, Role
from kpflow_dyn.tracing._kicks import Kicks
from kpflow_dyn.tracing._numbers import Term, WeightNumbers, by_weight
from kpflow_dyn.tracing._uses import Use

Name = Callable[[Node], str]  # of a weight
Biases = dict[int, dict[int, int]]  # kick -> {number of the term: weight}
MetAt = dict[tuple[int, ...], list[tuple[int, int]]]  # the kicks of a column -> which columns (matrix, j) meet there
Taken = set[tuple[int, int]]  # biases that are columns of a matrix: (number of the term, kick)


@dataclass(frozen=True, eq=False)
class MatrixSite:
    """q[i, j] = sum_k v[i, k] W[k, j].

    v is put together from blocks of inner rows i, each of pieces side by side: one matrix of a use, or None for a
    column of ones.
    """

    blocks: tuple[tuple[Term | None, ...], ...]
    entries: np.ndarray  # [d, m], numbers of weights
    kicks: np.ndarray  # [r, m]
    name: str
    kind = "matrix"


@dataclass(frozen=True, eq=False)
class ScaleSite:
    """q[e] = c[e] w[entries[e]], c the derivative of a pointwise operation in its weight (of a sum or a copy: one)."""

    use: Use
    entries: np.ndarray
    kicks: np.ndarray
    name: str
    kind = "scale"


@dataclass(frozen=True, eq=False)
class OpaqueSite:
    """q = D_w f(v, w) dw for an operation f of no simpler kind, applied by its own derivative."""

    use: Use
    entries: np.ndarray
    kicks: np.ndarray
    name: str
    kind = "opaque"


@dataclass(frozen=True, eq=False)
class LookupSite:
    """q[e] = w[entries[n[e]]]: data choose which elements n of a table are taken, as by an embedding."""

    use: Use
    entries: np.ndarray
    kicks: np.ndarray
    name: str
    kind = "lookup"


Site = MatrixSite | ScaleSite | OpaqueSite | LookupSite


WHOLE = {"opaque": OpaqueSite, "lookup": LookupSite}  # all of their weights at all of their kicks


def sites_of_step(terms: Sequence[Term], weights: WeightNumbers, kicks: Kicks, name: Name) -> tuple[Site, ...]:
    """One site for each set of kicks that hang on the same variables; the uses of a tied weight stay apart."""
    matrices = [term for term in terms if term.use.kind == "matrix"]
    others = [term for term in terms if term.use.kind != "matrix"]
    met = _Met(matrices, others, {term: kicks.of_term(term) for term in terms}, weights, name)
    once = [np.unique(term.entries) for term in terms]
    tied = bool(terms) and len(np.unique(np.concatenate(once))) < sum(map(len, once))
    sites, taken = (_tied_sites if tied else _merged_sites)(met)
    return *sites, *_remaining_sites(met, taken)


@dataclass(frozen=True)
class _Met:
    """The matrices and the other terms of a step, and the kicks at which they meet."""

    matrices: list[Term]
    others: list[Term]
    kicks: Mapping[Term, np.ndarray]
    weights: WeightNumbers
    name: Name

    def biases(self) -> Biases:
        """The parameters that are simply added at each kick."""
        biases: Biases = defaultdict(dict)
        for number, term in enumerate(self.others):
            if term.use.node.role is Role.ADD:
                for kick, weight in zip(self.kicks[term].tolist(), term.entries.tolist(), strict=True):
                    biases[kick][number] = weight
        return biases

    def matrix_name(self, term: Term, columns: Sequence[int]) -> str:
        """The name of some columns of a matrix."""
        return _part(self.name(term.use.weight), columns, term.entries.shape[1])

    def bias_name(self, number: int, weights: np.ndarray) -> str:
        """The name of these weights of a bias."""
        weight = self.others[number].use.weight
        every = self.weights.of[weight].ravel()
        return _part(self.name(weight), np.flatnonzero(np.isin(every, weights)).tolist(), len(every))


def _merged_sites(met: _Met) -> tuple[list[Site], Taken]:
    """Columns of outputs, grouped by the matrices and the biases that meet at their kicks."""
    biases, taken, met_at = met.biases(), set(), _columns(met)
    fits = _fitting_biases(met_at, biases)
    groups: dict[tuple, list[tuple]] = defaultdict(list)
    for kicks, columns in met_at.items():
        members = tuple(n for n, _ in columns)
        shared = {b: w for b, w in _shared_bias(kicks, biases).items() if all((n, b) in fits for n in members)}
        groups[members, tuple(shared)].append((kicks, [j for _, j in columns], shared))
        for bias, kick in product(shared, kicks):  # matrices with other rows may meet the same kicks
            taken.add((bias, kick))
            del biases[kick][bias]
    return [_merged_site(met, members, uses, columns) for (members, uses), columns in groups.items()], taken


def _merged_site(met: _Met, members: tuple[int, ...], biases: tuple[int, ...], columns: list[tuple]) -> MatrixSite:
    """The site of these matrices and biases: at each column its kicks, which column of each matrix, and the biases."""
    terms = [met.matrices[n] for n in members]
    chosen = [list(js) for js in zip(*(js for _, js, _ in columns), strict=True)]
    rows = [term.entries[:, js] for term, js in zip(terms, chosen, strict=True)]
    ones = [np.array([[shared[b] for _, _, shared in columns]]) for b in biases]
    names = [met.matrix_name(term, js) for term, js in zip(terms, chosen, strict=True)]
    names += [met.bias_name(b, row) for b, row in zip(biases, ones, strict=True)]
    kicks = np.array([kicks for kicks, _, _ in columns]).T
    return MatrixSite(((*terms, *(None for _ in biases)),), np.concatenate(rows + ones), kicks, " + ".join(names))


def _tied_sites(met: _Met) -> tuple[list[Site], Taken]:
    """A weight that is used in several places is one site, with the variables of all places stacked.

    Biases that go with it everywhere, as in the stages of a Runge-Kutta step, are columns of it.
    """
    biases, taken, sites = met.biases(), set(), []
    for terms in by_weight(met.matrices):
        kicks = [met.kicks[term] for term in terms]
        found = [_bias_rows(here, biases) for here in kicks]
        apart = len(np.unique(np.concatenate(kicks))) == sum(here.size for here in kicks)  # no two uses meet
        shared = [row for row in found[0] if apart and all(row in other for other in found)]
        names = [met.name(terms[0].use.weight), *(met.bias_name(found[0][row], np.array(row)) for row in shared)]
        blocks = tuple((term, *(None for _ in shared)) for term in terms)
        entries = np.concatenate([terms[0].entries, *(np.array([row]) for row in shared)])
        sites.append(MatrixSite(blocks, entries, np.concatenate(kicks), " + ".join(names)))
        used = {
            (rows[row], kick) for rows, here in zip(found, kicks, strict=True) for row in shared for kick in here.flat
        }
        for bias, kick in used:  # it is a column of this weight, and of no other that meets it here
            del biases[kick][bias]
        taken |= used
    return sites, taken


def _remaining_sites(met: _Met, taken: Taken) -> list[Site]:
    sites: list[Site] = []
    for number, term in enumerate(met.others):
        name, kicks = met.name(term.use.weight), met.kicks[term]
        if term.use.kind in WHOLE:
            sites.append(WHOLE[term.use.kind](term.use, term.entries, kicks, name))
            continue
        left = np.array([(number, kick) not in taken for kick in kicks.tolist()], bool)
        if left.any():
            sites.append(ScaleSite(term.use, term.entries[left], kicks[left], name))
    return sites


def _columns(met: _Met) -> MetAt:
    """The kicks [r] of an output column -> which columns (matrix, j) meet there."""
    columns: MetAt = defaultdict(list)
    for n, term in enumerate(met.matrices):
        for j, kicks in enumerate(met.kicks[term].T.tolist()):
            columns[tuple(kicks)].append((n, j))
    return columns


def _fitting_biases(met_at: MetAt, biases: Biases) -> set[tuple[int, int]]:
    """(matrix, bias) where each column of the matrix has a weight of the bias to itself, unlike a convolution's."""
    weights: dict[tuple[int, int], list[int]] = defaultdict(list)
    for kicks, columns in met_at.items():
        for (n, _), (bias, weight) in product(columns, _shared_bias(kicks, biases).items()):
            weights[n, bias].append(weight)
    return {pair for pair, found in weights.items() if len(set(found)) == len(found)}


def _shared_bias(kicks: tuple[int, ...], biases: Biases) -> dict[int, int]:
    """The biases that move all of these kicks by one and the same weight."""
    first, *rest = [biases.get(kick, {}) for kick in kicks]
    return {use: weight for use, weight in first.items() if all(other.get(use) == weight for other in rest)}


def _bias_rows(kicks: np.ndarray, biases: Biases) -> dict[tuple[int, ...], int]:
    """The biases added to all of these outputs [r, m]: their weights [m], and at which term."""
    columns = [_shared_bias(tuple(column), biases) for column in kicks.T.tolist()]
    everywhere = [use for use in columns[0] if all(use in column for column in columns)]
    return {tuple(column[use] for column in columns): use for use in everywhere}


def _part(name: str, columns: Sequence[int], width: int) -> str:
    """The name, and the range of columns where it is not all of them."""
    return name if len(columns) == width else f"{name}[{min(columns)}:{max(columns) + 1}]"
