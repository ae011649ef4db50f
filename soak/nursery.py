"""`python -m soak.nursery`: forks the service's processes from one that has imported them.

A process is killed every other second, and two seconds of importing for each start would be most of
what the machine does. Otherwise they are what `python -m MODULE` is: processes of their own.

Reads a line of JSON for each process that shall start: its `module` with arguments, what is added
to its `env`, the path of its `log`, and how wrong its clock is, `clock_off_s`. It writes
{"started": pid}, and {"ended": pid} in the end.
"""

import argparse
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import time_machine

PR_SET_PDEATHSIG = 1
STDIN = 0
IMPORTED = (
    "api.app",
    "api.courier",
    "alembic.command",
    "boto3",
    "soak.painter",
    "uvicorn",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.httptools_impl",
)


def end_with_parent() -> None:
    """Nothing is left behind by a harness that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m soak.nursery", description=__doc__)
    parser.add_argument("--with", dest="more", nargs="*", default=[], help="modules to import")
    parser.add_argument("--without", help="the guard to take away")
    asked = parser.parse_args()
    end_with_parent()
    for module in (*IMPORTED, *asked.more):
        importlib.import_module(module)
    if asked.without:
        importlib.import_module("soak.without").GUARDS[asked.without]()
    gc.freeze()
    signal.signal(signal.SIGCHLD, lambda *_: None)
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    while True:
        ready, _, _ = select.select([STDIN, ended], [], [])
        if ended in ready:
            os.read(ended, 4096)
            _report_ended()
        if STDIN in ready:
            line = _line()
            if not line:
                return
            _tell({"started": _start(json.loads(line))})


def _line() -> bytes:
    """One byte at a time, so that nothing waits unseen in a buffer."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(STDIN, 1)
        if not byte:
            return b""
        line += byte
    return line


def _start(asked: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        _become(asked)
        status = 0
    except SystemExit as over:
        status = over.code if isinstance(over.code, int) else int(over.code is not None)
        if isinstance(over.code, str):
            print(over.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _become(asked: dict[str, Any]) -> None:
    end_with_parent()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(asked["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for there, here in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(there, here)
    os.environ.update(asked["env"])
    if asked["clock_off_s"]:
        wrong = datetime.now(UTC) + timedelta(seconds=asked["clock_off_s"])
        time_machine.travel(wrong, tick=True).start()
    importlib.reload(importlib.import_module("api.settings"))  # the port is each API process's own
    module, *arguments = asked["module"]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _report_ended() -> None:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _tell({"ended": pid})


def _tell(what: dict[str, int]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


if __name__ == "__main__":
    main()
