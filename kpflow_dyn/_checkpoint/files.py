"""Which kind of file a checkpoint is, told by its first bytes, and the tree of tensors in it.

No reader makes an object that a file names, follows a link, or takes memory for what a file only claims to hold.
"""

import io
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpflow_dyn._checkpoint.arrays import as_tensor, read_npy, read_npz
from kpflow_dyn._checkpoint.torch_files import is_sb3, read_pickled, read_sb3_zip, read_torch_zip
from kpflow_dyn._checkpoint.trees import is_orbax, read_hdf5, read_msgpack, read_orbax
from kpflow_dyn._problems.archives import Archive, is_zip, unknown_archive
from kpflow_dyn._problems.parameters import CheckpointError, opened

DAMAGED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    StopIteration,
    RuntimeError,
    MemoryError,
)
PICKLE = 0x80
NEWEST_PICKLE = 5
MSGPACK = {*range(0x80, 0x90), 0xDE, 0xDF}
TEXT_PICKLES = b"(cd]}l"


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        kind: of file, in words.
        tree: nested dictionaries and lists with tensors, and texts and numbers beside them.
    """

    kind: str
    tree: Any


def read(path: Path) -> Content:
    """The content of a checkpoint.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a file of an unknown kind, or one that is damaged or made to do harm.
    """
    if path.is_dir() and (is_orbax(path) or any(child.name.isdigit() for child in path.iterdir())):
        return Content("orbax", read_orbax(path))
    if path.is_dir():
        raise FileNotFoundError(f"no checkpoint file {path}: it is a folder, and none of orbax; give a file in it")
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    if path.suffix == ".safetensors":
        return Content("safetensors", _read_safetensors(path))
    with in_words(path, "is not a checkpoint that can be read"):
        return _read_file(path)


@contextmanager
def in_words(path: Path, problem: str) -> Iterator[None]:
    """Name the file in errors about what it holds: a damaged one gives errors of Python and torch where it is used."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path} {problem}: {error}") from error
    except DAMAGED as error:
        raise CheckpointError(f"{path} is damaged, or no checkpoint: {type(error).__name__} {error}") from error


def _read_file(path: Path) -> Content:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(16)
        file.seek(0)
        if is_zip(start):
            return _read_zip(Archive(file))
        if (begin := _leaves_at(file)) is not None:
            file.seek(begin)
            return Content("equinox", _read_leaves(file, size))
        if start[:8] == b"\x89HDF\r\n\x1a\n":
            return Content("HDF5", read_hdf5(path, size))
        if start[8:9] == b"{":
            return Content("safetensors", _read_safetensors(path))
        if not start:
            raise CheckpointError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _read_mapped(mapped, start)


def _read_mapped(file: mmap.mmap, start: bytes) -> Content:
    if (start[0] == PICKLE and 1 < start[1] <= NEWEST_PICKLE) or start[0] in TEXT_PICKLES:
        return Content(*read_pickled(file))
    if start[0] in MSGPACK:
        return Content("flax msgpack", read_msgpack(file.read()))
    raise CheckpointError(
        "expected a file of torch.save, safetensors, numpy, flax (msgpack), orbax, Keras (HDF5) or stable-baselines3, "
        f"got one that begins with {start[:8]!r}; save the weights: torch.save(model.state_dict(), path)"
    )


def _read_zip(archive: Archive) -> Content:
    if is_sb3(archive):
        return Content("stable-baselines3", read_sb3_zip(archive))
    if archive.ending("data.pkl"):
        return Content("torch.save", read_torch_zip(archive))
    if archive.ending(".npy"):
        return Content("npz", read_npz(archive))
    if "model.weights.h5" in archive.names:
        data = archive.read("model.weights.h5")
        return Content("Keras", read_hdf5(io.BytesIO(data), len(data)))
    raise unknown_archive(archive)


def _read_safetensors(path: Path) -> dict[str, Any]:
    with opened(path, "pt") as file:
        return {name: file.get_tensor(name) for name in list(file.keys())}


def _leaves_at(file: Any) -> int | None:
    """Where arrays of numpy begin in a file: at its start, or behind a line of options in JSON."""
    head = file.read(65536)
    file.seek(0)
    place = head.find(b"\x93NUMPY")
    return (
        place if place == 0 or (place > 0 and head[:1] in (b"{", b"[") and head[place - 1 : place] == b"\n") else None
    )


def _read_leaves(file: Any, size: int) -> dict[str, Any]:
    """Arrays of numpy one after another, without names: a .npy file has one, a .eqx file of equinox the leaves."""
    found = {}
    while file.tell() < size:
        found[str(len(found))] = as_tensor(read_npy(file, size - file.tell()))
    return found
