"""The calling forms of python-control: systems of others, cross terms of weights, modes named in errors."""

from __future__ import annotations

import sys
from typing import Any

import control as oracle
import numpy as np
import pytest
from scipy import signal
from scipy.linalg import block_diag, solve_continuous_lyapunov, solve_discrete_lyapunov

from kpflow_dyn import control
from kpflow_dyn.control import LTI


def assert_close(found: object, expected: object, rtol: float = 1e-9) -> None:
    scale = float(np.abs(np.asarray(expected)).max()) or 1.0
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=rtol * scale)


def turned(A: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Q^T A Q of a random rotation Q, and Q."""
    Q = np.linalg.qr(np.random.default_rng(seed).normal(size=A.shape))[0]
    return Q.T @ A @ Q, Q


def stable_matrices(dt: float | None) -> list[np.ndarray]:
    """Of one state, of many, with repeated and with defective eigenvalues."""
    rng, pole = np.random.default_rng(1), -0.7 if dt is None else 0.6
    general = rng.normal(size=(5, 5)) - 4 * np.eye(5) if dt is None else 0.3 * rng.normal(size=(5, 5))
    jordan = pole * np.eye(4) + np.eye(4, k=1)
    return [np.array([[pole]]), general, pole * np.eye(3), jordan, turned(jordan)[0]]


SYSTEMS = [
    LTI(A, rng.normal(size=(len(A), m)), rng.normal(size=(p, len(A))), rng.normal(size=(p, m)), dt)
    for dt in (None, 0.1, True)
    for seed, A in enumerate(stable_matrices(dt))
    for rng in [np.random.default_rng(seed)]
    for m, p in [[(1, 1), (2, 3)][seed % 2]]
]


def forms(system: LTI) -> dict[str, Any]:
    """The same system as others write it."""
    theirs = signal.StateSpace(*(getattr(system, name) for name in "ABCD"), **({"dt": system.dt} if system.dt else {}))
    matrices = tuple(getattr(system, name) for name in "ABCD")
    return {"control": system.to_control(), "scipy": theirs, "tuple": (*matrices, system.dt)}


@pytest.mark.parametrize("system", SYSTEMS)
def test_systems_of_others_are_the_same_in_every_function(system: LTI) -> None:
    omega = np.array([0.1, 0.9, 1.4])
    for form, theirs in forms(system).items():
        ours = LTI(theirs)
        assert (ours.dt, type(ours.dt)) == (system.dt, type(system.dt)), form
        for name in "ABCD":
            assert_close(getattr(ours, name), getattr(system, name), 0)
        n, m = system.B.shape
        assert_close(control.gram(theirs, "c"), control.gram(system, "c").W, 0)
        assert_close(control.hsvd(theirs), control.hsvd(system), 0)
        assert_close(control.ctrb(theirs), oracle.ctrb(system.A, system.B))
        assert_close(control.obsv(theirs), oracle.obsv(system.A, system.C))
        assert_close(control.ctrb(theirs, t=2), oracle.ctrb(system.A, system.B, t=2))
        found = control.frequency_response(theirs, omega)
        expected = oracle.frequency_response(system.to_control(), omega)
        assert_close(found.response.values.ravel(), np.ravel(expected.complex))
        ours_now, theirs_now = tuple(found), tuple(expected)
        assert_close(ours_now[0], theirs_now[0])
        assert ours_now[1].shape == theirs_now[1].shape and ours_now[2].tolist() == omega.tolist()
        method = control.lqr if system.dt is None else control.dlqr
        pairs = zip(method(theirs, np.eye(n), np.eye(m)), method(system.A, system.B, np.eye(n), np.eye(m)), strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("system", SYSTEMS)
def test_gramians_and_their_factors(system: LTI) -> None:
    for kind, A, Q in (("c", system.A, system.B @ system.B.T), ("o", system.A.T, system.C.T @ system.C)):
        W = solve_continuous_lyapunov(A, -Q) if system.dt is None else solve_discrete_lyapunov(A, Q)
        whole, factor = control.gram(system, kind), control.gram(system, kind + "f")
        assert_close(whole, W)
        R = np.asarray(factor)
        assert R.shape == factor.shape == W.shape and not np.tril(R, -1).any() and (np.diag(R) >= 0).all()
        assert_close(R.T @ R, W)
        assert_close(factor.W, W)
        assert_close(whole @ np.ones(len(W)), W.sum(1))
        assert_close(np.linalg.eigvalsh(whole), np.linalg.eigvalsh(W))
        assert whole[0, 0] == whole.W.values[0, 0]
        assert_close(2 * whole.T, 2 * W)
    assert control.gram(system, "cf").R.dims == ("rank", "unit")


def test_factors_along_a_trial() -> None:
    system = SYSTEMS[1]
    factor = control.gram(system, "of", t=[0.0, 0.4, 1.0])
    assert factor.shape == (1, 3, 5, 5)
    assert_close(np.swapaxes(factor, -1, -2) @ np.asarray(factor), control.gram(system, "o", t=[0.0, 0.4, 1.0]))


def test_names_and_steps_go_there_and_back() -> None:
    named = LTI([[0.0, 1.0], [0.0, -1.0]], [0.0, 1.0], [1.0, 0.0], names=("angle", "rate"))
    theirs = named.to_control()
    assert theirs.state_labels == ["angle", "rate"]
    assert LTI(theirs).names == named.names and LTI(SYSTEMS[1].to_control()).names == ()
    assert named.B.shape == (2, 1) and named.C.shape == (1, 2)
    assert LTI(theirs, dt=0.1).dt == 0.1 and LTI(theirs, names=("a", "b")).names == ("a", "b")
    assert LTI(-1, 2, 3, 4).A.shape == (1, 1) and LTI((-1, 2, 3, 4), dt=0).dt is None
    assert LTI(oracle.ss(-1, 1, 1, 0, True)).to_control().dt is True


def columns(count: int) -> list[Any]:
    return [[[1.0, 2.0], [3.0], [1.0, 0.0, -1.0]][i % 3] for i in range(count)]


@pytest.mark.parametrize("dt", [0, 0.2])
def test_transfer_functions_become_a_realisation(dt: float) -> None:
    denominators = [[2.0, 1.0, 3.0], [1.0, 0.5, 0.2], [2.0, 1.0, 3.0]]
    transfers = [
        oracle.tf([2.0, 1.0], [3.0, 1.0, 5.0], dt),
        oracle.tf([1.0], [1.0, 1.0, 0.0], dt),
        oracle.tf([[columns(1)[0], columns(2)[1]]] * 2, [[denominators[0], denominators[1]]] * 2, dt),
        oracle.tf([columns(3), columns(3)[::-1]], [denominators, denominators[::-1]], dt),
        oracle.tf([[[2.0]], [[1.0, 1.0]]], [[[1.0]], [[1.0, 3.0]]], dt),
        oracle.zpk([-1.0], [-2.0, -3.0], 4.0, dt=dt),
    ]
    omega = np.array([0.2, 1.7])
    for theirs in transfers:
        expected = oracle.frd(theirs, omega).frdata
        assert_close(control.frequency_response(theirs, omega).response, expected)
        assert LTI(theirs).dt == (dt or None)
    assert len(LTI(transfers[2]).A) == 4  # outputs of one input with the same poles share states
    kinds = [signal.TransferFunction, signal.dlti] if dt else [signal.TransferFunction, signal.lti]
    for kind in kinds:
        theirs = kind([1.0, 2.0], [1.0, 3.0, 0.5], **({"dt": dt} if dt else {}))
        for one in (theirs, theirs.to_zpk(), theirs.to_ss()):
            expected = theirs.freqresp(omega * (dt or 1))[1]
            assert_close(control.frequency_response(one, omega).response[0, 0], expected)


def weights(n: int, m: int, seed: int) -> tuple[np.ndarray, ...]:
    """Q, R and N of a joint weight that is positive definite."""
    M = np.random.default_rng(seed).normal(size=(n + m, n + m))
    joint = M @ M.T
    return joint[:n, :n], joint[n:, n:], joint[:n, n:]


@pytest.mark.parametrize("system", SYSTEMS)
def test_regulators_and_estimators_in_every_form(system: LTI) -> None:
    n, m = system.B.shape
    Q, R, N = weights(n, m, n)
    A = system.A + (1.5 if system.dt is None else 0.9) * np.eye(n)
    unstable = LTI(A, system.B, system.C, system.D, system.dt)
    ours, theirs = (control.lqr, oracle.lqr) if system.dt is None else (control.dlqr, oracle.dlqr)
    is_reachable = not control._modes.unreachable(A, system.B)
    for rest in ((Q, R), (Q, R, N)):
        if not is_reachable:
            continue
        expected = theirs(A, system.B, *rest)
        named = dict(zip("QRN", rest, strict=False))
        calls = [ours(A, system.B, *rest), ours(unstable, *rest), ours(unstable.to_control(), *rest)]
        calls += [ours(A=A, B=system.B, **named), ours(system=unstable, **named), control.lqr(unstable, *rest)]
        for found in calls:
            K, S, E = found
            rtol = 1e-7 if np.abs(K).max() < 1e3 else 1e-4  # one input to four states of one pole: ill-conditioned
            assert_close(K, expected[0], rtol)
            assert_close(S, expected[1], rtol)
            assert_close(np.poly(E), np.poly(expected[2]), rtol)
    ours = control.lqe if system.dt is None else control.dlqe
    QN, RN, NN = weights(m, len(system.C), n)
    driven = system.B @ QN @ system.B.T
    dual = (system.A.T, system.C.T, (driven + driven.T) / 2, RN)
    # Their lqe takes no products that rounding left unsymmetric, as G QN G^T is.
    P, _, gain = oracle.care(*dual) if system.dt is None else oracle.dare(*dual)
    expected = np.transpose(gain), P
    for found in (ours(system.A, system.B, system.C, QN, RN), ours(system, QN, RN), control.lqe(system, QN, RN)):
        assert_close(found.L, expected[0], 1e-7)
        assert_close(found.P, expected[1], 1e-7)
    L, P, _ = ours(system, QN, RN, NN)  # python-control has no NN: the equation itself
    A, G, C = system.A, system.B, system.C
    if system.dt is None:
        assert_close(L, (P @ C.T + G @ NN) @ np.linalg.inv(RN), 1e-7)
        assert_close(A @ P + P @ A.T + G @ QN @ G.T, L @ RN @ L.T, 1e-7)
    else:
        assert_close(L, (A @ P @ C.T + G @ NN) @ np.linalg.inv(C @ P @ C.T + RN), 1e-7)
        assert_close(A @ P @ A.T + G @ QN @ G.T - L @ (C @ P @ C.T + RN) @ L.T, P, 1e-7)


def test_integrals_of_outputs_are_further_states() -> None:
    A, B, C = np.array([[0.0, 1.0], [-1.0, -0.3]]), np.array([[0.0], [1.0]]), np.array([[1.0, 0.0]])
    for ours, theirs in ((control.lqr, oracle.lqr), (control.dlqr, oracle.dlqr)):
        found, expected = (f(A, B, np.eye(3), [[2.0]], integral_action=C) for f in (ours, theirs))
        assert_close(found.K, expected[0], 1e-8)


def test_an_input_without_cost_in_discrete_time() -> None:
    A, B = np.array([[1.2, 1.0], [0.0, 0.5]]), np.eye(2)
    assert_close(control.dlqr(A, B, np.eye(2), 0 * np.eye(2)).K, A, 1e-8)  # the next state is nothing at once


# Modes at fault


def hidden(bad: np.ndarray, dt: float | None, seed: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A, B whose inputs do not reach `bad`, in turned coordinates, and the turn."""
    good = stable_matrices(dt)[1]
    rng = np.random.default_rng(seed)
    A = block_diag(good, bad)
    A[:5, 5:] = rng.normal(size=(5, len(bad)))
    A, turn = turned(A, seed)
    return A, turn.T @ np.vstack([rng.normal(size=(5, 2)), np.zeros((len(bad), 2))]), turn


ROTATION = np.array([[0.0, 2.0], [-2.0, 0.0]])
CASES = [
    (np.array([[0.5]]), None, r"at 0\.5, made of"),
    (np.array([[0.0]]), None, r"at -?[0-9.e-]+, made of"),
    (np.array([[0.0, 1.0], [0.0, 0.0]]), None, r"at -?[0-9.e-]+( ± [0-9.e-]+i)?, made of"),
    (ROTATION, None, r"at [0-9.e-]+ ± 2i, made of"),
    (np.array([[1.0]]), 0.1, r"at 1, made of"),
    (np.array([[1.0, 1.0], [0.0, 1.0]]), 0.1, r"at (1|0\.9999|1\.000)( ± [0-9.e-]+i)?, made of"),
    (np.array([[0.6, 0.8], [-0.8, 0.6]]), 0.1, r"at 0\.6 ± 0\.8i"),
]


@pytest.mark.parametrize(("bad", "dt", "message"), CASES)
def test_a_mode_that_no_input_moves_is_named(bad: np.ndarray, dt: float | None, message: str) -> None:
    A, B, _ = hidden(bad, dt)
    method = control.lqr if dt is None else control.dlqr
    with pytest.raises(ValueError, match=r"must be stabilisable, but no input moves the mode of A " + message):
        method(A, B, np.eye(len(A)), np.eye(2))
    estimate = control.lqe if dt is None else control.dlqe
    with pytest.raises(ValueError, match=r"must be detectable, but no output tells the mode of A " + message):
        estimate(A.T, np.eye(len(A)), B.T, np.eye(len(A)), np.eye(2))


@pytest.mark.parametrize(("bad", "dt", "message"), CASES[1:])
def test_a_mode_on_the_boundary_that_the_cost_does_not_see_is_named(
    bad: np.ndarray, dt: float | None, message: str
) -> None:
    A, C = (M.T for M in hidden(bad, dt)[:2])
    n, method = len(A), control.lqr if dt is None else control.dlqr
    with pytest.raises(ValueError, match="does not see the one " + message):
        method(A, np.eye(n), C.T @ C, np.eye(n))
    # A cross term takes it out of sight: u = K z + v, and v is what costs.
    K = np.random.default_rng(5).normal(size=(n, n))
    with pytest.raises(ValueError, match="does not see the one"):
        method(A + K, np.eye(n), C.T @ C + K.T @ K, np.eye(n), K.T)


def test_modes_are_told_by_the_names_of_the_states() -> None:
    loop = LTI([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]], [[0.0], [0.0], [1.0]], names=("x", "v", "tank"))
    with pytest.raises(ValueError, match=r"at 0, made of v, which"):
        control.lqr(loop, np.eye(3), 1.0)
    with pytest.raises(ValueError, match=r"the mode at 1, made of tank; .* has a real part >= 0"):
        control.gram(loop, "c")
    swing = LTI([[0.0, 1.0], [-4.0, 0.0]], [[1.0], [0.0]], names=("angle", "rate"))
    with pytest.raises(ValueError, match=r"the mode at 0 ± 2i, made of rate \(80 %\), angle \(20 %\)"):
        control.gram(swing, "o")
    with pytest.raises(ValueError, match=r"Q has the eigenvalue -1 along angle - rate, expected a positive semi-def"):
        control.lqr(swing, [[0.0, 1.0], [1.0, 0.0]], 1.0)
    with pytest.raises(ValueError, match=r"Q - N R\^-1 N\^T has the eigenvalue -3 along rate"):
        control.lqr(swing, np.eye(2), 1.0, [[0.0], [2.0]])
    with pytest.raises(ValueError, match=r"R has the eigenvalue 0 along u\[1\]"):
        control.lqr(np.eye(2), np.eye(2), np.eye(2), np.diag([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"R does not weigh u\[1\]"):
        control.dlqr(np.eye(2) / 2, [[1.0, 0.0], [1.0, 0.0]], np.eye(2), np.diag([1.0, 0.0]))
    with pytest.raises(ValueError, match="N weighs what R does not"):
        control.dlqr(np.eye(2), np.eye(2), np.eye(2), np.zeros((2, 2)), np.eye(2))


@pytest.mark.parametrize("dt", [None, 0.1])
def test_defective_modes_on_the_boundary_are_not_stable(dt: float | None) -> None:
    pole = 0.0 if dt is None else 1.0
    for seed in range(5):
        A = turned(block_diag(pole * np.eye(2) + np.eye(2, k=1), (pole - 0.5) * np.eye(2)), seed)[0]
        with pytest.raises(ValueError, match="not stable"):
            control.gram(LTI(A, np.eye(4), dt=dt), "c")


def test_stable_modes_that_nothing_reaches_or_sees_do_not_matter() -> None:
    for dt, pole in ((None, -1.0), (0.1, 0.5)):
        A, B, _ = hidden(np.array([[pole]]), dt)
        method, oracles = (control.lqr, oracle.lqr) if dt is None else (control.dlqr, oracle.dlqr)
        Q = np.zeros((6, 6))
        Q[0, 0] = 1.0
        assert_close(method(A, B, Q, np.eye(2)).K, oracles(A, B, Q, np.eye(2))[0], 1e-7)
    K = control.lqr([[1.0]], [[1.0]], [[0.0]], [[1.0]]).K  # unstable, and unseen: turned over
    assert_close(K, [[2.0]])


# Fewer states


@pytest.mark.parametrize("dt", [None, 0.1])
def test_states_that_nothing_reaches_or_tells_are_left_out(dt: float | None) -> None:
    A, B = hidden(np.array([[-0.3]]), dt)[:2]
    C = np.random.default_rng(2).normal(size=(2, 6))
    small = control.minreal(LTI(A, B, C, np.ones((2, 2)), dt))
    dual = control.minreal((A.T, C.T, B.T, np.ones((2, 2)), dt))
    assert small.A.shape == dual.A.shape == (5, 5)
    omega = np.array([0.3, 2.0])
    expected = control.frequency_response((A, B, C, np.ones((2, 2)), dt), omega).response
    assert_close(control.frequency_response(small, omega).response, expected)
    assert_close(control.frequency_response(dual, omega).response.values.swapaxes(0, 1), expected)
    both = oracle.tf([columns(2)] * 2, [[[1.0, 0.5, 0.2], [1.0, 0.3]], [[1.0, 0.5, 0.2, 0.0], [1.0, 0.4]]], dt or 0)
    again = control.minreal(both)
    assert len(LTI(both).A) == 7 and len(again.A) < 7
    assert_close(control.frequency_response(again, omega).response, oracle.frd(both, omega).frdata)


@pytest.mark.parametrize("system", SYSTEMS)
def test_balanced_truncation_keeps_to_its_bound(system: LTI) -> None:
    values = control.hsvd(system)
    order = max(1, len(control.minreal(system).A) - 2)
    omega = np.geomspace(1e-3, np.pi / (system.dt or 0.1), 60)
    exact = control.frequency_response(system, omega).response.values
    for method in ("truncate", "matchdc"):
        small = control.balred(system, order, method)
        assert len(small.A) == order
        left = control.frequency_response(small, omega).response.values - exact
        assert np.linalg.norm(np.moveaxis(left, -1, 0), 2, (1, 2)).max() <= 2 * values[order:].sum() + 1e-7
    at_rest = np.array([0.0])
    assert_close(*(control.frequency_response(one, at_rest).response for one in (small, system)), 1e-6)
    if system.dt is None:
        assert_close(control.hsvd(control.balred(system, order)), values[:order], 1e-5)


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LTI(np.eye(2)), TypeError, "a matrix A needs its B"),
        (lambda: LTI("plant"), TypeError, r"system is str, expected a kp.control.LTI"),
        (lambda: LTI(oracle.tf([1.0, 0.0, 0.0], [1.0, 1.0])), ValueError, "more zeros than poles"),
        (lambda: LTI(oracle.tf([2.0], [1.0])), ValueError, "no states"),
        (lambda: LTI(oracle.nlsys(None, lambda t, x, u, p: u, inputs=1, outputs=1)), TypeError, r"ct\.linearize it"),
        (lambda: LTI(oracle.frd([1.0, 2.0], [1.0, 2.0])), TypeError, "FrequencyResponseData"),
        (lambda: LTI(SYSTEMS[1], None, np.eye(5)), ValueError, "B is missing"),
        (lambda: LTI(np.eye(2), np.eye(2), names=("a",)), ValueError, "names are"),
        (lambda: control.lqr(SYSTEMS[1], np.eye(5)), TypeError, r"lqr\(system, Q, R\[, N\]\) or lqr\(A, B, Q, R"),
        (lambda: control.lqr(np.eye(2), np.eye(2), 1, 1, 1, 1), TypeError, "lqr got"),
        (lambda: control.lqr(SYSTEMS[1], np.eye(5), np.eye(2), weight=1), TypeError, "weight="),
        (lambda: control.dlqr(SYSTEMS[1], np.eye(5), np.eye(2)), ValueError, "discrete time, got one with dt = None"),
        (lambda: control.lqr(SYSTEMS[1], np.eye(5), np.eye(2), np.eye(5)), ValueError, r"N has shape \(5, 5\)"),
        (lambda: control.lqr(SYSTEMS[1], np.eye(5), np.eye(2), integral_action=np.eye(4)), ValueError, "integral_"),
        (lambda: control.lqe(SYSTEMS[1], np.eye(5), np.eye(2)), ValueError, r"QN has shape \(5, 5\)"),
        (lambda: control.ctrb(SYSTEMS[1], np.eye(5)), TypeError, "a system and a matrix"),
        (lambda: control.obsv(np.eye(5)), TypeError, r"obsv\(A, C\) or obsv\(system\)"),
        (lambda: control.ctrb(np.eye(2), np.eye(2), t=0), ValueError, "t is 0"),
        (lambda: control.gram(SYSTEMS[1], "cf", t=[0.0, 1.0], rank=2), ValueError, "leave rank=None"),
        (lambda: control.balred(SYSTEMS[1], 6), ValueError, "orders is 6, expected how many states to keep, from 1 to"),
        (lambda: control.balred(SYSTEMS[1], 1, "best"), ValueError, "method is 'best'"),
        (lambda: control.minreal(LTI(-np.eye(2), [[1.0], [0.0]], [[0.0, 1.0]])), ValueError, "the gain D alone"),
        (lambda: control.gram((1, 2, 3, 4, 5, 6), "c"), TypeError, "tuple of 6"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_nothing_of_this_needs_python_control(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = SYSTEMS[1].to_control()
    monkeypatch.setitem(sys.modules, "control", None)
    assert LTI(theirs).A.shape == (5, 5)
    assert control.lqr(theirs, np.eye(5), np.eye(2)).K.shape == (2, 5)
