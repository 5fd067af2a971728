"""Problems: a model together with its inputs and its start, posed before anything is computed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from kpflow_dyn._arrays import Array, is_array
from kpflow_dyn._arrays.complex_numbers import is_complex
from kpflow_dyn._backend import Backend, backend_for, backend_of_state
from kpflow_dyn._problems.arguments import ROWS, Arguments, arguments_of
from kpflow_dyn._problems.checks import check_directed_times, check_inputs, check_rows, laid_out_start
from kpflow_dyn._problems.events import arguments_of_field, refuse_jumps
from kpflow_dyn._problems.forms import Form, called_as
from kpflow_dyn._problems.layouts import Layout
from kpflow_dyn._problems.signatures import check_cell
from kpflow_dyn._problems.starts import check_encoded, laid_out_encoded, rows_of_parameter, whole_start
from kpflow_dyn._problems.translations import refuse_unknown
from kpflow_dyn._shown import Row, Shown, sizes

X_AXES, STATE_AXES = "[trial, time, input]", "[trial, time, unit]"
_ONE_MODEL = "pose it in continuous time, kp.ODEProblem(hybrid, z0, t, x), or give the field between its jumps"


@dataclass(frozen=True, repr=False)
class Problem(Shown):
    """A model and its data, whose framework is chosen when the problem is posed."""

    backend: Backend = field(init=False, repr=False, compare=False)
    instead_of_jumps: ClassVar[str] = _ONE_MODEL  # what to do with a hybrid model; "" where it is taken

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Raise for names that it does not know, by what these are called here, and for jumps that it would drop."""
        cls._check_names(given, cls.__name__)
        for value in (*args, *given.values()):
            refuse_jumps(value, f"{cls.__name__} got", cls.instead_of_jumps)
        return super().__new__(cls)

    def _shown(self) -> tuple[str, list[Row]]:
        title, rows = super()._shown()
        return f"{title} in {self.backend.name}", rows

    @classmethod
    def _check_names(cls, given: dict[str, Any], who: str) -> None:
        refuse_unknown(given, [field.name for field in dataclasses.fields(cls) if field.init], who, cls.__name__)

    @property
    def model(self) -> Any:
        """What holds the parameters: the cell, field, network, map or, of a free form, the parameters themselves."""
        return getattr(self, self._first)

    def with_model(self, model: Any) -> Self:
        """The same problem of another model."""
        return self.remake(**{self._first: model})

    @property
    def _first(self) -> str:
        """The name of the field that is the model."""
        return next(field.name for field in dataclasses.fields(self) if field.init)

    @property
    def data(self) -> Array:
        """An array that it is posed with, in its dtype and on its device."""
        return self.x  # type: ignore[attr-defined]

    def remake(self, **changes: Any) -> Self:
        """A copy with some fields replaced: `problem.remake(x=...)`."""
        self._check_names(changes, "remake")
        return dataclasses.replace(self, **changes)

    def _set(self, **values: Any) -> None:
        """Fields as they are kept, set while the problem is posed."""
        for name, value in values.items():
            object.__setattr__(self, name, value)


class StartedProblem(Problem):
    """A problem whose states follow from z_0, which may learn: as a parameter, or by an encoder of data."""

    def _shown(self) -> tuple[str, list[Row]]:
        title, rows = super()._shown()
        axes = {"x": ("trial", "time", "input"), "z0": () if self.encodes else ("trial", "unit")}
        given: dict[str, Any] = {name: getattr(self, name, None) for name in axes}
        named = {n: sizes(axes[n], a) for n, a in given.items() if is_array(a) and a.ndim == len(axes[n])}
        return title, [row if isinstance(row, str) else (row[0], named.get(*row)) for row in rows]

    encoder: Any  # a model data -> z_0; or z_0 itself [unit], as a parameter; None where the start is given
    encodes_inputs: bool = False  # whether its data are the samples of the inputs, as no others were given
    given_as = "z0"  # the field that has the start, or the data of the encoder

    @property
    def encodes(self) -> bool:
        """Whether z_0 is computed from data."""
        return not (self.encoder is None or is_array(self.encoder))

    @property
    def of_states(self) -> Any:
        """The cell or field."""
        return getattr(self, self._first)

    @property
    def model(self) -> Any:
        """The cell or field; where the start learns, this together with what gives it."""
        part = self.of_states
        return part if self.encoder is None else self.backend.models.started(self.model_name, part, self.encoder)

    @property
    def model_name(self) -> str:
        """What stands before the names of its parameters, where the start learns."""
        return self._first

    def with_model(self, model: Any) -> Self:
        of_states, encoder = self.backend.models.parts_of(model)
        return self.remake(**self._holding(of_states) | ({} if encoder is None else {"encoder": encoder}))

    def _holding(self, of_states: Any) -> dict[str, Any]:
        """The fields that a cell or field is given by."""
        return {self._first: of_states}

    def learn_start(self) -> Self:
        """The same problem with z_0, shared by all trials, as a parameter `z0` that learns beside those of the model.

        The latter have the name of their field in front, such as `cell.weight_hh` or `f.weight`. The parameter is a
        copy of the problem's z0. (A start that is computed learns by `encoder`; a readout by
        `flow.output(C, learn=True)`.)

        Raises:
            ValueError: a start that differs between trials, or that is an encoder's.

        >>> import torch, kpflow_dyn as kp
        >>> problem = kp.DiscreteProblem(torch.nn.RNNCell(3, 8), torch.randn(2, 5, 3)).learn_start()
        >>> list(kp.linearize(kp.solve(problem)).parameters)
        ['z0', 'cell.weight_ih', 'cell.weight_hh', 'cell.bias_ih', 'cell.bias_hh']
        """
        if self.encoder is not None:
            raise ValueError("the start learns already, by the encoder; leave out learn_start(), or encoder=")
        start = self._start()
        if not bool((start == start[:1]).all()):
            raise ValueError(
                "the start z0 differs between trials; one that learns is shared by all, z0 [unit]. Where it is "
                "computed from data of each trial, give these as z0, and the model that computes it as encoder="
            )
        return self.remake(encoder=self.backend.models.parameter(start[0]))

    def _start(self) -> Array:
        """z_0 [trial, unit]."""
        raise NotImplementedError

    def _take_parameter(self) -> None:
        """z_0 itself as a parameter of the framework, where one was given in the place of an encoder."""
        if is_array(self.encoder):
            given = self.backend.data.as_floats(self.encoder, "encoder", "[unit], z_0 as a parameter, or a model")
            self._set(encoder=self.backend.models.parameter(given))

    def _take_data(self, samples: Any) -> None:
        """The samples of the inputs as the data of the encoder, where no others are given."""
        if self.encodes and getattr(self, self.given_as) is None:
            data = samples[1] if isinstance(samples, tuple | list) and len(samples) == 2 else samples
            if not is_array(data):
                raise TypeError(
                    f"an encoder needs data: pass them as {self.given_as} [trial, ...]; or, to encode the inputs, "
                    "samples as x"
                )
            self._set(**{self.given_as: data}, encodes_inputs=True)

    def remake(self, **changes: Any) -> Self:
        if self.encodes_inputs and changes.get("encoder", self) is not None:
            changes = {self.given_as: None} | changes
        if is_array(self.encoder) and self.given_as in changes and "encoder" not in changes:
            return self.remake(encoder=None, **changes).learn_start()
        return super().remake(**(self._given(changes) | changes))

    def _given(self, _changes: dict[str, Any]) -> dict[str, Any]:
        """The fields as they were given, where these are not those that are kept."""
        return {}


class OverTimes(StartedProblem):
    """What problems in continuous time share: a start z0 of any form, and t, a grid of times or a span."""

    z0: Any  # the numbers of the start [trial, unit]
    t: Any
    encoded: Any  # the data of the encoder, where there is one
    form: Form

    @property
    def data(self) -> Array:
        """An array that it is posed with."""
        return self.z0

    @property
    def is_span(self) -> bool:
        """Whether t is a span (t0, t1) rather than a grid."""
        return len(self.t) == 2

    @property
    def start_given(self) -> Any:
        """What the states follow from: the start, or the data of the encoder."""
        return self.encoded if self.encodes else self.z0

    def _laid_out(self, given: Any, order: int = 1) -> tuple[Layout, Array]:
        """The layout of the start, or of what the encoder gives of these data, and its numbers [trial, unit]."""
        f = getattr(self, self._first)
        if self.encodes:
            self._set(encoded=check_encoded(given, self.given_as))
            return laid_out_encoded(self.backend, f, self.encoder, self.encoded, order)
        layout, z0 = laid_out_start(whole_start(f, given), self.backend, order)
        self._take_parameter()
        return layout, z0 if self.encoder is None else rows_of_parameter(self.backend, self.encoder, z0)

    def _start(self) -> Array:
        return self.z0

    def remake(self, **changes: Any) -> Self:
        z0: Any = changes.get(self.given_as)
        flat = is_array(z0) and z0.ndim == 2 and not is_complex(z0) and not self.encodes
        if flat and self._first not in changes and not self.form.is_plain:
            changes[self.given_as] = self.unflatten(z0)
        return super().remake(**changes)

    def _given(self, changes: dict[str, Any]) -> dict[str, Any]:
        encodes = self.encodes and changes.get("encoder", self) is not None
        return {self.given_as: self.encoded if encodes else self.unflatten(self.z0)}

    def with_parts(self, **parts: Any) -> Self:
        """A copy with other parts, which are as the problem keeps them."""
        changed = copy.copy(self)
        changed._set(**parts)
        return changed

    def unflatten(self, state: Array) -> Any:
        """A state [..., unit] in the form of z0: its pytree, of arrays [..., *shape].

        Raises:
            ValueError: a state with another number of units.

        >>> import torch, kpflow_dyn as kp
        >>> problem = kp.ODEProblem(kp.models.MLPField(6, 8), torch.randn(4, 2, 3), [0.0, 0.5, 1.0])
        >>> problem.z0.shape, problem.unflatten(torch.zeros(4, 3, 6)).shape
        (torch.Size([4, 6]), torch.Size([4, 3, 2, 3]))
        """
        return self.form.layout.split(state)


@dataclass(frozen=True, repr=False)
class DiscreteProblem(StartedProblem):
    """A recurrent model z_t = cell(x_t, z_{t-1}), whose state is S = (z_1, ..., z_T) [trial, time, unit].

    Args:
        cell: torch's nn.RNN, nn.GRU or nn.LSTM with any number of layers; one of their Cells; or any nn.Module called
            as `cell(x_t, z)` that gives the next z. Here x_t is [trial, input], and z is [trial, unit] or a tuple of
            such arrays. Its trials must not influence each other. In JAX an equinox cell or any other callable pytree,
            called on one trial: x_t [input] and z [unit].
        x: inputs [trial, time, input] in this order, for any `batch_first` of the layer: a torch tensor or a jax array.
        z0: the state before the first step: [trial, unit]; [unit] for all trials; or torch's own h_0 [layer, trial,
            unit] or (h_0, c_0). Zeros when None. The unit axis holds the h of all layers one after another, then the c
            of all layers. For a complex state, z0 is complex; the unit axis then holds the real parts of all units, and
            after them the imaginary parts. With an encoder, z0 is the encoder's data [trial, ...]; x when None.
        encoder: a model that gives the start, z_0 = encoder(z0), in one of the forms above. It learns together with the
            cell. In torch it is an nn.Module called on all trials at once, which must not influence each other. In JAX
            it is a callable pytree, called on one trial. The parameters are then `cell....` and `encoder....`.

    Raises:
        TypeError, ValueError: inputs are not finite floats [trial, time, input] of torch or JAX, or the data of an
            encoder are not a finite array.
    Source: docs/theory.md, "One constraint, one kernel".

    >>> import torch, kpflow_dyn as kp
    >>> problem = kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.zeros(2, 5, 3))
    >>> tuple(kp.solve(problem).state.shape)
    (2, 5, 8)
    """

    cell: Any
    x: Array
    z0: Any = None
    encoder: Any = None

    def __post_init__(self) -> None:
        backend = backend_for(self.x, "x", X_AXES, (self.cell, self.encoder))
        check_cell(self.cell, backend.models.function_of, stacklevel=3)
        x = backend.data.as_floats(self.x, "x", X_AXES)
        backend.data.check_inputs(x)
        self._set(backend=backend, x=x)
        self._take_parameter()
        self._take_data(x)
        if self.encodes:
            self._set(z0=check_encoded(self.z0, trials=len(x)))

    def _start(self) -> Array:
        return self.backend.tracing.discrete_step(self)[1]


@dataclass(frozen=True, repr=False)
class ODEProblem(OverTimes):
    """A model in continuous time, z' = f(t, z) or z' = f(t, z, x(t)) from z(t_0) = z0, for each trial.

    Args:
        f: in torch an nn.Module called on all trials at once, f(t, z [trial, unit]) or f(t, z, x_t [trial, input]),
            where t is a 0-dim tensor. It gives z' [trial, unit]. Its trials must not influence each other. In JAX a
            callable pytree (an equinox module, `jax.tree_util.Partial(function, parameters)`), called on one trial as
            f(t, z [unit]) or f(t, z, x_t [input]). It gives z' [unit]. An ODETerm of diffrax stands for its field, a
            MultiTerm of several for their sum.
        z0: the state at the first time [trial, unit], a torch tensor or a jax array. It decides the framework. It may
            also be an array [trial, ...] of any shape, or a pytree (tuple, dict, ...) of such arrays. Then f gets and
            gives this form, and the solution's state [trial, time, unit] has all leaves flattened side by side, in the
            order of the framework's pytrees; see `unflatten`. For a complex leaf the real parts of all its units come
            first. With an encoder, its data [trial, ...], when None the samples of x; `problem.encoded` has them.
        t: a grid of times at which you want the state; or two numbers (t0, t1), a span, on which the solver chooses the
            times (Gauss points of its steps). Their unit is the unit of time in the equation. If they decrease, time
            runs backward from z0 at the first time.
        x: inputs, in one of these forms: None; samples [trial, time, input] on the grid t; a pair (times [n], samples
            [trial, n, input]) whose times cover those of t; or a callable of t that gives [trial, input], or [input]
            for all trials, made of the framework's own functions. Samples are interpolated linearly, and held constant
            outside of their times. A callable that jumps must name the times of its jumps in its attribute `jumps` [n]:
            `x.jumps = [0.3]`. Steps end there, so that on each side of a jump a step uses the x(t) of that side.
        args: constants of all trials, given to f as its last argument: f(t, z, args) or f(t, z, x_t, args). They may be
            a number, an array or any pytree. A field that must have `args` gets None if there are none, as in diffrax.
            As in scipy, a tuple is given part by part to a field that takes several more arguments, with or without
            defaults, or `*args`. The tuple stays whole for a field that takes one more argument, and for an argument
            that is called args, params or p. Arrays in args do not learn, unless they are parameters of f.
        order: 2 for z'' = f(t, z, z'), whose state is the pair (z, z'); see `SecondOrderProblem`.
        encoder: a model that gives the start, z(t_0) = encoder(z0), in one of its forms. It learns together with f. In
            torch it is an nn.Module called on all trials at once, which must not influence each other. In JAX it is a
            callable pytree, called on one trial. The parameters are then `f....` and `encoder....`.

    `problem.z0`, `problem.f`, `problem.t` and `problem.x` belong to the real state [trial, unit] and to increasing
    times (-t if time runs backward). A solution's t and state have your own form and order. `remake` takes the same
    arguments as the problem.

    Raises:
        TypeError, ValueError: the start, data, times, inputs or args have a wrong type, or do not fit together.
    Source: docs/theory.md, "Continuous time and measures".

    >>> import torch, kpflow_dyn as kp
    >>> problem = kp.ODEProblem(kp.models.CTRNNField(8), torch.randn(2, 8), [0.0, 0.5, 1.0])
    >>> kp.solve(problem).state.shape
    torch.Size([2, 3, 8])
    """

    f: Any
    z0: Array
    t: Any
    x: Any = None
    args: Any = field(default=None, kw_only=True)
    order: int = field(default=1, kw_only=True)
    encoder: Any = field(default=None, kw_only=True)
    encoded: Any = field(init=False, repr=False, compare=False, default=None)
    form: Form = field(init=False, repr=False, compare=False)
    arguments: tuple = field(init=False, repr=False, compare=False)
    instead_of_jumps = ""

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"order is {self.order!r}, expected 1, of z' = f(t, z), or 2, of z'' = f(t, z, z')")
        self._take_data(self.x)
        self._set(backend=backend_of_state(self.z0, self.f))
        (t, backward), (layout, z0) = check_directed_times(self.t), self._laid_out(self.z0, self.order)
        form, backend, f = Form(layout, self.order, backward), self.backend, self.backend.models.field_of(self.f)
        if hasattr(f, "sampling") and not form.is_plain:
            raise ValueError(_OF_SAMPLED_LOOPS)
        arguments = arguments_of_field(f, self.args, self.called_with, backend.models.function_of)
        f = f if form.is_plain and not arguments else backend.models.in_form(f, form, arguments)
        x = check_inputs(form.inputs(self.x), z0, t, backend)
        self._set(f=f, t=t, z0=z0, x=x, form=form, arguments=arguments)

    @property
    def called_with(self) -> list[str]:
        """What f is called with before args."""
        return ["t", "z", *["z'"] * (self.order - 1), *["x_t"] * (self.x is not None)]

    def _given(self, changes: dict[str, Any]) -> dict[str, Any]:
        given = {"f": self.backend.models.field_of(self.f), "t": self.form.time(self.t)}
        return super()._given(changes) | given | {"x": self.form.inputs(self.x)}

    def called(self, state: str, inputs: str) -> str:
        """How f is called, where these are the axes of the state and of the inputs."""
        if self.form.is_plain and self.args is None:
            seen = "z, and the problem has no x" if self.x is None else "[z, x_t]"
            policy = f"; its policy gets {seen}" * hasattr(getattr(self.f, "flow", self.f), "policy")
            return f"f(t, z [{state}]), or f(t, z, x_t [{inputs}]) where the problem has inputs x{policy}"
        parts = f", with z of the form of z0: {self.form.layout}" if not self.form.layout.is_plain else f", z [{state}]"
        return called_as(self.called_with, self.args is not None) + parts


_OF_SAMPLED_LOOPS = (
    "a sampled loop has a real state [trial, unit], the plant's or that of loop.start(...), and times that increase; "
    "put parts of a state side by side"
)


@dataclass(frozen=True, repr=False)
class StaticProblem(Problem):
    """A network without time steps of its own, y = net(x). Its state is made of its intermediate values.

    F(S, theta; x) = S - G(S, theta; x), where G computes each value of S from those before it; P = (1 - dG/dS)^{-1} is
    forward substitution through the network.

    Args:
        net: in torch an nn.Module called on all trials at once, whose trials must not influence each other: an MLP, a
            convolutional or residual network, attention, a transformer, a sequence model, nn.MultiheadAttention (as
            self-attention), or an nn.RNN, nn.GRU or nn.LSTM that is no step map (bidirectional, projected). In the
            inputs and outputs of these torch layers trials come first; `batch_first` does not change this. (A subclass
            with its own forward is called as it is.) In JAX a callable pytree, called on one trial.
        x: inputs [trial, ...], floats, integers (tokens) or booleans, a torch tensor or a jax array; or a tuple of
            arguments of `net`, or a dict of arguments by name. The trials are the rows of the first array among these,
            and of all arrays with as many rows. All trials share the other arrays. Other values, such as None or
            `use_cache=False`, are passed as they are.
        state: the names of the values that form the state. A submodule stands for its output, in the order of the
            calls; "" is the network itself. A tuple or list counts by its first array; "encoder.0:1" is another part of
            a module's output. Where the network gives a mapping, a dataclass or a tuple, use the names of its parts:
            "logits", "hidden_states.3" (":logits", if a submodule also has that name). When None, the state is the
            outputs of all uses of weights; a product and the bias added to it count as one. (If the network cannot be
            traced, it is its output alone.) Values of one shape lie on an axis "site". Values with the same number of
            tokens lie side by side on the axis "unit". Others are flattened. A complex value has its real parts first,
            then its imaginary parts, on its axis of units.
        axes: the names of the axes of these values as the network gives them, such as ("trial", "time", "unit") or
            ("time", "trial", "unit"). Then `state` is the output when it is None. The state is [trial, time, ..., unit]
            in this order, with all values side by side on the units. Functions that need times then work on it. If a
            value has one axis fewer, "time" (or else the first name) counts the calls of its module in their order, as
            for a cell that is called in a loop. If the loop runs backwards, the first state belongs to the last input.
            Without "trial" the network is called once, on x as it is given, which is one trial: ("node", "unit") of a
            graph. Integers beside floats, such as edges, are then fixed, and the network may branch on them. (In JAX a
            network is called on one trial; "trial" is the axis that it is mapped over.)
        shared: the arguments that all trials share, by their place or name; () for none. Give it where lengths do not
            decide, such as positions of as many tokens as there are trials.

    Raises:
        TypeError, ValueError: inputs without an array, or not finite; axes without a "unit". `solve` refuses a network
            that does not fit.
    Source: docs/theory.md, "P: how kicks travel".

    >>> import torch, kpflow_dyn as kp
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> solution = kp.solve(kp.StaticProblem(net, torch.randn(5, 3)))
    >>> tuple(solution.state.shape), solution.sites
    ((5, 10), ('0.weight + 0.bias', '2.weight + 2.bias'))
    """

    net: Any
    x: Any
    state: str | Sequence[str] | None = None
    axes: Sequence[str] | None = None
    shared: Sequence[str | int] | None = None
    arguments: Arguments = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        axes = _checked_axes(self.axes)
        alone = axes is not None and "trial" not in axes
        backend, x, arguments = arguments_of(self.x, self.shared, alone, self.net)
        whole = "" if self.state is None and axes is not None else self.state
        state = (whole,) if isinstance(whole, str) else whole
        self._set(backend=backend, x=x, arguments=arguments, state=state, axes=axes)

    @property
    def data(self) -> Array:
        return self.arguments.like


def _checked_axes(axes: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names of the axes of a network's values."""
    if axes is None:
        return None
    names = tuple(axes)
    if isinstance(axes, str) or len(set(names)) != len(names) or "unit" not in names:
        raise ValueError(
            f'axes is {axes!r}, expected distinct names of the axes of the state as the network gives it, "unit" among '
            'them, such as ("trial", "time", "unit")'
        )
    return names


@dataclass(frozen=True, repr=False)
class FixedPointProblem(Problem):
    """A model at rest, z = f(x, z) for each trial, such as a steady state of a network or a deep equilibrium model.

    Args:
        f: in torch an nn.Module called on all trials as f(x [trial, ...], z [trial, unit]), such as nn.RNNCell. In JAX
            a callable pytree, called on one trial. If its arguments are named z and x, in this order, it is called as
            f(z, x).
        x: inputs [trial, ...].
        z0: where the search starts, [trial, unit] or [unit]; zeros of `f.hidden_size` when None. If it is complex, the
            state is [trial, 2 unit], with all real parts first.

    Raises:
        TypeError, ValueError: the inputs are not a finite array. `solve` refuses an f that does not contract.
    Source: Bai, Kolter, Koltun, "Deep equilibrium models", arXiv:1909.01377.

    >>> import torch, kpflow_dyn as kp
    >>> solution = kp.solve(kp.FixedPointProblem(torch.nn.RNNCell(3, 8), torch.randn(5, 3)))
    >>> tuple(solution.state.shape), solution.success
    ((5, 8), True)
    """

    f: Any
    x: Array
    z0: Any = None

    def __post_init__(self) -> None:
        x = check_rows(self.x, "x", ROWS, self.f)
        self._set(backend=backend_for(x, "x", ROWS), x=x)


@dataclass(frozen=True, repr=False)
class ImplicitProblem(Problem):
    """A model in its free form, F(S, theta; x) = 0 for the whole state at once, all trials and times included.

    Args:
        F: F(state, params), or F(state, params, x) where x is given: as many equations as the state has entries, in its
            form, made of the framework's own functions.
        state: S, a solution of F = 0, or where Newton's method starts from: [unit], [trial, unit] or
            [trial, time, unit]. Of a complex one the solution's state has all real parts first on the units.
        params: in torch an nn.Module or tensors by name; in JAX a pytree of arrays.
        x: the third argument of F: an array of any shape, or None.

    Raises:
        TypeError, ValueError: a state of another form, or one that is not finite.
    Source: docs/theory.md, "One constraint, one kernel".

    >>> import torch, kpflow_dyn as kp
    >>> weight = {"w": torch.tensor([[2.0, 0.0], [1.0, 4.0]])}
    >>> problem = kp.ImplicitProblem(lambda s, p, x: s @ p["w"].T - x, torch.zeros(1, 2), weight, torch.ones(1, 2))
    >>> kp.solve(problem).state
    tensor([[0.5000, 0.1250]])
    """

    F: Any
    state: Array
    params: Any
    x: Array | None = None

    @property
    def model(self) -> Any:
        return self.params

    @property
    def data(self) -> Array:
        return self.state

    def __post_init__(self) -> None:
        state = check_rows(self.state, "the state", STATE_AXES, self.params)
        if state.ndim > 3 or not ("float" in str(state.dtype) or is_complex(state)):
            raise ValueError(f"the state is {state.dtype}{list(state.shape)}, expected floats [trial, time, unit]")
        self._set(backend=backend_for(state, "the state", STATE_AXES), state=state)
