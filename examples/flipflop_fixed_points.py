"""How does a trained network remember? Fixed points of a GRU on the flip-flop task. A minute.

    python examples/flipflop_fixed_points.py --out points.png    # three bits, so eight memories
    python examples/flipflop_fixed_points.py --quick             # two bits, four memories

Each channel now and then brings a pulse of +1 or -1, and the network says the sign of the last one on each. Expected
(Sussillo, Barak 2013): without input there is one stable fixed point for each of the 2^bits memories, with the readout
at the signs, and saddles between them, whose few unstable directions lead from one memory to another. The indices of
all fixed points sum to one, as the states of a GRU stay in a ball: so starts are drawn until they do.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn.dynamics import FixedPoints

GOOD = 1e-3  # mean squared error at which a network is trained


def trained(bits: int, units: int) -> tuple[nn.GRU, nn.Linear, kp.tasks.TaskData]:
    """A network that works, its readout and the trials that it learnt."""
    torch.manual_seed(0)
    cell, readout = nn.GRU(bits, units).double(), nn.Linear(units, bits).double()
    data = kp.tasks.FlipFlop(bits=bits, steps=40, rate=0.15).sample(trials=64, seed=0)
    for lr in (1e-2, 3e-3):
        training = kp.train.fit(cell, data, readout, steps=1200, lr=lr, clip=1.0, stop_below=GOOD, progress=True)
        print(
            f"lr {lr:g}: loss {training.losses[0]:.3f} -> {training.losses[-1]:.2g} in {len(training.losses) - 1} steps"
        )
        if training.losses[-1] < GOOD:
            return cell, readout, data
    raise SystemExit("the network did not learn the task")


def accuracy(cell: nn.GRU, readout: nn.Linear, bits: int) -> float:
    """The share of right signs on trials that it has not seen."""
    data = kp.tasks.FlipFlop(bits=bits, steps=40, rate=0.15).sample(trials=200, seed=1)
    states = kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(data.inputs))).state
    return float((np.sign(readout(states).detach().numpy()) == data.targets).mean())


def show(found: FixedPoints, readout: nn.Linear) -> None:
    """What each stable point remembers, and how unstable the others are."""
    outputs = readout(torch.from_numpy(found.xstar)).detach().numpy()
    for output, values in zip(outputs[found.is_stable], found.eigval_J_xstar[found.is_stable], strict=True):
        print(f"stable: readout {np.array2string(output, precision=2, sign='+')}, |l_1| = {abs(values[0]):.3f}")
    unstable = (np.abs(found.eigval_J_xstar[~found.is_stable]) > 1).sum(1)
    for directions, count in sorted(Counter(unstable.tolist()).items()):
        print(f"unstable: {count} with {directions} unstable direction{'s' * (directions > 1)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fixed points of a GRU that remembers bits.")
    parser.add_argument("--out", type=Path, help="PNG to write; by default points.png in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="two bits rather than three")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "points.png"
    bits, units = (2, 16) if options.quick else (3, 32)

    cell, readout, data = trained(bits, units)
    print(f"right signs on new trials: {accuracy(cell, readout, bits):.2%}")
    solution = kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(data.inputs)))
    points = kp.dynamics.fixed_points(solution, np.zeros(bits))
    print(f"found all, from {points.tried} starts" if points.complete else points.missing)
    found = points[points.is_fixed]
    print(f"expected: {2**bits} stable fixed points; found: {found.is_stable.sum()} among {len(found)}")
    show(found, readout)
    print(f"expected: indices that sum to 1; found: {found.index.sum()}")
    found.plot().savefig(out)
    print(f"wrote {out}")

    stable = readout(torch.from_numpy(found.xstar[found.is_stable])).detach().numpy()
    assert len(stable) == 2**bits == len(np.unique(np.sign(stable), axis=0))
    assert found.index.sum() == 1


if __name__ == "__main__":
    main()
