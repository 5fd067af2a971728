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
TRACE_COLOURS = 8  # of the page's colorway
MOST_NUMBERS = 150_000  # in all views of one chart


@dataclass(frozen=True)
class Choice:
    """A list to choose from on the page."""

    label: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Chart:
    """A figure with a title and a caption, in plain text."""

    name: str  # its anchor on the page
    title: str
    caption: str
    views: Mapping[tuple[int, ...], Any]  # plotly figures, by the numbers of the options chosen, (0, 2)
    choices: tuple[Choice, ...] = ()
    height: int = 380  # in pixels

    def to_json(self) -> str:
        """The views for the page's script: JSON that may stand inside of a script element."""
        views = {",".join(map(str, key)): json.loads(view.to_json()) for key, view in self.views.items()}
        return json.dumps(views, separators=(",", ":")).replace("<", "\\u003c")


def views(draw: Callable[..., Any], *options: Iterable[Any]) -> dict[tuple[int, ...], Any]:
    """draw(option, ...) for each combination of options, by their numbers."""
    combined = itertools.product(*(enumerate(given) for given in options))
    return {tuple(number for number, _ in each): draw(*(option for _, option in each)) for each in combined}


def figure(traces: Sequence[Any], **layout: Any) -> Any:
    """A plotly figure without a look of its own."""
    import plotly.graph_objects as go

    return go.Figure(list(traces), go.Layout(template="none", **layout))


def line(x: Any, y: Any, name: str, color: int | None = None, **style: Any) -> Any:
    """A line; `color` is a number in the page's colorway."""
    import plotly.graph_objects as go

    meta = {} if color is None else {"meta": {"color": color % TRACE_COLOURS}}
    return go.Scatter(x=numbers(x), y=numbers(y), name=plain(name), **({"mode": "lines"} | meta | style))


def with_bars(stderr: Any) -> dict[str, Any]:
    """Error bars of two standard errors."""
    return spread(2 * np.asarray(stderr, float))


def spread(up: Any, down: Any = None) -> dict[str, Any]:
    """Bars of these lengths, the same in both directions where `down` is None."""
    both = {} if down is None else {"symmetric": False, "arrayminus": numbers(down)}
    return {"type": "data", "array": numbers(up), "thickness": 1, "width": 3, **both}


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
