"""Controlled plants z' = plant(z, u) in SI units, written once for torch, JAX and numpy.

Each is a frozen dataclass of floats, called on a state z [..., state] and a control u [..., control]. Positions come
first, then velocities in the same order.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from kpflow_dyn._arrays import Array, array_namespace
from kpflow_dyn.models._constants import Constants, at_least_zero


@dataclass(frozen=True)
class Plant(Constants):
    """What all plants share: the call, and checks of the widths of its arguments.

    A plant of your own derives from it, is a frozen dataclass of numbers, and writes `velocity`; it then serves torch,
    JAX and numpy. `ClosedLoop`, `kp.control` and `kp.gym` also take any callable plant(z, u) -> z', written for one
    framework, with `control_size` for `kp.control.linearize_lti`, and `state_names` for the labels of results.

    Attributes:
        state_size: number of entries of z.
        control_size: number of entries of u.
        state_names: what the entries of z are.

    Raises:
        TypeError, ValueError: a constant is not a number in its range, or (when called) z or u has another width.

    >>> import numpy as np
    >>> @dataclass(frozen=True)
    ... class Brake(Plant):
    ...     friction: float = 1.0
    ...     state_size, control_size, state_names = 1, 1, ("speed",)
    ...     def velocity(self, xp, speed, force):
    ...         return [force - self.friction * xp.tanh(speed)]
    >>> Brake(friction=0.5)(np.zeros((4, 1)), np.ones((4, 1))).shape
    (4, 1)
    """

    state_size: ClassVar[int]
    control_size: ClassVar[int]
    state_names: ClassVar[tuple[str, ...]]

    def __call__(self, z: Array, u: Array) -> Array:
        """The velocity z' [..., state] at the state z [..., state] under the control u [..., control]."""
        entries = *self._entries("z", z, self.state_size), *self._entries("u", u, self.control_size)
        xp = array_namespace(z, u)
        return xp.stack(self.velocity(xp, *entries), axis=-1)

    def _entries(self, name: str, array: Array, size: int) -> list[Array]:
        if tuple(array.shape[-1:]) != (size,):
            expected = f"a last axis of {size} for {type(self).__name__}"
            raise ValueError(f"{name} has the shape {tuple(array.shape)}, expected {expected}; put its entries there")
        return [array[..., i] for i in range(size)]

    def velocity(self, xp: Any, *entries: Array) -> list[Array]:
        """The entries of z', from those of z and u [...], with the functions of their array library xp."""
        raise NotImplementedError


@dataclass(frozen=True)
class DoubleIntegrator(Plant):
    """A mass on a line, pushed by a force: mass p'' = u.

    Args:
        mass: [kg].

    Shapes: z [..., 2] = position [m], velocity [m/s]; u [..., 1] = force [N].

    Raises as `Plant`.
    Source: Rao, Bernstein, IEEE Control Systems 21(5), 103 (2001).

    >>> import numpy as np
    >>> DoubleIntegrator(mass=2.0)(np.array([0.0, 1.0]), np.array([6.0])).tolist()
    [1.0, 3.0]
    """

    mass: float = 1.0

    state_size, control_size, state_names = 2, 1, ("position", "velocity")

    def velocity(self, xp: Any, *entries: Array) -> list[Array]:
        _, velocity, force = entries
        return [velocity, force / self.mass]


@dataclass(frozen=True)
class Pendulum(Plant):
    """A point mass on a massless rod, turned by a torque; 0 is upright.

        mass length^2 angle'' = mass gravity length sin(angle) - damping angle' + u

    Args:
        mass: [kg].
        length: [m].
        gravity: [m/s^2], >= 0.
        damping: viscous friction of the joint [N m s], >= 0.

    Shapes: z [..., 2] = angle [rad], angular velocity [rad/s]; u [..., 1] = torque [N m].

    Raises as `Plant`.
    Source: Tedrake, Underactuated Robotics (2023), chapter 2.

    >>> import numpy as np
    >>> Pendulum()(np.array([np.pi / 2, 0.0]), np.array([0.0])).tolist()
    [0.0, 9.81]
    """

    mass: float = 1.0
    length: float = 1.0
    gravity: float = at_least_zero(9.81)
    damping: float = at_least_zero(0.0)

    state_size, control_size, state_names = 2, 1, ("angle", "angular_velocity")

    def velocity(self, xp: Any, *entries: Array) -> list[Array]:
        angle, velocity, torque = entries
        weight = self.mass * self.gravity * self.length * xp.sin(angle)
        return [velocity, (weight - self.damping * velocity + torque) / (self.mass * self.length**2)]


@dataclass(frozen=True)
class CartPole(Plant):
    """A uniform rod hinged on a cart that a force pushes; the angle 0 is upright, and positive leans towards +position.

        (M + m) p'' + m l (cos(a) a'' - sin(a) a'^2) = u - cart_damping p'
        m l cos(a) p'' + 4/3 m l^2 a''               = m gravity l sin(a) - pole_damping a'

    Args:
        cart_mass: M [kg].
        pole_mass: m [kg].
        half_length: l, from the hinge to the middle of the rod [m].
        gravity: [m/s^2], >= 0.
        cart_damping: viscous friction of the cart [N s/m], >= 0.
        pole_damping: viscous friction of the hinge [N m s], >= 0.

    Shapes: z [..., 4] = position p [m], angle a [rad], their velocities [m/s, rad/s]; u [..., 1] = force [N].

    Raises as `Plant`.
    Source: Barto, Sutton, Anderson, IEEE Trans. Systems, Man, Cybernetics 13, 834 (1983), with viscous friction.

    >>> import numpy as np
    >>> CartPole()(np.zeros(4), np.zeros(1)).tolist()
    [0.0, 0.0, 0.0, 0.0]
    """

    cart_mass: float = 1.0
    pole_mass: float = 0.1
    half_length: float = 0.5
    gravity: float = at_least_zero(9.81)
    cart_damping: float = at_least_zero(0.0)
    pole_damping: float = at_least_zero(0.0)

    state_size, control_size, state_names = 4, 1, ("position", "angle", "velocity", "angular_velocity")

    def velocity(self, xp: Any, *entries: Array) -> list[Array]:
        _, angle, velocity, spin, force = entries
        moment = self.pole_mass * self.half_length
        total, inertia = self.cart_mass + self.pole_mass, 4 / 3 * moment * self.half_length
        coupling = moment * xp.cos(angle)
        push = force + moment * xp.sin(angle) * spin**2 - self.cart_damping * velocity
        turn = moment * self.gravity * xp.sin(angle) - self.pole_damping * spin
        determinant = total * inertia - coupling**2
        acceleration = (inertia * push - coupling * turn) / determinant
        return [velocity, spin, acceleration, (total * turn - coupling * push) / determinant]


@dataclass(frozen=True)
class VanDerPol(Plant):
    """Van der Pol's oscillator with a force: p'' = mu (1 - p^2) p' - p + u, dimensionless.

    Args:
        mu: strength of the nonlinear damping, >= 0.

    Shapes: z [..., 2] = position, velocity; u [..., 1] = force.

    Raises as `Plant`.
    Source: van der Pol, Philosophical Magazine 2, 978 (1926).

    >>> import numpy as np
    >>> VanDerPol(mu=2.0)(np.array([2.0, 1.0]), np.array([0.0])).tolist()
    [1.0, -8.0]
    """

    mu: float = at_least_zero(1.0)

    state_size, control_size, state_names = 2, 1, ("position", "velocity")

    def velocity(self, xp: Any, *entries: Array) -> list[Array]:
        position, velocity, force = entries
        return [velocity, self.mu * (1 - position**2) * velocity - position + force]


@dataclass(frozen=True)
class PlanarQuadrotor(Plant):
    """A rigid body in a vertical plane with a rotor at each end; the angle grows anticlockwise from level.

        mass x'' = -(u_right + u_left) sin(angle)
        mass y'' = (u_right + u_left) cos(angle) - mass gravity
        inertia angle'' = arm_length (u_right - u_left)

    It hovers at u_right = u_left = mass gravity / 2.

    Args:
        mass: [kg].
        arm_length: from the centre of mass to a rotor [m].
        inertia: about the centre of mass [kg m^2].
        gravity: [m/s^2], >= 0.

    Shapes: z [..., 6] = x [m], y (up) [m], angle [rad], their velocities; u [..., 2] = right and left thrust [N].

    Raises as `Plant`.
    Source: Tedrake, Underactuated Robotics (2023), chapter 3, whose constants these are.

    >>> import numpy as np
    >>> PlanarQuadrotor(mass=1.0)(np.zeros(6), np.array([9.81, 9.81])).tolist()[4]
    9.81
    """

    mass: float = 0.486
    arm_length: float = 0.25
    inertia: float = 0.00383
    gravity: float = at_least_zero(9.81)

    state_size, control_size, state_names = 6, 2, ("x", "y", "angle", "x_velocity", "y_velocity", "angular_velocity")

    def velocity(self, xp: Any, *entries: Array) -> list[Array]:
        _, _, angle, x_velocity, y_velocity, spin, right, left = entries
        lift = (right + left) / self.mass
        turn = self.arm_length * (right - left) / self.inertia
        return [x_velocity, y_velocity, spin, -lift * xp.sin(angle), lift * xp.cos(angle) - self.gravity, turn]
