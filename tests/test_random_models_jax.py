"""Random JAX cells, networks and fields against dense Jacobians that JAX takes through the callables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
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

diffrax = pytest.importorskip("diffrax")
jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from jax_grammar import (  # noqa: E402
    CALLS,
    CELL_FORMS,
    ENTRIES,
    EXITS,
    HOOKS,
    KEEPING,
    NET_ENTRIES,
    OPERATIONS,
    TOKENS,
    Field,
    Net,
    is_one_way,
    is_refused,
)

import kpflow_dyn as kp  # noqa: E402
from kpflow_dyn._jax.checks import floating_leaves, with_parameters  # noqa: E402

PIECES = (OPERATIONS, KEEPING, HOOKS, CALLS)
WORDS = {
    "cell": (ENTRIES, EXITS, CELL_FORMS, *PIECES),
    "net": (NET_ENTRIES, EXITS, ["module"], *PIECES),
    "field": (["sum"], EXITS, ["module"], *PIECES),
}
Posed = tuple[Any, Any, tuple[tuple[Any, ...], dict[str, Any]], Callable[[Any], jax.Array]]


@pytest.fixture(autouse=True, scope="module")
def double_precision() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def posed(recipe: Recipe) -> Posed:
    """The model, its problem, how that is solved, and the states [trial, ...] as its user computes them."""
    keys = jax.random.split(jax.random.key(recipe.seed), 3)
    return {"cell": _cell, "net": _net, "field": _field}[recipe.kind](recipe, *keys)


def _cell(recipe: Recipe, key: jax.Array, for_x: jax.Array, for_z: jax.Array) -> Posed:
    cell, x = CELL_FORMS[recipe.form](recipe, key), jax.random.normal(for_x, (TRIALS, TIMES, INPUTS))
    z0 = 0.5 * jax.random.normal(for_z, (TRIALS, UNITS))
    start = (z0, jnp.ones((TRIALS, 2))) if recipe.form == "pair" else z0

    def of_a_trial(cell: Any, x: jax.Array, z: Any) -> jax.Array:
        found = []
        for x_t in x:
            z = cell(x_t, z)
            found.append(jnp.concatenate(z) if isinstance(z, tuple) else z)
        return jnp.stack(found)

    states = lambda cell: jax.vmap(of_a_trial, (None, 0, 0))(cell, x, start)  # noqa: E731
    return cell, kp.DiscreteProblem(cell, x, start), ((), {}), states


def _net(recipe: Recipe, key: jax.Array, for_x: jax.Array, _: jax.Array) -> Posed:
    net, x = Net(recipe, key), jax.random.normal(for_x, (TRIALS, TOKENS, INPUTS))
    if recipe.entry == "tokens":
        x = jax.random.randint(for_x, (TRIALS, TOKENS), 0, 6)
    elif recipe.entry == "sum":
        x = x[:, 0]
    return net, kp.StaticProblem(net, x, state=""), ((), {}), lambda net: jax.vmap(net)(x)


def _field(recipe: Recipe, key: jax.Array, _: jax.Array, for_z: jax.Array) -> Posed:
    f, z0, t = Field(recipe, key), jax.random.normal(for_z, (TRIALS, UNITS)), np.array(GRID)
    solver = (diffrax.Euler(), diffrax.Heun(), diffrax.Bosh3())[recipe.seed % 3]

    def of_a_trial(f: Any, z: jax.Array) -> jax.Array:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, z, _: f(t, z)),
            solver,
            t[0],
            t[-1],
            None,
            z,
            saveat=diffrax.SaveAt(ts=t),
            stepsize_controller=diffrax.StepTo(t),
            adjoint=diffrax.DirectAdjoint(),
        ).ys

    states = lambda f: jax.vmap(of_a_trial, (None, 0))(f, z0)  # noqa: E731
    return f, kp.ODEProblem(f, z0, t), ((solver,), {"steps": t}), states


def dense(states: Callable[[Any], jax.Array], model: Any, one_way: bool) -> dict[str, np.ndarray]:
    """dS/dtheta [state, ...] by name; by reverse mode where there is one, which is what the user's gradient is."""
    mode = jax.jacfwd if one_way else jax.jacrev
    found = mode(lambda values: states(with_parameters(model, values)).reshape(-1))(floating_leaves(model))
    return {name: np.asarray(value) for name, value in found.items()}


def check(recipe: Recipe) -> None:
    model, problem, (alg, options), states = posed(recipe)
    error = None
    flow = None

    def answer() -> None:
        nonlocal flow
        flow = linearized(problem, *alg, **options)

    if is_refused(recipe) or is_one_way(recipe):
        error = refusal(answer)
        assert error or not is_refused(recipe), "answered, though it has no derivative"
    else:
        answer()
    if error is None:
        check_operators(flow, np.asarray(states(model)), dense(states, model, is_one_way(recipe)))


@pytest.mark.parametrize(("kind", "draws"), [("cell", 3), ("net", 3), ("field", 1)])
def test_random_models(kind: str, draws: int) -> None:
    hold(check, recipes(kind, *WORDS[kind]), draws)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("kind", WORDS)
def test_more_random_models(kind: str, number: int) -> None:
    hold(check, recipes(kind, *WORDS[kind]), 28, number)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", alone("cell", *WORDS["cell"]), ids=label)
def test_each_by_itself(recipe: Recipe) -> None:
    check(recipe)
