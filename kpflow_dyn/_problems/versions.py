"""The versions that a result hangs on, as attributes of its dataset."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import kpflow_dyn
from kpflow_dyn._problems.problems import ODEProblem, Problem


def versions_behind(problem: Problem) -> dict[str, str]:
    """Those of the framework of a problem, with the solver of ODEs where it is one."""
    packages = problem.backend.runtime.PACKAGES
    return versions_of(packages if isinstance(problem, ODEProblem) else packages[:-1])


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Those of packages that are installed, of what all results hang on, and of Python."""
    named = {f"version_{package}": _version(package) for package in (*packages, "numpy", "scipy", "xarray")}
    found = {name: known for name, known in named.items() if known}
    return {"version_kpflow_dyn": kpflow_dyn.__version__, **found, "version_python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
