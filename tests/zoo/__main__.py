"""The zoo, member by member:  python -m tests.zoo [NAME ...] [--family FAMILY ...]

Prints each row as it comes, and keeps it in benchmarks/zoo.json in the place of an earlier row of that member; all rows
there make docs/zoo.md. A member that takes too long, or takes the process down, costs only its own row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from .measure import names_of, prepare, row_of
from .member import FAMILIES
from .page import PAGE, line, page, summary

ROWS = Path(__file__).parents[2] / "benchmarks" / "zoo.json"
LIMIT = 180.0  # seconds for one member
Row = dict[str, Any]


def rows(family: str, wanted: Sequence[str]) -> Iterator[Row]:
    """The rows of one family, from a process of its own, or of as many as its members take down."""
    pool = _process()
    for name in pool.submit(names_of, family).result():
        if wanted and not name.startswith(tuple(wanted)):
            continue
        pool = pool or _process()
        try:
            yield pool.submit(row_of, family, name).result(LIMIT)
        except (TimeoutError, BrokenProcessPool) as error:
            late = isinstance(error, TimeoutError)
            sentence = f"took more than {LIMIT:.0f} s" if late else "took its process down"
            yield {"name": name, "package": name.split(":")[0], "outcome": "failed", "sentence": sentence}
            _end(pool)
            pool = None
    if pool:
        pool.shutdown()


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), initializer=prepare)


def _end(pool: ProcessPoolExecutor) -> None:
    for process in list(pool._processes.values()):
        process.kill()


def main() -> None:
    """All members, or those that were named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="how the names of members begin, such as timm")
    parser.add_argument("--family", nargs="*", default=FAMILIES, choices=FAMILIES, help="which families; all if none")
    parser.add_argument("--json", type=Path, default=ROWS, help="where the rows are kept")
    arguments = parser.parse_args()
    file: Path = arguments.json
    found = json.loads(file.read_text()) if file.exists() else {}
    for family in arguments.family:
        try:
            for row in rows(family, arguments.names):
                found[row["name"]] = row
                print(line(row), flush=True)
                file.write_text(json.dumps(found, indent=1))
        except ImportError as error:
            print(f"{family}: left out, {error}", flush=True)
    print(summary(found.values()))
    PAGE.write_text(page(found.values()))


if __name__ == "__main__":
    main()
