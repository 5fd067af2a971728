"""What the README shows must run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch


def test_the_python_example_runs() -> None:
    text = Path(__file__).parents[1].joinpath("README.md").read_text("utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(code, names)  # our own README
    torch.testing.assert_close(names["moved"][0], names["flow"].ntk.mv(names["q"][0]))
    assert 1 <= names["rank"].value <= names["temporal"].space.size
    assert bool(names["leading"].converged.all())
