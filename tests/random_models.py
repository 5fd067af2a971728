"""What the tests of random models share: a recipe for a model, and a flow held against a dense Jacobian of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import kpflow_dyn as kp
from kpflow_dyn._arrays import like_numpy, to_numpy

TRIALS, TIMES, INPUTS, UNITS = 2, 3, 3, 4
GRID = (0.0, 0.2, 0.5, 0.6)
TOLERANCE = 1e-9  # of float64, relative to the largest entry


@dataclass(frozen=True)
class Piece:
    """One operation of a model: how its weight is kept, what hangs on it, and how it is called, each by its name."""

    operation: str
    weight: str = "plain"
    hook: str = "none"
    call: str = "plain"


@dataclass(frozen=True)
class Recipe:
    """A model: its pieces one after another, how it begins and ends, in which form it is handed over, its numbers."""

    kind: str
    pieces: tuple[Piece, ...]
    entry: str = "sum"
    exit: str = "tanh"
    form: str = "module"
    seed: int = 0


def recipes(kind: str, entries: Any, exits: Any, forms: Any, *names: Any) -> st.SearchStrategy[Recipe]:
    """Random recipes of this kind; most weights, hooks and calls are plain ones, the first of their names."""
    operations, *others = map(list, names)
    pieces = st.builds(Piece, st.sampled_from(operations), *map(_mostly_first, others))
    return st.builds(
        Recipe,
        st.just(kind),
        st.lists(pieces, min_size=1, max_size=3).map(tuple),
        st.sampled_from(list(entries)),
        st.sampled_from(list(exits)),
        _mostly_first(list(forms)),
        st.integers(0, 2**20),
    )


def _mostly_first(names: list[str]) -> st.SearchStrategy[str]:
    return st.one_of(st.just(names[0]), st.sampled_from(names))


def alone(kind: str, entries: Any, exits: Any, forms: Any, *names: Any) -> list[Recipe]:
    """Each operation, each way to keep a weight, each hook and each call by itself, and each beginning and end."""
    entry, exit, form = (next(iter(words)) for words in (entries, exits, forms))
    operations, *others = map(list, names)
    plain = [words[0] for words in others]
    pieces = [Piece(name, *plain) for name in operations]
    for n, words in enumerate(others):
        pieces += [Piece("linear", *plain[:n], word, *plain[n + 1 :]) for word in words[1:]]
    linear = (Piece("linear", *plain),)
    return [
        *(Recipe(kind, (piece,), entry, exit, form) for piece in pieces),
        *(Recipe(kind, linear, word, exit, form) for word in list(entries)[1:]),
        *(Recipe(kind, linear, entry, word, form) for word in list(exits)[1:]),
        *(Recipe(kind, linear, entry, exit, word) for word in list(forms)[1:]),
    ]


def hold(check: Callable[[Recipe], None], models: st.SearchStrategy[Recipe], draws: int, number: int = 0) -> None:
    """Check so many random models, for one number the same ones in every run of the same code."""
    patient = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

    @seed(number)
    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=draws,
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
        suppress_health_check=patient,
    )
    @given(models)
    def holds(recipe: Recipe) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the slower road was taken is no fault here
            check(recipe)

    holds()


def label(recipe: Recipe) -> str:
    """What is not plain in a model of one piece."""
    (piece,) = recipe.pieces
    words = [recipe.kind, *vars(piece).values(), recipe.entry, recipe.exit, recipe.form]
    return "-".join(word for word in words if word not in ("plain", "none", "sum", "module"))


def linearized(problem: Any, *alg: Any, **options: Any) -> kp.Flow:
    return kp.linearize(kp.solve(problem, *alg, **options))


def close(found: Any, expected: np.ndarray, what: str) -> None:
    found = to_numpy(found)
    assert found.shape == expected.shape, f"{what} has the shape {found.shape}, expected {expected.shape}"
    error = np.abs(found - expected).max(initial=0)
    size = np.abs(expected).max(initial=1e-5)  # of what saturates everywhere no more than rounding is left
    assert error <= TOLERANCE * size, f"{what} is off by {error:.1e}"


def check_operators(flow: kp.Flow, state: np.ndarray, jacobian: Mapping[str, np.ndarray]) -> None:
    """The state, and J, its transpose, ntk and P K P* on random vectors, against dS/dtheta [state, ...] by name."""
    close(flow.solution.state, state, "the state")
    assert set(flow.parameters) == set(jacobian), f"{set(flow.parameters) ^ set(jacobian)} are on one side only"
    dense = np.concatenate([jacobian[name].reshape(state.size, -1) for name in flow.parameters], 1)
    random = np.random.default_rng(0)
    theta, q = (random.standard_normal((2, *space.shape)) for space in (flow.J.domain, flow.J.codomain))
    weights = np.broadcast_to(_weights(flow, state), state.shape).reshape(-1)
    rows = q.reshape(2, -1)
    close(_apply(flow.J, theta), (theta @ dense.T).reshape(q.shape), "J theta")
    close(_apply(flow.J.T, q), (rows * weights) @ dense, "J* q")
    expected = ((rows * weights) @ dense @ dense.T).reshape(q.shape)
    close(_apply(flow.ntk, q), expected, "ntk q")
    if np.all(weights == 1):
        close(_apply(flow.P @ flow.K @ flow.P.T, q), expected, "P K P* q")
    else:
        nodal = flow.nodal
        q = random.standard_normal((2, *nodal.ntk.domain.shape))
        close(_apply(nodal.P @ nodal.K @ nodal.P.T, q), to_numpy(_apply(nodal.ntk, q)), "nodal P K P* q")


def _weights(flow: kp.Flow, state: np.ndarray) -> np.ndarray:
    """Of each trial and time in the inner products of the states."""
    of = getattr(flow.solution, "weights", None)
    return np.ones(()) if of is None else np.asarray(of)[:, None]


def _apply(operator: kp.Operator, rows: np.ndarray) -> Any:
    return operator.mv(like_numpy(rows, operator.domain.like))


def refusal(make: Callable[[], kp.Flow]) -> Exception | None:
    """The error by which a model is refused, or None where it is answered."""
    try:
        make()
    except (TypeError, ValueError) as error:
        assert len(str(error)) > 30, f"a refusal that explains nothing: {error!r}"
        return error
    return None
