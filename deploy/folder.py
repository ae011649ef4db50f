"""The data folder: everything that one `make up` keeps, and only one at a time."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from deploy.errors import CannotStart
from deploy.terminal import say

LAST_RUN_TIMEOUT_S = 120
"""A run that was killed leaves a process manager behind, which lets the worker finish its task."""
POLL_S = 0.1


def make(data: Path) -> None:
    """Make the folder for ourselves alone; one that exists keeps its mode.

    Raises:
        CannotStart: it cannot be made or written.
    """
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        (data / "lock").touch(mode=0o600)
    except OSError as error:
        raise CannotStart(f"The data folder {data} cannot be written: {error.strerror}") from error


@contextmanager
def locked(data: Path, check: Callable[[], None]) -> Iterator[int]:
    """Hold the folder's lock, and yield its file descriptor: who has that open holds it too.

    While the processes of a run that was killed are being stopped, this waits and calls `check`.

    Raises:
        CannotStart: another run holds it.
    """
    with (data / "lock").open("r+") as file:
        deadline = time.monotonic() + LAST_RUN_TIMEOUT_S
        told = False
        while not _lock(file.fileno()):
            if _runs(owner := file.read().strip()):
                raise CannotStart(f"Process {owner} already runs the service in {data}")
            if time.monotonic() > deadline:
                raise CannotStart(f"A process of the last run still holds {data / 'lock'}")
            if not told:
                say("The last run is still stopping; waiting for it.")
                told = True
            check()
            file.seek(0)
            time.sleep(POLL_S)
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield file.fileno()


def _lock(descriptor: int) -> bool:
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _runs(owner: str) -> bool:
    """Whether `owner` is a running `make up`, and not a number that another program has now."""
    try:
        return "deploy.local" in psutil.Process(int(owner)).cmdline()
    except (ValueError, psutil.Error):
        return False
