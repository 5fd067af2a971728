"""The examples in docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import kpflow_dyn as kp

MODULES = sorted(m.name for m in pkgutil.walk_packages(kp.__path__, "kpflow_dyn."))


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", kp.__all__)
def test_public_names_are_documented(name: str) -> None:
    assert getattr(kp, name).__doc__
    assert name in dir(kp)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        kp.nonsense  # noqa: B018
