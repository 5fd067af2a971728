"""Files of torch.save: zip archives, and the older ones of several pickles with the storages behind them."""

import io
import mmap
from typing import Any

from kpflow_dyn._checkpoint.objects import STORAGES, plain
from kpflow_dyn._checkpoint.pickles import Foreign, Readable, read_pickle
from kpflow_dyn._problems.archives import Archive
from kpflow_dyn._problems.parameters import CheckpointError

MAGIC = 0x1950A86A20F9469CFC6C


def read_torch_zip(archive: Archive) -> Any:
    """The tree in an archive of torch.save, or of torch.jit.save."""
    pickles = [name for name in archive.names if name.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise CheckpointError(f"expected one data.pkl in the archive, got {len(pickles)}; it is damaged")
    folder = pickles[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in archive.names and archive.read(order).strip() != b"little":
        raise CheckpointError("weights of a big-endian machine; save them on a little-endian one")
    tree = read_pickle(io.BytesIO(archive.read(pickles[0])))
    return plain(tree, lambda key: archive.read(f"{folder}data/{key}"))


def read_sb3_zip(archive: Archive) -> dict[str, Any]:
    """The networks in an archive of stable-baselines3; its `data`, which holds pickles in texts, is not read."""
    names = [name for name in archive.ending(".pth") if "optimizer" not in name]
    return {
        name.removesuffix(".pth"): read_torch_zip(Archive(io.BytesIO(archive.read(name)), archive.limit))
        for name in names
    }


def is_sb3(archive: Archive) -> bool:
    """Whether the archive is one of stable-baselines3."""
    return "policy.pth" in archive.names


def read_pickled(file: mmap.mmap) -> tuple[str, Any]:
    """The tree in a pickle, and what kind of file it is: torch.save of old, or a pickle of Python."""
    first = read_pickle(file)
    if first != MAGIC:
        return "pickle", plain(first, _no_storage, _pickled_storage)
    tree, keys = _behind_magic(file)
    sizes = {}
    _find_storages(tree, sizes, set())
    storages = {key: _read_storage(file, sizes.get(key)) for key in keys}
    return "torch.save before torch 1.6", plain(tree, lambda key: storages[key])


def _behind_magic(file: Readable) -> tuple[Any, list[Any]]:
    """What is in a file of torch.save of old behind its first number: the tree, and the keys of its storages."""
    version, _, tree, keys = (read_pickle(file) for _ in range(4))
    if version != 1001 or not isinstance(keys, list):
        raise CheckpointError(f"version {version!r} of the format of torch.save is unknown; save the weights again")
    return tree, keys


def _pickled_storage(data: bytes) -> tuple[Foreign, bytes]:
    """A storage as `pickle.dump` of a tensor writes it, which is such a file: what stands for it, and its bytes."""
    file, sizes = io.BytesIO(data), dict[str, int]()
    if read_pickle(file) != MAGIC:
        raise CheckpointError("a storage that torch has not pickled; it is damaged")
    reference, keys = _behind_magic(file)
    if not isinstance(reference, Foreign) or reference.name != "persistent" or len(keys) != 1:
        raise CheckpointError("a pickled storage that is none; it is damaged")
    _add_storage(reference, sizes)
    return reference, _read_storage(file, sizes.get(keys[0]))


def _no_storage(key: Any) -> bytes:
    raise CheckpointError(f"a pickle that names the storage {key!r} of a tensor without having it; it is damaged")


def _find_storages(tree: Any, sizes: dict[str, int], seen: set[int]) -> None:
    """The bytes of a number in each storage that a tree names."""
    todo = [tree]
    while todo:
        node = todo.pop()
        if not isinstance(node, Foreign | dict | list | tuple) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Foreign):
            if node.name == "persistent":
                _add_storage(node, sizes)
            todo += [node.arguments, node.state, node.items, node.elements]
        else:
            todo += node.values() if isinstance(node, dict) else node


def _add_storage(reference: Foreign, sizes: dict[str, int]) -> None:
    _, kind, key, *_ = next(iter(reference.given))
    dtype = STORAGES.get(kind.name.rpartition(".")[2].removesuffix("Storage"))
    if dtype is None or not isinstance(key, str):
        raise CheckpointError(f"a storage {kind.name!r}; expected one of numbers, such as FloatStorage")
    sizes[key] = dtype.itemsize


def _read_storage(file: Readable, itemsize: int | None) -> bytes:
    """The next storage: how many numbers it has, and these."""
    count = int.from_bytes(file.read(8), "little", signed=True)
    data = b"" if itemsize is None or count < 0 else file.read(count * itemsize)
    if itemsize is None or len(data) != count * itemsize:
        raise CheckpointError(f"a storage claims {count:,} numbers, more than the file has; it is damaged")
    return data
