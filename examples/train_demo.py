"""Train the checkpoint behind `kpflow-dyn demo`: a GRU of 64 units on neurogym's PerceptualDecisionMaking-v0.

    python examples/train_demo.py --out kpflow_dyn/data/demo.safetensors    # the one that ships, half a minute
    python examples/train_demo.py --quick                                   # a few steps, into a temporary folder

Two noisy inputs run for two seconds; at the end the network says which was larger on average. The best rule is to
compare the two sums, and the script prints how often that is right on the same trials.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kpflow_dyn._checkpoint import load_checkpoint
from kpflow_dyn.tasks import TaskData, make_task

TASK = "neurogym:PerceptualDecisionMaking-v0"
TEST_SEED = 10**6


class Network(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.rnn = nn.GRU(inputs, hidden, batch_first=True)
        self.readout = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """x [trial, time, input] -> scores of the choices [trial, time, output]."""
        return self.readout(self.rnn(x)[0])


def train(steps: int, trials: int = 64, hidden: int = 64) -> Network:
    torch.manual_seed(0)
    network = Network(3, hidden, 3)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = make_task(TASK, trials, seed=step)
        loss = choice_loss(network, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            print(f"step {step:5d}  loss {loss.item():.3f}")
    return network


def choice_loss(network: Network, batch: TaskData) -> Tensor:
    """The cross-entropy with the right choice over all steps: the loss that `kpflow-dyn analyze` takes."""
    scores = network(torch.from_numpy(batch.inputs).float())
    return nn.functional.cross_entropy(scores.flatten(0, 1), torch.from_numpy(batch.labels["class"]).flatten())


@torch.no_grad()
def accuracy(network: Network, data: TaskData) -> float:
    """Fraction of decisions that are right."""
    choice = data.labels["class"]
    answer = network(torch.from_numpy(data.inputs).float()).argmax(dim=-1).numpy()
    return float(np.mean((answer == choice)[choice > 0]))


def ideal_accuracy(data: TaskData) -> float:
    """Fraction of trials in which the larger sum of inputs is on the right side."""
    larger = data.inputs[..., 1:].sum(axis=1).argmax(axis=-1)
    return float(np.mean(larger == data.labels["ground_truth"]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint.")
    parser.add_argument("--out", type=Path, help="file to write; by default demo.safetensors in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="20 steps only, to see that it runs")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "demo.safetensors"

    network = train(steps=20 if options.quick else 1500)
    test = make_task(TASK, trials=2000, seed=TEST_SEED)
    print(f"loss, as kpflow-dyn demo shows it for its own trials: {choice_loss(network, test).item():.4f}")
    print(f"right decisions: {accuracy(network, test):.1%}; an ideal observer: {ideal_accuracy(test):.1%}")
    save_file(network.state_dict(), out)
    checkpoint = load_checkpoint(out, "gru")
    print(f"wrote {out} ({out.stat().st_size / 1000:.0f} kB): {checkpoint.cell}, {checkpoint.readout}")


if __name__ == "__main__":
    main()
