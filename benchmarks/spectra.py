"""Time and peak memory of the 20 leading eigenpairs of NTK_S and of its summary, each in a process of its own.

    python benchmarks/spectra.py

The setting is 40 trials x 90 steps x 256 units, float32, residuals of 1e-6, one thread. Every row is a fresh process,
one after another; what JAX compiles was compiled before. Peak memory is what the process grew beyond what it held, the
results included.

- eigs, summary: `kp.eigs(flow.ntk, 20)` and `kp.summary(flow, 20)`, which gives every scalar besides.
- scipy: `eigsh` on vjp and jvp of the rolled-out cell by torch.func, in state space.
- matfree: its Lanczos with full orthogonalisation on jit(jvp(vjp)), as many steps as scipy took products (JAX).
"""

from __future__ import annotations

import os

os.environ["NPROC"] = "1"  # the size of XLA's thread pool, which its flags do not bound

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from ntk_application import INPUTS, MODELS, TIMES, TRIALS, UNITS, RolledOut, growth, with_torch_func
from scipy.sparse.linalg import LinearOperator, eigsh

import kpflow_dyn as kp
from kpflow_dyn.solvers import BlockLanczos

PAIRS, TOL = 20, 1e-6
STEPS = {"RNN": 77, "GRU": 123}  # products that scipy takes


def of_torch(name: str) -> tuple[RolledOut, torch.Tensor]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return RolledOut(MODELS[name][0](INPUTS, UNITS)), torch.randn(TRIALS, TIMES, INPUTS)


def flow_in(framework: str, name: str) -> kp.Flow:
    if framework == "torch":
        model, x = of_torch(name)
        return kp.linearize(kp.solve(kp.DiscreteProblem(model.cell, x)))
    from ntk_application_jax import make

    return make(name)[1]


def ours(framework: str, name: str, what: str) -> Callable[[], str]:
    flow, alg = flow_in(framework, name), BlockLanczos(tol=TOL)

    def run() -> str:
        found = kp.eigs(flow.ntk, PAIRS, alg=alg) if what == "eigs" else kp.summary(flow, PAIRS, alg=alg)
        return f"{found.applications} applications"

    if framework == "jax":
        run()
    return run


def scipy(_framework: str, name: str, _what: str) -> Callable[[], str]:
    apply, n, calls = with_torch_func(*of_torch(name)), TRIALS * TIMES * UNITS, []

    def product(v: np.ndarray) -> np.ndarray:
        calls.append(1)
        return apply(torch.from_numpy(v.reshape(1, TRIALS, TIMES, UNITS).astype(np.float32))).numpy().reshape(-1)

    def run() -> str:
        calls.clear()
        operator = LinearOperator((n, n), matvec=product, dtype=np.float32)
        eigsh(operator, PAIRS, which="LA", tol=TOL, v0=np.ones(n, np.float32))
        return f"{len(calls)} products"

    product(np.ones(n, np.float32))
    return run


def matfree(_framework: str, name: str, _what: str) -> Callable[[], str]:
    import jax
    import jax.numpy as jnp
    from matfree import decomp, eig
    from ntk_application_jax import by_autodiff, make

    model, _flow, states, _flops = make(name)
    shape, steps = (TRIALS, TIMES, UNITS), STEPS[name]
    apply = by_autodiff(states, model)["jvp o vjp"]
    lanczos = eig.eigh_partial(decomp.tridiag_sym(steps))
    solve = jax.jit(lambda v: lanczos(lambda q: apply(q.reshape((1, *shape))).reshape(-1), v))

    def run() -> str:
        values, vectors = jax.block_until_ready(solve(jnp.ones(int(np.prod(shape)))))
        q = vectors[jnp.argsort(-values)[:PAIRS]]
        images = apply(q.reshape((PAIRS, *shape))).reshape(q.shape)
        rest = images - jnp.sort(values)[::-1][:PAIRS, None] * q
        return f"{steps} products, residual {float(jnp.linalg.norm(rest, axis=1).max() / values.max()):.0e}"

    run()
    return run


ROWS = {
    "eigs, torch": (ours, "torch", "eigs"),
    "summary, torch": (ours, "torch", "summary"),
    "scipy on torch.func": (scipy, "", ""),
    "eigs, jax": (ours, "jax", "eigs"),
    "summary, jax": (ours, "jax", "summary"),
    "matfree on jvp o vjp": (matfree, "", ""),
}


def measure(name: str, row: str) -> None:
    make, framework, what = ROWS[row]
    run, said = make(framework, name, what), []
    start = time.perf_counter()
    peak = growth(lambda: said.append(run()))
    print(f"{name:4} {row:21} {time.perf_counter() - start:6.1f} s  {peak:6.0f} MiB  {said[0]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(*arguments.one)
        return
    for name in arguments.models:
        for row in arguments.rows:
            subprocess.run([sys.executable, __file__, "--one", name, row], check=True)


if __name__ == "__main__":
    main()
