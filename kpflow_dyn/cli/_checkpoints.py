"""The checkpoints that `kpflow-dyn track` follows: those of a Recorder, or files of the user's own loop."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from kpflow_dyn._learning.recorder import Recording


@dataclass(frozen=True, eq=False)
class Files:
    """Files of checkpoints, of which each is a step; as a `Recording` has them, but that no losses are known.

    Attributes:
        steps: their numbers, increasing.
        paths: by step.
        numbered_by: what the numbers are.
    """

    steps: np.ndarray
    paths: dict[int, Path]
    numbered_by: str

    @property
    def folder(self) -> Path:
        """Where the first one lies."""
        return self.paths[int(self.steps[0])].parent

    def file(self, step: int) -> Path:
        """Where a step lies."""
        return self.paths[int(step)]

    def loss(self, step: int) -> float:
        """Not known."""
        return math.nan


def checkpoints_in(paths: Sequence[Path]) -> Recording | Files:
    """What is to be tracked: the folder of a Recorder, or several files.

    Raises:
        FileNotFoundError: a file that is not there, or a folder without recorded steps.
        ValueError: a single file, or one that is given twice.
    """
    from kpflow_dyn._learning.recorder import Recorder

    if len(paths) == 1 and not paths[0].is_file():
        return Recorder.read(paths[0])
    if missing := [path for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"no checkpoint file {missing[0]}; give the folder of a kp.Recorder, or several files")
    if len(paths) < 2 or len({path.resolve() for path in paths}) < len(paths):
        given = ", ".join(map(str, paths))
        raise ValueError(f"{given}: track follows several different checkpoints, such as runs/step_*.pt; give them all")
    return _numbered(paths)


def _numbered(paths: Sequence[Path]) -> Files:
    """With the last number in the name of each as its step, if these all differ; else in their order."""
    import numpy as np

    found = [re.findall(r"\d+", path.stem) for path in paths]
    numbers = [int(digits[-1]) for digits in found if digits]
    by_name = len(set(numbers)) == len(paths)
    steps = numbers if by_name else list(range(len(paths)))
    said = "the last number in the name of each file" if by_name else "the order in which the files were given"
    return Files(np.array(sorted(steps)), dict(zip(steps, paths, strict=True)), said)
