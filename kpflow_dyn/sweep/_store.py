"""The folder of a sweep: sweep.json says of which code and over what, points/ holds one file for each point.

While a point could end the process that drives the sweep, a file KEY.suspect stands there; it stays if the point does.
A file is written under another name and then renamed: whoever dies, and whenever, leaves whole files only.
"""

import hashlib
import json
import os
import shutil
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kpflow_dyn.sweep._code import changes
from kpflow_dyn.sweep._design import Point
from kpflow_dyn.sweep._values import MISSING, Record, from_file, to_bytes


@dataclass(frozen=True)
class Store:
    """The folder of a sweep."""

    folder: Path

    @property
    def points(self) -> Path:
        """Where the files of the points are."""
        return self.folder / "points"

    def file(self, key: str) -> Path:
        """Where a point is, or will be."""
        return self.points / f"{key}.npz"

    def has(self, key: str) -> bool:
        """Whether a point was recorded, whatever came of it."""
        return self.file(key).exists()

    def read(self, key: str, values: bool = True) -> Record:
        """What was recorded of a point, `MISSING` where nothing was; without values, all but its arrays."""
        try:
            return from_file(self.file(key), values)
        except FileNotFoundError:
            return MISSING
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.file(key)} is damaged ({error}); delete it, and run the sweep again") from error

    def write(self, key: str, record: Record) -> None:
        """Record a point; where the file cannot be written, nothing is left of it."""
        _write(self.file(key), to_bytes(record))

    def forget(self, key: str) -> None:
        """Have a point computed anew, as if nothing had ever happened."""
        self.file(key).unlink(missing_ok=True)
        self.clear(key)

    def suspect(self, key: str) -> None:
        """Note that a process may die of a point."""
        self._note(key).touch()

    def is_suspect(self, key: str) -> bool:
        """Whether a process died while the point was computed, perhaps of it."""
        return self._note(key).exists()

    def clear(self, key: str) -> None:
        """A point is no suspect any more."""
        self._note(key).unlink(missing_ok=True)

    @contextmanager
    def suspected(self, key: str) -> Iterator[None]:
        """The point is a suspect inside, and afterwards too if this process does not come to the end."""
        self.suspect(key)
        try:
            yield
        finally:
            self.clear(key)

    def _note(self, key: str) -> Path:
        return self.points / f"{key}.suspect"

    def code(self) -> dict[str, str] | None:
        """The code that the points were computed with, or None before there are any."""
        return None if (known := self.about()) is None else known["code"]

    def about(self) -> dict[str, Any] | None:
        """What `begin` was told of the sweep, its code among it; None before the first run."""
        try:
            known = json.loads((self.folder / "sweep.json").read_text())
            return {**known, "code": dict(known["code"])}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / 'sweep.json'} is not of a sweep; take another folder") from error

    def begin(self, code: Mapping[str, str], fresh: bool, **about: Any) -> None:
        """Make the folder ready for points of this code, and take away what a killed run left half written.

        `about` says what else a reader of the folder, who has not got the function, must know.
        """
        known = self.code()
        if known is not None and fresh:
            shutil.rmtree(self.points, ignore_errors=True)
        elif known is not None and (differ := changes(known, code)):
            raise ValueError(
                f"{self.folder} holds points of other code: {', '.join(differ)} changed. Take another folder, or begin "
                "anew with fresh=True, which deletes these points"
            )
        self.points.mkdir(parents=True, exist_ok=True)
        _write(self.folder / "sweep.json", json.dumps({"code": code, **about}, indent=2).encode())
        for unfinished in self.points.glob(".*"):
            unfinished.unlink(missing_ok=True)


def key_of(point: Point, code: Mapping[str, str]) -> str:
    """The name of a point: a hash of its arguments and of the code."""
    named = [sorted((name, repr(value)) for name, value in point.items()), sorted(code.items())]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:24]


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
