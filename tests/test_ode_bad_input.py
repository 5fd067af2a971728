"""Each bad input to an ODE raises, saying what came and what to do."""

from __future__ import annotations

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn.ode._replay import check_same, rounding_of

pytestmark = pytest.mark.usefixtures("x64")

GRID = [0.0, 0.5, 1.0]


class Field(nn.Module):
    """z' = rate(W, t, z, ...) of a function given by a test, with one parameter."""

    def __init__(self, rate=None) -> None:
        super().__init__()
        self.rate, self.W = rate or (lambda W, t, z, *x: torch.tanh(z @ W)), nn.Parameter(torch.eye(4).double())

    def forward(self, t: Tensor, z: Tensor, *x: Tensor) -> Tensor:
        return self.rate(self.W, t, z, *x)


def in_torch(f=None, z0=None, t=GRID, x=None) -> kp.ODEProblem:
    return kp.ODEProblem(Field(f), torch.ones(2, 4).double() if z0 is None else z0, t, x)


def in_jax(f=None, z0=None, t=GRID, x=None) -> kp.ODEProblem:
    rate = f or (lambda W, t, z, *x: jnp.tanh(z @ W))
    return kp.ODEProblem(jax.tree_util.Partial(rate, jnp.eye(4)), jnp.ones((2, 4)) if z0 is None else z0, t, x)


both = pytest.mark.parametrize(
    ("problem", "ones"),
    [(in_torch, lambda *s: torch.ones(*s).double()), (in_jax, lambda *s: jnp.ones(s))],
    ids=["torch", "jax"],
)


@both
def test_times(problem, ones) -> None:
    for t, message in [
        ([0.0, 1.0, 0.5], r"t\[2\] = 0.5 does not come after t\[1\] = 1.0; times must increase"),
        ([0.0, 0.0, 0.5], r"t\[1\] = 0.0 does not come after"),
        ([0.0, np.nan, 1.0], r"t holds nan; times must be finite"),
        ((0.0, np.inf), r"t holds inf"),
        ([[0.0, 1.0]], r"t has shape \(1, 2\), expected a grid of times \[time\] or a span \(t0, t1\)"),
        ([0.0], r"t has shape \(1,\)"),
        (1.0, r"t has shape \(\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            problem(t=t)
    with pytest.raises(ValueError, match=r"np.unique sorts them .*; or all decrease, for time backward"):
        problem(t=[0.0, 1.0, 0.5])
    with pytest.raises(TypeError, match=r"t is str, expected numbers"):
        problem(t="now")
    assert problem(t=ones(3).cumsum(0)).t.tolist() == [1.0, 2.0, 3.0]


@both
def test_starts(problem, ones) -> None:
    with pytest.raises(ValueError, match=r"z0 has shape \(4,\), expected \[trial, unit\]; one trial is z0\[None\]"):
        problem(z0=ones(4))
    with pytest.raises(ValueError, match=r"at least one of each"):
        problem(z0=ones(0, 4))
    with pytest.raises(ValueError, match=r"z0 holds NaN or inf"):
        problem(z0=np.nan * ones(2, 4))
    with pytest.raises(TypeError, match=r"z0 is list, expected a torch tensor or a jax array"):
        problem(z0=[[1.0]])


def test_starts_of_other_dtypes_and_libraries() -> None:
    with pytest.raises(TypeError, match=r"z0 is torch.int64, expected float32 or float64"):
        in_torch(z0=torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"z0 is int64, expected float32 or float64"):
        in_jax(z0=jnp.ones((2, 4), int))
    with pytest.raises(TypeError, match=r"z0 is numpy.ndarray, expected a torch tensor"):
        in_torch(z0=np.ones((2, 4)))
    assert isinstance(in_jax(z0=np.ones((2, 4))).z0, jax.Array)


@both
def test_samples_of_inputs(problem, ones) -> None:
    for x, message in [
        (ones(2, 4, 1), r"x has 4 samples for 3 times"),
        (ones(3, 3, 1), r"x has shape \(3, 3, 1\), expected samples .* of 2 trials"),
        (ones(2, 3), r"expected samples \[trial, time, input\]"),
        (ones(2, 3, 0), r"expected samples"),
        (np.nan * ones(2, 3, 1), r"x holds NaN or inf, first at sample 0 \(trial 0\)"),
        (([0.0, 0.9], ones(2, 2, 1)), r"the times of x reach from 0.0 to 0.9, which does not cover .* 0.0 to 1.0"),
        (([0.1, 2.0], ones(2, 2, 1)), r"does not cover"),
        (([0.0, 1.0], ones(2, 3, 1)), r"x has 3 samples for 2 times"),
        (([0.0, 1.0, 1.0], ones(2, 3, 1)), r"times must increase"),
        ((1, 2, 3), r"x is a tuple of 3 parts, expected \(times \[n\], samples\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            problem(x=x)
    with pytest.raises(ValueError, match=r"samples on a span.*pass x=\(times, samples\)"):
        problem(t=(0.0, 1.0), x=ones(2, 3, 1))
    with pytest.raises(ValueError, match=r"does not cover"):
        problem(t=(0.0, 1.5), x=([0.0, 1.0], ones(2, 2, 1)))
    with pytest.raises(TypeError, match=r"x is str"):
        problem(x="input")


def test_samples_of_other_dtypes_and_libraries() -> None:
    with pytest.raises(TypeError, match=r"x is torch.float32 but z0 is torch.float64"):
        in_torch(x=torch.ones(2, 3, 1))
    with pytest.raises(TypeError, match=r"x is float32 but z0 is float64"):
        in_jax(x=jnp.ones((2, 3, 1), jnp.float32))
    with pytest.raises(TypeError, match=r"x is jax.Array but z0 is torch.Tensor; use one framework"):
        in_torch(x=jnp.ones((2, 3, 1)))
    with pytest.raises(TypeError, match=r"x is torch.Tensor but z0 is jax.Array"):
        in_jax(x=torch.ones(2, 3, 1))
    with pytest.raises(TypeError, match=r"x is numpy.ndarray, expected a torch tensor"):
        in_torch(x=np.ones((2, 3, 1)))


@both
def test_callable_inputs_of_the_wrong_shape(problem, ones) -> None:
    for value, message in [
        (ones(3, 1), r"x\(t\) has shape \(3, 1\), expected \[trial, input\] of 2 trials, or \[input\] for all"),
        (ones(2, 1, 1), r"x\(t\) has shape"),
        (ones(1)[0], r"x\(t\) has shape \(\)"),
        (np.nan * ones(2, 1), r"x\(t\) holds NaN or inf at t0"),
    ]:
        with pytest.raises(ValueError, match=message):
            kp.solve(problem(x=lambda t, value=value: value))
    with pytest.raises(TypeError, match=r"x\(t\) is float, expected"):
        kp.solve(problem(x=lambda t: 1.0))
    single = torch.ones(1) if problem is in_torch else jnp.ones(1, jnp.float32)
    with pytest.raises(TypeError, match=r"x\(t\) is .*float32 but z0 is .*float64"):
        kp.solve(problem(x=lambda t: single))


def test_float64_data_while_x64_is_off() -> None:
    with jax.enable_x64(False):
        with pytest.raises(TypeError, match=r"z0 is float64.*jax_enable_x64', True"):
            in_jax(z0=np.ones((2, 4)))
        with pytest.raises(TypeError, match=r"x is float64.*jax_enable_x64', True"):
            in_jax(z0=np.ones((2, 4), np.float32), x=np.ones((2, 3, 1)))


@both
def test_what_a_field_returns(problem, ones) -> None:
    for rate, message in [
        (lambda W, t, z: z[..., :3], r"f returned \((2, )?3,?\) of .*float64, expected z'"),
        (lambda W, t, z: (z, z), r"f returned tuple, expected z'"),
        (lambda W, t, z: 1.0, r"f returned (float|\(\) of float)"),
        (lambda W, t, z: None, r"f returned NoneType"),
        (lambda W, t, z: z[..., None], r"f returned"),
        (lambda W, t, z: z @ W[:3], r"f failed on t \(\), z \((2, )?4,?\).*: .* called"),
        (lambda W, t, z, x: z, r"f failed on t \(\), z .*where the problem has inputs x"),
    ]:
        with pytest.raises(ValueError, match=message):
            kp.solve(problem(rate))
    with pytest.raises(ValueError, match=r"f failed on t \(\), z .* x_t \((2, )?1,?\)"):
        kp.solve(problem(lambda W, t, z: z, x=ones(2, 3, 1)))


def test_what_a_field_returns_in_another_dtype() -> None:
    with pytest.raises(
        ValueError, match=r"f returned \(2, 4\) of torch.float32, expected z' \(2, 4\) of torch.float64"
    ):
        kp.solve(in_torch(lambda W, t, z: z.float()))
    with pytest.raises(ValueError, match=r"f returned \(4,\) of float32, expected z' \(4,\) of float64"):
        kp.solve(in_jax(lambda W, t, z: z.astype(jnp.float32)))


def test_fields_that_are_no_functions_in_torch() -> None:
    with pytest.raises(ValueError, match=r"two results for the same arguments"):
        kp.solve(in_torch(lambda W, t, z: z + torch.rand_like(z)))

    def in_place(W: Tensor, t: Tensor, z: Tensor) -> Tensor:
        z += 1.0
        return z @ W

    with pytest.raises(ValueError, match=r"f writes to its arguments in place"):
        kp.solve(in_torch(in_place))


def test_fields_with_a_memory_do_not_replay() -> None:
    calls = []

    def counting(W: Tensor, t: Tensor, z: Tensor) -> Tensor:
        calls.append(1)
        return torch.tanh(z @ W) * (1.0 + 1e-6 * (len(calls) > 20))

    with pytest.raises(ValueError, match=r"the step from t = .* another result when it is replayed, off by .*no noise"):
        kp.solve(in_torch(counting), "rk4", steps=0.05)

    def random(W: jax.Array, t: jax.Array, z: jax.Array) -> jax.Array:
        noise = jax.pure_callback(lambda: np.random.default_rng().standard_normal(), jax.ShapeDtypeStruct((), z.dtype))
        return z @ W + 1e-3 * noise

    with pytest.raises(ValueError, match=r"another result when it is replayed"):
        kp.solve(in_jax(random, z0=jnp.ones((1, 4)), t=(0.0, 1.0)), steps=0.5)


def test_round_off_of_large_terms_near_rest_is_no_noise() -> None:
    """Of terms that cancel, so that it is large beside the state that is left; here drawn, or counted."""
    drawn, calls = np.random.default_rng(0), []

    def rounded(W: jax.Array, t: jax.Array, z: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct((), z.dtype)
        return -5.0 * z @ W + 1e-13 * jax.pure_callback(lambda: np.asarray(drawn.standard_normal()), shape)

    def rounded_in_torch(W: Tensor, t: Tensor, z: Tensor) -> Tensor:
        calls.append(1)
        return -5.0 * z @ W + 1e-13 * (len(calls) % 3 if len(calls) > 20 else 0)

    for problem in (in_jax(rounded, jnp.ones((1, 4)), (0.0, 4.0)), in_torch(rounded_in_torch, t=(0.0, 4.0))):
        assert float(abs(kp.solve(problem).state[:, -1]).max()) < 1e-7


def test_what_a_replayed_step_may_differ_by() -> None:
    tableau = kp.ode.Tableau(np.zeros((1, 1)), np.ones(1), np.zeros(1), lambda theta: theta[..., None] - 1)
    states = torch.tensor([[[2.0], [1e-9]], [[1e-9], [1e-9]]], dtype=torch.float64)
    steps = kp.ode.AcceptedSteps.between(tableau, np.array([0.0, 1.0]), states)
    loose, tight = rounding_of(steps, 1e-8), rounding_of(steps, 0.0)
    eps = np.finfo(float).eps
    np.testing.assert_allclose(tight, 1e3 * eps * np.array([2.0, 1e-9]))  # of the largest state of the trial
    np.testing.assert_allclose(loose - tight, [1e-9, eps**0.5 * 1e-9])  # a tenth of atol, at most half the digits
    times, rounding = np.zeros((2, 1)), np.array([1e-9, 1e-12])
    check_same(np.array([[5e-10], [0.0]]), np.zeros((2, 1)), times, rounding)
    with pytest.raises(ValueError, match="another result"):
        check_same(np.array([[0.0], [5e-10]]), np.zeros((2, 1)), times, rounding)


@pytest.mark.parametrize("method", ["dopri5", "fehlberg2", "scipy_solver"])
def test_parameters_that_changed_since_the_solve(method: str) -> None:
    solution = kp.solve(in_torch(), method)
    assert solution(0.3).shape == (2, 4)
    with torch.no_grad():
        solution.problem.f.W.mul_(1.1)
    with pytest.raises(ValueError, match=r"parameters must be those of the solve"):
        solution(0.3)


def test_an_assertion_in_the_field_is_not_taken_for_an_explosion() -> None:
    def asserting(W: Tensor, t: Tensor, z: Tensor) -> Tensor:
        assert t < 0.7, "no more"
        return z @ W

    with pytest.raises(RuntimeError, match=r"f failed at t = 0\.\d+: no more"):
        kp.solve(in_torch(asserting), steps=0.1)


def test_fields_without_parameters() -> None:
    start = torch.ones(2, 4).double()
    with pytest.raises(TypeError, match=r"f is function, expected an nn.Module.*does not name its parameters"):
        kp.solve(kp.ODEProblem(lambda t, z: z, start, GRID))
    with pytest.raises(ValueError, match=r"f has no parameters"):
        kp.solve(kp.ODEProblem(nn.Identity(), start, GRID))
    W = jnp.eye(4)
    with pytest.raises(TypeError, match=r"closes over.*jax.tree_util.Partial\(function"):
        kp.solve(kp.ODEProblem(lambda t, z: z @ W, jnp.ones((2, 4)), GRID))

    class Empty(eqx.Module):
        rate: float = 1.0

        def __call__(self, t, z):
            return self.rate * z

    with pytest.raises(TypeError, match=r"Empty holds no arrays"):
        kp.solve(kp.ODEProblem(Empty(), jnp.ones((2, 4)), GRID))


def test_parameters() -> None:
    problem = in_torch()
    with pytest.raises(TypeError, match=r"parameter W is torch.float64 but z0 is torch.float32"):
        kp.solve(problem.remake(z0=torch.ones(2, 4)))
    with torch.no_grad():
        problem.f.W[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"parameter W holds NaN or inf"):
        kp.solve(problem)
    with pytest.raises(ValueError, match=r"lies on meta"):
        kp.solve(in_torch().remake(f=Field().to("meta")))
    in_float32 = jax.tree_util.Partial(lambda W, t, z: z @ W, jnp.eye(4, dtype=jnp.float32))
    with pytest.raises(TypeError, match=r"is float32 but the data are float64"):
        kp.solve(in_jax().remake(f=in_float32))
    with pytest.raises(ValueError, match=r"holds NaN or inf"):
        kp.solve(in_jax().remake(f=jax.tree_util.Partial(lambda W, t, z: z @ W, jnp.nan * jnp.eye(4))))


def test_dropout() -> None:
    problem = in_torch(lambda W, t, z: problem.f.drop(z @ W))
    problem.f.drop = nn.Dropout(0.2)
    with pytest.raises(ValueError, match=r"drop drops out with p = 0.2"):
        kp.solve(problem)
    problem.f.eval()
    assert kp.solve(problem).success


def test_methods() -> None:
    with pytest.raises(ValueError, match=r"alg is 'tsit5'.*expected one of dopri8, dopri5.*scipy_solver"):
        kp.solve(in_torch(), "tsit5")
    with pytest.raises(TypeError, match=r"alg is Tsit5\(.*torchdiffeq solves"):
        kp.solve(in_torch(), diffrax.Tsit5())
    with pytest.raises(TypeError, match=r"alg is 'dopri5'; z0 is a jax array, so diffrax solves.*diffrax.Tsit5\(\)"):
        kp.solve(in_jax(), "dopri5")
    with pytest.raises(TypeError, match=r"the class Kvaerno5, expected an instance: diffrax.Kvaerno5\(\)"):
        kp.solve(in_jax(), diffrax.Kvaerno5)
    with pytest.raises(TypeError, match=r"split into several terms.*Kvaerno5"):
        kp.solve(in_jax(), diffrax.KenCarp4())
    with pytest.raises(ValueError, match=r"moves the parts of a pair \(q, v\) in turn"):
        kp.solve(in_jax(), diffrax.SemiImplicitEuler())
    with pytest.raises(ValueError, match=r"scipy_solver neither tells its steps nor takes given ones"):
        kp.solve(in_torch(t=(0.0, 1.0)), "scipy_solver")
    discrete = kp.DiscreteProblem(nn.GRUCell(3, 4), torch.randn(2, 5, 3))
    for options in ({"alg": "dopri5"}, {"rtol": 1e-3}):
        with pytest.raises(TypeError, match=r"a DiscreteProblem is solved in one way; alg must be None"):
            kp.solve(discrete, **options)
    with pytest.raises(TypeError, match=r"DiscreteProblem\(cell, x\) or ODEProblem\(f, z0, t\), got \w+\.Field"):
        kp.solve(Field())


@both
def test_options(problem, ones) -> None:
    with pytest.raises(TypeError, match=r"unknown options \['tol'\], expected some of rtol, atol, max_steps, steps"):
        kp.solve(problem(), tol=1e-3)
    for name in ("rtol", "atol"):
        for value in (0.0, -1e-3, np.nan, np.inf, "small", True):
            with pytest.raises(ValueError, match=rf"{name} is .*, expected a positive number; the default is"):
                kp.solve(problem(), **{name: value})
    for value in (0, 1.5, True, None):
        with pytest.raises(ValueError, match=r"max_steps is .*, expected a positive integer"):
            kp.solve(problem(), max_steps=value)


@both
def test_steps(problem, ones) -> None:
    for steps, message in [
        ([0.1, 0.5, 1.0], r"steps reach from 0.1 to 1.0, expected from t0 = 0.0 to the last time 1.0; add them"),
        ([0.0, 0.5], r"steps reach from 0.0 to 0.5"),
        ([0.0, 2.0, 1.0], r"steps must be None, a length or increasing times: t\[2\]"),
        (0.0, r"steps = 0.0, expected a positive length"),
        (-0.1, r"expected a positive length"),
        (np.nan, r"expected a positive length"),
        (1e-9, r"more than max_steps = 4096; raise max_steps"),
    ]:
        with pytest.raises(ValueError, match=message):
            kp.solve(problem(), steps=steps)
    with pytest.raises(TypeError, match=r"steps must be None, a length or increasing times"):
        kp.solve(problem(), steps="fine")


def test_methods_that_do_not_choose_their_steps_need_them_on_a_span() -> None:
    with pytest.raises(ValueError, match=r"rk4 does not choose its steps; on a span pass steps="):
        kp.solve(in_torch(t=(0.0, 1.0)), "rk4")
    with pytest.raises(ValueError, match=r"Euler does not choose its steps"):
        kp.solve(in_jax(t=(0.0, 1.0)), diffrax.Euler())


def test_times_that_float32_cannot_tell_apart() -> None:
    with jax.enable_x64(False):
        f = jax.tree_util.Partial(lambda W, t, z: z @ W, jnp.eye(4))
        with pytest.raises(ValueError, match=r"t holds times closer than float32 can tell apart"):
            kp.solve(kp.ODEProblem(f, jnp.ones((2, 4)), [100.0, 100.000001, 101.0]))
