"""Pytrees of differential equations: drift and diffusion of an SDE in one, the field of a CDE as that of an ODE."""

from typing import Any

import equinox as eqx
import jax

from kpflow_dyn._problems.forms import Form
from kpflow_dyn._shown import type_name


class Controlled(eqx.Module):
    """A field of a CDE as that of an ODE whose input is X'."""

    field: Any

    def __call__(self, t: jax.Array, z: jax.Array, rate: jax.Array) -> jax.Array:
        """f(t, z) X'."""
        return self.field(t, z).reshape(*z.shape, rate.shape[-1]) @ rate


def controlled(f: Any) -> Any:
    """The field with X' as its input."""
    return f if isinstance(f, Controlled) else Controlled(f)


class DriftAndDiffusion(eqx.Module):
    """`f` and `g`, which share nothing."""

    f: Any
    g: Any


class Sharing(eqx.Module):
    """`f` and `g`, where g has None in the place of arrays that f has, whose numbers are in `shared`."""

    f: Any
    others: Any
    shared: tuple[tuple[int, int], ...] = eqx.field(static=True)

    @property
    def g(self) -> Any:
        """The diffusion, with what it shares."""
        leaves, form = _flat(self.others)
        of_drift, _ = _flat(self.f)
        for own, other in self.shared:
            leaves[own] = of_drift[other]
        return jax.tree.unflatten(form, leaves)


class _OfTerm(eqx.Module):
    """A vector field of diffrax, whose values may be operators of lineax."""

    field: Any

    @property
    def __wrapped__(self) -> Any:
        """What `inspect.signature` looks at."""
        return self.field

    def __call__(self, *args: Any) -> Any:
        found = self.field(*args)
        if type(found).__name__ == "DiagonalLinearOperator":  # as diffrax has diagonal noise
            return found.diagonal
        return found.as_matrix() if hasattr(found, "as_matrix") else found


class PairInForm(eqx.Module):
    """`f` and `g` as their user wrote them, of states [unit]; parameters have the names that they have in the pair."""

    pair: Any
    args: tuple[tuple, tuple]  # whose arrays are constants
    forms: tuple[Form, Form] = eqx.field(static=True)

    def f(self, t: jax.Array, z: jax.Array, *x: jax.Array) -> jax.Array:
        """The drift."""
        return self.forms[0].rate(self.pair.f, self.args[0], t, z, *x)

    def g(self, t: jax.Array, z: jax.Array, *x: jax.Array) -> jax.Array:
        """The diffusion."""
        return self.forms[1].rate(self.pair.g, self.args[1], t, z, *x)


def pair_in_form(pair: Any, forms: tuple[Form, Form], args: tuple[tuple, tuple]) -> PairInForm:
    """Drift and diffusion in the form of the package."""
    return PairInForm(pair, args, forms)


def drift_and_diffusion(f: Any, g: Any) -> tuple[Any, Any]:
    """A pytree with `f` and `g`, and the path of a diffrax ControlTerm."""
    f = f.pair if isinstance(f, PairInForm) else f
    if g is not None:
        return _pair(f, g), None
    terms = getattr(f, "terms", None)
    if terms is not None and len(terms) == 2 and hasattr(terms[1], "control"):
        drift, diffusion = (_OfTerm(term.vector_field) for term in terms)
        path = terms[1].control
        return _pair(drift, diffusion), path.fn if type(path).__name__ == "_CallableToPath" else path  # as it was given
    if not (callable(getattr(f, "f", None)) and callable(getattr(f, "g", None))):
        raise TypeError(
            f"without a diffusion g, f must have methods f and g, or be diffrax's MultiTerm(ODETerm(drift), "
            f"ControlTerm(diffusion, path)); got {type_name(f)}. An equation without noise is an ODEProblem"
        )
    return f, None


def _pair(f: Any, g: Any) -> Any:
    """One pytree of both; an array that both have, the same object, is one parameter."""
    of_drift, own = _flat(f)[0], _flat(g)[0]
    known = {id(leaf): number for number, leaf in enumerate(of_drift) if eqx.is_inexact_array(leaf)}
    shared = tuple((number, known[id(leaf)]) for number, leaf in enumerate(own) if id(leaf) in known)
    if not shared:
        return DriftAndDiffusion(f, g)
    leaves, form = _flat(g)
    for number, _ in shared:
        leaves[number] = None
    return Sharing(f, jax.tree.unflatten(form, leaves), shared)


def _flat(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of a pytree, None being one, and its form."""
    return jax.tree.flatten(tree, is_leaf=lambda leaf: leaf is None)
