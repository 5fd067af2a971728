"""Peers side by side in one run, each at its best: the NTK of 40 trials x 90 steps x 256 units in float32.

    python benchmarks/peers.py
    python benchmarks/peers.py --models GRU --works application

Each row is a process of its own on one thread, one after another, and is printed as it ends; each call was made once
before, so that nothing is compiled in it. Columns: CPU seconds; these over those of kpflow_dyn in the same framework;
MiB by which the process grew; and what came out.

- application: of the NTK to 16 probes. torch.func keeps its vjp; curvlinops applies its Gauss-Newton operator J* J to
  the block, one J and one J* as well; jax.linearize is compiled with its transpose; kpflow is its HiddenNTKOperator.
- pairs: the 20 leading ones, residuals of 1e-6. scipy is `eigsh`, of the products by torch.func, by curvlinops (on the
  parameters) and by kpflow (as its own `eigsh` calls it, in float32); matfree does as many steps as scipy takes.
- rank: the effective rank of the NTK. kpflow's is `effdim` with as many samples as kpflow_dyn took applications;
  matfree's is that of its trace and Frobenius norm by as many random signs. The last row is a long run, to compare
  these values with.

kpflow (arXiv 2507.06381) is on no index: `git clone https://github.com/meeree/kpflow`, and its src on PYTHONPATH. What
is not installed is printed as not run: `pip install -e '.[all,bench]'` has the others.
"""

from __future__ import annotations

import os

os.environ |= {"NPROC": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from ntk_application import TIMES, TRIALS, UNITS, gauss_newton, growth, with_curvlinops, with_torch_func
from scipy.sparse.linalg import LinearOperator, eigsh
from spectra import PAIRS, TOL, flow_in, matfree, of_torch, ours, scipy

import kpflow_dyn as kp

PROBES, SAMPLES = 16, 60
SHAPE = (TRIALS, TIMES, UNITS)
Run = Callable[[], str]


def block(probes: int = PROBES) -> torch.Tensor:
    return torch.randn(probes, *SHAPE, generator=torch.Generator().manual_seed(1))


def quietly(apply: Callable[..., object], *arguments: object) -> Run:
    def run() -> str:
        apply(*arguments)
        return ""

    return run


# application


def application(framework: str, name: str) -> Run:
    flow, q = flow_in(framework, name), block()
    if framework == "torch":
        return quietly(flow.ntk.mv, q)
    import jax

    probes = jax.numpy.asarray(q.numpy())
    return quietly(lambda: flow.ntk.mv(probes).block_until_ready())


def by_jax(way: str) -> Callable[[str], Run]:
    def of(name: str) -> Run:
        import jax
        from ntk_application_jax import by_autodiff, make

        model, _flow, states, _flops = make(name)
        apply, q = by_autodiff(states, model)[way], jax.numpy.asarray(block().numpy())
        return quietly(lambda: apply(q).block_until_ready())

    return of


def by_torch_func(name: str, together: bool) -> Run:
    return quietly(with_torch_func(*of_torch(name), together), block())


def by_curvlinops(name: str) -> Run:
    return quietly(with_curvlinops(*of_torch(name)), block())


def hidden_ntk(name: str):
    """kpflow's operator, of the cell rolled out."""
    from kpflow.grad_op import HiddenNTKOperator

    model, x = of_torch(name)
    return HiddenNTKOperator(model, x, torch.empty(SHAPE))


def by_kpflow(name: str, together: bool) -> Run:
    ntk, q = hidden_ntk(name), block()
    ntk.toggle_vmap(together)
    return quietly(ntk.batched_call, q)


# pairs


def pairs_of(operator: LinearOperator) -> Run:
    """By scipy, with the products counted."""
    calls: list[int] = []

    def product(v: np.ndarray) -> np.ndarray:
        calls.append(1)
        return operator @ v.astype(np.float32)

    def run() -> str:
        calls.clear()
        counted = LinearOperator(operator.shape, matvec=product, dtype=np.float32)
        eigsh(counted, PAIRS, which="LA", tol=TOL, v0=np.ones(operator.shape[0], np.float32))
        return f"{len(calls)} products"

    return run


# rank


def rank(framework: str, name: str) -> Run:
    flow = flow_in(framework, name)
    return lambda: _told(kp.effective_rank(flow.ntk, SAMPLES))


def _told(found: kp.Estimate) -> str:
    return f"{found.value:.1f} +- {found.stderr:.1f}, {found.applications} applications"


def truth(name: str) -> Run:
    flow = flow_in("torch", name)
    return lambda: _told(kp.effective_rank(flow.ntk, rtol=2e-3))


def rank_of_kpflow(name: str) -> Run:
    ntk = hidden_ntk(name)
    ntk.toggle_vmap(False)

    def run() -> str:
        torch.manual_seed(0)
        return f"{float(ntk.effdim(nsamp=SAMPLES, grammian=False)):.1f}, {SAMPLES} applications"

    return run


def rank_of_matfree(name: str) -> Run:
    import jax
    import jax.numpy as jnp
    from matfree import stochtrace
    from ntk_application_jax import by_autodiff, make

    model, _flow, states, _flops = make(name)
    apply = by_autodiff(states, model)["linearize"]
    of_trace, of_square = stochtrace.monte_carlo_trace(), stochtrace.monte_carlo_frobeniusnorm_squared()

    def moments(matvec: Callable, v: jax.Array) -> jax.Array:
        image = matvec(v)
        return jnp.stack([of_trace(lambda _: image, v), of_square(lambda _: image, v)])

    sampler = stochtrace.sampler_signs(jnp.ones(TRIALS * TIMES * UNITS), num=1)  # more would be a vmap, and slower
    estimate = stochtrace.estimator_monte_carlo(moments, sampler)

    @jax.jit
    def all_of_them(keys: jax.Array) -> jax.Array:
        product = lambda q: apply(q.reshape((1, *SHAPE))).reshape(-1)  # noqa: E731
        return jax.lax.map(lambda key: estimate(product, key), keys).mean(0)

    def run() -> str:
        trace, square = all_of_them(jax.random.split(jax.random.key(0), SAMPLES))
        return f"{float(trace**2 / square):.1f}, {SAMPLES} applications"

    return run


# the run

TORCH, JAX = "kpflow_dyn, torch", "kpflow_dyn, JAX"
WORKS: dict[str, dict[str, Callable[[str], Run]]] = {
    "application": {
        TORCH: lambda name: application("torch", name),
        "torch.func": lambda name: by_torch_func(name, together=False),
        "torch.func, vmap": lambda name: by_torch_func(name, together=True),
        "curvlinops": by_curvlinops,
        "kpflow": lambda name: by_kpflow(name, together=False),
        "kpflow, vmap": lambda name: by_kpflow(name, together=True),
        JAX: lambda name: application("jax", name),
        "jax.linearize": by_jax("linearize"),
        "jax.jvp of vjp": by_jax("jvp o vjp"),
    },
    "pairs": {
        TORCH: lambda name: ours("torch", name, "eigs"),
        "scipy, torch.func": lambda name: scipy("", name, ""),
        "scipy, curvlinops": lambda name: pairs_of(gauss_newton(*of_torch(name)).to_scipy()),
        "scipy, kpflow": lambda name: pairs_of(hidden_ntk(name).to_scipy(np.float32)),
        JAX: lambda name: ours("jax", name, "eigs"),
        "matfree": lambda name: matfree("", name, ""),
    },
    "rank": {
        TORCH: lambda name: rank("torch", name),
        "kpflow": rank_of_kpflow,
        JAX: lambda name: rank("jax", name),
        "matfree": rank_of_matfree,
        "kpflow_dyn, to 0.2 %": truth,
    },
}


def row(work: str, name: str, peer: str) -> dict:
    """Seconds, MiB and words of one row, or why it did not run."""
    try:
        run = WORKS[work][peer](name)
    except ImportError as error:
        return {"missing": str(error)}
    run()
    found = {}

    def timed() -> None:
        start = time.process_time()
        found["said"] = run()
        found["seconds"] = time.process_time() - start

    return {"MiB": growth(timed)} | found


def in_its_process(*what: str) -> dict:
    command = [sys.executable, __file__, "--row", *what]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        return {"missing": (ran.stderr.strip().splitlines() or [f"ended with {ran.returncode}"])[-1]}
    return json.loads(ran.stdout.splitlines()[-1])


def printed(work: str, name: str) -> None:
    print(f"\n{name}, {work}: CPU seconds, over those of kpflow_dyn, MiB")
    ours = None
    for peer in WORKS[work]:
        found = in_its_process(work, name, peer)
        if "missing" in found:
            print(f"{peer:21} not run: {found['missing']}", flush=True)
            continue
        ours = found["seconds"] if peer in (TORCH, JAX) else ours
        ratio = f"{found['seconds'] / ours:6.2f}" if ours else ""
        print(f"{peer:21} {found['seconds']:8.2f} {ratio}  {found['MiB']:6.0f}  {found['said']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["RNN", "GRU"], choices=["RNN", "GRU"])
    parser.add_argument("--works", nargs="*", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--row", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(row(*arguments.row)))
        return
    for name in arguments.models:
        for work in arguments.works:
            printed(work, name)


if __name__ == "__main__":
    main()
