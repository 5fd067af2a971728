"""An output folder that appears complete or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_folder(path: Path, names: set[str], overwrite: bool) -> None:
    """Raise an OSError, before any long work, if the folder could not be written at the end.

    One that is not empty may be replaced with `overwrite`, if it holds nothing but files of these names.
    """
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise FileExistsError(f"{path} exists and is not a folder; choose another one with --out")
    _check_contents(path, names, overwrite)
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=_nearest_existing(path)):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {path} ({error.strerror}); choose another folder with --out") from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder next to `path` that is renamed to it at the end, and removed after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        folder, replaced = Path(scratch, "new"), Path(scratch, "old")
        folder.mkdir()
        with _named(path):
            yield folder
        if path.exists():
            path.rename(replaced)
        try:
            folder.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A temporary name next to `path` that is renamed to it at the end, so that a kill leaves no partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    with _named(path):
        yield unfinished
    os.replace(unfinished, path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the path in an OSError that names no file, as of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or isinstance(error, FileExistsError | FileNotFoundError):
            raise
        raise OSError(f"cannot write {path} ({error.strerror or error})") from error


def _check_contents(path: Path, names: set[str], overwrite: bool) -> None:
    found = {entry.name for entry in path.iterdir()} if path.exists() else set()
    if found and not overwrite:
        raise FileExistsError(f"the folder {path} is not empty; give --overwrite, or another folder with --out")
    if foreign := sorted(found - names):
        raise FileExistsError(
            f"{path} holds {foreign[0]!r}, which no analysis wrote, so it is not overwritten; choose another --out"
        )


def _nearest_existing(path: Path) -> Path:
    """The folder in which the first new entry will be made."""
    parent = path.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    return parent
