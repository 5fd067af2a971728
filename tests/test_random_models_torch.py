"""Random torch cells, networks and fields against dense Jacobians that autograd takes through the modules."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from random_models import (
    GRID,
    INPUTS,
    TIMES,
    TRIALS,
    UNITS,
    Recipe,
    alone,
    check_operators,
    hold,
    label,
    linearized,
    recipes,
    refusal,
)
from torch import Tensor, nn
from torch_grammar import (
    CALLS,
    CELL_ENTRIES,
    CELL_FORMS,
    EXITS,
    HOOKS,
    KEEPING,
    NET_ENTRIES,
    OPERATIONS,
    TOKENS,
    Field,
    Net,
    is_refused,
)
from torchdiffeq import odeint

import kpflow_dyn as kp

PIECES = (OPERATIONS, KEEPING, HOOKS, CALLS)
WORDS = {
    "cell": (CELL_ENTRIES, EXITS, CELL_FORMS, *PIECES),
    "net": (NET_ENTRIES, EXITS, ["module"], *PIECES),
    "field": (["sum"], EXITS, ["module"], *PIECES),
}
Posed = tuple[nn.Module, Any, tuple[Any, ...], Callable[[], Tensor]]


@pytest.fixture(autouse=True, scope="module")
def double_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def posed(recipe: Recipe) -> Posed:
    """The module, its problem, how that is solved, and the states as its user computes them."""
    torch.manual_seed(recipe.seed)
    return {"cell": _cell, "net": _net, "field": _field}[recipe.kind](recipe)


def _cell(recipe: Recipe) -> Posed:
    cell, x = CELL_FORMS[recipe.form](recipe), torch.randn(TRIALS, TIMES, INPUTS)
    z0 = 0.5 * torch.randn(TRIALS, UNITS)
    start = (z0, torch.randn(TRIALS, 2)) if recipe.form == "pair" else z0

    def states() -> Tensor:
        z, found = start, []
        for x_t in x.unbind(1):
            z = cell(x_t, z)
            found.append(torch.cat(z, -1) if isinstance(z, tuple) else z)
        return torch.stack(found, 1)

    return cell, kp.DiscreteProblem(cell, x, start), (), states


def _net(recipe: Recipe) -> Posed:
    net, x = Net(recipe), torch.randn(TRIALS, TOKENS, INPUTS)
    if "token" in recipe.entry or "bag" in recipe.entry:
        x = torch.randint(0, 6, (TRIALS, TOKENS))
    elif "words" not in recipe.entry:
        x = x[:, 0]
    return net, kp.StaticProblem(net, x, state=""), (), lambda: net(x)


def _field(recipe: Recipe) -> Posed:
    f, z0, t = Field(recipe), torch.randn(TRIALS, UNITS), torch.tensor(GRID)
    method = ("euler", "midpoint", "rk4")[recipe.seed % 3]
    states = lambda: odeint(f, z0, t, method=method).transpose(0, 1)  # noqa: E731
    return f, kp.ODEProblem(f, z0, np.array(GRID)), (method,), states


def dense(state: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, np.ndarray]:
    """dS/dtheta [state, ...] by name, one backward pass for each entry of the state."""
    rows = [
        torch.autograd.grad(entry, list(parameters.values()), retain_graph=True, allow_unused=True)
        for entry in state.reshape(-1)
    ]
    columns = zip(*rows, strict=True)
    return {
        name: torch.stack([torch.zeros_like(p) if g is None else g for g in column]).numpy()
        for (name, p), column in zip(parameters.items(), columns, strict=True)
    }


def look(module: nn.Module) -> dict[str, Any]:
    """All of a module that nobody but its user may change."""
    found: dict[str, Any] = {"random numbers": torch.get_rng_state()}
    for name, part in module.named_modules():
        found[f"{name} trains"] = part.training
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            found[f"{name} {kind}"] = list(getattr(part, kind).items())
        found[f"{name} attributes"] = {k: id(v) for k, v in vars(part).items() if isinstance(v, list | dict)}
    for name, p in module.named_parameters():
        found[f"parameter {name}"] = (id(p), type(p), p.detach().clone(), p.requires_grad)
        found[f"gradient of {name}"] = p.grad
    for name, b in module.named_buffers():
        found[f"buffer {name}"] = (id(b), type(b), b.clone())
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@contextlib.contextmanager
def left_alone(module: nn.Module) -> Iterator[None]:
    """Nothing of the module is changed inside, and what it makes for itself are tensors."""
    before = look(module)
    yield
    assert torch._C._functorch.peek_interpreter_stack() is None, "torch is left inside of a torch.func transform"
    assert torch.autograd.forward_ad._current_level == -1, "torch is left in forward mode"
    after = look(module)
    changed = [name for name, value in before.items() if name not in after or not same(value, after[name])]
    assert not changed, f"changed: {changed}"
    for part in module.modules():
        for name, value in vars(part).items():
            assert not isinstance(value, Tensor) or type(value) in (Tensor, nn.Parameter), f"{name} is a {type(value)}"
    assert all(type(b) is Tensor for b in module.buffers())


def check(recipe: Recipe) -> None:
    module, problem, alg, states = posed(recipe)
    with left_alone(module):
        if is_refused(recipe) and refusal(lambda: linearized(problem, *alg)):
            return
        flow = linearized(problem, *alg)
    with left_alone(module):
        operators = lambda state, J: check_operators(flow, state, J)  # noqa: E731
        state = states()
        hidden = not is_refused(recipe) or torch.equal(state, states())  # a clamp may hide all that changes
        assert hidden, "answered, though it has no fixed meaning"
        learn = {name: p for name, p in module.named_parameters() if p.requires_grad}
        operators(state.detach().numpy(), dense(state, learn))


@pytest.mark.parametrize(("kind", "draws"), [("cell", 25), ("net", 25), ("field", 8)])
def test_random_models(kind: str, draws: int) -> None:
    hold(check, recipes(kind, *WORDS[kind]), draws)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("kind", WORDS)
def test_more_random_models(kind: str, number: int) -> None:
    hold(check, recipes(kind, *WORDS[kind]), 28, number)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", [r for kind in WORDS for r in alone(kind, *WORDS[kind])], ids=label)
def test_each_by_itself(recipe: Recipe) -> None:
    check(recipe)
