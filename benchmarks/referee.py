"""What the referee costs: the comparison with autograd through the model, as a share of `linearize`.

    python benchmarks/referee.py            # RNN and GRU of 256 units, torch and JAX
    python benchmarks/referee.py --gpt      # a stack of GPT-2 small's shape: 15 GiB, some minutes

One thread. Beside it stand the time of one training step of the model (forward and backward) and of one application of
the NTK to one vector, which are what the comparison is made of.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import kpflow_dyn as kp

TRIALS, TIMES, UNITS, INPUTS = 40, 90, 256, 3


class Clock:
    """How long the parts of the referee take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def best(function: Callable[[], Any], runs: int) -> float:
    """The shortest of some runs."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def report(name: str, solution: Any, clock: Clock, step: Callable[[], Any] | None, runs: int) -> None:
    """One row of the table."""
    found = []
    for _ in range(runs):
        clock.seconds, start = 0.0, time.perf_counter()
        flow = kp.linearize(solution)
        found.append((time.perf_counter() - start, clock.seconds))
    whole, part = min(found)
    q = kp.solvers.Random(0).normal((1, *flow.ntk.domain.shape), like=flow.ntk.domain.like)
    flow.ntk.mv(q)
    application = best(lambda: float(flow.ntk.mv(q).sum()), runs)
    training = f"{best(step, runs):9.3f}" if step else f"{'':9}"
    print(f"{name:12} {whole:10.3f} {part:9.3f} {part / whole:6.0%} {training} {application:12.3f}", flush=True)


def watched(clock: Clock) -> None:
    """Have the parts of the referee timed, wherever they are called."""
    import kpflow_dyn._implicit.roads as implicit
    import kpflow_dyn._recurrence.roads as recurrence
    from kpflow_dyn._jax.model import Model as JaxModel
    from kpflow_dyn._torch.model import Model as TorchModel

    for module in (implicit, recurrence):
        for name in ("ask", "compare"):
            setattr(module, name, clock.around(getattr(module, name)))
    for model in (TorchModel, JaxModel):
        model.derivative = clock.around(model.derivative)  # type: ignore[method-assign]


def in_torch(clock: Clock, runs: int) -> None:
    """A layer of each kind."""
    for kind in (nn.RNN, nn.GRU):
        torch.manual_seed(0)
        layer, x = kind(INPUTS, UNITS, batch_first=True), torch.randn(TRIALS, TIMES, INPUTS)

        def step(layer: nn.Module = layer, x: torch.Tensor = x) -> None:
            torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))

        report(f"torch {kind.__name__}", kp.solve(kp.DiscreteProblem(layer, x)), clock, step, runs)


def in_jax(clock: Clock, runs: int) -> None:
    """The same in JAX, where most of the time compiles."""
    import equinox as eqx
    import jax

    keys = jax.random.split(jax.random.key(0))
    cell, x = eqx.nn.GRUCell(INPUTS, UNITS, key=keys[0]), jax.random.normal(keys[1], (TRIALS, TIMES, INPUTS))
    report("jax GRUCell", kp.solve(kp.DiscreteProblem(cell, x)), clock, None, runs)


def of_gpt(clock: Clock) -> None:
    """A transformer of 124 million parameters."""
    from transformer import GPT, TOKENS, TRIALS, WORDS

    torch.manual_seed(0)
    net, tokens = GPT(12).eval(), torch.randint(0, WORDS, (TRIALS, TOKENS))
    names = [f"blocks.{n}" for n in range(12)]

    def step() -> None:
        torch.autograd.grad(net(tokens).sum(), list(net.parameters()))

    report("GPT-2 small", kp.solve(kp.StaticProblem(net, tokens, state=names)), clock, step, 1)


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpt", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    clock = Clock()
    watched(clock)
    print(f"{'':12} {'linearize':>10} {'referee':>9} {'share':>6} {'training':>9} {'application':>12}   seconds")
    if given.gpt:
        of_gpt(clock)
        return
    in_torch(clock, given.runs)
    in_jax(clock, given.runs)


if __name__ == "__main__":
    main()
