"""One self-contained page, with its figures, numbers, settings and versions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from kpflow_dyn.figures import _palette as palette
from kpflow_dyn.report._charts import Chart

COLORWAY = {"light": [*palette.SERIES, *palette.MORE], "dark": [*palette.DARK_SERIES, *palette.DARK_MORE]}


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading.

    Attributes:
        title: the heading.
        header: a name for each column.
        rows: text, a cell for each column.
        note: what to know of it.
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
        tables: numbers.
        settings, versions: how it was made.

    Example as `page_of`.
    """

    title: str
    lead: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)

    def to_html(self) -> str:
        """The page, which loads nothing from anywhere."""
        from jinja2 import Environment, StrictUndefined
        from plotly.offline import get_plotlyjs

        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        source = files("kpflow_dyn.report")
        template = environment.from_string(source.joinpath("page.html.jinja").read_text("utf-8"))
        own = {name: source.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js")}
        return template.render(
            page=self, colorway=COLORWAY, css=own["page.css"], js=own["page.js"], plotly=get_plotlyjs()
        )
