"""Time of one application of NTK_S in JAX to a block of probes, side by side in one run on one thread.

    python benchmarks/ntk_application_jax.py

The setting is 40 trials x 90 steps x 256 units, float32; the field is an MLP of 256 hidden units under Heun's method. A
ratio is the median over rounds of (floor / time), where the floor is the fewest flops that the application can cost
(four products for each use of a weight) at the rate of a large matrix product in the same round.

- kpflow_dyn: the fused operator `flow.ntk`, for the field `flow.nodal.ntk`, all probes in one block.
- products: nothing but the products of such an application, of the same shapes, step by step where steps follow.
- jvp o vjp: jit(jvp(vjp)) of the rolled-out model, probes one after another.
- linearize: jax.linearize of the rolled-out model and its linear_transpose, compiled together.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ["NPROC"] = "1"  # the size of XLA's thread pool, which its flags do not bound

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import kpflow_dyn as kp
from kpflow_dyn.models.jax import MLPField

TRIALS, TIMES, UNITS, INPUTS = 40, 90, 256, 3
STEP = 0.05
TOGETHER = 4  # probes that ride in one sweep
ROWS = TIMES * TRIALS
USES = {"RNN": 1, "GRU": 3, "MLP": 4}  # of UNITS x UNITS weights
States = Callable[[eqx.Module], jax.Array]


class TanhRNN(eqx.Module):
    W: jax.Array
    U: jax.Array
    b: jax.Array
    hidden_size: int = UNITS

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.tanh(self.W @ z + self.U @ x + self.b)


def recurrent(cell: eqx.Module, weights: int) -> tuple[kp.Flow, States, int]:
    """The flow, model -> states in plain JAX, and the flops of one probe."""
    x = jax.random.normal(jax.random.key(0), (TRIALS, TIMES, INPUTS))
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))

    def states(cell: eqx.Module) -> jax.Array:
        def step(z: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
            z = jax.vmap(cell)(x_t, z)
            return z, z

        return lax.scan(step, jnp.zeros((TRIALS, UNITS)), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return flow, states, 2 * TRIALS * TIMES * weights * UNITS * (4 * UNITS + 2 * (INPUTS + 1))


def neural_ode(field: MLPField) -> tuple[kp.Flow, States, int]:
    """The same for a field under Heun's method with constant steps."""
    t = np.arange(TIMES + 1) * STEP
    z0 = jax.random.normal(jax.random.key(0), (TRIALS, UNITS))
    flow = kp.linearize(kp.solve(kp.ODEProblem(field, z0, t), diffrax.Heun(), steps=t)).nodal

    def states(field: MLPField) -> jax.Array:
        f = jax.vmap(lambda z: field(0.0, z))

        def step(z: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            k = f(z)
            z = z + STEP / 2 * (k + f(z + STEP * k))
            return z, z

        found = lax.scan(step, z0, None, length=TIMES)[1].swapaxes(0, 1)
        return jnp.concatenate([z0[:, None], found], 1)

    return flow, states, 2 * TRIALS * TIMES * 2 * 4 * 2 * UNITS * UNITS


def make(name: str) -> tuple[eqx.Module, kp.Flow, States, int]:
    keys = jax.random.split(jax.random.key(1), 2)
    if name == "MLP":
        field = MLPField(UNITS, UNITS, key=keys[0])
        return field, *neural_ode(field)
    if name == "GRU":
        cell = eqx.nn.GRUCell(INPUTS, UNITS, key=keys[0])
        return cell, *recurrent(cell, weights=3)
    W, U = jax.random.normal(keys[0], (UNITS, UNITS)) / UNITS**0.5, jax.random.normal(keys[1], (UNITS, INPUTS))
    cell = TanhRNN(W, U, jnp.zeros(UNITS))
    return cell, *recurrent(cell, weights=1)


def bare_products(name: str, q: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The products alone: of J* and J each one with the weights at every step, and one with V for all times."""
    probes, uses = min(len(q), TOGETHER), USES[name]
    groups = 1 if name == "MLP" else uses  # whose products with the state are one
    W, V = (jax.random.normal(jax.random.key(i), (n, UNITS)) / n**0.5 for i, n in enumerate((groups * UNITS, ROWS)))
    start = jax.random.normal(jax.random.key(2), (TIMES, TRIALS * probes, groups * UNITS))
    still = jnp.zeros((TRIALS * probes, UNITS)), start[0]

    @jax.jit
    def apply(W: jax.Array, V: jax.Array, kicks: jax.Array) -> tuple:
        def sweep(_: int, carry: tuple) -> tuple:
            kicks, states, last = carry
            states = lax.scan(lambda _, a: (a @ W, None), states, kicks)[0]
            change = V.T @ kicks.reshape(ROWS, -1)
            kicks = (V @ change).reshape(kicks.shape)
            return kicks, states, lax.scan(lambda _, a: (a[:, :UNITS] @ W.T, None), last, kicks)[0]

        return lax.fori_loop(0, len(q) // probes * uses // groups, sweep, (kicks, *still))

    return lambda _: apply(W, V, start)[0]


def by_autodiff(states: States, model: eqx.Module) -> dict[str, Callable[[jax.Array], jax.Array]]:
    parameters, static = eqx.partition(model, eqx.is_inexact_array)

    def of(parameters: eqx.Module) -> jax.Array:
        return states(eqx.combine(parameters, static))

    def one(q: jax.Array) -> jax.Array:
        (gradient,) = jax.vjp(of, parameters)[1](q)
        return jax.jvp(of, (parameters,), (gradient,))[1]

    linear = jax.linearize(of, parameters)[1]
    transposed = jax.linear_transpose(linear, parameters)
    return {
        "jvp o vjp": jax.jit(lambda q: lax.map(one, q)),
        "linearize": jax.jit(lambda q: lax.map(lambda probe: linear(*transposed(probe)), q)),
    }


def seconds(run: Callable[[], jax.Array]) -> float:
    start = time.perf_counter()
    run().block_until_ready()
    return time.perf_counter() - start


def measure(name: str, probes: int, rounds: int) -> None:
    model, flow, states, flops = make(name)
    q = jax.random.normal(jax.random.key(2), (probes, *flow.ntk.domain.shape))
    ways = {"kpflow_dyn": flow.ntk.mv, **by_autodiff(states, model)}
    expected = ways["jvp o vjp"](q)
    bare = bare_products(name, q)
    square = jax.random.normal(jax.random.key(3), (2048, 2048))
    product = jax.jit(lambda a: a @ a)
    product(square).block_until_ready()
    for way, apply in ways.items():
        off = float(abs(apply(q) - expected).max() / abs(expected).max())
        assert off < 1e-3, f"{way} is off by {off:.1e}"
    ways["products"] = bare
    bare(q).block_until_ready()
    ratios: dict[str, list[float]] = {way: [] for way in ways}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        rate = 2 * 2048**3 / seconds(lambda: product(square))
        for way, apply in ways.items():
            times[way].append(seconds(lambda apply=apply: apply(q)))
            ratios[way].append(flops * probes / rate / times[way][-1])
    for way in ways:
        took, ratio = statistics.median(times[way]), statistics.median(ratios[way])
        print(f"{name:4} {probes:3}  {way:10}  {1e3 * took:8.0f} ms  {ratio:5.2f} of the floor", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--probes", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--models", nargs="*", default=["RNN", "GRU", "MLP"])
    arguments = parser.parse_args()
    for name in arguments.models:
        for probes in arguments.probes:
            measure(name, probes, arguments.rounds)


if __name__ == "__main__":
    main()
