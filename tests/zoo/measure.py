"""What is measured of one member."""

from __future__ import annotations

import ctypes
import gc
import importlib
import importlib.metadata
import random
import re
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

import kpflow_dyn as kp
from kpflow_dyn._arrays import eps_of
from kpflow_dyn.solvers import Random

from .member import Member, family

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-9  # of a network in float64
SINGLE = 1e-4  # the same of one that computes in float32, at the most
RUNS, SECONDS = 7, 2.0  # an application is timed so often, unless that takes longer


def prepare() -> None:
    """A process in which members are measured: one thread, JAX in double precision."""
    import jax
    import torch

    torch.set_num_threads(1)
    jax.config.update("jax_enable_x64", True)


def names_of(family_name: str) -> list[str]:
    """The members of a family, by name."""
    return [member.name for member in family(family_name)]


def row_of(family_name: str, name: str) -> dict[str, Any]:
    """The row of a member by its name."""
    return measure(next(member for member in family(family_name) if member.name == name))


def measure(member: Member) -> dict[str, Any]:
    """A row of the table: what became of the member, and if it was linearised the errors and costs."""
    row: dict[str, Any] = {
        "name": member.name,
        "package": member.package,
        "version": importlib.metadata.version(member.package),
        "adapter": member.adapter_lines,
    }
    outcome = "not made"
    try:
        seed()
        problem, outcome = member.problem(), "refused"
        return row | linearised(problem, member)
    except (ValueError, TypeError, kp.SolveError) as error:
        return row | {"outcome": outcome, "sentence": placeless(str(error))}
    except Exception as error:
        traceback.print_exc()
        return row | {"outcome": "failed", "sentence": placeless(f"{type(error).__name__}: {error}")}


def placeless(sentence: str) -> str:
    """A sentence without the folders of this machine."""
    return re.sub(rf"\S*site-packages/|{ROOT}/", "", sentence)


def seed() -> None:
    """All generators, so that a member is the same whenever it is made."""
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 that of the packages
    torch.manual_seed(0)


def linearised(problem: Any, member: Member) -> dict[str, Any]:
    """Its errors and costs."""
    forget_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = kp.solve(problem, **member.options)
        flow = kp.linearize(solution)
        seconds = time.perf_counter() - start
        q = Random(1).normal((1, *flow.ntk.domain.shape), like=flow.ntk.domain.like)[0]
        ready(flow.ntk.mv(q))
        memory = resident("VmHWM") - before
        oracle = importlib.import_module(f".{problem.backend.name}_oracle", __package__).Oracle(problem, solution)
        errors = errors_of(flow, oracle, q)
        ratio = cost(lambda: flow.ntk.mv(q)) / reference(oracle, ready(q.reshape(oracle.value.shape)))
    worst = max(errors.values())
    return {
        "outcome": "right" if worst <= allowed(oracle.rounding) else "wrong",
        "single": oracle.rounding > eps_of(np.zeros(1)),
        "sentence": placeless(flow.untraced),
        "road": "second" if flow.untraced else "first",
        "sites": len(flow.sites),
        "parameters": flow.J.domain.size,
        "states": flow.ntk.domain.size,
        "errors": errors,
        "seconds": seconds,
        "ratio": ratio,
        "MiB": memory / 2**10,
    }


def allowed(rounding: float) -> float:
    """How far results may be from those of autograd, where the network computes to this rounding."""
    return max(TOLERANCE, 100 * rounding) if rounding > eps_of(np.zeros(1)) else TOLERANCE


def errors_of(flow: kp.Flow, oracle: Any, q: Any) -> dict[str, float]:
    """How far values and operators are from those of autograd, relative to the largest entry of these."""
    value = oracle.value
    weighted = q if flow.ntk.domain.measure is None else flow.ntk.domain.measure * q  # J* = J^T W
    gradient = oracle.vjp(weighted.reshape(value.shape))
    theta = Random(2).normal((1, flow.J.domain.size), like=flow.J.domain.like)[0]
    kernel = oracle.jvp(gradient)
    steps = flow.nodal
    propagated = (steps.P @ steps.K @ steps.P.T).mv(q if steps is flow else weighted.reshape(steps.P.domain.shape))
    found = flow.as_parameters(flow.J.T.mv(q))
    return {
        "state": departure(flow.solution.state, value),
        "J": departure(flow.J.mv(theta), oracle.jvp(flow.as_parameters(theta))),
        "J*": departure(flat(found.values()), flat(gradient[name] for name in found)),
        "ntk": departure(flow.ntk.mv(q), kernel),
        "P K P*": departure(propagated, kernel),
    }


def flat(arrays: Any) -> np.ndarray:
    return np.concatenate([numpy(a).ravel() for a in arrays])


def departure(found: Any, expected: Any) -> float:
    """The largest difference over the largest entry of what is expected, which must not be zero."""
    a, b = numpy(found).ravel(), numpy(expected).ravel()
    if a.shape != b.shape or not b.any():
        return float("inf")
    error = float(abs(a - b).max() / abs(b).max())
    return error if np.isfinite(error) else float("inf")


def numpy(a: Any) -> np.ndarray:
    a = a.detach().cpu() if hasattr(a, "detach") else a
    return np.asarray(a.float() if str(a.dtype) == "torch.bfloat16" else a)


def reference(oracle: Any, q: Any) -> float:
    """What vjp and jvp through the model cost, in the cheaper of the ways that there are."""
    costs, expected = [cost(lambda: oracle.product(q))], oracle.product(q)
    with suppress(Exception):  # not every model goes through function transforms
        if departure(oracle.transformed(q), expected) < SINGLE:  # nor is every parameter replaced by its name
            costs.append(cost(lambda: oracle.transformed(q)))
    return min(costs)


def cost(function: Callable[[], Any]) -> float:
    """The least processor time of some calls, after one that may compile."""
    ready(function())
    times: list[float] = []
    while len(times) < RUNS and sum(times) < SECONDS:
        start = time.process_time()
        ready(function())
        times.append(time.process_time() - start)
    return min(times)


def ready(value: Any) -> Any:
    """A result, when it is there: JAX computes while Python goes on."""
    return value.block_until_ready() if hasattr(value, "block_until_ready") else value


def forget_peak() -> None:
    """Give free memory back, and have Linux count the peak anew."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident(what: str) -> int:
    """Memory of this process in KiB, as Linux tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))
