"""What operators form on the way: never more than the model itself does, and within a memory budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kpflow_dyn as kp

WORDS, TOKENS, TRIALS = 9, 4, 5


class Formed(TorchDispatchMode):
    """Counts the numbers that operations give, views among them, and keeps the size of the largest array."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        self.total, self.largest = self.total + sum(sizes), max([self.largest, *sizes])
        return found


def formed(function: Callable[[], Any]) -> Formed:
    with Formed() as seen:
        function()
    return seen


def linearized(net: nn.Module, x: Tensor, **options: Any) -> kp.Flow:
    return kp.linearize(kp.solve(kp.StaticProblem(net, x, **{"state": "", **options})))


def by_autograd(net: nn.Module, x: Tensor) -> Tensor:
    """J [state, parameter] of the network's output."""
    found, parameters = net(x).reshape(-1), list(net.parameters())
    rows = [torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True) for value in found]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


def deep() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = [layer for _ in range(20) for layer in (nn.Linear(30, 30), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(30, 2)).double(), torch.randn(3, 30, dtype=torch.float64)


def with_torch_func(net: nn.Module, x: Tensor, q: Tensor) -> Tensor:
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def output(values: dict[str, Tensor]) -> Tensor:
        return functional_call(net, values, (x,))

    (gradient,) = vjp(output, parameters)[1](q)
    return jvp(output, (parameters,), (gradient,))[1]


@pytest.mark.parametrize("state", ["", "10", None])
def test_an_application_forms_no_more_than_vjp_and_jvp(state: str | None) -> None:
    """A vector of all parameters for each of 42 of them, or of all outputs for each site, would be some 20 times it."""
    net, x = deep()
    flow = linearized(net, x, state=state)
    q = torch.randn(flow.ntk.domain.shape, dtype=torch.float64)
    few = formed(lambda: with_torch_func(net, x, torch.ones(3, 2, dtype=torch.float64))).total
    operators = {"ntk": flow.ntk, "K": flow.K, "J": flow.J, "J*": flow.J.T, "P*": flow.P.T, "B*": flow.B.T}
    for name, op in operators.items():
        v = torch.randn(op.domain.shape, dtype=torch.float64)
        op.mv(v)
        assert formed(lambda op=op, v=v: op.mv(v)).total < 4 * few, name
    torch.testing.assert_close((flow.P @ flow.K @ flow.P.T).mv(q), flow.ntk.mv(q), rtol=1e-10, atol=1e-12)


class Looking(nn.Module):
    """A network that takes rows of a table by `look(table, tokens)`."""

    def __init__(self, look: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.look, self.table, self.out = look, nn.Parameter(torch.randn(WORDS, 3)), nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.look(self.table, tokens)).prod(1))


def gathered(table: Tensor, tokens: Tensor) -> Tensor:
    numbers = tokens[..., None].expand(-1, -1, 3)  # [trial, token, unit]
    return table.expand(len(tokens), -1, -1).gather(1, numbers)


class Places(nn.Module):
    """A table that is looked up where the largest input is."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Parameter(torch.randn(TOKENS, 3)), nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.table[tokens.argmax(1)]))


def embedded(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Tanh(), nn.LazyLinear(2))


LOOKUPS: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: embedded(nn.Embedding(WORDS, 3)),
    "padding": lambda: embedded(nn.Embedding(WORDS, 3, padding_idx=2)),
    "sums of bags": lambda: embedded(nn.EmbeddingBag(WORDS, 3, mode="sum")),
    "means of bags": lambda: embedded(nn.EmbeddingBag(WORDS, 3, padding_idx=1)),
    "indexed": lambda: Looking(lambda table, tokens: table[tokens]),
    "functional": lambda: Looking(lambda table, tokens: nn.functional.embedding(tokens, table)),
    "gathered": lambda: Looking(gathered),
    "by place": Places,
}


def tokens() -> Tensor:
    return torch.randint(0, WORDS, (TRIALS, TOKENS), generator=torch.Generator().manual_seed(0))


def check_core(core: kp.GramOperator) -> None:
    """Its exact numbers are those of its matrix."""
    matrix = core.dense()
    trace, rank = kp.trace(core), kp.effective_rank(core)
    assert trace.stderr == 0 and trace.value == pytest.approx(float(matrix.trace()), rel=1e-12)
    assert rank.value == pytest.approx(float(matrix.trace() ** 2 / (matrix**2).sum()), rel=1e-10)


@pytest.mark.parametrize("name", LOOKUPS)
def test_lookups_are_sites_whose_core_counts_tokens(name: str) -> None:
    torch.manual_seed(0)
    net, x = LOOKUPS[name]().double(), tokens()
    net(x)
    flow, J = linearized(net, x), by_autograd(net, x)
    assert not flow.untraced
    torch.testing.assert_close(flow.J.dense(), J, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((flow.P @ flow.K @ flow.P.T).dense(), J @ J.T, rtol=1e-10, atol=1e-12)
    check_core(flow.core)
    assert kp.trace(flow.core).method == "exact: spectrum of V^T V"
    (site,) = (site for site in flow.sites if site.kind == "lookup")
    looked_up = site.weight.reshape(-1)[site.inputs.reshape(-1).long() - 1]
    assert torch.isin(looked_up, site.weight).all()
    assert site.gram_eigenvalues().sum() == site.inputs.numel()
    check_core(flow.only(site.name).core)


def test_a_table_that_is_also_a_matrix() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(WORDS, 3, padding_idx=0)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.words(x)).sum(1) @ self.words.weight.T

    torch.manual_seed(0)
    net, x = Tied().double(), tokens()
    flow, J = linearized(net, x), by_autograd(net, x)
    assert [site.kind for site in flow.sites] == ["lookup", "matrix"]
    torch.testing.assert_close((flow.P @ flow.K @ flow.P.T).dense(), J @ J.T, rtol=1e-10, atol=1e-12)
    check_core(flow.core)


def test_exact_traces_keep_to_the_budget() -> None:
    """All rows of J at once would be 24 times the parameters."""
    torch.manual_seed(0)
    net = embedded(nn.Embedding(4000, 4)).double()
    x = torch.randint(0, 4000, (12, TOKENS))
    net(x)
    flow = linearized(net, x)
    with kp.memory_budget(2**20):
        seen = formed(lambda: kp.trace(flow.ntk))
        trace = kp.trace(flow.ntk)
    assert trace.stderr == 0
    assert trace.value == pytest.approx(float((by_autograd(net, x) ** 2).sum()), rel=1e-12)
    assert seen.largest < 2 * flow.J.domain.size


def test_traces_of_an_untraced_model_keep_to_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpflow_dyn._implicit.solving._trace", lambda _equations: (None, "not asked for"))
    torch.manual_seed(0)
    net = embedded(nn.Embedding(4000, 4)).double()
    x = torch.randint(0, 4000, (12, TOKENS))
    net(x)
    with pytest.warns(kp.UntracedWarning):
        flow = linearized(net, x)
    with kp.memory_budget(2**20):
        seen = formed(lambda: kp.trace(flow.ntk))
    assert seen.largest < 2 * flow.J.domain.size


class Speller(nn.Module):
    """A recurrent cell on tokens, which come as numbers in x."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 4
        self.words, self.cell = nn.Embedding(WORDS, 3), nn.GRUCell(3, 4)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.cell(self.words(x[:, 0].long()), h)


class Grouped(nn.Module):
    """A recurrent cell whose weight enters an operation of no simple kind."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 6
        self.kernel = nn.Parameter(torch.randn(6, 3, 5))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        signal = (h + x)[..., None] * torch.ones(8, dtype=h.dtype)
        return torch.tanh(nn.functional.conv1d(signal, self.kernel, groups=2)).mean(-1)


@pytest.mark.parametrize(("cell", "kind"), [(Speller, "lookup"), (Grouped, "opaque")])
def test_recurrent_cells_form_no_gradient_for_each_row(cell: type[nn.Module], kind: str) -> None:
    torch.manual_seed(0)
    step, times = cell().double(), 40
    x = torch.randint(0, WORDS, (TRIALS, times, 1)).double()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(step, x)))

    def states(values: dict[str, Tensor]) -> Tensor:
        h, found = torch.zeros(TRIALS, step.hidden_size, dtype=torch.float64), []
        for t in range(times):
            h = functional_call(step, values, (x[:, t], h))
            found.append(h)
        return torch.stack(found, 1)

    q = torch.randn(TRIALS, times, step.hidden_size, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in step.named_parameters()}
    (expected,) = vjp(states, parameters)[1](q)
    torch.testing.assert_close(flow.J.T.mv(q), torch.cat([g.reshape(-1) for g in expected.values()]), rtol=1e-9, atol=0)
    torch.testing.assert_close((flow.P @ flow.K @ flow.P.T).mv(q), flow.ntk.mv(q), rtol=1e-10, atol=1e-12)
    (site,) = (site for site in flow.sites if site.kind == kind)
    seen = formed(lambda: flow.J.T.mv(q))
    assert seen.largest < TRIALS * times * site.entries.size
    if kind == "lookup":
        check_core(flow.core)


def test_lookups_in_jax() -> None:
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        words: Any
        table: jax.Array
        out: Any

        def __call__(self, x: jax.Array) -> jax.Array:
            rows = jax.vmap(self.words)(x) * jax.numpy.take(self.table, x[::-1], axis=0) + self.table[x]
            return self.out(jax.numpy.tanh(rows).reshape(-1))

    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 3)
        words, out = eqx.nn.Embedding(WORDS, 3, key=keys[0]), eqx.nn.Linear(3 * TOKENS, 2, key=keys[1])
        net, x = Net(words, jax.random.normal(keys[2], (WORDS, 3)), out), jax.numpy.asarray(tokens().numpy())
        flow = kp.linearize(kp.solve(kp.StaticProblem(net, x, state="")))
        values, static = eqx.partition(net, eqx.is_inexact_array)
        rows = jax.tree.leaves(jax.jacrev(lambda v: jax.vmap(eqx.combine(v, static))(x))(values))
        J = np.concatenate([np.asarray(part).reshape(2 * TRIALS, -1) for part in rows], 1)
        assert not flow.untraced
        np.testing.assert_allclose((flow.P @ flow.K @ flow.P.T).dense(), J @ J.T, rtol=1e-9, atol=1e-10)
        np.testing.assert_allclose(flow.ntk.dense(), J @ J.T, rtol=1e-9, atol=1e-10)
        assert [site.kind for site in flow.sites].count("lookup") == 2
        matrix, trace = np.asarray(flow.core.dense()), kp.trace(flow.core)
        assert trace.method == "exact: spectrum of V^T V"
        assert trace.value == pytest.approx(matrix.trace(), rel=1e-12)
