"""How results print themselves, in a terminal and in a notebook, and what the type of a value is called."""

from __future__ import annotations

import html
import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

Row = tuple[str, str] | str
LINES, COLUMNS = 12, 100  # of a repr
INVISIBLE = 1e-6  # a relative standard error that is left out of print


class Shown:
    """An object that prints itself as a title and a few rows, and as a small table in a notebook.

    The rows are the fields of a dataclass, unless a class writes `_shown`. `repr` is cut to 12 lines of 100 columns,
    `print` shows all. (Dataclasses need `repr=False`.)
    """

    def _shown(self) -> tuple[str, list[Row]]:
        """The title, and rows: (name, value), or a line as it is."""
        given: Any = self  # a dataclass
        told = {field.name: getattr(self, field.name) for field in fields(given) if field.init and field.repr}
        return type(self).__name__, [(name, described(value)) for name, value in told.items() if value is not None]

    def __str__(self) -> str:
        return "\n".join(_lines(*self._shown()))

    def __repr__(self) -> str:
        title, rows = self._shown()
        return "\n".join(_cut(line) for line in _lines(title, _few(rows)))

    def _repr_html_(self) -> str:
        title, rows = self._shown()
        parts = itertools.groupby(_few(rows), key=lambda row: isinstance(row, str))
        shown = [_text(part) if of_text else _table(part) for of_text, part in parts]
        return f"<div><b>{html.escape(title)}</b>{''.join(shown)}</div>"


class ShownAsText(Shown):
    """One whose `__str__` is a text of several lines, which are the rows."""

    def _shown(self) -> tuple[str, list[Row]]:
        return type(self).__name__, list(str(self).splitlines())


class ShownAsRepr:
    """One that has a short text of its own as `__repr__`, which a notebook shows as well."""

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"


def sizes(axes: Sequence[str], array: Any) -> str:
    """Such as: [trial 8, time 40, unit 64] float32 on cpu."""
    return f"{axes_sizes(axes, array.shape)} {plain(array.dtype)} on {_place(array)}"


def axes_sizes(axes: Sequence[str], shape: Iterable[int]) -> str:
    """Such as: [trial 8, time 40, unit 64]."""
    return f"[{', '.join(f'{name} {n}' for name, n in zip(axes, shape, strict=True))}]"


def labelled(array: Any) -> str:
    """The sizes of an xarray, such as: [trial 8, time 40, unit 64]."""
    return axes_sizes(list(map(str, array.dims)), array.shape)


def plain(dtype: Any) -> str:
    """Such as: float32."""
    return str(dtype).rpartition(".")[2]


def some(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, such as: weight_ih, weight_hh, bias_ih, ..."""
    return ", ".join([*names[:most], *["..."] * (len(names) > most)])


def numbers(values: Iterable[Any], most: int = 6) -> str:
    """The first of some numbers, such as: 3.2, 0.41, 0.032, ..."""
    return listed(map(number, values), most)


def number(value: Any) -> str:
    """Four digits of a number, real or complex."""
    value = complex(value)
    if value.imag == 0:
        return f"{value.real:.4g}"
    return f"{value.real:.4g}{value.imag:+.4g}i"


def plural(number: int, noun: str) -> str:
    """Such as: 1 trial, or 1,200 steps."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def with_error(value: float, stderr: float, most: int | None = None) -> str:
    """A number with its standard error, to the digits that the error leaves: "34.0 ± 0.5".

    Args:
        value: the number; NaN is one that is not known.
        stderr: its standard error, left out where the digits shown would hide it; NaN or inf where it is not known.
        most: significant digits to show at most; by default as many as the error leaves.

    >>> with_error(34.04, 0.4839), with_error(8125.8581, 0.0), with_error(1.01418, 1.2e-6, most=4)
    ('34.04 ± 0.48', '8126', '1.014')
    >>> with_error(1.0142, 2e-3, most=4), with_error(34.04, float("nan"))
    ('1.014 ± 0.002', '34.04 ± unknown')
    """
    if math.isnan(value):
        return "not known"
    if not math.isfinite(value):
        return f"{value:.4g}"
    last = math.floor(math.log10(abs(value))) + 1 - most if most and value else -math.inf  # the power of the last digit
    if stderr <= max(INVISIBLE * abs(value), 0.5 * 10.0**last):
        return f"{value:.4g}"
    if not math.isfinite(stderr):
        return f"{value:.4g} ± unknown"
    power, of_error = math.floor(math.log10(max(abs(value), stderr))), math.floor(math.log10(stderr)) - 1
    smallest = max(of_error, last)
    if -3 <= power < 5:
        digits = int(max(0, -smallest))
        return f"{value:.{digits}f} ± {stderr:.{digits}f}"
    digits = int(max(0, power - smallest))
    scale = 10.0**power
    return f"({value / scale:.{digits}f} ± {stderr / scale:.{digits}f})e{power}"


def with_bar(found: Any, most: int | None = None) -> str:
    """An estimate with its standard error; for `most` see `with_error`."""
    return with_error(found.value, found.stderr, most)


def listed(texts: Iterable[str], most: int = 6) -> str:
    """The first of some texts, such as: 3.2, 0.41, 0.032, ..."""
    found = list(texts)
    return ", ".join([*found[:most], *["..."] * (len(found) > most)])


def shares(values: Iterable[Any], most: int = 4) -> str:
    """The first of some shares, such as: 62 %, 21 %, 9.1 %, ..."""
    return listed((f"{100 * float(value):.2g} %" for value in values), most)


def span(times: Any) -> str:
    """Such as: 0 to 1.5, 40 times."""
    n = len(times)
    return f"{number(times[0])} to {number(times[-1])}, {n} times" if n > 1 else f"{number(times[0])}, one time"


def described(value: Any) -> str:
    """What was given, in a line: an array by its shape, a few short values as they are, and a model by its type."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{list(value.shape)} {plain(value.dtype)} on {_place(value)}"
    if isinstance(value, dict):
        return some([f"{name} {described(one)}" for name, one in value.items()])
    if isinstance(value, str):
        return value
    if isinstance(value, int | float | bool | tuple) and len(text := repr(value)) < COLUMNS // 2:
        return text
    return getattr(value, "__name__", type_name(value))


def type_name(value: Any) -> str:
    """What the type of a value, or a class, is called, with its library: diffrax.Solution, torch.nn.GRU, dict."""
    kind = value if isinstance(value, type) else type(value)
    name, module = kind.__name__, kind.__module__
    if module.partition(".")[0] in ("builtins", "kpflow_dyn", "__main__"):
        return name
    if name == "ArrayImpl":
        return "jax.Array"
    parts = module.split(".")
    public = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    found = (path for path in public if "._" not in path and getattr(sys.modules.get(path), name, None) is kind)
    return f"{next(found, parts[0])}.{name}"


def _lines(title: str, rows: list[Row]) -> list[str]:
    width = max([len(row[0]) for row in rows if not isinstance(row, str)], default=0)
    return [title, *(f"  {row if isinstance(row, str) else f'{row[0]:{width}}  {row[1]}'}" for row in rows)]


def _few(rows: list[Row]) -> list[Row]:
    if len(rows) < LINES:
        return rows
    return [*rows[: LINES - 2], f"... print() shows all {len(rows)} lines"]


def _cut(line: str) -> str:
    return line if len(line) <= COLUMNS else f"{line[: COLUMNS - 3]}..."


def _text(lines: Iterable[Row]) -> str:
    """One block, whose lines break between words; notebooks stripe the rows of a table."""
    text = html.escape("\n".join(map(str, lines)))
    return f'<pre style="margin: 0; white-space: pre-wrap; word-break: normal">{text}</pre>'


def _table(rows: Iterable[Row]) -> str:
    cells = "".join(
        f'<tr><th style="text-align: left">{html.escape(name)}</th>'
        f'<td style="text-align: left">{html.escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table>{cells}</table>"


def _place(array: Any) -> str:
    """The device of an array of any library; of one that is sharded how many."""
    device = getattr(array, "device", "cpu")
    if (shards := len(getattr(device, "device_set", ()))) > 1:
        return f"{shards} devices"
    return str(getattr(device, "platform", device))
