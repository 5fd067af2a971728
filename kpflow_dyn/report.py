"""The page of an analysis: one HTML file with its numbers, figures and settings, which needs no other file."""

from __future__ import annotations

import base64
import io
import math
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

CAPTIONS = {
    "spectra": (
        "Spectra",
        "Eigenvalues in descending order, both axes logarithmic. The core (line; all eigenvalues, exact) is what "
        "the weights see. K (squares) is what a change of weights does directly, to one step or to an ODE's field. The "
        "NTK (circles) is what it does to the whole trajectory, passed on by the dynamics. A steep fall means few "
        "learnable directions; an NTK high above K, that the dynamics amplify changes (of an ODE the two differ by "
        "the unit of time squared, so that only their shapes compare). Hollow marks have not converged.",
    ),
    "effective_ranks": (
        "Effective ranks",
        "How many directions carry most of each operator, with bars of two standard errors. The grey band ends at the "
        "dimension of the space: a dot far left of its end is a bottleneck.",
    ),
    "temporal_modes": (
        "Temporal modes",
        "When learning can act: eigenvectors of the NTK summed over trials and units. Above, the share of the trace of "
        "each mode, with bars of two standard errors; below, the leading modes over time, of an ODE with dots where "
        "the state was solved for, unless they are many. What a target needs outside of the modes with large shares is "
        "learnt late or never.",
    ),
    "spatial_modes": (
        "Spatial modes",
        "Which units learning can move: eigenvectors of the NTK summed over trials and times. Below, each row is a "
        "mode, each column a unit, sorted by its loading on mode 1. Units that are pale in every row hardly change.",
    ),
    "trial_modes": (
        "Trial modes",
        "Which trials change together: eigenvectors of the NTK summed over times and units. Below, each row is a mode, "
        "each column a trial. A mode of one sign changes all trials alike; a mode that changes sign with the condition "
        "can pull conditions apart.",
    ),
    "state_pca": (
        "State PCA",
        "Where the state is, as opposed to where it can be moved: its principal components over all trials and times "
        "(of an ODE weighted by the time that each stands for). Above, the variance that each explains; below, each "
        "trial in the plane of the first two, with a dot at its end.",
    ),
}
"""The title of each figure, and how to read it."""

INVISIBLE = 1e-6  # share of a number


def render_figures(dataset: xr.Dataset) -> dict[str, dict[str, bytes]]:
    """Each figure of the analysis as PNG, by name, for a "light" and a "dark" page."""
    from kpflow_dyn.figures import FIGURES

    return {
        name: {"light": to_png(draw(dataset)), "dark": to_png(draw(dataset, dark=True))}
        for name, draw in FIGURES.items()
    }


def to_png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def render_page(dataset: xr.Dataset, images: dict[str, dict[str, bytes]]) -> str:
    """The page of an analysis as HTML, everything inline.

    Args:
        dataset: what `analyze` returned.
        images: what `render_figures` made of it.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = _data_uri
    template = environment.from_string(files("kpflow_dyn").joinpath("report.html.jinja").read_text("utf-8"))
    figures = [(name, *CAPTIONS[name], image) for name, image in images.items()]
    return template.render(
        attrs=dataset.attrs,
        numbers=summarize(dataset),
        figures=figures,
        settings=settings(dataset),
        versions=versions(dataset),
    )


def summarize(dataset: xr.Dataset) -> dict[str, dict[str, Any]]:
    """The numbers of an analysis, by name: value, stderr, text ("34.0 ± 0.5"), and what the dataset says of each."""
    scalars = [str(name) for name, variable in dataset.data_vars.items() if variable.ndim == 0]
    return {name: _summary(float(dataset[name]), dict(dataset[name].attrs)) for name in scalars}


def settings(dataset: xr.Dataset) -> dict[str, Any]:
    """The attributes of the dataset that are settings."""
    others = ("version_", "warnings", "title")
    return {str(key): value for key, value in dataset.attrs.items() if not str(key).startswith(others)}


def versions(dataset: xr.Dataset) -> dict[str, str]:
    """The attributes of the dataset that are versions, by package."""
    return {
        str(key).removeprefix("version_"): str(value)
        for key, value in dataset.attrs.items()
        if str(key).startswith("version_")
    }


def with_error(value: float, stderr: float) -> str:
    """A number with its standard error, to the digits that the error leaves: "34.0 ± 0.5".

    An error that four digits would not show is left out.

    >>> with_error(34.04, 0.4839), with_error(8125.8581, 0.0)
    ('34.04 ± 0.48', '8126')
    """
    if not math.isfinite(stderr) or stderr <= INVISIBLE * abs(value) or not value:
        return f"{value:.4g}"
    power = math.floor(math.log10(abs(value)))
    if -3 <= power < 5:
        digits = max(0, 1 - math.floor(math.log10(stderr)))
        return f"{value:.{digits}f} ± {stderr:.{digits}f}"
    digits = max(0, power + 1 - math.floor(math.log10(stderr)))
    scale = 10.0**power
    return f"({value / scale:.{digits}f} ± {stderr / scale:.{digits}f})e{power}"


def _summary(value: float, attrs: dict[str, Any]) -> dict[str, Any]:
    return {"value": value, "text": with_error(value, attrs["stderr"]), **attrs}


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
