"""When can a controller learn? The temporal modes of its NTK before and after training. In JAX; runs in under a minute.

    python examples/diffrax_controller.py --out controller.png    # trains for seconds, saves a figure
    python examples/diffrax_controller.py --quick                 # a few steps, into a temporary folder

A policy, a small network, turns a pendulum by a torque. It is trained through diffrax to bring the pendulum upright and
hold it there, from hanging starts too. The state of the NTK is that of the pendulum: angle and angular velocity.
The same numbers as a page: kpflow-dyn analyze --problem examples/diffrax_controller.py:problem
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES
from kpflow_dyn.models import ClosedLoop, Pendulum

jax.config.update("jax_enable_x64", True)

SOLVER, STEPS, QUICK_STEPS = diffrax.Heun(), 300, 10
TIMES = np.linspace(0.0, 3.0, 101)  # seconds; the solver takes these steps
START = jnp.array([[3.1, 0.0], [-2.0, 0.0], [1.0, -1.0], [-0.3, 2.0]])  # angle [rad], its velocity [rad/s]


def untrained() -> Callable:
    policy = eqx.nn.MLP(2, 1, width_size=16, depth=1, activation=jnp.tanh, key=jax.random.key(0))
    return ClosedLoop(Pendulum(damping=0.2), policy)


def solve(loop: Callable) -> jax.Array:
    """The state [trial, time, unit] from the starts."""
    steps, wanted = diffrax.StepTo(ts=jnp.asarray(TIMES)), diffrax.SaveAt(ts=jnp.asarray(TIMES))
    field = diffrax.ODETerm(lambda t, z, args: loop(t, z))

    def one(start: jax.Array) -> Any:
        return diffrax.diffeqsolve(
            field, SOLVER, TIMES[0], TIMES[-1], None, start, saveat=wanted, stepsize_controller=steps
        ).ys

    return jax.vmap(one)(START)


def loss_of_state(state: jax.Array) -> jax.Array:
    """L = the integral of 2 (1 - cos angle) + velocity^2 / 10, summed over trials."""
    rate = 2 * (1 - jnp.cos(state[..., 0])) + state[..., 1] ** 2 / 10
    return jnp.trapezoid(rate, TIMES, axis=1).sum()


@eqx.filter_jit
@eqx.filter_grad(has_aux=True)
def gradient_and_state(loop: Callable) -> tuple[jax.Array, jax.Array]:
    state = solve(loop)
    return loss_of_state(state), state


def train(loop: Callable, steps: int, rate: float = 0.1) -> Callable:
    """Adam."""
    mean = square = jax.tree.map(jnp.zeros_like, eqx.filter(loop, eqx.is_inexact_array))
    for step in range(1, steps + 1):
        gradient, _ = gradient_and_state(loop)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, gradient)
        square = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g**2, square, gradient)
        size = rate * (1 - 0.99**step) ** 0.5 / (1 - 0.9**step)
        loop = eqx.apply_updates(loop, jax.tree.map(lambda m, s: -size * m / (s**0.5 + 1e-8), mean, square))  # noqa: B023
    return loop


def problem(steps: int = STEPS) -> kp.Solution:
    """The trained loop on its times, for the command line."""
    return solution_of(train(untrained(), steps))


def solution_of(loop: Callable) -> kp.Solution:
    return kp.solve(kp.ODEProblem(loop, START, TIMES), SOLVER, steps=TIMES)


def check_a_step(flow: kp.Flow, loop: Callable, eta: float = 1e-7) -> float:
    """Take a real step of gradient descent on L; how far the state moves otherwise than by -eta ntk grad_S L."""
    space = flow.ntk.domain
    gradient = jax.grad(loss_of_state)(flow.solution.state) / space.measure  # in the inner product of the flow
    stepped = eqx.apply_updates(loop, jax.tree.map(lambda g: -eta * g, gradient_and_state(loop)[0]))
    moved, predicted = gradient_and_state(stepped)[1] - flow.solution.state, -eta * flow.ntk.mv(gradient)
    return float(jnp.linalg.norm(moved - predicted) / jnp.linalg.norm(moved))


def draw(path: Path, flows: dict[str, kp.Flow]) -> None:
    """Above the angles, below the temporal modes, of which the legend says the shares."""
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    rows = figure.subplots(2, 2, sharex=True, sharey="row")
    for (when, flow), angles, modes in zip(flows.items(), *rows, strict=True):
        angles.set_title(f"{when} training")
        for found, color in zip(np.asarray(flow.solution.state), SERIES, strict=True):
            angles.plot(TIMES, found[:, 0], color=color)
        found = kp.modes(flow.ntk, axis="time", k=3)
        for mode, share, color in zip(np.asarray(found.vectors), found.explained, SERIES, strict=False):
            modes.plot(TIMES, mode * np.sign(mode[np.abs(mode).argmax()]), color=color, label=f"{100 * share:.2g} %")
        modes.legend(title="Mode with its share of the trace", ncols=3, loc="upper left", frameon=False)
        modes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        modes.set(xlabel="Time (s)", xlim=(TIMES[0], TIMES[-1]))
    rows[0, 0].set(ylabel="Angle (rad), 0 is upright")
    rows[1, 0].set(ylabel="Temporal mode (s$^{-1/2}$)", ylim=(-1.2, 3.6))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Temporal modes of a controlled pendulum before and after training.")
    parser.add_argument("--out", type=Path, help="PNG to write; by default controller.png in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that it runs")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "controller.png"

    jax.config.update("jax_disable_most_optimizations", options.quick)  # far more is compiled than computed then
    before = untrained()
    loops = {"Before": before, "After": train(before, QUICK_STEPS if options.quick else STEPS)}
    flows = {when: kp.linearize(solution_of(loop)) for when, loop in loops.items()}
    for when, flow in flows.items():
        loss = float(loss_of_state(flow.solution.state))
        rank = kp.effective_rank(kp.partial_trace(flow.ntk, keep="time"))
        values = kp.eigs(flow.ntk, k=8).values[:4]  # as many as one block: JAX compiles for each size
        print(f"{when} training: loss {loss:.2f}, temporal effective rank {rank.value:.2f} of {len(TIMES)}")
        print(f"    leading eigenvalues of the NTK: {np.asarray(values).round(2)}")
    defect = check_a_step(flows["After"], loops["After"])
    print(f"a step of gradient descent, against its prediction: {defect:.1e}")
    assert defect < 1e-3
    draw(out, flows)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
