"""What a command shows on a terminal: bars while it works, and one line for whatever goes wrong."""

from __future__ import annotations

import errno
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

EXTRAS = {
    "torch": ("torch", "torchdiffeq", "safetensors"),
    "jax": ("jax", "equinox", "diffrax", "optax"),
    "plot": ("matplotlib", "plotly", "jinja2"),
    "sweep": ("cloudpickle", "loky"),
    "neuro": ("neurogym",),
    "checkpoints": ("msgpack",),
    "control": ("control",),
    "gym": ("gymnasium",),
}
"""The packages that extras bring; other code of theirs is imported when it is needed."""


@contextmanager
def plain_errors(debug: bool, interrupted: str = "nothing was written") -> Iterator[None]:
    """One line on stderr for whatever goes wrong, also Ctrl-C and `kill`; the traceback too to debug.

    `interrupted` is what to say of the results then, where the interrupt brings no words of its own.
    """
    try:
        with _terminable():
            yield
    except KeyboardInterrupt as error:
        _fail(f"interrupted: {str(error) or interrupted}", 128 + getattr(error, "signal", signal.SIGINT))
    except BrokenPipeError:
        raise  # typer ends quietly: whoever read the output wants no more of it
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        if debug:
            raise
        _fail(_missing(error) or _full(error) or str(error), 2)
    except Exception as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {error}; see --debug", 1)


def _full(error: Exception) -> str:
    """What could not be written, where an error of a full disk names no file."""
    no_file = isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None
    return f"cannot write to the standard output ({os.strerror(errno.ENOSPC)})" if no_file else ""


def _missing(error: Exception) -> str:
    """What to install, where a package of an extra is missing; else nothing."""
    name = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    extra = next((extra for extra, packages in EXTRAS.items() if name in packages), None)
    return "" if extra is None else f"this needs {name}, which is not installed: pip install 'kpflow-dyn[{extra}]'"


class _Terminated(KeyboardInterrupt):
    """What `kill` raises here."""

    signal = signal.SIGTERM


@contextmanager
def _terminable() -> Iterator[None]:
    """Let `kill` end the run as Ctrl-C does, through the clean-up of workers and temporary folders."""

    def end(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, status: int) -> NoReturn:
    typer.echo(f"kpflow-dyn: {one_line(message)}", err=True)
    raise typer.Exit(status)


def one_line(text: str) -> str:
    """Without line breaks."""
    return " ".join(text.split())


def print_notes(lines: list[str]) -> None:
    for line in lines:
        typer.echo(f"note: {line}", err=True)


def notes(caught: list[warnings.WarningMessage]) -> list[str]:
    """What this package warned of, each once; other packages' deprecations are none of the user's business."""
    ours = [str(w.message) for w in caught if w.category is UserWarning and "kpflow_dyn" in Path(w.filename).parts]
    return [one_line(text) for text in dict.fromkeys(ours)]
