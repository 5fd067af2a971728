"""What linearising steps in torch costs: how many derivatives, how large their arrays are, and what stays in memory."""

import gc
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kpflow_dyn as kp
from kpflow_dyn._torch import solving, transforms
from kpflow_dyn._torch.glue import find_glue

TRIALS, TIMES, UNITS = 4, 60, 16


class Operations(TorchDispatchMode):
    """Counts operations by name and the numbers that they give, and keeps the size of the largest array."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.total, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]
        self.calls[func.overloadpacket.__name__] += 1
        self.total, self.largest = self.total + sum(sizes), max([self.largest, *sizes])
        return found


def solved(cell: type[nn.Module], times: int = TIMES) -> kp.Solution:
    torch.manual_seed(0)
    x = torch.randn(TRIALS, times, 3, dtype=torch.float64)
    return kp.solve(kp.DiscreteProblem(cell(3, UNITS).double(), x))


@pytest.mark.parametrize("cell, few", [(nn.RNNCell, 1), (nn.GRUCell, 1), (nn.LSTMCell, 2)])
def test_a_cell_takes_few_derivatives(cell: type[nn.Module], few: int) -> None:
    """Of the sources of a GRU's next state, one by one, there would be five."""
    colouring = find_glue(kp.linearize(solved(cell)).recurrence.tangent.rows.step).colouring
    assert colouring is not None and colouring.of_sinks and colouring.count == few


def test_linearize_holds_no_arrays_of_all_gates_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed on the way is of some rows at a time; what is stored is no larger than two gates."""
    sol = solved(nn.GRUCell)
    kp.linearize(sol)  # so that the trace is known
    monkeypatch.setattr(transforms, "ROWS_BYTES", 8 * 20 * 5 * UNITS)  # of twenty rows
    with Operations() as seen:
        kp.linearize(sol)
    state = TRIALS * TIMES * UNITS
    assert seen.largest < 3 * state
    assert seen.total < 900 * state  # 1649 with a tangent for each colour, views among them


def test_each_step_on_its_own_is_one_product_for_all_times() -> None:
    flows = [kp.linearize(solved(nn.GRUCell, times)) for times in (10, 60)]
    counts = []
    for flow in flows:
        tangent = flow.recurrence.tangent
        with Operations() as seen:
            tangent.step_vjp(torch.ones(1, *flow.ntk.domain.shape, dtype=torch.float64))
        counts.append(seen.calls["addmm_"])
    assert counts[0] == counts[1]


class Branching(nn.GRUCell):
    """A cell that goes another way where an input is large."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, z.detach() if float(x.max()) > 50 else z)


@pytest.mark.parametrize("odd", [None, 0, TIMES - 1])
def test_the_referee_takes_some_steps_at_a_time(monkeypatch: pytest.MonkeyPatch, odd: int | None) -> None:
    """An eighth of all, so that graphs of autograd are small; it sees each of them still."""
    together: list[int] = []

    def each_step(step: Any, model: Any, rows: Tensor, before: Tensor) -> Tensor:
        together.append(rows.shape[1])
        return own(step, model, rows, before)

    own = solving.each_step
    x = torch.randn(TRIALS, TIMES, 3, dtype=torch.float64)
    if odd is not None:
        x[:, odd, 0] = 100
    sol = kp.solve(kp.DiscreteProblem(Branching(3, UNITS).double(), x))
    monkeypatch.setattr(solving, "PART_BYTES", 1)
    monkeypatch.setattr(solving, "each_step", each_step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kp.UntracedWarning)
        flow = kp.linearize(sol)
    assert together[:8] == [8] * 7 + [4]
    assert bool(flow.untraced) == (odd is not None)


def test_no_graph_of_autograd_outlives_linearize() -> None:
    def in_graphs() -> int:
        gc.collect()
        return sum(issubclass(type(value), Tensor) and value.grad_fn is not None for value in gc.get_objects())

    sol, before = solved(nn.GRUCell), in_graphs()
    kp.linearize(sol)
    assert in_graphs() == before


def test_spaces_keep_no_states() -> None:
    flow = kp.linearize(solved(nn.RNNCell))
    for space in (flow.ntk.domain, flow.J.domain, flow.B.domain):
        assert space.like.untyped_storage().nbytes() == 0


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(UNITS, UNITS), nn.Linear(UNITS, UNITS)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(z)))


def test_stages_of_an_ode_step_multiply_without_copies() -> None:
    """A weight is used once in each stage: a product for each, in place, without index, einsum or scatter."""
    torch.manual_seed(0)
    z0, t = torch.randn(TRIALS, UNITS, dtype=torch.float64), torch.linspace(0, 1, TIMES, dtype=torch.float64)
    flow = kp.linearize(kp.solve(kp.ODEProblem(Field().double(), z0, t), "heun2")).nodal
    q = torch.randn(1, *flow.ntk.domain.shape, dtype=torch.float64)
    with Operations() as seen:
        flow.ntk.mv(q)
    assert not {"bmm", "index", "index_put", "index_add_", "scatter_add_"} & set(seen.calls)
    torch.testing.assert_close(flow.ntk.mv(q), (flow.J @ flow.J.T).mv(q), rtol=1e-10, atol=1e-12)


def test_linearize_of_a_network_takes_few_passes() -> None:
    """In products, of which a forward and a backward pass take eight: three for each layer, but of the first input."""
    layers = [nn.Linear(UNITS, UNITS), nn.Tanh(), nn.Linear(UNITS, UNITS), nn.Tanh(), nn.Linear(UNITS, 3)]
    net, x = nn.Sequential(*layers).double(), torch.randn(9, UNITS, dtype=torch.float64)
    sol = kp.solve(kp.StaticProblem(net, x, state=""))
    with Operations() as seen:
        kp.linearize(sol)
    assert sum(seen.calls[name] for name in ("mm", "addmm", "bmm")) <= 6 * 8
