"""The bound of the NTK's rank by the core, against ranks of dense matrices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax_registry
import network_registry
import numpy as np
import pytest
import registry
import torch
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn.models import CTRNNField


def rank(op: kp.Operator) -> int:
    return int(np.linalg.matrix_rank(to_numpy(op.dense())))


def check(flow: kp.Flow) -> kp.RankBound:
    """The rank of J, which is that of J J*, stays within the bound; that of the core is met where it says so."""
    found = kp.rank_bound(flow)
    assert rank(flow.J) <= found.bound <= min(found.parameters, found.states)
    assert (found.parameters, found.states) == (flow.J.domain.size, flow.J.codomain.size)
    of_core = (
        rank(flow.nodal.core.factor) if isinstance(flow.solution.problem, kp.ODEProblem) else rank(flow.core.factor)
    )
    assert found.core is not None and found.core_effective_rank is not None
    assert found.core == of_core if found.exact else found.core >= of_core
    ntk = to_numpy(flow.ntk.dense())
    assert found.ntk_effective_rank.value == pytest.approx(kp.effective_rank(flow.ntk).value)
    assert found.ntk_effective_rank.value <= rank(flow.J) * (1 + 1e-9), ntk.shape
    assert str(found).startswith(f"rank(NTK) <= {found.bound}; rank(core) {'=' if found.exact else '<='} {found.core}")
    return found


def quickly(names: Iterable[str], quick: set[str]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", quickly(registry.MODELS, {"gru_cell", "meeting_twice", "embedding", "normalised"}))
def test_cells(name: str) -> None:
    check(kp.linearize(kp.solve(registry.MODELS[name].problem(True))))


@pytest.mark.parametrize("name", quickly(jax_registry.MODELS, {"gru", "tied"}))
def test_cells_of_jax(name: str, x64: None) -> None:
    check(kp.linearize(kp.solve(jax_registry.MODELS[name].problem(True))))


NETWORKS = [*(f"torch {name}" for name in network_registry.TORCH), *(f"jax {name}" for name in network_registry.JAX)]


@pytest.mark.parametrize("which", quickly(NETWORKS, {"torch gpt", "torch convolution"}))
def test_networks(which: str, x64: None) -> None:
    library, name = which.split()
    case = getattr(network_registry, library.upper())[name]
    check(kp.linearize(kp.solve(getattr(case, f"{library}_problem")(case.state or None))))


@pytest.mark.parametrize("t", [np.linspace(0, 1, 6), (0.0, 1.0)], ids=["grid", "span"])
def test_odes_are_bounded_by_the_core_of_their_steps(t: Any) -> None:
    torch.manual_seed(0)
    field = CTRNNField(4).double()
    flow = kp.linearize(kp.solve(kp.ODEProblem(field, torch.randn(2, 4, dtype=torch.float64), t), steps=0.5))
    found = check(flow)
    assert found.core == kp.rank_bound(flow.nodal).core


def test_a_constant_input_leaves_few_directions() -> None:
    """All trials are alike, so that V has one row for each time."""
    torch.manual_seed(0)
    cell = nn.RNNCell(1, 12, bias=False).double()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.ones(5, 4, 1, dtype=torch.float64))))
    found = check(flow)
    assert found.exact and found.core == 12 * 4 == rank(flow.J) == found.bound
    assert found.states == 5 * 4 * 12 and found.parameters == 12 * 13
    assert found.by_weight == {"weight_ih + weight_hh": 48}


def test_weights_used_in_two_ways_are_counted_once() -> None:
    """W and its transpose have 12 numbers, and would be 3 x 2 + 4 x 2 by their rows; with the bias 16 parameters."""
    case = network_registry.TORCH["tied"]
    x = torch.randn(9, 4, dtype=torch.float64)
    problem = case.torch_problem(None).remake(x=x)
    found = check(kp.linearize(kp.solve(problem)))
    assert not found.exact and found.by_weight == {"W": 12, "bias": 4} and found.bound == 16


def test_some_parameters_and_rates() -> None:
    torch.manual_seed(0)
    cell = nn.GRUCell(3, 4).double()
    solution = kp.solve(kp.DiscreteProblem(cell, torch.randn(2, 5, 3, dtype=torch.float64)))
    whole = check(kp.linearize(solution))
    some = kp.linearize(solution).only(lambda name: "hh" in name)
    assert kp.rank_bound(some).core <= whole.core and rank(some.ntk.factor) <= kp.rank_bound(some).bound
    slow = kp.linearize(solution, metric=kp.LearningRates(1e-3))
    assert kp.rank_bound(slow).bound == whole.bound


def test_without_sites_parameters_and_states_bound_alone() -> None:
    class Branching(nn.Module):
        hidden_size = 3

        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            rows = zip(self.W(z + x), z.sum(1), strict=True)
            return torch.stack([torch.tanh(v) if total > 0 else torch.sin(v) for v, total in rows])  # not for all alike

    torch.manual_seed(0)
    problem = kp.DiscreteProblem(Branching().double(), torch.randn(2, 4, 3, dtype=torch.float64))
    with pytest.warns(kp.UntracedWarning):
        flow = kp.linearize(kp.solve(problem))
    found = kp.rank_bound(flow)
    assert found.core is None and found.bound == 12 and str(found).startswith("rank(NTK) <= 12, of 12 parameters")


def test_scales_and_embeddings_of_jax(x64: None) -> None:
    """A scale has one direction for each weight that any data meet."""

    class Scaled(eqx.Module):
        gain: jax.Array

        def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
            return jnp.tanh(self.gain * x + 0.5 * z)

    x = jax.random.normal(jax.random.key(0), (2, 5, 4)).at[..., 3].set(0.0)
    found = check(kp.linearize(kp.solve(kp.DiscreteProblem(Scaled(jnp.ones(4)), x, z0=jnp.zeros(4)))))
    assert found.exact and found.bound == 3


def test_the_flow_of_a_readout_is_refused() -> None:
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(2, 4), torch.ones(2, 3, 2))))
    with pytest.raises(TypeError, match="got Output, expected a Flow"):
        kp.rank_bound(flow.output(torch.nn.Linear(4, 1)))
