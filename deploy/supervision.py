"""The processes of `make up` under supervisord: started, watched, started again, stopped in order.

supervisord runs in a session of its own, so that a Ctrl-C reaches us alone and we say what stops
when. Secrets reach the processes by supervisord's environment; its configuration names none.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import psutil
from supervisor.xmlrpc import SupervisorTransport

from deploy import orphans, private
from deploy.errors import CannotStart

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 20
POLL_S = 0.1
QUICK_POLL_S = 0.02
"""While it starts."""
STAYS_UP_S = 3
RETRIES = 3
"""What ends within STAYS_UP_S is started again after 1, 2 and 3 s, and then marked as given up."""
LOG_MAX = "20MB"
LOGS_KEPT = 3
APP = "app"
SERVERS = "servers"
MARK = "ZIMAGE_SUPERVISED_FOR"
"""An environment variable of every process that we run: the data folder that it runs for."""
NO_ANSWER = (OSError, HTTPException, Fault)


@dataclass(frozen=True)
class Program:
    """A process that is kept running; the whole group APP is stopped before any of SERVERS."""

    name: str
    argv: Sequence[str]
    group: str
    stop_timeout_s: int
    stop_signal: signal.Signals = signal.SIGTERM
    user: str | None = None

    @property
    def log(self) -> Path:
        """Relative to the data folder."""
        return Path("logs") / f"{self.name}.log"


@dataclass(frozen=True)
class State:
    """What supervisord knows of a program; `pid` is 0 while it does not run."""

    pid: int
    given_up: bool


class Supervision:
    """A running supervisord. Nothing starts before it is told to; then it is kept running."""

    def __init__(
        self, supervisord: subprocess.Popen[bytes], socket: Path, programs: Sequence[Program]
    ) -> None:
        self._supervisord = supervisord
        self._programs = {program.name: program for program in programs}
        self._transport = SupervisorTransport(None, None, f"unix://{socket}")
        self._rpc: Any = ServerProxy("http://localhost", transport=self._transport).supervisor

    @property
    def alive(self) -> bool:
        return self._supervisord.poll() is None

    def states(self) -> dict[str, State]:
        """Every program's state by its name; empty while supervisord does not answer."""
        try:
            found = self._rpc.getAllProcessInfo()
        except NO_ANSWER:
            self._transport.close()
            return {}
        return {each["name"]: State(each["pid"], each["statename"] == "FATAL") for each in found}

    def start(self, name: str) -> None:
        """Start a program that is not running, and return before it has done anything."""
        with suppress(*NO_ANSWER):  # its state tells
            self._rpc.startProcess(f"{self._programs[name].group}:{name}", False)

    def stop(self, *, in_haste: Callable[[], bool]) -> None:
        """Stop every program in order and return when all have ended.

        As soon as `in_haste` is true the app is killed; the servers are still asked, so that they
        write what they hold.
        """
        app = [
            state.pid for name, state in self.states().items() if self._programs[name].group == APP
        ]
        try:
            self._rpc.shutdown()  # quicker than the signal, which it sees once a second
        except NO_ANSWER:
            self._supervisord.terminate()
        while self.alive:
            if in_haste():
                for pid in app:
                    self._kill_child(pid)
            time.sleep(POLL_S)

    def _kill_child(self, pid: int) -> None:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.ppid() == self._supervisord.pid:  # else the number has found a new owner
                process.kill()


@contextmanager
def supervised(
    programs: Sequence[Program],
    data: Path,
    env: Mapping[str, str],
    *,
    keep_open: int,
    in_haste: Callable[[], bool],
) -> Iterator[Supervision]:
    """Run supervisord for `programs`; when the block ends, or we do, everything is stopped.

    `keep_open` is a file descriptor that stays open for as long as supervisord lives.

    Raises:
        CannotStart: it does not come up.
    """
    (data / "logs").mkdir(mode=0o700, exist_ok=True)
    config = data / "supervisord.conf"
    socket = private.socket_folder(data) / "supervisor.sock"
    private.write(config, configuration(programs, socket))
    log = data / "logs" / "supervisord.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "supervisor.supervisord", "-n", "-c", str(config)],
            cwd=data,
            env={**env, MARK: str(data)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=[keep_open],
        )
    supervision = Supervision(process, socket, programs)
    with orphans.signalled_after_us(process.pid, by=signal.SIGTERM):
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not supervision.states():
                if not supervision.alive or time.monotonic() > deadline:
                    raise CannotStart(f"The process manager does not start; why is in {log}")
                time.sleep(QUICK_POLL_S)
            yield supervision
        finally:
            supervision.stop(in_haste=in_haste)
            orphans.end({MARK: str(data)})  # none, unless supervisord itself was killed


def configuration(programs: Sequence[Program], socket: Path) -> str:
    """The text of supervisord.conf; paths in it are relative to the data folder where they can be.

    Raises:
        CannotStart: a path cannot be written in this format.
    """
    sections: dict[str, dict[str, object]] = {
        "supervisord": {
            "logfile": "logs/supervisord.log",
            "pidfile": "supervisord.pid",
            "nodaemon": "true",
            "silent": "true",
            "nocleanup": "true",
            "umask": "077",
            "minprocs": 1,
            **({"user": "root"} if os.geteuid() == 0 else {}),
        },
        "unix_http_server": {"file": socket, "chmod": "0700"},
        "supervisorctl": {"serverurl": f"unix://{socket}"},
        "rpcinterface:supervisor": {
            "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
        },
    }
    for priority, group in enumerate((SERVERS, APP)):  # the highest is stopped first
        names = [program.name for program in programs if program.group == group]
        if names:
            sections[f"group:{group}"] = {"programs": ",".join(names), "priority": priority}
    for program in programs:
        sections[f"program:{program.name}"] = {
            "command": shlex.join(program.argv),
            "directory": ROOT,
            "autostart": "false",
            "autorestart": "true",
            "startsecs": STAYS_UP_S,
            "startretries": RETRIES,
            "stopsignal": program.stop_signal.name.removeprefix("SIG"),
            "stopwaitsecs": program.stop_timeout_s,
            "killasgroup": "true",
            "redirect_stderr": "true",
            "stdout_logfile": program.log,
            "stdout_logfile_maxbytes": LOG_MAX,
            "stdout_logfile_backups": LOGS_KEPT,
            **({"user": program.user} if program.user else {}),
        }
    return "\n".join(
        f"[{section}]\n" + "".join(f"{name}={_value(value)}\n" for name, value in values.items())
        for section, values in sections.items()
    )


def _value(value: object) -> str:
    text = str(value)
    if cut_short := re.search(r"\S*(\s[;#]|[\r\n])\S*", text):
        raise CannotStart(f'A path may not have " ;", " #" or a line break in it: {cut_short[0]!r}')
    return text.replace("%", "%%")
