"""`kpflow-dyn compare` on a folder or many files: distances of all pairs, by states and by how the networks learn."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpflow_dyn.cli._sources import Network

if TYPE_CHECKING:
    from kpflow_dyn._learning.similarity import Similarities

SENSES = {"states": "states", "ntk": "NTK", "PP": "P P*"}
ALIKE_FILES = {f"{of}.{kind}" for of in SENSES for kind in ("nc", "png")} | {"distances.txt"}
FEW_TRIALS = 12  # a kernel has (trials x times)^2 entries


def files_of(given: Sequence[Path]) -> list[Path]:
    """The checkpoints that were given: those in a folder, or the files themselves.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: fewer than two.
    """
    is_folder = len(given) == 1 and given[0].is_dir()
    files = sorted(one for one in given[0].iterdir() if not one.name.startswith(".")) if is_folder else list(given)
    if missing := [one for one in files if not one.exists()]:
        raise FileNotFoundError(f"no checkpoint {missing[0]}; give several files, or a folder of them")
    if len(files) < 2:
        raise ValueError(f"{len(files)} checkpoint in {given[0]}: compare takes several, or a folder of them")
    return files


def paths_in_short(files: Sequence[Path]) -> list[str]:
    """The files without what all their paths begin with.

    Raises:
        ValueError: one that is given twice.
    """
    paths = [str(one.absolute()) for one in files]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise ValueError(f"{twice[0]} is given twice; all pairs are compared of different files")
    start = os.path.commonpath([str(Path(one).parent) for one in paths])
    return [os.path.relpath(one, start) for one in paths]


def few_trials(source: Network) -> Network:
    """With few trials, if their number is not given, nor is that of a file."""
    of_file = str(source.task).endswith(".npz")
    return source if source.trials is not None or of_file else dataclasses.replace(source, trials=FEW_TRIALS)


def all_distances(flows: Sequence[Any], names: Sequence[str], measure: str, **asked: Any) -> dict[str, Similarities]:
    """In each sense."""
    import kpflow_dyn as kp

    return {of: kp.similarities(flows, of=of, measure=measure, names=names, **asked) for of in SENSES}


def table_of(found: dict[str, Similarities]) -> str:
    """All distances as text, and whether those of the states are those of learning."""
    lines = [str(one) for one in found.values()]
    if len(found["states"].names) >= 4:
        pairs = {of: found["states"].mantel(found[of]) for of in ("ntk", "PP")}
        lines += [f"distances of states and by {SENSES[of]} (Mantel test): {one}" for of, one in pairs.items()]
    return "\n".join(lines)


def write_distances(found: dict[str, Similarities], about: dict[str, Any], text: str, folder: Path) -> None:
    """A figure and a dataset for each sense, and one table."""
    (folder / "distances.txt").write_text(text + "\n")
    for of, one in found.items():
        one.plot().savefig(folder / f"{of}.png")
        one.to_xarray().assign_attrs(about).to_netcdf(folder / f"{of}.nc", engine="h5netcdf")
