"""What `analyze` says on the terminal when it is done: plain lines that fit a narrow one, and a pipe."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer

from kpflow_dyn.cli._found import GUESSED, Choice

if TYPE_CHECKING:
    import xarray as xr

    from kpflow_dyn.report import Table

KINDS = {
    "temporal": ("in time", "time courses"),
    "spatial": ("in units", "directions"),
    "trial": ("in trials", "patterns"),
}
LABEL = 13  # columns before the text of a line


def print_summary(dataset: xr.Dataset, found: Mapping[str, Choice], everything: bool) -> None:
    """What was read and guessed, how the network does, what will be learnt, and the ranks; or all numbers."""
    from kpflow_dyn.report._learning_charts import has_learning, learning_lead, learning_table

    typer.echo(dataset.attrs["title"])
    for label, text in _about(dataset, found).items():
        say(label, text)
    typer.echo()
    if has_learning(dataset):
        lead = learning_lead(dataset)
        for text in lead if everything or "optimizer_steps" in dataset else lead[:1]:
            say("", text, 0)
        if way := str(dataset.part_words.values[0]):
            say("", f"What stands in the way: {way}.", 0)
    elif "loss" in dataset:
        say("", "The loss is 0: nothing is left to be learnt.", 0)
    elif "learning" in dataset.attrs:
        say("", f"On what will be learnt: {dataset.attrs['learning']}.", 0)
    typer.echo()
    _print_ranks(dataset)
    if everything:
        if has_learning(dataset):
            _print_rows(learning_table(dataset))
        _print_numbers(dataset)


def _about(dataset: xr.Dataset, found: Mapping[str, Choice]) -> dict[str, str]:
    """What was read, what was guessed, and which steps count."""
    read = [f"{name}: {one['words']}" for name, one in found.items() if one["how"] != GUESSED and one["value"] != ""]
    guessed = [
        f"{name}: {one['words']} ({one['option']} sets it)" for name, one in found.items() if one["how"] == GUESSED
    ]
    lines = {"Read": "; ".join(read), "Guessed": "; ".join(guessed)}
    if "steps" in dataset.attrs and "mask" not in found:
        lines["Steps"] = dataset.attrs["steps"]
    lines["Weights"] = dataset.attrs.get("weights", "")
    return {label: text for label, text in lines.items() if text}


def _print_ranks(dataset: xr.Dataset) -> None:
    """How many modes carry what learning moves, each with the share of the first."""
    say("", "How training can move the activity: modes in use (participation ratio), and the share of the first.", 0)
    for kind, (label, noun) in KINDS.items():
        values = dataset[f"{kind}_eigenvalue"].values
        share = f"; the first {kind} mode carries {values[0] / values.sum():.0%}" if values.sum() > 0 else ""
        say(label, f"{_rank(dataset, kind)} {noun}{share}")
    say("overall", f"{_rank(dataset, 'ntk')} directions of all trajectories (NTK)")
    say("activity", f"{_rank(dataset, 'state')} principal components, of the activity itself")


def _rank(dataset: xr.Dataset, name: str) -> str:
    rank = dataset[f"{name}_effective_rank"]
    return f"{float(rank):.3g} of {rank.attrs['dimension']:,}"


def say(label: str, text: str, indent: int = LABEL) -> None:
    """A paragraph that fits the terminal, with a label before it."""
    width = max(40, min(100, shutil.get_terminal_size((80, 24)).columns))
    first = f"  {label}".ljust(indent)[:indent]
    lines = textwrap.wrap(text, width - indent, break_long_words=False, break_on_hyphens=False)
    typer.echo("\n".join(f"{' ' * indent if i else first}{line}" for i, line in enumerate(lines)))


def _print_numbers(dataset: xr.Dataset) -> None:
    from rich.console import Console
    from rich.table import Table as Drawn

    from kpflow_dyn.report import summarize

    table = Drawn(title="All numbers", caption="± standard error; numbers without it are exact")
    for column in ("", "value", "of"):
        table.add_column(column, justify="right" if column else "left")
    for number in summarize(dataset).values():
        table.add_row(number["long_name"], number["text"], str(number.get("dimension", "")))
    Console().print(table)


def _print_rows(rows: Table) -> None:
    """A table, with what its last column says below it, as terminals are narrow."""
    from rich.console import Console
    from rich.table import Table as Drawn

    table = Drawn(title=rows.title)
    for name in rows.header[:-1]:
        table.add_column(name, justify="left" if name == rows.header[0] else "right")
    for row in rows.rows:
        table.add_row(*row[:-1])
    Console().print(table)
    for row in rows.rows:
        if row[-1] != "-":
            say("", f"{rows.header[-1]} of {row[0]}: {row[-1]}", 0)
