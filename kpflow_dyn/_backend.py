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

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from kpflow_dyn._arrays import Array, Rows, is_jax_array, is_torch_array, is_torch_module

Values = dict[str, Array]
RowFunction = Callable[..., list[Array]]


class Data(Protocol):
    """Arrays of the framework, taken in and checked."""

    def is_own(self, value: Any) -> bool:
        """Whether a value is an array of the framework."""
        ...

    def as_floats(self, values: Any, what: str, axes: str) -> Array:
        """Floats as an array of the framework; numpy arrays too where the framework takes them.

        Raises:
            TypeError: for other values, with `what` they are and the `axes` that were expected.
        """
        ...

    def as_rows(self, values: Any, what: str, axes: str) -> Array:
        """The same for floats and integers."""
        ...

    def check_inputs(self, x: Array) -> None:
        """Raise unless x is [trial, time, input], of floats, finite, with no empty axis."""
        ...

    def inputs_at(self, function: Callable[[Array], Array], times: np.ndarray, like: Array) -> Array:
        """x(t) [trial, n, input] of a callable at times [trial, n], in the dtype and on the device of `like`."""
        ...


class Models(Protocol):
    """A model's parameters by name, and models made of functions."""

    def parameters_of(self, model: Any) -> Values:
        """Floating arrays; none of what is no model. Those of numpy in a pytree are constants to a gradient flow."""
        ...

    def changed(self, model: Any, values: Values) -> Any:
        """The model with these values of some parameters: a torch module itself, or a new pytree."""
        ...

    def copied(self, model: Any) -> Any:
        """A model of its own, which the user's training does not reach."""
        ...

    def snapshot(self, array: Array) -> Array:
        """The numbers of an array, without a graph."""
        ...

    def call(self, function: Callable[..., Array], model: Any, values: Values, *args: Any) -> Array:
        """function(model, *args) where the parameters have these values."""
        ...

    def with_arrays(self, function: Callable[..., Array], learnt: Values, constants: Values) -> Any:
        """A model of a function(arrays, *args) whose parameters are `learnt`; `arrays` has both by name."""
        ...

    def learnt_start(self, cell: Any, x: Array, z0: Any) -> Any:
        """A cell with the start z0 among its parameters; see `DiscreteProblem.learn_start`."""
        ...

    def on_numpy(self, policy: Any) -> Callable[[np.ndarray], np.ndarray]:
        """A policy on one observation, from numpy to numpy."""
        ...

    def describe(self, model: Any) -> str:
        """The model in words, for a report."""
        ...


class Transforms(Protocol):
    """Function transforms, and maps over rows."""

    @property
    def jvp(self) -> Callable[..., Any]:
        """jvp(function, points, tangents) -> value, tangent."""
        ...

    @property
    def vjp(self) -> Callable[..., Any]:
        """vjp(function, *points) -> value, pull."""
        ...

    @property
    def vmap(self) -> Callable[..., Callable[..., Any]]:
        """vmap(function, in_dims)."""
        ...

    @property
    def compiled(self) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """The same function, compiled where the framework does so."""
        ...

    @property
    def each_row(self) -> Callable[..., list[Array]]:
        """each_row(row function, *rows [time, trial, ...]) -> its outputs [time, trial, ...]."""
        ...

    @property
    def index(self) -> Callable[[np.ndarray, Array], Any]:
        """index(element numbers, array) -> an index into arrays like this one."""
        ...

    @property
    def linearised(self) -> Callable[[Callable[[Array], Array], Array], tuple[Rows, Rows]]:
        """linearised(compiled function, point) -> the derivative there and its transpose, on blocks [probe, ...]."""
        ...


class Solving(Protocol):
    """Forward passes, and the maps over steps that they are made of."""

    def roll_out(self, problem: Any) -> tuple[Array, Array]:
        """The states [trial, time, unit] of a `DiscreteProblem`, and its start [trial, unit]."""
        ...

    def run(self, step: Callable[..., Array], model: Any, rows: Array, z: Array) -> Array:
        """The states z_n = step(model, row_n, z_{n-1}) [trial, time, ...] of rows [trial, time, ...]; z is the first.

        Here and in `each_step` the step is called as the framework calls models: on all trials in torch, one in JAX.
        """
        ...

    def each_step(self, step: Callable[..., Array], model: Any, rows: Array, before: Array) -> Array:
        """step(model, row_n, before_n) [trial, time, ...] for known states before each step, without gradients."""
        ...

    def rounded(self, count: int) -> int:
        """So many steps or a few more, as many as one compiled program serves."""
        ...

    def without_gradients(self) -> AbstractContextManager[Any]:
        """Compute numbers alone."""
        ...

    def check_field(self, problem: Any) -> None:
        """Raise unless the f of an `ODEProblem` is a model with parameters that maps states to their rates."""
        ...

    def rate_of(self, problem: Any) -> Callable[[Array, Array], Array]:
        """The right-hand side (t, z [trial, unit]) -> z' of an `ODEProblem`, its inputs included."""
        ...

    def variational_system(self, problem: Any, model: Any, path: Any, times: np.ndarray, alg: Any) -> Any:
        """A `kpflow_dyn.ode._variational.System`: an ODE along its path, the times being t_0 and the nodes."""
        ...

    def ode_library(self) -> Any:
        """The `kpflow_dyn.ode.Library` that comes with the package."""
        ...

    def default_algorithm(self) -> Any:
        """The algorithm of that library that None stands for."""
        ...


class Tracing(Protocol):
    """Models traced to graphs, and their tangents."""

    @property
    def Model(self) -> Callable[..., Any]:
        """Model(call, params): `.parameters` that learn by name, and `.tangent(step, rows, before, check)`."""
        ...

    def discrete_step(self, problem: Any) -> Callable[..., Array]:
        """The step(cell, x, z) -> z of a `DiscreteProblem`; on all trials in torch, on one in JAX."""
        ...

    def on_one_trial(self, function: Callable[..., Array]) -> Callable[..., Array]:
        """A model's function of arrays [trial, ...] as the framework calls it, as one of arrays of a single trial."""
        ...

    def network(self, problem: Any) -> Any:
        """A `StaticProblem` traced on one trial."""
        ...

    def fixed_point(self, problem: Any, swapped: bool) -> Any:
        """A `FixedPointProblem` traced on one trial; `swapped` where its model is called as f(z, x)."""
        ...

    def free_form(self, problem: Any) -> Any:
        """An `ImplicitProblem` traced as it is."""
        ...

    @property
    def ThroughSolver(self) -> Callable[..., Any] | None:
        """ThroughSolver(solution, model): J and its transpose through the solver; None where it has no derivative."""
        ...


class Dynamics(Protocol):
    """A step or a field on many states at once."""

    @property
    def Dynamics(self) -> Callable[..., Callable[[Array, Array], tuple[Array, Array]]]:
        """Dynamics(problem, x, z)(x [n, input], z [n, unit]) -> F(x, z), dF/dz [n, unit, unit]."""
        ...

    def units_of(self, problem: Any) -> int:
        """The width of a state."""
        ...


class Objectives(Protocol):
    """A loss of the states as a function of the parameters, twice differentiable."""

    def rollout(self, problem: Any) -> Callable[[Any, Any], Array]:
        """(cell, None) -> the states of a `DiscreteProblem`."""
        ...

    def pull_back(self, problem: Any) -> tuple[Array, Rows]:
        """The states, and J* on rows [b, n], both differentiable in the parameters."""
        ...

    @property
    def Derivatives(self) -> Callable[..., Any]:
        """Derivatives(function(theta, scheme)): `.gradient(theta, scheme)`; `.both` with the value and the Hessian."""
        ...


class Training(Protocol):
    """A model in training."""

    @property
    def OPTIMIZERS(self) -> Mapping[str, Callable[..., Any]]:
        """The framework's optimisers by name."""
        ...

    @property
    def Trainee(self) -> Callable[..., Any]:
        """Trainee(model, readout, data, z0, optimizer, lr, clip, read, loss): `.evaluate(trials)`, then `.step()`.

        The data are [trial, time, ...] inputs, targets and mask; read(width of the state) says which units the readout
        takes; loss(output, targets, mask) is what `evaluate` gives. `.model` and `.readout` are as they are by now.
        """
        ...

    def learning_rates(self, optimizer: Any, model: Any) -> Mapping[str, Any]:
        """The rates of an optimiser's next step by name; see `LearningRates.from_optimizer`."""
        ...


class Runtime(Protocol):
    """The framework in this process."""

    PACKAGES: Sequence[str]
    """The packages whose versions a result hangs on; the last one solves ODEs."""

    def limit_threads(self, count: int) -> bool:
        """Compute on so many threads from now on, in this process; False where a process cannot choose that."""
        ...

    def allow_double(self) -> None:
        """Let arrays be float64: JAX rounds them to float32 until it is told."""
        ...


class Backend:
    """A framework, part by part; each part is a module of its package, imported when it is first asked for.

    Attributes:
        name: "torch" or "jax".
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return BACKENDS.__getitem__, (self.name,)

    def _part(self, name: str) -> Any:
        return importlib.import_module(f"kpflow_dyn._{self.name}.{name}")

    @property
    def data(self) -> Data:
        """See `Data`."""
        return self._part("data")

    @property
    def models(self) -> Models:
        """See `Models`."""
        return self._part("models")

    @property
    def transforms(self) -> Transforms:
        """See `Transforms`."""
        return self._part("transforms")

    @property
    def solving(self) -> Solving:
        """See `Solving`."""
        return self._part("solving")

    @property
    def tracing(self) -> Tracing:
        """See `Tracing`."""
        return self._part("tracing")

    @property
    def dynamics(self) -> Dynamics:
        """See `Dynamics`."""
        return self._part("dynamics")

    @property
    def objectives(self) -> Objectives:
        """See `Objectives`."""
        return self._part("objectives")

    @property
    def training(self) -> Training:
        """See `Training`."""
        return self._part("training")

    @property
    def runtime(self) -> Runtime:
        """See `Runtime`."""
        return self._part("runtime")


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

    Raises:
        TypeError: for other data, with `what` they are and the `axes` that were expected.
    """
    found = backend_of(data, model if isinstance(data, np.ndarray) else None)
    if found is not None:
        return found
    if not isinstance(data, np.ndarray):
        raise TypeError(f"{what} is {type(data).__name__}, expected a torch tensor or a jax array {axes}")
    return BACKENDS["jax"]


def _holds_jax_arrays(value: Any) -> bool:
    """Whether a value is a pytree with arrays of JAX, without importing JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(value))
