"""One model with its trials on one device and sharded over all of them: how the results differ, and where they lie.

`python sharded.py operators|solvers NAME DUMP` prints it as JSON, where XLA_FLAGS makes the compiler write its programs
to DUMP.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax_registry import Attending

import kpflow_dyn as kp

TRIALS, PROBES = 8, 3
COLLECTIVES = "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute|collective-broadcast"
Put = Callable[[jax.Array], jax.Array]


class Driven(eqx.Module):
    """A smooth field with inputs."""

    inner: eqx.nn.MLP
    U: jax.Array

    def __call__(self, t: jax.Array, z: jax.Array, x: jax.Array) -> jax.Array:
        return self.inner(z) - z + self.U @ x


def draw(number: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(number), shape)


def driven() -> Driven:
    return Driven(eqx.nn.MLP(4, 4, 6, 1, jnp.tanh, key=jax.random.key(2)), draw(4, 4, 3))


def grid(put: Put) -> kp.Solution:
    """Adaptive steps; at kinks of the inputs, round-off would decide on these."""
    inputs = jax.tree_util.Partial(lambda t: jnp.sin(t * jnp.arange(3.0)))
    return kp.solve(kp.ODEProblem(driven(), put(draw(1, TRIALS, 4)), np.linspace(0, 1, 5), inputs))


def span(put: Put) -> kp.Solution:
    x = np.linspace(0, 1, 5), put(draw(0, TRIALS, 5, 3))
    return kp.solve(kp.ODEProblem(driven(), put(draw(1, TRIALS, 4)), (0.0, 1.0), x), steps=0.25)


def discrete(cell: Callable, start: bool) -> Callable[[Put], kp.Solution]:
    def solved(put: Put) -> kp.Solution:
        z0 = put(draw(1, TRIALS, 4)) if start else None
        return kp.solve(kp.DiscreteProblem(cell, put(draw(0, TRIALS, 5, 3)), z0))

    return solved


def convolution(put: Put) -> kp.Solution:
    net = eqx.nn.Sequential(
        [eqx.nn.Conv1d(5, 2, 2, key=jax.random.key(2)), eqx.nn.Lambda(lambda x: jnp.tanh(x.ravel()))]
    )
    return kp.solve(kp.StaticProblem(net, put(draw(0, TRIALS, 5, 3))))


def mlp(put: Put) -> kp.Solution:
    return kp.solve(kp.StaticProblem(eqx.nn.MLP(3, 2, 5, 2, key=jax.random.key(2)), put(draw(0, TRIALS, 3))))


SOLVED = {
    "gru": discrete(eqx.nn.GRUCell(3, 4, key=jax.random.key(2)), True),
    "lstm": discrete(eqx.nn.LSTMCell(3, 4, key=jax.random.key(2)), False),
    "attending": discrete(Attending(jax.random.key(2)), True),
    "grid": grid,
    "span": span,
    "mlp": mlp,
    "convolution": convolution,
}


def lying(a: jax.Array | np.ndarray) -> list[int] | None:
    """How much one device has of each axis of an array; None of one on the host."""
    return list(a.sharding.shard_shape(a.shape)) if isinstance(a, jax.Array) else None


def difference(found: jax.Array, expected: jax.Array) -> float:
    found, expected = np.asarray(found), np.asarray(expected)
    return float(abs(found - expected).max() / abs(expected).max())


def numbers(shapes: str) -> int:
    """How many numbers arrays such as (f64[4,3], f64[2]) hold."""
    return sum(math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w+\[([\d,]*)\]", shapes))


def exchanged(dump: Path) -> Iterator[tuple[str, int]]:
    """The collectives of the programs that were compiled, and how many numbers each gives."""
    for program in dump.glob("*after_optimizations.txt"):
        for shapes, name in re.findall(rf" = (.*?) ({COLLECTIVES})(?:-start)?\(", program.read_text()):
            yield name, numbers(re.sub(r"\{[^}]*\}|/\*.*?\*/", "", shapes))


def applied(one: kp.Flow, every: kp.Flow, dump: Path) -> dict[str, dict]:
    """Each operator on the same probes: how far they differ, where the image lies, what the devices exchanged."""
    found = {"parameters": every.J.domain.size, "state": lying(every.solution.state)}
    for name in ("ntk", "P", "K", "J", "J.T", "core", "B", "B.T"):
        first, second = (getattr(flow, name.partition(".")[0]) for flow in (one, every))
        first, second = (first.T, second.T) if name.endswith(".T") else (first, second)
        probes = draw(7, PROBES, *first.domain.shape)
        placed = second.domain.placed(probes)
        shutil.rmtree(dump, ignore_errors=True)
        image = second.mv(placed)
        found[name] = {
            "error": difference(image, first.mv(probes)),
            "lies": lying(image),
            "exchanged": list(exchanged(dump)) if name in ("ntk", "P") else None,
        }
    return found


def solved(flow: kp.Flow) -> dict[str, jax.Array]:
    """What solvers make of a flow."""
    alg = kp.solvers.BlockLanczos(dense=0, block=2)
    pairs, triplets = kp.eigs(flow.ntk, 3, alg=alg), kp.svds(flow.J, 2, alg=alg)
    kernels = {axis: kp.partial_trace(flow.ntk, axis, samples=20).matrix for axis in ("trial", "time")}
    scalars = [kp.trace(flow.ntk, samples=20), *kp.summary(flow, k=2, alg=alg).numbers().values()]
    return {
        "values": pairs.values,
        "vectors": abs(pairs.vectors),
        "states": abs(triplets.left),
        "weight changes": abs(triplets.right),
        "scalars": np.array([float(scalar) for scalar in scalars]),
        **kernels,
    }


def main(what: str, name: str, dump: Path) -> dict:
    place = NamedSharding(Mesh(np.array(jax.devices()), ("device",)), PartitionSpec("device"))
    one, every = (kp.linearize(SOLVED[name](put)) for put in (lambda a: a, lambda a: jax.device_put(a, place)))
    if what == "operators":
        return applied(one, every, dump)
    expected, found = solved(one), solved(every)
    return {name: {"error": difference(found[name], expected[name]), "lies": lying(found[name])} for name in found}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(*sys.argv[1:3], Path(sys.argv[3]))))
