"""The analysis of `kpflow-dyn analyze` in Python, and a walk through the operators behind it. Runs in seconds.

python examples/analyze_in_python.py
"""

from __future__ import annotations

import torch

import kpflow_dyn as kp
from kpflow_dyn._analyze import analyze
from kpflow_dyn.tasks import make_task

# The ten lines: a network, its task, and everything that the command writes, as one labelled dataset.
torch.manual_seed(0)
task = make_task("memorypro", trials=8, seed=0)
cell = torch.nn.GRUCell(task.inputs.shape[2], 16).double()
problem = kp.DiscreteProblem(cell, torch.from_numpy(task.inputs))
flow = kp.linearize(kp.solve(problem))
dataset = analyze(flow, k=4, seed=0, task=task)
rank = dataset.temporal_effective_rank
print(f"{rank.long_name}: {float(rank):.3f} +- {rank.stderr:.3f} of {rank.dimension} ({rank.description})")
print(f"leading eigenvalues of the NTK: {dataset.ntk_eigenvalue.values.round(1)}")
# dataset.to_netcdf("results.nc"); kpflow_dyn.figures.temporal_modes(dataset).savefig("temporal.png")

# The NTK is what the parameters can kick (K), passed on by the recurrence (P): P K P* = ntk.
q = torch.randn(flow.ntk.domain.shape, dtype=torch.float64)
composed, fused = (flow.P @ flow.K @ flow.P.T).mv(q), flow.ntk.mv(q)
print(f"|P K P* q - ntk q| / |ntk q| = {float((composed - fused).norm() / fused.norm()):.1e}")
assert torch.allclose(composed, fused, rtol=1e-10, atol=1e-10 * float(fused.abs().max()))
assert kp.check_adjoint(flow.P) < 1e-12

# What the ntk is for: a small step of gradient descent moves the state by -eta ntk grad_S L.
target, eta = torch.randn(flow.ntk.domain.shape, dtype=torch.float64), 1e-6
gradient = flow.solution.state - target  # of L = |S - target|^2 / 2
step = flow.as_parameters(-eta * flow.J.T.mv(gradient))
with torch.no_grad():
    for name, parameter in cell.named_parameters():
        parameter += step[name]
moved, predicted = kp.solve(problem).state - flow.solution.state, -eta * flow.ntk.mv(gradient)
print(f"a step of gradient descent, against its prediction: {float((moved - predicted).norm() / moved.norm()):.1e}")
assert torch.allclose(moved, predicted, atol=1e-3 * float(moved.abs().max()))

# Temporal modes are the eigenvectors of the NTK summed over trials and units.
kernel = kp.partial_trace(flow.ntk, keep="time", samples=200, seed=1)
temporal = kp.modes(kernel, axis="time", k=3)
overlap = abs(float(temporal.vectors[0].numpy() @ dataset.temporal_mode.values[0]))
print(f"the first temporal mode, found twice from different probes: overlap {overlap:.3f}")
assert overlap > 0.95

# An effective rank is an estimate with an error bar; the core's is exact, from one forward pass.
found, exact = kp.effective_rank(flow.ntk, seed=1), kp.effective_rank(flow.core)
print(f"effective rank of the NTK {found.value:.2f} +- {found.stderr:.2f}; of the core {exact.value:.2f}, exactly")
assert exact.stderr == 0
assert abs(found.value - float(dataset.ntk_effective_rank)) < 5 * (found.stderr + dataset.ntk_effective_rank.stderr)
