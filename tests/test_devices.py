"""Operators and solvers on the device that a model lies on, in full precision; on CUDA too where there is a device.

pytest -m gpu
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import jax
import numpy as np
import pytest
import torch
from jax_registry import TanhRNN
from registry import MODELS, dense_jacobian

import kpflow_dyn as kp
from kpflow_dyn.solvers import BlockLanczos

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, CUDA])]
QUICK = ["rnn_cell", "gru_cell", "lstm_cell"]


def on(device: str, name: str, dtype: torch.dtype = torch.float64) -> kp.Flow:
    problem = MODELS[name].problem(True, dtype)
    z0 = problem.z0
    z0 = tuple(part.to(device) for part in z0) if isinstance(z0, tuple) else z0.to(device)
    return kp.linearize(kp.solve(kp.DiscreteProblem(problem.cell.to(device), problem.x.to(device), z0)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in MODELS])
def test_identities(device: str, name: str) -> None:
    flow = on(device, name)
    jacobian = dense_jacobian(on("cpu", name)).to(device)
    expected = jacobian @ jacobian.T
    scale = float(abs(expected).max())
    assert flow.ntk.dense().device.type == device
    for operator in (flow.ntk, flow.P @ flow.K @ flow.P.T, flow.J @ flow.J.T):
        torch.testing.assert_close(operator.dense(), expected, rtol=0, atol=1e-10 * scale)
    pairs = kp.eigs(flow.ntk, 3, alg=BlockLanczos(dense=0, block=2))
    torch.testing.assert_close(pairs.values, torch.linalg.eigvalsh(expected).flip(0)[:3], rtol=1e-9, atol=1e-9 * scale)
    assert pairs.vectors.device.type == device
    trace = kp.trace(flow.ntk, samples=40)
    assert abs(trace.value - float(expected.trace())) < 5 * trace.stderr + 1e-9 * scale


SOLVERS: dict[str, Callable[[kp.Flow], object]] = {
    "eigs": lambda flow: kp.eigs(flow.ntk, 4, alg=BlockLanczos(dense=0, block=2)),
    "svds": lambda flow: kp.svds(flow.J, 4, alg=BlockLanczos(dense=0, block=2)),
    "trace": lambda flow: kp.trace(flow.ntk, samples=40),
    "rank": lambda flow: kp.effective_rank(flow.ntk, samples=40),
    "kernel": lambda flow: kp.partial_trace(flow.ntk, "time", samples=40),
    "density": lambda flow: kp.spectral_density(flow.ntk),
    "summary": lambda flow: kp.summary(flow, k=4, alg=BlockLanczos(dense=0, block=2)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SOLVERS)
def test_no_vector_comes_to_the_host(device: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    cell, x = torch.nn.RNNCell(3, 90).to(device), torch.randn(20, 100, 3).to(device)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))  # vectors are longer than 400^2, products of rows
    to_host, least = torch.Tensor.cpu, min(flow.ntk.domain.size, 20 * flow.J.domain.size)

    def small_only(values: torch.Tensor) -> torch.Tensor:
        assert values.numel() < least, f"{tuple(values.shape)} was copied to the host"
        return to_host(values)

    monkeypatch.setattr(torch.Tensor, "cpu", small_only)
    SOLVERS[name](flow)


@pytest.mark.parametrize("asked", [None, "tensorfloat32"])
def test_jax_products_are_in_full_precision_unless_asked(asked: str | None) -> None:
    """JAX takes TF32 for float32 on a GPU by default; the program says which precision it wants."""
    keys = jax.random.split(jax.random.key(0), 3)
    cell, x = TanhRNN(keys[0]), jax.random.normal(keys[1], (2, 5, 3), "float32")
    cell = jax.tree.map(lambda a: a.astype("float32") if hasattr(a, "astype") else a, cell)
    with jax.default_matmul_precision(asked):
        flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))
        program = str(jax.make_jaxpr(flow.ntk.mv)(jax.random.normal(keys[2], (2, *flow.ntk.domain.shape), "float32")))
    found = {line.split("precision=")[1][:20] for line in program.splitlines() if " precision=" in line}
    assert found and all(("HIGHEST" in each) == (asked is None) for each in found), found


def test_float32_keeps_its_digits_in_eigenpairs() -> None:
    """What a residual claims in float32 is true in float64."""
    problem = MODELS["gru_cell"].problem(False)
    exact = kp.linearize(kp.solve(problem)).ntk
    single = kp.DiscreteProblem(copy.deepcopy(problem.cell).float(), problem.x.float())
    flow = kp.linearize(kp.solve(single))
    pairs = kp.eigs(flow.ntk, 3, alg=BlockLanczos(dense=0, block=1, tol=3e-6))
    q = pairs.vectors.double()
    rest = exact.mv(q) - pairs.values.reshape(-1, 1, 1, 1) * q
    true = rest.flatten(1).norm(dim=1) / pairs.values[0]
    assert pairs.converged.all()
    np.testing.assert_allclose(pairs.residuals, true, atol=1e-6)
