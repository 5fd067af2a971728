"""What a traced step is made of: weight sites, the products that carry the state on, and the glue between them.

Every element of every value in the graph gets a number. Moving operations are run on the numbers themselves, so that an
element is followed through views, splits and concatenations to the operation that computed it. From this alone follow

- the *kicks* a: one for each element at which a parameter's change enters the step. Products that meet only in sums
  share their kicks, so that W h + U x + b is one site with the variables [h, x, 1];
- the *products*: every multiplication by a matrix that does not depend on the row, learnable or fixed;
- the *glue*: which elements of the products' operands and of the next state hang on which elements of z and a, with
  the graph cut at the products. For most cells this is elementwise up to a shift: a short list of segments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from kpflow_dyn.tracing._framework import Framework
from kpflow_dyn.tracing._graph import Graph, Node, Role, ancestors, evaluate, run

NOTHING = 0  # the number of an element without a derivative


Piece = tuple[Node | None, np.ndarray]


class Kind(Enum):
    """What a value depends on."""

    CONSTANT = 0
    WEIGHT = 1
    DATA = 2
    MOVING = 3


@dataclass
class Product:
    """out[i, j] = sum_k v[i, k] W[k, j]: v = operand.flat[positions], W = weight.flat[entries]; `kicks` are out's.

    Without entries it is a fixed linear map of the operand, such as a mean, to be read off the node itself.
    """

    node: Node
    operand: Node
    positions: np.ndarray  # [r, d]
    weight: Node
    entries: np.ndarray | None  # [d, m]
    kicks: np.ndarray  # [r, m]
    learnable: bool


@dataclass
class MatrixSite:
    """q[i, j] = sum_k v[i, k] W[k, j].

    v is put together from blocks of inner rows i, each of pieces side by side (node, positions [r, d]); a piece without
    a node is ones.
    """

    blocks: list[list[Piece]]
    entries: np.ndarray  # [d, m], numbers of weights
    kicks: np.ndarray  # [r, m]
    name: str


@dataclass
class ScaleSite:
    """q[e] = c[e] w[entries[e]], c the derivative of a pointwise operation in its weight operand (None: one)."""

    node: Node
    operand: Node | None
    entries: np.ndarray
    kicks: np.ndarray
    name: str


@dataclass
class OpaqueSite:
    """q = D_w f(v, w) dw for an operation f of no simpler kind, applied by its own derivative."""

    node: Node
    operand: Node
    entries: np.ndarray
    kicks: np.ndarray
    name: str


Site = MatrixSite | ScaleSite | OpaqueSite


@dataclass
class Structure:
    """The analysed step. Kicks are numbered so that those of the moving products come first, row by row.

    replaced: where the kicks stand for a node's value [elements of the node], -1 for none. added: where they add to it.
    ids: the number of the element that each element of a node's outputs is a copy of; `moved` are the nodes that copy.
    """

    graph: Graph
    kinds: dict[Node, Kind]
    parameters: list[Node]
    derived: list[Node]
    state_size: int
    kick_size: int
    replaced: dict[Node, np.ndarray]
    added: dict[Node, np.ndarray]
    products: list[Product]
    sites: list[Site]
    ids: dict[Node, list[np.ndarray]]
    moved: set[Node]


def analyse(graph: Graph, learnable: set[str], framework: Framework) -> Structure:
    """Find the sites, the products and the glue of a traced step.

    Args:
        graph: the step of one row.
        learnable: the names of the parameters that learn; the others count as constants.
        framework: that of the graph, so that its moving operations run on element numbers.
    """
    return _Analysis(graph, learnable, framework).structure()


class _Analysis:
    def __init__(self, graph: Graph, learnable: set[str], framework: Framework) -> None:
        self.parameters = [node for node, name in graph.parameters.items() if name in learnable]
        self.kinds, self.framework = kinds_of(graph, set(self.parameters)), framework
        self.like = next(iter(graph.values.values()), None)
        if self.kinds[graph.output] is Kind.WEIGHT:
            graph = _with_output_among_data(graph)
            self.kinds[graph.output] = Kind.MOVING
        self.graph = graph
        self.rows = [node for node in graph.nodes if self.kinds[node] in (Kind.DATA, Kind.MOVING)]
        if self.kinds[graph.output] is not Kind.MOVING:
            raise ValueError(
                "the step's result depends on neither its state nor a learnable parameter; nothing to analyse"
            )
        self.values = self.indices()
        self.local = self.local_numbers()
        self.next_id = 1
        self.ids: dict[Node, list[np.ndarray]] = {}
        self.owner_base: list[tuple[int, Node]] = []
        self.weight_copies: dict[Node, np.ndarray] = {}

    def structure(self) -> Structure:
        for node in [*self.parameters, *self.graph.nodes]:
            if node not in self.ids:
                self.ids[node] = self.number(node)
        self.find_uses()
        self.find_sums()
        products = [product for node in self.rows for product in self.products_of(node)]
        self.number_kicks(products)
        moved = {node for node in self.rows if self.moves(node)}
        return Structure(
            *(self.graph, self.kinds, self.parameters, self.derived_weights(products), self.state_size, self.kick_size),
            *(self.replaced, self.added, products, self.sites(products), self.ids, moved),
        )

    # Numbers of elements

    def indices(self) -> dict[Node, Any]:
        """The values of the operands that say where elements move to."""
        moves = [node for node in self.graph.nodes if node.role is Role.MOVE]
        fixed = {o for node in moves for o in node.operands if not o.floating and self.kinds[o] is Kind.CONSTANT}
        behind = ancestors(fixed)
        return run((node for node in self.graph.nodes if node in behind), dict(self.graph.values))

    def local_numbers(self) -> dict[Node, list[np.ndarray]]:
        """For each node that copies elements: which of its operands' elements, numbered from 1 one after another."""
        learnt = [node for node in self.graph.nodes if self.kinds[node] is not Kind.CONSTANT]
        nodes = [node for node in learnt if self.moves(node) and node.floating]

        def moved() -> list[Any]:
            return [evaluate(node, self.numbered_operands(node)) for node in nodes]

        found = self.framework.compiled(moved)()
        parts = [value if isinstance(value, tuple | list) else [value] for value in found]
        return {node: [np.asarray(part) for part in value] for node, value in zip(nodes, parts, strict=True)}

    def numbered_operands(self, node: Node) -> dict[Node, Any]:
        env, start = {}, 1
        for operand in dict.fromkeys(node.operands):
            if not operand.floating:
                env[operand] = self.values[operand]
                continue
            parts = []
            for shape in operand.shapes:
                size = int(np.prod(shape))
                parts.append(self.framework.index(np.arange(start, start + size).reshape(shape), self.like))
                start += size
            env[operand] = parts if len(parts) > 1 else parts[0]
        return env

    def number(self, node: Node) -> list[np.ndarray]:
        """The number of the element that each element of the node's outputs is a copy of."""
        kind = self.kinds[node]
        if kind is Kind.CONSTANT or not node.floating:
            return [np.full(shape, NOTHING) for shape in node.shapes]
        if node not in self.local:
            return self.fresh(node)
        operands = [part.ravel() for o in dict.fromkeys(node.operands) if o.floating for part in self.ids[o]]
        known = np.concatenate([[NOTHING], *operands])
        ids = [known[local] for local in self.local[node]]
        return ids if kind is not Kind.MOVING else [self.copy_weights(node, part) for part in ids]

    def moves(self, node: Node) -> bool:
        """Whether the node only copies elements, to places that do not depend on data."""
        fixed = all(o.floating or self.kinds[o] is Kind.CONSTANT for o in node.operands)
        return node.role is Role.MOVE and fixed

    def fresh(self, node: Node) -> list[np.ndarray]:
        self.owner_base.append((self.next_id, node))
        numbers = []
        for shape in node.shapes:
            size = int(np.prod(shape))
            numbers.append(np.arange(self.next_id, self.next_id + size).reshape(shape))
            self.next_id += size
        return numbers

    def copy_weights(self, node: Node, ids: np.ndarray) -> np.ndarray:
        """A weight's element among data, as in cat([h, w]): a site of its own, with the coefficient one."""
        copied = [self.ids[o][0].ravel() for o in self.weight_operands(node)]
        if not copied:
            return ids
        weights = np.isin(ids, np.concatenate(copied))
        self.weight_copies[node] = np.where(weights, ids, NOTHING)
        return np.where(weights, self.fresh(node)[0], ids)

    def weight_operands(self, node: Node) -> list[Node]:
        return [o for o in dict.fromkeys(node.operands) if self.kinds[o] is Kind.WEIGHT]

    # Where elements are used, and which are sums of products

    def find_uses(self) -> None:
        self.uses = np.zeros(self.next_id, int)
        for node in self.rows:
            if self.moves(node):
                continue
            for operand in node.operands:
                for ids in self.ids[operand]:
                    if node.role is Role.ADD:
                        np.add.at(self.uses, np.broadcast_to(ids, node.shape).ravel(), 1)
                    else:
                        np.add.at(self.uses, ids.ravel(), 2)
        np.add.at(self.uses, self.ids[self.graph.output][0].ravel(), 2)

    def find_sums(self) -> None:
        """Follow each product's outputs to the last node up to which they meet nothing but other such terms."""
        self.sums = np.zeros(self.next_id, bool)
        self.leads_to = np.arange(self.next_id)
        self.hubs: set[Node] = set()
        for node in self.rows:
            if self.is_product(node):
                self.sums[self.ids[node][0].ravel()] = True
            elif node.role is Role.ADD and self.kinds[node] is Kind.MOVING:
                self.try_hub(node)
        while (self.leads_to != self.leads_to[self.leads_to]).any():
            self.leads_to = self.leads_to[self.leads_to]

    def try_hub(self, node: Node) -> None:
        moving = [o for o in node.operands if self.kinds[o] is Kind.MOVING]
        terms = [np.broadcast_to(self.ids[o][0], node.shape) for o in moving]
        if terms and all((self.sums[ids] & (self.uses[ids] == 1)).all() for ids in terms):
            self.hubs.add(node)
            self.sums[self.ids[node][0].ravel()] = True
            for ids in terms:
                self.leads_to[ids.ravel()] = self.ids[node][0].ravel()

    def is_product(self, node: Node) -> bool:
        if self.kinds[node] is not Kind.MOVING:
            return False
        if node.role is Role.REDUCE:
            return self.kinds[node.operands[0]] is Kind.MOVING
        return node.role is Role.PRODUCT and any(self.kinds[o] in (Kind.WEIGHT, Kind.CONSTANT) for o in node.operands)

    # Products and kicks

    def products_of(self, node: Node) -> list[Product]:
        if not self.is_product(node):
            return []
        out = self.leads_to[self.ids[node][0]]
        if node.role is Role.REDUCE:
            operand = node.operands[0]
            positions = np.arange(int(np.prod(operand.shape)))[None]
            return [Product(node, operand, positions, node, None, out.reshape(1, -1), learnable=False)]
        left, right = node.args[:2]
        transposed = self.kinds[left] in (Kind.WEIGHT, Kind.CONSTANT)
        weight, operand = (left, right) if transposed else (right, left)
        learnable = self.kinds[weight] is Kind.WEIGHT
        blocks = [_blocks(np.arange(int(np.prod(n.shape))).reshape(n.shape), transposed) for n in (operand, weight)]
        outs = _blocks(out, transposed)
        return [
            Product(node, operand, positions, weight, entries, kicks, learnable)
            for positions, entries, kicks in zip(*blocks, outs, strict=True)
        ]

    def number_kicks(self, products: list[Product]) -> None:
        """Number the kicks, the recurrent products' first, and say at which nodes they enter."""
        self.state_size = int(np.prod(self.graph.output.shape))
        self.find_uses_of_weights()
        moving = [p for p in products if self.kinds[p.operand] is Kind.MOVING]
        others = [p for p in products if self.kinds[p.operand] is not Kind.MOVING]
        targets = [p.kicks.ravel() for p in moving + others] + [use.kicks for use in self.uses_of_weights]
        self.kick_of = np.full(self.next_id, -1)
        order = np.concatenate(targets)
        first = np.sort(np.unique(order, return_index=True)[1])
        self.kick_of[order[first]] = np.arange(len(first))
        self.kick_size = len(first)
        for product in products:
            product.kicks = self.kick_of[product.kicks]
        for use in self.uses_of_weights:
            use.kicks = self.kick_of[use.kicks]
        nodes = [node for node in self.rows if self.is_product(node) or node in self.hubs]
        self.replaced = {node: self.kick_of[self.ids[node][0].ravel()] for node in nodes}
        entered = {use.node: self.entries_of(use.node) for use in self.uses_of_weights}
        self.added = {node: self.kick_of[ids] for node, ids in entered.items() if node not in self.replaced}

    def find_uses_of_weights(self) -> None:
        """Wherever a weight enters other than by a product."""
        self.uses_of_weights: list[_Use] = []
        for node in self.rows:
            if node in self.weight_copies:
                weights, ids = self.weight_copies[node].ravel(), self.ids[node][0].ravel()
                here = weights != NOTHING
                self.uses_of_weights.append(
                    _Use(node, self.weight_operands(node)[0], Role.MOVE, ids[here], weights[here])
                )
            elif self.kinds[node] is Kind.MOVING and not self.moves(node) and not self.is_product(node):
                self.uses_of_weights += [self.use_of_weight(node, operand) for operand in self.weight_operands(node)]

    def use_of_weight(self, node: Node, operand: Node) -> _Use:
        if len(node.shapes) > 1:
            raise ValueError(
                f"the operation {node.name} takes a parameter and has several results; write it with simpler operations"
            )
        kicks, weights = self.leads_to[self.ids[node][0].ravel()], self.ids[operand][0]
        elementwise = node.role in (Role.ADD, Role.POINTWISE)
        weights = np.broadcast_to(weights, node.shape) if elementwise else weights
        return _Use(node, operand, node.role if elementwise else Role.OTHER, kicks, weights.ravel())

    def entries_of(self, node: Node) -> np.ndarray:
        """The numbers of the elements at which kicks are added to this node's value."""
        ids = self.ids[node][0].ravel()
        copies = self.weight_copies.get(node)
        return ids if copies is None else np.where(copies.ravel() != NOTHING, ids, NOTHING)

    # Weight sites

    def sites(self, products: list[Product]) -> list[Site]:
        learnable = [p for p in products if p.learnable]
        matrices = [self.weight_of[self.ids[p.weight][0].ravel()[p.entries]] for p in learnable]
        for use in self.uses_of_weights:
            use.weights = self.weight_of[use.weights]
        once = [np.unique(entries) for entries in [*matrices, *(use.weights for use in self.uses_of_weights)]]
        if len(np.unique(np.concatenate(once))) < sum(map(len, once)):  # a tied weight: its uses stay apart
            return self.tied_sites(learnable, matrices)
        return self.merged_sites(learnable, matrices)

    def merged_sites(self, products: list[Product], matrices: list[np.ndarray]) -> list[Site]:
        """One site for each set of kicks that hang on the same variables."""
        biases = self.biases()
        groups: dict[tuple, list[tuple]] = defaultdict(list)
        for kicks, columns in _columns(products).items():
            shared = _shared_bias(kicks, biases)
            groups[tuple(n for n, _ in columns), tuple(shared)].append((kicks, [j for _, j in columns], shared))
        sites: list[Site] = []
        for (members, bias_uses), columns in groups.items():
            kicks = np.array([kicks for kicks, _, _ in columns]).T
            chosen = list(zip(*(js for _, js, _ in columns), strict=True))
            pieces: list[Piece] = [(products[n].operand, products[n].positions) for n in members]
            ones: list[Piece] = [(None, np.zeros((len(kicks), 1), int))] * len(bias_uses)
            rows = [matrices[n][:, list(js)] for n, js in zip(members, chosen, strict=True)]
            rows += [np.array([[shared[b] for _, _, shared in columns]]) for b in bias_uses]
            names = [
                _part(self.name(products[n].weight), js, products[n].kicks.shape[1])
                for n, js in zip(members, chosen, strict=True)
            ]
            names += [self.bias_name(b, rows[len(members) + i]) for i, b in enumerate(bias_uses)]
            sites.append(MatrixSite([pieces + ones], np.concatenate(rows), kicks, " + ".join(names)))
        taken = {
            (b, kick)
            for (_, bias_uses), columns in groups.items()
            for b in bias_uses
            for ks, _, _ in columns
            for kick in ks
        }
        return sites + self.remaining_sites(taken)

    def tied_sites(self, products: list[Product], matrices: list[np.ndarray]) -> list[Site]:
        """A weight that is used in several places is one site, with the variables of all places stacked.

        Biases that go with it everywhere, as in the stages of a Runge-Kutta step, are columns of it.
        """
        uses: dict[bytes, list[int]] = defaultdict(list)
        for n, entries in enumerate(matrices):
            uses[entries.tobytes() + bytes(str(entries.shape), "ascii")].append(n)
        biases, sites = self.biases(), []
        taken: set[tuple[int, int]] = set()
        for members in uses.values():
            first, kicks = members[0], [products[n].kicks for n in members]
            found = [_bias_rows(here, biases) for here in kicks]
            apart = len(np.unique(np.concatenate(kicks))) == sum(here.size for here in kicks)  # no two uses meet
            shared = [row for row in found[0] if apart and all(row in other for other in found)]
            ones: list[Piece] = [(None, np.zeros((len(kicks[0]), 1), int))] * len(shared)
            blocks: list[list[Piece]] = [[(products[n].operand, products[n].positions), *ones] for n in members]
            entries = np.concatenate([matrices[first], *(np.array([row]) for row in shared)])
            names = [self.name(products[first].weight)]
            names += [self.bias_name(found[0][row], np.array(row)) for row in shared]
            sites.append(MatrixSite(blocks, entries, np.concatenate(kicks), " + ".join(names)))
            for rows, here in zip(found, kicks, strict=True):
                for row in shared:
                    for kick in here.ravel().tolist():
                        taken.add((rows[row], kick))
                        del biases[kick][rows[row]]  # it is a column of this weight, and of no other that meets it here
        return sites + self.remaining_sites(taken)

    def bias_name(self, use: int, weights: np.ndarray) -> str:
        operand = self.uses_of_weights[use].operand
        every = self.weight_of[self.ids[operand][0].ravel()]
        return _part(self.name(operand), np.flatnonzero(np.isin(every, weights)).tolist(), len(every))

    def biases(self) -> dict[int, dict[int, int]]:
        """kick -> {number of the use: weight}, for the parameters that are simply added there."""
        biases: dict[int, dict[int, int]] = defaultdict(dict)
        for number, use in enumerate(self.uses_of_weights):
            if use.role is Role.ADD:
                for kick, weight in zip(use.kicks.tolist(), use.weights.tolist(), strict=True):
                    biases[kick][number] = weight
        return biases

    def remaining_sites(self, taken: set[tuple[int, int]]) -> list[Site]:
        sites: list[Site] = []
        for number, use in enumerate(self.uses_of_weights):
            name = self.name(use.operand)
            if use.role not in (Role.ADD, Role.POINTWISE, Role.MOVE):
                sites.append(OpaqueSite(use.node, use.operand, use.weights, use.kicks, name))
                continue
            left = np.array([(number, kick) not in taken for kick in use.kicks.tolist()], bool)
            operand = use.operand if use.role is Role.POINTWISE else None
            if left.any():
                sites.append(ScaleSite(use.node, operand, use.weights[left], use.kicks[left], name))
        return sites

    def derived_weights(self, products: list[Product]) -> list[Node]:
        """Number every weight element that a site multiplies: the parameters first, then the computed weights."""
        used = [self.ids[p.weight][0].ravel() for p in products if p.learnable] + [
            u.weights for u in self.uses_of_weights
        ]
        total = sum(int(np.prod(p.shape)) for p in self.parameters)
        self.weight_of = np.full(self.next_id, -1)
        self.weight_of[1 : total + 1] = np.arange(total)
        used_ids = np.unique(np.concatenate(used)) if used else np.zeros(0, int)
        derived = []
        for base, node in self.owner_base[len(self.parameters) :]:
            size = sum(int(np.prod(shape)) for shape in node.shapes)
            if ((used_ids >= base) & (used_ids < base + size)).any():
                derived.append(node)
                self.weight_of[base : base + size] = np.arange(total, total + size)
                total += size
        return derived

    def name(self, weight: Node) -> str:
        """The names of the parameters that a weight is computed from."""
        behind = ancestors([weight])
        return ", ".join(self.graph.parameters[p] for p in self.parameters if p in behind)


@dataclass
class _Use:
    """A weight that enters other than by a product: kicks[e] is moved by weights[e] (role OTHER: by all of them)."""

    node: Node
    operand: Node
    role: Role
    kicks: np.ndarray
    weights: np.ndarray


def kinds_of(graph: Graph, learnable: set[Node]) -> dict[Node, Kind]:
    """What each value depends on, where these parameters learn."""
    kinds: dict[Node, Kind] = {}
    for node in graph.nodes:
        below = {kinds[o] for o in node.operands}
        if node.role is Role.FIXED:
            kinds[node] = Kind.WEIGHT if node in learnable else Kind.CONSTANT
        elif node.role in (Role.INPUT, Role.STATE):
            kinds[node] = Kind.DATA if node.role is Role.INPUT else Kind.MOVING
        elif node.role is Role.STOP or not node.floating:
            kinds[node] = Kind.DATA if below & {Kind.DATA, Kind.MOVING} else Kind.CONSTANT
        elif Kind.MOVING in below or {Kind.DATA, Kind.WEIGHT} <= below:
            kinds[node] = Kind.MOVING
        else:
            kinds[node] = max(below, key=lambda kind: kind.value, default=Kind.CONSTANT)
    return kinds


def _with_output_among_data(graph: Graph) -> Graph:
    """A step that is a weight alone, such as a constant drift: a copy of the weight is its result."""
    weight = graph.output
    copied = Node(f"{weight.name}_copied", Role.MOVE, weight.shapes, weight.floating, lambda w: w, (weight,))
    return Graph([*graph.nodes, copied], copied, graph.parameters, graph.values)


def _blocks(numbers: np.ndarray, transposed: bool) -> np.ndarray:
    """[b, r, d] of a matrix or a batch of matrices, turned where the weight stands on the left."""
    numbers = numbers if numbers.ndim == 3 else numbers[None]
    return numbers.swapaxes(1, 2) if transposed else numbers


def _columns(products: list[Product]) -> dict[tuple[int, ...], list[tuple[int, int]]]:
    """The kicks [r] of an output column -> which columns (product, j) meet there."""
    columns: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
    for n, product in enumerate(products):
        for j, kicks in enumerate(product.kicks.T.tolist()):
            columns[tuple(kicks)].append((n, j))
    return columns


def _shared_bias(kicks: tuple[int, ...], biases: dict[int, dict[int, int]]) -> dict[int, int]:
    """The biases that move all of these kicks by one and the same weight."""
    first, *rest = [biases.get(kick, {}) for kick in kicks]
    return {use: weight for use, weight in first.items() if all(other.get(use) == weight for other in rest)}


def _bias_rows(kicks: np.ndarray, biases: dict[int, dict[int, int]]) -> dict[tuple[int, ...], int]:
    """The biases added to all of these outputs [r, m]: their weights [m], and at which use."""
    columns = [_shared_bias(tuple(column), biases) for column in kicks.T.tolist()]
    everywhere = [use for use in columns[0] if all(use in column for column in columns)]
    return {tuple(column[use] for column in columns): use for use in everywhere}


def _part(name: str, columns: Sequence[int], width: int) -> str:
    """The name, and the range of rows where it is not all of them."""
    return name if len(columns) == width else f"{name}[{min(columns)}:{max(columns) + 1}]"
