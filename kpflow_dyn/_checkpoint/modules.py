"""Modules of the user's own, filled with the weights of a file and put to their inputs."""

import inspect
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kpflow_dyn._arrays import like_numpy
from kpflow_dyn._checkpoint.cells import Cell
from kpflow_dyn._checkpoint.files import Content, in_words, read
from kpflow_dyn._checkpoint.names import Names, named
from kpflow_dyn._problems.parameters import CheckpointError, differing, dtype_name, listing, parameters_of, with_values
from kpflow_dyn._problems.problems import DiscreteProblem, StaticProblem


def fill(path: Path, module: Any, key: str | None) -> dict[str, Any]:
    """The fields of a `Checkpoint`: the module with the weights of the file, and where these were."""
    content = read(path)
    kind, expected = type(module).__name__, _expected(module)
    with in_words(path, f"does not fill the {kind}"):
        names = named(content.tree, as_torch=False)
        names = names if key is None else names.under(key)
        if isinstance(module, nn.Module):
            head, values, unused = _matching(names, expected, kind)
            _fill_torch(module, values)
        elif content.kind == "equinox":
            module, head, values, unused = _fill_leaves(module, content), "", names.tensors, ()
        else:
            head, values, unused = _matching(names, expected, kind)
            module = _fill_pytree(module, values)
    found = {
        "file": content.kind,
        "key": key or "",
        "prefix": head,
        "cell": f"{kind}, filled with {len(values)} tensors",
    }
    if unused:
        found["left out"] = listing(unused)
    return {
        "model": kind,
        "cell": module,
        "readout": None,
        "prefix": head,
        "unused": unused,
        "readout_name": None,
        "found": found,
    }


def _expected(module: Any) -> dict[str, Any]:
    """The arrays of a module by their names in a file."""
    if not isinstance(module, nn.Module):
        return {_dotted(name): value for name, value in parameters_of(module).items()}
    found = {_plain(name): value for name, value in _tensors(module).items()}
    if without := [name for name, value in found.items() if is_lazy(value) or value.is_meta]:
        raise ValueError(f"{listing(without)} of the module have no values yet; make it on the cpu, and call it once")
    return found


SEQUENCE = ("trial", "time", "unit")
COUNTER = "num_batches_tracked"  # which old files lack, and eval mode does not need


def problem_of(
    module: Any, x: np.ndarray, state: Sequence[str] | None = None, axes: Sequence[str] | None = None
) -> DiscreteProblem | StaticProblem:
    """The module on inputs: a recurrent layer or a cell step by step, another module once on all of them.

    Inputs [trial, time, input] and tokens [trial, time] are taken as sequences, where `axes` does not say; others, such
    as images, give one value at one time.
    """
    inputs = _inputs(x, module)
    if x.ndim == 3 and state is None and axes is None and is_cell(module):
        return DiscreteProblem(module, inputs, _zeros(module))
    is_sequence = x.ndim == 3 or (x.ndim == 2 and x.dtype.kind in "iu")
    if not is_sequence and state is None and axes is None:
        module = _at_one_time(module)
    return StaticProblem(module, inputs, state, SEQUENCE if axes is None else axes)


def _inputs(x: np.ndarray, module: Any) -> Any:
    """Numbers in the dtype of the module; tokens stay integers."""
    if x.dtype.kind in "fc":
        return like_numpy(x, next(iter(parameters_of(module).values())))
    if isinstance(module, nn.Module):
        return torch.from_numpy(x.astype("int64"))
    import jax

    return jax.numpy.asarray(x)


def _at_one_time(module: Any) -> Any:
    """The module whose output [trial, ...] is [trial, 1, unit]."""
    if isinstance(module, nn.Module):
        return nn.Sequential(module, nn.Flatten(), nn.Unflatten(1, (1, -1)))
    import jax

    return jax.tree_util.Partial(lambda own, x: own(x).reshape(1, -1), module)


def _zeros(module: Any) -> Any:
    """The start of a cell that does not say its size, where one part of it does; else None."""
    parts = module.modules() if isinstance(module, nn.Module) else _parts(module)
    sizes = {size for part in parts if isinstance(size := getattr(part, "hidden_size", None), int)}
    if hasattr(module, "hidden_size") or len(sizes) != 1:
        return None
    return like_numpy(np.zeros(sizes.pop()), next(iter(parameters_of(module).values())))


def _parts(module: Any) -> list[Any]:
    """The modules in a pytree that say their hidden size."""
    import jax

    return jax.tree.leaves(module, is_leaf=lambda node: hasattr(node, "hidden_size"))


def cast(module: Any, dtype: str) -> Any:
    """The module in float32 or float64."""
    if isinstance(module, nn.Module):
        return module.double() if dtype == "float64" else module.float()
    import jax

    if dtype == "float64":
        jax.config.update("jax_enable_x64", True)

    def leaf_in(leaf: Any) -> Any:
        floats = str(getattr(leaf, "dtype", "")).startswith("float")
        return jax.numpy.asarray(np.asarray(leaf), dtype) if floats else leaf

    return jax.tree.map(leaf_in, module)


def is_cell(module: Any) -> bool:
    """Whether a module is a recurrent layer, or is called on an input and a state."""
    if isinstance(module, Cell):
        return True
    call = module.forward if isinstance(module, nn.Module) else module.__call__
    needed = [one for one in inspect.signature(call).parameters.values() if one.default is one.empty]
    return len([one for one in needed if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]) == 2


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers that are saved with a module, themselves."""
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}


def _plain(name: str) -> str:
    """A name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def _dotted(name: str) -> str:
    """A path in a pytree as files spell it: layers[0].weight is layers.0.weight."""
    return re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", name).removeprefix(".")


def _matching(names: Names, expected: Mapping[str, Any], kind: str) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    """The prefix in the file under which all the expected names are, their tensors, and names that are left over.

    Raises:
        CheckpointError: no such prefix, or several; names are missing or left over; a shape differs.
    """
    if not expected:
        raise CheckpointError(f"a {kind} has no weights")
    tensors = {_plain(name): tensor for name, tensor in names.tensors.items()}
    keys = {_plain(name): key for name, key in names.keys.items()}
    heads = Counter(head for name in tensors for head, tail in _splits(name) if tail in expected)
    whole = [head for head, count in heads.items() if count == len(expected)]
    if len(whole) > 1:
        raise CheckpointError(
            f"several sets of weights fit the {kind}, under {listing(whole)}; choose one with key= (--key)"
        )
    if not heads:
        raise CheckpointError(f"it has other names, {listing(tensors)}, than the {kind}, {listing(expected)}")
    head = whole[0] if whole else max(heads, key=heads.__getitem__)
    tensors |= _of_shared(expected, head, tensors)
    missing = [name for name in expected if head + name not in tensors and not name.endswith(COUNTER)]
    own = {_plain(keys[head + name]) for name in expected if head + name in keys}
    taken = {head + name for name in expected}
    unused = [name for name in tensors if name not in taken]
    extra = [name.removeprefix(head) for name in unused if name.startswith(head) and keys[name] in own]
    if missing or extra:
        wrong = differing(missing, extra, f"under {head!r} " if head else "")
        raise CheckpointError(f"{wrong}; make the module that was saved, with the same options")
    expected = {name: value for name, value in expected.items() if head + name in tensors}
    for name, value in expected.items():
        wanted, got = (_kind(one) + str(list(one.shape)) for one in (value, tensors[head + name]))
        if wanted != got:
            raise CheckpointError(f"{head}{name} must be {wanted}, got {got}")
    return head, {name: tensors[head + name] for name in expected}, tuple(unused)


def _of_shared(expected: Mapping[str, Any], head: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under names that the file leaves out, of arrays that the module has under another name as well."""
    known = {id(value): tensors[head + name] for name, value in expected.items() if head + name in tensors}
    for name, value in expected.items():
        own = tensors.get(head + name)
        if own is not None and own is not known[id(value)] and not torch.equal(own, known[id(value)]):
            raise CheckpointError(f"{head}{name} differs from another name of the same weight of the module")
    left_out = [name for name, value in expected.items() if head + name not in tensors and id(value) in known]
    return {head + name: known[id(expected[name])] for name in left_out}


def _kind(array: Any) -> str:
    """ "float ", "int " and the like, of any precision."""
    return dtype_name(array).removeprefix("b").removeprefix("u").rstrip("0123456789") + " "


def _splits(name: str) -> list[tuple[str, str]]:
    """All ways to cut a name at a dot."""
    cuts = [0, *(place + 1 for place, letter in enumerate(name) if letter == ".")]
    return [(name[:cut], name[cut:]) for cut in cuts]


def _fill_torch(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a module these values, in the dtype that holds all of them; weights that it shares stay shared."""
    floats = [value.dtype for value in values.values() if value.is_floating_point()]
    dtype = reduce(torch.promote_types, floats) if floats else None
    for name, target in _tensors(module).items():
        if (value := values.get(_plain(name))) is not None:
            target.data = value.detach().clone().to(dtype if value.is_floating_point() else value.dtype)
    module.eval()


def _fill_pytree(module: Any, values: Mapping[str, Tensor]) -> Any:
    known = parameters_of(module)
    return with_values(module, {name: _in_numpy(values[_dotted(name)], one) for name, one in known.items()})


def _in_numpy(value: Tensor, like: Any) -> np.ndarray:
    """The array; bfloat16, which numpy itself does not have, in float32 or in the dtype of one that is like it."""
    if value.dtype != torch.bfloat16:
        return value.numpy()
    return value.float().numpy().astype(like.dtype if dtype_name(like) == "bfloat16" else "float32")


def _fill_leaves(module: Any, content: Content) -> Any:
    """The pytree with the leaves of a file of equinox, in their order: arrays and numbers, as equinox writes them."""
    import jax
    import jax.numpy as jnp

    leaves, structure = jax.tree.flatten(module)
    values, filled = list(content.tree.values()), []
    taken = [leaf for leaf in leaves if _is_saved(leaf)]
    if len(taken) != len(values):
        raise CheckpointError(
            f"the file has {len(values)} arrays and the {type(module).__name__} {len(taken)}; make the module that was "
            "saved, with the same options"
        )
    left = iter(values)
    for leaf in leaves:
        value = next(left).numpy() if _is_saved(leaf) else leaf
        if isinstance(leaf, bool | int | float | complex):
            value = type(leaf)(value.item())
        elif _is_saved(leaf):
            if value.shape != leaf.shape or value.dtype != leaf.dtype:
                raise CheckpointError(
                    f"array {len(filled)} is {value.dtype}{list(value.shape)} in the file and "
                    f"{leaf.dtype}{list(leaf.shape)} in the {type(module).__name__}; make the module that was saved"
                )
            value = value if isinstance(leaf, np.ndarray) else jnp.asarray(value)
        filled.append(value)
    return jax.tree.unflatten(structure, filled)


def _is_saved(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)
