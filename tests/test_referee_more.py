"""What a model does beside computing: memory, draws, writes, coupled trials. All is answered rightly or refused."""

from __future__ import annotations

import copy
import random
import warnings
from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kpflow_dyn as kp

TRIALS, TIMES, UNITS, INPUTS = 4, 5, 3, 2


class Base(nn.Module):
    """Weights for a cell."""

    hidden_size = UNITS

    def __init__(self) -> None:
        super().__init__()
        self.w, self.i = nn.Linear(UNITS, UNITS), nn.Linear(INPUTS, UNITS)


def make(forward: Callable, **attributes: object) -> nn.Module:
    torch.manual_seed(0)
    cell = type("Cell", (Base,), {"forward": forward})().double()
    for name, value in attributes.items():
        setattr(cell, name, value)
    return cell


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(TRIALS, TIMES, INPUTS, dtype=torch.float64)


def linearized(cell: nn.Module, x: Tensor) -> kp.Flow:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kp.UntracedWarning)
        return kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))


def error_of(flow: kp.Flow, cell: nn.Module, x: Tensor) -> float:
    """Of J, as a part of the largest entry that autograd through the module has."""
    z, states = torch.zeros(len(x), UNITS, dtype=x.dtype), []
    for x_t in x.unbind(1):
        z = cell(x_t, z)
        states.append(z)
    rows = torch.stack(states, 1).reshape(-1)
    J = torch.stack([flat(torch.autograd.grad(row, list(cell.parameters()), retain_graph=True)) for row in rows])
    return float((flow.J.dense().reshape(J.shape) - J).abs().max() / J.abs().max())


def flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([gradient.to_dense().reshape(-1) for gradient in gradients])


def cumulated(m, x, z):
    return torch.tanh(torch.cumsum(m.w(z) + m.i(x), 0))


def remembering(m, x, z):
    kept, m.kept = m.kept, z
    return torch.tanh(m.w(z) + m.i(x)) + (0 if kept is None else 0.3 * kept)


def averaging(m, x, z):
    m.kept = 0.9 * m.kept + z.detach()
    return torch.tanh(m.w(z) + m.i(x)) + 0.3 * m.kept


@pytest.mark.parametrize("forward", [cumulated, remembering, averaging])
def test_memory_and_late_trials_are_refused(forward: Callable) -> None:
    """With z_0 = 0 a first call tells nothing, and the first trial does not see the others."""
    cell = make(forward, kept=0 if forward is averaging else None)
    with pytest.raises(ValueError, match=r"trials influence each other|remembers|outside of x_t and z"):
        linearized(cell, inputs())


@pytest.mark.parametrize("what", ["x", "z"])
def test_writes_that_change_nothing_at_first_are_refused(what: str) -> None:
    def halving(m, x, z):
        (x if what == "x" else z).mul_(0.5)
        return torch.tanh(m.w(z) + m.i(x))

    x = inputs()
    x[:, 0] = 0
    before = x.clone()
    with pytest.raises(ValueError, match="writes to its arguments in place"):
        linearized(make(halving), x)
    assert torch.equal(x, before)


def test_a_field_that_writes_to_zeros_is_refused() -> None:
    class Field(Base):
        def forward(self, t, z):
            return self.w(z.mul_(0.5)) - z

    z0 = torch.zeros(TRIALS, UNITS, dtype=torch.float64)
    with pytest.raises(ValueError, match="writes to its arguments in place"):
        kp.solve(kp.ODEProblem(Field().double(), z0, np.linspace(0, 1, 4)))


def chosen(m, x, z):
    return nn.functional.one_hot((m.w(z) + m.i(x)).argmax(-1), UNITS).to(z)


def in_numpy(m, x, z):
    return torch.from_numpy(np.tanh((m.w(z) + m.i(x)).detach().numpy()))


@pytest.mark.parametrize("forward", [chosen, in_numpy])
def test_what_has_no_derivative_is_refused(forward: Callable) -> None:
    with pytest.raises(ValueError, match=r"have no derivative.*straight-through"):
        linearized(make(forward), inputs())


class Looked(nn.Module):
    """A cell that looks up what its input says."""

    hidden_size = UNITS

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.w = table, nn.Linear(UNITS, UNITS)

    def forward(self, x, z):
        rows = x.long() if isinstance(self.table, nn.EmbeddingBag) else x[:, 0].long()
        return torch.tanh(self.w(z) + self.table(rows))


@pytest.mark.parametrize("Table", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients(Table: type[nn.Module]) -> None:
    torch.manual_seed(0)
    cell = Looked(Table(6, UNITS, sparse=True)).double()
    x = torch.randint(0, 6, (TRIALS, TIMES, 2)).double()
    assert error_of(linearized(cell, x), cell, x) < 1e-12


def test_statistics_of_the_batch_in_eval_mode_are_refused() -> None:
    net = nn.Sequential(nn.Linear(INPUTS, 4), nn.BatchNorm1d(4, track_running_stats=False)).double().eval()
    with pytest.raises(ValueError, match=r"BatchNorm without running statistics.*LayerNorm"):
        kp.solve(kp.StaticProblem(net, inputs()[:, 0]))


def with_roots(values: Tensor) -> Tensor:
    """Of zeros; and a branch, which no trace takes."""
    return torch.sqrt(0 * values.abs()) * float(values.sum() > -1e9)


def test_networks_and_fixed_points_without_a_trace_or_a_derivative() -> None:
    class Net(Base):
        def forward(self, x):
            return with_roots(self.i(x))

    class Map(Base):
        def forward(self, x, z):
            return torch.tanh(0.3 * self.w(z) + self.i(x)) + with_roots(z)

    x = inputs()[:, 0]
    for problem in (kp.StaticProblem(Net().double(), x, state=""), kp.FixedPointProblem(Map().double(), x)):
        with pytest.raises(ValueError, match=r"holds NaN or inf"):
            kp.linearize(kp.solve(problem))


def test_parts_of_lower_precision_are_answered_in_it() -> None:
    def halfway(m, x, z):
        return torch.tanh(m.w(z) + m.i(x)).float().double()

    cell, x = make(halfway), inputs()
    assert error_of(linearized(cell, x), cell, x) < 1e-6


def test_inside_of_inference_mode() -> None:
    def plain(m, x, z):
        return torch.tanh(m.w(z) + m.i(x))

    cell = make(plain)
    with torch.inference_mode():
        x = inputs()
        flow = linearized(cell, x)
        made_inside = make(plain)
    assert error_of(flow, cell, x.clone()) < 1e-12
    with pytest.raises(ValueError, match=r"made in torch.inference_mode"):
        linearized(made_inside, inputs())


def test_what_a_forward_writes_and_draws_is_taken_back() -> None:
    def writing(m, x, z):
        m.log["inner"].append(z)
        m.pair[0].add(len(m.log["inner"]))
        m.last.append(x)
        np.random.rand()  # noqa: NPY002
        random.random()
        return torch.tanh(m.w(z) + m.i(x))

    given = {"log": {"inner": [1]}, "pair": ({2},), "last": deque([3], maxlen=5)}
    cell = make(writing, **copy.deepcopy(given))
    kept = [cell.log["inner"], cell.pair[0], cell.last]
    of_numpy, of_python = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    linearized(cell, inputs())
    now = np.random.get_state()[1]  # noqa: NPY002
    assert {name: getattr(cell, name) for name in given} == given
    assert all(a is b for a, b in zip(kept, [cell.log["inner"], cell.pair[0], cell.last], strict=True))
    assert (now == of_numpy).all() and random.getstate() == of_python


def by_alias(m, x, z):
    return torch.tanh(z @ m.again[0].T + m.w.bias + m.i(x))


def by_product(m, x, z):
    return torch.tanh(z @ m.twice.T + m.w.bias + m.i(x))


@pytest.mark.parametrize(
    ("forward", "says"), [(by_alias, r"w.weight is off.*another way than its name"), (by_product, "cannot be copied")]
)
def test_a_gradient_flow_that_would_move_some_of_the_model_is_refused(forward: Callable, says: str) -> None:
    cell = make(forward)
    cell.again, cell.twice = [cell.w.weight], 2 * cell.w.weight if forward is by_product else None
    with pytest.raises(ValueError, match=says):
        kp.gradient_flow(kp.DiscreteProblem(cell, inputs()), lambda state: (state**2).mean(), 0.1)


def test_a_gradient_flow_of_a_field_with_an_alias_is_refused() -> None:
    class Field(Base):
        def forward(self, t, z):
            return torch.tanh(z @ self.again[0].T) - z

    field = Field().double()
    field.again = [field.w.weight]
    problem = kp.ODEProblem(field, inputs()[:, 0, :1].expand(-1, UNITS).clone(), np.linspace(0, 1, 4))
    with pytest.raises(ValueError, match="another way than its name"):
        kp.gradient_flow(kp.solve(problem, "rk4"), lambda state: (state**2).mean(), 0.1)


def over_its_norm(m, x, z):
    return torch.tanh(m.w(z) + m.i(x)) / (1 + z.pow(2).sum(-1, keepdim=True).sqrt())


def read_as_complex(m, x, z):
    """One place of a weight read as it is, as its conjugate and with the other sign."""
    c = torch.view_as_complex(m.i.weight)
    h = c * m.w(z) * c.conj() + x[:, :1]
    return torch.tanh(h.real * c.conj().imag + m.i(x))


@pytest.mark.parametrize("forward", [over_its_norm, read_as_complex])
def test_what_a_trace_does_not_follow_is_answered_by_autograd(forward: Callable) -> None:
    cell, x = make(forward), inputs()
    flow = linearized(cell, x)
    assert flow.untraced
    assert error_of(flow, cell, x) < 1e-12
    identity = (flow.P.inv @ flow.P).dense().reshape(TRIALS * TIMES * UNITS, -1)
    assert torch.allclose(identity, torch.eye(len(identity), dtype=torch.float64), atol=1e-12)


def test_a_network_that_autograd_knows_no_way_through_is_refused() -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(self.first(x).detach().numpy())

    with pytest.raises(ValueError, match=r"have no derivative.*numpy.*straight-through"):
        kp.linearize(kp.solve(kp.StaticProblem(Outside(), torch.randn(2, 3), state="")))
