"""The derivative of a function of a torch model by autograd alone, at the model's own parameters.

With S = function(model, s) in a graph, u = 0 and g = vjp(u), which is linear in u,

    pull(q) = vjp(q)        push(v) = the vjp of g in u, at v

so the second is the exact transpose of whatever the backward pass does, and no forward mode is needed.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from kpflow_dyn._arrays.complex_numbers import as_flat, count, flat
from kpflow_dyn._arrays.memory import require_matrix
from kpflow_dyn._flows.referee import NOT_LINEAR, OWN, Mismatch, Probe, check_transpose, drawn
from kpflow_dyn._torch.causes import rounding_of
from kpflow_dyn._torch.left_alone import Numbers, held_by, left_alone
from kpflow_dyn._torch.trace import differentiable_attention

REENTRANT = "torch differentiates its checkpoints by .backward() alone; call checkpoint(..., use_reentrant=False)"
Function = Callable[[Any, Tensor], Tensor]


class Derivative:
    """See `kpflow_dyn._flows.referee.Derivative`; what the graph keeps of the model's tensors are copies."""

    def __init__(self, function: Function, call: nn.Module, learning: Mapping[str, nn.Parameter], at: Tensor) -> None:
        self._function, self._call, self._learning = function, call, learning
        held = held_by(call)
        self._keep: AbstractContextManager[Any] = _copies_of(held)
        self._numbers = Numbers(held)  # for what a graph reads anew, as checkpoints do
        self._like, self._parameters = at.detach(), list(learning.values())
        self._forms = [parameter.detach().to("meta") for parameter in self._parameters]
        self._sizes = [count(form) for form in self._forms]
        try:
            self._record(function, call)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):  # torch.func inside of a model cannot be recorded with copies
                raise
            self._keep = nullcontext()  # training the model then makes later applications an error of torch
            self._record(function, call)
        self._double: tuple[Tensor, list[Tensor | None]] | None = None
        self._matrix: Tensor | None = None

    def _record(self, function: Function, call: nn.Module) -> None:
        with left_alone(call, values=False), _recording(self._parameters, self._keep):
            argument = self._like.clone().requires_grad_()
            self.states = function(call, argument)
            edges: Any = [get_gradient_edge(tensor) for tensor in [*self._parameters, argument]]
            self._inputs = edges

    def at(self, argument: Tensor) -> "Derivative":
        """That of the same function at another argument."""
        return Derivative(self._function, self._call, self._learning, argument)

    def __deepcopy__(self, memo: object) -> Self:
        return self  # nothing changes it, and autograd's graphs cannot be copied

    @property
    def value(self) -> Tensor:
        """The states."""
        return self.states.detach()

    @property
    def connected(self) -> bool:
        """Whether the states have a graph."""
        return self.states.requires_grad

    @cached_property
    def rounding(self) -> float:
        """Of the least precise part."""
        return rounding_of(self.states)

    @cached_property
    def probe(self) -> Probe:
        """A random q and what it pulls back."""
        (q,) = drawn([(1, *self.states.shape)], self._like)
        return Probe(q, *self.pull(q))

    def pull(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Reverse mode through the model, probe by probe."""
        with self._numbers.in_place():
            found = [self._reverse(probe.clone()) for probe in q]  # complex parts need storages of their own
        return torch.stack([theta for theta, _ in found]), torch.stack([argument for _, argument in found])

    def push(self, theta: Tensor | None, argument: Tensor | None) -> Tensor:
        """Reverse mode through reverse mode; where that has no derivative, by the matrix of reverse mode."""
        probes = len(theta if theta is not None else argument)  # type: ignore[arg-type]
        theta = self._like.new_zeros(probes, self._size) if theta is None else theta
        argument = self._like.new_zeros(probes, *self._like.shape) if argument is None else argument
        with self._numbers.in_place():
            if self._double is None and self._matrix is None:
                self._prepare()
            if self._matrix is not None:
                moved = torch.cat([theta, argument.reshape(probes, -1)], 1) @ self._matrix.T
                return moved.reshape(probes, *self.states.shape)
            return torch.stack([self._doubled(*probe) for probe in zip(theta, argument, strict=True)])

    @property
    def _size(self) -> int:
        return sum(self._sizes)

    def _reverse(self, q: Tensor) -> tuple[Tensor, Tensor]:
        found = self._gradients(q) if self.states.requires_grad else [None] * len(self._inputs)
        return self._whole(found)

    def _gradients(self, q: Tensor, **options: Any) -> list[Tensor | None]:
        try:
            found = torch.autograd.grad(self.states, self._inputs, q, retain_graph=True, allow_unused=True, **options)
        except RuntimeError as error:
            advice = REENTRANT if "use_reentrant" in str(error) else str(error)
            raise ValueError(f"reverse mode through the model failed: {advice}") from error
        return [g.to_dense() if g is not None and g.is_sparse else g for g in found]

    def _whole(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Gradients as a vector of the parameters, and in the argument."""
        *parameters, argument = gradients
        pairs = zip(parameters, self._sizes, strict=True)
        parts = [self._like.new_zeros(size) if g is None else flat(g) for g, size in pairs]
        whole = torch.cat([self._like.reshape(-1)[:0], *parts])
        return whole.detach(), torch.zeros_like(self._like) if argument is None else argument.detach()

    def _prepare(self) -> None:
        """The graph of reverse mode; or its matrix, where it has no derivative or a wrong one."""
        try:
            with _recording(self._parameters, self._keep):
                u = torch.zeros_like(self.states, requires_grad=True)
                gradients = self._gradients(u, create_graph=True) if self.states.requires_grad else []
            self._double = u, gradients
            self._check()
        except (RuntimeError, ValueError):  # a backward that is once differentiable, or no function of torch
            self._double, self._matrix = None, self._rows()
            self._check()

    def _check(self) -> None:
        q, *moved = drawn([(1, *self.states.shape), (1, self._size), (1, *self._like.shape)], self._like)
        try:
            check_transpose(q, self.push(*moved), self.pull(q), moved, OWN)
        except Mismatch as error:
            if self._matrix is None:
                raise
            raise ValueError(NOT_LINEAR.format(error)) from error

    def _doubled(self, theta: Tensor, argument: Tensor) -> Tensor:
        assert self._double is not None
        u, gradients = self._double
        own = zip(theta.split(self._sizes), self._forms, strict=True)
        moved = [*(as_flat(v.clone(), form) for v, form in own), argument.clone()]
        pairs = [(g, v) for g, v in zip(gradients, moved, strict=False) if g is not None and g.requires_grad]
        if not pairs:
            return torch.zeros_like(self.states)
        outputs, vectors = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, u, vectors, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(self.states) if found is None else found.detach()

    def _rows(self) -> Tensor:
        """The matrix [state, parameter and argument], row by row."""
        states, columns = self.states.numel(), self._size + self._like.numel()
        require_matrix(
            states,
            columns,
            self._like,
            "the model's backward pass has no derivative",
            "write its autograd.Function with a backward that can be differentiated (without once_differentiable)",
        )
        unit = torch.eye(states, dtype=self._like.dtype, device=self._like.device)
        rows = [self._reverse(row.reshape(self.states.shape)) for row in unit]
        return torch.stack([torch.cat([theta, argument.reshape(-1)]) for theta, argument in rows])


@contextmanager
def _recording(parameters: Sequence[Tensor], keep: AbstractContextManager[Any]) -> Iterator[None]:
    """Record a graph in which all parameters that learn require gradients, whatever the caller says of them."""
    modes = torch.inference_mode(False), torch.enable_grad(), torch.backends.cudnn.flags(enabled=False)
    with ExitStack() as stack:
        for mode in (*modes, differentiable_attention(), keep):
            stack.enter_context(mode)
        frozen = [parameter for parameter in parameters if not parameter.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)


def _copies_of(held: Iterable[Any]) -> saved_tensors_hooks:
    """Graphs that keep copies of a model's tensors and of all constants, which writes to them later do not change.

    What is written to while the graph is made, is refused where it is read, as autograd does without hooks.
    """
    own = {place: value for value in held if isinstance(value, Tensor) and (place := _storage(value)) is not None}
    kept: dict[tuple, tuple[Tensor, Tensor]] = {}

    def pack(tensor: Tensor) -> tuple[Tensor, int]:
        if (place := _storage(tensor)) is None or (place not in own and tensor.grad_fn is not None):
            alone = tensor.detach()  # a node of the graph that held its own result would never be freed
            return alone, _version(alone)
        read = tensor.dtype, tensor.is_conj(), tensor.is_neg(), tensor._version  # one place may be read in many ways
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), *read
        if key not in kept:
            alone = tensor.detach()
            kept[key] = alone, alone.clone()  # while it is held, nothing else lies at its place
        return kept[key][1], _version(kept[key][1])

    def unpack(packed: tuple[Tensor, int]) -> Tensor:
        tensor, version = packed
        if _version(tensor) != version:
            raise RuntimeError(
                "a value that its gradient needs was written to in place afterwards, as in z[:, 1] = w * z[:, 1]; work "
                "on a copy: y = z.clone(); y[:, 1] = w * z[:, 1]"
            )
        return tensor

    return saved_tensors_hooks(pack, unpack)


def _version(tensor: Tensor) -> int:
    """How often it was written to; 0 of one that does not say."""
    return 0 if tensor.is_inference() else tensor._version


def _storage(tensor: Tensor) -> int | None:
    """Where its storage lies; None where it has none of its own, as inside of torch.func."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return None
