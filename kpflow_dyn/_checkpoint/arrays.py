"""Tensors out of bytes, and files of numpy, whose claims are compared with what is there before memory is taken."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kpflow_dyn._checkpoint.pickles import Readable
from kpflow_dyn._problems.archives import Archive
from kpflow_dyn._problems.parameters import CheckpointError

HEADER = 10_000
EXPANDED = 1024  # numbers of a tensor that repeats some, and may have more than the file


def as_storage(data: bytes | memoryview) -> Tensor:
    """The bytes as a tensor that owns them."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)


def strided(storage: Tensor, dtype: torch.dtype, offset: int, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
    """A view of the storage: the tensor of this shape and strides that begins at an offset, counted in numbers."""
    numbers = (offset, *shape, *strides)
    if not all(type(number) is int and number >= 0 for number in numbers) or len(shape) != len(strides):
        raise CheckpointError(f"a tensor of shape {list(shape)} with strides {list(strides)} at {offset}: damaged")
    there, count = len(storage) // dtype.itemsize, math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if count and (last >= there or count > max(there, EXPANDED)):
        raise CheckpointError(
            f"a tensor claims shape {list(shape)} with strides {list(strides)} at {offset}, but only {there:,} numbers "
            "of it are in the file; it is damaged"
        )
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    return storage[: there * dtype.itemsize].view(dtype).as_strided(tuple(shape), tuple(strides), offset)


def dense(data: bytes | memoryview, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The tensor of this shape, last axis first in memory, that the bytes are."""
    if not all(type(size) is int and size >= 0 for size in shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise CheckpointError(f"an array claims {dtype} of shape {list(shape)}, but has {len(data):,} bytes; damaged")
    return as_storage(data).view(dtype).reshape(tuple(shape))


def dtype_named(name: Any) -> torch.dtype:
    """The dtype of torch of a name such as "float32" or "bfloat16"."""
    dtype = getattr(torch, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"an array has the dtype {name!r}; expected numbers, such as float32")
    return dtype


def as_tensor(array: np.ndarray) -> Tensor | None:
    """An array of numbers as a tensor; None for texts and the like."""
    if array.dtype.kind not in "biufc" or array.dtype.itemsize > 16:
        return None
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)
    return torch.from_numpy(native.copy()) if native.dtype != np.longdouble else None


def of_numpy(data: bytes, dtype: np.dtype, shape: Sequence[int], fortran: bool) -> np.ndarray:
    """An array out of its bytes."""
    if dtype.hasobject:
        raise CheckpointError(
            "an array of Python objects, which only unpickling could read, and which may run code; save arrays of "
            "numbers"
        )
    if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise CheckpointError(f"an array claims {dtype} of shape {list(shape)}, but has {len(data):,} bytes; damaged")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def read_npy(file: Readable, left: int) -> np.ndarray:
    """The array of a .npy file, of which so many bytes are left; the file may go on behind it."""
    begin = file.tell()
    start = file.read(12)
    if start[:6] != b"\x93NUMPY" or len(start) < 12 or start[6] not in (1, 2, 3):
        raise CheckpointError("this is no array of numpy, or it is damaged")
    long = start[6] > 1
    length = int.from_bytes(start[8:12] if long else start[8:10], "little")
    if length > min(HEADER, left):
        raise CheckpointError(f"an array of numpy with a header of {length:,} bytes; expected some hundred")
    header = start + file.read(length - (0 if long else 2))
    parse = np.lib.format.read_array_header_2_0 if long else np.lib.format.read_array_header_1_0
    try:
        shape, fortran, dtype = parse(_behind_magic(header))
    except Exception as error:  # a header is parsed as Python's literals, by whose parser's errors it may fail
        raise CheckpointError(f"the header of an array of numpy is damaged ({type(error).__name__})") from None
    size = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and not 0 <= size <= left - (file.tell() - begin):
        raise CheckpointError(f"an array claims {dtype} of shape {list(shape)}, more than the file has; it is damaged")
    return of_numpy(b"" if dtype.hasobject else file.read(size), dtype, shape, fortran)


def _behind_magic(header: bytes) -> io.BytesIO:
    file = io.BytesIO(header)
    file.seek(8)
    return file


def read_npz(archive: Archive) -> dict[str, Tensor]:
    """The arrays of numbers of a .npz file; arrays of objects are left out, and refused where there are no others."""
    found, refused = {}, None
    for name in archive.ending(".npy"):
        data = archive.read(name)
        try:
            tensor = as_tensor(read_npy(io.BytesIO(data), len(data)))
        except CheckpointError as error:
            if "Python objects" not in str(error):
                raise CheckpointError(f"{name}: {error}") from error
            refused = CheckpointError(f"{name}: {error}")
        else:
            found |= {} if tensor is None else {name.removesuffix(".npy"): tensor}
    if refused is not None and not found:
        raise refused
    return found
