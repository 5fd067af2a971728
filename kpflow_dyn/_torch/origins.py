"""What the tensors of a recording were computed from, storage by storage, and what their values decided."""

import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

import kpflow_dyn
from kpflow_dyn._torch.storages import storage_of

DECIDED = (
    "the model could not be traced{}: a number, a branch, a loop or a shape hangs on values that are not fixed by "
    "buffers and constants, nor alike for all; write it without branches or loops on values, as by torch.where"
)
Origin = frozenset[int | str]  # the numbers of rows, and the names of parameters and buffers


class Origins:
    """The origins of storages, and which of them may not be written to.

    Attributes:
        fixing: the names of buffers whose values made something of what was recorded.
        decided: where values of rows, or of parameters that learn, did so first; empty where none did.
    """

    def __init__(self, learnt: frozenset[str]) -> None:
        self.fixing, self.decided = frozenset[str](), ""
        self._learnt = learnt
        self._of: dict[int, Origin] = {}
        self._not_ours: dict[int, str] = {}

    def add(self, tensor: Tensor, origin: Origin) -> None:
        """Let a tensor be computed from these as well."""
        self._of[storage_of(tensor)] = self._of.get(storage_of(tensor), frozenset()) | origin

    def of(self, tensors: Iterable[Tensor]) -> Origin:
        """What any of these was computed from."""
        return frozenset().union(*(self._of[storage_of(tensor)] for tensor in tensors))

    def hang_on_rows(self, tensors: Iterable[Tensor]) -> bool:
        """Whether values hang on more than buffers and constants."""
        return any(isinstance(part, int) or part in self._learnt for part in self.of(tensors))

    def fix(self, tensors: list[Tensor]) -> None:
        """Note that these values make something of what is recorded."""
        if self.hang_on_rows(tensors):
            self.decided = self.decided or DECIDED.format(own_line(traceback.extract_stack()))
        self.fixing |= frozenset(part for part in self.of(tensors) if isinstance(part, str)) - self._learnt

    def protect(self, tensor: Tensor, whose: str) -> None:
        """Let writes to a tensor be an error that says whose it is."""
        self._not_ours[storage_of(tensor)] = whose

    def release(self, tensor: Tensor) -> None:
        """Allow writes to it."""
        self._not_ours.pop(storage_of(tensor), None)

    def check_ours(self, tensor: Tensor) -> None:
        """Raise where it may not be written to."""
        if (whose := self._not_ours.get(storage_of(tensor))) is not None:
            raise ValueError(f"the model writes to {whose}")


def own_line(frames: Iterable[traceback.FrameSummary]) -> str:
    """The last line of the model's own code among these."""
    inside = tuple(str(Path(str(module.__file__)).parent) for module in (torch, kpflow_dyn))
    own = [frame for frame in frames if not frame.filename.startswith((*inside, "<"))]
    return f" (in {own[-1].filename}, line {own[-1].lineno}: {own[-1].line})" if own else ""
