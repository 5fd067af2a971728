"""Choose how a recurrent network starts, so that a task is learnt soonest by the forecast."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kpflow_dyn._arrays import Array, like_numpy
from kpflow_dyn._learning.descent import gradient_flow
from kpflow_dyn._learning.forecasting import forecast
from kpflow_dyn._learning.losses import squared_error
from kpflow_dyn._learning.options import is_count, is_number
from kpflow_dyn._linearize import linearize
from kpflow_dyn._problems.problems import DiscreteProblem
from kpflow_dyn._shown import Row, Shown, number, type_name
from kpflow_dyn._solve import solve
from kpflow_dyn.models._constraints import Constrained, Constraint
from kpflow_dyn.models._laws import Gaussian, Law, Orthogonal
from kpflow_dyn.models._named import Model, make_model
from kpflow_dyn.tasks._data import TaskData

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.figure import Figure

LAWS: tuple[Law, ...] = (Gaussian(0.5), Gaussian(1.0), Gaussian(1.5), Orthogonal(1.0))
LEAKS = (0.1, 0.3, 1.0)
LEAKY = ("ctrnn", "lowrank")


class Candidate(NamedTuple):
    """A way to start.

    Attributes:
        law: of the recurrent weights; None for the cell's own.
        options: of the cell, such as its leak.

    Example as `design`.
    """

    law: Any
    options: dict[str, Any]

    def __str__(self) -> str:
        own = "the cell's own weights" if self.law is None else repr(self.law)
        return ", ".join([own, *(f"{name} = {value}" for name, value in self.options.items())])


@dataclass(frozen=True, eq=False, repr=False)
class Design(Shown):
    """The starts of a family, and which of them is learnt soonest.

    Attributes:
        candidates: all starts of the family.
        steps: after how many steps the forecast has the loss at the goal [candidate, seed]; inf where it has not
            within the steps that were asked for.
        left: the loss that it has after these steps, over that of an output of zero [candidate, seed].
        trained: the same steps by `kp.gradient_flow` of the network itself, for the best few by the forecast
            [candidate, seed]; NaN for the others.
        goal: the goal, as a part of the loss of an output of zero.
        make: a start from a candidate and a seed.

    Example as `design`.
    """

    candidates: list[Candidate]
    steps: np.ndarray
    left: np.ndarray
    trained: np.ndarray
    goal: float
    make: Starter = field(repr=False)

    @property
    def order(self) -> np.ndarray:
        """Numbers of the candidates, the soonest first: by the median over seeds of `trained` where that is known, then
        of `steps`; where these are equal, by the mean of `left`.
        """
        trained = np.nan_to_num(np.median(self.trained, axis=1), nan=np.inf)
        refined = ~np.isnan(self.trained).any(axis=1)
        return np.lexsort((self.left.mean(1), np.median(self.steps, axis=1), trained, ~refined))

    @property
    def best(self) -> Candidate:
        """The soonest one."""
        return self.candidates[self.order[0]]

    def model(self, seed: int = 0) -> Model:
        """A cell and its readout that start like the best candidate; seeds 0, 1, ... are those that were forecast."""
        return self.make(self.best, seed)

    @property
    def table(self) -> pd.DataFrame:
        """All candidates, the soonest first: medians over seeds, and standard errors where all seeds are finite."""
        import pandas as pd

        rows = [
            {"candidate": str(self.candidates[i])}
            | {"steps": np.median(self.steps[i]), "stderr": _stderr(self.steps[i]), "left": self.left[i].mean()}
            | {"trained": np.median(self.trained[i]), "trained_stderr": _stderr(self.trained[i])}
            for i in self.order
        ]
        return pd.DataFrame(rows)

    def to_xarray(self) -> xr.Dataset:
        """A dataset of `steps`, `left` and `trained` [candidate, seed]."""
        import xarray as xr

        data = {name: (("candidate", "seed"), getattr(self, name)) for name in ("steps", "left", "trained")}
        return xr.Dataset(data, {"candidate": list(map(str, self.candidates))}, {"goal": self.goal})

    def plot(self, dark: bool = False) -> Figure:
        """Steps to the goal of the soonest candidates, a dot for each seed."""
        from kpflow_dyn.figures import _learning as figures

        return figures.design(self, dark=dark)

    def _shown(self) -> tuple[str, list[Row]]:
        def row(i: int) -> Row:
            found = f"{number(np.median(self.steps[i]))} steps by the forecast"
            known = not np.isnan(self.trained[i]).any()
            return str(self.candidates[i]), f"{found}, {number(np.median(self.trained[i]))} trained" if known else found

        return f"Design: the loss at {self.goal:g} of that of no output", [row(i) for i in self.order]


def _stderr(values: np.ndarray) -> float:
    known = len(values) > 1 and np.isfinite(values).all()
    return float(values.std(ddof=1) / math.sqrt(len(values))) if known else math.nan


def design(
    task: TaskData,
    *,
    units: int = 64,
    cell: str = "ctrnn",
    laws: Sequence[Any] | None = None,
    options: Mapping[str, Sequence[Any]] | None = None,
    components: Sequence[int | str] | None = None,
    constraints: Sequence[Constraint] = (),
    goal: float = 0.1,
    optimizer: Any = "adam",
    lr: float = 1e-3,
    steps: int = 500,
    seeds: int = 3,
    refine: int = 3,
    framework: str = "torch",
    dtype: str = "float32",
) -> Design:
    """Choose the start of a recurrent network from which a task is learnt soonest, by the forecast.

    Every law with every combination of the options is a candidate. Each is drawn with some seeds. Of each,
    `kp.forecast` says how many steps of the optimiser it takes to the goal if the kernel stays as it is. The best few
    are then followed by `kp.gradient_flow` of the network itself, as kernels do change. The goal is

        L <= goal L_0,    L = <e, m e> / <1, m>,    e = y - target,    L_0 = <target, m target> / <1, m>

    with the same L_0 for all, so that a start gains nothing from a large loss of its own.

    Args:
        task: trials with targets that are numbers [trial, time, out].
        units: of the cell.
        cell: as in `make_model`: ctrnn, lowrank, rnn, gru or lstm.
        laws: of the recurrent weights, such as Gaussian(1.5) or Planted(5); None in it is the cell's own. By default
            Gaussian of g = 0.5, 1, 1.5, and Orthogonal(1).
        options: of the cell, by name, each with the values to try, such as {"alpha": [0.1, 1.0]}. By default leaks of
            0.1, 0.3 and 1 for cells that have one.
        components: which outputs count, by number or name; all when None.
        constraints: `Signs`, `Sparse`, `MaxRadius`, which every drawn weight keeps at the start; training need not.
        goal: the part of L_0, between 0 and 1.
        optimizer, lr: as in `kp.forecast`; None is gradient descent.
        steps: how far to look.
        seeds: how many draws of each candidate.
        refine: how many candidates to follow by the gradient flow; 0 for the frozen kernels alone.
        framework, dtype: as in `make_model`.

    Raises:
        TypeError, ValueError: a task without such targets, an empty family, or an option that does not fit.
    Source: the forecast as in Hazelden, Driscoll, Shlizerman, Shea-Brown, arXiv 2605.08746.

    >>> import kpflow_dyn as kp
    >>> from kpflow_dyn.models import Gaussian, design
    >>> task = kp.tasks.FlipFlop(bits=1, steps=10).sample(trials=8, seed=0)
    >>> found = design(task, units=16, laws=[Gaussian(1.0)], options={"alpha": [0.1, 1.0]}, lr=0.01, steps=50, seeds=1)
    >>> found.best.options, found.model().cell
    ({'alpha': 1.0}, CTRNNCell(1, 16, nonlinearity=tanh))
    """
    _check(task, goal=goal, lr=lr, steps=steps, seeds=seeds, refine=refine)
    candidates = _family(cell, laws, options, constraints)
    targets = np.asarray(task.targets)
    weights = _weights(task, targets.shape[2], components)
    learning = _Learning(task.inputs, np.where(weights > 0, targets, 0), weights, optimizer, lr, steps)
    zero = float((weights * learning.targets**2).sum() / weights.sum())
    if not zero > 0:
        raise ValueError("the targets are zero wherever they count, so an output of zero is at the goal already")
    make = Starter(cell, (task.inputs.shape[2], units, targets.shape[2]), framework, dtype)
    found = np.array(
        [[learning.frozen(make(one, seed), goal * zero) for seed in range(seeds)] for one in candidates]
    )  # [candidate, seed, 3]
    trained = np.full(found.shape[:2], np.nan)
    result = Design(candidates, found[..., 0], found[..., 1] / zero, trained, goal, make)
    for i in result.order[:refine]:
        trained[i] = [learning.trained(make(candidates[i], seed), found[i, seed, 2]) for seed in range(seeds)]
    return result


@dataclass(frozen=True)
class Starter:
    """Makes the models of candidates."""

    cell: str
    sizes: tuple[int, int, int]
    framework: str
    dtype: str

    def __call__(self, one: Candidate, seed: int) -> Model:
        shared = {"framework": self.framework, "dtype": self.dtype}
        return make_model(self.cell, *self.sizes, init=one.law, seed=seed, **shared, **one.options)


def _family(cell: str, laws: Any, options: Any, constraints: Sequence[Constraint]) -> list[Candidate]:
    laws = list(LAWS if laws is None else laws)
    options = ({"alpha": LEAKS} if cell in LEAKY else {}) if options is None else dict(options)
    if constraints and cell == "lowrank":
        raise ValueError("a low-rank weight is the nearest one to a draw, which keeps no constraints; take ctrnn")
    if constraints and None in laws:
        raise ValueError("constraints are for laws; the cell's own weights (None) keep none; TorchDefault() is a law")
    for name, values in options.items():
        if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
            raise TypeError(f"options[{name!r}] is {values!r}, expected a list of values to try")
    drawn = [Constrained(law, constraints) for law in laws] if constraints else laws
    combined = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    family = [Candidate(law, chosen) for law in drawn for chosen in combined]
    if not family:
        raise ValueError("the family is empty; give a law, and a value for each option")
    return family


def _weights(task: TaskData, outputs: int, components: Sequence[int | str] | None) -> np.ndarray:
    """The mask [trial, time, out], zero for outputs that do not count."""
    mask = np.ones(task.inputs.shape[:2]) if task.mask is None else np.asarray(task.mask, float)
    chosen = np.zeros(outputs)
    for one in range(outputs) if components is None else components:
        place = task.outputs.index(one) if isinstance(one, str) and one in task.outputs else one
        if not (isinstance(place, int | np.integer) and 0 <= place < outputs):
            names = f", or of {', '.join(task.outputs)}" if task.outputs else ""
            raise ValueError(f"there is no output {one!r}; expected numbers from 0 to {outputs - 1}{names}")
        chosen[place] = 1.0
    if not chosen.any():
        raise ValueError("no output counts; name some in components, or leave it out")
    return mask[..., None] * chosen


@dataclass(frozen=True)
class _Learning:
    """What is to be learnt, and how."""

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    optimizer: Any
    lr: float
    steps: int

    def frozen(self, model: Model, goal: float) -> tuple[float, float, float]:
        """By the frozen kernel: steps to the goal, the loss in the end, and what part of the first one the goal is."""
        problem, targets = self._posed(model)
        output = linearize(solve(problem)).output(model.readout, learn=True)
        options = {"optimizer": self.optimizer, "lr": self.lr, "steps": self.steps, "mask": self.weights}
        found = forecast(output, targets, check=False, **options)
        part = goal / found.loss[0]
        steps = 0.0 if part >= 1 else found.steps_to(part)
        return steps if steps <= self.steps else math.inf, float(found.loss[-1]), part

    def trained(self, model: Model, part: float) -> float:
        """After how many steps the loss of the network itself is this part of the first; inf where it takes longer."""
        if part >= 1:
            return 0.0
        problem, targets = self._posed(model)
        loss = squared_error(targets, model.readout, self.weights)
        flows = self.optimizer is None
        step, options = (self.lr, {}) if flows else (1.0, {"optimizer": self.optimizer, "lr": self.lr})
        time = gradient_flow(problem, loss, self.steps * step, stop_below=part, **options).time_to(part) / step
        return time if math.isfinite(time) else math.inf

    def _posed(self, model: Model) -> tuple[DiscreteProblem, Array]:
        like = model.readout.weight
        return DiscreteProblem(model.cell, like_numpy(self.inputs, like)), like_numpy(self.targets, like)


def _check(task: Any, **options: Any) -> None:
    if not isinstance(task, TaskData):
        hint = "; pass task.sample(trials, seed)" if hasattr(task, "sample") else ""
        raise TypeError(f"task is {type_name(task)}, expected a TaskData{hint}")
    if task.targets is None or task.classes or task.targets.ndim != 3:
        raise ValueError(f"the task {task.name} has no targets [trial, time, out] of numbers; for classes give one-hot")
    if not (is_number(options["goal"]) and 0 < options["goal"] < 1):
        raise ValueError(f"goal is {options['goal']!r}, expected a number between 0 and 1")
    if not (is_number(options["lr"]) and 0 < options["lr"] < math.inf):
        raise ValueError(f"lr is {options['lr']!r}, expected a positive number")
    for name in ("steps", "seeds"):
        if not is_count(options[name]):
            raise ValueError(f"{name} is {options[name]!r}, expected a whole number from 1 on")
    if not (is_count(options["refine"]) or options["refine"] == 0):
        raise ValueError(f"refine is {options['refine']!r}, expected a whole number from 0 on")
