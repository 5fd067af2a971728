"""Networks: one application of the NTK beside vjp and jvp of the same network, and what linearize takes.

    python benchmarks/networks.py              # all of them, each in a process of its own
    python benchmarks/networks.py resnet       # one

Random weights, float32, one thread of a CPU, CPU seconds. The state is the output of the network. The ratio is the time
of `flow.ntk.mv` for each vector over that of torch.func's vjp and jvp for one.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

import kpflow_dyn as kp

WORDS = 20_000


class Basic(nn.Module):
    """Two convolutions beside a shortcut, as in ResNet18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        changes = inputs != outputs
        shorter = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = shorter if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet() -> tuple[nn.Module, Tensor]:
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    widths = [64, 64, 64, 128, 128, 256, 256, 512, 512]
    blocks = [Basic(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(widths)]
    net = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))
    return net.eval(), torch.randn(3, 3, 64, 64)


class Block(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.first, self.qkv, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.second = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x))


class Patches(nn.Module):
    """A transformer on patches of images."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.patch, self.places = nn.Conv2d(3, width, 8, 8), nn.Parameter(0.1 * torch.randn(64, width))
        self.blocks = nn.Sequential(*(Block(width, causal=False) for _ in range(4)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 100))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch(x).flatten(2).transpose(1, 2) + self.places).mean(1))


class Words(nn.Module):
    """A transformer on tokens, whose scores of the next word come from the embedding turned."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(64, width)
        self.blocks, self.norm = nn.Sequential(*(Block(width, causal=True) for _ in range(4))), nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks(self.words(tokens) + self.places(torch.arange(tokens.shape[1])))
        return self.norm(x)[:, -1] @ self.words.weight.T


def embedding() -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Embedding(WORDS, 64), nn.Flatten(), nn.Linear(64 * 16, 10))
    return net, torch.randint(0, WORDS, (32, 16))


def mlp() -> tuple[nn.Module, Tensor]:
    layers = [nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.Tanh(), nn.LayerNorm(1024)]
    return nn.Sequential(*layers, nn.Linear(1024, 100)), torch.randn(64, 256)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "resnet": resnet,
    "vit": lambda: (Patches(), torch.randn(4, 3, 64, 64)),
    "gpt": lambda: (Words(), torch.randint(0, WORDS, (4, 64))),
    "embedding": embedding,
    "mlp": mlp,
}


def seconds(function: Callable[[], Any], runs: int = 1) -> float:
    """The shortest of some runs."""
    times = []
    for _ in range(runs):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def report(name: str) -> None:
    """One row of the table."""
    torch.manual_seed(0)
    net, x = NETWORKS[name]()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    q = torch.randn_like(net(x).detach())

    def by_torch() -> Tensor:
        def output(values: dict[str, Tensor]) -> Tensor:
            return functional_call(net, values, (x,))

        with sdpa_kernel(SDPBackend.MATH):  # the only one with a forward mode
            (gradient,) = vjp(output, parameters)[1](q)
            return jvp(output, (parameters,), (gradient,))[1]

    step = seconds(lambda: torch.autograd.grad(net(x), list(net.parameters()), q), 5)
    solution = kp.solve(kp.StaticProblem(net, x, state=""))
    kp.linearize(solution)
    linearize, flow = seconds(lambda: kp.linearize(solution), 3), kp.linearize(solution)
    one = q.reshape(flow.ntk.domain.shape)
    eight = torch.randn(8, *one.shape)
    found, known = flow.ntk.mv(one), by_torch().reshape(one.shape)
    assert float((found - known).norm() / known.norm()) < 1e-5
    flow.ntk.mv(eight)
    expected = seconds(by_torch, 5)
    ratios = [seconds(lambda: flow.ntk.mv(one), 5) / expected, seconds(lambda: flow.ntk.mv(eight), 3) / expected / 8]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    size = sum(p.numel() for p in parameters.values())
    print(
        f"{name:10} {size / 1e6:8.2f} M {expected:10.4f} {ratios[0]:8.2f} {ratios[1]:8.2f} {linearize:10.2f} "
        f"{linearize / step:8.1f} {memory:8.2f}",
        flush=True,
    )


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help=", ".join(NETWORKS))
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.one:
        report(given.networks[0])
        return
    heads = f"{'parameters':>10} {'vjp + jvp':>10} {'1 probe':>8} {'8':>8} {'linearize':>10} {'/ step':>8} {'GiB':>8}"
    print(f"{'':10} {heads}", flush=True)
    for name in given.networks:
        subprocess.run([sys.executable, __file__, "--one", name], check=True)


if __name__ == "__main__":
    main()
