"""How figures look: on a screen, in a paper, on a slide. A figure keeps the settings that it was made with."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kpflow_dyn.figures._palette import DARK_SERIES, SERIES

Draw = Callable[..., Figure]


@dataclass(frozen=True)
class Look:
    """The size of figures: all is drawn for `SCREEN`, and lines and letters are scaled from there.

    Attributes:
        width: of a figure, in inches.
        wide: of one whose panels stand side by side.
        letters: the size of letters, in points.
        heights: by how much heights are scaled.
        dpi: of PNG files.
    """

    width: float = 4.8  # on a telephone the letters stay readable
    wide: float = 9.0
    letters: float = 10
    heights: float = 1.0
    dpi: int = 150

    @property
    def lines(self) -> float:
        """By how much lines and markers are scaled."""
        return self.letters / SCREEN.letters


SCREEN = Look()
PAPER = {1: Look(3.5, 3.5, 7.5, 0.75, 300), 2: Look(7.2, 7.2, 7.5, 0.85, 300)}
TALK = Look(8.0, 14.0, 16, 1.5, 150)
FONTS = ["Arial", "Helvetica", "Liberation Sans", "DejaVu Sans"]

_look: ContextVar[Look] = ContextVar("look", default=SCREEN)


@contextmanager
def style(name: str = "screen", columns: int = 1) -> Iterator[None]:
    """Draw all figures of the package inside of a `with` block for a screen, a paper or a talk.

    | name | width | letters | PNG |
    |---|---|---|---|
    | "screen" | 4.8 in | 10 pt | 150 dpi |
    | "paper", columns=1 | 3.5 in (89 mm) | 7.5 pt | 300 dpi |
    | "paper", columns=2 | 7.2 in (183 mm) | 7.5 pt | 300 dpi |
    | "talk" | 8 in | 16 pt | 150 dpi |

    It holds for the functions of `kp.figures` and for every `.plot()`. A figure keeps its style, so that it may be
    saved behind the block. PDF files embed TrueType fonts, and SVG files keep letters as text. Colours are those of
    Okabe and Ito, which readers of all kinds of colour vision can tell apart.

    Args:
        name: "screen", "paper" or "talk".
        columns: of a paper, how many columns of the page the figure is wide: 1 or 2.

    Raises:
        ValueError: an unknown name, or another number of columns.

    >>> import numpy as np, kpflow_dyn as kp
    >>> components = kp.dynamics.pca(np.random.default_rng(0).standard_normal((4, 20, 6)))
    >>> with kp.figures.style("paper", columns=1):
    ...     figure = components.plot()
    >>> print(figure.get_figwidth())
    3.5
    """
    token = _look.set(_named(name, columns))
    try:
        yield
    finally:
        _look.reset(token)


def _named(name: str, columns: int) -> Look:
    if name == "paper" and columns in PAPER:
        return PAPER[columns]
    if name in ("screen", "talk") and columns == 1:
        return SCREEN if name == "screen" else TALK
    if name in ("screen", "paper", "talk"):
        raise ValueError(f"columns is {columns!r}, expected 1 or 2 of a paper, and 1 else")
    raise ValueError(f"style is {name!r}, expected 'screen', 'paper' or 'talk'")


class StyledFigure(Figure):
    """A matplotlib Figure that is drawn and saved with the settings that it was made with, whatever holds then."""

    def __init__(self, *args: Any, **given: Any) -> None:
        self.settings: dict[str, Any] = {}
        super().__init__(*args, **given)

    def draw(self, renderer: Any) -> None:
        with matplotlib.rc_context(self.settings):
            super().draw(renderer)

    def get_tightbbox(self, *args: Any, **given: Any) -> Any:
        with matplotlib.rc_context(self.settings):
            return super().get_tightbbox(*args, **given)

    def savefig(self, *args: Any, **given: Any) -> None:
        with matplotlib.rc_context(self.settings):
            super().savefig(*args, **given)

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return to_bytes(self)


def styled(draw: Callable[[Any], Figure]) -> Draw:
    """Draw in the style of the package, light or dark, without touching the caller's settings."""

    @functools.wraps(draw)
    def drawn(dataset: Any, dark: bool = False) -> Figure:
        look = _look.get()
        settings = _settings(look, dark)
        with matplotlib.rc_context(settings):
            figure = draw(dataset)
            figure.settings = settings  # type: ignore[attr-defined]
            _scale_lines(figure, look.lines)
            figure.align_ylabels()
            return figure

    del drawn.__wrapped__  # whose signature has no `dark`
    return drawn


def new_figure(height: float, rows: int = 1, heights: tuple[float, ...] | None = None) -> tuple[Figure, Any]:
    """A figure of the style's width, and its axes; `height` is in inches on a screen."""
    look = _look.get()
    figure = StyledFigure(figsize=(look.width, look.heights * height), layout="constrained")
    return figure, figure.subplots(rows, height_ratios=heights)


def new_grid(panels: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels, two in a row where a page has the width for that; `height` is that of a panel."""
    look = _look.get()
    columns = 1 if look is PAPER[1] else 2
    size = (look.wide, look.heights * height * math.ceil(panels / columns))
    figure = StyledFigure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(math.ceil(panels / columns), columns).flat)


def new_row(panels: int, height: float) -> tuple[Figure, Any]:
    """A figure of panels side by side that share the vertical axis; below one another in a column of a paper."""
    look = _look.get()
    stacked = look is PAPER[1]
    size = (look.wide, look.heights * height * (panels if stacked else 1))
    figure = StyledFigure(figsize=size, layout="constrained")
    return figure, figure.subplots(panels if stacked else 1, 1 if stacked else panels, sharey=True)


def to_bytes(figure: Figure, format: str = "png") -> bytes:
    """A figure as the bytes of a file.

    Args:
        figure: what to save.
        format: "png", "pdf", "svg", or another one that matplotlib knows.

    Raises:
        ValueError: a format that matplotlib does not know.

    >>> import numpy as np, kpflow_dyn as kp
    >>> components = kp.dynamics.pca(np.random.default_rng(0).standard_normal((4, 20, 6)))
    >>> kp.figures.to_bytes(components.plot(), "pdf")[:4]
    b'%PDF'
    """
    file = io.BytesIO()
    figure.savefig(file, format=format)
    return file.getvalue()


def series() -> list[str]:
    """The colours of lines."""
    return matplotlib.rcParams["axes.prop_cycle"].by_key()["color"]


def muted() -> str:
    """The colour of what stands behind."""
    return matplotlib.rcParams["axes.edgecolor"]


def faint() -> str:
    """The colour of what is almost not there."""
    return matplotlib.rcParams["grid.color"]


def _settings(look: Look, dark: bool) -> dict[str, Any]:
    return _sizes(look) | _colors(dark)


def _sizes(look: Look) -> dict[str, Any]:
    """Of letters, and of the lines that matplotlib draws by itself."""
    points = {"axes.linewidth": 0.8, "grid.linewidth": 0.8, "hatch.linewidth": 1.0, "axes.labelpad": 4.0}
    ticks = {"major.size": 3.5, "major.width": 0.8, "major.pad": 3.5, "minor.size": 2.0, "minor.width": 0.6}
    points |= {f"{axis}tick.{name}": size for axis in "xy" for name, size in ticks.items()}
    return {name: look.lines * size for name, size in points.items()} | {
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.labelsize": look.letters,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": look.letters,
        "figure.dpi": 150,
        "font.family": "sans-serif",
        "font.sans-serif": FONTS,
        "font.size": look.letters,
        "legend.frameon": False,
        "legend.fontsize": look.letters,
        "lines.linewidth": 1.8,  # as on a screen: lines are scaled when all are there
        "pdf.fonttype": 42,
        "ps.fonttype": 42,
        "savefig.dpi": look.dpi,
        "svg.fonttype": "none",
    }


def _colors(dark: bool) -> dict[str, Any]:
    text, muted, faint, page = (
        ("#e8e8e6", "#a0a09c", "#3a3d42", "#1b1d21") if dark else ("#1f2328", "#6b7075", "#e3e5e8", "#ffffff")
    )
    return {
        "axes.edgecolor": muted,
        "axes.facecolor": page,
        "axes.labelcolor": text,
        "axes.prop_cycle": cycler(color=DARK_SERIES if dark else SERIES),
        "figure.facecolor": page,
        "grid.color": faint,
        "hatch.color": muted,
        "text.color": text,
        "xtick.color": muted,
        "xtick.labelcolor": text,
        "ytick.color": muted,
        "ytick.labelcolor": text,
    }


def _scale_lines(figure: Figure, factor: float) -> None:
    """Lines, markers and error bars, whose sizes the functions of figures give as they are on a screen."""
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
    lines: list[Any] = [line for legend in legends if legend is not None for line in legend.findobj(Line2D)]
    lines += [line for axes in figure.axes for line in axes.lines]
    for line in lines:
        line.set_markersize(factor * line.get_markersize())
        line.set_markeredgewidth(factor * line.get_markeredgewidth())
    others: list[Any] = [drawn for axes in figure.axes for drawn in (*axes.collections, *axes.patches)]
    for drawn in (*lines, *others):
        drawn.set_linewidth(np.multiply(factor, drawn.get_linewidth()))
