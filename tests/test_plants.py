"""Plants against Lagrangian mechanics, and closed loops in both frameworks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import Array
from torch import Tensor, nn
from torch.func import jacrev, vmap

from kpflow_dyn.models import CartPole, ClosedLoop, DoubleIntegrator, Pendulum, PlanarQuadrotor, VanDerPol

POINT = DoubleIntegrator(mass=1.7)
PENDULUM = Pendulum(mass=0.7, length=1.3, gravity=9.5, damping=0.2)
CART = CartPole(1.2, 0.3, 0.6, 9.7, cart_damping=0.4, pole_damping=0.05)
OSCILLATOR = VanDerPol(mu=1.5)
QUADROTOR = PlanarQuadrotor(mass=0.5, arm_length=0.2, inertia=0.004, gravity=9.6)
PLANTS = [POINT, PENDULUM, CART, OSCILLATOR, QUADROTOR]

every_plant = pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: type(plant).__name__)


@pytest.fixture(autouse=True)
def jax_in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def draw(plant: Any, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.standard_normal((*shape, plant.state_size)), rng.standard_normal((*shape, plant.control_size))


@dataclass(frozen=True)
class Mechanism:
    """A plant's kinetic minus potential energy, and the generalised force of its controls and friction."""

    plant: Any
    lagrangian: Callable[[Array, Array], Array]
    force: Callable[[Array, Array, Array], Array]

    def energy(self, q: Array, v: Array) -> Array:
        return v @ jax.grad(self.lagrangian, 1)(q, v) - self.lagrangian(q, v)

    def acceleration(self, q: Array, v: Array, u: Array) -> Array:
        """Of the Euler-Lagrange equations, d/dt dL/dv = dL/dq + force."""
        momentum = jax.grad(self.lagrangian, 1)
        coriolis = jax.jacobian(momentum, 0)(q, v) @ v
        push = jax.grad(self.lagrangian, 0)(q, v) + self.force(q, v, u) - coriolis
        return jnp.linalg.solve(jax.jacobian(momentum, 1)(q, v), push)

    def power(self, q: Array, v: Array, u: Array) -> Array:
        """The rate at which the energy changes along the plant."""
        return jax.jvp(self.energy, (q, v), tuple(jnp.split(self.plant(jnp.concat([q, v]), u), 2)))[1]

    def draw(self) -> tuple[Array, Array, Array]:
        z, u = map(jnp.asarray, draw(self.plant))
        return *jnp.split(z, 2), u


def rod_on_cart(q: Array, v: Array) -> Array:
    """The rod as a continuum: two Gauss points integrate a quadratic exactly."""
    nodes, weights = np.polynomial.legendre.leggauss(2)
    along, masses = CART.half_length * (1 + nodes), CART.pole_mass * weights / 2

    def places(q: Array) -> Array:
        return jnp.stack([q[0] + along * jnp.sin(q[1]), along * jnp.cos(q[1])])

    height, speed = places(q)[1], jax.jvp(places, (q,), (v,))[1]
    return CART.cart_mass * v[0] ** 2 / 2 + (masses * ((speed**2).sum(0) / 2 - CART.gravity * height)).sum()


def bob(q: Array, v: Array) -> Array:
    height, speed = PENDULUM.length * jnp.cos(q[0]), PENDULUM.length * v[0]
    return PENDULUM.mass * (speed**2 / 2 - PENDULUM.gravity * height)


def flying_body(q: Array, v: Array) -> Array:
    return QUADROTOR.mass * (v[:2] @ v[:2] / 2 - QUADROTOR.gravity * q[1]) + QUADROTOR.inertia * v[2] ** 2 / 2


def thrusts(q: Array, v: Array, u: Array) -> Array:
    """By virtual work: each rotor pushes along the body's normal, at its own place."""
    normal = jnp.stack([-jnp.sin(q[2]), jnp.cos(q[2])])

    def place(q: Array, side: float) -> Array:
        return q[:2] + side * QUADROTOR.arm_length * jnp.stack([jnp.cos(q[2]), jnp.sin(q[2])])

    return u[0] * normal @ jax.jacobian(place)(q, 1.0) + u[1] * normal @ jax.jacobian(place)(q, -1.0)


MECHANISMS = [
    Mechanism(POINT, lambda q, v: POINT.mass * v[0] ** 2 / 2, lambda q, v, u: u),
    Mechanism(PENDULUM, bob, lambda q, v, u: u - PENDULUM.damping * v),
    Mechanism(
        CART,
        rod_on_cart,
        lambda q, v, u: jnp.stack([u[0] - CART.cart_damping * v[0], -CART.pole_damping * v[1]]),
    ),
    Mechanism(QUADROTOR, flying_body, thrusts),
]
every_mechanism = pytest.mark.parametrize("body", MECHANISMS, ids=lambda body: type(body.plant).__name__)


@every_mechanism
def test_a_plant_obeys_the_euler_lagrange_equations(body):
    q, v, u = body.draw()
    expected = [*v, *jax.jit(body.acceleration)(q, v, u)]
    np.testing.assert_allclose(body.plant(jnp.concat([q, v]), u), expected, rtol=1e-12, atol=1e-12)


@every_mechanism
def test_energy_changes_by_the_power_of_controls_and_friction(body):
    q, v, u = body.draw()
    np.testing.assert_allclose(jax.jit(body.power)(q, v, u), body.force(q, v, u) @ v, rtol=1e-11, atol=1e-12)


def test_energy_is_conserved_without_friction_and_control():
    z = np.array([0.0, 0.5, 0.2, -0.3])
    frictionless = CartPole(CART.cart_mass, CART.pole_mass, CART.half_length, CART.gravity)
    start = MECHANISMS[2].energy(*jnp.split(z, 2))
    for _ in range(400):
        z = runge_kutta_4(lambda z: frictionless(z, np.zeros(1)), z, 0.005)
    assert abs(z[1]) > 1
    np.testing.assert_allclose(MECHANISMS[2].energy(*jnp.split(z, 2)), start, rtol=1e-7)


def runge_kutta_4(f: Callable[[np.ndarray], np.ndarray], z: np.ndarray, dt: float) -> np.ndarray:
    k1 = f(z)
    k2 = f(z + dt / 2 * k1)
    k3 = f(z + dt / 2 * k2)
    return z + dt / 6 * (k1 + 2 * k2 + 2 * k3 + f(z + dt * k3))


def test_cart_pole_solves_its_manipulator_equation():
    z, u = draw(CART)
    _, angle, velocity, spin = z
    m, length = CART.pole_mass, CART.half_length
    inertia_about_the_middle = m * (2 * length) ** 2 / 12
    coupling = m * length * np.cos(angle)
    mass = np.array([[CART.cart_mass + m, coupling], [coupling, inertia_about_the_middle + m * length**2]])
    bias = np.array([-m * length * np.sin(angle) * spin**2, -m * CART.gravity * length * np.sin(angle)])
    friction = np.array([CART.cart_damping * velocity, CART.pole_damping * spin])
    acceleration = np.linalg.solve(mass, np.array([u[0], 0.0]) - bias - friction)
    np.testing.assert_allclose(CART(z, u), [velocity, spin, *acceleration], rtol=1e-12)


def linearised(plant: Any, z: list[float], u: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return jax.jit(jax.jacobian(plant, (0, 1)))(jnp.array(z), jnp.array(u))


def test_cart_pole_upright_has_the_textbook_linearisation():
    M, m, length, g, b = CART.cart_mass, CART.pole_mass, CART.half_length, CART.gravity, CART.cart_damping
    inertia = m * length**2 / 3
    p = inertia * (M + m) + M * m * length**2
    no_hinge_friction = CartPole(M, m, length, g, b)
    a, control = linearised(no_hinge_friction, [0.0] * 4, [0.0])
    expected = np.zeros((4, 4))
    expected[0, 2] = expected[1, 3] = 1
    expected[2, 1:3] = -((m * length) ** 2) * g / p, -(inertia + m * length**2) * b / p
    expected[3, 1:3] = m * g * length * (M + m) / p, m * length * b / p
    np.testing.assert_allclose(a, expected, atol=1e-12)
    np.testing.assert_allclose(control[:, 0], [0, 0, (inertia + m * length**2) / p, -m * length / p], atol=1e-12)


def test_quadrotor_hovers():
    mg, arm = QUADROTOR.mass * QUADROTOR.gravity, QUADROTOR.arm_length / QUADROTOR.inertia
    at_rest, hover = [1.0, 2.0, 0.0, 0.0, 0.0, 0.0], [mg / 2, mg / 2]
    np.testing.assert_allclose(QUADROTOR(np.array(at_rest), np.array(hover)), np.zeros(6), atol=1e-14)
    a, control = linearised(QUADROTOR, at_rest, hover)
    expected = np.zeros((6, 6))
    expected[:3, 3:] = np.eye(3)
    expected[3, 2] = -QUADROTOR.gravity
    np.testing.assert_allclose(a, expected, atol=1e-12)
    lift = 1 / QUADROTOR.mass
    np.testing.assert_allclose(control, [[0, 0]] * 4 + [[lift, lift], [arm, -arm]], atol=1e-12)


@pytest.mark.parametrize(("angle", "sign"), [(0.0, 1), (np.pi, -1)], ids=["upright", "hanging"])
def test_pendulum_is_unstable_upright_and_swings_below(angle, sign):
    a, control = linearised(PENDULUM, [angle, 0.0], [0.0])
    inertia = PENDULUM.mass * PENDULUM.length**2
    rates = [sign * PENDULUM.gravity / PENDULUM.length, -PENDULUM.damping / inertia]
    np.testing.assert_allclose(a, [[0, 1], rates], atol=1e-12)
    np.testing.assert_allclose(control, [[0], [1 / inertia]], atol=1e-12)


def test_van_der_pol_has_its_lienard_form():
    """With y = p - p^3 / 3 - p' / mu: p' = mu (p - p^3 / 3 - y) and y' = (p - u) / mu."""
    z, u = map(jnp.asarray, draw(OSCILLATOR))
    mu = OSCILLATOR.mu

    def lienard(z: Array) -> Array:
        return jnp.stack([z[0], z[0] - z[0] ** 3 / 3 - z[1] / mu])

    y, slopes = jax.jvp(lienard, (z,), (OSCILLATOR(z, u),))
    expected = [mu * (y[0] - y[0] ** 3 / 3 - y[1]), (z[0] - u[0]) / mu]
    np.testing.assert_allclose(slopes, expected, rtol=1e-12, atol=1e-12)


@every_plant
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_three_libraries_agree(plant, shape):
    z, u = draw(plant, *shape)
    expected = plant(z, u)
    assert isinstance(expected, np.ndarray) and expected.shape == z.shape
    np.testing.assert_allclose(plant(torch.from_numpy(z), torch.from_numpy(u)), expected, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(plant(jnp.asarray(z), jnp.asarray(u)), expected, rtol=1e-13, atol=1e-13)


@every_plant
def test_float32_stays_float32(plant):
    z, u = (a.astype(np.float32) for a in draw(plant, 2))
    for convert in (np.asarray, torch.from_numpy, jnp.asarray):
        assert "float32" in str(plant(convert(z), convert(u)).dtype)


@every_plant
def test_torch_transforms_and_export_see_the_plant(plant):
    z, u = map(torch.from_numpy, draw(plant, 3))

    class Called(nn.Module):
        def forward(self, z: Tensor, u: Tensor) -> Tensor:
            return plant(z, u)

    traced = torch.export.export(Called(), (z[:1], u[:1]), strict=False).module()
    torch.testing.assert_close(traced(z[1:2], u[1:2]), plant(z[1:2], u[1:2]))
    rows = vmap(jacrev(plant))(z, u)
    whole = jacrev(plant)(z, u)
    torch.testing.assert_close(torch.stack([whole[i, :, i] for i in range(3)]), rows)


@every_plant
def test_jax_transforms_see_the_plant(plant):
    z, u = map(jnp.asarray, draw(plant, 3))
    np.testing.assert_allclose(jax.jit(jax.vmap(plant))(z, u), plant(z, u), rtol=1e-12, atol=1e-12)
    _, tangent = jax.linearize(plant, z[0], u[0])
    pulled = jax.linear_transpose(tangent, z[0], u[0])(z[1])
    direct = jax.vjp(plant, z[0], u[0])[1](z[1])
    for a, b in zip(pulled, direct, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@every_plant
def test_sizes_names_and_hash(plant):
    assert len(set(plant.state_names)) == len(plant.state_names) == plant.state_size
    assert plant == type(plant)(*vars(plant).values()) and hash(plant) == hash(type(plant)(*vars(plant).values()))
    with pytest.raises(AttributeError):
        plant.mass = 2.0


@every_plant
@pytest.mark.parametrize("wrong", ["z", "u"])
def test_a_wrong_width_is_explained(plant, wrong):
    z, u = draw(plant, 2)
    arrays = {"z": z, "u": u} | {wrong: np.ones((2, 9))}
    size = plant.state_size if wrong == "z" else plant.control_size
    with pytest.raises(ValueError, match=rf"{wrong} has the shape \(2, 9\), expected a last axis of {size}"):
        plant(**arrays)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_constants_must_be_positive(value):
    with pytest.raises(ValueError, match=r"length must be a finite number > 0, got"):
        Pendulum(length=value)


def test_constants_are_numbers_that_may_be_zero_where_that_makes_sense():
    assert Pendulum(gravity=0).gravity == 0.0 and VanDerPol(mu=np.float64(0)).mu == 0.0
    assert type(VanDerPol(mu=np.float64(2)).mu) is float
    with pytest.raises(ValueError, match=r"damping must be a finite number >= 0, got -0\.1"):
        Pendulum(damping=-0.1)
    with pytest.raises(TypeError, match=r"mass is torch\.Tensor, expected a real number"):
        Pendulum(mass=torch.tensor(1.0))


def test_plants_import_neither_framework():
    code = (
        "import sys, kpflow_dyn.models as m\n"
        "m.CartPole(), m.VanDerPol(), m.SquidAxon(), m.ClosedLoop, dir(m)\n"
        "print([name for name in ('torch', 'jax', 'equinox') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class TorchPlant(nn.Module):
    """A plant that is itself a network, and ties a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.drift, self.push = nn.Linear(3, 3), nn.Linear(2, 3, bias=False)
        self.same = self.drift

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return self.same(z) + self.push(u)


class JaxPlant(eqx.Module):
    drift: Array

    def __call__(self, z: Array, u: Array) -> Array:
        return self.drift @ z + u.sum()


T = torch.tensor(0.0)


@pytest.mark.parametrize("reference", [0, 2])
def test_closed_loop_is_the_plant_under_its_policy(reference):
    policy = nn.Linear(4 + reference, 1).double()
    z, _ = map(torch.from_numpy, draw(CART, 5))
    x_t = torch.randn(5, reference, dtype=torch.float64) if reference else None
    loop = ClosedLoop(CART, policy)
    u = z @ policy.weight[:, :4].T + policy.bias + (x_t @ policy.weight[:, 4:].T if reference else 0)
    torch.testing.assert_close(loop(T, z, x_t), CART(z, u), rtol=1e-12, atol=1e-12)
    assert [name for name, _ in loop.named_parameters()] == ["policy.weight", "policy.bias"]
    arguments = (T, z[:1]) if x_t is None else (T, z[:1], x_t[:1])
    traced = torch.export.export(loop, arguments, strict=False).module()
    torch.testing.assert_close(traced(*arguments), loop(*arguments))


@pytest.mark.parametrize("reference", [0, 2])
def test_closed_loops_agree_in_torch_and_jax(reference):
    policy = nn.Linear(6 + reference, 2).double()
    twin = eqx.nn.Linear(6 + reference, 2, key=jax.random.key(0))
    weights = [jnp.asarray(p.detach().numpy()) for p in policy.parameters()]
    twin = eqx.tree_at(lambda layer: [layer.weight, layer.bias], twin, weights)
    z, _ = draw(QUADROTOR)
    inputs = [np.array([0.3, -0.2])] if reference else []
    loop = ClosedLoop(QUADROTOR, twin)
    in_torch = ClosedLoop(QUADROTOR, policy)(T, *(torch.from_numpy(a)[None] for a in (z, *inputs)))[0]
    np.testing.assert_allclose(eqx.filter_jit(loop)(0.0, z, *inputs), in_torch.detach(), rtol=1e-12)
    assert isinstance(loop, eqx.Module)
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(loop)] == [
        ".policy.weight",
        ".policy.bias",
    ]


def test_a_torch_plant_with_weights_never_learns():
    plant, policy = TorchPlant(), nn.Linear(3, 2)
    loop = ClosedLoop(plant, policy).double()
    assert {name.split(".")[0] for name, _ in loop.named_parameters()} == {"policy"}
    assert all(p.requires_grad and p.dtype == torch.float32 for p in plant.parameters())
    z = torch.randn(4, 3).double()
    torch.testing.assert_close(loop(T, z), plant.double()(z, policy(z)))
    before = loop(T, z).detach()
    with torch.no_grad():
        plant.drift.weight.zero_()
    torch.testing.assert_close(loop(T, z), before)
    assert "plant.drift.weight" in loop.state_dict()
    torch.export.export(loop, (T, z[:1]), strict=False)


def test_a_jax_plant_with_weights_never_learns():
    loop = ClosedLoop(JaxPlant(jnp.eye(3)), eqx.nn.Linear(3, 2, key=jax.random.key(0)))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(loop)]
    assert paths == [".policy.weight", ".policy.bias"]
    z = jnp.arange(3.0)
    gradient = eqx.filter_jit(eqx.filter_grad(lambda f: f(0.0, z).sum()))(loop)
    np.testing.assert_allclose(gradient.policy.weight, np.full((2, 1), 3.0) * z)


def test_a_plain_jax_pytree_may_be_a_policy():
    policy = jax.tree_util.Partial(lambda weight, z: weight @ z, jnp.ones((1, 2)))
    loop = ClosedLoop(PENDULUM, policy)
    np.testing.assert_allclose(loop(0.0, jnp.array([1.0, 2.0])), PENDULUM(jnp.array([1.0, 2.0]), jnp.array([3.0])))


def test_equal_plants_share_one_compiled_program():
    first, second = (ClosedLoop(CartPole(), eqx.nn.Linear(4, 1, key=jax.random.key(i))) for i in range(2))
    assert jax.tree.structure(first) == jax.tree.structure(second)


@pytest.mark.parametrize("policy", [lambda z: z, nn.Linear, None, "policy", jnp.tanh])
def test_a_policy_must_be_a_module(policy):
    with pytest.raises(TypeError, match=r"policy is \w+, expected an instance of a torch nn.Module, or"):
        ClosedLoop(CartPole(), policy)


@pytest.mark.parametrize(("plant", "got"), [(CartPole, "the class CartPole"), (3.0, "float"), (None, "NoneType")])
def test_a_plant_must_be_callable(plant, got):
    with pytest.raises(TypeError, match=f"plant is {got}, expected a callable plant"):
        ClosedLoop(plant, nn.Linear(4, 1))


def test_a_policy_of_the_wrong_width_is_explained():
    with pytest.raises(
        ValueError, match=r"returned \(5, 3\), expected .* shape \(5, 1\) for .*; give its last layer 1 outputs"
    ):
        ClosedLoop(CartPole(), nn.Linear(4, 3))(T, torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"the policy returned \(3,\), expected a control of the shape \(1,\)"):
        ClosedLoop(CartPole(), eqx.nn.Linear(4, 3, key=jax.random.key(0)))(0.0, jnp.zeros(4))
    with pytest.raises(ValueError, match=r"the policy is a torch\.nn\.LSTM, whose memory moves in steps"):
        ClosedLoop(CartPole(), nn.LSTM(4, 1))
    with pytest.raises(ValueError, match=r"the policy returned \(\), expected a control of the shape \(1,\)"):
        ClosedLoop(CartPole(), eqx.nn.Linear(4, "scalar", key=jax.random.key(0)))(0.0, jnp.zeros(4))


def test_a_plant_without_a_control_size_takes_what_the_policy_gives():
    loop = ClosedLoop(lambda z, u: z + u.sum(-1, keepdim=True), nn.Linear(3, 2))
    assert loop(T, torch.zeros(4, 3)).shape == (4, 3)
