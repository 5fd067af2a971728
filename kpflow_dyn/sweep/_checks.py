"""What the tables of a configured sweep say, checked before the first point: each key for its type and its range."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kpflow_dyn._numbers.summary import LEAST_SAMPLES
from kpflow_dyn.sweep._code import code_of
from kpflow_dyn.sweep._digests import hashed
from kpflow_dyn.tasks._by_path import object_at
from kpflow_dyn.tasks._data import check_count, check_number

MADE = ("model", "init", "task")
"""The tables that a model on a task is made of."""

Table = Mapping[str, Any]
LEAST = 8  # samples of an estimate


def raise_all(errors: Iterable[str]) -> None:
    """Raise one error that tells all of them."""
    if said := list(errors):
        raise ValueError(" ".join(f"({i}) {each}" for i, each in enumerate(said, 1)) if len(said) > 1 else said[0])


def check_analysis(given: Table, with_summary: bool) -> None:
    """Raise unless samples, seed and timeout are such numbers; a summary needs more samples than other quantities."""
    from kpflow_dyn._learning.losses import check_name

    if (loss := given.get("loss")) is not None:
        check_name(loss)
    if "samples" in given:
        check_count("[analysis] samples", given["samples"], LEAST_SAMPLES if with_summary else LEAST)
    check_count("[analysis] seed", given.get("seed", 0), 0)
    check_number("[analysis] timeout", timeout := given.get("timeout", 1))
    if not 0 < timeout < float("inf"):
        raise ValueError(f"[analysis] timeout must be a positive number of seconds, got {timeout}")


def check_tables(points: Sequence[Mapping[str, Table]], axes: Iterable[tuple[str, str]], path: Path) -> None:
    """Raise for tables, or for values on an axis, with which nothing can be made at any point."""
    raise_all(error for table in MADE for error in _of_table(table, points, list(axes), path))


def _of_table(
    table: str, points: Sequence[Mapping[str, Table]], axes: Sequence[tuple[str, str]], path: Path
) -> list[str]:
    """What is wrong with a table, or else with the values of an axis."""
    tables = {repr(sorted(point[table].items())): point[table] for point in points}
    errors = [(found, _error(table, found)) for found in tables.values()]
    for key in [None, *(key for where, key in axes if where == table)]:
        values = {repr(found.get(key)): found.get(key) for found, _ in errors}.values()
        if said := [text for value in values if (text := _of_value(table, key, value, errors, path))]:
            return said
    return []


def _of_value(table: str, key: str | None, value: Any, errors: list[tuple[Table, Any]], path: Path) -> str:
    """The error that all tables with this value have; of all tables where there is no key."""
    found = [error for entries, error in errors if key is None or entries[key] == value]
    at = "" if key is None else f" with {key} = {value!r}"
    return f"[{table}] in {path}{at}: {found[0]}" if all(found) else ""


def _error(table: str, given: Table) -> Exception | None:
    checks = {"model": _check_model, "init": _check_init, "task": _check_task}
    try:
        checks[table](**given)
    except Exception as error:
        return error
    return None


def _check_model(name: Any, **options: Any) -> None:
    from kpflow_dyn.models._named import check_model

    if given := {"inputs", "outputs", "init"} & set(options):
        raise ValueError(f"unknown key {', '.join(sorted(given))}; the task and [init] decide that, leave it out")
    check_model(name, **options)


def _check_init(**options: Any) -> None:
    from kpflow_dyn.models import make_init

    if options:
        make_init(options.pop("law"), **options)


def _check_task(name: Any, trials: Any = None, seed: Any = 0, **options: Any) -> None:
    from kpflow_dyn.tasks._data import count
    from kpflow_dyn.tasks._named import find_task

    if not isinstance(name, str):
        raise TypeError(f"name must be the name of a task, got {name!r}")
    count(trials)
    check_count("seed", seed, 0)
    find_task(name, options)


def code_named(points: Iterable[Mapping[str, Table]]) -> dict[str, str]:
    """Digests of the code and of the files of trials that tables name, so that a change of these is noticed."""
    names = {str(point[table].get(key)) for point in points for table, key in (("task", "name"), ("init", "law"))}
    return {name: digest for name in sorted(names) if (digest := _digest_of(name))}


def _digest_of(name: str) -> str:
    kind, colon, rest = name.partition(":")
    if name.endswith(".npz") or (kind == "npz" and colon):
        file = Path(rest if kind == "npz" and colon else name)
        return hashed(file.read_bytes()) if file.is_file() else ""
    if not colon or kind == "neurogym":
        return ""
    return hashed(repr(sorted(code_of(object_at(name, "the sweep")).items())))
