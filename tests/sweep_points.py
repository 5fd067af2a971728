"""Functions for sweeps, in a module that worker processes can import in no time."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Law:
    g: float

    def times(self, n):
        return {"x": self.g * n}


def numbers(g, seed):
    return {"gain": g + 10 * seed, "line": g * np.arange(3.0)}


def brief(seed):
    time.sleep(0.02)
    return {"square": seed**2}


def noted(log, seed):
    """Notes each evaluation, and takes a while."""
    with open(log, "a") as file:
        file.write(f"{seed}\n")
    time.sleep(0.1)
    return {"square": seed**2}


def troubled(kind):
    """A point of each kind of trouble."""
    if kind == "raises":
        raise ArithmeticError("no number")
    if kind == "sleeps":
        time.sleep(60)
    if kind == "ignores":
        while True:
            try:
                time.sleep(60)
            except BaseException:
                continue
    if kind == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"value": np.nan if kind == "nan" else 1.0}


class Stop(BaseException):
    """No Exception."""


LEAVING = {"KeyboardInterrupt": KeyboardInterrupt, "GeneratorExit": GeneratorExit, "Stop": Stop, "exit": SystemExit}


def leaves(kind):
    """A point that leaves by a door that is no Exception."""
    if kind == "exit 0":
        sys.exit(0)
    if kind in LEAVING:
        raise LEAVING[kind]
    return {"value": 1.0}


def ends(kind):
    """A point that ends its process, or is told to by a signal."""
    if kind == "_exit":
        os._exit(0)
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGABRT)
    if kind == "SIGINT":
        signal.raise_signal(signal.SIGINT)
    return {"value": 1.0}


def dies_once(folder, seed):
    """Kills its process the first time that the third point is computed."""
    mark = Path(folder, "died")
    if seed == 3 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"square": seed**2}


def large(size):
    return {"zeros": np.zeros(size)}
