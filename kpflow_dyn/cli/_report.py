"""The command `kpflow-dyn report`."""

from pathlib import Path
from typing import Annotated

import typer

from kpflow_dyn.cli._options import Debug, Overwrite, of_output
from kpflow_dyn.cli._terminal import plain_errors

PAGE = "report.html"


def report(
    path: Annotated[
        Path,
        typer.Argument(
            help="The folder of an analysis, a track, a comparison or a sweep (of a kp.Sweep too, done or not), or a "
            "NetCDF file."
        ),
    ],
    out: Annotated[
        Path | None, of_output(help="The HTML file to write; by default report.html beside the results.")
    ] = None,
    show: Annotated[bool, of_output("--open", help="Also open the page in the browser.")] = False,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Make one page with interactive figures, which needs no other file and no network."""
    with plain_errors(debug):
        from kpflow_dyn.report import write_report

        out = (path if path.is_dir() else path.parent) / PAGE if out is None else out
        if out.exists() and not overwrite and not _is_page(out):
            raise FileExistsError(f"{out} exists; give --overwrite, or another file with --out")
        write_report(path, out)
        typer.echo(f"The page: {out.absolute()}")
        if show:
            typer.launch(out.absolute().as_uri())


def _is_page(file: Path) -> bool:
    """Whether this package wrote the file as a page, so that another one may replace it."""
    with file.open("rb") as opened:
        return b'<meta name="generator" content="kpflow_dyn">' in opened.read(1000)
