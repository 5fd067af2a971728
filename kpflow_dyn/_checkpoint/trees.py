"""Files of nested dictionaries of arrays: flax's msgpack, HDF5 and orbax."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from kpflow_dyn._checkpoint.arrays import as_tensor, dense, dtype_named
from kpflow_dyn._checkpoint.keras import with_names
from kpflow_dyn._problems.parameters import CheckpointError

ARRAY, COMPLEX, SCALAR = 1, 2, 3
"""What flax's extension types of msgpack are."""
LONGEST = 1_000_000
GROUPS = 20_000


def read_msgpack(data: bytes) -> Any:
    """What `flax.serialization.msgpack_serialize` or `to_bytes` wrote."""
    try:
        import msgpack
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a file of flax needs msgpack; pip install 'kpflow-dyn[checkpoints]'") from error

    limits = {"max_array_len": LONGEST, "max_map_len": LONGEST}
    try:
        tree = msgpack.unpackb(data, ext_hook=_extension, raw=False, strict_map_key=False, **limits)
    except CheckpointError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError, MemoryError) as error:
        raise CheckpointError(f"no msgpack of flax, or damaged ({type(error).__name__}: {error})") from error
    return _joined(tree)


def _extension(code: int, data: bytes) -> Any:
    import msgpack

    if code not in (ARRAY, SCALAR):
        return None
    shape, name, content = msgpack.unpackb(data, raw=True)
    return dense(content, dtype_named(name.decode()), shape)


def _joined(tree: Any) -> Any:
    """Large arrays, which flax cuts into pieces, whole again."""
    if not isinstance(tree, dict):
        return tree
    if tree.get("__msgpack_chunked_array__"):
        import torch

        pieces, shape = tree["chunks"], tree["shape"]
        whole = torch.cat([pieces[str(place)].reshape(-1) for place in range(len(pieces))])
        return whole.reshape([int(shape[str(place)]) for place in range(len(shape))])
    return {str(key): _joined(value) for key, value in tree.items()}


def read_hdf5(path: Any, size: int) -> dict[str, Any]:
    """The groups and arrays of an HDF5 file, such as the weights of Keras; links to other files are not followed."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return with_names(_group(file, {"left": 100 * size + 2**26, "groups": GROUPS}, 0))
    except OSError as error:
        raise CheckpointError(f"no HDF5 file, or a damaged one ({error})") from error


def _group(group: Any, budget: dict[str, int], depth: int) -> dict[str, Any]:
    import h5py

    found = {}
    budget["groups"] -= 1
    if budget["groups"] < 0:
        raise CheckpointError(f"more than {GROUPS:,} groups, or one that is a member of itself; no checkpoint is so")
    for name in group if depth < 30 else ():
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            continue
        member = group[name]
        if isinstance(member, h5py.Group):
            found[name] = _group(member, budget, depth + 1)
        elif isinstance(member, h5py.Dataset) and member.dtype.kind in "biufc":
            found[name] = _dataset(member, budget)
    return found


def _dataset(dataset: Any, budget: dict[str, int]) -> Any:
    budget["left"] -= math.prod(dataset.shape or ()) * dataset.dtype.itemsize
    if dataset.external or dataset.is_virtual or budget["left"] < 0:
        raise CheckpointError(f"{dataset.name} claims shape {dataset.shape}, which the file does not hold itself")
    return as_tensor(np.asarray(dataset[()]))


def is_orbax(folder: Path) -> bool:
    """Whether a folder is a checkpoint of orbax, or one item of it."""
    return any((folder / name).exists() for name in ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"))


def read_orbax(folder: Path) -> Any:
    """The tree of a checkpoint of orbax, an item of it, or the last step that a CheckpointManager saved."""
    item = _orbax_item(folder)
    try:
        import orbax.checkpoint as orbax  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{folder} is a checkpoint of orbax, which reads it; pip install orbax-checkpoint"
        ) from error
    handler = orbax.PyTreeCheckpointer()
    try:
        shapes = handler.metadata(item.absolute()).item_metadata.tree
        as_arrays = orbax.checkpoint_utils.construct_restore_args(shapes)
        as_numpy = _of_leaves(as_arrays, lambda _: orbax.RestoreArgs(restore_type=np.ndarray))
        tree = handler.restore(item.absolute(), restore_args=as_numpy)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise CheckpointError(f"{folder} is no checkpoint of orbax, or is damaged ({error})") from error
    return _of_leaves(tree, _tensor)


def _orbax_item(folder: Path) -> Path:
    steps = [path for path in folder.iterdir() if path.name.isdigit() and path.is_dir()]
    if steps and not is_orbax(folder):
        folder = max(steps, key=lambda path: int(path.name))
    if (folder / "_METADATA").exists():
        return folder
    items = sorted(path for path in folder.iterdir() if (path / "_METADATA").exists())
    if len(items) != 1:
        names = ", ".join(path.name for path in items) or "none"
        raise CheckpointError(f"{folder} is no single item of an orbax checkpoint, with _METADATA; there are: {names}")
    return items[0]


def _of_leaves(tree: Any, function: Any) -> Any:
    if isinstance(tree, dict):
        return {str(key): _of_leaves(value, function) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_of_leaves(value, function) for value in tree]
    return function(tree)


def _tensor(leaf: Any) -> Any:
    """The array as a tensor; bfloat16, which torch and numpy do not share, by its bytes."""
    if not hasattr(leaf, "dtype"):
        return None
    array = np.ascontiguousarray(leaf)
    known = as_tensor(array)
    return dense(array.tobytes(), dtype_named(str(leaf.dtype)), array.shape) if known is None else known
