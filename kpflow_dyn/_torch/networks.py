"""Models of torch that are no steps, as their users call them and traced; see `kpflow_dyn._implicit.equations`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kpflow_dyn._arrays.complex_numbers import in_halves, in_pairs, of_halves
from kpflow_dyn._backend import BACKENDS
from kpflow_dyn._implicit.constraint import TracedConstraint, network_of, network_of_uses
from kpflow_dyn._implicit.equations import check_alone, check_same
from kpflow_dyn._implicit.form import Form
from kpflow_dyn._implicit.results import Unknown, values_named
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.problems import FixedPointProblem, ImplicitProblem, StaticProblem
from kpflow_dyn._shown import type_name
from kpflow_dyn._torch.causes import rounding_of
from kpflow_dyn._torch.cells import initial_state
from kpflow_dyn._torch.checks import check_module, is_inexact
from kpflow_dyn._torch.model import Model
from kpflow_dyn._torch.trace import Applied, differentiable_attention, trace
from kpflow_dyn._torch.watching import (
    Change,
    Heard,
    Places,
    as_they_are,
    named_giver,
    of_one_trial,
    place_named,
    place_of,
    watched,
)
from kpflow_dyn.tracing._graph import Role

OUTPUT = values_named([""], [])
TRANSFORMS = BACKENDS["torch"].transforms
IN_PLACE = "the model writes to its arguments in place; work on copies (x = x + ..., not x += ...)"


class Network:
    """Values of a network, of named modules or its own, as its state."""

    form = Form.NETWORK

    def __init__(self, problem: StaticProblem) -> None:
        self.call, self.problem, given = problem.net, problem, problem.arguments
        own = [{name: array.clone() for name, array in arrays.items()} for arrays in (given.rows, given.shared)]
        self.given = replace(given, rows=own[0], shared=own[1])  # whose user may fill a batch anew
        self.rows = list(self.given.rows.values())
        _check(self.call, self.given.like)
        self.values = values_named(problem.state or ("",), [name for name, _ in self.call.named_modules() if name])
        with torch.no_grad(), differentiable_attention():
            self.places, values = self._look()
            self.start = self.places.join(values)
            if self.start.numel() == 0:
                raise ValueError(f"the state is {tuple(self.start.shape)}, which holds no number; nothing to analyse")
            check_alone(self._alone, self.start, lambda: _rounding(lambda: self.kicked(self.call, 0 * self.start)))
        self.layout = self.places.layout

    def model(self, params: Choice) -> Model:
        """The network with the parameters that learn."""
        return Model(self.call, params)

    def residual(self, call: nn.Module, state: Tensor) -> Tensor:
        """S - G(S)."""
        given = self.places.split(state)
        found = self._watched(call, self.rows, lambda i, value: (value, given[i]))
        return state - self.places.join([value for _, value in found])

    def kicked(self, call: nn.Module, kicks: Tensor) -> Tensor:
        """S, where each value is kicked."""
        parts = self.places.split(kicks)

        def kick(number: int, value: Tensor) -> tuple[Tensor, Tensor]:
            return (moved := value + parts[number]), moved

        return self.places.join([value for _, value in self._watched(call, self.rows, kick)])

    def traced(self) -> TracedConstraint:
        """Traced on its first trial."""
        calls: list[str] = []

        def as_states(number: int, value: Tensor) -> tuple[Tensor, Tensor]:
            """What comes after a complex value depends on it as it is in the state."""
            if not value.is_complex():
                return value, value
            place = self.places.each[number]
            return (kept := place.by_trial(value)), place.as_given(kept)

        def outputs(net: nn.Module, *rows: Tensor) -> list[Tensor]:
            found = self._watched(net, rows, as_states)
            calls[:] = [name for name, _ in found]
            return [value for _, value in found]

        graph = trace(Applied(outputs, self.call), *((Role.INPUT, row[:1]) for row in self.rows))
        if self.problem.state is None:
            return network_of_uses(graph, TRANSFORMS, [*map(in_pairs, self.rows)], of_one_trial)
        values = zip(calls, [graph.output, *graph.further], strict=True)
        return network_of(graph, TRANSFORMS, [*map(in_pairs, self.rows)], list(values), self.layout)

    def _watched(self, call: nn.Module, rows: Sequence[Tensor], change: Change = as_they_are) -> Heard:
        """The values of a call on these rows."""
        return watched(call, self.given.filled(self._copied(rows)), self.values, change)

    def _copied(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Copies of the rows and of what all share: a graph of them outlives what these hold now."""
        given = [row[0] if self.given.alone else row for row in rows]
        return [array.clone() for array in (*given, *self.given.shared.values())]

    def _look(self) -> tuple[Places, list[Tensor]]:
        """Where the trials are in the values, and these."""
        copies = self._copied(self.rows)
        try:
            of_one = self._watched(self.call, [row[:1] for row in self.rows])
            of_all = watched(self.call, self.given.filled(copies), self.values, as_they_are)
        except Unknown:
            raise
        except Exception as error:
            raise ValueError(
                f"the network failed on {self.given}, or on its first trial alone: {error}. It must be a function of "
                "any number of trials; what it holds for each trial, such as a mask, is input: give it in x"
            ) from error
        if not all(map(torch.equal, copies, self._copied(self.rows))):
            raise ValueError(IN_PLACE)
        if not of_all:
            names = [value.name for value in self.values]
            raise ValueError(f"the network calls none of the modules {names}; nothing to analyse")
        _check_numbers(of_all)
        _check_different(of_all)
        if len(of_one) != len(of_all):
            raise ValueError(
                "the network calls other modules on one trial than on all: its trials influence each other"
            )
        pairs = [(name, one, whole) for (name, one), (_, whole) in zip(of_one, of_all, strict=True)]
        axes, trials = self.problem.axes, self.given.trials
        if axes is None:
            places = [place_of(*pair, trials) for pair in pairs]
        else:
            places = [place_named(*pair, trials, axes) for pair in pairs]
        return Places(places, axes), [value for _, value in of_all]

    def _alone(self, trial: slice) -> Tensor:
        found = self._watched(self.call, [row[trial] for row in self.rows])
        return self.places.join([value for _, value in found])


def states_of(problem: StaticProblem) -> Tensor:
    """The state with a graph to the parameters, by one call where it is the output as it comes."""
    if problem.axes is None and problem.state in (None, ("",)):
        (out,) = watched(
            problem.net, problem.arguments.filled(list(problem.arguments.rows.values())), OUTPUT, as_they_are
        )
        return out[1]
    network = Network(problem)
    return network.kicked(problem.net, torch.zeros_like(network.start))


class FixedPoint:
    """A map f(x, z) -> z, or f(z, x) where that is swapped."""

    form, layout = Form.FIXED_POINT, None

    def __init__(self, problem: FixedPointProblem, swapped: bool) -> None:
        self.call, self.problem, self.swapped = problem.f, problem, swapped
        self.x = problem.x.clone()  # whose user may fill a batch anew
        like = _check(self.call, problem.x)
        self.complex = isinstance(problem.z0, Tensor) and problem.z0.is_complex()
        units = None if self.complex else getattr(self.call, "hidden_size", None)
        self.start = initial_state([units], like, problem.z0)
        self._check_form()

    def model(self, params: Choice) -> Model:
        """The map with the parameters that learn."""
        return Model(self.call, params)

    def residual(self, call: nn.Module, state: Tensor) -> Tensor:
        """z - f(x, z)."""
        return state - self._next(call, self.x.clone(), state)  # a graph of it outlives what x holds now

    @torch.no_grad()
    def at(self, state: Tensor) -> Tensor:
        """The same without gradients."""
        return self.residual(self.call, state)

    @torch.no_grad()
    def check(self, state: Tensor) -> None:
        """Of the trials at a state."""
        x = self.x
        rounding = lambda: _rounding(lambda: self.residual(self.call, state))  # noqa: E731
        check_alone(lambda trial: self._next(self.call, x[trial], state[trial]), state - self.at(state), rounding)

    def traced(self) -> TracedConstraint:
        """Traced on its first trial."""
        graph = trace(Applied(self._next, self.call), (Role.INPUT, self.x[:1]), (Role.STATE, self.start[:1]))
        return TracedConstraint(graph, self.form, [graph.output], None, TRANSFORMS, [in_pairs(self.x)])

    def _check_form(self) -> None:
        x, z = self.x.clone(), self.start.clone()
        try:
            with torch.no_grad():
                found = self._next(self.call, x, z)
        except (RuntimeError, TypeError, IndexError) as error:
            raise ValueError(
                f"f failed on x {tuple(x.shape)} and z {tuple(z.shape)}: {error}; it is called as f(x, z), or as "
                "f(z, x) where its parameters are called z and x"
            ) from error
        if found.shape != z.shape:
            raise ValueError(f"f gave {tuple(found.shape)} for z {tuple(z.shape)}; it must give the next z")
        if not (torch.equal(x, self.x) and torch.equal(z, self.start)):
            raise ValueError(IN_PLACE)

    def _next(self, call: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        z = of_halves(z) if self.complex else z
        return in_halves(call(z, x) if self.swapped else call(x, z))


class FreeForm:
    """F(S, params, x) on the whole state."""

    form, layout = Form.FREE, None

    def __init__(self, problem: ImplicitProblem) -> None:
        self.problem, self.start = problem, in_halves(problem.state)
        self.call, self._names, self._as_given = _parameters(problem.params)
        self._rows = [] if problem.x is None else [problem.x.clone()]  # whose user may fill it anew
        check_module(self.call, self.start)
        if (found := self.at(self.start)).shape != self.start.shape:
            raise ValueError(
                f"F gave {tuple(found.shape)} for the state {tuple(self.start.shape)}; it must have its form"
            )

    def model(self, params: Choice) -> Model:
        """The parameters that learn, as the user calls them."""
        return Model(self.call, params, self._names)

    def residual(self, call: nn.Module, state: Tensor) -> Tensor:
        """F."""
        return self._F(call, state, *(row.clone() for row in self._rows))

    @torch.no_grad()
    def at(self, state: Tensor) -> Tensor:
        """The same without gradients."""
        return self.residual(self.call, state)

    def check(self, state: Tensor) -> None:
        """Whether F gives the same twice."""
        check_same(self.at(state), self.at(state), float(abs(state).max()))

    def traced(self) -> TracedConstraint:
        """Traced as it is."""
        graph = trace(Applied(self._F, self.call), (Role.STATE, self.start), *((Role.INPUT, x) for x in self._rows))
        graph = replace(graph, parameters={node: self._names[name] for node, name in graph.parameters.items()})
        return TracedConstraint(graph, self.form, [graph.output], None, TRANSFORMS, [*map(in_pairs, self._rows)])

    def _F(self, call: nn.Module, state: Tensor, *x: Tensor) -> Tensor:
        state = of_halves(state) if self.problem.state.is_complex() else state
        return in_halves(self.problem.F(state, self._as_given(call), *x))


def _parameters(params: Any) -> tuple[nn.Module, dict[str, str], Callable[[Any], Any]]:
    """A module of the parameters, what they are called by their names in it, and the form that F takes them in."""
    if isinstance(params, nn.Module):
        return params, {name: name for name, _ in params.named_parameters()}, lambda module: module
    if not isinstance(params, Mapping) or not all(isinstance(value, Tensor) for value in params.values()):
        raise TypeError(f"params is {type_name(params)}, expected an nn.Module or tensors by name")
    floating = {name: value for name, value in params.items() if is_inexact(value)}
    if not floating:
        raise TypeError("params holds no floating-point tensors: nothing can learn")
    listed = nn.ParameterList(nn.Parameter(value.detach()) for value in floating.values())  # names may be any

    def by_name(values: nn.ParameterList) -> dict[str, Tensor]:
        return {**params, **dict(zip(floating, values, strict=True))}

    return listed, {str(i): name for i, name in enumerate(floating)}, by_name


def _rounding(states: Callable[[], Tensor]) -> float:
    with torch.enable_grad():
        return rounding_of(states())


def _check_numbers(values: Sequence[tuple[str, Tensor]]) -> None:
    """Raise where a value cannot be a state."""
    for name, value in values:
        if not is_inexact(value) or value.layout is not torch.strided:
            kind = value.dtype if value.layout is torch.strided else value.layout
            raise ValueError(
                f"{named_giver(name)} gives {str(kind).removeprefix('torch.')} values, expected dense ones of floating "
                "point, which alone have derivatives; name a module in front of it in state"
            )


def _check_different(values: Sequence[tuple[str, Tensor]]) -> None:
    """Raise where two modules give the very same tensor: kicks to one would be kicks to the other."""
    tensors = [value for _, value in values]
    same = [name for name, value in values if sum(value is other for other in tensors) > 1]
    if same:
        raise ValueError(f"the modules {same} give the very same value; name one of them")


def _check(net: Any, x: Tensor) -> Tensor:
    """As for a cell; x, or where it holds integers one like it in the dtype of the parameters."""
    floating = [p for p in net.parameters() if is_inexact(p)] if isinstance(net, nn.Module) else []
    if isinstance(net, nn.Module) and not floating:
        raise ValueError("the model has no floating-point parameters: nothing can learn")
    like = in_halves(x if is_inexact(x) or not floating else x.to(floating[0].dtype.to_real()))
    check_module(net, like)
    return like
