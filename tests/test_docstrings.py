"""The examples in docstrings run, and the docstring of every public name has what docs/reference promises.

The convention, in the order of a docstring:

    first line      what it is, a sentence
    equation        "... = ...", or an indented equation or table, in the text above the sections
    Args:           each argument of a function or class; or `Attributes:`, each field of a result, which only the
                    package makes (it needs no equation, errors and source). Arrays with shapes: [trial, time, unit]
    Raises:         where its own code, or a function that this calls by name, raises
    Source: ...     a paper, a book, a library; or a section of docs/theory.md for equations of this package
    >>> ...         an example

A line such as "Args, Raises and Source as `trace`." stands for the sections of another public name, which come to
those that stand here, and "Example as `eigs`." in a result for that of the function which makes it.
"""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import kpflow_dyn as kp

MODULES = sorted(m.name for m in pkgutil.walk_packages(kp.__path__, "kpflow_dyn."))
PACKAGES = ["control", "dynamics", "figures", "gym", "learning_rules", "models", "models.jax", "ode", "regularizers"]
PACKAGES += ["report", "solvers", "sweep", "tasks", "tracing", "train"]
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Warns", "Source", "Example")
HEADS = re.compile(rf"^({'|'.join(SECTIONS)}):", re.MULTILINE)
REFERENCE = re.compile(r"^((?:(?:Args|Raises|Warns|Source|Example)(?:, | and | )?)+) ?as `([\w.]+)`", re.MULTILINE)
KNOWN = r"\b(19|20)\d\d\b|arXiv[: ]\d{4}\.\d{4,5}|\b(scipy|numpy|torch|torchdiffeq|diffrax|gymnasium|neurogym)\b"
ROOT = Path(__file__).parents[1]
THEORY = (ROOT / "docs" / "theory.md").read_text()

TOOLS = {"equation", "source"}  # of what computes no number: it writes, reads, runs, names or converts
EXCEPT: dict[str, set[str]] = {
    "kpflow_dyn.SolveError": {"arguments", *TOOLS},  # it is raised, not called
    "kpflow_dyn.figures": TOOLS,
    "kpflow_dyn.load_checkpoint": TOOLS,
    "kpflow_dyn.memory_budget": TOOLS,
    "kpflow_dyn.models.Constraint": TOOLS,  # constraints derive from it
    "kpflow_dyn.models.Law": TOOLS,  # laws derive from it
    "kpflow_dyn.models.make_init": TOOLS,
    "kpflow_dyn.models.make_model": TOOLS,
    "kpflow_dyn.models.to_jax": TOOLS,
    "kpflow_dyn.models.to_torch": TOOLS,
    "kpflow_dyn.ode.Failed": TOOLS,
    "kpflow_dyn.ode.Library": {"arguments", "errors", *TOOLS},
    "kpflow_dyn.ode.add_library": TOOLS,
    "kpflow_dyn.ode.rate_of": TOOLS,
    "kpflow_dyn.ode.remove_library": TOOLS,
    "kpflow_dyn.ode.stops_of": TOOLS,
    "kpflow_dyn.report": TOOLS,
    "kpflow_dyn.solvers.FastestBlock": TOOLS,
    "kpflow_dyn.solvers.Random": TOOLS,
    "kpflow_dyn.sweep": TOOLS,
    "kpflow_dyn.Recorder": TOOLS,
    "kpflow_dyn.Sweep": TOOLS,
    "kpflow_dyn.tasks.ArrayFile": TOOLS,
    "kpflow_dyn.tasks.Neurogym": {"equation"},
    "kpflow_dyn.tasks.Task": {"errors", *TOOLS},  # a protocol is not called
    "kpflow_dyn.tasks.make_task": TOOLS,
    "kpflow_dyn.tracing": TOOLS,
    "kpflow_dyn.tracing.Role": {"arguments", "errors"},  # its members say what they are
}
"""What makes no sense for a name, or for all names of a package."""


def _public() -> dict[str, Any]:
    """By full name; of a module without __all__ its own functions."""
    found = {}
    for module in map(importlib.import_module, ["kpflow_dyn", *(f"kpflow_dyn.{name}" for name in PACKAGES)]):
        own = [n for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__]
        for name in getattr(module, "__all__", [n for n in own if not n.startswith("_")]):
            if not inspect.ismodule(value := getattr(module, name)):
                found[f"{module.__name__}.{name}"] = value
    return found


PUBLIC = _public()


@cache
def sections(name: str) -> dict[str, str]:
    """The sections of a docstring by their heads, the text above them as ""; with those that it refers to."""
    text, _, example = (inspect.getdoc(PUBLIC[name]) or "").partition("\n>>> ")
    prose, *parts = HEADS.split(text)
    found = {"": prose, **dict(zip(parts[::2], parts[1::2], strict=True))}
    found |= {"Example": f">>> {example}"} if example else {}
    for heads, other in REFERENCE.findall(text):
        theirs = sections(_of_name(other, name))
        named = [head for head in re.findall(r"\w+", heads.replace(" and ", " ")) if head in theirs]
        found |= {head: found.get(head, "") + theirs[head] for head in named}
    return found


def _of_name(short: str, beside: str) -> str:
    """The full name of another public name, beside this one or of the package."""
    return next(n for n in (f"{beside.rpartition('.')[0]}.{short}", f"kpflow_dyn.{short}") if n in PUBLIC)


def lacking(name: str) -> list[str]:
    """What the docstring of a public name lacks."""
    parts, value = sections(name), PUBLIC[name]
    result = "Attributes" in parts and "Args" not in parts
    checks: dict[str, bool] = {
        "first line": bool(re.match(r"[^\n]+", parts[""])) and parts[""].split("\n\n")[0].rstrip()[-1] in ".:,",
        "arguments": _names(value, result) <= _documented(parts) | _inherited(value),
        "shapes": all(re.search(r"\[|shape|\bas \w|like", entry) for entry in _about(parts, _arrays(value))),
        "units": all(re.search(r"second|ms\b|unit|step", entry) for entry in _about(parts, {"dt", "timeout"})),
        "example": any(">>> " in text for text in parts.values()),
    }
    if not result:
        checks["equation"] = bool(re.search(r" = |^ {4}\S", parts[""], re.MULTILINE))
        checks["errors"] = "Raises" in parts or not _refuses(value)
        checks["source"] = _is_source(parts.get("Source", ""))
    waived = EXCEPT.get(name, set()) | EXCEPT.get(name.rpartition(".")[0], set())
    return [what for what, there in checks.items() if not there and what not in waived]


def _names(value: Any, result: bool) -> set[str]:
    """Arguments; or the public fields of a result."""
    if result:
        return {f.name for f in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
    if isinstance(value, type) and issubclass(value, Warning):
        return set()
    named = inspect.signature(value).parameters.values()
    return {p.name for p in named if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and not p.name.startswith("_")}


def _entries(parts: dict[str, str]) -> dict[str, str]:
    """Each entry of Args or Attributes by its head, which may be "a, b"."""
    text = parts.get("Args", "") + parts.get("Attributes", "")
    entries = re.split(r"^ {4}([\w, ]+):", text, flags=re.MULTILINE)[1:]
    return dict(zip(entries[::2], entries[1::2], strict=True))


def _documented(parts: dict[str, str]) -> set[str]:
    return {name for head in _entries(parts) for name in re.findall(r"\w+", head)}


def _inherited(value: Any) -> set[str]:
    """Fields that the docstrings of base classes document."""
    texts = [inspect.cleandoc(c.__doc__ or "") for c in getattr(value, "__mro__", ())[1:] if "kpflow" in c.__module__]
    return {name for text in texts for name in _documented({"Attributes": text})}


def _about(parts: dict[str, str], names: set[str]) -> list[str]:
    """The entries of these arguments."""
    return [text for head, text in _entries(parts).items() if names & set(re.findall(r"\w+", head))]


def _arrays(value: Any) -> set[str]:
    """Arguments and fields that are arrays."""
    codes = [value, value.__init__] if inspect.isclass(value) else [inspect.unwrap(value)]
    notes = {name: str(note) for code in codes for name, note in getattr(code, "__annotations__", {}).items()}
    return {name for name, note in notes.items() if re.match(r"(Array|np\.ndarray)\b", note)} - {"return"}


def _is_source(text: str) -> bool:
    """A paper or book with its year or number, a library, or a section of the theory that exists."""
    section = re.search(r'docs/theory\.md, "([^"]+)"', text)
    return f"## {section[1]}\n" in THEORY if section else bool(re.search(KNOWN, text))


def _refuses(value: Any) -> bool:
    """Whether its own code raises, or a function of the package that this calls by its name."""
    makers = ("__init__", "__post_init__", "__new__")
    codes = [vars(value)[m] for m in makers if m in vars(value)] if inspect.isclass(value) else [inspect.unwrap(value)]
    return any(_raises(code) or any(_raises(helper) for helper in _helpers(code)) for code in codes)


def _raises(code: Callable[..., Any]) -> bool:
    return any(isinstance(node, ast.Raise) for node in ast.walk(_tree(code)))


def _helpers(code: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Functions of this package that are called by name."""
    calls = [node.func for node in ast.walk(_tree(code)) if isinstance(node, ast.Call)]
    called = [getattr(code, "__globals__", {}).get(f.id) for f in calls if isinstance(f, ast.Name)]
    return [inspect.unwrap(f) for f in called if inspect.isfunction(f) and f.__module__.startswith("kpflow_dyn")]


def _tree(code: Callable[..., Any]) -> ast.AST:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(code)))
    except OSError:  # written by dataclass
        return ast.Module([], [])


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_are_documented(name: str) -> None:
    assert lacking(name) == []


def test_public_modules_are_documented() -> None:
    assert all(importlib.import_module(f"kpflow_dyn.{name}").__doc__ for name in PACKAGES)
    assert set(kp.__all__) <= set(dir(kp))


def test_the_reference_shows_names_as_users_write_them() -> None:
    pages = [page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md")]
    assert {name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)} <= set(PUBLIC)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        kp.nonsense  # noqa: B018
