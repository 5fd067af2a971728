"""The command `kpflow-dyn sweep`."""

from __future__ import annotations

import shlex
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpflow_dyn._folder import replaced
from kpflow_dyn.cli._options import Debug
from kpflow_dyn.cli._terminal import plain_errors

if TYPE_CHECKING:
    from kpflow_dyn.sweep import Sweep

KEPT = "the points that are done are kept; run again to resume"
SHOWN, WIDEST = 10, 200  # failures, and characters of each


def sweep(
    file: Annotated[Path, typer.Argument(help="A TOML file: model, init, task, grid and analysis.")],
    executor: Annotated[
        str, typer.Option(help="local (this process), process, dask or slurm.", rich_help_panel="Where it runs")
    ] = "process",
    workers: Annotated[
        int | None,
        typer.Option(help="Worker processes; by default one for each core.", min=1, rich_help_panel="Where it runs"),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Compute anew what failed.", rich_help_panel="Running again")
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Delete the points that are there, and begin anew.", rich_help_panel="Running again"
        ),
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", hidden=True)] = False,  # every run does; old scripts say so
    status: Annotated[
        bool, typer.Option("--status", help="Only say how far it is, and what failed.", rich_help_panel="Running again")
    ] = False,
    debug: Debug = False,
) -> None:
    """Analyse a model at each point of a grid; each point is a file of its own, and results.nc has all.

    Running the same command again computes what is missing.

    The exit status is 1 where points failed, 130 after Ctrl-C, 143 after kill.
    """
    with plain_errors(debug, interrupted=KEPT):
        from kpflow_dyn.sweep._configured import read_sweep

        found, timeout, options = read_sweep(file)
        if status:
            _report(found)
            return
        engine = _engine(executor, workers, options)
        found.function.try_points(found.design.points)
        found.run(engine, timeout=timeout, retry_failed=retry_failed, fresh=fresh)
        results = found.store.folder / "results.nc"
        with replaced(results) as path:
            found.collect().to_netcdf(path, engine="h5netcdf")
        failed = _report(found)
        typer.echo(f"The results: {results}")
        typer.echo(f"The page: kpflow-dyn report {_shown(found.store.folder)}")
    if failed:
        raise typer.Exit(1)


def _engine(name: str, workers: int | None, options: dict[str, Any]) -> Any:
    """The executor, with the options of its class that the file has in [executor]."""
    from kpflow_dyn.sweep import executor

    try:
        return executor(name, workers, **options)
    except TypeError as error:
        raise ValueError(f"[executor] does not fit --executor {name}: {error}") from error


def _report(found: Sweep) -> bool:
    """Say how far the sweep is, and which points failed and why; whether any did."""
    typer.echo(str(found.status()))
    failures = found.failures()
    for failure in failures[:SHOWN]:
        point = ", ".join(f"{name} = {value}" for name, value in failure.point.items())
        typer.echo(f"{failure.status} at {point}: {shorten(failure.error, WIDEST)}", err=True)
    if failures:
        left = f"and {len(failures) - SHOWN} more; " if len(failures) > SHOWN else ""
        typer.echo(
            f"{left}all of them: kpflow-dyn report {_shown(found.store.folder)}, or in Python sweep.failures(), with "
            "tracebacks; compute them again with --retry-failed",
            err=True,
        )
    return bool(failures)


def _shown(folder: Path) -> str:
    """A folder as one would type it."""
    here = Path.cwd()
    return shlex.quote(str(folder.relative_to(here) if folder.is_relative_to(here) else folder))
