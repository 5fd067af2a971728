"""What the scripts of this folder share: their options, claims with numbers, and small files of results."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import kpflow_dyn as kp


@dataclass(frozen=True)
class Claim:
    """What a paper, or its authors' script, leads one to expect, what was found, and whether that agrees."""

    expected: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Study:
    """A run of a script: its options, the name of its size and the settings of that size."""

    options: argparse.Namespace
    size: str
    setting: Any
    started: float

    @property
    def out(self) -> Path:
        return self.options.out

    def finish(self, claims: Sequence[Claim], numbers: Mapping[str, Any]) -> None:
        """Print the claims, and write them with the numbers, settings, command and versions where `--save` says."""
        for claim in claims:
            print(f"expected: {claim.expected}\n   found: {claim.found}\n   holds: {'yes' if claim.holds else 'NO'}")
        print(f"wrote {self.out}")
        if self.options.save:
            self.options.save.parent.mkdir(parents=True, exist_ok=True)
            self.options.save.write_text(json.dumps(self._result(claims, numbers), indent=1, default=_plain) + "\n")
            print(f"wrote {self.options.save}")

    def _result(self, claims: Sequence[Claim], numbers: Mapping[str, Any]) -> dict[str, Any]:
        script = Path(sys.argv[0]).name
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        return {
            "command": shlex.join(["python", f"examples/papers/{script}", *sys.argv[1:]]),
            "size": self.size,
            "settings": asdict(self.setting),
            "claims": [asdict(claim) for claim in claims],
            "numbers": dict(numbers),
            "seconds": round(time.perf_counter() - self.started, 1),
            "versions": versions | {"kpflow_dyn": kp.__version__},
        }


def begin(about: str, picture: str, *, quick: Any, ours: Any, authors: Any, seed: bool = False) -> Study:
    """Read the command line of a script whose three sizes are dataclasses; `seed` adds an option of that name."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, help=f"PNG to write; by default {picture} in a new temporary folder")
    parser.add_argument("--save", type=Path, help="JSON to write: settings, command, numbers, claims and versions")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    size.add_argument("--full", action="store_true", help="the settings of the authors' scripts")
    if seed:
        parser.add_argument("--seed", type=int, default=0, help="of the weights")
    options = parser.parse_args()
    options.out = options.out or Path(tempfile.mkdtemp()) / picture
    name, setting = ("quick", quick) if options.quick else ("authors", authors) if options.full else ("ours", ours)
    return Study(options, name, setting, time.perf_counter())


def _plain(value: Any) -> Any:
    """Arrays and numbers of numpy as JSON has them."""
    return np.asarray(value).tolist()
