"""Time and peak memory of one application of NTK_S to a block of probes, side by side in one run on one thread.

    python benchmarks/ntk_application.py            (curvlinops is measured too where it is installed)

The setting is 40 trials x 90 steps x 256 units, float32; the field is an MLP of 256 hidden units under Heun's method.
Every row is measured in turn with a large matrix product, and a ratio is the median over rounds of (floor / time),
where the floor is the fewest flops that the application can cost (four products for each use of a weight, and those
with the inputs) at the rate of that matrix product. Peak memory is what the process grew beyond what it held before,
the result included.

- kpflow_dyn: the fused operator `flow.ntk` (for the field `flow.nodal.ntk`), all probes in one block.
- products: nothing but the products of such an application, of the same shapes, step by step where steps follow.
- torch.func: vjp, kept, and jvp of the rolled-out cell, one probe after another.
- curvlinops: its Gauss-Newton operator J* J for a summed square loss, one J and one J*, on all probes together.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp

import kpflow_dyn as kp

if TYPE_CHECKING:
    from curvlinops import GGNLinearOperator

TRIALS, TIMES, UNITS, INPUTS = 40, 90, 256, 3
STEP = 0.05
MODELS = {"RNN": (nn.RNNCell, 1), "GRU": (nn.GRUCell, 3), "MLP": (nn.Linear, 4)}  # with its uses of UNITS x UNITS
TOGETHER = 4  # probes that ride in one sweep


class RolledOut(nn.Module):
    """The states [trial, time, unit] of a cell on inputs [trial, time, input]."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        z, states = x.new_zeros(len(x), self.cell.hidden_size), []
        for x_t in x.unbind(1):
            z = self.cell(x_t, z)
            states.append(z)
        return torch.stack(states, 1)


class Integrated(nn.Module):
    """The states [trial, time, unit] of z' = b(tanh(a(z))) from z [trial, unit] by Heun's method."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(UNITS, UNITS), nn.Linear(UNITS, UNITS)

    def field(self, t: Tensor, z: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(z)))

    def forward(self, z: Tensor) -> Tensor:
        states = [z]
        for _ in range(TIMES):
            k = self.field(z[0, 0], z)
            z = z + STEP / 2 * (k + self.field(z[0, 0], z + STEP * k))
            states.append(z)
        return torch.stack(states, 1)


class Field(nn.Module):
    def __init__(self, model: Integrated) -> None:
        super().__init__()
        self.model = model

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.model.field(t, z)


def made(name: str) -> tuple[nn.Module, Tensor, kp.Operator, int]:
    """The model, what it is called with, its NTK, and the flops of one probe."""
    make, uses = MODELS[name]
    torch.manual_seed(0)
    if name == "MLP":
        model, z0 = Integrated(), torch.randn(TRIALS, UNITS)
        solution = kp.solve(kp.ODEProblem(Field(model), z0, STEP * torch.arange(TIMES + 1)), "heun2")
        return model, z0, kp.linearize(solution).nodal.ntk, 2 * TRIALS * TIMES * uses * UNITS * 4 * UNITS
    model, x = RolledOut(make(INPUTS, UNITS)), torch.randn(TRIALS, TIMES, INPUTS)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(model.cell, x)))
    return model, x, flow.ntk, 2 * TRIALS * TIMES * uses * UNITS * (4 * UNITS + 2 * (INPUTS + 2))


def bare_products(name: str, q: Tensor) -> Callable[[Tensor], None]:
    """The products alone: of J* and J each one with the weights at every step, and one with V for all times."""
    probes, uses = min(len(q), TOGETHER), MODELS[name][1]
    groups = 1 if name == "MLP" else uses  # whose products with the state are one
    W, V = torch.randn(groups * UNITS, UNITS).T, torch.randn(TIMES * TRIALS, UNITS)
    states = torch.randn(TIMES, TRIALS * probes, UNITS)
    kicks = torch.randn(TIMES, TRIALS * probes, groups * UNITS)
    change = torch.zeros(UNITS, probes * groups * UNITS)

    def apply(given: Tensor) -> None:
        for _ in range(len(given) // probes * uses // groups):
            for a, s in zip(kicks.unbind(0), states.unbind(0), strict=True):
                s.addmm_(a, W.T, beta=0)
            wide = kicks.view(TIMES * TRIALS, -1)
            change.addmm_(V.T, wide, beta=0)
            wide.addmm_(V, change, beta=0)
            for a, s in zip(kicks.unbind(0), states.unbind(0), strict=True):
                a.addmm_(s, W, beta=0)

    return apply


def with_torch_func(model: nn.Module, x: Tensor, together: bool = False) -> Callable[[Tensor], Tensor]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def states(p: dict[str, Tensor]) -> Tensor:
        return functional_call(model, p, (x,))

    pull = vjp(states, parameters)[1]

    def one(q: Tensor) -> Tensor:
        return jvp(states, (parameters,), pull(q))[1]

    return torch.vmap(one) if together else lambda q: torch.stack([one(probe) for probe in q])


def gauss_newton(model: nn.Module, x: Tensor) -> GGNLinearOperator:
    """curvlinops' J* J, for a summed square loss."""
    from curvlinops import GGNLinearOperator

    loss, data = nn.MSELoss(reduction="sum"), [(x, torch.zeros_like(model(x)))]
    return GGNLinearOperator(model, loss, list(model.parameters()), data, check_deterministic=False)


def with_curvlinops(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    operator = gauss_newton(model, x)
    changes = torch.randn(operator.shape[1], 1)
    return lambda q: operator @ changes.expand(-1, len(q))


def growth(run: Callable[[], object]) -> float:
    """MiB by which the process grew at most while running (Linux with glibc)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory freed before would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return (_resident("VmHWM") - before) / 1024


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(name: str, probes: int, rounds: int) -> None:
    model, x, ntk, flops = made(name)
    flops *= probes
    q = torch.randn(probes, *ntk.domain.shape)
    ways = {
        "kpflow_dyn": ntk.mv,
        "products": bare_products(name, q),
        "torch.func": with_torch_func(model, x),
    }
    with suppress(ImportError):
        ways["curvlinops"] = with_curvlinops(model, x)
    square = torch.randn(2048, 2048)
    for way, apply in ways.items():
        memory = growth(lambda apply=apply: apply(q))
        ratios, times, rates = [], [], []
        for _ in range(rounds if way in ("kpflow_dyn", "products") else max(2, rounds // 3)):
            rates.append(2 * 2048**3 / seconds(lambda: square @ square))
            times.append(seconds(lambda apply=apply: apply(q)))
            ratios.append(flops / rates[-1] / times[-1])
        took, floor = statistics.median(times), flops / statistics.median(rates)
        print(
            f"{name:4} {probes:3}  {way:10}  {1e3 * took:8.0f} ms  floor {1e3 * floor:6.0f} ms  "
            f"{statistics.median(ratios):5.2f} of the floor  {memory:6.0f} MiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--probes", type=int, nargs="*", default=[1, 16])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in MODELS:
        for probes in arguments.probes:
            measure(name, probes, arguments.rounds)


if __name__ == "__main__":
    main()
