"""Pickled objects as trees of plain values: tensors and arrays come back, of other objects what they hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kpflow_dyn._checkpoint.arrays import as_storage, as_tensor, dtype_named, of_numpy, strided
from kpflow_dyn._checkpoint.pickles import Foreign
from kpflow_dyn._problems.parameters import CheckpointError

CLASS = "class of the module"
"""The name under which a module that is none of torch's has its class, beside its weights."""
ENTRIES = 1_000_000
STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
}


@dataclass(frozen=True)
class Skipped:
    """An object that holds nothing that is read here.

    Attributes:
        name: of its class, or of the function that would make it.
    """

    name: str


Pickled = Callable[[bytes], tuple[Foreign, bytes]]


def plain(tree: Any, storage: Callable[[Any], bytes | memoryview], pickled: Pickled | None = None) -> Any:
    """The tree of `read_pickle` with tensors, dictionaries and lists in the place of what stands for them.

    Args:
        tree: it.
        storage: the bytes of a tensor's storage, by its key in the file.
        pickled: what a storage is that was pickled by itself: what stands for it, and its bytes.
    """
    try:
        return _Reader(storage, pickled).value(tree)
    except RecursionError:
        raise CheckpointError("containers within containers, too deep for a checkpoint") from None


class _Reader:
    """Each object is read once, however many others hold it; one that holds itself is left out there."""

    def __init__(self, storage: Callable[[Any], bytes | memoryview], pickled: Pickled | None) -> None:
        self.storage, self.pickled = storage, pickled
        self.known: dict[int, tuple[Any, Any]] = {}  # by id, with the object itself, which keeps its id
        self.storages: dict[str, torch.Tensor] = {}
        self.entries = 0  # of objects, which may share a state that is copied for each

    def value(self, node: Any) -> Any:
        if not isinstance(node, Foreign | dict | list | tuple):
            return node
        if id(node) not in self.known:
            self.known[id(node)] = node, None  # what one finds that holds itself
            self.known[id(node)] = node, self.container(node)
        return self.known[id(node)][1]

    def container(self, node: Any) -> Any:
        if isinstance(node, dict):
            return {str(key): self.value(value) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return [self.value(value) for value in node]
        rebuild = _REBUILD.get(node.name.rpartition(".")[2]) if _is_known(node) else None
        if rebuild is None or node.arguments is None:
            return self.held(node)
        try:
            return rebuild(self, node)
        except (TypeError, ValueError, IndexError, AttributeError, KeyError, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{node.name} with arguments that are none of a checkpoint: damaged") from error

    def held(self, node: Foreign) -> Any:
        """What an object of an unknown class holds: its items or its attributes."""
        items = {**self.attributes(node.state), **self.value(node.items)}
        if "_modules" in _first(node.state) and not node.name.startswith("torch."):
            items[CLASS] = node.name
        self.entries += len(items)
        if self.entries > ENTRIES:
            raise CheckpointError(f"objects with more than {ENTRIES:,} attributes in all; no checkpoint has so many")
        return items or [self.value(value) for value in node.elements] or Skipped(node.name)

    def attributes(self, state: Any) -> dict[str, Any]:
        """Those that an object is given; of an nn.Module its parameters, buffers and submodules by their names."""
        found = self.value(_first(state))
        parts = [found.get(name) for name in ("_parameters", "_buffers", "_modules")]
        own = {name: value for name, value in found.items() if not name.startswith("_") or "_modules" not in found}
        return own | {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}

    def read_storage(self, reference: Foreign) -> tuple[torch.Tensor, torch.dtype]:
        """The bytes of a storage, and the dtype that its class says."""
        own, storage = None, self.storage
        if self.pickled is not None and reference.name == "torch.storage._load_from_bytes":
            own = f"pickled {id(reference)}"  # tensors that share it share this
            reference, data = self.pickled(_bytes(next(iter(reference.given))))
            storage = lambda _key: data  # noqa: E731
        kind, name, key, *_ = next(iter(reference.given))
        dtype = STORAGES.get(name.name.rpartition(".")[2].removesuffix("Storage"))
        if kind != "storage" or dtype is None or not isinstance(key, str):
            raise CheckpointError(f"a tensor in a storage {name.name!r}; expected one of numbers, such as FloatStorage")
        if (place := own or key) not in self.storages:
            self.storages[place] = as_storage(storage(key))
        return self.storages[place], dtype

    def tensor(self, node: Foreign) -> Any:
        reference, offset, shape, strides, *rest = node.given
        return _with_bits(strided(*self.read_storage(reference), offset, shape, strides), rest[2:])

    def untyped_tensor(self, node: Foreign) -> Any:
        reference, offset, shape, strides, _, _, dtype, *rest = node.given
        whole = dtype_named(dtype.name.removeprefix("torch."))
        return _with_bits(strided(self.read_storage(reference)[0], whole, offset, shape, strides), rest)

    def first_argument(self, node: Foreign) -> Any:
        return self.value(next(iter(node.given), None))

    def typed_tensor(self, node: Foreign) -> Any:
        """A tensor of a subclass: (the function that makes a plain one, the class, its arguments, the state)."""
        function, _, arguments, *_ = node.given
        return self.value(Foreign(function.name, arguments))

    def array(self, node: Foreign) -> Any:
        _, shape, dtype, fortran, data = node.state
        return _as_tensor(_bytes(data), dtype, shape, fortran)

    def array_of_buffer(self, node: Foreign) -> Any:
        data, dtype, shape, order = node.given
        return _as_tensor(_bytes(data), dtype, shape, order == "F")

    def number(self, node: Foreign) -> Any:
        dtype, data = node.given
        return _as_tensor(_bytes(data), dtype, (), False)

    def array_of_jax(self, node: Foreign) -> Any:
        function, arguments, state, *_ = node.given
        return self.value(Foreign(function.name, arguments, state))


def _first(state: Any) -> dict[str, Any]:
    """The dictionary of attributes in the state of an object, which may have a second one of slots."""
    first = state[0] if isinstance(state, tuple) and len(state) == 2 else state
    return first if isinstance(first, dict) else {}


def _with_bits(tensor: torch.Tensor, given: Sequence[Any]) -> torch.Tensor:
    """The values of a tensor that may be saved as the negative or the conjugate of what is in its storage."""
    bits = given[0] if given and isinstance(given[0], dict) else {}
    tensor = tensor.conj().resolve_conj() if bits.get("conj") else tensor
    return -tensor if bits.get("neg") else tensor


def _is_known(node: Foreign) -> bool:
    return node.name.partition(".")[0] in ("torch", "numpy", "jax", "jaxlib")


def _as_tensor(data: bytes, dtype: Foreign, shape: Any, fortran: Any) -> Any:
    array = of_numpy(data, _dtype(dtype), tuple(shape), bool(fortran)) if _holds_numbers(dtype) else None
    return None if array is None else as_tensor(array)


def _holds_numbers(dtype: Foreign) -> bool:
    code = next(iter(dtype.given), "")
    return dtype.name == "numpy.dtype" and isinstance(code, str) and code[:1] in ("b", "i", "u", "f", "c")


def _dtype(dtype: Foreign) -> np.dtype:
    code = str(next(iter(dtype.given), ""))
    order = dtype.state[1] if isinstance(dtype.state, tuple) and len(dtype.state) > 1 else "="
    return np.dtype(code).newbyteorder(order if order in ("<", ">") else "=")


def _bytes(data: Any) -> bytes:
    """Bytes, which old protocols write as a text of latin-1."""
    if isinstance(data, Foreign):  # _codecs.encode(text, "latin1")
        data = next(iter(data.given), "")
    return data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))


_REBUILD: dict[str, Callable[[_Reader, Foreign], Any]] = {
    "_rebuild_tensor": _Reader.tensor,
    "_rebuild_tensor_v2": _Reader.tensor,
    "_rebuild_tensor_v3": _Reader.untyped_tensor,
    "_rebuild_parameter": _Reader.first_argument,
    "_rebuild_parameter_with_state": _Reader.first_argument,
    "_rebuild_from_type_v2": _Reader.typed_tensor,
    "_rebuild_from_type": _Reader.typed_tensor,
    "_reconstruct": _Reader.array,
    "_frombuffer": _Reader.array_of_buffer,
    "scalar": _Reader.number,
    "_reconstruct_array": _Reader.array_of_jax,
}
"""What makes an array again, by the last part of its name."""
