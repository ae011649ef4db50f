"""Nothing is left running: not when we end before our time, not from a run that did."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

STOP_TIMEOUT_S = 10


@contextmanager
def signalled_after_us(*pids: int, by: signal.Signals) -> Iterator[None]:
    """Have `pids` signalled when this process ends before the block does, by kill -9 for example.

    A shell waits for the end of its input, which the kernel closes together with us: the same on
    Linux and macOS, and what is watched need not know.
    """
    with subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _; kill "$@"', "sh", f"-{by.value}", *map(str, pids)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as watcher:
        try:
            yield
        finally:
            watcher.kill()  # before its input ends: nobody is to be signalled now
            watcher.wait()


def end(marks: dict[str, str]) -> int:
    """End every process whose environment has all of `marks`; return how many there were.

    For what a killed process manager left behind; what it ran survives being killed too.
    """
    found = [process for process in psutil.process_iter() if _has(process, marks)]
    for process in found:
        with suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(found, STOP_TIMEOUT_S)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, STOP_TIMEOUT_S)
    return len(found)


def _has(process: psutil.Process, marks: dict[str, str]) -> bool:
    try:
        return process.pid != os.getpid() and marks.items() <= process.environ().items()
    except (psutil.Error, OSError):  # it ended, or it is another user's and so none of ours
        return False
