"""Compiled programs by what they compute, so that other weights, states and flows meet them compiled.

A program is known by its form: the equations of the jaxpr that it is made of, with shapes and dtypes. Its arguments are
all numbers, those too that the user's function closes over; so nothing that is kept here holds any, but for those that
a function's own derivative closes over.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import ContextDecorator
from functools import partial
from hashlib import sha256
from threading import Lock
from types import FunctionType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from kpflow_dyn._jax.custom import is_floating
from kpflow_dyn._jax.equations import CUSTOM, Equation, Jaxpr, bind, opened

MOST = 256
ORDERS = 2  # so many derivatives of a function with a derivative of its own are part of the form
SMALL = 2**12  # bytes of a constant within a program that are part of its form
OF_JAX = ("jax", "jaxlib", "numpy", "ml_dtypes", "enum", "builtins")


class Kept(Protocol):
    """Programs of one form, and whether they are those of a function with such values."""

    def fits(self, values: list[Any]) -> bool: ...


class KeptPrograms:
    """The programs of the last forms that were used; threads may share it."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()
        self._lock = Lock()

    def find(self, key: tuple[Hashable, ...], values: list[Any]) -> Any:
        """What is kept under a key whose first part is a form, if it fits these values; None where there is none."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
        return found if found is not None and found.fits(values) else None

    def keep(self, key: tuple[Hashable, ...], found: Any) -> None:
        """Keep it, if its form is known."""
        if key[0] is None:
            return
        with self._lock:
            self._kept[key] = found
            self._kept.move_to_end(key)
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)

    def forget(self) -> None:
        """Have everything compiled anew."""
        with self._lock:
            self._kept.clear()


PROGRAMS = KeptPrograms()
CONFIG: Any = jax.config  # whose fields a type checker does not know


class Shared:
    """A function that is compiled once for all functions that compute the same; what it closes over is an argument."""

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any] | None = None) -> None:
        self._function, self._options = function, dict(options or {})
        self._known: dict[Hashable, Callable[[list[Any]], Any]] = {}

    def __call__(self, *args: Any) -> Any:
        """Its value, of arrays."""
        leaves, form = jax.tree.flatten(args)
        if any(isinstance(leaf, Tracer) for leaf in leaves):
            return self._function(*args)  # part of another program
        key = form, *map(jax.typeof, leaves), CONFIG.jax_default_matmul_precision
        if key not in self._known:
            self._known[key] = self._compiled(args)
        return self._known[key](leaves)

    def _compiled(self, args: tuple) -> Callable[[list[Any]], Any]:
        closed, out = jax.make_jaxpr(self._function, return_shape=True)(*args)
        program, form = compiled_of(closed, evaluated, **self._options), jax.tree.structure(out)
        constants = constants_of(closed)
        return lambda leaves: jax.tree.unflatten(form, program(constants, *leaves))


def compiled_of(closed: Jaxpr, what: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The program (constants, *args) -> what(function, *args) of the function that a jaxpr is; it gives a list."""
    key = form_of(closed), what, tuple(options.items())
    if (found := PROGRAMS.find(key, [])) is None:
        PROGRAMS.keep(key, found := _Program(closed.jaxpr, what, options))
    return found.run


def constants_of(closed: Jaxpr) -> list[jax.Array]:
    """What the function of a jaxpr closes over."""
    with jax.ensure_compile_time_eval():  # from numpy by a copy: `asarray` compiles one for each shape
        return [jax.device_put(np.asarray(c)) if isinstance(c, np.ndarray) else c for c in closed.consts]


def evaluated(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args)."""
    return function(*args)


class _Program:
    def __init__(self, jaxpr: Jaxpr, what: Callable[..., Any], options: dict[str, Any]) -> None:
        def run(constants: list[Any], *args: Any) -> Any:
            return what(jaxpr_as_fun(ClosedJaxpr(jaxpr, constants)), *args)

        self.run = jax.jit(run, compiler_options=options or None)

    def fits(self, _values: list[Any]) -> bool:
        """Always: it holds no values."""
        return True


def form_of(closed: Jaxpr) -> Hashable:
    """What a jaxpr computes of its inputs and constants; None where that cannot be told, as with a callback."""
    try:
        return _form(opened(closed), ORDERS)
    except _Unknown:
        return None


class _Unknown(Exception):
    pass


def _form(jaxpr: Jaxpr, orders: int) -> Hashable:
    numbers: dict[Any, int] = {}

    def new(var: Any) -> Hashable:
        numbers[var] = len(numbers)
        return var.aval

    def known(atom: Any) -> Hashable:
        return (atom.aval, _value(atom.val, orders)) if isinstance(atom, Literal) else numbers[atom]

    inputs = tuple(map(new, (*jaxpr.constvars, *jaxpr.invars)))
    equations = tuple(
        (e.primitive, tuple(map(known, e.invars)), _params(e, orders), tuple(map(new, e.outvars))) for e in jaxpr.eqns
    )
    return inputs, equations, tuple(map(known, jaxpr.outvars))


def _params(equation: Equation, orders: int) -> Hashable:
    if equation.primitive.name in CUSTOM:
        return _value(equation.params["call_jaxpr"], orders), orders and _derivative(equation, orders - 1)
    return tuple((name, _value(value, orders)) for name, value in sorted(equation.params.items()))


def _derivative(equation: Equation, orders: int) -> Hashable:
    """The form of the derivative that a function has of its own, at points and along directions that are others."""
    if equation.params["symbolic_zeros"]:  # which may be another for each set of what moves
        raise _Unknown
    floats = [i for i, var in enumerate(equation.invars) if is_floating(var.aval)]
    like = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in equation.invars]
    results = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.outvars if is_floating(v.aval)]
    forward = equation.primitive.name == "custom_jvp_call"
    function = partial(bind, equation, range(len(equation.outvars)))

    def of_floats(values: list[Any], *moved: Any) -> list[Any]:
        every = dict(enumerate(values)) | dict(zip(floats, moved, strict=True))
        out = function(*every.values())
        return [value for value in (out if isinstance(out, list) else [out]) if is_floating(value)]

    def derived(values: list[Any], directions: list[Any]) -> Any:
        points = [values[i] for i in floats]
        if forward:
            return jax.jvp(partial(of_floats, values), points, directions)
        out, pull = jax.vjp(partial(of_floats, values), *points)
        return out, pull(directions)

    try:
        return _value(jax.make_jaxpr(derived)(like, [like[i] for i in floats] if forward else results), orders)
    except _Unknown:
        raise
    except Exception as error:  # a rule may refuse in many ways
        raise _Unknown from error


def _value(value: Any, orders: int) -> Hashable:
    """A parameter of an equation, such that equal ones mean the same."""
    if hasattr(value, "eqns"):
        constants = getattr(value, "consts", ())
        return _form(opened(value), orders), tuple(_value(constant, orders) for constant in constants)
    if isinstance(value, tuple | list):
        return type(value), tuple(_value(part, orders) for part in value)
    if isinstance(value, dict):
        return tuple((_value(key, orders), _value(part, orders)) for key, part in value.items())
    if isinstance(value, np.ndarray | np.generic | jax.Array | float | complex):
        return _bytes(value)
    if callable(value) and not isinstance(value, type | ContextDecorator):  # a mesh is one
        return _function(value)
    if type(value).__module__.partition(".")[0] not in OF_JAX:
        raise _Unknown
    try:
        hash(value)
    except TypeError as error:
        raise _Unknown from error
    return type(value), value


def _bytes(value: Any) -> Hashable:
    if isinstance(value, Tracer) or getattr(value, "nbytes", 0) > SMALL:
        raise _Unknown
    return type(value), bytes_of(value)


def bytes_of(value: Any) -> Hashable:
    """What tells an array from others, in few bytes."""
    is_key = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    array = np.asarray(jax.random.key_data(value) if is_key else value)
    every = array.tobytes()
    return is_key and value.dtype, array.dtype, array.shape, every if len(every) <= SMALL else sha256(every).digest()


def _closed(function: Any) -> Hashable:
    """A function that closes over nothing, so that keeping it keeps no numbers."""
    if isinstance(function, FunctionType) and not function.__closure__ and not function.__defaults__:
        return function
    raise _Unknown


def _function(value: Any) -> Hashable:
    """One of JAX's own that closes over nothing, or one that is called back; any other may compute whatever it will."""
    if (called := getattr(value, "callback_func", None)) is not None:
        return type(value), value.in_tree, called if isinstance(called, np.ufunc) else _closed(called)
    if isinstance(value, FunctionType) and value.__module__.startswith("jax."):
        return _closed(value)
    raise _Unknown
