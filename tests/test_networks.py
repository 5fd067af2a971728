"""Networks, fixed points and free forms: their operators against dense Jacobians of the real models, in float64."""

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
from torch.func import functional_call, jacrev

import kpflow_dyn as kp
import kpflow_dyn._implicit.inverse
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._implicit.results import values_named
from kpflow_dyn._torch.watching import calling

(OUTPUT,) = values_named([""], [])
QUICK = {
    *(("torch", name, False) for name in ("mlp", "gpt", "mixture", "bidirectional")),
    *(("torch", name, True) for name in ("gpt", "convolution")),
    ("jax", "tied_embedding", True),
}
EVERY = [
    (library, name, watched)
    for library in ("torch", "jax")
    for name, case in getattr(registry, library.upper()).items()
    for watched in (False, True)
    if case.state or not watched
]
CASES = [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in EVERY]


def named(case: tuple[str, str, bool]) -> str:
    return "-".join([*case[:2], "modules" if case[2] else "sites"])


def close(a: Any, b: Any, tolerance: float = 1e-9) -> None:
    a, b = to_numpy(a), to_numpy(b)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-300)


def problem_of(library: str, name: str, watched: bool) -> kp.StaticProblem:
    case = getattr(registry, library.upper())[name]
    return getattr(case, f"{library}_problem")(case.state if watched else None)


@pytest.fixture(scope="module", params=CASES, ids=named)
def flow(request: pytest.FixtureRequest, x64: None) -> kp.Flow:
    return kp.linearize(kp.solve(problem_of(*request.param)))


def states_of_modules(problem: kp.StaticProblem) -> tuple[Callable, dict[str, Tensor]]:
    """theta -> the outputs of the named modules [trial, ...], by hooks on the real network."""
    net, names = problem.net, problem.state

    def outputs(values: dict[str, Tensor]) -> list[Tensor]:
        found: dict[str, Tensor] = {}
        hooks = [
            net.get_submodule(n).register_forward_hook(lambda m, a, out, n=n: found.__setitem__(n, OUTPUT.of(out)))
            for n in names
        ]

        class Call:
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return functional_call(net, values, args, kwargs)

        calling(net)(Call(), problem.x)
        for hook in hooks:
            hook.remove()
        return [found[n] for n in names]

    return outputs, {n: p.detach() for n, p in net.named_parameters()}


def test_state_is_what_the_modules_give_and_its_jacobian_theirs(flow: kp.Flow) -> None:
    problem = flow.solution.problem
    if problem.state is None or not isinstance(problem.x, torch.Tensor):
        pytest.skip("by the gradient step")
    function, values = states_of_modules(problem)
    layout = flow.solution.layout

    def state(values: dict[str, Tensor]) -> Tensor:
        outputs = zip(*function(values), strict=True)  # trial by trial
        rows = [[out.reshape(shape) for out, shape in zip(row, layout.shapes, strict=True)] for row in outputs]
        return torch.stack([layout.join(row) for row in rows])

    close(flow.solution.state, state(values), 1e-12)
    jacobian = jacrev(state, chunk_size=1)(values)
    close(flow.J.dense(), torch.cat([jacobian[n].reshape(flow.J.codomain.size, -1) for n in values], 1))


def test_operators_compose(flow: kp.Flow) -> None:
    J = to_numpy(flow.J.dense())
    close(flow.ntk.dense(), J @ J.T)
    close((flow.P @ flow.K @ flow.P.T).dense(), J @ J.T)
    close((flow.P @ flow.B @ flow.core @ flow.B.T @ flow.P.T).dense(), J @ J.T)
    close(flow.P.dense(), np.linalg.inv(to_numpy(flow.P.inv.dense())))


@pytest.mark.parametrize("name", ["P", "K", "core", "B", "J", "ntk"])
def test_adjointness(flow: kp.Flow, name: str) -> None:
    assert kp.check_adjoint(getattr(flow, name), seed=3) < 1e-12


def test_core_spectrum_follows_from_the_variables(flow: kp.Flow) -> None:
    spectrum = flow.core.spectrum()
    if spectrum is None:
        assert not all(flow.core.separate)
        return
    claimed = np.sort(np.repeat(*spectrum))[::-1]
    dense = np.linalg.eigvalsh(to_numpy(flow.core.dense()))[::-1]
    size = min(len(claimed), len(dense))
    close(claimed[:size], dense[:size], 1e-11)
    assert claimed[size:].sum() + np.abs(dense[size:]).sum() < 1e-10 * dense.sum()


def moved(problem: Any, name: str, gradient: dict[str, Any], eta: float) -> Any:
    """The problem whose model took a step against the gradient."""
    model = getattr(problem, name)
    if isinstance(model, nn.Module):
        import copy

        stepped = copy.deepcopy(model)
        with torch.no_grad():
            for n, p in stepped.named_parameters():
                p -= eta * gradient[n]
        return problem.remake(**{name: stepped})
    from kpflow_dyn._jax.checks import named_parameters, with_parameters

    known = named_parameters(model)
    return problem.remake(**{name: with_parameters(model, {n: known[n] - eta * gradient[n] for n in known})})


def check_gradient_step(flow: kp.Flow, name: str) -> None:
    state, problem = flow.solution.state, flow.solution.problem
    target = np.random.default_rng(0).standard_normal(tuple(state.shape))
    error = state - kp._arrays.like_numpy(target, state)
    predicted, gradient = -to_numpy(flow.ntk.mv(error)), flow.as_parameters(flow.J.T.mv(error))
    errors = []
    for eta in (1e-4, 1e-5):
        there = to_numpy(kp.solve(moved(problem, name, gradient, eta)).state) - to_numpy(state)
        errors.append(np.linalg.norm(there / eta - predicted) / np.linalg.norm(predicted))
    assert errors[1] < 1e-2
    assert errors[1] < 0.15 * errors[0] + 1e-9


def test_gradient_step_moves_the_state_by_the_ntk(flow: kp.Flow) -> None:
    check_gradient_step(flow, "net")


def test_of_an_mlp_the_core_is_the_gram_matrix_of_its_layers_inputs() -> None:
    flow = kp.linearize(kp.solve(registry.TORCH["mlp"].torch_problem(None)))
    x, net = flow.solution.problem.x, flow.solution.problem.net
    inputs = [x, torch.tanh(net[0](x)), nn.functional.silu(net[2](torch.tanh(net[0](x))))]
    K = flow.K.dense().reshape(flow.K.domain.shape * 2)
    start = 0
    for v, layer in zip(inputs, (net[0], net[2], net[4]), strict=True):
        m = layer.out_features
        block = K[:, start : start + m, :, start : start + m]
        close(block, torch.einsum("bc,ij->bicj", v @ v.T + 1, torch.eye(m, dtype=torch.float64)).detach(), 1e-12)
        start += m
    names = {site.name: site for site in flow.sites}
    close(names["2.weight"].inputs[:, 0], inputs[1].detach(), 1e-12)
    close(names["2.weight"].weight, net[2].weight.detach(), 0)


def test_patches_of_a_convolution() -> None:
    flow = kp.linearize(kp.solve(registry.TORCH["convolution"].torch_problem(None)))
    site = next(site for site in flow.sites if site.name == "0.weight")
    patches = nn.functional.unfold(flow.solution.problem.x, 3, padding=1).transpose(1, 2)
    close(site.inputs, patches, 1e-14)
    close(site.weight, flow.solution.problem.net[0].weight.detach().reshape(3, -1), 0)


def test_axes_of_the_state() -> None:
    def axes(name: str, state: tuple[str, ...] | None) -> tuple[str, ...]:
        return kp.linearize(kp.solve(registry.TORCH[name].torch_problem(state))).ntk.domain.axes

    assert axes("mlp", None) == ("trial", "unit")
    assert axes("residual", ("first", "second")) == ("trial", "site", "token", "unit")
    assert axes("residual", ("second",)) == ("trial", "token", "unit")
    assert axes("encoder", None) == ("trial", "token", "unit")
    assert axes("convolution", ("3",)) == ("trial", "unit", "token")
    assert axes("convolution", None) == ("trial", "unit")


def test_only_some_parameters_learn() -> None:
    solution = kp.solve(registry.TORCH["gpt"].torch_problem(("mlp",)))
    whole, part = kp.linearize(solution), kp.linearize(solution, params=["qkv.weight", "mlp.1.bias"])
    theta = whole.as_parameters(whole.J.dense())
    wanted = torch.cat([theta[name].reshape(len(whole.J.dense()), -1) for name in ("qkv.weight", "mlp.1.bias")], 1)
    close(part.J.dense(), wanted)
    assert {site.name for site in part.sites} == {"qkv.weight", "mlp.1.bias"}


@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_metrics_choices_rules_and_readouts_of_networks(name: str) -> None:
    solution = kp.solve(registry.TORCH[name].torch_problem(None))
    flow = kp.linearize(solution)
    J, ntk = flow.J.dense(), flow.ntk.dense()
    close(kp.linearize(solution, metric=kp.LearningRates(0.5)).ntk.dense(), ntk / 2)
    first, *_ = flow.parameters
    only, size = flow.only(first), flow.parameters[first].numel()
    close(only.ntk.dense(), J[:, :size] @ J[:, :size].T)
    close((only.P @ only.B @ only.core @ only.B.T @ only.P.T).dense(), only.ntk.dense())
    assert kp.contributions(flow)[first].value == pytest.approx(float((J[:, :size] ** 2).sum()))
    identity = torch.eye(len(J), dtype=torch.float64)
    close(kp.learning_rules.gauss_newton(flow, 0.5).dense(), ntk @ torch.linalg.inv(ntk + 0.5 * identity))
    units = flow.ntk.domain.shape[-1]
    readout = nn.Linear(units, 2).double()
    C = torch.kron(torch.eye(len(J) // units, dtype=torch.float64), readout.weight.detach())
    s = solution.state.reshape(-1, units)
    own = torch.kron(s @ s.T + 1, torch.eye(2, dtype=torch.float64))
    close(flow.output(readout, learn=True).ntk.dense(), C @ ntk @ C.T + own)
    for refused in (kp.learning_rules.feedback_alignment, lambda f: kp.learning_rules.truncated_bptt(f, 1)):
        with pytest.raises(ValueError, match=r"steps"):
            refused(flow)
    with pytest.raises(ValueError, match="recurrence"):
        flow.truncate()


def test_a_readout_needs_the_units_last() -> None:
    flow = kp.linearize(kp.solve(registry.TORCH["convolution"].torch_problem(("3",))))
    with pytest.raises(ValueError, match=r"\[trial, ..., unit\]"):
        flow.output(torch.ones(2, 4, dtype=torch.float64))


def test_weights_of_trials() -> None:
    solution = kp.solve(registry.TORCH["encoder"].torch_problem(None))
    flow = kp.linearize(solution, measure=kp.Measure(trial=[0.5, 2.0]))
    root = np.repeat(np.sqrt([0.5, 2.0]), flow.ntk.domain.size // 2)
    J = root[:, None] * to_numpy(kp.linearize(solution).J.dense())
    close(root[:, None] * to_numpy(flow.ntk.dense()) / root, J @ J.T)
    close(root[:, None] * to_numpy((flow.P @ flow.B @ flow.core @ flow.B.T @ flow.P.T).dense()) / root, J @ J.T)


@pytest.mark.usefixtures("x64")
def test_empirical_kernel_is_the_contraction_of_jacobians() -> None:
    problem = registry.TORCH["encoder_eval"].torch_problem(None)
    values = {n: p.detach() for n, p in problem.net.named_parameters()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        J = jacrev(lambda v: functional_call(problem.net, v, (problem.x,)).flatten(1), chunk_size=1)(values)
    expected = sum(torch.einsum("aip,bjp->abij", j.flatten(2), j.flatten(2)) for j in J.values())
    close(kp.empirical_ntk(problem.net, problem.x), expected)
    mlp = registry.JAX["mlp"].jax_problem(None)
    leaves, tree = jax.tree.flatten(eqx.filter(mlp.net, eqx.is_inexact_array))
    static = eqx.filter(mlp.net, eqx.is_inexact_array, inverse=True)
    Js = jax.jacrev(lambda w: jax.vmap(eqx.combine(jax.tree.unflatten(tree, w), static))(mlp.x))(leaves)
    close(kp.empirical_ntk(mlp.net, mlp.x), sum(jnp.einsum("aip,bjp->abij", *[j.reshape(2, 2, -1)] * 2) for j in Js))


# Fixed points


class Deep(eqx.Module):
    """z = tanh(W z + U x) / 2."""

    W: eqx.nn.Linear
    U: eqx.nn.Linear

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.tanh(self.W(z) + self.U(x)) / 2


def fixed_points() -> dict[str, Callable[[], kp.FixedPointProblem]]:
    def torch_case(f: nn.Module) -> kp.FixedPointProblem:
        return kp.FixedPointProblem(
            f.double(), torch.randn(2, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        )

    def jax_case(f: Any) -> kp.FixedPointProblem:
        return kp.FixedPointProblem(f, jax.random.normal(jax.random.key(5), (2, 3)), jnp.zeros(4))

    a, b = jax.random.split(jax.random.key(1))
    return {
        "equilibrium": lambda: torch_case(registry.Equilibrium()),
        "gru": lambda: torch_case(nn.GRUCell(3, 4)),
        "jax_equilibrium": lambda: jax_case(Deep(eqx.nn.Linear(4, 4, key=a), eqx.nn.Linear(3, 4, key=b))),
        "jax_gru": lambda: jax_case(eqx.nn.GRUCell(3, 4, key=a)),
    }


SLOW_FIXED_POINTS = [
    *(("equilibrium", 0), ("gru", 1024), ("jax_gru", 0), ("jax_equilibrium", 0), ("jax_equilibrium", 1024)),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "dense"),
    [
        ("equilibrium", 1024),
        ("gru", 0),
        ("jax_gru", 1024),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_FIXED_POINTS),
    ],
)
def test_fixed_points(name: str, dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kpflow_dyn._implicit.inverse, "DENSE", dense)
    torch.manual_seed(0)
    problem = fixed_points()[name]()
    solution = kp.solve(problem)
    flow = kp.linearize(solution)
    inverse = to_numpy(flow.P.inv.dense())
    close(flow.P.dense(), np.linalg.inv(inverse))
    J = to_numpy(flow.J.dense())
    close((flow.P @ flow.K @ flow.P.T).dense(), J @ J.T)
    close((flow.P @ flow.B @ flow.core @ flow.B.T @ flow.P.T).dense(), J @ J.T)
    for op in (flow.P, flow.K, flow.core, flow.B, flow.J, flow.ntk):
        assert kp.check_adjoint(op) < 1e-10
    radius = np.abs(np.linalg.eigvals(np.eye(len(inverse)) - inverse)).max()
    assert solution.stats["spectral_radius"] == pytest.approx(radius, rel=2e-3)
    if dense:
        blocks = inverse.reshape(2, 4, 2, 4)
        worst = max(np.linalg.cond(blocks[b, :, b]) for b in range(2))
        assert solution.stats["condition"] == pytest.approx(worst, rel=1e-9)
    check_gradient_step(flow, "f")


def test_gmres_where_the_series_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kpflow_dyn._implicit.inverse, "DENSE", 0)
    W = torch.tensor([[0.0, 0.97], [-0.97, 0.0]], dtype=torch.float64)
    cell = nn.RNNCell(1, 2).double()
    with torch.no_grad():
        cell.weight_hh.copy_(W), cell.bias_hh.zero_(), cell.bias_ih.zero_(), cell.weight_ih.mul_(1e-3)
    solution = kp.solve(kp.FixedPointProblem(cell, torch.ones(3, 1, dtype=torch.float64)))
    assert solution.inverse.method == "GMRES"
    flow = kp.linearize(solution)
    close(flow.P.dense(), np.linalg.inv(to_numpy(flow.P.inv.dense())))


def test_what_does_not_contract_raises_with_its_spectral_radius() -> None:
    torch.manual_seed(0)
    cell = nn.RNNCell(3, 6).double()
    cell.weight_hh.data *= 4
    radius = r"spectral radius of D_z f is [1-9]"
    with pytest.raises(ValueError, match=radius):
        kp.solve(kp.FixedPointProblem(cell, torch.randn(2, 3, dtype=torch.float64)))


# Free forms


def recurrence(library: Any, state: Any, params: dict, x: Any) -> Any:
    before = library.concatenate([0 * state[:, :1], state[:, :-1]], 1)
    return state - library.tanh(before @ params["W"].T + x @ params["U"].T + params["b"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("library", "dense"),
    [
        *((torch, 1024), (torch, 0), (jnp, 1024)),
        pytest.param(jnp, 0, marks=pytest.mark.slow),
    ],
)
def test_a_recurrence_in_its_free_form_is_the_discrete_one(
    library: Any, dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kpflow_dyn._implicit.inverse, "DENSE", dense)
    draw = np.random.default_rng(0).standard_normal
    values = {"W": draw((4, 4)), "U": draw((4, 3)), "b": draw(4)}
    x, as_array = draw((2, 5, 3)), torch.as_tensor if library is torch else jnp.asarray
    params = {name: as_array(value) for name, value in values.items()}
    problem = kp.ImplicitProblem(
        lambda s, p, x: recurrence(library, s, p, x), as_array(np.zeros((2, 5, 4))), params, as_array(x)
    )
    solution = kp.solve(problem)
    flow = kp.linearize(solution)
    cell = nn.RNNCell(3, 4).double()
    with torch.no_grad():
        cell.weight_hh.copy_(torch.as_tensor(values["W"]))
        cell.weight_ih.copy_(torch.as_tensor(values["U"]))
        cell.bias_hh.copy_(torch.as_tensor(values["b"]))
        cell.bias_ih.zero_()
    twin = kp.linearize(
        kp.solve(kp.DiscreteProblem(cell, torch.as_tensor(x))), params=["weight_hh", "weight_ih", "bias_hh"]
    )
    close(solution.state, twin.solution.state)
    for name in ("P", "K", "ntk"):
        close(getattr(flow, name).dense(), getattr(twin, name).dense())
    J = to_numpy(flow.J.dense())
    close((flow.P @ flow.B @ flow.core @ flow.B.T @ flow.P.T).dense(), J @ J.T)
    assert solution.inverse.method == ("matrix" if dense else "Neumann")
    assert [site.kind for site in flow.sites].count("matrix") == 2


def test_a_module_of_parameters_and_a_constraint_without_inputs() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 3).double()
    with torch.no_grad():
        module.weight += 3 * torch.eye(3)
    problem = kp.ImplicitProblem(lambda s, m: m(s) + s**3, torch.zeros(2, 3, dtype=torch.float64), module)
    flow = kp.linearize(kp.solve(problem))
    with torch.no_grad():
        assert float(abs(module(flow.solution.state) + flow.solution.state**3).max()) < 1e-12
    J = flow.J.dense()
    close((flow.P @ flow.K @ flow.P.T).dense(), J @ J.T)
    close(flow.P.dense(), np.linalg.inv(to_numpy(flow.P.inv.dense())))
    check_gradient_step_of_params(flow, module)


def check_gradient_step_of_params(flow: kp.Flow, module: nn.Module) -> None:
    state = flow.solution.state
    gradient = flow.as_parameters(flow.J.T.mv(state))
    predicted = -flow.ntk.mv(state)
    there = kp.solve(moved(flow.solution.problem, "params", gradient, 1e-5)).state - state
    assert float((there / 1e-5 - predicted).norm() / predicted.norm()) < 1e-3


def test_a_singular_point_is_an_error() -> None:
    problem = kp.ImplicitProblem(
        lambda s, p: (s - s.mean()) * p["a"],
        torch.zeros(1, 3, dtype=torch.float64),
        {"a": torch.ones(1, dtype=torch.float64)},
    )
    with pytest.raises(ValueError, match="singular"):
        kp.solve(problem)


# Bad input


def test_bad_networks() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="drops out"):
        kp.solve(kp.StaticProblem(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), x))
    with pytest.raises(ValueError, match="BatchNorm in train mode"):
        kp.solve(kp.StaticProblem(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), x))
    with pytest.raises(ValueError, match="unknown modules"):
        kp.solve(kp.StaticProblem(nn.Sequential(nn.Linear(3, 3)), x, state="7"))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        kp.solve(kp.StaticProblem(torch.tanh, x))
    with pytest.raises(ValueError, match="NaN"):
        kp.StaticProblem(nn.Linear(3, 3), x * torch.nan)


class Coupled(nn.Module):
    hidden_size = 3

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Linear(3, 3)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return self.W(x - x.mean(0)) if z is None else torch.tanh(self.W(z - z.mean(0)) + x) / 3


def test_bad_fixed_points() -> None:
    cell, x = nn.RNNCell(3, 3), torch.randn(4, 3)

    def solve(f: nn.Module, z0: Tensor | None = None) -> None:
        kp.solve(kp.FixedPointProblem(f, x, z0))

    with pytest.raises(ValueError, match="hidden_size"):
        solve(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="NaN"):
        solve(cell, x * torch.nan)
    with pytest.raises(ValueError, match=r"z0 has shape \(2, 3\)"):
        solve(cell, torch.zeros(2, 3))
    with pytest.raises(TypeError, match="they must agree"):
        solve(cell, torch.zeros(4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"called as f\(x, z\)"):
        solve(nn.Linear(3, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="influence each other"):
        solve(Coupled())
    with pytest.raises(ValueError, match="no floating-point parameters"):
        solve(nn.Tanh(), torch.zeros(4, 3))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("library", [torch, jnp], ids=["torch", "jax"])
def test_bad_free_forms(library: Any) -> None:
    state, a = library.zeros((1, 2)), {"a": library.ones(2)}

    def solve(F: Callable, state: Any = state, params: Any = a) -> None:
        kp.solve(kp.ImplicitProblem(F, state, params))

    with pytest.raises(ValueError, match=r"must have its form|must return the next state"):
        solve(lambda s, p: (s * p["a"]).sum())
    with pytest.raises(ValueError, match="start it nearer"):
        solve(lambda s, p: s**2 + s + 1 + 0 * p["a"])
    with pytest.raises(TypeError, match="nothing can learn"):
        solve(lambda s, p: s, params={"n": library.arange(2)})
    with pytest.raises(ValueError, match=r"expected floats \[trial, time, unit\]"):
        solve(lambda s, p: s, state=library.zeros((1, 1, 1, 1)))
    with pytest.raises(ValueError, match="expected floats"):
        solve(lambda s, p: s, state=library.arange(3))


def test_names_of_parameters_may_be_any() -> None:
    params = {"a.b": torch.full((2,), 3.0), "call.tensors": torch.ones(2), "n": torch.arange(2)}
    problem = kp.ImplicitProblem(lambda s, p: s - p["a.b"] * p["call.tensors"] - p["n"], torch.zeros(1, 2), params)
    flow = kp.linearize(kp.solve(problem))
    assert set(flow.parameters) == {"a.b", "call.tensors"}
    assert flow.solution.state.tolist() == [[3.0, 4.0]]
    close(flow.ntk.dense(), np.diag([10.0, 10.0]), 1e-6)
    net = nn.Module()
    net.tensors, net.forward = nn.Linear(3, 2), lambda x: net.tensors(x)
    assert set(kp.linearize(kp.solve(kp.StaticProblem(net, torch.randn(2, 3)))).parameters) == {
        "tensors.weight",
        "tensors.bias",
    }


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_a_map_that_forgets_its_state_has_no_radius(library: str) -> None:
    if library == "torch":
        problem = kp.FixedPointProblem(nn.RNNCell(3, 2).double(), torch.randn(2, 3, dtype=torch.float64))
        with torch.no_grad():
            problem.f.weight_hh.zero_()
    else:
        model = Deep(eqx.nn.Linear(2, 2, key=jax.random.key(0)), eqx.nn.Linear(3, 2, key=jax.random.key(1)))
        model = eqx.tree_at(lambda m: m.W.weight, model, jnp.zeros((2, 2)))
        problem = kp.FixedPointProblem(model, jnp.ones((2, 3)), jnp.zeros(2))
    solution = kp.solve(problem)
    assert solution.stats["spectral_radius"] == 0 and solution.stats["condition"] == 1


def test_weights_filled_up_with_zeros_count_as_computed() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.w = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(2, 3))

        def forward(self, x: Tensor) -> Tensor:
            square = torch.slice_scatter(x.new_zeros(3, 3), self.w, 0, 0, 2)
            return x @ square.T * self.first

    flow = kp.linearize(kp.solve(kp.StaticProblem(Padded().double(), torch.randn(2, 3, dtype=torch.float64))))
    assert flow.core.spectrum() is None
    J = flow.J.dense()
    close((flow.P @ flow.B @ flow.core @ flow.B.T @ flow.P.T).dense(), J @ J.T)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.W(x)
        return y if self.W.bias.sum() > x[:, 0].sum() else -y


class InPlace(Coupled):
    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        x += 1
        return self.W(x)


def test_networks_that_are_no_function_of_one_trial() -> None:
    x = torch.tensor([[9.0, 1.0, 2.0], [8.0, 0.0, 1.0]])
    net = Branching()
    with pytest.warns(kp.UntracedWarning, match=r"test_networks\.py, line \d+: return y if .*torch\.where"):
        flow = kp.linearize(kp.solve(kp.StaticProblem(net, x)))
    close(flow.J.dense()[:3, :9], -torch.kron(torch.eye(3), x[:1]))
    with pytest.raises(ValueError, match="influence each other"):
        kp.solve(kp.StaticProblem(net, torch.cat([x, -x, -3 * x])))
    with pytest.raises(ValueError, match="influence each other"):
        kp.solve(kp.StaticProblem(Coupled(), x))
    kept = x.clone()
    with pytest.raises(ValueError, match="in place"):
        kp.solve(kp.StaticProblem(InPlace(), x))
    assert torch.equal(x, kept)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.W


@pytest.mark.parametrize(
    ("library", "name", "watched"),
    [("torch", "mlp", False), ("torch", "gpt", True), ("torch", "convolution", True), ("jax", "block", True)],
)
def test_summary_without_times(library: str, name: str, watched: bool, x64: None) -> None:
    """Ranks and modes of each axis that the state has, against the dense partial traces."""
    flow = kp.linearize(kp.solve(problem_of(library, name, watched)))
    found, space = kp.summary(flow, k=2), flow.ntk.domain
    dense = to_numpy(flow.ntk.dense())
    assert found.ntk.trace.value == pytest.approx(np.trace(dense))
    short = {"time": "temporal", "unit": "spatial"}
    assert set(found.ranks) == {short.get(axis, axis) for axis in space.axes}
    for i, axis in enumerate(space.axes):
        kept = np.moveaxis(dense.reshape(space.shape * 2), (i, i + len(space.shape)), (0, 1))
        side = space.size // space.shape[i]
        matrix = np.trace(kept.reshape(*kept.shape[:2], side, side), axis1=2, axis2=3)
        rank = np.trace(matrix) ** 2 / (matrix**2).sum()
        named_so = short.get(axis, axis)
        assert found.numbers()[f"{named_so}_effective_rank"].value == pytest.approx(rank)
        assert found.modes_of[named_so].vectors.shape == (space.shape[i], space.shape[i])
    with pytest.raises(AttributeError, match="no temporal modes of these states; there are those of"):
        _ = found.temporal_rank
    with pytest.raises(ValueError, match=r"lacks \['time'\]; take kp.summary"):
        kp.analyze(flow)
    with pytest.raises(ValueError, match="no function of time"):
        flow.solution(0.5)


def test_integer_models_have_nothing_to_learn() -> None:
    with pytest.raises((ValueError, TypeError), match=r"nothing can learn|int64"):
        kp.solve(kp.StaticProblem(Whole(), torch.randn(2, 3)))


class WithClassToken(nn.Module):
    """A learnt token in front of those of the data, and a weight that is put together of two."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.up, self.down = nn.Parameter(torch.randn(4)), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(x), 1, 4), torch.tanh(x)], 1)
        weight = torch.cat([self.up.weight, self.down.weight])
        return torch.tanh(tokens @ weight.T + torch.cat([self.up.bias, self.down.bias]))


def test_a_weight_copied_among_data_is_a_scale_as_in_a_cell() -> None:
    torch.manual_seed(0)
    flow = kp.linearize(
        kp.solve(kp.StaticProblem(WithClassToken().double(), torch.randn(2, 3, 4, dtype=torch.float64)))
    )
    assert [site.kind for site in flow.sites].count("matrix") == 1
    (token,) = (site for site in flow.sites if site.name == "token")
    assert token.kind == "scale" and token.entries.tolist() == [0, 1, 2, 3]
    close(token.weight, flow.parameters["token"], 0)
    J = flow.J.dense()
    close((flow.P @ flow.B @ flow.core @ flow.B.T @ flow.P.T).dense(), J @ J.T)
    test_core_spectrum_follows_from_the_variables(flow)
    assert flow.core.spectrum() is not None
