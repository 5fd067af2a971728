"""The command `kpflow-dyn sweep`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpflow_dyn._folder import replaced
from kpflow_dyn.cli._options import Debug
from kpflow_dyn.cli._terminal import plain_errors

if TYPE_CHECKING:
    from kpflow_dyn.sweep import Sweep

KEPT = "what is finished is kept, and the same command with --resume goes on"
SHOWN = 5


def sweep(
    file: Annotated[Path, typer.Argument(help="A TOML file: model, init, task, grid and analysis.")],
    executor: Annotated[str, typer.Option(help="local (this process), process, dask or slurm.")] = "process",
    workers: Annotated[int | None, typer.Option(help="Worker processes; by default one for each core.", min=1)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in a folder that has points already.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Compute anew what failed.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the points that are there, and begin anew.")] = False,
    status: Annotated[bool, typer.Option("--status", help="Say how far it is, and do nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Analyse a model at each point of a grid; write one file for each, and results.nc with all.

    The exit status is 1 where points failed; all others are in the results then.
    """
    with plain_errors(debug, interrupted=KEPT):
        from kpflow_dyn.sweep._configured import read_sweep

        found, timeout, options = read_sweep(file)
        if status:
            _report(found)
            return
        _check_folder(found, resume or fresh)
        engine = _engine(executor, workers, options)
        found.function.try_points(found.design.points)
        found.run(engine, timeout=timeout, retry_failed=retry_failed, fresh=fresh)
        results = found.store.folder / "results.nc"
        with replaced(results) as path:
            found.collect().assign_attrs(_settings(found)).to_netcdf(path, engine="h5netcdf")
        failed = _report(found)
        typer.echo(f"The results: {results}")
    if failed:
        raise typer.Exit(1)


def _check_folder(found: Sweep, known: bool) -> None:
    """Points of an earlier run are gone on with when that was asked for."""
    if found.store.code() is not None and not known:
        raise FileExistsError(
            f"{found.store.folder} has a sweep already; give --resume to go on with it, --fresh to delete it, or "
            "another folder as out = in the file"
        )


def _engine(name: str, workers: int | None, options: dict[str, Any]) -> Any:
    """The executor, with the options of its class that the file has in [executor]."""
    from kpflow_dyn.sweep import executor

    try:
        return executor(name, workers, **options)
    except TypeError as error:
        raise ValueError(f"[executor] does not fit --executor {name}: {error}") from error


def _settings(found: Sweep) -> dict[str, str]:
    """The tables of the file, as they stand in the results."""
    tables = dataclasses.asdict(found.function)
    return {name: json.dumps(tables[name]) for name in ("model", "init", "task", "samples", "seed")}


def _report(found: Sweep) -> bool:
    """Say how far the sweep is, and whether points failed."""
    typer.echo(str(found.status()))
    failures = found.failures()
    for failure in failures[:SHOWN]:
        point = ", ".join(f"{name} = {value}" for name, value in failure.point.items())
        typer.echo(f"{failure.status} at {point}: {failure.error}", err=True)
    if len(failures) > SHOWN:
        typer.echo(f"and {len(failures) - SHOWN} more", err=True)
    return bool(failures)
