"""Networks, fixed points and free forms by autograd alone: every operator against dense Jacobians, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import network_registry as registry
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kpflow_dyn as kp
import kpflow_dyn._implicit.inverse
import kpflow_dyn._jax.networks
import kpflow_dyn._torch.networks
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._learning.objective import Objective

EVERY = [(library, name) for library in ("torch", "jax") for name in getattr(registry, library.upper())]


def some_slow(cases: Any, quick: Any) -> list[Any]:
    """The cases, all but these marked as slow."""
    return [case if case in quick else pytest.param(*np.atleast_1d(case), marks=pytest.mark.slow) for case in cases]


def close(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    a, b = to_numpy(a), to_numpy(b)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-300)


@pytest.fixture
def untraceable(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets every trace fail from then on."""

    def fail(self: Any) -> None:
        raise ValueError("nothing can be traced")

    def off() -> None:
        for backend in (kpflow_dyn._torch.networks, kpflow_dyn._jax.networks):
            for kind in (backend.Network, backend.FixedPoint, backend.FreeForm):
                monkeypatch.setattr(kind, "traced", fail)

    return off


def untraced(problem: Any, because: str = "", **options: Any) -> kp.Flow:
    """The flow of a problem, by autograd alone."""
    with pytest.warns(kp.UntracedWarning, match=because):
        flow = kp.linearize(kp.solve(problem), **options)
    assert flow.untraced and flow.sites == []
    return flow


def check_identities(flow: kp.Flow) -> None:
    J = to_numpy(flow.J.dense())
    close(flow.ntk.dense(), J @ J.T)
    close((flow.P @ flow.K @ flow.P.T).dense(), J @ J.T)
    close((flow.P @ flow.B @ flow.core @ flow.B.T @ flow.P.T).dense(), J @ J.T)
    close((flow.P @ flow.P.inv).dense(), np.eye(len(J)))
    for name in ("P", "K", "core", "B", "J", "ntk"):
        assert kp.check_adjoint(getattr(flow, name), seed=3) < 1e-12


def rows_of(outputs: Tensor, module: nn.Module) -> Tensor:
    """The Jacobian of outputs in the parameters of a module, by one reverse pass for each."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    rows = []
    for out in outputs.flatten():
        gradients = torch.autograd.grad(out, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(gradients, parameters, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
    return torch.stack(rows)


# The networks of the registry


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("library", "name"), some_slow(EVERY, [("torch", "gpt"), ("jax", "mlp")]))
def test_both_roads_give_the_same_operators(library: str, name: str, untraceable: Callable[[], None]) -> None:
    case = getattr(registry, library.upper())[name]
    problem = getattr(case, f"{library}_problem")(case.state or "")
    traced = kp.linearize(kp.solve(problem))
    assert not traced.untraced and traced.sites
    untraceable()
    flow = untraced(problem, because="nothing can be traced")
    assert flow.ntk.domain.matches(traced.ntk.domain) and flow.solution.sites == traced.solution.sites
    close(flow.solution.state, traced.solution.state, 1e-13)
    for operator in ("J", "P", "K", "ntk"):
        close(getattr(flow, operator).dense(), getattr(traced, operator).dense())
    close(flow.P.inv.dense(), traced.P.inv.dense())
    check_identities(flow)


def test_without_names_the_state_is_the_output(untraceable: Callable[[], None]) -> None:
    problem = registry.TORCH["mlp"].torch_problem(None)
    untraceable()
    flow = untraced(problem, because="The state is the output alone; name modules")
    close(flow.J.dense(), rows_of(problem.net(problem.x), problem.net))
    check_identities(flow)
    with pytest.warns(kp.UntracedWarning):
        part = kp.linearize(flow.solution, params=["0.weight"])
    close(part.J.dense(), flow.J.dense()[:, :15])
    close(flow.only("0.weight").ntk.dense(), part.ntk.dense())


# Models that a trace does not see through


class Weight(nn.Module):
    """x -> function(weight, x)."""

    def __init__(self, function: Callable[..., Tensor], constant: Tensor | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
        self.function: Callable[..., Tensor] = function
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.w, x) if self.constant is None else self.function(self.w, x, self.constant)


class Doubled(torch.autograd.Function):
    """The identity, with twice the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * gradient


class OnceDifferentiable(torch.autograd.Function):
    """sin, whose backward has no derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * ctx.saved_tensors[0].cos()


def partly_without_gradient(w: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = w.norm()
    return torch.tanh(x @ w.T) / scale


def on_edges(w: Tensor, x: Tensor, edges: Tensor) -> Tensor:
    kept = edges[:, edges[0] != edges[1]]
    return torch.zeros_like(x).index_add(1, kept[1], (x @ w)[:, kept[0]])


def branching(w: Tensor, x: Tensor) -> Tensor:
    return torch.stack([row @ w if row.sum() > 0 else -row @ w**3 for row in x])


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "mask": lambda w, x: x @ (w * (w.abs() > 0.5)).T,
    "detached_norm": lambda w, x: x * ((v := w.sum(1)) / v.detach().norm()),
    "straight_through": lambda w, x: x @ (w + (torch.round(w) - w).detach()).T,
    "spectrum": lambda w, x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(w[0]), n=4),
    "complex": lambda w, x: torch.fft.ifft(torch.fft.fft(x @ w) * torch.complex(w[0], w[1])).real,
    "solve": lambda w, x: torch.linalg.solve(w + 9 * torch.eye(4, dtype=w.dtype), x.T).T,
    "no_grad": partly_without_gradient,
    "custom": lambda w, x: Doubled.apply(torch.tanh(x @ w)),
    "custom_on_weights": lambda w, x: torch.tanh(x @ Doubled.apply(w)),
    "once_differentiable": lambda w, x: OnceDifferentiable.apply(x @ w),
    "hardsigmoid": lambda w, x: nn.functional.hardsigmoid(x @ w),
    "branch": branching,
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "group_norm": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4)), (4, 2, 2)),
    "instance_norm": (lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.InstanceNorm1d(4, affine=True)), (4, 3)),
    "local_response": (lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.LocalResponseNorm(2)), (4, 3)),
    "batch_norm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(), (4,)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 2, 2), (4, 3)),
    "bag": (lambda: nn.EmbeddingBag(7, 4, mode="mean"), ()),
    "padded": (lambda: nn.Embedding(7, 4, padding_idx=0), ()),
    "bounded": (lambda: nn.Embedding(7, 4, max_norm=0.5), ()),
    "spectral_norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), (4,)),
}

QUICK = ["mask", "spectrum", "complex", "no_grad", "once_differentiable", "branch", "group_norm", "padded", "bounded"]


def network(name: str) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    if name == "edges":
        return Weight(on_edges, torch.tensor([[0, 1, 2, 2], [1, 2, 2, 3]])), torch.randn(3, 4, dtype=torch.float64)
    if name in FUNCTIONS:
        return Weight(FUNCTIONS[name]), torch.randn(3, 4, dtype=torch.float64)
    make, shape = LAYERS[name]
    x = torch.randn(3, *shape, dtype=torch.float64) if shape else torch.randint(0, 7, (3, 5))
    return make().double(), x


@pytest.mark.filterwarnings("ignore::kpflow_dyn.UntracedWarning")
@pytest.mark.parametrize("name", some_slow([*FUNCTIONS, "edges", *LAYERS], QUICK))
def test_whatever_has_a_derivative_is_answered(name: str) -> None:
    net, x = network(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    flow = kp.linearize(kp.solve(kp.StaticProblem(net, x, "")))
    kernel = kp.empirical_ntk(net, x)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    J = rows_of(net(x), net)
    close(flow.J.dense(), J)
    check_identities(flow)
    outputs = len(J) // len(x)
    close(kernel.permute(0, 2, 1, 3).reshape(len(J), -1), J @ J.T)
    assert kernel.shape == (len(x), len(x), outputs, outputs)


class Tied(nn.Module):
    """Tokens in, scores out, by one matrix with a row that stands for none."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.o = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 7, bias=False)
        self.o.weight = self.e.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.o(torch.tanh(self.e(tokens).sum(1)))


class Aliased(nn.Module):
    """A weight that is reached by its name and by a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.also = [self.a.weight]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.also[0].T) + self.a(x)


def with_hooks() -> Any:
    net: Any = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    net[1].register_full_backward_hook(lambda m, given, out: (given[0] * 3,))
    net[1].register_forward_hook(lambda m, args, out: out**2)
    net[0].weight.register_hook(lambda gradient: 2 * gradient)
    return net


@pytest.mark.filterwarnings("ignore::kpflow_dyn.UntracedWarning")
@pytest.mark.parametrize("make", [Tied, Aliased, with_hooks])
def test_gradients_are_those_of_backward(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net = make().double()
    tokens = torch.tensor([[0, 1, 2], [0, 0, 3], [4, 5, 0]])
    x = tokens if make is Tied else torch.randn(3, 4, dtype=torch.float64)
    J = rows_of(net(x), net)
    flow = kp.linearize(kp.solve(kp.StaticProblem(net, x, "")))
    close(flow.J.dense(), J)
    check_identities(flow)
    close(kp.empirical_ntk(net, x).permute(0, 2, 1, 3).reshape(len(J), -1), J @ J.T)


def test_values_on_the_way_by_name_where_hooks_change_them() -> None:
    torch.manual_seed(0)
    net, x = with_hooks(), torch.randn(3, 4, dtype=torch.float64)
    flow = untraced(kp.StaticProblem(net, x, ("0", "1")), because="a backward hook of 1")
    first = net[0](x)
    state = torch.cat([first, net[1](first)], 1).reshape(3, 2, 3)
    close(flow.solution.state, state.detach(), 1e-14)
    close(flow.J.dense(), rows_of(state, net))
    check_identities(flow)


def test_training_afterwards_changes_nothing() -> None:
    net, x = network("branch")
    flow = untraced(kp.StaticProblem(net, x, ""), because="could not be traced")
    J = flow.J.dense()
    with torch.no_grad():
        net.w.add_(1.0)
    close(flow.J.dense(), J, 0)
    with pytest.raises(ValueError, match="solve again"):
        kp.linearize(flow.solution)


class Seen(nn.Module):
    """Time first inside, and a layer on all tokens of all trials side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.read = nn.GRU(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x.transpose(0, 1))
        return self.read(states.transpose(0, 1).reshape(-1, 3)).reshape(len(x), -1)


def test_trials_may_lie_on_any_axis(untraceable: Callable[[], None]) -> None:
    torch.manual_seed(0)
    net, x = Seen().double(), torch.randn(2, 5, 4, dtype=torch.float64)
    untraceable()
    flow = untraced(kp.StaticProblem(net, x, "read"))
    close(flow.solution.state.reshape(2, -1), net(x).detach(), 1e-14)
    close(flow.J.dense(), rows_of(net(x), net))
    states, _ = net.rnn(x.transpose(0, 1))
    within = untraced(kp.StaticProblem(net, x, "rnn"))
    close(within.solution.state.flatten(1), states.transpose(0, 1).flatten(1).detach(), 1e-14)
    close(within.J.dense(), rows_of(states.transpose(0, 1), net))
    check_identities(within)


class Several(nn.Module):
    """A layer that is called twice, one that is not, and modules that give what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.same = nn.Linear(3, 3), nn.Linear(3, 3), nn.Identity()
        self.pair = nn.LSTM(3, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.same(torch.tanh(self.twice(torch.tanh(self.twice(x)))))
        return self.pair(y[:, None])[0].sum(1)


def test_which_values_make_the_state(untraceable: Callable[[], None]) -> None:
    torch.manual_seed(0)
    net, x = Several().double(), torch.randn(2, 3, dtype=torch.float64)
    untraceable()
    flow = untraced(kp.StaticProblem(net, x, ("twice", "pair")))
    assert flow.solution.sites == ("twice", "twice", "pair") and flow.ntk.domain.axes == ("trial", "unit")
    first = net.twice(x)
    second = net.twice(torch.tanh(first))
    last = net.pair(torch.tanh(second)[:, None])[0].sum(1)
    state = torch.cat([first, second, last], 1)
    close(flow.solution.state, state.detach(), 1e-14)
    close(flow.J.dense(), rows_of(state, net))
    check_identities(flow)
    with pytest.raises(ValueError, match="calls none of the modules"):
        kp.solve(kp.StaticProblem(net, x, "never"))
    with pytest.raises(ValueError, match=r"\['0', '1'\] give the very same value"):
        kp.solve(kp.StaticProblem(nn.Sequential(nn.Linear(3, 3), nn.Identity()).double(), x, ("0", "1")))


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


def test_buffers_may_change_where_it_does_no_harm() -> None:
    net, x = Counting().double(), torch.randn(3, 3, dtype=torch.float64)
    flow = untraced(kp.StaticProblem(net, x, ""), because="writes to its own calls")
    assert net.calls == 0
    close(flow.J.dense(), rows_of(net(x), net))


class Noisy(nn.Module):
    hidden_size = 3

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, z: Tensor | float = 0.0) -> Tensor:
        return self.layer(x) + 0.1 * z + torch.randn_like(x)


@pytest.mark.parametrize("trials", [1, 3])
def test_random_networks_are_refused(trials: int) -> None:
    with pytest.raises(ValueError, match="random"):
        kp.solve(kp.StaticProblem(Noisy(), torch.randn(trials, 3)))


@pytest.mark.parametrize("mix", [lambda x: x - x.mean(0), lambda x: x.cumsum(0), lambda x: x.flip(0)])
def test_trials_that_influence_each_other_are_refused(
    mix: Callable[[Tensor], Tensor], untraceable: Callable[[], None]
) -> None:
    untraceable()
    net = Weight(lambda w, x: torch.tanh(mix(x) @ w))
    with pytest.raises(ValueError, match="influence each other"):
        kp.solve(kp.StaticProblem(net, torch.randn(3, 4, dtype=torch.float64)))


# Fixed points and free forms


@pytest.mark.parametrize("dense", [1024, 0])
def test_fixed_points(dense: int, untraceable: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kpflow_dyn._implicit.inverse, "DENSE", dense)
    torch.manual_seed(0)
    f, x = registry.Equilibrium().double(), torch.randn(2, 3, dtype=torch.float64)
    problem = kp.FixedPointProblem(f, x, torch.zeros(4, dtype=torch.float64))
    traced = kp.linearize(kp.solve(problem))
    untraceable()
    flow = untraced(problem, because="nothing can be traced")
    for operator in ("P", "K", "J", "ntk"):
        close(getattr(flow, operator).dense(), getattr(traced, operator).dense())
    z = flow.solution.state.clone().requires_grad_()
    image = f(z, x)
    A = torch.stack([torch.autograd.grad(out, z, retain_graph=True)[0].flatten() for out in image.flatten()])
    close(flow.J.dense(), torch.linalg.solve(torch.eye(8, dtype=torch.float64) - A, rows_of(image, f)))
    check_identities(flow)


class StraightThrough(nn.Module):
    """Rounded states whose gradient passes, in a map that contracts."""

    hidden_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.W, self.U = nn.Linear(4, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        y = torch.tanh(self.W(z) + self.U(x))
        return (y + ((8 * y).round() / 8 - y).detach()) / 4


@pytest.mark.filterwarnings("ignore::kpflow_dyn.UntracedWarning")
def test_a_fixed_point_with_a_gradient_of_its_own() -> None:
    torch.manual_seed(1)
    f, x = StraightThrough().double(), torch.randn(2, 3, dtype=torch.float64)
    with torch.no_grad():
        f.W.weight /= 8
    flow = kp.linearize(kp.solve(kp.FixedPointProblem(f, x)))
    z = flow.solution.state.clone().requires_grad_()
    image = f(x, z)
    close(image.detach(), z.detach(), 1e-12)
    A = torch.stack([torch.autograd.grad(out, z, retain_graph=True)[0].flatten() for out in image.flatten()])
    close(flow.J.dense(), torch.linalg.solve(torch.eye(8, dtype=torch.float64) - A, rows_of(image, f)))
    check_identities(flow)


def free(s: Any, p: dict[str, Any], x: Any) -> Any:
    return s + 0.3 * (s @ p["a"]) ** 3 - x * p["b"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_free_forms(library: str, untraceable: Callable[[], None]) -> None:
    draw = np.random.default_rng(0).standard_normal
    as_array = torch.as_tensor if library == "torch" else jnp.asarray
    params = {"a": as_array(draw((3, 3))), "b": as_array(draw(3)), "n": as_array(np.arange(2))}
    problem = kp.ImplicitProblem(free, as_array(np.zeros((2, 3))), params, as_array(draw((2, 3))))
    traced = kp.linearize(kp.solve(problem))
    untraceable()
    flow = untraced(problem, because="nothing can be traced")
    assert list(flow.parameters) == list(traced.parameters) and len(flow.parameters) == 2
    for operator in ("P", "K", "J", "ntk"):
        close(getattr(flow, operator).dense(), getattr(traced, operator).dense())
    check_identities(flow)


@pytest.mark.filterwarnings("ignore::kpflow_dyn.UntracedWarning")
def test_a_module_of_parameters_with_an_alias() -> None:
    torch.manual_seed(0)
    module, state = Aliased().double(), torch.zeros(2, 4, dtype=torch.float64)
    flow = kp.linearize(kp.solve(kp.ImplicitProblem(lambda s, m: s - 0.1 * m(s), state, module)))
    s = flow.solution.state.clone().requires_grad_()
    F = s - 0.1 * module(s)
    A = torch.stack([torch.autograd.grad(out, s, retain_graph=True)[0].flatten() for out in F.flatten()])
    close(flow.J.dense(), -torch.linalg.solve(A, rows_of(F, module)))
    check_identities(flow)


# JAX


@jax.custom_vjp
def rounded(x: jax.Array) -> jax.Array:
    return jnp.round(x)


rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, q: (2 * q,))


class Surrogate(eqx.Module):
    """Rounds, with a gradient of its own."""

    inner: eqx.nn.Linear
    out: eqx.nn.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(jnp.tanh(rounded(3 * self.inner(x))))


def jacobian_of(net: Any, x: jax.Array) -> jax.Array:
    """Of the outputs on all trials, in the arrays of a network by name."""
    arrays, rest = eqx.partition(net, eqx.is_inexact_array)
    found = jax.jacrev(lambda arrays: jax.vmap(eqx.combine(arrays, rest))(x).ravel())(arrays)
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.flatten_with_path(found)[0]}
    return jnp.concatenate([named[name].reshape(named[name].shape[0], -1) for name in sorted(named)], 1)


@pytest.mark.usefixtures("x64")
@pytest.mark.filterwarnings("ignore::kpflow_dyn.UntracedWarning")
def test_a_backward_pass_of_its_own_in_jax() -> None:
    a, b, c = jax.random.split(jax.random.key(0), 3)
    net, x = Surrogate(eqx.nn.Linear(3, 4, key=a), eqx.nn.Linear(4, 2, key=b)), jax.random.normal(c, (3, 3))
    J = jacobian_of(net, x)
    flow = kp.linearize(kp.solve(kp.StaticProblem(net, x, ("inner", ""))))
    close(flow.J.dense().reshape(3, 6, -1)[:, 4:].reshape(6, -1), J)
    check_identities(flow)
    close(kp.empirical_ntk(net, x).transpose(0, 2, 1, 3).reshape(6, 6), J @ J.T)


class Mapped(eqx.Module):
    """A layer on every token by vmap, then one in a scan."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = jax.vmap(self.first)(x)

        def step(z: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            z = jnp.tanh(self.second(z) + x)
            return z, z

        return jax.lax.scan(step, tokens[0], tokens, reverse=True)[0]


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_parts_that_are_mapped_or_swept(untraceable: Callable[[], None]) -> None:
    a, b, c = jax.random.split(jax.random.key(0), 3)
    net, x = Mapped(eqx.nn.Linear(2, 3, key=a), eqx.nn.Linear(3, 3, key=b)), jax.random.normal(c, (2, 4, 2))
    problem = kp.StaticProblem(net, x, ("first", "second", ""))
    traced = kp.linearize(kp.solve(problem))
    assert not traced.untraced
    untraceable()
    flow = untraced(problem)
    assert flow.solution.sites == traced.solution.sites == ("first", *["second"] * 4, "")
    for operator in ("P", "K", "J"):
        close(getattr(flow, operator).dense(), getattr(traced, operator).dense())
    close(flow.J.dense().reshape(2, -1, flow.J.domain.size)[:, -3:].reshape(6, -1), jacobian_of(net, x))


# What is built on networks


@pytest.mark.parametrize("name", ["custom", "mask"])
def test_the_loss_of_a_gradient_flow_has_the_gradient_of_backward(name: str) -> None:
    net, x = network(name)
    objective = Objective(kp.solve(kp.StaticProblem(net, x, "")), lambda y: (y**3).sum(), None)
    point = objective(objective.start)
    loss = (net(x) ** 3).sum()
    parameters = list(net.parameters())
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    whole = torch.cat([gradient.flatten() for gradient in gradients])
    assert point.loss == pytest.approx(loss.item(), rel=1e-12)
    close(point.gradient, whole.detach())
    direction = torch.randn(len(whole), dtype=torch.float64)
    twice = torch.autograd.grad(whole, parameters, direction)
    close(point.hessian(direction[None])[0], torch.cat([part.flatten() for part in twice]))


def test_aliases_are_no_function_of_the_parameters_alone(untraceable: Callable[[], None]) -> None:
    net, x = Aliased().double(), torch.randn(3, 4, dtype=torch.float64)
    untraceable()
    with pytest.raises(ValueError, match=r"gradient in a\.weight is off"):
        kp.gradient_flow(kp.StaticProblem(net, x, ""), lambda y: (y**2).sum(), span=1.0)


# Vectors of images


def test_tokens_may_lie_on_several_axes() -> None:
    net, x = nn.Conv2d(2, 3, 2).double(), torch.randn(2, 2, 4, 3, dtype=torch.float64)
    flow = kp.linearize(kp.solve(kp.StaticProblem(net, x, "")))
    q = torch.randn(5, *net(x).shape, dtype=torch.float64)
    assert flow.ntk.domain.shape == (2, 3, 6)
    close(flow.J.T.mv(q), flow.J.T.mv(q.flatten(3)), 0)
    with pytest.raises(ValueError, match=r"q has shape \(5, 2, 3, 2, 2\)"):
        flow.J.T.mv(q[..., :2, :])
