"""A field as its user wrote it, in the form of the package; see `kpflow_dyn._problems.forms`."""

import sys
from typing import Any

import equinox as eqx
import jax

from kpflow_dyn._jax.differential import PairInForm
from kpflow_dyn._problems.events import EventsInForm, EventsThrough, is_hybrid
from kpflow_dyn._problems.forms import Form, Reversed

jax.tree_util.register_dataclass(Reversed, ["of"], [])


class InForm(eqx.Module):
    """A field of a state [unit]; its parameters have the names that they have in the user's field."""

    field: Any
    args: Any  # a tuple, of a hybrid model its HybridArguments, whose arrays are constants
    form: Form = eqx.field(static=True)

    def __call__(self, t: jax.Array, z: jax.Array, *x: jax.Array) -> jax.Array:
        """The field's value."""
        return self.form.rate(self.field, self.args, t, z, *x)


class HybridInForm(EventsInForm, InForm):
    """The same of a hybrid model, of the arguments of its flow and of its events."""

    def __call__(self, t: jax.Array, z: jax.Array, *x: jax.Array) -> jax.Array:
        """The value of the field between jumps."""
        return self.form.rate(self.field, self.args.flow, t, z, *x)


def in_form(f: Any, form: Form, args: tuple) -> InForm:
    """The field in the form of the package."""
    return (HybridInForm if is_hybrid(f) else InForm)(f, args, form)


class Through(eqx.Module):
    """function(model, ...) with the parameters of the model, which have the same names."""

    through_model: Any
    function: Any = eqx.field(static=True)

    def __call__(self, *args: Any) -> jax.Array:
        """The function's value."""
        return self.function(self.through_model, *args)


class HybridThrough(EventsThrough, Through):
    """The same of a hybrid model, whose events the function changes as well."""


def through(model: Any, function: Any) -> Through:
    """A model function(model, ...), with the same parameters; a hybrid one where the function has events."""
    return (HybridThrough if hasattr(function, "event") else Through)(model, function)


def field_of(f: Any) -> Any:
    """The field as its user wrote it, also of diffrax's ODETerm; the sum of several of these."""
    if isinstance(f, InForm):
        return f.field
    if isinstance(f, PairInForm):
        return f.pair
    diffrax = sys.modules.get("diffrax")
    if diffrax is None or not isinstance(f, diffrax.AbstractTerm):
        return f
    if isinstance(f, diffrax.ODETerm):
        return f.vector_field
    if isinstance(f, diffrax.MultiTerm):
        return Sum([field_of(term) for term in f.terms])
    raise TypeError(
        f"f is diffrax.{type(f).__name__}, expected a field or an ODETerm: noise is posed as kp.SDEProblem, a path "
        "that drives a state as kp.CDEProblem, inputs x(t) as x="
    )


class Sum(eqx.Module):
    """The sum of some fields."""

    fields: list

    def __call__(self, t: Any, y: Any, args: Any) -> Any:
        """Its value."""
        first, *rest = (field(t, y, args) for field in self.fields)
        return jax.tree.map(lambda *values: sum(values[1:], values[0]), first, *rest)
