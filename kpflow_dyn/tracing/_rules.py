"""The roles of operations that are not the package's own: the door for a custom trace rule."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kpflow_dyn.tracing._graph import Role

GIVEN = (Role.FIXED, Role.INPUT, Role.STATE)  # roles of values, not of operations


@dataclass(frozen=True)
class Rule:
    """What an operation does, and the function that stands in its place, if any."""

    role: Role
    function: Callable[..., Any] | None


RULES: dict[Any, Rule] = {}  # what `add_rule` was told; traces read it, nothing else writes to it


def add_rule(op: Any, role: Role, function: Callable[..., Any] | None = None) -> None:
    """Say what an operation of your own does with the elements of its operands.

    Without a rule an operation counts as `Role.OTHER`: every element of its result may depend on every element of its
    operands, and a weight in it is an opaque site. A rule makes the trace finer: `Role.POINTWISE` keeps the step
    elementwise, and a weight in it becomes a scale; `Role.REDUCE` is a linear map of one operand, by which the state is
    carried on as by a matrix. Rules hold for all traces of this process from now on.

    Args:
        op: what is called: `torch.ops.library.name`, the result of `torch.library.custom_op`, or a JAX primitive.
        role: one of `Role.MOVE`, `STOP`, `ADD`, `POINTWISE`, `CONVOLUTION`, `PRODUCT`, `REDUCE` and `OTHER`; see there
            what each promises. A wrong promise is noticed when derivatives are compared, as they always are.
        function: the same function of operations that can be differentiated forward and backward and mapped over rows,
            to be called in the place of `op`. Needed for `torch.library.custom_op`, whose derivatives torch.func
            cannot use; None calls `op` itself. Such an op needs a derivative of its own too (`register_autograd`):
            a linearisation is compared with backward() through the model.

    Raises:
        TypeError: for an `op` of neither framework, or a `role` that is no `Role`.
        ValueError: for a role that is one of values, such as `Role.STATE`.

    >>> import torch
    >>> from kpflow_dyn.tracing import Role, add_rule
    >>> @torch.library.custom_op("shop::softsign", mutates_args=())
    ... def softsign(x: torch.Tensor) -> torch.Tensor:
    ...     return x / (1 + x.abs())
    >>> shape = softsign.register_fake(torch.empty_like)
    >>> add_rule(softsign, Role.POINTWISE, torch.nn.functional.softsign)
    """
    if not isinstance(role, Role):
        raise TypeError(f"role is {role!r}, expected a kpflow_dyn.tracing.Role such as Role.POINTWISE")
    if role in GIVEN:
        raise ValueError(
            f"{role} is the role of a value, not of an operation; take MOVE, POINTWISE, PRODUCT or the like"
        )
    RULES[_key(op)] = Rule(role, function)


def rule_of(op: Any) -> Rule | None:
    """The rule of an operation, if it has one."""
    return RULES.get(_key(op))


def _key(op: Any) -> Any:
    """What an operation is known by: of torch's overloads their packet, of JAX the primitive."""
    op = getattr(op, "_opoverload", op)  # of torch.library.custom_op
    op = getattr(op, "overloadpacket", op)
    if type(op).__name__ != "OpOverloadPacket" and not hasattr(op, "get_bind_params"):
        raise TypeError(
            f"{op!r} is no operation that can be traced; expected torch.ops.library.name, what torch.library.custom_op "
            "returned, or a JAX primitive"
        )
    return op
