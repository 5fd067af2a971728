"""One entry of the zoo, and where all of them are."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

FAMILIES = (
    "torch_itself", "hugging_face", "fine_tuning", "attention", "vision", "sequences", "spikes", "graphs",
    "differential_equations", "equinox_layers", "flax_layers", "haiku_layers", "jax_equations", "brax_networks",
)  # fmt: skip


@dataclass(frozen=True)
class Member:
    """A network of somebody's package, posed as a problem.

    Attributes:
        name: what the page calls it.
        package: whose it is, as pip knows it.
        problem: makes the network, with random weights, and poses it.
        adapter: the class or function that the network needs to be posed; None where it is taken as it is.
        options: of `kp.solve`.
        refused: where the package is right to refuse it, a part of the sentence that says why.
    """

    name: str
    package: str
    problem: Callable[[], Any]
    adapter: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    refused: str = ""

    @property
    def adapter_lines(self) -> int:
        """How many lines of code the adapter has."""
        if self.adapter is None:
            return 0
        lines = inspect.getsource(self.adapter).splitlines()
        return sum(bool(line.strip()) and '"""' not in line for line in lines)


def family(name: str) -> list[Member]:
    """The members of one family; an ImportError where a package of theirs is not installed."""
    return importlib.import_module(f"{__package__}.families.{name}").MEMBERS


def members() -> tuple[dict[str, tuple[str, Member]], dict[str, str]]:
    """All that are installed, by name with their family, and of the other families which package is missing."""
    found, missing = {}, {}
    for name in FAMILIES:
        try:
            found |= {member.name: (name, member) for member in family(name)}
        except ImportError as error:
            missing[name] = str(error)
    return found, missing
