"""How a model's operators change over training: a few numbers of each checkpoint, as one labelled dataset."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

import kpflow_dyn
from kpflow_dyn._arrays import Array, like_numpy, to_numpy
from kpflow_dyn._flows.flow import Flow, Output
from kpflow_dyn._flows.places import said_of_targets, said_of_weights
from kpflow_dyn._folder import replaced
from kpflow_dyn._learning.forecasting import loss_of, outputs
from kpflow_dyn._learning.losses import Loss, OutputLoss, classes_that_count, counted, default_loss, full_mask, softmax
from kpflow_dyn._learning.recorder import Recorder, Recording
from kpflow_dyn._linearize import linearize
from kpflow_dyn._numbers.estimate import alignment, effective_rank
from kpflow_dyn._numbers.reductions import partial_traces
from kpflow_dyn._problems.parameters import with_values
from kpflow_dyn._problems.problems import DiscreteProblem, ImplicitProblem, Problem
from kpflow_dyn._problems.versions import versions_behind
from kpflow_dyn._progress import counting
from kpflow_dyn._solve import solve
from kpflow_dyn._spaces.operators import GramOperator, Operator
from kpflow_dyn._spaces.space import Space

if TYPE_CHECKING:
    import xarray as xr

KEPT = {"temporal": "time", "spatial": "unit", "trial": "trial"}
READOUT = "readout"  # the part of a recording that is one


@dataclass(frozen=True)
class Checkpoint:
    """A step of training: a digest of its parameters, how to get problem and readout, the loss noted with them."""

    step: int
    digest: str
    load: Callable[[], tuple[Problem, Any]]
    recorded_loss: float = math.nan


def track(
    make_model: Callable[[], Any],
    checkpoints: str | Path | Recording | Mapping[int, Any],
    x: Array,
    *,
    make_readout: Callable[[], Any] | None = None,
    targets: Array | None = None,
    mask: Array | None = None,
    loss: Loss | None = None,
    all_steps: bool = False,
    pose: Callable[[Any, Array], Problem] = DiscreteProblem,
    samples: int | None = 60,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> xr.Dataset:
    """Follow a model over training: effective ranks, alignments, and how fast parts of the target are learnt.

        er(A) = (tr A)^2 / |A|_F^2        cos(A, B) = tr(A^T B) / (|A|_F |B|_F)

    Args:
        make_model: returns a new model of the recorded architecture. Each checkpoint is loaded into one.
        checkpoints: the folder of a `Recorder`, or the result of `Recorder.read`; or parameters by name for each step,
            with those of a readout as "readout.weight" and "readout.bias".
        x: inputs [trial, time, input], as for `DiscreteProblem`.
        make_readout: returns a new readout. It was recorded as the part "readout". Loss and target then belong to its
            outputs, and its weights learn too.
        targets: [trial, time, out], for the states if there is no readout. For the cross-entropy: class indices [trial,
            time] or probabilities. Their components come from the singular value decomposition of targets [trial time,
            out], the largest first; classes count as one-hot.
        mask: m >= 0 [trial, time], where targets count. The operators are those of `flow.where(mask)`, without the
            places of negative classes.
        loss: the loss that the model is trained with: "squared_error", "cross_entropy" of logits y, or a function (y,
            targets) -> number of shape (). By default the cross-entropy if targets are class indices, else the squared
            error.
        all_steps: use the whole operators even if there is a mask.
        pose: (model, x) -> the problem, if it is not a DiscreteProblem.
        samples: applications to spend on each estimate; None gives exact values where they are cheap.
        seed: of all estimates. All checkpoints get the same probes.
        out: a folder for the numbers of each checkpoint. Numbers that it already holds for the same parameters, inputs
            and settings are not computed again, except with a loss that is a function.
        progress: show a bar on a terminal; elsewhere print a line from time to time if it takes long.

    Returns:
        By step: `effective_rank` [operator: K, P, NTK; kind: full, temporal, spatial, trial], where P stands for P P*;
        `alignment_first`, `alignment_last` [operator], with the first and the last checkpoint. With targets also
        `loss`, and `accuracy` if y are logits of classes. For each [component]: `component_share` of |target|^2;
        `component_learnt` <c, y> / <c, c>, which is 1 if the outputs y contain all of it (for classes their
        probabilities, softmax y); `component_alignment` cos(c, NTK c); and `component_rayleigh` <c, NTK c> / <c, c>.
        Standard errors have the same names with `_stderr`. A recording also gives `recorded_loss`, as it was recorded.

    Raises:
        ValueError: no checkpoints, parameters that are not the model's, or targets that do not fit.
    Source: docs/theory.md, "How many: effective ranks".

    >>> import tempfile, torch, kpflow_dyn as kp
    >>> cell, record = torch.nn.GRUCell(3, 8), kp.Recorder(tempfile.mkdtemp())
    >>> for step in range(2):
    ...     record(step, cell, loss=1.0)
    >>> found = kp.track(lambda: torch.nn.GRUCell(3, 8), record.folder, torch.randn(4, 5, 3))
    >>> found.alignment_first.sel(operator="NTK").values.round(4)
    array([1., 1.])
    """
    settings = Settings(samples, seed, _numpy(targets), _numpy(mask), loss, all_steps)
    found = _loaded(make_model, make_readout, lambda model: pose(model, x), checkpoints)
    posed = f"{getattr(pose, '__module__', '')}.{getattr(pose, '__qualname__', pose)}"
    return track_checkpoints(found, x, settings, posed, None if out is None else Path(out), progress)


@dataclass(frozen=True, eq=False)
class Settings:
    """All else that the numbers of a checkpoint depend on, besides its parameters and the inputs."""

    samples: int | None
    seed: int
    targets: np.ndarray | None
    mask: np.ndarray | None
    loss: Loss | None = None
    all_steps: bool = False

    @property
    def weights(self) -> np.ndarray | None:
        """How much each trial and time counts, at most, in the mask and among classes; None where all count alike."""
        mask = self.mask if self.mask is None or self.mask.ndim < 3 else self.mask.max(-1)
        of_classes = self.targets is not None and not callable(self.loss)
        counts = classes_that_count(self.targets) if of_classes else None
        return mask if counts is None else counts if mask is None else mask * counts

    @property
    def with_target(self) -> np.ndarray | None:
        """The trials and times whose target counts, where some do not."""
        places = None if self.weights is None else self.weights > 0
        return None if places is None or places.all() else places

    @property
    def places(self) -> np.ndarray | None:
        """The trials and times that count for the operators; None for all."""
        return None if self.all_steps else self.with_target


def track_checkpoints(
    checkpoints: list[Checkpoint],
    x: Array,
    settings: Settings,
    posed: str,
    out: Path | None,
    progress: bool,
) -> xr.Dataset:
    """`track`, of checkpoints that know how to load themselves; `posed` says how they become problems."""
    import xarray as xr

    if not checkpoints:
        raise ValueError("no checkpoints to track")
    linearised = partial(_linearised, places=settings.places)
    shared = _shared(checkpoints, x, posed, settings)
    ends: dict[int, Flow] = {}
    found = []
    with counting("checkpoints", len(checkpoints), 0, show=progress) as count:
        for checkpoint in checkpoints:
            kept = None if callable(settings.loss) else out  # a function may change and keep its name
            path = None if kept is None else kept / f"numbers_{checkpoint.step:08d}.nc"
            key = json.dumps([checkpoint.digest, *shared])
            numbers, start = _kept(path, key), time.perf_counter()
            if numbers is None:
                ends = ends or {place: linearised(checkpoints[place])[0] for place in (0, -1)}
                numbers = _numbers(*linearised(checkpoint), ends, settings).assign_attrs(key=key)
                _keep(numbers, path)
            found.append(numbers)
            count.landed(time.perf_counter() - start)
    steps = xr.DataArray([checkpoint.step for checkpoint in checkpoints], dims="step", name="step")
    of_mask = said_of_targets(settings.weights, not settings.all_steps) | said_of_weights(settings.mask)
    said = _said_of(checkpoints[0], x, settings) | of_mask
    whole = xr.concat(found, steps, combine_attrs="drop").assign_attrs(said)
    noted = np.array([checkpoint.recorded_loss for checkpoint in checkpoints])
    return whole if np.isnan(noted).all() else whole.assign(recorded_loss=("step", noted))


def _said_of(first: Checkpoint, x: Array, settings: Settings) -> dict[str, Any]:
    """Model, trials, settings and versions, as attributes."""
    problem, _readout = first.load()
    loss = {} if settings.loss is None else {"loss": str(getattr(settings.loss, "__name__", settings.loss))}
    return {
        "model": _described(problem),
        "trials": len(x),
        **loss,
        "samples": "exact" if settings.samples is None else settings.samples,
        "seed": settings.seed,
        **versions_behind(problem),
    }


def _described(problem: Problem) -> str:
    return problem.backend.models.describe(problem if isinstance(problem, ImplicitProblem) else problem.model)


# Checkpoints


def _loaded(
    make_model: Callable, make_readout: Callable | None, pose: Callable[[Any], Problem], checkpoints: Any
) -> list[Checkpoint]:
    if isinstance(checkpoints, Mapping):
        return [
            Checkpoint(
                int(step), digest_of(values.items()), partial(_from_values, make_model, make_readout, pose, values)
            )
            for step, values in sorted(checkpoints.items())
        ]
    run = checkpoints if isinstance(checkpoints, Recording) else Recorder.read(checkpoints)
    return recorded(run, partial(_from_run, run, make_model, make_readout, pose))


class Steps(Protocol):
    """A `Recording`, or other files of checkpoints."""

    @property
    def steps(self) -> np.ndarray: ...

    def file(self, step: int) -> Path: ...

    def loss(self, step: int) -> float: ...


def recorded(run: Steps, load: Callable[[int], tuple[Problem, Any]]) -> list[Checkpoint]:
    """All steps of a recording; `load` gives the problem and the readout at one."""
    return [
        Checkpoint(step, digest_of([("", run.file(step))]), partial(load, step), run.loss(step))
        for step in run.steps.tolist()
    ]


def _from_values(
    make_model: Callable, make_readout: Callable | None, pose: Callable[[Any], Problem], values: Mapping[str, Any]
) -> tuple[Problem, Any]:
    arrays = {name: to_numpy(value) for name, value in values.items()}
    if make_readout is None:
        return pose(with_values(make_model(), arrays)), None
    of_readout = {name: array for name, array in arrays.items() if name.startswith(f"{READOUT}.")}
    if not of_readout:
        raise ValueError(
            f"make_readout is given, but no parameter begins with '{READOUT}.'; name those of the readout "
            f"'{READOUT}.weight' and '{READOUT}.bias'"
        )
    own = {name.removeprefix(f"{READOUT}."): array for name, array in of_readout.items()}
    model = with_values(make_model(), {name: arrays[name] for name in arrays.keys() - of_readout.keys()})
    return pose(model), with_values(make_readout(), own)


def _from_run(
    run: Recording, make_model: Callable, make_readout: Callable | None, pose: Callable[[Any], Problem], step: int
) -> tuple[Problem, Any]:
    readout = None if make_readout is None else run.load(step, make_readout(), part=READOUT)
    return pose(run.load(step, make_model())), readout


def _numpy(array: Any) -> np.ndarray | None:
    return None if array is None else to_numpy(array)


def digest_of(named: Iterable[tuple[str, Any]]) -> str:
    """Of arrays, or of files."""
    digest = hashlib.sha256()
    for name, value in named:
        digest.update(name.encode())
        whole = value.read_bytes() if isinstance(value, Path) else np.ascontiguousarray(to_numpy(value)).tobytes()
        digest.update(whole)
    return digest.hexdigest()


# Numbers of one checkpoint


def _linearised(checkpoint: Checkpoint, places: np.ndarray | None) -> tuple[Flow, Any]:
    problem, readout = checkpoint.load()
    flow = linearize(solve(problem))
    return flow if places is None else flow.where(places), readout


def _numbers(flow: Flow, readout: Any, ends: Mapping[int, Flow], settings: Settings) -> xr.Dataset:
    import xarray as xr

    samples, seed = settings.samples, settings.seed
    operators = {"K": flow.K, "P": flow.P, "NTK": flow.ntk}
    ranks = np.array([_ranks(op, samples, seed) for op in operators.values()])
    found: dict[str, Any] = {
        "effective_rank": (("operator", "kind"), ranks[..., 0]),
        "effective_rank_stderr": (("operator", "kind"), ranks[..., 1]),
    }
    for name, end in {"first": ends[0], "last": ends[-1]}.items():
        pairs = zip(operators.values(), (end.K, end.P, end.ntk), strict=True)
        each = [alignment(op, other, samples, seed) for op, other in pairs]
        found[f"alignment_{name}"] = ("operator", [one.value for one in each])
        found[f"alignment_{name}_stderr"] = ("operator", [one.stderr for one in each])
    if settings.targets is not None or callable(settings.loss):
        found |= _of_target(flow if readout is None else flow.output(readout, learn=True), settings)
    return xr.Dataset(found, {"operator": list(operators), "kind": ["full", *KEPT]})


def _ranks(op: Operator, samples: int | None, seed: int) -> list[tuple[float, float]]:
    """Effective ranks of the operator and of its partial traces, and their standard errors."""
    whole = effective_rank(op, samples, seed)
    square = op if isinstance(op, GramOperator) else GramOperator(op)
    kept = partial_traces(square, KEPT.values(), samples, seed)
    return [(found.value, found.stderr) for found in (whole, *map(effective_rank, kept))]


def _of_target(kernel: Flow | Output, settings: Settings) -> dict[str, Any]:
    """The loss, the accuracy where there are classes, and the components of targets that are like the outputs."""
    y, space = outputs(kernel), kernel.ntk.domain
    chosen = settings.loss or default_loss(settings.targets, y.shape)
    loss = loss_of(kernel, settings.targets, settings.mask, chosen)
    found: dict[str, Any] = {"loss": float(to_numpy(loss(y)))}
    if loss.of_classes:
        found["accuracy"] = loss.accuracy(y)
    target, learnt, weights = _like_outputs(loss, y, space, settings)
    if target is None:
        return found
    components, shares = target_components(to_numpy(weights * target))
    c = like_numpy(components, y)
    images, inner = kernel.ntk.mv(c), space.inner
    overlap, size, length = (to_numpy(a) for a in (inner(c, images), inner(c, c), inner(images, images)))
    return found | {
        "component_share": ("component", shares),
        "component_learnt": ("component", to_numpy(inner(c, weights * learnt)) / size),
        "component_alignment": ("component", overlap / np.sqrt(size * length)),
        "component_rayleigh": ("component", overlap / size),
    }


def _like_outputs(loss: OutputLoss, y: Array, space: Space, settings: Settings) -> tuple[Array | None, Array, Array]:
    """Targets and what of the outputs is compared with them, classes as probabilities; and what counts."""
    ones = 0 * y + 1
    if loss.of_classes:
        weights = like_numpy(to_numpy(loss.mask), y).reshape((*y.shape[:-1], 1)) * ones
        return loss.probabilities(y), softmax(y), weights if space.measure is None else weights / space.measure
    if settings.targets is None or settings.targets.shape != tuple(y.shape):
        return None, y, ones
    mask = like_numpy(full_mask(settings.mask, tuple(y.shape)).copy(), y)
    return counted(like_numpy(settings.targets, y), mask), y, mask


def target_components(targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The components [component, trial, time, out] of targets, s_i a_i b_i^T, and their shares of |targets|^2."""
    matrix = targets.reshape(-1, targets.shape[-1])
    a, s, b = np.linalg.svd(matrix, full_matrices=False)
    kept = s > 1e-6 * s[0]
    parts = np.einsum("ni,i,io->ino", a[:, kept], s[kept], b[kept])
    return parts.reshape((-1, *targets.shape)), s[kept] ** 2 / (s**2).sum()


# What is known already


def _shared(checkpoints: list[Checkpoint], x: Array, posed: str, settings: Settings) -> list[Any]:
    """What all numbers depend on: both ends, the kind of model and readout, the inputs, the settings, the version."""
    arrays = {"x": x, "targets": settings.targets, "mask": settings.mask}
    of_arrays = digest_of((name, array) for name, array in arrays.items() if array is not None)
    problem, readout = checkpoints[0].load()
    kind = re.sub(r" at 0x[0-9a-f]+", "", f"{_described(problem)} {readout} {posed}")  # of functions, others each time
    ends = [checkpoints[0].digest, checkpoints[-1].digest]
    chosen = [str(settings.loss), settings.samples, settings.seed, settings.all_steps]
    return [*ends, kind, of_arrays, *chosen, kpflow_dyn.__version__]


def _kept(path: Path | None, key: str) -> xr.Dataset | None:
    if path is None or not path.exists():
        return None
    import xarray as xr

    with xr.open_dataset(path, engine="h5netcdf") as numbers:
        return numbers.load() if numbers.attrs.get("key") == key else None


def _keep(numbers: xr.Dataset, path: Path | None) -> None:
    if path is None:
        return
    with replaced(path) as unfinished:
        numbers.to_netcdf(unfinished, engine="h5netcdf")
