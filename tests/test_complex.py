"""Models with complex values: their operators are those of autograd through the user's own model, on the first road."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import cases
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import like_numpy, to_numpy

pytestmark = pytest.mark.usefixtures("x64")

COMPLEX = torch.complex128
N = 4


def drawn(*shape: int, seed: int = 0, is_complex: bool = False) -> np.ndarray:
    generator = np.random.default_rng([seed, *shape])
    real = generator.standard_normal(shape)
    return real + 1j * generator.standard_normal(shape) if is_complex else real


def assert_close(found: Any, expected: Any, tol: float = 1e-10) -> None:
    found, expected = to_numpy(found), to_numpy(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tol * max(1.0, float(abs(expected).max(initial=0))))


def halves(values: Any) -> Any:
    """A complex state as the package has it: real parts, then imaginary ones, on the last axis."""
    values = to_numpy(values)
    return np.concatenate([values.real, values.imag], -1) if np.iscomplexobj(values) else values


def probe(flow: kp.Flow) -> Any:
    """A random vector of the states."""
    domain = flow.nodal.ntk.domain
    return like_numpy(drawn(*domain.shape, seed=5), domain.like)


def checked(flow: kp.Flow, tol: float = 1e-10) -> kp.Flow:
    """The first road, with P K P* = J J* and transposes that are some."""
    assert not flow.untraced and flow.sites
    nodal, q = flow.nodal, probe(flow)
    expected = nodal.J.mv(nodal.J.T.mv(q))
    assert_close(nodal.ntk.mv(q), expected, tol)
    assert_close(nodal.P.mv(nodal.K.mv(nodal.P.T.mv(q))), expected, tol)
    assert kp.check_adjoint(nodal.J) < tol and kp.check_adjoint(nodal.P) < tol
    return flow


# Operations of torch


class OfFunction(nn.Module):
    """function(W, x) of a complex weight."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.W, self.function = nn.Parameter(torch.from_numpy(drawn(N, N, is_complex=True))), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.W, x)


def product(W: Tensor, x: Tensor) -> Tensor:
    """Complex numbers [trial, N] of real ones."""
    return x.to(W.dtype) @ W


TORCH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda W, x: product(W, x).real,
    "complex output": product,
    "mirrored": lambda W, x: (W @ x.to(W.dtype).T).T.imag,
    "einsum": lambda W, x: torch.einsum("ij,bj,bk->bik", W, x.to(W.dtype), product(W, x)).abs().flatten(1),
    "batched": lambda W, x: torch.bmm(W.expand(len(x), N, N), torch.polar(x.exp(), x)[..., None])[..., 0].real,
    "scale": lambda W, x: (x * W[0] + W[1]).imag,
    "quotient": lambda W, x: (product(W, x) / (3 + W[0])).real + (x / W[1]).imag,
    "of_weights": lambda W, x: (x * torch.exp(-torch.exp(W[0].real) + 1j * W[0].imag)).real,
    "elementwise": lambda W, x: torch.sin(torch.sqrt(torch.exp(product(W, x) / 4)) + 0.1).reciprocal().real,
    "tanh_log": lambda W, x: (torch.tanh(x * W[0]) + torch.log(2 + x * W[1]) + (1 + x * W[2]) ** 2).imag,
    "abs_angle": lambda W, x: product(W, x).abs() * torch.angle(product(W, x)),
    "conj": lambda W, x: (product(W.conj(), x) * product(W, x).conj() * 1j).conj().resolve_conj().imag,
    "adjoint": lambda W, x: (product(W.mH, x) - product(W, x).conj().imag).real,
    "views": lambda W, x: torch.view_as_real(product(W, x)).flatten(1) @ torch.view_as_real(W).flatten(1)[:, :8].T,
    "of_pairs": lambda W, x: torch.view_as_complex(torch.stack([x, torch.tanh(x)], -1)).mul(W[0]).abs(),
    "moves": lambda W, x: (
        torch.cat([product(W, x).flip(1)[:, 1:], x.to(W.dtype) * 1j], 1).roll(1, 1).split(3, 1)[1].real
    ),
    "sums": lambda W, x: (product(W, x).cumsum(1) - product(W, x).mean(1, keepdim=True) - x).imag,
    "where": lambda W, x: torch.where(x > 0, product(W, x), x * W[0]).real,
    "fft": lambda W, x: torch.fft.ifft(torch.fft.fft(x) * W[0]).real,
    "fft_of_weights": lambda W, x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(W[0].real), n=N),
    "fft2": lambda W, x: (
        torch.fft.ifft2(torch.fft.fft2(x.reshape(-1, 2, 2)) * W[:2, :2], norm="ortho").abs().flatten(1)
    ),
    "rfft2": lambda W, x: torch.fft.irfft2(torch.fft.rfft2(x.reshape(-1, 2, 2)) * W[:2, :2], s=(2, 2)).flatten(1),
    "hfft": lambda W, x: torch.fft.hfft(product(W, x)) + torch.fft.ihfft(x).abs().sum(1, keepdim=True),
    "stft": lambda W, x: (
        torch.stft(
            product(W, x).abs(), 2, hop_length=1, window=torch.ones(2, dtype=x.dtype), return_complex=True, center=False
        )
        .abs()
        .flatten(1)
    ),
    "convolution": lambda W, x: torch.conv1d(x.to(W.dtype)[:, None], W[:2, None, :3], W[0, :2]).abs().flatten(1),
    "unitary": lambda W, x: product(torch.linalg.matrix_exp(W - W.mH), x).real,
    "detached": lambda W, x: (product(W, x).detach() * product(W, x)).real,
    "sgn": lambda W, x: torch.relu(product(W, x).abs() + W[0].real) * torch.sgn(product(W, x)).imag,
}


@pytest.mark.parametrize("name", TORCH)
def test_operations_of_torch(name: str) -> None:
    net, x = OfFunction(TORCH[name]), torch.from_numpy(drawn(3, N, seed=1))
    flow = kp.linearize(kp.solve(kp.StaticProblem(net, x, state="")))
    assert_gradient(net, flow, lambda: net(x))
    checked(flow)


def assert_gradient(net: nn.Module, flow: kp.Flow, states: Callable[[], Tensor], tol: float = 1e-10) -> None:
    """The states, and J* q against backward() of <q, states>."""
    S = states()
    S = torch.cat([S.real, S.imag], -1) if S.is_complex() else S
    nodal = flow.nodal
    q = probe(flow)
    assert_close(to_numpy(S.reshape(q.shape)), to_numpy(flow.solution.state.reshape(q.shape)), tol)
    net.zero_grad()
    (S.reshape(q.shape) * q).sum().backward()
    found = nodal.as_parameters(nodal.J.T.mv(q))
    for parameter_name, parameter in net.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert found[parameter_name].dtype == parameter.dtype
        assert_close(to_numpy(found[parameter_name]), to_numpy(expected), tol)


# Models of torch


class Diagonal(nn.Module):
    """A linear recurrent unit: h_t = lambda h_{t-1} + gamma B x_t, with lambda = exp(-exp(nu) + i theta)."""

    def __init__(self, pairs: bool = False) -> None:
        super().__init__()
        self.nu, self.theta = (nn.Parameter(torch.from_numpy(drawn(N, seed=seed)) / 3) for seed in (1, 2))
        self.pairs, self.D = pairs, nn.Parameter(torch.from_numpy(drawn(2, 2)))
        B, C = (torch.from_numpy(drawn(*shape, is_complex=True)) for shape in ((N, 2), (2, N)))
        self.B, self.C = (nn.Parameter(torch.view_as_real(W) if pairs else W) for W in (B, C))

    def forward(self, x: Tensor) -> Tensor:
        B, C = (torch.view_as_complex(W) if self.pairs else W for W in (self.B, self.C))
        decay = torch.exp(torch.complex(-torch.exp(self.nu), self.theta))
        driven = torch.sqrt(1 - decay.abs() ** 2) * (x.to(B.dtype) @ B.T)  # [trial, time, N]
        h, found = torch.zeros_like(driven[:, 0]), []
        for now in driven.unbind(1):
            h = decay * h + now
            found.append((h @ C.T).real)
        return torch.tanh(torch.stack(found, 1) + x @ self.D.T)


class StateSpace(nn.Module):
    """S4D: a complex diagonal, discretised by zero-order hold, as a convolution by FFT."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.frequency = nn.Parameter(torch.zeros(N)), nn.Parameter(torch.arange(N) * np.pi)
        self.C = nn.Parameter(torch.view_as_real(torch.from_numpy(drawn(N, is_complex=True))))
        self.log_dt, self.D = nn.Parameter(torch.tensor(-2.0)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        A, dt, times = torch.complex(-self.rate.exp(), self.frequency), self.log_dt.exp(), torch.arange(x.shape[1])
        C = torch.view_as_complex(self.C) * (torch.exp(A * dt) - 1) / A
        kernel = 2 * (C @ torch.exp(A[:, None] * dt * times)).real
        n = 2 * x.shape[1]
        y = torch.fft.irfft(torch.fft.rfft(x, n=n) * torch.fft.rfft(kernel, n=n), n=n)[:, : x.shape[1]]
        return nn.functional.gelu(y + self.D * x)


class Fourier(nn.Module):
    """A Fourier neural operator in one or two dimensions: complex weights on the lowest modes."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.lift, self.mix, self.project = nn.Linear(1, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.W = nn.Parameter(torch.from_numpy(drawn(3, 3, *(2,) * dimensions, is_complex=True)) / 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x[..., None]).movedim(-1, 1)  # [trial, channel, ...]
        axes = tuple(range(2, h.ndim))
        modes = torch.fft.rfftn(h, dim=axes)
        low = modes[(..., *(slice(2) for _ in axes))]
        out = torch.einsum("bi...,io...->bo...", low, self.W)
        widths = [width for n in reversed(modes.shape[2:]) for width in (0, n - 2)]
        h = torch.fft.irfftn(nn.functional.pad(out, widths), s=h.shape[2:], dim=axes) + self.mix(
            h.movedim(1, -1)
        ).movedim(-1, 1)
        return self.project(torch.tanh(h).movedim(1, -1))[..., 0]


class Unitary(nn.Module):
    """A cell with a complex state: z = modReLU(exp(A - A^H) z + U x)."""

    def __init__(self, dtype: torch.dtype = COMPLEX) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.from_numpy(drawn(N, N, is_complex=True)).to(dtype) / 2)
        self.U = nn.Linear(2, N, dtype=dtype)
        self.b = nn.Parameter(torch.from_numpy(drawn(N)).to(dtype.to_real()) / 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        a = z @ torch.linalg.matrix_exp(self.A - self.A.mH).T + self.U(x.to(z.dtype))
        size = a.abs() + 1e-6
        return torch.relu(size + self.b) / size * a


class Oscillators(nn.Module):
    """Coupled Stuart-Landau oscillators, z' = (lambda - |z|^2) z + W z."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.from_numpy(drawn(3, is_complex=True)))
        self.W = nn.Parameter(torch.from_numpy(drawn(3, 3, is_complex=True)) / 5)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return (self.rate - z.abs() ** 2) * z + z @ self.W.T


class AtRest(nn.Module):
    """z = a / (1 + |a|) with a = W z + U x."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.from_numpy(drawn(N, N, is_complex=True)) / 10)
        self.U = nn.Parameter(torch.from_numpy(drawn(N, 2, is_complex=True)))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        a = z @ self.W.T + x.to(COMPLEX) @ self.U.T
        return a / (1 + a.abs())


def sequence(times: int = 4, width: int = 2) -> Tensor:
    return torch.from_numpy(drawn(3, times, width, seed=7))


def start(width: int = N) -> Tensor:
    return torch.from_numpy(drawn(3, width, seed=8, is_complex=True))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "LRU": (Diagonal, sequence),
    "LRU of pairs": (lambda: Diagonal(pairs=True), sequence),
    "S4D": (StateSpace, lambda: sequence()[..., 0]),
    "FNO": (lambda: Fourier(1), lambda: sequence(6)[..., 0]),
    "FNO 2d": (lambda: Fourier(2), lambda: sequence(4, 4)),
    "linear": (
        lambda: nn.Sequential(nn.Linear(2, 3, dtype=COMPLEX), nn.Linear(3, 2, dtype=COMPLEX)),
        lambda: start(2),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_torch(name: str) -> None:
    make, inputs = NETWORKS[name]
    net, x = make().double() if name == "S4D" else make(), inputs()
    flow = kp.linearize(kp.solve(kp.StaticProblem(net, x, state="")))
    assert_gradient(net, flow, lambda: net(x))
    checked(flow)
    checked(kp.linearize(kp.solve(kp.StaticProblem(net, x))))  # the outputs of all uses of weights, which are real


def test_a_named_value_that_is_complex_is_halves_of_the_unit_axis() -> None:
    make, inputs = NETWORKS["linear"]
    net, x = make(), inputs()
    solution = kp.solve(kp.StaticProblem(net, x, state=["0", ""]))
    inner = net[0](x)
    assert_close(solution.state, np.concatenate([halves(inner), halves(net(x))], -1))
    flow = checked(kp.linearize(solution))
    kick = torch.zeros_like(solution.state)
    kick[:, :6] = torch.from_numpy(halves(start(3)))  # [real, imaginary] parts of the first layer
    assert_close(flow.P.mv(kick)[:, 6:], halves(start(3) @ net[1].weight.T))


def states_of(cell: nn.Module, x: Tensor, z: Any) -> Tensor:
    found = []
    for now in x.unbind(1):
        z = cell(now, z)
        found.append(z if isinstance(z, Tensor) else torch.cat([torch.from_numpy(halves(part)) for part in z], -1))
    return torch.stack(found, 1)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64])
def test_a_cell_with_a_complex_state(dtype: torch.dtype) -> None:
    tol = 1e-10 if dtype is torch.complex128 else 1e-4
    cell, x, z0 = Unitary(dtype), sequence().to(dtype.to_real()), start().to(dtype)
    solution = kp.solve(kp.DiscreteProblem(cell, x, z0))
    flow = kp.linearize(solution)
    assert_gradient(cell, flow, lambda: states_of(cell, x, z0), tol)
    checked(flow, tol=tol)
    assert solution.state.shape == (3, 4, 2 * N) and flow.parameters["A"].dtype == dtype


def test_the_numbers_of_a_complex_flow() -> None:
    """Summary, choices and rates count each complex number as two."""
    cell, x = Unitary(), sequence()
    solution = kp.solve(kp.DiscreteProblem(cell, x, start()))
    flow = kp.linearize(solution)
    assert flow.J.domain.size == 2 * (N * N + 2 * N + N) + N
    chosen = np.zeros(flow.J.domain.size, bool)
    chosen[: 2 * N * N] = np.repeat(np.eye(N).ravel(), 2)
    J = to_numpy(flow.J.dense())[:, chosen]
    assert_close(flow.only({"A": torch.eye(N) > 0}).ntk.dense(), J @ J.T)
    rates = {"A": torch.full((N, N), 0.25), "U.weight": 0.25, "U.bias": 0.25, "b": 0.25}
    slow = kp.linearize(solution, metric=kp.LearningRates(rates))
    assert kp.trace(slow.ntk).value == pytest.approx(kp.trace(flow.ntk).value / 4)
    assert kp.summary(flow) is not None


def test_gradient_flow_moves_a_complex_weight_down_its_gradient() -> None:
    net, x = nn.Linear(2, 2, dtype=COMPLEX), start(2)
    solution = kp.solve(kp.StaticProblem(net, x, state=""))
    found = kp.gradient_flow(solution, lambda s: (s**2).sum() / 2, 1e-5, rtol=1e-6)
    (net(x).abs() ** 2).sum().mul(0.5).backward()
    moved = (found.parameters["weight"][-1] - net.weight.detach()) / 1e-5
    assert_close(moved, -net.weight.grad, 1e-3)


def test_a_state_of_a_real_and_a_complex_part() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(torch.from_numpy(drawn(2, 2, is_complex=True)) / 2)
            self.V = nn.Linear(2, 2).double()

        def forward(self, x: Tensor, z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            h, c = z
            return torch.tanh(self.V(h) + x + c.real), c @ self.W * torch.exp(1j * h)

    cell, x, z0 = Both(), sequence(), (sequence()[:, 0], start(2))
    flow = checked(kp.linearize(kp.solve(kp.DiscreteProblem(cell, x, z0))))
    assert_close(flow.solution.state, states_of(cell, x, z0).detach())


@pytest.mark.parametrize("t", [[0.0, 0.1, 0.3], (0.0, 0.2)])
def test_an_ode_with_a_complex_state(t: Any) -> None:
    field, z0 = Oscillators(), start(3)
    problem = kp.ODEProblem(field, z0, t)
    solution = kp.solve(problem)
    flow = checked(kp.linearize(solution))
    if len(t) == 3:
        from scipy.integrate import solve_ivp

        def rate(t: float, z: np.ndarray) -> np.ndarray:
            return field(torch.tensor(t), torch.from_numpy(z)[None])[0].detach().numpy()

        exact = solve_ivp(rate, (0, 0.3), z0[0].numpy(), t_eval=t, rtol=1e-9, atol=1e-10).y.T
        assert_close(solution.state[0], halves(exact), 1e-5)
        other = kp.linearize(solution, sensealg=kp.InterpolatingAdjoint())
        assert_close(other.ntk.mv(solution.state), flow.ntk.mv(solution.state), 1e-3)
        twice = kp.solve(problem.remake(f=Oscillators()))
        assert_close(twice.state, solution.state)
    assert set(flow.as_parameters(flow.J.T.mv(solution.state))) == {"rate", "W"}


def test_a_fixed_point_and_a_free_form_with_complex_states() -> None:
    f, x = AtRest(), sequence()[:, 0]
    solution = kp.solve(kp.FixedPointProblem(f, x, torch.zeros(N, dtype=COMPLEX)))
    z = solution.state[:, :N] + 1j * solution.state[:, N:]
    assert_close(f(x, z).detach(), z)
    checked(kp.linearize(solution))
    W = torch.from_numpy(drawn(2, 2, is_complex=True))
    problem = kp.ImplicitProblem(lambda s, p, x: s @ p["W"].T - x, torch.zeros_like(start(2)), {"W": W}, start(2))
    solution = kp.solve(problem)
    assert_close(solution.state, halves(start(2) @ torch.linalg.inv(W).T), 1e-8)
    checked(kp.linearize(solution))


class Turning(nn.Module):
    """z -> w z + x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.from_numpy(drawn(2, is_complex=True)))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.w * z + x


def test_complex_numbers_in_wrong_places_are_refused() -> None:
    with pytest.raises(TypeError, match="real and imaginary parts side by side"):
        kp.DiscreteProblem(Unitary(), sequence().to(COMPLEX), start())
    with pytest.raises(ValueError, match="needs a complex z0"):
        kp.solve(kp.DiscreteProblem(Turning(), sequence(), start(2).real))
    with pytest.raises(TypeError, match="complex64"):
        kp.solve(kp.StaticProblem(nn.Linear(2, 2, dtype=torch.complex64), start(2)))
    solution = kp.solve(kp.StaticProblem(nn.Linear(2, 2, dtype=COMPLEX), start(2), state=""))
    with pytest.raises(ValueError, match="takes no Kronecker factors"):
        kp.linearize(solution, metric=kp.KroneckerMetric({"weight": (np.eye(2), np.eye(2))}))


# JAX


def with_weights(function: Callable, net: nn.Module) -> Any:
    """A pytree of the parameters of a torch module, called as function(parameters, ...)."""
    arrays = {name.replace(".", "_"): jnp.asarray(to_numpy(p)) for name, p in net.named_parameters()}
    return jax.tree_util.Partial(function, arrays)


def assert_gradient_of_jax(flow: kp.Flow, states: Callable[[dict], jax.Array], parameters: dict) -> None:
    """J* q against the conjugate of jax.grad of <q, states>."""
    q = probe(flow)

    def loss(parameters: dict) -> jax.Array:
        S = states(parameters)
        S = jnp.concatenate([S.real, S.imag], -1) if jnp.iscomplexobj(S) else S
        return (S.reshape(q.shape) * q).sum()

    found, expected = flow.as_parameters(flow.J.T.mv(q)), jax.grad(loss)(parameters)
    for name, slope in expected.items():
        assert_close(found[f"[0]['{name}']"], jnp.conj(slope))


def elementwise(p: dict, x: jax.Array) -> jax.Array:
    y = jnp.exp(p["W"][0] * x) / (3 + p["W"][1]) + jnp.sin(jnp.conj(p["W"] @ x)) * jnp.sqrt(2 + 1j * x) - 1
    return jnp.abs(y) * jnp.angle(y) + jnp.where(x > 0, y, 1j * x).imag + jnp.cumsum(y).real + jnp.flip(y)[::-1].real


def spectra(p: dict, x: jax.Array) -> jax.Array:
    line = jnp.fft.irfft(jnp.fft.rfft(x) * p["W"][0, :3], n=N) + jnp.fft.ifft(jnp.fft.fft(x) * p["W"][1]).imag
    plane = jnp.fft.irfft2(jnp.fft.rfft2(x.reshape(2, 2)) * p["W"][:2, :2], s=(2, 2))
    return line + jnp.einsum("ij,jk->ik", plane, p["W"][2:, 2:]).real.ravel()


def solution(p: dict, x: jax.Array) -> jax.Array:
    return jnp.linalg.solve(p["W"] + 5 * jnp.eye(N), jax.lax.complex(x, 2 * x))


JAX = {"elementwise": elementwise, "spectra": spectra, "solution": solution}


@pytest.mark.parametrize("name", JAX)
def test_operations_of_jax(name: str) -> None:
    parameters = {"W": jnp.asarray(drawn(N, N, is_complex=True))}
    x, net = jnp.asarray(drawn(3, N, seed=1)), jax.tree_util.Partial(JAX[name], parameters)
    flow = checked(kp.linearize(kp.solve(kp.StaticProblem(net, x, state=""))))
    assert_gradient_of_jax(flow, lambda p: jax.vmap(lambda x: JAX[name](p, x))(x), parameters)


def diagonal(p: dict, x: jax.Array) -> jax.Array:
    decay = jnp.exp(-jnp.exp(p["nu"]) + 1j * p["theta"])
    driven = jnp.sqrt(1 - jnp.abs(decay) ** 2) * (x @ p["B"].T)

    def combined(first: tuple, second: tuple) -> tuple:
        return first[0] * second[0], second[0] * first[1] + second[1]

    _, h = jax.lax.associative_scan(combined, (jnp.broadcast_to(decay, driven.shape), driven))
    return jnp.tanh((h @ p["C"].T).real + x @ p["D"].T)


def fourier(p: dict, x: jax.Array) -> jax.Array:
    h = (x[:, None] * p["lift_weight"][:, 0] + p["lift_bias"]).T
    modes = jnp.fft.rfft(h)
    out = jnp.zeros_like(modes).at[:, :2].set(jnp.einsum("im,iom->om", modes[:, :2], p["W"]))
    h = jnp.fft.irfft(out, n=len(x)) + p["mix_weight"] @ h + p["mix_bias"][:, None]
    return (p["project_weight"] @ jnp.tanh(h) + p["project_bias"])[0]


def at_rest(p: dict, x: jax.Array, z: jax.Array) -> jax.Array:
    a = p["W"] @ z + p["U"] @ x
    return a / (1 + jnp.abs(a))


def oscillators(p: dict, t: jax.Array, z: jax.Array) -> jax.Array:
    return (p["rate"] - jnp.abs(z) ** 2) * z + p["W"] @ z


def as_jax(values: Tensor) -> jax.Array:
    return jnp.asarray(to_numpy(values))


def both_frameworks(name: str) -> tuple[kp.Solution, kp.Solution]:
    """The same problem posed in both frameworks."""
    x, z0 = sequence(), start()
    if name == "cell":
        net = AtRest()
        theirs = kp.DiscreteProblem(with_weights(at_rest, net), as_jax(x), as_jax(z0))
        return kp.solve(kp.DiscreteProblem(net, x, z0)), kp.solve(theirs)
    if name == "fixed point":
        net, zeros = AtRest(), torch.zeros(N, dtype=COMPLEX)
        theirs = kp.FixedPointProblem(with_weights(at_rest, net), as_jax(x[:, 0]), as_jax(zeros))
        return kp.solve(kp.FixedPointProblem(net, x[:, 0], zeros)), kp.solve(theirs)
    if name == "ode":
        net, z0, steps = Oscillators(), start(3), {"steps": [0.0, 0.1, 0.2]}
        ours, times = kp.ODEProblem(net, z0, steps["steps"]), steps["steps"]
        theirs = kp.ODEProblem(with_weights(oscillators, net), as_jax(z0), times)
        import diffrax

        return kp.solve(ours, "dopri5", **steps), kp.solve(theirs, diffrax.Dopri5(), **steps)
    net, function = (Diagonal(), diagonal) if name == "LRU" else (Fourier(1), fourier)
    x = x if name == "LRU" else sequence(6)[..., 0]
    theirs = kp.StaticProblem(with_weights(function, net), as_jax(x), state="")
    return kp.solve(kp.StaticProblem(net, x, state="")), kp.solve(theirs)


@pytest.mark.parametrize("name", cases(["LRU", "FNO", "cell", "fixed point", "ode"], ["cell", "fixed point"]))
def test_both_frameworks_agree(name: str) -> None:
    solutions = both_frameworks(name)
    ours, theirs = (checked(kp.linearize(solution)) for solution in solutions)
    assert_close(solutions[0].state, solutions[1].state)
    assert_close(ours.ntk.mv(probe(ours)), theirs.ntk.mv(probe(theirs)), 1e-8)
    assert_close(ours.K.mv(probe(ours)), theirs.K.mv(probe(theirs)), 1e-8)


def test_training_in_jax_goes_down_a_complex_gradient() -> None:
    net, x = AtRest(), sequence()
    task = kp.tasks.TaskData(to_numpy(x), drawn(3, 4, 1), np.ones((3, 4)))
    readout = eqx.nn.Linear(2 * N, 1, key=jax.random.key(0), dtype=jnp.float64)
    found = kp.train.fit(
        with_weights(at_rest, net), task, readout, steps=5, lr=0.05, optimizer="sgd", z0=as_jax(start())
    )
    assert (np.diff(found.losses) < 0).all()


def test_a_complex_cell_of_jax_needs_a_complex_start() -> None:
    with pytest.raises(ValueError, match="needs a complex z0"):
        kp.solve(kp.DiscreteProblem(with_weights(at_rest, AtRest()), as_jax(sequence()), as_jax(start().real)))
