"""What JAX's operations do with complex numbers; see `kpflow_dyn.tracing._pairs`."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from kpflow_dyn._arrays.complex_numbers import in_pairs, of_pairs
from kpflow_dyn.tracing._pairs import Form, Kind

KINDS = {
    "complex": Kind.JOIN,
    "real": Kind.REAL,
    "imag": Kind.IMAGINARY,
    "conj": Kind.CONJUGATE,
    **dict.fromkeys(("reduce_sum", "cumsum", "neg"), Kind.APART),
}


def form_of(outs: Sequence[Any], kind: Kind | None = None) -> Form:
    """That of a node with results of these dtypes."""
    return Form([jnp.issubdtype(out.dtype, jnp.complexfloating) for out in outs], kind)


def kind_of(equation: Any) -> Kind | None:
    """What an equation does with complex numbers."""
    if equation.primitive.name == "convert_element_type":
        given, out = equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype
        widens = jnp.issubdtype(out, jnp.complexfloating) and jnp.finfo(out).dtype == given
        return Kind.WIDEN if widens else None
    return KINDS.get(equation.primitive.name)


def real_leaves(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of a pytree, complex ones in pairs, and how it is made of such leaves."""
    leaves, structure = jax.tree.flatten(tree)
    complexes = [eqx.is_array(leaf) and jnp.iscomplexobj(leaf) for leaf in leaves]

    def restored(given: list[Any]) -> Any:
        pairs = zip(given, complexes, strict=True)
        return jax.tree.unflatten(structure, [of_pairs(leaf) if paired else leaf for leaf, paired in pairs])

    real = [in_pairs(leaf) if paired else leaf for leaf, paired in zip(leaves, complexes, strict=True)]
    return real, restored
