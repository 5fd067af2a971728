"""The rows of the zoo in words: on the terminal, and as a page of the documentation."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import kpflow_dyn as kp

Row = dict[str, Any]
PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
HEAD = """\
# The zoo

Networks of other packages, taken as they are, with random weights from small configurations. Each is linearised, and
every operator is compared with autograd through the network itself: {summary}.

The packages live in an environment of their own, and nothing is downloaded when the zoo runs:

```sh
python3 -m venv .zoo && . .zoo/bin/activate
pip install -c zoo-constraints.txt -e '.[zoo]'
python -m tests.zoo                           # all of it: prints each row, and writes this page
python -m tests.zoo --family vision           # one file of tests/zoo/families; its rows replace those of before
python -m tests.zoo "transformers: GPT"       # those whose name begins so
pytest -m zoo tests/zoo                       # the same as tests
```

What the columns say:

- **error**: the largest of five relative errors: of the states, of J and J* on a random vector, and of the kernel J J*
  and of P K P* on another. The reference is autograd through the network: reverse mode, and reverse mode through it
  (torch), or `jax.vjp` and `jax.jvp`. It is relative to the largest entry. *Right* is below 1e-9; or below 1e-5 where a
  network computes in float32, all of it or parts that no conversion to float64 reaches, which the column says.
- **road**: *first*, where the network was traced, so that it has weight sites, or *second*, where all operators are
  autograd's own; `flow.untraced` then says why, and so does the list under the table.
- **sites**: how many weight sites the first road found.
- **adapter**: lines of code that were needed to call the network; 0 where it is posed as it is.
- **linearize**: seconds of `kp.solve` and `kp.linearize` together, the first time, compilation included.
- **ntk / autograd**: the time of one application of `flow.ntk` over that of a vjp and a jvp through the network, by
  torch.func, reverse mode twice, or compiled JAX, whichever is fastest. Below 1 it is faster than autograd. These
  networks are tiny, so that most of the time of most of them goes into calls, not into numbers.
- **MiB**: how far the memory of the process rose during this, above what it held before.
"""


def line(row: Row) -> str:
    """One row on the terminal."""
    if "errors" not in row:
        return f"{row['name']:45} {row['outcome']}: {row['sentence']}"
    text = (
        f"{row['name']:45} {row['outcome']:6} {error(row):8.1e} {row['road']:6} road {row['sites']:4} sites "
        f"{row['seconds']:6.1f} s  ntk {row['ratio']:6.2f} of vjp + jvp  {row['MiB']:6.0f} MiB"
    )
    return f"{text}  {row['sentence']}" if row["sentence"] else text


def error(row: Row) -> float:
    """The largest."""
    return max(row["errors"].values())


def summary(rows: Iterable[Row]) -> str:
    """How many there are of each outcome."""
    rows = list(rows)
    right = [row for row in rows if row["outcome"] == "right"]
    first = [row for row in right if row["road"] == "first"]
    others = [row["outcome"] for row in rows if row["outcome"] != "right"]
    counts = [f"{others.count(outcome)} {outcome}" for outcome in dict.fromkeys(others)]
    return ", ".join([f"{len(rows)} networks, {len(right)} right", f"{len(first)} of them on the first road", *counts])


def page(rows: Iterable[Row]) -> str:
    """The page of the documentation."""
    rows = sorted(rows, key=lambda row: row["package"].lower())
    made = f"Made by kpflow_dyn {kp.__version__} on Python {platform.python_version()}, on one thread of a CPU."
    parts = [HEAD.format(summary=summary(rows)), made]
    for _, group in groupby(rows, key=lambda row: row["package"]):
        members = list(group)
        version = next((row["version"] for row in members if "version" in row), "")
        parts.append(f"## {members[0]['package']} {version}\n\n{_table(members)}")
    sections = {
        "On the second road": [row for row in rows if row.get("road") == "second"],
        "Not linearised": [row for row in rows if "errors" not in row],
    }
    for title, members in sections.items():
        if members:
            lines = [f"- **{row['name']}**: {_plain(row['sentence'])}" for row in members]
            parts.append("\n".join([f"## {title}\n", *lines]))
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _table(rows: list[Row]) -> str:
    """Those of one package."""
    head = ["network", "error", "road", "sites", "adapter", "linearize", "ntk / autograd", "MiB"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Row) -> list[str]:
    name = row["name"].split(": ", 1)[-1]
    if "errors" not in row:
        return [name, row["outcome"], *[""] * 6]
    number = f"{error(row):.0e}" + ", float32" * row.get("single", False)
    number = number if row["outcome"] == "right" else f"**wrong: {number}**"
    numbers = f"{row['seconds']:.1f} s", f"{row['ratio']:.2f}", f"{row['MiB']:.0f}"
    return [name, number, row["road"], str(row["sites"] or ""), str(row["adapter"]), *numbers]


def _plain(sentence: str) -> str:
    """A message on one line, which Markdown takes as it is."""
    return " ".join(sentence.replace("<", "&lt;").replace("*", r"\*").replace("_", r"\_").split())
