"""What the package does on a GPU, in eight minutes: identities, copies to the host, speed, memory.

    python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --device cpu --small        (a rehearsal anywhere)

Each line is printed when it is known, and all lines are written to the file each time, so that an end at any moment
loses nothing; a check that fails is one line, and the next one runs. Checks that would start after `--minutes` are left
out, and said so.

- identities: J, J*, ntk and P K P* against the dense Jacobian of the model itself; in float64, and in float32 with and
  without TF32. The number is the largest error, relative to the largest entry.
- no host copy: an application, and steps of solvers, while each synchronisation (torch) or transfer (JAX) is an error.
- application: time of ntk on blocks of probes; the share is (fewest flops / rate of a large float32 product) / time.
- solvers: eigenpairs, effective rank and summary from start to end, with how often torch waits for the device.
- transformer, sweep: as benchmarks/transformer.py and benchmarks/sweep.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch uses the device too
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from ntk_application import RolledOut, with_torch_func
from torch import Tensor, nn
from transformer import GPT, TRIALS, WORDS

import kpflow_dyn as kp
from kpflow_dyn.solvers import BlockLanczos

Row = dict[str, Any]
PACKAGES = (
    "torch",
    "jax",
    "jaxlib",
    "numpy",
    "scipy",
    "equinox",
    "diffrax",
    "torchdiffeq",
    "xarray",
    "array-api-compat",
)
INPUTS = 3


class Run:
    """The device, the size, and the rows that are known so far."""

    def __init__(self, device: str, small: bool, minutes: float, out: Path | None) -> None:
        self.device, self.small, self.out = device, small, out
        self.until, self.rows = time.monotonic() + 60 * minutes, []

    def shapes(self) -> list[tuple[int, int, int]]:
        """Trials, times and units."""
        return [(4, 6, 16), (4, 8, 32)] if self.small else [(40, 90, 256), (64, 300, 1024)]

    def probes(self) -> list[int]:
        return [1, 4] if self.small else [1, 16, 64, 256]

    def check(self, name: str, compute: Callable[[], Row]) -> None:
        """One row; an error is a row too."""
        start = time.monotonic()
        if start > self.until:
            self._add({"check": name, "left out": "no time was left"})
            return
        try:
            found = compute()
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            found = {
                "error": f"{type(error).__name__}: {str(error)[:300]}",
                "at": f"{Path(last.filename).name}:{last.lineno}",
            }
        self._add({"check": name, **found, "s": round(time.monotonic() - start, 2)})
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        values = [f"{key} {_short(value)}" for key, value in row.items() if key != "check"]
        print("  ".join([f"{row['check']:52}", *values]), flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps(self.rows, indent=1, default=float) + "\n")

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], rounds: int = 5) -> float:
        """The median of some runs after a first one, the device's work included."""
        found = []
        for _ in range(rounds + 1):
            self.wait()
            start = time.perf_counter()
            jax.block_until_ready(run())
            self.wait()
            found.append(time.perf_counter() - start)
            if sum(found) > 10:
                break
        return statistics.median(found[1:] or found)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# Versions


def versions(run: Run) -> Row:
    found: Row = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    found["torch device"] = torch.cuda.get_device_name() if run.device == "cuda" else "cpu"
    found["jax devices"] = str(jax.devices())
    return found


# Identities


def identities(run: Run) -> None:
    import jax_registry
    import registry

    torch_names, jax_names = list(registry.MODELS)[:12], list(jax_registry.MODELS)[:12]
    if run.small:
        torch_names, jax_names = torch_names[:2], jax_names[:2]
    for name in torch_names:
        exact = cache(lambda name=name: exact_torch(name))
        for dtype, tf32 in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
            if not tf32 or run.device == "cuda":
                said = f"identities torch {name} {str(dtype).removeprefix('torch.')}{' TF32' if tf32 else ''}"
                run.check(
                    said,
                    lambda name=name, exact=exact, dtype=dtype, tf32=tf32: of_torch_model(
                        run, name, exact(), dtype, tf32
                    ),
                )
    for place, name in enumerate(jax_names):
        exact = cache(lambda name=name: exact_jax(name))
        for dtype, precision in (("float64", None), ("float32", None), ("float32", "tensorfloat32")):
            if precision is None or (run.device == "cuda" and place < 4):  # each is compiled anew
                said = f"identities JAX {name} {dtype}{'' if precision is None else ' TF32'}"
                run.check(
                    said,
                    lambda name=name, exact=exact, dtype=dtype, how=precision: of_jax_model(name, exact(), dtype, how),
                )


def exact_torch(name: str) -> np.ndarray:
    import registry

    return registry.dense_jacobian(kp.linearize(kp.solve(registry.MODELS[name].problem(True)))).numpy()


def of_torch_model(run: Run, name: str, jacobian: np.ndarray, dtype: torch.dtype, tf32: bool) -> Row:
    import registry

    problem = registry.MODELS[name].problem(True)
    z0, x = problem.z0, problem.x.to(run.device, dtype)
    z0 = tuple(one.to(run.device, dtype) for one in z0) if isinstance(z0, tuple) else z0.to(run.device, dtype)
    with tf32_of_torch(tf32):
        flow = kp.linearize(kp.solve(kp.DiscreteProblem(problem.cell.to(run.device, dtype), x, z0)))
        return errors(flow, jacobian, lambda array: array.double().cpu().numpy()) | {"sites": len(flow.sites)}


@contextmanager
def tf32_of_torch(on: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def exact_jax(name: str) -> tuple[np.ndarray, kp.Flow]:
    import jax_registry

    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        flow = kp.linearize(kp.solve(jax_registry.MODELS[name].problem(True)))
        return np.asarray(jax_registry.dense_jacobian(flow)), flow


def of_jax_model(name: str, exact: tuple[np.ndarray, kp.Flow], dtype: str, precision: str | None) -> Row:
    import jax_registry

    jacobian, flow = exact
    with jax.enable_x64(True), jax.default_matmul_precision(precision) if precision else nullcontext():
        if dtype != "float64":
            flow = kp.linearize(kp.solve(jax_registry.MODELS[name].problem(True, dtype)))
        return errors(flow, jacobian, lambda array: np.asarray(array, "float64")) | {"sites": len(flow.sites)}


def errors(flow: kp.Flow, jacobian: np.ndarray, as_numpy: Callable[[Any], np.ndarray]) -> Row:
    """The largest errors of the operators as matrices."""
    kernel = jacobian @ jacobian.T
    expected = {"J": jacobian, "J*": jacobian.T, "ntk": kernel, "P K P*": kernel}
    operators = {"J": flow.J, "J*": flow.J.T, "ntk": flow.ntk, "P K P*": flow.P @ flow.K @ flow.P.T}
    found = {name: as_numpy(operator.dense()) for name, operator in operators.items()}
    return {
        f"error of {name}": float(abs(found[name] - each).max() / abs(each).max()) for name, each in expected.items()
    }


# No copies to the host


def no_host_copy(run: Run) -> None:
    flow, q = torch_flow(run, nn.GRUCell, run.shapes()[0], 4)
    theta = flow.J.T.mv(q)
    applied = {
        "ntk": lambda: flow.ntk.mv(q),
        "J*": lambda: flow.J.T.mv(q),
        "J": lambda: flow.J.mv(theta),
        "P K P*": lambda: flow.P.mv(flow.K.mv(flow.P.T.mv(q))),
    }
    for name, apply in applied.items():
        run.check(f"no host copy torch {name}", lambda apply=apply: without_waiting(run, apply))
    for name, solve in solvers(flow).items():
        run.check(f"waits torch {name}", lambda solve=solve: {"waits": waits(run, solve)})
    jax_flow, block = jax_flow_of(eqx.nn.GRUCell, run.shapes()[0], 4)
    run.check("no host copy JAX ntk", lambda: without_transfers(lambda: jax_flow.ntk.mv(block)))


def without_waiting(run: Run, apply: Callable[[], Any]) -> Row:
    apply()  # what is made once
    if run.device != "cuda":
        return {"rehearsed": True}
    torch.cuda.set_sync_debug_mode("error")
    try:
        apply()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"holds": True}


def waits(run: Run, compute: Callable[[], Any]) -> int:
    """How often torch waited for the device."""
    compute()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if run.device == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            compute()
        finally:
            if run.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    return sum("synchron" in str(one.message) for one in caught)


def without_transfers(apply: Callable[[], Any]) -> Row:
    jax.block_until_ready(apply())
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(apply())
    return {"holds": True}


def solvers(flow: kp.Flow) -> dict[str, Callable[[], Any]]:
    lanczos = BlockLanczos(dense=0)
    return {
        "20 eigenpairs": lambda: kp.eigs(flow.ntk, 20, alg=lanczos),
        "effective rank": lambda: kp.effective_rank(flow.ntk, samples=60),
        "summary": lambda: kp.summary(flow, k=8, alg=lanczos),
    }


# Applications


def torch_flow(run: Run, make: Any, shape: tuple[int, int, int], probes: int) -> tuple[kp.Flow, Tensor]:
    """A flow in float32 and a block of probes."""
    trials, times, units = shape
    torch.manual_seed(0)
    cell, x = make(INPUTS, units).to(run.device), torch.randn(trials, times, INPUTS, device=run.device)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))
    return flow, torch.randn(probes, trials, times, units, device=run.device)


class TanhRNN(eqx.Module):
    """An RNN of JAX."""

    W: jax.Array
    U: jax.Array
    b: jax.Array
    hidden_size: int = eqx.field(static=True)

    def __init__(self, inputs: int, units: int, *, key: jax.Array) -> None:
        first, second = jax.random.split(key)
        self.W = jax.random.normal(first, (units, units)) / units**0.5
        self.U, self.b, self.hidden_size = jax.random.normal(second, (units, inputs)), jnp.zeros(units), units

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.tanh(self.W @ z + self.U @ x + self.b)


def jax_flow_of(make: Any, shape: tuple[int, int, int], probes: int) -> tuple[kp.Flow, jax.Array]:
    trials, times, units = shape
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[1], (trials, times, INPUTS))
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(make(INPUTS, units, key=keys[0]), x)))
    return flow, jax.random.normal(keys[2], (probes, trials, times, units))


def applications(run: Run) -> None:
    side = 256 if run.small else 8192
    rates: Row = {}
    run.check("rate of a float32 product", lambda: rates.update(rates_of(run, side)) or dict(rates))
    for shape in run.shapes():
        for name, gates, make, own in (("RNN", 1, nn.RNNCell, TanhRNN), ("GRU", 3, nn.GRUCell, eqx.nn.GRUCell)):
            trials, times, units = shape
            flops = 2 * trials * times * gates * units * (4 * units + 2 * (INPUTS + 2))
            said = f"{name} {trials} x {times} x {units}"
            run.check(
                f"torch {said}", lambda make=make, shape=shape, flops=flops: of_torch(run, make, shape, flops, rates)
            )
            run.check(f"JAX {said}", lambda own=own, shape=shape, flops=flops: of_jax(run, own, shape, flops, rates))


def rates_of(run: Run, side: int) -> Row:
    """Flops a second of a square product in float32, of each framework."""
    a, b = torch.randn(side, side, device=run.device), jnp.ones((side, side))
    product = jax.jit(lambda b: jnp.matmul(b, b, precision="highest"))
    return {
        "torch flops": 2 * side**3 / run.seconds(lambda: a @ a),
        "JAX flops": 2 * side**3 / run.seconds(lambda: product(b)),
    }


def fits(run: Run, probes: int, shape: tuple[int, int, int]) -> bool:
    """Whether some ten blocks of probes fit on the device."""
    if run.device != "cuda":
        return True
    return 40 * probes * int(np.prod(shape)) < torch.cuda.mem_get_info()[0]


def of_torch(run: Run, make: Any, shape: tuple[int, int, int], flops: int, rates: Row) -> Row:
    flow, one = torch_flow(run, make, shape, 1)
    found: Row = {}
    for probes in [count for count in run.probes() if fits(run, count, shape)]:
        q = one.repeat(probes, 1, 1, 1)
        took = run.seconds(lambda q=q: flow.ntk.mv(q))
        found |= {f"{probes} probes s": took, f"{probes} share": probes * flops / rates["torch flops"] / took}
        if run.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            flow.ntk.mv(q)
            found[f"{probes} blocks of memory"] = (torch.cuda.max_memory_allocated() - before) / (4 * q.numel())
            found |= {f"{probes} graph": replayed(run, flow, q)} if probes in (1, 64) else {}
    rolled = RolledOut(flow.solution.problem.cell)
    own = with_torch_func(rolled, flow.solution.problem.x)
    return found | {"torch.func, 1 probe s": run.seconds(lambda: own(one), rounds=2)}


def replayed(run: Run, flow: kp.Flow, q: Tensor) -> float | str:
    """Seconds of one application from a CUDA graph, or why there is none."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = flow.ntk.mv(q)
        took = run.seconds(graph.replay)
        error = float(abs(found - flow.ntk.mv(q)).max() / abs(found).max())
        return took if error < 1e-4 else f"off by {error:.1e}"
    except Exception as error:
        torch.cuda.synchronize()
        return f"{type(error).__name__}: {str(error)[:80]}"


def of_jax(run: Run, make: Any, shape: tuple[int, int, int], flops: int, rates: Row) -> Row:
    flow, one = jax_flow_of(make, shape, 1)
    found: Row = {}
    for probes in [count for count in run.probes() if fits(run, 2 * count, shape)]:
        q = jnp.tile(one, (probes, 1, 1, 1))
        took = run.seconds(lambda q=q: flow.ntk.mv(q))
        found |= {f"{probes} probes s": took, f"{probes} share": probes * flops / rates["JAX flops"] / took}
    cell, x = flow.solution.problem.cell, flow.solution.problem.x

    def states(cell: Any) -> jax.Array:
        def step(z: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
            z = jax.vmap(cell)(x_t, z)
            return z, z

        return jax.lax.scan(step, jnp.zeros((shape[0], shape[2])), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    @jax.jit
    def own(q: jax.Array) -> jax.Array:
        arrays, rest = eqx.partition(cell, eqx.is_inexact_array)
        _, push = jax.linearize(lambda arrays: states(eqx.combine(arrays, rest)), arrays)
        return push(*jax.linear_transpose(push, arrays)(q[0]))

    return found | {"linearize, 1 probe s": run.seconds(lambda: own(one), rounds=2)}


# Solvers, a transformer, a sweep


def from_start_to_end(run: Run) -> None:
    for shape in run.shapes():
        flow, _ = torch_flow(run, nn.GRUCell, shape, 1)
        for name, solve in solvers(flow).items():
            run.check(
                f"torch GRU {shape} {name}", lambda solve=solve: {"took s": run.seconds(solve, rounds=1), **memory(run)}
            )
    flow, _ = torch_flow(run, nn.GRUCell, run.shapes()[0], 1)
    run.check(
        "scipy's eigsh on the host, 20 eigenpairs", lambda: {"took s": run.seconds(lambda: by_scipy(flow), rounds=0)}
    )


def memory(run: Run) -> Row:
    return {"peak GiB": torch.cuda.max_memory_allocated() / 2**30} if run.device == "cuda" else {}


def by_scipy(flow: kp.Flow) -> Any:
    from scipy.sparse.linalg import LinearOperator, eigsh

    state = flow.solution.state

    def apply(v: np.ndarray) -> np.ndarray:
        q = torch.as_tensor(v, dtype=state.dtype, device=state.device).reshape(1, *state.shape)
        return flow.ntk.mv(q).cpu().numpy().reshape(-1)

    operator: Any = LinearOperator((state.numel(),) * 2, apply)  # type: ignore[call-arg]
    return eigsh(operator, 20, return_eigenvectors=False)


def transformer(run: Run) -> Row:
    from kpflow_dyn._numbers.estimate import scalars

    layers, tokens = (1, 8) if run.small else (12, 128)
    torch.manual_seed(0)
    net = GPT(layers).to(run.device)
    words = torch.randint(WORDS, (TRIALS, tokens)).to(run.device)
    blocks = [f"blocks.{n}" for n in range(layers)]
    start = time.perf_counter()
    flow = kp.linearize(kp.solve(kp.StaticProblem(net, words, state=blocks)))
    found: Row = {"linearize s": time.perf_counter() - start}
    found["application s"] = run.seconds(lambda: flow.ntk.mv(flow.solution.state), rounds=2)
    start = time.perf_counter()
    numbers = scalars(flow.ntk, 20 if run.small else 100)
    for name, number in (("trace", numbers.trace), ("effective rank", numbers.effective_rank)):
        found |= {name: float(number.value), f"{name} bar": float(number.stderr / number.value)}
    return found | {"both s": time.perf_counter() - start, **memory(run)}


def sweep(run: Run) -> Row:
    """Effective ranks of many GRUs: one by one in torch and JAX, and along an axis of JAX."""
    count, units = (2, 8) if run.small else (64, 64)
    x = kp.tasks.make_task("memorypro", trials=2).inputs
    inputs, own = torch.from_numpy(x).to(run.device), jnp.asarray(x)

    def by_torch() -> None:
        for seed in range(count):
            torch.manual_seed(seed)
            cell = nn.GRUCell(x.shape[2], units).double().to(run.device)
            kp.effective_rank(kp.linearize(kp.solve(kp.DiscreteProblem(cell, inputs))).ntk, 40)

    def rank(cell: eqx.nn.GRUCell) -> jax.Array:
        return kp.regularizers.effective_rank(kp.DiscreteProblem(cell, own), 40)

    cells = [eqx.nn.GRUCell(x.shape[2], units, key=jax.random.key(seed)) for seed in range(count)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cells)
    one, many = jax.jit(rank), jax.jit(jax.vmap(rank))
    return {
        "networks": count,
        "torch, one by one s": run.seconds(by_torch, rounds=1),
        "JAX, one by one s": run.seconds(lambda: [one(cell) for cell in cells], rounds=1),
        "JAX, along an axis s": run.seconds(lambda: many(together), rounds=1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--minutes", type=float, default=7.5, help="no check starts later")
    parser.add_argument("--out", type=Path, help="a JSON file of all rows")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; rehearse with --device cpu --small")
    run = Run(asked.device, asked.small, asked.minutes, asked.out)
    run.check("versions", lambda: versions(run))
    for part in (identities, no_host_copy, applications, from_start_to_end):
        run.check(part.__name__, lambda part=part: part(run) or {})
    run.check("transformer", lambda: transformer(run))
    run.check("sweep", lambda: sweep(run))


if __name__ == "__main__":
    main()
