"""SDEs and DDEs with starts that learn, args, and states of several arrays, against own loops under autograd."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from synthetic import assert_close
from test_starts_that_learn import dense, drawn, values_of
from torch import Tensor, nn
from torch.func import functional_call

import kpflow_dyn as kp
from kpflow_dyn._arrays import like_numpy

pytestmark = pytest.mark.usefixtures("x64")

GRID = np.array([0.0, 0.2, 0.4, 0.8])  # of steps of 0.2
FINE = np.arange(5) / 5
RNG = np.random.default_rng(0)
DW = RNG.normal(size=(4, 4, 2)) / 3  # [trial * path, step, noise]
DATA = RNG.normal(size=(2, 3))
W, V, E = RNG.normal(size=(2, 2)), RNG.normal(size=2), RNG.normal(size=(2, 3))


class Sde(nn.Module):
    """As torchsde has them."""

    sde_type = "ito"

    def __init__(self) -> None:
        super().__init__()
        self.W, self.v = nn.Parameter(torch.tensor(W)), nn.Parameter(torch.tensor(V))

    def f(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.W.T) * (1 + t)

    def g(self, t: Tensor, z: Tensor) -> Tensor:
        return self.v * torch.cos(z)


class JaxSde(eqx.Module):
    W: jax.Array
    v: jax.Array

    def f(self, t: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.tanh(self.W @ z) * (1 + t)

    def g(self, t: jax.Array, z: jax.Array) -> jax.Array:
        return self.v * jnp.cos(z)


class Delayed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W, self.v = nn.Parameter(torch.tensor(W)), nn.Parameter(torch.tensor(V))

    def forward(self, t: Tensor, z: Tensor, delayed: tuple[Tensor, ...]) -> Tensor:
        return torch.tanh(delayed[0] @ self.W.T) * (1 + t) - self.v * z * delayed[1]


class JaxDelayed(eqx.Module):
    W: jax.Array
    v: jax.Array

    def __call__(self, t: jax.Array, z: jax.Array, delayed: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.tanh(self.W @ delayed[0]) * (1 + t) - self.v * z * delayed[1]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.E = nn.Parameter(torch.tensor(E))

    def forward(self, data: Tensor) -> Tensor:
        return torch.sin(data @ self.E.T)


class JaxEncoder(eqx.Module):
    E: jax.Array

    def __call__(self, data: jax.Array) -> jax.Array:
        return jnp.sin(self.E @ data)


def noisy(f: Callable, g: Callable, z: Tensor) -> Tensor:
    """Euler and Maruyama."""
    states = [z]
    for n, (t, end) in enumerate(pairwise(torch.tensor(FINE))):
        z = z + (end - t) * f(t, z) + g(t, z) * torch.tensor(DW[:, n])
        states.append(z)
    return torch.stack(states, 1)


def behind(f: Callable, z: Tensor) -> Tensor:
    """Euler steps with delays of two and three of them, and a constant history."""
    states = [z]
    for n, (t, end) in enumerate(pairwise(torch.tensor(FINE))):
        delayed = tuple(states[max(n - k, 0)] for k in (2, 3))
        states.append(states[-1] + (end - t) * f(t, states[-1], delayed))
    return torch.stack(states, 1)


def grid_of(states: Tensor) -> Tensor:
    return states[:, [0, 1, 2, 4]]


def posed(kind: str, framework: str, z0: Any, **more: Any) -> Any:
    jaxy = framework == "jax"
    array = jnp.asarray if jaxy else torch.tensor
    given = z0 if z0 is None else array(z0)
    if kind == "sde":
        model = JaxSde(array(W), array(V)) if jaxy else Sde()
        return kp.SDEProblem(model, None, given, GRID, brownian=DW.reshape(2, 2, 4, 2), paths=2, **more)
    model = JaxDelayed(array(W), array(V)) if jaxy else Delayed()
    return kp.DDEProblem(model, given, GRID, (0.4, 0.6), **more)


def oracle(kind: str, start: Callable[[Any], Tensor], of_start: Any) -> tuple[Tensor, Tensor]:
    """The states, and J in the parameters of the steps and of the start."""
    model = Sde() if kind == "sde" else Delayed()

    def states(of_steps: dict[str, Tensor], of_start: Any) -> Tensor:
        z = start(of_start)
        if kind == "dde":
            return grid_of(behind(lambda *given: functional_call(model, of_steps, given), z))
        sde = type("", (), {**of_steps})
        return grid_of(noisy(lambda t, z: Sde.f(sde, t, z), lambda t, z: Sde.g(sde, t, z), z.repeat_interleave(2, 0)))

    values = values_of(model)
    return states(values, of_start), dense(states, values, of_start)


def solved(problem: Any) -> Any:
    return kp.solve(problem, "euler", steps=0.2)


COLUMNS = {"W": slice(0, 4), "v": slice(4, 6), "E": slice(6, 12), "z0": slice(6, 8)}


def assert_flow(solution: kp.Solution, state: Tensor, J: Tensor) -> kp.Flow:
    """All operators, of a J whose columns are as above."""
    assert_close(np.asarray(solution.state), state.detach().numpy())
    flow = kp.linearize(solution, measure=kp.Measure(time=np.ones(4)))
    assert not flow.untraced
    J = torch.cat([J[:, COLUMNS[name.split(".")[-1]]] for name in flow.parameters], 1).detach()
    assert_close(np.asarray(flow.J.dense()), J.numpy())
    assert_close(np.asarray(flow.ntk.dense()), (J @ J.T).numpy())
    steps = flow.nodal
    whole = np.asarray(steps.ntk.dense())
    assert_close(np.asarray((steps.P @ steps.K @ steps.P.T).dense()), whole)
    assert_close(np.asarray((steps.B @ steps.core @ steps.B.T).dense()), np.asarray(steps.K.dense()))
    for operator in (flow.J, flow.P, steps.J, steps.B, steps.P, steps.K.factor, steps.core.factor):
        assert kp.check_adjoint(operator) < 1e-12
    each = flow.ntk.apart
    assert each is not None
    changes = like_numpy(RNG.normal(size=(1, *each.domain.shape)), each.domain.like)
    for trial in range(len(solution.state)):
        assert_close(np.asarray(each.mv(changes)[:, trial]), np.asarray(flow.J.mv(changes[:, trial])[:, trial]))
    return flow


@pytest.mark.parametrize(
    ("kind", "framework"),
    [("sde", "torch"), ("dde", "torch"), ("sde", "jax"), pytest.param("dde", "jax", marks=pytest.mark.slow)],
)
def test_an_encoder_gives_the_start(kind: str, framework: str) -> None:
    jaxy = framework == "jax"
    problem = posed(kind, framework, DATA, encoder=JaxEncoder(jnp.asarray(E)) if jaxy else Encoder())
    state, J = oracle(kind, lambda E: torch.sin(torch.tensor(DATA) @ E.T), torch.tensor(E))
    flow = assert_flow(solved(problem), state, J)
    front = "sde." if kind == "sde" else "f."
    assert set(flow.parameters) == {front + "W", front + "v", "encoder.E"}
    of_encoder = kp.linearize(flow.solution, params="encoder.E", measure=kp.Measure(time=np.ones(4)))
    assert_close(np.asarray(of_encoder.J.dense()), J[:, 6:].numpy())
    again = solved(problem.remake(encoder=type(problem.encoder)() if not jaxy else JaxEncoder(jnp.asarray(2 * E))))
    assert again.state.shape == flow.solution.state.shape


@pytest.mark.parametrize(
    ("kind", "framework"),
    [("sde", "torch"), ("dde", "torch"), ("dde", "jax"), pytest.param("sde", "jax", marks=pytest.mark.slow)],
)
def test_the_start_is_a_parameter(kind: str, framework: str) -> None:
    z0 = RNG.normal(size=2)
    problem = posed(kind, framework, np.stack([z0, z0])).learn_start()
    state, J = oracle(kind, lambda z: z.expand(2, 2), torch.tensor(z0))
    flow = assert_flow(solved(problem), state, J)
    assert "z0" in flow.parameters
    with pytest.raises(ValueError, match="learns already"):
        problem.learn_start()
    other = problem.remake(**{problem.given_as: 0 * problem.z0 + 0.5})
    assert_close(np.asarray(solved(other).state[:, 0]), np.full((len(state), 2), 0.5))


def test_inputs_are_encoded_and_learning_goes_on() -> None:
    class Driven(Delayed):
        def forward(self, t: Tensor, z: Tensor, delayed: tuple[Tensor, ...], x: Tensor) -> Tensor:
            return super().forward(t, z, delayed) + x

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x[:, 0])

    problem = kp.DDEProblem(Driven(), None, GRID, (0.4, 0.6), drawn(2, 4, 2), encoder=First())
    solution = solved(problem)
    assert_close(solution.state[:, 0], problem.encoder(problem.x)[:, 0 * 2 :].detach())
    flow = kp.linearize(solution)
    found = kp.gradient_flow(solution, lambda states: (states**2).sum(), 1e-6)
    gradient = flow.J.T.mv((2 * solution.state / flow.J.codomain.measure)[None])
    assert_close(np.array(found.gradient_norm[0]), np.array(float(gradient.norm())))


@pytest.mark.parametrize("kind", ["sde", "dde"])
def test_several_trials_start_at_one_place_alone(kind: str) -> None:
    with pytest.raises(ValueError, match="differs between trials"):
        posed(kind, "torch", DATA[:, :2]).learn_start()


def test_gradients_that_are_dropped_are_said_aloud() -> None:
    z0 = torch.tensor(DATA[:, :2]).requires_grad_()
    for kind in ("sde", "dde"):
        problem = posed(kind, "torch", DATA[:, :2])
        with pytest.warns(kp.StartWarning, match="encoder=") as said:
            solution = solved(problem.remake(**{problem.given_as: 1 * z0}))
        assert __file__ in {warning.filename for warning in said} and not solution.state.requires_grad

    class History(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.z = nn.Parameter(torch.tensor(DATA[:, :2]))

        def forward(self, t: Tensor) -> Tensor:
            return self.z * torch.cos(t)

    of_module, free = History(), torch.tensor(DATA[:, :2]).requires_grad_()
    problem = posed("dde", "torch", DATA[:, :2])
    only_before = lambda t: free * torch.cos(t) if t < 0 else torch.tensor(DATA[:, :2])  # noqa: E731
    for history in (of_module, only_before, lambda t: free * torch.cos(t)):
        with pytest.warns(kp.StartWarning, match="function of time"):
            state = solved(problem.remake(history=history)).state
        assert not state.requires_grad
    in_jax = posed("dde", "jax", DATA[:, :2])
    held = jax.tree_util.Partial(lambda z, t: z * jnp.cos(t), jnp.asarray(DATA[:, :2]))
    with pytest.warns(kp.StartWarning, match="function of time"):
        solved(in_jax.remake(history=held))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constant = np.asarray(DATA[:, :2])
        assert_close(np.asarray(solved(in_jax.remake(history=lambda t: constant * jnp.cos(t))).state), state)
        solved(problem.remake(history=of_module.requires_grad_(False)))
    with pytest.raises(ValueError, match="function of time"):
        problem.remake(history=of_module).learn_start()


# Args and states of several arrays


@pytest.mark.parametrize("matrix", [False, True])
def test_tuples_args_and_noise_of_several_arrays(matrix: bool) -> None:
    """With noise of each number, or of all."""
    q, v = torch.tensor(RNG.normal(size=(2, 1, 2))), torch.tensor(RNG.normal(size=(2, 3)))

    class Drift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(torch.tensor(RNG.normal(size=(3, 2))))

        def forward(self, t: Tensor, z: tuple, a: float, b: float = 2.0) -> tuple:
            q, v = z
            return torch.tanh(v @ self.W)[:, None] * a, b * (q[:, 0] @ self.W.T)

    class Noise(nn.Module):
        def __init__(self, matrix: bool) -> None:
            super().__init__()
            self.s, self.matrix = nn.Parameter(torch.tensor(0.3, dtype=torch.float64)), matrix

        def forward(self, t: Tensor, z: tuple, *args: float) -> tuple:
            found = tuple(self.s * args[0] * torch.cos(part) for part in z)
            return tuple(torch.stack([part, 2 * part], -1) for part in found) if self.matrix else found

    drift, noise, width = Drift(), Noise(matrix), 2 if matrix else 5
    dW = torch.tensor(RNG.normal(size=(2, 3, width)) / 3)
    problem = kp.SDEProblem(drift, noise, (q, v), GRID, brownian=dW, args=(0.7,))
    solution = kp.solve(problem, "euler")
    flow = kp.linearize(solution, measure=kp.Measure(time=np.ones(4)))
    assert list(flow.parameters) == ["f.W", "g.s"]

    def states(W: Tensor, s: Tensor) -> Tensor:
        z, found = (q, v), [torch.cat([q.flatten(1), v], 1)]
        for n, h in enumerate(np.diff(GRID)):
            rates = torch.tanh(z[1] @ W)[:, None] * 0.7, 2.0 * (z[0][:, 0] @ W.T)
            push = torch.cat([(s * 0.7 * torch.cos(part)).flatten(1) for part in z], 1)
            kick = push * (dW[:, n] if not matrix else dW[:, n, :1] + 2 * dW[:, n, 1:])
            flat = found[-1] + h * torch.cat([rates[0].flatten(1), rates[1]], 1) + kick
            z = flat[:, :2].reshape(2, 1, 2), flat[:, 2:]
            found.append(flat)
        return torch.stack(found, 1)

    values = drift.W.detach(), noise.s.detach()
    assert_close(solution.state, states(*values))
    assert_close(flow.J.dense(), dense(states, *values))
    again = problem.remake(z0=solution.state[:, -1])
    assert again.unflatten(again.z0)[0].shape == (2, 1, 2)
    assert_close(again.z0, solution.state[:, -1])


@pytest.mark.parametrize("alg", ["euler", "milstein", "heun"])
def test_args_and_dicts_in_jax_are_those_of_torch(alg: str) -> None:
    def f(k: Any, t: Any, z: dict, args: dict) -> dict:
        return {"q": z["v"], "v": -args["k"] * k * z["q"]}

    def g(t: Any, z: dict, args: dict) -> dict:
        return {"q": 0 * z["q"], "v": args["s"] * z["v"]}

    z0, dW = {"q": RNG.normal(size=(2, 2)), "v": RNG.normal(size=(2, 2))}, RNG.normal(size=(2, 3, 4)) / 3

    class Drift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

        def forward(self, t: Tensor, z: dict, args: dict) -> dict:
            return f(self.k, t, z, args)

    kind = "stratonovich" if alg == "heun" else "ito"
    in_torch = kp.SDEProblem(
        Drift(),
        g,
        {name: torch.tensor(part) for name, part in z0.items()},
        GRID,
        brownian=dW,
        sde_type=kind,
        args={"k": torch.tensor(0.7, dtype=torch.float64), "s": 0.4},
    )
    in_jax = kp.SDEProblem(
        jax.tree_util.Partial(f, jnp.asarray(1.3)),
        g,
        {name: jnp.asarray(part) for name, part in z0.items()},
        GRID,
        brownian=dW,
        sde_type=kind,
        args={"k": jnp.asarray(0.7), "s": 0.4},
    )
    flows = [kp.linearize(kp.solve(problem, alg)) for problem in (in_torch, in_jax)]
    assert [len(flow.parameters) for flow in flows] == [1, 1]
    assert_close(np.asarray(flows[1].solution.state), flows[0].solution.state.numpy())
    assert_close(np.asarray(flows[1].J.dense()), flows[0].J.dense().numpy())


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_delays_of_pairs_with_args(framework: str) -> None:
    """As of the same equation of one array."""
    z0, jaxy = RNG.normal(size=(2, 2)), framework == "jax"
    array, xp = (jnp.asarray, jnp) if jaxy else (torch.tensor, torch)

    def pair(W: Any, t: Any, z: tuple, delayed: tuple, scale: float, args: Any = 2.0) -> tuple:
        (past_a, past_b), (a, b) = delayed[0], z
        return scale * xp.tanh(past_b) * W - a, args * past_a * xp.cos(W * b)

    def flat(W: Any, t: Any, z: Any, delayed: tuple) -> Any:
        first, second = pair(W, t, (z[..., :1], z[..., 1:]), [(delayed[0][..., :1], delayed[0][..., 1:])], 0.6)
        return xp.concatenate([first, second], -1)

    class Of(nn.Module):
        def __init__(self, function: Callable) -> None:
            super().__init__()
            self.W, self.function = nn.Parameter(torch.tensor(0.8, dtype=torch.float64)), function

        def forward(self, t: Tensor, z: Any, delayed: tuple, *args: Any) -> Any:
            return self.function(self.W, t, z, delayed, *args)

    def model(function: Callable) -> Any:
        return jax.tree_util.Partial(function, array(0.8)) if jaxy else Of(function)

    parts = array(z0[:, :1]), array(z0[:, 1:])
    problems = [
        kp.DDEProblem(model(pair), parts, GRID, 0.3, args=(0.6,)),
        kp.DDEProblem(model(pair), lambda t: parts, GRID, 0.3, args=(0.6,)),
        kp.DDEProblem(model(flat), array(z0), GRID, 0.3),
    ]
    first, second, last = (kp.linearize(kp.solve(problem, "rk4", steps=0.1)) for problem in problems)
    for flow in (first, second):
        assert_close(np.asarray(flow.solution.state), np.asarray(last.solution.state))
        assert_close(np.asarray(flow.J.dense()), np.asarray(last.J.dense()))
    learnt = problems[0].remake(history=tuple(part[:1] * 0 + 0.3 + part * 0 for part in parts)).learn_start()
    assert "z0" in kp.linearize(kp.solve(learnt)).parameters


class Factor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.tensor(W))

    def forward(self, t: Tensor, z: Any, scale: float = 0.5) -> Any:
        rate = scale * torch.tanh((torch.cat(z, -1) if isinstance(z, tuple) else z) @ self.W.T)
        return (rate[:, :1], rate[:, 1:]) if isinstance(z, tuple) else rate


def test_a_flow_of_gradients_of_two_modules_in_any_form() -> None:
    z0, losses = torch.ones(2, 2, dtype=torch.float64), []
    for start, args in ((z0, None), (z0, 0.5), ((z0[:, :1], z0[:, 1:]), None)):
        posed = kp.SDEProblem(Factor(), Factor(), start, FINE, args=args).learn_start()
        sol = kp.solve(posed, "euler")
        losses.append(kp.gradient_flow(sol, lambda state: (state**2).mean(), span=0.1).loss)
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert np.allclose(losses[1], losses[0], rtol=1e-10) and np.allclose(losses[2], losses[0], rtol=1e-10)
