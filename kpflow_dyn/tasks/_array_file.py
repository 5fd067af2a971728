"""Trials from a file of arrays."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kpflow_dyn._problems.archives import Archive
from kpflow_dyn.tasks._data import TaskData, check_arrays, count, is_indices


@dataclass(frozen=True)
class ArrayFile:
    """Trials from an .npz file with arrays `inputs` and, if you like, `targets` and `mask`, shaped as in `TaskData`.

    The file is read without pickle, so it cannot run code.

    Args:
        path: of the file; it is read when trials are sampled, and then refused if it does not hold such arrays.

    >>> import tempfile
    >>> path = f"{tempfile.mkdtemp()}/trials.npz"
    >>> np.savez(path, inputs=np.zeros((20, 60, 3)))
    >>> ArrayFile(path).sample(trials=8).inputs.shape
    (8, 60, 3)
    """

    path: str | Path

    def sample(self, trials: int | None = None, seed: int = 0) -> TaskData:
        """The first `trials` trials of the file, or all of them; the seed has no effect."""
        arrays = _read_npz(Path(self.path))
        check_arrays(arrays, self.path)
        inputs = arrays["inputs"].astype(float)
        taken = len(inputs) if trials is None else count(trials)
        if taken > len(inputs):
            raise ValueError(f"asked for {taken} trials, but {self.path} has {len(inputs)}")
        targets = _numbers_or_classes(arrays["targets"][:taken]) if "targets" in arrays else None
        mask = arrays["mask"][:taken] if "mask" in arrays else None
        if mask is not None and np.isin(mask, (0, 1)).all():
            mask = mask.astype(bool)
        return TaskData(inputs[:taken], targets, mask, name=Path(self.path).stem)


def _numbers_or_classes(targets: np.ndarray) -> np.ndarray:
    return targets.astype(int if is_indices(targets) else float)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz file; write one with numpy.savez(path, inputs=..., targets=...)")
    try:
        with path.open("rb") as file:
            Archive(file)  # refuses what would unpack to far more than it is
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("inputs", "targets", "mask") if name in archive}
    except (ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read ({error}); it must hold plain arrays of numbers") from error
    if "inputs" not in arrays:
        raise ValueError(f"{path} has no array named 'inputs'; write it with numpy.savez(path, inputs=...)")
    return arrays
