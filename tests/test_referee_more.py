"""What a model does beside computing: memory, draws, writes, coupled trials. All is answered rightly or refused."""

from __future__ import annotations

import copy
import random
import warnings
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kpflow_dyn as kp
from kpflow_dyn._flows.referee import Mismatch, compare_gradients

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


def error_of(flow: kp.Flow, learns: nn.Module, x: Tensor, cell: nn.Module | None = None) -> float:
    """Of J, as a part of the largest entry that autograd through the cell has; some module of it learns."""
    cell = cell or learns
    z, states = torch.zeros(len(x), UNITS, dtype=x.dtype), []
    for x_t in x.unbind(1):
        z = cell(x_t, z)
        states.append(z)
    rows = torch.stack(states, 1).reshape(-1)
    J = torch.stack([flat(torch.autograd.grad(row, list(learns.parameters()), retain_graph=True)) for row in rows])
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


def normed(x: Tensor) -> Tensor:
    """As the root mean square norm of many language models, which computes in float32 whatever it is given."""
    low = x.float()
    return (low * torch.rsqrt(low.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def test_parts_of_lower_precision_are_traced() -> None:
    def norms_inside(m, x, z):
        return torch.tanh(m.w(normed(m.i(x) + m.w(z))))

    cell, x = make(norms_inside), inputs()
    flow = linearized(cell, x)
    assert flow.untraced == "" and flow.sites
    assert error_of(flow, cell, x) < 1e-5


@pytest.mark.parametrize("state", ["", None])
def test_networks_with_parts_of_lower_precision_are_traced(state: str | None) -> None:
    class Net(Base):
        def forward(self, x):
            return self.w(normed(self.i(x)))

    torch.manual_seed(0)
    net, x = Net().double(), inputs()[:, 0]
    flow = kp.linearize(kp.solve(kp.StaticProblem(net, x, state)))
    assert flow.untraced == "" and flow.sites
    rows = net(x).reshape(-1)
    J = torch.stack([flat(torch.autograd.grad(row, list(net.parameters()), retain_graph=True)) for row in rows])
    found = flow.J.dense().reshape(TRIALS, -1, UNITS, J.shape[-1])[:, -1].reshape(J.shape)  # the output comes last
    assert (found - J).abs().max() < 1e-5 * J.abs().max()


def test_a_part_of_lower_precision_hides_no_other_error() -> None:
    gradient, single = np.linspace(1, 2, 6), 2.0**-23
    compare_gradients((1 + single) * gradient, gradient, {"w": 6}, rounding=single)
    with pytest.raises(Mismatch, match=r"in w is off by 1.0e-03"):
        compare_gradients(1.001 * gradient, gradient, {"w": 6}, rounding=single)
    with pytest.raises(Mismatch, match=r"in w is off by 1.2e-07"):
        compare_gradients((1 + single) * gradient, gradient, {"w": 6})


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # by torch.compile
@pytest.mark.parametrize("inside", [False, True], ids=["compiled", "compiled inside"])
def test_compiled_modules_run_as_they_were_written(inside: bool) -> None:
    def plain(m, x, z):
        return torch.tanh(m.w(z) + m.i(x))

    cell, x = make(plain), inputs()
    if inside:
        cell.w = torch.compile(cell.w, backend="aot_eager")  # whose backward pass can be run once only
    compiled = cell if inside else torch.compile(cell, backend="aot_eager")
    compiled(x[:, 0], torch.zeros(TRIALS, UNITS, dtype=x.dtype)).sum().backward()
    flow = linearized(compiled, x)
    assert flow.untraced == "" and flow.sites
    assert error_of(flow, cell, x) < 1e-12


def test_a_module_may_hold_tuples_that_refuse_their_length() -> None:
    class Pair(tuple):
        def __len__(self) -> int:
            raise NotImplementedError

    def plain(m, x, z):
        return torch.tanh(m.w(z) + m.i(x))

    cell, x = make(plain, pair=Pair((1, 2))), inputs()
    assert error_of(linearized(cell, x), cell, x) < 1e-12


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


def test_a_forecast_of_a_model_with_an_alias_is_right_and_not_compared_with_training() -> None:
    cell, x = make(by_alias), inputs()
    cell.again = [cell.w.weight]
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))
    target = torch.zeros_like(flow.solution.state)
    with pytest.warns(UserWarning, match="not compared with training itself.*another way than its name"):
        found = kp.forecast(flow, target, lr=0.1, steps=10)
    size = target.numel()
    rows = flow.ntk.mv(torch.eye(size, dtype=torch.float64).reshape(size, *target.shape)).reshape(size, size)
    step = torch.eye(size, dtype=torch.float64) - 0.1 * 2 * rows / size
    error = torch.linalg.matrix_power(step, 10) @ flow.solution.state.reshape(-1)
    assert found.loss[10] == pytest.approx(float((error**2).mean()), rel=1e-6) and np.isnan(found.holds_until)


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


@pytest.mark.parametrize(("forward", "traced"), [(over_its_norm, False), (read_as_complex, True)])
def test_norms_at_zero_and_views_as_complex_are_as_autograd_has_them(forward: Callable, traced: bool) -> None:
    cell, x = make(forward), inputs()
    flow = linearized(cell, x)
    assert traced == (not flow.untraced)
    assert error_of(flow, cell, x) < 1e-12
    identity = (flow.P.inv @ flow.P).dense().reshape(TRIALS * TIMES * UNITS, -1)
    assert torch.allclose(identity, torch.eye(len(identity), dtype=torch.float64), atol=1e-12)


def with_a_small_part(m, x, z):
    small = 3 * m.small(z)
    if small.requires_grad:
        small.grad_fn.register_prehook(lambda g: (2 * g[0],))  # which a trace does not see
    return torch.tanh(m.w(z) + m.i(x) + 3e-5 * small)


def test_a_wrong_gradient_is_seen_however_small_it_is_beside_others() -> None:
    cell = make(with_a_small_part, small=nn.Linear(UNITS, UNITS).double()).float()
    x = inputs().float()
    assert "small.weight" in linearized(cell, x).untraced
    assert error_of(linearized(cell, x).only(lambda name: name.startswith("small")), cell.small, x, cell) < 1e-4


@pytest.mark.parametrize("size", [30, 1000])
def test_rounding_is_no_mismatch_where_all_gradients_are_what_it_leaves(size: float) -> None:
    """A norm of two units is +-1, whatever they are, but for its eps: terms of its derivative cancel."""

    def forward(m, x, z):
        h = size * (m.w(z) + m.i(x))
        return torch.tanh(torch.cat([m.norm(h[:, :2]), 0 * h[:, 2:]], 1))

    cell, x = make(forward, norm=nn.LayerNorm(2).double()), inputs()
    flow = linearized(cell, x)
    assert not flow.untraced
    assert error_of(flow, cell, x) < 1e-4


class Kept(torch.autograd.Function):
    """A product whose backward pass reads the weight anew."""

    @staticmethod
    def forward(ctx, h, w):
        ctx.w = w
        ctx.save_for_backward(h)
        return h @ w

    @staticmethod
    def backward(ctx, g):
        (h,) = ctx.saved_tensors
        return g @ ctx.w.T, h.T @ g


ELSEWHERE = torch.ones(UNITS).double()


def signs(x):
    """Numbers of Python, which each row decides otherwise: a trace does not follow them."""
    return torch.tensor([[1.0 if float(row.sum()) > 0 else -1.0] for row in x]).double()


def with_constants(m, x, z):
    h = m.w(z) * torch.from_numpy(m.gain) * m.gains[0] + m.i(x) * ELSEWHERE
    return torch.tanh(h) * signs(x)


def branching(m, x, z):
    return torch.tanh(m.w(z) * m.gain + m.i(x) * m.gains[0]) * signs(x)


def checkpointed(m, x, z):
    return checkpoint(branching, m, x, z, use_reentrant=False)


def kept(m, x, z):
    return torch.tanh(Kept.apply(z, m.w.weight) + m.i(x) * m.gain) * signs(x)


@pytest.mark.parametrize("forward", [branching, checkpointed, kept])
def test_what_its_user_changes_later_changes_no_flow(forward: Callable) -> None:
    cell, x = make(forward, gain=torch.rand(UNITS).double(), gains=[torch.rand(UNITS).double()]), inputs()
    flow = linearized(cell, x)
    assert flow.untraced
    before = flow.ntk.dense(), flow.K.dense()
    with torch.no_grad():
        for tensor in (*cell.parameters(), cell.gain, cell.gains[0], x):
            tensor.mul_(1.5)
    changed = [tensor.detach().clone() for tensor in (*cell.parameters(), cell.gain)]
    assert torch.equal(flow.ntk.dense(), before[0])
    assert torch.equal(flow.K.dense(), before[1])
    assert all(map(torch.equal, changed, (*cell.parameters(), cell.gain)))


def test_constants_of_a_flow_are_its_own() -> None:
    base, gain = torch.ones(1).double(), np.array([1.0, 2, 3])
    cell = make(with_constants, gain=gain, gains=[base.expand(UNITS)])
    flow = linearized(cell, inputs())
    assert flow.untraced
    before = flow.ntk.dense()
    gain[:] = 0
    base.mul_(0.5)
    ELSEWHERE.mul_(2)
    cell.i.weight.data = torch.zeros(7, 2).double()
    assert torch.equal(flow.ntk.dense(), before)
    assert not gain.any() and float(base) == 0.5


def writing(m, x, z):
    m.seen.add_(z.detach().mean(0))
    m.record.last = m.record.last + 1
    m.record.all.append(1)
    m.table += 1
    return torch.tanh(m.w(z) + m.i(x))


def test_plain_tensors_and_records_are_left_alone() -> None:
    record = SimpleNamespace(last=0, all=[])
    cell = make(writing, seen=torch.zeros(UNITS).double(), record=record, table=np.zeros(2))
    cell.fixed = np.frombuffer(b"12345678")  # which cannot be written to
    flow = linearized(cell, inputs())
    assert not cell.seen.any() and not cell.table.any()
    assert record == SimpleNamespace(last=0, all=[]) and cell.record is record
    assert error_of(flow, cell, inputs()) < 1e-12


@pytest.mark.parametrize("state", [["0"], ["0", "1"], ["1", "2"], ["0", "2"]])
def test_what_is_written_into_a_value_afterwards_is_not_the_value(state: list[str]) -> None:
    flows = []
    for inplace in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(INPUTS, 5), nn.ReLU(inplace), nn.Linear(5, 2)).double()
        flows.append(kp.linearize(kp.solve(kp.StaticProblem(net, inputs()[:, 0], state=state))))
    plain, written = flows
    assert torch.equal(plain.solution.state, written.solution.state)
    assert torch.allclose(plain.ntk.dense(), written.ntk.dense(), atol=1e-12)
    assert not written.untraced


def in_single_precision(m, x, z):
    wide = (z.float() @ m.wide.float()).tanh() @ m.wide.float().T
    return torch.tanh(m.w(z) + m.i(x) + 0.1 * wide.double())


def test_a_part_of_lower_precision_may_round_otherwise_for_one_trial() -> None:
    cell = make(in_single_precision, wide=nn.Parameter(torch.randn(UNITS, 512).double()))
    assert error_of(linearized(cell, inputs()), cell, inputs()) < 1e-5


class PerTrial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mask = torch.zeros(TRIALS, TIMES, dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=self.mask)[0]


def reentrant(m, x, z):
    return checkpoint(lambda x, z: torch.tanh(m.w(z) + m.i(x)), x, z, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_errors_of_torch_are_said_in_words() -> None:
    with pytest.raises(ValueError, match=r"holds for each trial.*give it in x"):
        kp.solve(kp.StaticProblem(PerTrial(), torch.randn(TRIALS, TIMES, 4), state=""))
    with pytest.raises(ValueError, match=r"use_reentrant=False"):
        linearized(make(reentrant), inputs())
    with pytest.raises(ValueError, match=r"parameter weight has no shape yet; call the model once"):
        kp.solve(kp.StaticProblem(nn.LazyLinear(3), torch.randn(2, 3), state=""))
    with pytest.raises(ValueError, match=r"\(2, 0\), which holds no number"):
        kp.solve(kp.StaticProblem(make(lambda m, x: m.w(x)[:, :0]).float(), torch.randn(2, 3), state=""))
    with pytest.raises(ValueError, match=r"numbers for each trial \(give them as inputs x\)"):
        linearized(make(lambda m, x, z: torch.tanh(m.w(z) + m.i(x)) * torch.arange(1, 1 + TRIALS)[:, None]), inputs())


def test_a_network_that_autograd_knows_no_way_through_is_refused() -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(self.first(x).detach().numpy())

    with pytest.raises(ValueError, match=r"have no derivative.*numpy.*straight-through"):
        kp.linearize(kp.solve(kp.StaticProblem(Outside(), torch.randn(2, 3), state="")))


class Remembers(Base):
    """Its gradient, but not its value, hangs on the state two steps before."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        h, self.last = getattr(self, "last", z), z
        h = z if h.shape != z.shape else h
        return torch.tanh(self.w(z) + self.i(x) + 0.3 * (h - h.detach()))


@pytest.mark.filterwarnings("ignore::kpflow_dyn._linearize.UntracedWarning")
def test_a_gradient_two_steps_back_is_seen_where_few_steps_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpflow_dyn._torch.solving.PART_BYTES", 1)
    cell, x = Remembers().double(), torch.randn(2, 6, INPUTS).double()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))
    z, states = torch.zeros(2, UNITS).double(), []
    cell.__dict__.pop("last", None)
    for t in range(6):
        states.append(z := cell(x[:, t], z))
    q = torch.randn(2, 6, UNITS).double()
    parameters = list(cell.parameters())
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(torch.stack(states, 1), parameters, q)])
    assert flow.untraced
    torch.testing.assert_close(flow.J.T.mv(q), gradient)


class Hypot(nn.Module):
    """Detached, and without a number for a derivative where x is 0; in a parameter that is not the first."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.b = nn.Linear(4, 4), nn.ParameterList([torch.zeros(4)]), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) / (1 + torch.hypot(self.g[0], x)).detach())


@pytest.mark.filterwarnings("ignore::kpflow_dyn._linearize.UntracedWarning")
def test_what_is_no_number_at_a_site_is_seen_at_any_parameter() -> None:
    x = torch.randn(3, 4)
    x[0, 0] = 0
    flow = kp.linearize(kp.solve(kp.StaticProblem(Hypot(), x, state="")))
    assert flow.core.dense().isfinite().all()
