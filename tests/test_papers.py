"""The scripts of examples/papers run, and what they save can be read back."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import matplotlib as mpl
import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "papers"
SAVED = {"command", "size", "settings", "claims", "numbers", "seconds", "versions"}


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What the script saves of a quick run."""
    monkeypatch.syspath_prepend(FOLDER)
    file = folder / "found.json"
    options = ["--quick", "--out", str(folder / "found.png"), "--save", str(file)]
    monkeypatch.setattr(sys, "argv", [str(FOLDER / name), *options])
    with mpl.rc_context():
        runpy.run_path(str(FOLDER / name), run_name="__main__")
    assert (folder / "found.png").stat().st_size > 1000
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    "name",
    ["attention_token_rank.py", "misdirection.py", "residual_mlps.py", "input_target_dimensions.py", "noisy_starts.py"],
)
def test_a_quick_run_saves_settings_claims_and_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(name, tmp_path, monkeypatch)
    assert set(found) == SAVED and found["size"] == "quick" and found["numbers"]
    assert found["command"].startswith(f"python examples/papers/{name} --quick")
    assert all(isinstance(claim["holds"], bool) and claim["found"] for claim in found["claims"])


@pytest.mark.parametrize("file", sorted(FOLDER.glob("results/*.json")), ids=lambda file: file.stem)
def test_kept_results_say_how_they_were_made(file: Path) -> None:
    found = json.loads(file.read_text())
    assert set(found) == SAVED and found["size"] in ("ours", "authors")
    assert (FOLDER / Path(found["command"].split()[1]).name).exists()
