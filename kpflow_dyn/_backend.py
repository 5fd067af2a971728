"""What the package needs of a framework, and the one place that asks which framework a value belongs to.

A problem chooses its backend when it is posed and carries it (`problem.backend`); whatever is neutral calls that. A
backend is a few narrow interfaces, each implemented by one module of `_torch` and one of `_jax`, imported when it is
first used:

    data        arrays of this framework, taken in and checked
    models      a model's parameters by name: read, copied, replaced; small models made of functions
    transforms  jvp, vjp, vmap and maps over rows
    solving     forward passes, and the libraries that solve ODEs
    tracing     models traced to graphs, and their tangents
    dynamics    a step or a field on many states at once
    objectives  a loss of the states as a function of the parameters, twice differentiable
    training    a model in training by the framework's optimisers
    runtime     threads, precision and packages
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from kpflow_dyn._arrays import Array, Rows, is_array, is_jax_array, is_torch_array, is_torch_module
from kpflow_dyn._shown import type_name

Values = dict[str, Array]
RowFunction = Callable[..., list[Array]]


class Data(Protocol):
    """Arrays of the framework, taken in and checked.

    is_own        Whether a value is an array of the framework.
    as_floats     Floats as an array of the framework; numpy arrays too where the framework takes them. A TypeError
                  for others names `what` they are and the `axes` expected.
    as_rows       The same for floats and integers.
    check_inputs  Raise unless x is [trial, time, input], of floats, finite, with no empty axis.
    flattened     The leaves of a pytree, and its structure, which has flatten_up_to and unflatten.
    inputs_at     x(t) [trial, n, input] of a callable at times [trial, n], in the dtype and on the device of
                  `like`.
    increments    What function(ta, tb) gives between times [n + 1] that follow each other, [n, ...].
    """

    def is_own(self, value: Any) -> bool: ...
    def as_floats(self, values: Any, what: str, axes: str) -> Array: ...
    def as_rows(self, values: Any, what: str, axes: str) -> Array: ...
    def check_inputs(self, x: Array) -> None: ...
    def flattened(self, tree: Any) -> tuple[list[Any], Any]: ...
    def inputs_at(self, function: Callable[[Array], Array], times: np.ndarray, like: Array) -> Array: ...
    def increments(self, function: Callable[..., Array], times: np.ndarray, like: Array) -> Array: ...


class Models(Protocol):
    """A model's parameters by name, and models made of functions.

    parameters_of  Floating arrays; none of what is no model. Those of numpy in a pytree are constants to a gradient
                   flow.
    changed        The model with these values of some parameters: a torch module itself, or a new pytree.
    left_alone     A context that leaves a model as it was found: buffers, hooks, mode, gradients, random state.
    copied         A model of its own, which the user's training does not reach.
    in_single      A model, an array or a container of these with float32 in the place of half precision.
    learns         Whether a part of a layer learns, or is frozen.
    snapshot       The numbers of an array, without a graph.
    call           function(model, *args) where the parameters have these values.
    with_arrays    A model of a function(arrays, *args) whose parameters are `learnt`; `arrays` has both by name.
    started        A cell or field, by its name, together with an encoder of the start or the parameter z0: a model that
                   is called as the former, whose parameters are `name....` and `encoder....` or `z0`. It has both
                   as its attributes `of_states` and `start`.
    parts_of       These two of such a model; a model itself and None of others.
    parameter      A parameter with this value.
    encoded        What an encoder gives of the data of all trials, [trial, unit], or a tuple of such.
    carries_gradient  Whether some part of a start has a gradient that goes back further, as far as arrays say so, or
                   is a function with parameters.
    without_gradient  The same start without.
    in_form        in_form(f, form, args): a field as its user wrote it as one f(t, z, ...) of real states
                   [..., unit], by a `kpflow_dyn._problems.forms.Form`; its parameters are those of f, args have none.
    through        through(model, function): a model function(model, ...) with the parameters of the model, by the same
                   names, and these two as its attributes `through_model` and `function`; where the function has a
                   method `event`, a hybrid one with the events function.event(event).
    field_of       The field as its user wrote it, of one that was made so; and of a term of diffrax.
    nodes          A model and all models that are parts of it, the model first; of a term of diffrax its field.
    function_of    What is called where a model is: of a torch module its forward.
    controlled     The field f(t, z) [unit, channel] of a CDE as f(t, z, X') of an ODE; its parameters are those of f.
    drift_and_diffusion
                   Of f and g, or of one that has both, a model with `.f` and `.g`; what they share are the same
                   parameters. And the noise, where it comes with them.
    pair_in_form   pair_in_form(pair, forms, args): such a model in the forms of its f and its g, as `in_form`.
    on_numpy       A policy on one observation, from numpy to numpy.
    describe       The model in words, for a report.
    """

    def parameters_of(self, model: Any) -> Values: ...
    def changed(self, model: Any, values: Values) -> Any: ...
    def left_alone(self, model: Any) -> AbstractContextManager[Any]: ...
    def copied(self, model: Any) -> Any: ...
    def in_single(self, value: Any) -> Any: ...
    def snapshot(self, array: Array) -> Array: ...
    def call(self, function: Callable[..., Array], model: Any, values: Values, *args: Any) -> Array: ...
    def learns(self, value: Any) -> bool: ...
    def with_arrays(self, function: Callable[..., Array], learnt: Values, constants: Values) -> Any: ...
    def started(self, name: str, of_states: Any, start: Any) -> Any: ...
    def parts_of(self, model: Any) -> tuple[Any, Any]: ...
    def parameter(self, value: Array) -> Array: ...
    def encoded(self, encoder: Any, data: Array) -> Any: ...
    def carries_gradient(self, start: Any) -> bool: ...
    def without_gradient(self, start: Any) -> Any: ...
    def in_form(self, f: Any, form: Any, args: tuple) -> Any: ...
    def through(self, model: Any, function: Any) -> Any: ...
    def field_of(self, f: Any) -> Any: ...
    def nodes(self, model: Any) -> Sequence[Any]: ...
    def function_of(self, f: Any) -> Any: ...
    def controlled(self, f: Any) -> Any: ...
    def drift_and_diffusion(self, f: Any, g: Any) -> tuple[Any, Any]: ...
    def pair_in_form(self, pair: Any, forms: tuple[Any, Any], args: tuple[tuple, tuple]) -> Any: ...
    def on_numpy(self, policy: Any) -> Callable[[np.ndarray], np.ndarray]: ...
    def describe(self, model: Any) -> str: ...


class Transforms(Protocol):
    """Function transforms, and maps over rows.

    jvp         jvp(function, points, tangents) -> value, tangent.
    vjp         vjp(function, *points) -> value, pull.
    vmap        vmap(function, in_dims).
    over_models vmap(function) of one that calls a model with other parameters.
    compiled    The same function, compiled where the framework does so.
    once        The same for one call: compiled sooner, to a program that may be slower.
    each_row    each_row(row function, *rows [time, trial, ...]) -> its outputs [time, trial, ...].
    index       index(element numbers, array) -> an index into arrays like this one.
    linearised  linearised(compiled function, point) -> the derivative there, its transpose, and it after its
                transpose, on blocks [probe, ...]. The point is an array or a list of arrays.
    """

    @property
    def jvp(self) -> Callable[..., Any]: ...
    @property
    def vjp(self) -> Callable[..., Any]: ...
    @property
    def vmap(self) -> Callable[..., Callable[..., Any]]: ...
    @property
    def over_models(self) -> Callable[[Callable[[Array], Array]], Callable[[Array], Array]]: ...
    @property
    def compiled(self) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
    @property
    def once(self) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
    @property
    def each_row(self) -> Callable[..., list[Array]]: ...
    @property
    def index(self) -> Callable[[np.ndarray, Array], Any]: ...
    @property
    def linearised(self) -> Callable[[Callable[[Any], Array], Any], tuple[Callable[[Any], Any], ...]]: ...


class Solving(Protocol):
    """Forward passes, and the maps over steps that they are made of.

    roll_out            The states [trial, time, unit] of a `DiscreteProblem`, and its start [trial, unit].
    run                 The states z_n = step(model, row_n, z_{n-1}) [trial, time, ...] of rows [trial, time, ...];
                        z is the first, and kicks are added to what each step gives. Here and in `each_step` the step
                        is called as the framework calls models: on all trials in torch, one in JAX.
    each_step           step(model, row_n, before_n) [trial, time, ...] for known states before each step. With a
                        `count` this many rows count, what stands at others is of no use, and it has no gradient.
    times_at_once       Of how many times of these states `each_step` is differentiated at once.
    rounded             `count` or somewhat more, so that solves of similar lengths share one compiled program.
    without_gradients   Compute numbers alone.
    check_encoder       Raise where the encoder of a problem's start, if it has one, is random, or its trials influence
                        each other.
    check_field         Raise unless the f of an `ODEProblem` is a model with parameters that maps states to their
                        rates.
    check_called        The shape for each trial of what model.name(t, ...) gives, or the model itself where the name
                        is ""; raise where it fails, has no parameters, is not deterministic or writes to its arguments.
                        The error says `what` it is, and the `form` in which it is called.
    rate_of             The right-hand side (t, z [trial, unit]) -> z' of an `ODEProblem`, its inputs included.
    variational_system  A `kpflow_dyn.ode._variational.System`: an ODE along its path, the times being t_0 and the
                        nodes.
    ode_library         The `kpflow_dyn.ode.Library` of the package that takes an algorithm, or says what it takes.
    understood          Options of a solve with those of the framework's libraries in the package's terms; a TypeError
                        names what stands for others.
    default_algorithm   The algorithm of that library that None stands for.
    """

    def roll_out(self, problem: Any) -> tuple[Array, Array]: ...
    def run(
        self, step: Callable[..., Array], model: Any, rows: Array, z: Array, kicks: Array | None = None
    ) -> Array: ...
    def each_step(self, step: Callable, model: Any, rows: Array, before: Array, count: int | None = None) -> Array: ...
    def times_at_once(self, before: Array) -> int: ...
    def rounded(self, count: int) -> int: ...
    def without_gradients(self) -> AbstractContextManager[Any]: ...
    def check_encoder(self, problem: Any) -> None: ...
    def check_field(self, problem: Any) -> None: ...
    def check_called(
        self, what: str, model: Any, name: str, t: float, arguments: tuple[Any, ...], form: str
    ) -> tuple[int, ...]: ...
    def rate_of(self, problem: Any) -> Callable[[Array, Array], Array]: ...
    def variational_system(self, *args: Any, own: bool) -> Any: ...
    def ode_library(self, alg: Any) -> Any: ...
    def understood(self, given: dict[str, Any]) -> dict[str, Any]: ...
    def default_algorithm(self) -> Any: ...


class Tracing(Protocol):
    """Models traced to graphs, and their tangents.

    Model          Model(call, params): `.parameters` that learn by name; `.tangents(step, rows, before)` of its traces,
                   one after the other; `.derivative(function, at)`, a `kpflow_dyn._flows.referee.Derivative` of
                   function(model, argument) by autograd; `.causes(derivative)`, what a trace may not see, in words;
                   `.decided`, what values of the traced row decided.
    as_called      Of a `DiscreteProblem` whose layer runs over all times at once: (layer, argument of no size) -> its
                   outputs [trial, time, unit], and the slice of the state's units where these are; else None.
    discrete_step  The step(cell, x, z) -> z of a `DiscreteProblem`, on all trials in torch, on one in JAX; and its
                   start [trial, unit].
    flat_start     What an encoder gives as z_0 [trial, unit] of a problem, all parts side by side.
    on_one_trial   A model's function of arrays [trial, ...] as the framework calls it, as one of arrays of a single
                   trial.
    Network        The `kpflow_dyn._implicit.equations.Equations` of a `StaticProblem`.
    FixedPoint     Those of a `FixedPointProblem`; `swapped` where its model is called as f(z, x).
    FreeForm       Those of an `ImplicitProblem`.
    ThroughSolver  ThroughSolver(solution, model): J and its transpose through the solver; None where it has no
                   derivative.
    """

    @property
    def Model(self) -> Callable[..., Any]: ...
    def as_called(self, problem: Any) -> tuple[Callable[..., Array], slice] | None: ...
    def discrete_step(self, problem: Any) -> tuple[Callable[..., Array], Array]: ...
    def flat_start(self, problem: Any, given: Any) -> Array: ...
    def on_one_trial(self, function: Callable[..., Array]) -> Callable[..., Array]: ...
    @property
    def Network(self) -> Callable[[Any], Any]: ...
    @property
    def FixedPoint(self) -> Callable[[Any, bool], Any]: ...
    @property
    def FreeForm(self) -> Callable[[Any], Any]: ...
    @property
    def ThroughSolver(self) -> Callable[..., Any] | None: ...


class Dynamics(Protocol):
    """A step or a field on many states at once.

    Dynamics  Dynamics(problem, x, z)(x [n, input], z [n, unit]) -> F(x, z), dF/dz [n, unit, unit].
    """

    @property
    def Dynamics(self) -> Callable[..., Callable[[Array, Array], tuple[Array, Array]]]: ...


class Objectives(Protocol):
    """A loss of the states as a function of the parameters, twice differentiable.

    run          run(step, cell, x, z0): the states [trial, time, unit], by the fastest road with two derivatives.
    pull_back    The states, and J* on rows [b, n], both differentiable in the parameters.
    Derivatives  Derivatives(function(theta, scheme)): `.value(theta, scheme)`; `.gradient`, the value and the
                 gradient; `.hessian`, products with the Hessian.
    unreached    unreached(loss(values), values): the names of the parameters that the framework's optimisers are given
                 no gradient of, as the loss does not hang on them.
    """

    def run(self, step: Callable[..., Array], cell: Any, x: Array, z0: Array) -> Array: ...
    def pull_back(self, problem: Any) -> tuple[Array, Rows]: ...
    def unreached(self, loss: Callable[[Values], Array], values: Values) -> Sequence[str]: ...
    @property
    def Derivatives(self) -> Callable[..., Any]: ...


class Training(Protocol):
    """A model in training.

    OPTIMIZERS      The framework's optimisers by name.
    Trainee         Trainee(model, readout, data, z0, optimizer, lr, clip, read, loss): `.evaluate(trials)`, then
                    `.step()`.  The data are [trial, time, ...] inputs, targets and mask; read(width of the state)
                    says which units the readout takes; loss(output, targets, mask) is what `evaluate` gives.
                    `.output` is that of the last evaluation, `.model` and `.readout` are as they are by now.
    Rule            Rule(optimizer, lr, clip, like, unreached): an optimiser of vectors of all parameters `like`, by
                    name, as a function of its state: `.begin(theta)`, `.step(state, theta, gradient)`; `.rate` is the
                    learning rate of plain descent, else None. Those `unreached` have no gradient.
    learning_rates  The rates of an optimiser's next step by name; see `LearningRates.from_optimizer`.
    """

    @property
    def OPTIMIZERS(self) -> Mapping[str, Callable[..., Any]]: ...
    @property
    def Trainee(self) -> Callable[..., Any]: ...
    @property
    def Rule(self) -> Callable[..., Any]: ...
    def learning_rates(self, optimizer: Any, model: Any) -> Mapping[str, Any]: ...


class Runtime(Protocol):
    """The framework in this process.

    PACKAGES       The packages whose versions a result hangs on; the last one solves ODEs.
    limit_threads  Compute on this number of threads from now on; False where a process cannot choose that.
    allow_double   Let arrays be float64: JAX rounds them to float32 until it is told.
    devices        What can be computed on, by name.
    settings       How it computes (precision, threads, BLAS), in words by subject.
    example        A small cell, inputs and a start on a device, in float32 or float64.
    """

    PACKAGES: Sequence[str]

    def limit_threads(self, count: int) -> bool: ...
    def allow_double(self) -> None: ...
    def devices(self) -> Sequence[str]: ...
    def settings(self) -> Mapping[str, str]: ...
    def example(self, device: str, dtype: str) -> tuple[Any, Array, Array]: ...


class Part:
    """A module of a backend, imported when it is first used; unlike a module it can be copied and pickled."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(self._path), name)

    def __reduce__(self) -> tuple[Any, ...]:
        return Part, (self._path,)


class Backend:
    """A framework, part by part; each part is a module of its package.

    Attributes:
        name: "torch" or "jax".
    """

    data: Data
    models: Models
    transforms: Transforms
    solving: Solving
    tracing: Tracing
    dynamics: Dynamics
    objectives: Objectives
    training: Training
    runtime: Runtime

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, part: str) -> Any:
        if part not in Backend.__annotations__:
            raise AttributeError(
                f"a backend has no part {part!r}, expected one of {', '.join(Backend.__annotations__)}"
            )
        setattr(self, part, Part(f"kpflow_dyn._{self.name}.{part}"))
        return getattr(self, part)

    def __reduce__(self) -> tuple[Any, ...]:
        return _backend_named, (self.name,)


def _backend_named(name: str) -> Backend:
    return BACKENDS[name]


BACKENDS = {name: Backend(name) for name in ("torch", "jax")}


def backend_of(*values: Any) -> Backend | None:
    """The backend that the first of these values belongs to: a torch tensor or module, or a jax array or pytree.

    None where none of them does; numpy arrays belong to neither.
    """
    for value in values:
        if is_torch_array(value) or is_torch_module(value):
            return BACKENDS["torch"]
        if is_jax_array(value) or _holds_jax_arrays(value):
            return BACKENDS["jax"]
    return None


def backend_for(data: Any, what: str, axes: str, model: Any = None) -> Backend:
    """The backend of a problem with these data; numpy arrays count as data of JAX where the model is not torch's.

    The model is one, or a container of parts or parameters.

    Raises:
        TypeError: for other data, with `what` they are and the `axes` that were expected.
    """
    found = backend_of(data, *(_inside(model) if isinstance(data, np.ndarray) else ()))
    if found is not None:
        return found
    if not isinstance(data, np.ndarray):
        raise TypeError(f"{what} is {type_name(data)}, expected a torch tensor or a jax array {axes}")
    return BACKENDS["jax"]


def backend_of_state(z0: Any, model: Any) -> Backend:
    """The backend of a problem whose start is a pytree of arrays, and of its model."""
    leaf = next((leaf for leaf in _inside(z0) if is_array(leaf)), z0)
    found = None
    if not isinstance(leaf, tuple | list | Mapping | str | float | int | None) and not is_array(leaf):
        found = backend_of(z0, model)  # a pytree of another kind, which its framework knows
    return found or backend_for(leaf, "z0", "[trial, unit], or a pytree of arrays [trial, ...]", model)


def _inside(value: Any) -> Iterator[Any]:
    """What tuples, lists and dicts hold."""
    if isinstance(value, tuple | list | Mapping):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _inside(part)
    else:
        yield value


def _holds_jax_arrays(value: Any) -> bool:
    """Whether a value is a pytree with arrays of JAX, without importing JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
