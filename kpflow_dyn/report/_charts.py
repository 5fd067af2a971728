"""Interactive figures as data: what plotly draws on a page, in views that the reader chooses from.

Colours are left to the page, which knows whether it is light or dark: lines take the page's colorway, and maps of one
sign or of two name their scale only.
"""

import html
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SEQUENTIAL, DIVERGING = "sequential", "diverging"
BARS = {"thickness": 1, "width": 3}
TRACE_COLOURS = 8  # of the page's colorway
MOST_NUMBERS = 50_000  # in all views of one chart, so that a page stays below 3 MB


@dataclass(frozen=True)
class Choice:
    """A list to choose from on the page."""

    label: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Chart:
    """A figure with a title and a caption, in plain text.

    Files of its numbers take their columns from the titles of its axes and from the names of its traces.
    """

    name: str  # its anchor on the page
    title: str
    caption: str  # how to read it
    views: Mapping[tuple[int, ...], Any]  # plotly figures, by the numbers of the options chosen, (0, 2)
    choices: tuple[Choice, ...] = ()
    height: int = 380  # in pixels
    finding: str | Mapping[tuple[int, ...], str] = ""
    """What it shows here, in a sentence or two, in all views or by view: also for those who cannot see it."""

    def said(self, *view: int) -> str:
        """What a view shows, the first one by default."""
        return self.finding if isinstance(self.finding, str) else self.finding[view or next(iter(self.views))]

    def to_json(self) -> str:
        """The views for the page's script, each with its finding: JSON that may stand inside of a script element."""
        views = {
            ",".join(map(str, key)): json.loads(view.to_json()) | {"finding": self.said(*key)}
            for key, view in self.views.items()
        }
        return json.dumps(views, separators=(",", ":")).replace("<", "\\u003c")


def views(draw: Callable[..., Any], *options: Iterable[Any]) -> dict[tuple[int, ...], Any]:
    """draw(option, ...) for each combination of options, by their numbers."""
    combined = itertools.product(*(enumerate(given) for given in options))
    return {tuple(number for number, _ in each): draw(*(option for _, option in each)) for each in combined}


def figure(traces: Sequence[Any], **layout: Any) -> Any:
    """A plotly figure without a look of its own; where it has panels, `meta` names what is along x in all of them."""
    import plotly.graph_objects as go

    return go.Figure(list(traces), go.Layout(template="none", **layout))


def line(x: Any, y: Any, name: str, color: int | None = None, also: str = "", **style: Any) -> Any:
    """A line; `color` is a number in the page's colorway, `also` the name of customdata, which files then hold."""
    import plotly.graph_objects as go

    meta = ({} if color is None else {"color": color % TRACE_COLOURS}) | ({"customdata": also} if also else {})
    style = {"mode": "lines", "hovertemplate": "%{x}: %{y:.4g}"} | style
    return go.Scatter(x=numbers(x), y=numbers(y), name=plain(name), meta=meta, **style)


def with_bars(stderr: Any) -> dict[str, Any]:
    """Error bars of two standard errors."""
    return {"type": "data", "array": numbers(2 * np.asarray(stderr, float)), **BARS}


def spread(up: Any, down: Any) -> dict[str, Any]:
    """Bars up to the largest and down to the least value, of these lengths."""
    return {"type": "data", "array": numbers(up), "symmetric": False, "arrayminus": numbers(down), **BARS}


def heat_map(z: np.ndarray, x: Any, y: Any, scale: str, hover: str, title: str = "", most: float | None = None) -> Any:
    """A map of z [y, x]; a diverging one has zero in its middle, up to `most` on both sides."""
    import plotly.graph_objects as go

    limits: dict[str, Any] = {}
    if scale == DIVERGING:
        most = float(np.nanmax(np.abs(z), initial=0) if most is None else most) or 1.0
        limits = {"zmin": -most, "zmax": most}
    bar = {"title": {"text": plain(title), "side": "right"}, "thickness": 12}
    return go.Heatmap(
        z=numbers(z), x=x, y=y, meta={"scale": scale}, hovertemplate=hover, name="", colorbar=bar, **limits
    )


def numbers(values: Any) -> np.ndarray:
    """As they are written into the page: single precision."""
    array = np.asarray(values)
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def plain(text: object) -> str:
    """Text that plotly, which knows some HTML, shows as it is."""
    return html.escape(str(text), quote=False)


def evenly(count: int, most: int) -> np.ndarray:
    """At most so many of the numbers below `count`, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, max(most, 1))).round().astype(int))
