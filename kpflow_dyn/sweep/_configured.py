"""A sweep that a TOML file names: model, law of its recurrent weights, task, grid and quantities.

    out = "runs/g"                       # the folder; by default the name of the file without .toml

    [model]                              # the arguments of models.make_model, but its widths of inputs and outputs
    name = "rnn"
    units = 64

    [init]                               # those of models.make_init; left out, the weights are the model's own
    law = "gaussian"

    [task]                               # those of tasks.make_task
    name = "memorypro"
    trials = 8

    [grid]                               # table.key of the tables above, as a list, or as evenly spaced numbers
    init.g = { start = 0.5, stop = 3.0, num = 11 }
    model.seed = [0, 1, 2]

    [analysis]
    quantities = ["ntk_effective_rank", "loss"]
    loss = "cross_entropy"               # or "squared_error"; left out, the loss that `kpflow-dyn analyze` takes
    timeout = 60                         # seconds for each point; samples and seed of the estimates may stand here too

    [executor]                           # options of the executor's class, such as threads = 2; may be left out

In results an axis has the last part of its name, `g` and `seed`, or `model_seed` beside `task_seed`; that of model.name
is `model`.
"""

import json
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import kpflow_dyn
from kpflow_dyn._arrays import like_numpy, to_numpy
from kpflow_dyn._backend import BACKENDS
from kpflow_dyn._problems.parameters import parameters_of
from kpflow_dyn.sweep._checks import MADE, check_analysis, check_tables, code_named, raise_all
from kpflow_dyn.sweep._design import design
from kpflow_dyn.sweep._sweep import Sweep
from kpflow_dyn.tasks._data import check_count, check_number, nearest

OPERATORS = ("core", "K", "ntk")
SCALARS = {f"{op}_{what}": (op, what) for op in OPERATORS for what in ("trace", "norm", "effective_rank")}
OF_SUMMARY = ("temporal_effective_rank", "spatial_effective_rank", "trial_effective_rank", "K_ntk_alignment")
OF_TASK = ("loss", "accuracy")
OTHERS = ("P_effective_rank", "state_effective_rank", *OF_TASK)
QUANTITIES = (*SCALARS, *OF_SUMMARY, *OTHERS)
"""What can be asked for: numbers of `kp.summary` and `kp.analyze`, er(P P*), and loss and accuracy on the task."""

TABLES = ("model", "init", "task", "grid", "analysis", "executor")
ANALYSIS = ("quantities", "loss", "samples", "seed", "timeout")


@dataclass(frozen=True)
class Setup:
    """What the points of a configured sweep share; called with the arguments of one.

    Each argument stands for the table and key that `axes` has for its name. Without `samples`, the random probes behind
    each estimate, values are exact where these are cheap. Without `loss`, it is that of the task, as in `kp.analyze`.

    >>> task = {"name": "flipflop", "trials": 2, "steps": 5}
    >>> setup = Setup({"name": "rnn", "units": 4}, {"law": "gaussian"}, task, ("K_trace",), {"g": ("init", "g")})
    >>> setup(g=1.5)["K_trace"].value > 0
    True
    """

    model: dict[str, Any]
    init: dict[str, Any]
    task: dict[str, Any]
    quantities: tuple[str, ...]
    axes: dict[str, tuple[str, str]] = field(default_factory=dict)
    samples: int | None = None
    seed: int = 0
    loss: str | None = None
    code: dict[str, str] = field(default_factory=dict)  # of tasks and laws of the user's own, and of files of trials

    def __call__(self, **point: Any) -> dict[str, Any]:
        """The quantities at one point."""
        cell, readout, data = _made(**self.tables(point))
        x = like_numpy(data.inputs, next(iter(parameters_of(cell).values())))
        flow = kpflow_dyn.linearize(kpflow_dyn.solve(kpflow_dyn.DiscreteProblem(cell, x)))
        found = _Quantities(flow, (cell, readout), data, self.samples, self.seed, self.loss)
        return {name: found.get(name, self.with_summary) for name in self.quantities}

    @property
    def with_summary(self) -> bool:
        """Whether a quantity is one of `kp.summary`."""
        return not set(OF_SUMMARY).isdisjoint(self.quantities)

    def tables(self, point: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Model, init and task at a point."""
        tables = {name: dict(getattr(self, name)) for name in MADE}
        for name, value in point.items():
            table, key = self.axes[name]
            tables[table][key] = value
        return tables

    def try_points(self, points: Iterable[Mapping[str, Any]]) -> None:
        """Raise the error of the first point if model and task can be made at no point; nothing is analysed."""
        first: Exception | None = None
        for point in points:
            try:
                _cell, readout, data = _made(**self.tables(point))
                if asked := [name for name in OF_TASK if name in self.quantities]:
                    kind = _loss_of(data, len(to_numpy(readout.weight)), self.loss)
                    if "accuracy" in asked:
                        _check_classes(kind)
                return
            except Exception as error:
                first = first or error
        raise ValueError(f"every point of the sweep would fail, the first one with: {first}") from first


def read_sweep(path: str | Path) -> tuple[Sweep, float | None, dict[str, Any]]:
    """The sweep of a TOML file, the time limit of its points, and the options of its executor."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
    _check_tables(content, path)
    grid = dict(_flat(content["grid"]))
    names = _axis_names(grid, content)
    analysis = dict(content["analysis"])
    timeout, quantities = analysis.pop("timeout", None), tuple(analysis.pop("quantities"))
    tables = {name: content.get(name, {}) for name in MADE}
    over = {name: _values(name, grid[".".join(where)]) for name, where in names.items()}
    setup = Setup(**tables, quantities=quantities, axes=names, **analysis)
    points = design(over).points
    check_analysis(content["analysis"], setup.with_summary)
    check_tables([setup.tables(point) for point in points], list(names.values()), path)
    setup = replace(setup, code=code_named(setup.tables(point) for point in points))
    samples = "as many as exact values take, where these are cheap" if setup.samples is None else setup.samples
    about = {"run": path.name} | {name: json.dumps(tables[name]) for name in MADE if tables[name]}
    about |= {"samples": samples, "seed": setup.seed}
    swept = Sweep(setup, over, content.get("out", path.with_suffix("")), attrs=about)
    return swept, timeout, content.get("executor", {})


def _check_tables(content: Mapping[str, Any], path: Path) -> None:
    raise_all([*_unknown(content, (*TABLES, "out"), f"{path}"), *_missing_tables(content, path)])
    raise_all(_entries(content, path))


def _missing_tables(content: Mapping[str, Any], path: Path) -> Iterator[str]:
    if not isinstance(out := content.get("out", "a"), str) or not out:
        yield f"out in {path} is {out!r}, expected the name of a folder"
    for table in TABLES:
        if not isinstance(content.get(table, {} if table in ("init", "executor") else None), dict):
            yield f"{path} has no table [{table}]"


def _entries(content: Mapping[str, Any], path: Path) -> Iterator[str]:
    """What is wrong with the entries of the tables, all of which are there."""
    for table, key in (("model", "name"), ("model", "units"), ("task", "name"), ("analysis", "quantities")):
        if key not in content[table] and key not in content["grid"].get(table, {}):
            yield f"[{table}] in {path} has no {key}"
    init = content.get("init", {}) | content["grid"].get("init", {})
    if "init" in content | content["grid"] and "law" not in init:
        yield f"[init] in {path} has no law"
    yield from _unknown(content["analysis"], ANALYSIS, "[analysis]")
    quantities = content["analysis"].get("quantities", QUANTITIES)
    if not isinstance(quantities, list | tuple) or not quantities or len(set(map(str, quantities))) < len(quantities):
        yield f"quantities in {path} is {quantities!r}, expected a list of different names, one at least"
    else:
        yield from _unknown(quantities, QUANTITIES, "quantities", "quantity")


def _unknown(given: Any, known: tuple[str, ...], where: str, what: str = "key") -> Iterator[str]:
    for key in given:
        if key not in known:
            yield f"unknown {what} {key!r} in {where}.{nearest(str(key), known)} Known: {', '.join(known)}."


def _flat(grid: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """table.key with its values, whether it was written as init.g, as "init.g" or in a table [grid.init]."""
    for name, value in grid.items():
        if isinstance(value, dict) and not {"start", "stop", "num"} & set(value):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value


def _axis_names(grid: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Table and key by the name of the axis: the key, unless two tables have it, and `model` for model.name."""
    places = []
    for name in grid:
        table, dot, key = name.partition(".")
        if not dot or table not in ("model", "init", "task"):
            known = [f"{t}.{k}" for t in ("model", "init", "task") for k in content.get(t, {})]
            near = nearest(name, [*known, "model.seed", "task.seed", "init.g"])
            raise ValueError(f"unknown axis {name!r} in [grid], expected model.KEY, init.KEY or task.KEY.{near}")
        places.append((table, key))
    keys = Counter(key for _table, key in places)
    named = {(table, key): key if keys[key] == 1 else f"{table}_{key}" for table, key in places}
    return {table if key == "name" else named[table, key]: (table, key) for table, key in places}


def _values(name: str, given: Any) -> list[Any]:
    if isinstance(given, dict) and set(given) == {"start", "stop", "num"}:
        check_number(f"start of axis {name}", given["start"])
        check_number(f"stop of axis {name}", given["stop"])
        check_count(f"num of axis {name}", given["num"], 1)
        return np.linspace(**given).tolist()
    if not isinstance(given, list) or not given:
        expected = "expected a list of values, or { start = 0.5, stop = 3.0, num = 11 }"
        raise ValueError(f"axis {name} is {given!r}, {expected}")
    return given


def _made(model: dict[str, Any], init: dict[str, Any], task: dict[str, Any]) -> tuple[Any, Any, Any]:
    """A model, its readout, and the trials of a task."""
    from kpflow_dyn.models import make_init, make_model
    from kpflow_dyn.tasks import make_task

    data = make_task(task.pop("name"), **task)
    widths = {"inputs": data.inputs.shape[2], "outputs": _width(data.targets, data.classes)}
    law = make_init(init.pop("law"), **init) if init else None
    options: dict[str, Any] = {"dtype": "float64"} | model
    _allow_double(options)
    return *make_model(options.pop("name"), **widths, init=law, **options), data


def _width(targets: np.ndarray | None, classes: int) -> int:
    """How many outputs a readout needs."""
    if targets is None:
        return 1
    return classes if targets.ndim == 2 else targets.shape[2]


def _allow_double(options: Mapping[str, Any]) -> None:
    framework = options.get("framework", "torch")
    if options["dtype"] == "float64" and framework in BACKENDS:
        BACKENDS[framework].runtime.allow_double()


@dataclass
class _Quantities:
    """The numbers of one flow; those that share applications are computed once."""

    flow: Any
    model: tuple[Any, Any]
    task: Any
    samples: int | None
    seed: int
    loss_asked: str | None = None
    known: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, with_summary: bool) -> Any:
        if name in OTHERS:
            return getattr(self, name)
        if with_summary:
            return self.summary[name]
        op, what = SCALARS[name]
        return getattr(self.scalars(op), what)

    def scalars(self, op: str) -> Any:
        from kpflow_dyn._numbers.estimate import scalars

        if op not in self.known:
            self.known[op] = scalars(getattr(self.flow, op), self.samples, self.seed)
        return self.known[op]

    @cached_property
    def summary(self) -> dict[str, Any]:
        import kpflow_dyn as kp

        options = {} if self.samples is None else {"samples": self.samples}
        return kp.summary(self.flow, seed=self.seed, **options).numbers()

    @property
    def P_effective_rank(self) -> Any:
        import kpflow_dyn as kp

        return kp.effective_rank(self.flow.P, self.samples, self.seed)

    @property
    def state_effective_rank(self) -> Any:
        """The participation ratio of the states."""
        import kpflow_dyn as kp

        return kp.dynamics.participation_ratio(self.flow.solution)

    @property
    def loss(self) -> Any:
        """The loss of the readout's outputs where the mask is on; its attribute says which loss it is."""
        found, output = self.outputs
        return self._said(float(found(output)))

    @property
    def accuracy(self) -> Any:
        """How often the largest output is that of the right class, where the mask is on."""
        found, output = self.outputs
        _check_classes(found.name)
        return self._said(found.accuracy(output))

    def _said(self, value: float) -> Any:
        import xarray as xr

        return xr.DataArray(value, attrs={"kind": self.outputs[0].name})

    @cached_property
    def outputs(self) -> tuple[Any, np.ndarray]:
        """The loss of outputs, and the outputs [trial, time, out]."""
        from kpflow_dyn._learning.losses import output_loss
        from kpflow_dyn._problems.units import units_read

        cell, readout = self.model
        weight, bias = to_numpy(readout.weight), to_numpy(readout.bias)
        kind = _loss_of(self.task, len(weight), self.loss_asked)
        state = to_numpy(self.flow.solution.state).astype(float)
        output = state[..., units_read(cell, readout, state.shape[2])] @ weight.T + bias
        return output_loss(kind, self.task.targets, self.task.mask, output), output


def _loss_of(data: Any, outputs: int, asked: str | None) -> str:
    """The loss that was asked for, or that of the task."""
    from kpflow_dyn._learning.losses import loss_of_task

    if data.targets is None:
        raise ValueError(f"the task {data.name} has no targets, so there is no loss")
    return asked or loss_of_task(data, (*data.inputs.shape[:2], outputs))


def _check_classes(loss: str) -> None:
    if loss != "cross_entropy":
        raise ValueError(
            f"the loss is {loss}, so there is no accuracy; leave accuracy out, or take a task that has right classes"
        )
