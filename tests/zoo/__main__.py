"""The zoo, member by member:  python -m tests.zoo [NAME ...]

Prints each row as it comes, and writes them all to zoo.json and to docs/zoo.md. Names choose the members whose name
begins so; then no page is written. A member that takes too long, or takes the process down, costs only its own row.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from .measure import prepare, row_of
from .member import FAMILIES, family
from .page import PAGE, line, page, summary

LIMIT = 180.0  # seconds for one member


def rows(name: str, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of one family, from a process of its own, or of as many as its members take down."""
    members = [m for m in family(name) if not wanted or m.name.startswith(tuple(wanted))]
    pool = None
    for member in members:
        pool = pool or ProcessPoolExecutor(1, get_context("spawn"), initializer=prepare)
        try:
            yield pool.submit(row_of, name, member.name).result(LIMIT)
        except (TimeoutError, BrokenProcessPool) as error:
            late = isinstance(error, TimeoutError)
            outcome = f"took more than {LIMIT:.0f} s" if late else "took its process down"
            yield {"name": member.name, "package": member.package, "outcome": "failed", "sentence": outcome}
            for process in list(pool._processes.values()):
                process.kill()
            pool = None
    if pool:
        pool.shutdown()


def main() -> None:
    """All members, or those that were named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="how the names of members begin, such as timm")
    parser.add_argument("--json", type=Path, default=Path("zoo.json"), help="where the numbers go")
    arguments = parser.parse_args()
    start, found, missing = time.perf_counter(), [], {}
    for name in FAMILIES:
        try:
            for row in rows(name, arguments.names):
                found.append(row)
                print(line(row), flush=True)
                arguments.json.write_text(json.dumps(found, indent=1))
        except ImportError as error:
            missing[name] = str(error)
            print(f"{name}: left out, {error}", flush=True)
    seconds = time.perf_counter() - start
    print(f"{summary(found)}, in {seconds:.0f} s")
    if not arguments.names:
        PAGE.write_text(page(found, seconds, missing))


if __name__ == "__main__":
    main()
