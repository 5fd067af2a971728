"""Parameters along a training, one safetensors file for each step."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._folder import replaced
from kpflow_dyn._problems.parameters import CheckpointError, dtype_name, listing, opened, parameters_of, with_values
from kpflow_dyn._shown import Row, Shown, number

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class Recorder:
    """Saves a model's parameters during training: `record(step, model, loss)` in your own loop, or in `train.fit`.

    Each step is one file step_00000012.safetensors in the folder: parameters under the names that `kp.linearize` gives,
    those of `parts` (such as a readout) as "part.name", and step and loss as metadata. A file is written under another
    name, and renamed when it is complete. So a run that is killed leaves whole files only.

    Args:
        folder: where to write; created if it does not exist.
        every: record the steps that are multiples of this number, and skip the others.

    Raises:
        ValueError, TypeError: a model without parameters, a dtype that numpy does not have, or a part with a name that
            the model already uses.
        FileExistsError: the step is already in the folder. Two runs would be mixed.

    >>> import tempfile, torch, kpflow_dyn as kp
    >>> cell, record = torch.nn.GRUCell(3, 8), kp.Recorder(tempfile.mkdtemp(), every=10)
    >>> for step in range(21):
    ...     record(step, cell, loss=1 / (step + 1), readout=torch.nn.Linear(8, 2))
    >>> run = kp.Recorder.read(record.folder)
    >>> run.steps, run.load(10, torch.nn.GRUCell(3, 8))
    (array([ 0, 10, 20]), GRUCell(3, 8))
    >>> run.load(10, torch.nn.Linear(8, 2), part="readout")
    Linear(in_features=8, out_features=2, bias=True)
    """

    folder: str | Path
    every: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.every, int | np.integer) or self.every < 1:
            raise ValueError(f"every must be a whole number, at least 1, got {self.every!r}")

    def __call__(self, step: int, model: Any, loss: Any, **parts: Any) -> None:
        """Save the parameters of a torch module or of any jax pytree, and of other `parts` beside it, at this step."""
        if not isinstance(step, int | np.integer) or step < 0:
            raise ValueError(f"step must be a whole number, at least 0, got {step!r}")
        if step % self.every == 0:
            content = _serialised(step, model, float(to_numpy(loss)), parts)
            _write(Path(self.folder), _file_name(step), content)

    @staticmethod
    def read(folder: str | Path) -> Recording:
        """What a folder holds by now.

        Raises:
            FileNotFoundError: no such folder, or no step in it.
            CheckpointError: a file that is damaged, or is not of a Recorder.
        """
        found = sorted(
            (int(match[1]), path) for path in Path(folder).glob("*") if (match := _NAME.fullmatch(path.name))
        )
        if not found:
            raise FileNotFoundError(
                f"no recorded steps (step_*.safetensors) in {folder}; a kp.Recorder writes them: record = "
                "kp.Recorder(folder), and in your training loop record(step, model, loss=loss). Checkpoints that you "
                "have: kpflow-dyn track step_0.pt step_100.pt --task TASK"
            )
        losses = [float(_metadata(path)["loss"]) for _, path in found]
        return Recording(Path(folder), np.array([step for step, _ in found]), np.array(losses))


@dataclass(frozen=True, eq=False, repr=False)
class Recording(Shown):
    """The steps in a folder of a `Recorder`, as they were when it was read.

    Attributes:
        folder: where they are.
        steps: their numbers [record], increasing.
        losses: the loss at each [record].

    Example as `Recorder`.
    """

    folder: Path
    steps: np.ndarray
    losses: np.ndarray

    def _shown(self) -> tuple[str, list[Row]]:
        losses = f"{number(self.losses[0])} to {number(self.losses[-1])}"
        steps = f"{len(self.steps)}, from {self.steps[0]} to {self.steps[-1]}"
        return "Recording", [("folder", str(self.folder)), ("steps", steps), ("loss", losses)]

    def to_xarray(self) -> xr.Dataset:
        """A dataset of `losses` [step]."""
        import xarray as xr

        return xr.Dataset({"losses": ("step", self.losses)}, {"step": self.steps})

    def load(self, step: int, model: Any, part: str | None = None) -> Any:
        """The model with its parameters at this step: a torch module is changed in place, a jax pytree is a new one.

        Args:
            step: one of `steps`.
            model: of the architecture that was recorded.
            part: the name of what was recorded beside the model, to load that.

        Raises:
            ValueError: a step or part that was not recorded.
            CheckpointError: parameters of other names or shapes (it says which), or of a dtype that the model's cannot
                hold.
        """
        if step not in self.steps:
            near = sorted(self.steps.tolist(), key=lambda known: abs(known - step))[:2]
            raise ValueError(f"no step {step} in {self.folder}; the nearest are {', '.join(map(str, sorted(near)))}")
        return with_values(model, self._values(step, part))

    def loss(self, step: int) -> float:
        """What was recorded with a step."""
        return float(_metadata(self.file(step))["loss"])

    def file(self, step: int) -> Path:
        """Where a step lies."""
        return self.folder / _file_name(step)

    def _values(self, step: int, part: str | None) -> dict[str, np.ndarray]:
        path = self.file(step)
        parts = _metadata(path)["parts"].split()
        if part is not None and part not in parts:
            raise ValueError(f"no part {part!r} in {path}; there are {listing(parts)}")
        with opened(path, "numpy") as file:
            names = file.keys()
            if part is None:
                apart = tuple(f"{known}." for known in parts)
                return {name: file.get_tensor(name) for name in names if not name.startswith(apart)}
            own = [name for name in names if name.startswith(f"{part}.")]
            return {name.removeprefix(f"{part}."): file.get_tensor(name) for name in own}


_NAME = re.compile(r"step_(\d{8,})\.safetensors")


def _file_name(step: int) -> str:
    return f"step_{step:08d}.safetensors"


def _serialised(step: int, model: Any, loss: float, parts: dict[str, Any]) -> bytes:
    from safetensors.numpy import save

    arrays = parameters_of(model)
    for part, other in parts.items():
        if any(name.startswith(f"{part}.") for name in arrays):
            raise ValueError(f"the model has a {part!r} of its own; record the other one under another name")
        arrays = arrays | {f"{part}.{name}": array for name, array in parameters_of(other).items()}
    metadata = {"step": str(step), "loss": repr(loss), "parts": " ".join(parts)}
    return save({name: _as_numpy(name, array) for name, array in arrays.items()}, metadata)


def _as_numpy(name: str, array: Any) -> np.ndarray:
    if dtype_name(array) not in ("float16", "float32", "float64"):
        raise TypeError(f"parameter {name} is {dtype_name(array)}, expected float16, float32 or float64")
    return np.asarray(to_numpy(array), order="C")  # safetensors reads memory as it lies


def _write(folder: Path, name: str, content: bytes) -> None:
    if (folder / name).exists():
        raise FileExistsError(f"{folder} has {name} already; take a new folder, so that two runs are not mixed")
    with replaced(folder / name) as unfinished:
        unfinished.write_bytes(content)


def _metadata(path: Path) -> dict[str, str]:
    with opened(path, "numpy") as file:
        metadata = file.metadata() or {}
    if not {"step", "loss", "parts"} <= set(metadata):
        raise CheckpointError(f"{path} has no step and loss, so a Recorder did not write it; move it elsewhere")
    return metadata
