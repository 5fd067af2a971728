"""diffrax's vector fields and optimistix's fixed points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix

import kpflow_dyn as kp

from ..member import Member

TRIALS, INPUTS, UNITS = 2, 2, 4
GRID = np.linspace(0, 1, 6)


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (TRIALS, *shape))


class Field(eqx.Module):
    """The field of diffrax's neural ODE, without the arguments that it does not use."""

    mlp: eqx.nn.MLP

    def __call__(self, t: jax.Array, z: jax.Array) -> jax.Array:
        return self.mlp(z)


class ControlledField(eqx.Module):
    """The field of diffrax's neural CDE along a spline, whose slope is the input."""

    mlp: eqx.nn.MLP

    def __call__(self, t: jax.Array, z: jax.Array, slope: jax.Array) -> jax.Array:
        return self.mlp(z).reshape(UNITS, INPUTS) @ slope


class Equilibrium(eqx.Module):
    """A deep equilibrium: z = tanh(W z + U x + b) / 2."""

    W: eqx.nn.Linear
    U: eqx.nn.Linear

    def __init__(self) -> None:
        keys = jax.random.split(jax.random.key(0))
        self.W, self.U = eqx.nn.Linear(UNITS, UNITS, key=keys[0]), eqx.nn.Linear(INPUTS, UNITS, key=keys[1])

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.tanh(self.W(z) + self.U(x)) / 2


class Solved(eqx.Module):
    """A network that solves for its equilibrium with optimistix."""

    f: Equilibrium

    def __call__(self, x: jax.Array) -> jax.Array:
        solver = optimistix.FixedPointIteration(rtol=1e-13, atol=1e-13)
        return optimistix.fixed_point(lambda z, _: self.f(x, z), solver, jnp.zeros(UNITS)).value


class Integrated(eqx.Module):
    """A network that solves its own ODE with diffrax, as its users write it."""

    field: Field

    def __call__(self, z0: jax.Array) -> jax.Array:
        term, grid = diffrax.ODETerm(lambda t, z, _: self.field(t, z)), jnp.asarray(GRID)
        saved, adjoint = diffrax.SaveAt(ts=grid), diffrax.DirectAdjoint()
        return diffrax.diffeqsolve(term, diffrax.Tsit5(), 0, 1, 0.2, z0, saveat=saved, adjoint=adjoint).ys


def mlp(outputs: int = UNITS, **options: Any) -> eqx.nn.MLP:
    return eqx.nn.MLP(UNITS, outputs, 8, 1, jnp.tanh, key=jax.random.key(0), **options)


def along(f: Any, x: Any = None) -> Callable[[], kp.ODEProblem]:
    """An ODE on the grid."""
    return lambda: kp.ODEProblem(f(), normal(UNITS), GRID, x)


def slope(t: jax.Array) -> jax.Array:
    return jnp.stack([jnp.cos(3 * t), jnp.ones_like(t)])


STEPS = {"steps": GRID}
MEMBERS = [
    Member(
        "diffrax: neural ODE, Tsit5", "diffrax", along(lambda: Field(mlp())), Field, STEPS | {"alg": diffrax.Tsit5()}
    ),
    Member("diffrax: neural ODE, Heun", "diffrax", along(lambda: Field(mlp())), Field, STEPS | {"alg": diffrax.Heun()}),
    Member(
        "diffrax: neural ODE, Bosh3",
        "diffrax",
        along(lambda: Field(mlp())),
        Field,
        STEPS | {"alg": diffrax.Bosh3()},
    ),
    Member(
        "diffrax: neural CDE",
        "diffrax",
        along(lambda: ControlledField(mlp(UNITS * INPUTS, final_activation=jnp.tanh)), slope),
        ControlledField,
        STEPS | {"alg": diffrax.Tsit5()},
    ),
    Member(
        "diffrax: solved inside of a network",
        "diffrax",
        lambda: kp.StaticProblem(Integrated(Field(mlp())), normal(UNITS), state="", axes=("trial", "time", "unit")),
    ),
    Member(
        "optimistix: equilibrium",
        "optimistix",
        lambda: kp.FixedPointProblem(Equilibrium(), normal(INPUTS), jnp.zeros((TRIALS, UNITS))),
    ),
    Member(
        "optimistix: solved inside of a network",
        "optimistix",
        lambda: kp.StaticProblem(Solved(Equilibrium()), normal(INPUTS), state=""),
    ),
]
