"""One self-contained page, with its figures, numbers, settings and versions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from kpflow_dyn.figures import _palette as palette
from kpflow_dyn.report._charts import Chart
from kpflow_dyn.report._numbers import lines, words

COLORWAY = {"light": [*palette.SERIES, *palette.MORE], "dark": [*palette.DARK_SERIES, *palette.DARK_MORE]}


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading.

    Attributes:
        title: the heading.
        header: a name for each column.
        rows: text, a cell for each column.
        note: what to know of it; each line is a paragraph.
        charts: figures that belong to it, shown below.

    Example as `page_of`.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""
    charts: Sequence[Chart] = ()


@dataclass(frozen=True)
class Page:
    """What stands on a page, from top to bottom; all text is plain.

    Attributes:
        title: its heading.
        lead: a sentence that says what came out, and what the rest of the introduction says.
        warnings: what the reader must keep in mind.
        charts: figures.
        tables: numbers that stand before the figures.
        settings, versions: how it was made.
        about: model, task, trials, seed and version in one line, below the heading.
        numbers: tables that stand behind the figures.

    Example as `page_of`.
    """

    title: str
    lead: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    about: str = ""
    numbers: Sequence[Table] = ()

    def to_html(self) -> str:
        """The page, which loads nothing from anywhere."""
        from jinja2 import Environment, StrictUndefined

        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        helpers = {"anchor": _anchor, "breakable": _breakable, "lines": lines, "words": words}
        template = environment.from_string(_source("page.html.jinja"), globals=helpers)
        return template.render(
            page=self,
            colorway=COLORWAY,
            css=_source("page.css"),
            js=_source("rows.js") + _source("page.js"),
            plotly=_source("vendored/plotly-cartesian.min.js"),
        )


def _source(name: str) -> str:
    return files("kpflow_dyn.report").joinpath(name).read_text("utf-8")


def _anchor(title: str) -> str:
    """The id of a heading, such as "what-will-be-learnt"."""
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def _breakable(text: str) -> Any:
    """Long names may be broken at a colon, an underscore, or before a capital letter."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(map(escape, re.split(r"(?<=[a-z])(?=[A-Z])|(?<=[:_])", text)))
