"""`kpflow-dyn doctor`: what it says of an installation, and that it tells a wrong one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kpflow_dyn as kp
from kpflow_dyn.cli import _doctor as doctor
from kpflow_dyn.cli._app import app

PACKAGES = Path(kp.__file__).parents[1]
PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def run(*options: str):
    return CliRunner().invoke(app, ["doctor", *options])


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    """Let frameworks be missing."""
    find = importlib.util.find_spec
    return lambda *names: monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in names else find(name, *more)
    )


def test_both_frameworks_are_right(tmp_path: Path) -> None:
    pytest.importorskip("jax")
    call = [sys.executable, "-c", "from kpflow_dyn.cli import app; app()", "doctor", "--json"]
    environment = os.environ | {"PYTHONPATH": str(PACKAGES)}
    ended = subprocess.run(
        call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(ended.stdout)
    checks = {(check["framework"], check["dtype"], check["identity"]) for check in found["checks"]}
    assert checks == {(f, d, i) for f in ("torch", "jax") for d in ("float32", "float64") for i in doctor.IDENTITIES}
    assert all(0 <= check["error"] < doctor.TOLERANCES[check["dtype"]] for check in found["checks"])
    assert found["frameworks"]["jax"]["settings"]["default precision"].startswith("float")


def test_one_framework_is_enough(without) -> None:
    without("jax")
    shown = run()
    assert shown.exit_code == 0, shown.output
    assert "jax\n  not installed" in shown.stdout and shown.stdout.count("  OK   torch") == 4
    assert shown.stdout.splitlines()[-1] == "All is right."


def test_without_both_nothing_is_right(without) -> None:
    without("jax", "torch")
    shown = run()
    assert (
        shown.exit_code == 1 and "neither torch nor JAX; install one: pip install 'kpflow-dyn[torch]'" in shown.stdout
    )


def test_an_identity_that_does_not_hold(without, monkeypatch: pytest.MonkeyPatch) -> None:
    without("jax")
    monkeypatch.setattr(doctor, "_errors", lambda *example: (1e-6, float("nan")))
    shown = run("--json")
    checks = [(check["dtype"], check["ok"]) for check in json.loads(shown.stdout)["checks"]]
    assert shown.exit_code == 1
    assert checks == [("float32", True), ("float32", False), ("float64", False), ("float64", False)]


def test_what_fails_is_said(without, monkeypatch: pytest.MonkeyPatch) -> None:
    without("jax")
    monkeypatch.setattr(doctor, "_errors", lambda *example: 1 / 0)
    shown = run()
    assert shown.exit_code == 1 and re.search(r"FAIL torch .*ZeroDivisionError: division by zero", shown.stdout)


def test_missing_packages_are_named_with_their_extra(without, monkeypatch: pytest.MonkeyPatch) -> None:
    without("jax", "torch")
    known = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("plotly", "jinja2") else known(name))
    assert "  missing: plotly, jinja2 (pip install 'kpflow-dyn[plot]')" in run().stdout


def test_extras_are_those_of_the_package() -> None:
    extras = tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"]
    for extra, packages in doctor.EXTRAS.items():
        assert {*packages} <= {re.split(r"[<>=\[]", requirement)[0] for requirement in extras[extra]}
