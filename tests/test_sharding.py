"""Trials sharded over eight virtual devices, each case in a process of its own: results, and what devices exchange."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import cases

DEVICES, PROBES = 8, 3
MODELS = ["gru", "lstm", "attending", "grid", "span", "mlp", "convolution"]
OPERATORS = ["ntk", "P", "K", "J", "J.T", "core", "B", "B.T"]


def on_devices(folder: Path, what: str, name: str) -> dict:
    flags = f"--xla_force_host_platform_device_count={DEVICES} --xla_dump_to={folder} --xla_dump_hlo_as_text"
    script = [sys.executable, str(Path(__file__).with_name("sharded.py")), what, name, str(folder)]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", cases(MODELS, ["gru"]))
def test_operators(name: str, tmp_path: Path) -> None:
    """On one trial a device, equal to round-off; of a state, only what makes gradients of weights is summed up."""
    found = on_devices(tmp_path, "operators", name)
    assert found["state"][0] == 1
    for operator in OPERATORS:
        assert found[operator]["error"] < 1e-12, (operator, found)
        lies = [PROBES, found["parameters"]] if operator == "J.T" else [PROBES, 1]
        assert found[operator]["lies"][:2] == lies, (operator, found)
    assert found["P"]["exchanged"] == []
    assert {kind for kind, _ in found["ntk"]["exchanged"]} == {"all-reduce"}
    summed = sum(numbers for _, numbers in found["ntk"]["exchanged"])
    assert 0 < summed <= PROBES * found["parameters"]


@pytest.mark.slow
def test_solvers(tmp_path: Path) -> None:
    found = on_devices(tmp_path, "solvers", "gru")
    assert max(result["error"] for result in found.values()) < 1e-10, found
    assert found["vectors"]["lies"][:2] == [3, 1]
    assert found["states"]["lies"][:2] == [2, 1]
