"""Linear systems: Gramians, Hankel modes, regulators and frequency responses against scipy and python-control."""

from __future__ import annotations

import sys

import control as oracle
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm, solve_continuous_lyapunov, solve_discrete_lyapunov

import kpflow_dyn as kp
from kpflow_dyn import control
from kpflow_dyn.control import LTI

RNG = np.random.default_rng(0)
STABLE = RNG.normal(size=(5, 5)) - 3 * np.eye(5)
B, C = RNG.normal(size=(5, 2)), RNG.normal(size=(3, 5))
CONTINUOUS = LTI(STABLE, B, C, RNG.normal(size=(3, 2)))
DISCRETE = LTI(0.25 * RNG.normal(size=(5, 5)), B, C, dt=0.1)


def assert_close(found: object, expected: object, rtol: float = 1e-10) -> None:
    scale = float(np.abs(np.asarray(expected)).max()) or 1.0
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=rtol * scale)


def van_loan(A: np.ndarray, B: np.ndarray, t: float) -> np.ndarray:
    n, block = len(A), np.block([[-A, B @ B.T], [0 * A, A.T]])
    F = expm(t * block)
    return F[n:, n:].T @ F[:n, n:]


# Gramians


def test_finite_gramians_are_those_of_matrix_exponentials() -> None:
    times = np.array([0.0, 0.1, 0.15, 0.7, 1.3])
    reach, tell = (control.gram(CONTINUOUS, kind, t=times).W.values[0] for kind in "co")
    for n, t in enumerate(times):
        assert_close(reach[n], van_loan(STABLE, B, t) if t else 0 * STABLE)
        assert_close(tell[n], van_loan(STABLE.T, C.T, times[-1] - t) if n < 4 else 0 * STABLE)


def test_long_horizons_tend_to_the_lyapunov_equation() -> None:
    for kind, A, Q in (("c", STABLE, B @ B.T), ("o", STABLE.T, C.T @ C)):
        found = control.gram(CONTINUOUS, kind, t=[0.0, 30.0]).W.values[0, -1 if kind == "c" else 0]
        expected = solve_continuous_lyapunov(A, -Q)
        assert_close(found, expected)
        assert_close(control.gram(CONTINUOUS, kind).W, expected)


def test_stiff_systems_over_long_intervals_lose_nothing() -> None:
    A = np.array([[-1000.0, 1.0], [0.0, -0.1]])
    found = control.gram(LTI(A, np.eye(2)), "c", t=[0.0, 500.0]).W.values[0, -1]
    assert_close(found, solve_continuous_lyapunov(A, -np.eye(2)))


def test_discrete_gramians_are_sums() -> None:
    powers = [np.linalg.matrix_power(DISCRETE.A, k) for k in range(40)]
    reach = np.cumsum([M @ B @ B.T @ M.T for M in powers], 0)
    tell = np.cumsum([M.T @ C.T @ C @ M for M in powers], 0)
    assert_close(control.gram(DISCRETE, "c", t=40).W.values[0], reach)
    assert_close(control.gram(DISCRETE, "o", t=40).W.values[0], tell[::-1])
    assert_close(control.gram(DISCRETE, "c").W, solve_discrete_lyapunov(DISCRETE.A, B @ B.T))
    assert_close(control.gram(DISCRETE, "c").W, reach[-1])


@pytest.mark.parametrize(("system", "t"), [(CONTINUOUS, np.linspace(0, 2, 9)), (DISCRETE, 20)])
@pytest.mark.parametrize("kind", "co")
def test_factors_of_full_rank_are_exact_and_shorter_ones_tell_what_is_lost(system: LTI, t: object, kind: str) -> None:
    whole = control.gram(system, kind, t=t)
    factors = control.gram(system, kind, t=t, rank=5)
    assert_close(factors.W, whole.W)
    assert float(abs(factors.cut).max()) < 1e-12
    assert_close(factors.eigenvalues, whole.eigenvalues)
    short = control.gram(system, kind, t=t, rank=2)
    rest = np.linalg.eigvalsh((whole.W - short.W).values)
    assert rest.min() > -1e-12 * float(whole.W.max())  # never more than there is
    assert float(short.cut.max()) > 1e-4
    assert whole.directions.dims == factors.directions.dims == ("trial", "time", "unit", "mode")


def test_a_factor_of_the_true_rank_is_the_gramian() -> None:
    system = LTI(np.diag([-1.0, -2.0, -3.0, -4.0]), np.eye(4)[:, :2])
    whole, short = (control.gram(system, "c", t=np.linspace(0, 1, 5), rank=rank) for rank in (None, 2))
    assert_close(short.W, whole.W)


def test_an_unstable_system_has_finite_gramians_until_they_overflow() -> None:
    unstable = LTI([[1.0]], [[1.0]])
    assert_close(control.gram(unstable, "c", t=[0.0, 3.0]).W.values[0, -1], (np.exp(6) - 1) / 2)
    with pytest.raises(ValueError, match=r"not stable.*give a horizon"):
        control.gram(unstable, "c")
    for kind, options in (("c", {}), ("o", {}), ("c", {"rank": 1})):
        with pytest.raises(ValueError, match=r"overflows at t = .*take a shorter one"):
            control.gram(unstable, kind, t=np.linspace(0.0, 800.0, 9), **options)
    with pytest.raises(ValueError, match="overflows"):
        control.gram(LTI([[2.0]], [[1.0]], dt=1.0), "c", t=2000)


# Hankel operators, ranks


def test_hankel_singular_values_of_long_horizons_are_those_of_the_system() -> None:
    Wc, Wo = solve_continuous_lyapunov(STABLE, -B @ B.T), solve_continuous_lyapunov(STABLE.T, -C.T @ C)
    expected = np.sqrt(np.sort(np.linalg.eigvals(Wc @ Wo).real)[::-1])
    assert_close(control.hsvd(CONTINUOUS), expected)
    assert_close(control.hankel(CONTINUOUS, 15.0, t=np.linspace(0, 30, 61)).values.values[0], expected)


def test_hankel_modes_are_those_of_the_matrix_of_markov_parameters() -> None:
    past, future = 6, 5
    markov = [C @ np.linalg.matrix_power(DISCRETE.A, k) @ B for k in range(past + future)]
    H = np.block([[markov[j + past - 1 - i] for i in range(past)] for j in range(future)])
    found = control.hankel(DISCRETE, past * DISCRETE.dt, t=past + future - 1)
    values = np.linalg.svd(H, compute_uv=False)[:5]
    assert_close(found.values[0], values)
    inputs, outputs = (a.values[0].reshape(5, -1) for a in (found.inputs, found.outputs))
    assert_close(inputs @ inputs.T, np.eye(5))
    assert_close(outputs @ outputs.T, np.eye(5))
    assert_close(inputs @ H.T, values[:, None] * outputs)
    reach = np.concatenate([np.linalg.matrix_power(DISCRETE.A, past - 1 - i) @ B for i in range(past)], 1)
    assert_close(found.states[0], inputs @ reach.T)


def test_hankel_modes_in_continuous_time_are_orthonormal_functions() -> None:
    times = np.linspace(0, 4, 801)
    found = control.hankel(CONTINUOUS, 2.0, t=times)
    for functions in (found.inputs, found.outputs):
        h = np.full(functions.sizes["time"], times[1])
        h[[0, -1]] /= 2
        inner = np.einsum("mtc,t,ntc->mn", functions.values[0], h, functions.values[0])
        assert_close(inner[:3, :3], np.eye(3), 2e-3)
    driven = solve_ivp(
        lambda t, z: STABLE @ z + B @ [np.interp(t, times[:401], u) for u in found.inputs.values[0, 0].T],
        (0, 2),
        np.zeros(5),
        rtol=1e-8,
        max_step=0.05,
    ).y[:, -1]
    assert_close(driven, found.states.values[0, 0], 1e-4)
    assert_close(C @ driven, found.values.values[0, 0] * found.outputs.values[0, 0, 0], 1e-4)


def test_directions_that_nothing_reaches_have_modes_of_zeros() -> None:
    found = control.hankel(LTI(-np.eye(2), [[1.0], [0.0]]), 1.0, t=[0.0, 1.0, 2.0])
    assert found.values[0, 1] < 1e-7 * found.values[0, 0]
    assert not found.inputs[0, 1].values.any() and not found.outputs[0, 1].values.any()


def test_kalmans_matrices_are_those_of_python_control() -> None:
    assert_close(control.ctrb(STABLE, B), oracle.ctrb(STABLE, B))
    assert_close(control.obsv(STABLE, C), oracle.obsv(STABLE, C))
    hidden = control.obsv(np.diag([1.0, 2.0]), [[1.0, 0.0]])
    assert np.linalg.matrix_rank(hidden) == 1


# Regulators


def test_regulators_are_those_of_python_control() -> None:
    Q, R = np.diag([1.0, 2.0, 0.0, 1.0, 3.0]), np.array([[1.0, 0.2], [0.2, 2.0]])
    for ours, theirs, A in ((control.lqr, oracle.lqr, STABLE + 4 * np.eye(5)), (control.dlqr, oracle.dlqr, DISCRETE.A)):
        K, X, poles = ours(A, B, Q, R)
        K_, X_, poles_ = theirs(A, B, Q, R)
        assert_close(K, K_, 1e-8)
        assert_close(X, X_, 1e-8)
        assert_close(np.sort_complex(poles), np.sort_complex(poles_), 1e-8)


def test_the_riccati_equation_over_a_horizon() -> None:
    A, Q, R, Qf = STABLE + 4 * np.eye(5), np.eye(5), np.eye(2), 2 * np.eye(5)
    system, times = LTI(A, B), np.array([0.0, 0.4, 0.5, 1.0])

    def backward(t: float, X: np.ndarray) -> np.ndarray:
        M = X.reshape(5, 5)
        return (A.T @ M + M @ A - M @ B @ B.T @ M + Q).ravel()

    exact = solve_ivp(backward, (0, 1), Qf.ravel(), t_eval=1 - times[::-1], rtol=1e-11, atol=1e-12).y.T[::-1]
    found = control.tvlqr(system.along(times), Q, R, Qf)
    assert_close(found.X[0], exact.reshape(4, 5, 5), 1e-9)
    assert_close(found.K[0], B.T @ exact.reshape(4, 5, 5), 1e-9)
    K, X, _ = control.lqr(A, B, Q, R)
    long = control.tvlqr(system.along([0.0, 60.0]), Q, R, Qf)
    assert_close(long.K[0, 0], K, 1e-9)
    assert_close(long.X[0, 0], X, 1e-9)


def test_discrete_gains_cost_least_and_tend_to_dlqr() -> None:
    A, Q, R, Qf, T = DISCRETE.A + 0.5 * np.eye(5), np.eye(5), np.diag([1.0, 3.0]), 4 * np.eye(5), 6
    found = control.tvlqr(LTI(A, B, dt=1.0).along(T), Q, R, Qf)
    start = RNG.normal(size=5)
    # States as an affine function of all inputs, and the least cost of a quadratic function of these.
    power = [np.linalg.matrix_power(A, k) for k in range(T + 1)]
    free = np.concatenate([M @ start for M in power[1:]])
    forced = np.block([[power[i - j] @ B if j <= i else 0 * B for j in range(T)] for i in range(T)])
    weight = np.kron(np.diag([1.0] * (T - 1) + [0.0]), Q) + np.kron(np.diag([0.0] * (T - 1) + [1.0]), Qf)
    hessian = forced.T @ weight @ forced + np.kron(np.eye(T), R)
    u = np.linalg.solve(hessian, -forced.T @ weight @ free)
    z = np.concatenate([[start], (free + forced @ u).reshape(T, 5)])
    assert_close(u.reshape(T, 2), [-found.K.values[0, t] @ z[t] for t in range(T)])
    cost = start @ Q @ start + (free + forced @ u) @ weight @ (free + forced @ u) + u @ np.kron(np.eye(T), R) @ u
    first = Q + A.T @ found.X.values[0, 0] @ (A - B @ found.K.values[0, 0])
    assert start @ first @ start == pytest.approx(cost, rel=1e-12)
    K, X, _ = control.dlqr(A, B, Q, R)
    long = control.tvlqr(LTI(A, B, dt=1.0).along(80), Q, R, Qf)
    assert_close(long.K[0, 0], K, 1e-9)
    assert_close(long.X[0, 0], X, 1e-9)


# Frequencies, conversion


@pytest.mark.parametrize("system", [CONTINUOUS, DISCRETE])
def test_frequency_responses_are_those_of_python_control(system: LTI) -> None:
    omega = np.geomspace(0.01, 30, 12)
    found = control.frequency_response(system, omega)
    theirs = oracle.frequency_response(system.to_control(), omega)
    assert_close(found.response, theirs.complex)
    assert_close(found.magnitude, theirs.magnitude)
    assert_close(np.exp(1j * found.phase), np.exp(1j * theirs.phase))
    assert_close(found.singular_values[:, 0], [np.linalg.norm(M, 2) for M in theirs.complex.transpose(2, 0, 1)])


def test_a_system_becomes_one_of_python_control(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = DISCRETE.to_control()
    for name in "ABCD":
        assert_close(getattr(theirs, name), getattr(DISCRETE, name))
    assert theirs.dt == 0.1 and CONTINUOUS.to_control().dt == 0
    assert_close(np.sort_complex(theirs.poles()), np.sort_complex(DISCRETE.poles))
    assert dict(CONTINUOUS.to_xarray().sizes) == {"unit": 5, "from_unit": 5, "input": 2, "output": 3}
    monkeypatch.setitem(sys.modules, "control", None)
    with pytest.raises(ModuleNotFoundError, match=r"kpflow-dyn\[control\]"):
        DISCRETE.to_control()


def test_figures() -> None:
    along = CONTINUOUS.along(np.linspace(0, 1, 5))
    drawn = [
        CONTINUOUS.plot(),
        DISCRETE.plot(dark=True),
        along.plot(),
        DISCRETE.along(4).plot(),
        control.gram(CONTINUOUS, "c").plot(),
        control.gram(along, "o").plot(),
        control.hankel(along, 0.5).plot(),
        control.tvlqr(along, np.eye(5), np.eye(2)).plot(),
        control.frequency_response(CONTINUOUS, [0.1, 1.0]).plot(),
    ]
    assert all(figure.axes[0].has_data() for figure in drawn)


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LTI(np.ones((2, 3)), B), r"A has shape \(2, 3\)"),
        (lambda: LTI(STABLE, B[:4]), r"B has shape \(4, 2\), expected a matrix \[5, any\]"),
        (lambda: LTI(STABLE, B, C[:, :4]), "C has shape"),
        (lambda: LTI(STABLE, B, D=np.ones((1, 1))), "D has shape"),
        (lambda: LTI(STABLE * np.nan, B), "A holds NaN"),
        (lambda: LTI(STABLE, B, dt=-1.0), "dt is -1.0"),
        (lambda: CONTINUOUS.along([0.0, 1.0, 1.0]), "must increase"),
        (lambda: DISCRETE.along([0.0, 1.0]), "expected the number of steps"),
        (lambda: control.gram(CONTINUOUS, "x"), "kind is 'x'"),
        (lambda: control.gram(CONTINUOUS, "c", rank=2), "over infinite time"),
        (lambda: control.gram(CONTINUOUS, "c", t=[0.0, 1.0], rank=6), "rank is 6"),
        (lambda: control.gram(CONTINUOUS, "c", loop="open"), "options of linearize_ltv"),
        (lambda: control.gram(DISCRETE.along(3), "c", t=[0.0, 1.0]), "has its times already"),
        (lambda: control.hankel(CONTINUOUS, 3.0, t=[0.0, 1.0, 2.0]), "split is 3.0"),
        (lambda: control.hankel(CONTINUOUS, 0.5, t=[0.0, 1.0, 2.0]), "one of the times inside"),
        (lambda: control.hankel(CONTINUOUS, 2.0, t=[0.0, 1.0, 2.0]), "one of the times inside"),
        (lambda: control.hankel(CONTINUOUS, 1.0), "give a horizon"),
        (lambda: control.hsvd(LTI([[1.0]], [[1.0]])), "not stable"),
        (lambda: control.ctrb(STABLE, B[:4]), "B has shape"),
        (lambda: control.obsv(STABLE, C[:, :4]), "shape"),
        (lambda: control.lqr(STABLE, B, np.eye(4), np.eye(2)), r"Q has shape \(4, 4\)"),
        (lambda: control.lqr(STABLE, B, np.eye(5), np.eye(3)), r"R has shape \(3, 3\)"),
        (lambda: control.lqr(STABLE, B, -np.eye(5), np.eye(2)), "positive semi-definite"),
        (lambda: control.lqr(STABLE, B, np.eye(5), np.diag([1.0, 0.0])), "positive definite"),
        (lambda: control.lqr(STABLE, B, STABLE, np.eye(2)), "Q is not symmetric"),
        (lambda: control.lqr(np.eye(2), [[1.0], [0.0]], np.eye(2), [[1.0]]), "must be stabilisable"),
        (lambda: control.dlqr(2 * np.eye(2), [[1.0], [0.0]], np.eye(2), [[1.0]]), "must be stabilisable"),
        (lambda: control.tvlqr(DISCRETE.along(3), np.eye(5), np.eye(2), np.eye(4)), "Qf has shape"),
        (lambda: control.frequency_response(CONTINUOUS, [-1.0]), "frequencies"),
        (lambda: control.frequency_response(LTI([[0.0]], [[1.0]]), [0.0]), "a pole at omega = 0"),
        (lambda: control.QuadraticCost(np.eye(2), target=[1.0]), "target has shape"),
        (lambda: control.QuadraticCost(np.eye(2))(np.ones(3)), "Q has shape"),
    ],
)
def test_what_does_not_fit_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    "make",
    [
        lambda: control.gram(STABLE, "c"),
        lambda: control.hsvd(STABLE),
        lambda: control.tvlqr(CONTINUOUS, np.eye(5), np.eye(2)),
        lambda: control.frequency_response(STABLE, [1.0]),
        lambda: control.reachable_angles(STABLE, control.gram(CONTINUOUS, "c")),
        lambda: control.linearize_ltv(STABLE),
        lambda: control.adjoint(STABLE, np.sum),
        lambda: control.gram_operator(STABLE, "c", 1),
    ],
)
def test_other_types_are_refused(make: object) -> None:
    with pytest.raises(TypeError, match=r"takes|expected|must be"):
        make()  # type: ignore[operator]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        control.nonsense  # noqa: B018
    assert set(dir(control)) == set(control.__all__)


def test_margins_of_an_unstable_closed_loop_say_that_they_are_none() -> None:
    unstable = control.LTI([[2.0]], [[1.0]], [[1.0]])  # closed: a pole at 1
    stable = control.LTI([[2.0]], [[1.0]], [[3.0]])
    for margins in (control.stability_margins, control.disk_margins):
        bad, good = margins(unstable), margins(stable)
        assert not bad.stable and "the closed loop is unstable: these are no margins" in str(bad)
        assert good.stable and "unstable" not in str(good) and "degrees" in good._repr_html_()
    assert "a factor" in str(control.stability_margins(stable)) and "dB" in str(control.disk_margins(stable))
    gain, phase, *_ = control.stability_margins(stable)  # a tuple as that of python-control
    assert gain == pytest.approx(2 / 3) and phase == pytest.approx(np.degrees(np.arccos(2 / 3)))


def test_what_takes_time_is_no_plant() -> None:
    with pytest.raises(TypeError, match=r"plant takes \(t, z, u\), but is called as plant\(z, u\)"):
        kp.models.ClosedLoop(lambda t, z, u: z, torch.nn.Linear(2, 1))


def test_one_control_without_its_axis() -> None:
    class Scalar(torch.nn.Linear):
        def forward(self, z):
            return super().forward(z)[..., 0]

    loop = kp.models.ClosedLoop(lambda z, u: z, Scalar(2, 1).double())
    with pytest.raises(ValueError, match=r"policy returned \(3,\), expected a control u \[3, control\]"):
        kp.solve(kp.ODEProblem(loop, torch.ones(3, 2).double(), [0.0, 0.5, 1.0]), "rk4")
