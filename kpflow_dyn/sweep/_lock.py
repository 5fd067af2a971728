"""One sweep at a time in a folder."""

import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder until the end; the kernel lets go of it when this process dies, however it does.

    Where the file system has no locks, two sweeps compute points twice, without harm to them.
    """
    import fcntl

    with open(folder / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{folder} is in use by {_holder(folder)}; wait, or take another folder") from None
        except OSError as error:
            warnings.warn(f"{folder} knows no locks ({error.strerror}); start one sweep at a time there", stacklevel=3)
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": time.ctime()}, file)
        file.flush()
        yield


def _holder(folder: Path) -> str:
    with suppress(OSError, ValueError, KeyError):
        known = json.loads((folder / "lock").read_text())
        return f"a sweep with pid {known['pid']} on {known['host']}, since {known['since']}"
    return "another sweep"
