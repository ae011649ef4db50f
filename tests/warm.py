"""Processes that start at once: each is a fork of one that has imported their libraries already.

    test ──► a process that imports what takes seconds, and nothing that reads a setting
                 └──► a fork of it for every process: its own environment, then a module or code

A fork reads its settings itself, imports all that is ours itself, hears signals, can be killed and
ends as an interpreter does. It cannot show that `python -m …` starts from nothing: that is shown in
`test_make_up.py`, where the service is started as people start it.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parent.parent

SERVICE = (
    "alembic.command",
    "boto3",
    "cachetools",
    "cryptography.fernet",
    "dns.asyncresolver",
    "fastapi_offline",
    "httpcore",
    "httpx",
    "orjson",
    "prometheus_client",
    "psutil",
    "psycopg",
    "pydantic_settings",
    "redis.asyncio",
    "rq",
    "sqlalchemy.dialects.postgresql",
    "sqlalchemy.orm",
    "standardwebhooks",
    "structlog",
    "supervisor.xmlrpc",
    "uvicorn",
)
"""What the processes of the service import, except for the one that draws."""

MODEL = (
    "cachetools",
    "PIL.Image",
    "pydantic_settings",
    "sqlalchemy.orm",
    "structlog.testing",
    "worker",  # before torch: it says what shall not be imported with it
    "tests.random_model",  # torch, diffusers and transformers, as a worker imports them
)
"""What the process that draws imports."""

OURS = ("benchmarks", "tests", "worker")
"""What comes with that and is ours: every fork imports it anew, from its own folder."""

DIES_ONLINE = 7
"""The exit status of who looks for a network. An exception would not do: libraries swallow it."""


class Child:
    """One of the forks; as `subprocess.Popen`, as far as it goes."""

    def __init__(self, warm: "Warm", pid: int, files: Sequence[Path]) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._warm = warm
        self._files = files

    def poll(self) -> int | None:
        return self._ended(wait=False)

    def wait(self) -> int:
        code = self._ended(wait=True)
        assert code is not None
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:  # until its end was asked for, nobody else can have its number
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        """What it wrote until its end."""
        self.wait()
        out, err = (file.read_text() for file in self._files)
        return out, err

    def _ended(self, *, wait: bool) -> int | None:
        if self.returncode is None:
            self.returncode = self._warm.ask(pid=self.pid, wait=wait)
        return self.returncode


class Warm:
    """The process that has imported the libraries."""

    def __init__(self, process: "subprocess.Popen[str]", folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._asking = threading.Lock()
        self._started = 0

    @property
    def said(self) -> str:
        """What importing had to say."""
        return (self._folder / "said").read_text()

    def start(self, *argv: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Child:
        """Start `python ARGV`, which begins with `-m` or `-c`; without `env`, it has our own."""
        with self._asking:
            self._started += 1
            files = [self._folder / f"{self._started}.{name}" for name in ("out", "err")]
        pid = self.ask(
            argv=argv,
            env=dict(os.environ if env is None else env),
            cwd=str(cwd),
            files=[str(file) for file in files],
        )
        return Child(self, pid, files)

    def run(
        self, *argv: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> "subprocess.CompletedProcess[str]":
        child = self.start(*argv, env=env, cwd=cwd)
        out, err = child.communicate()
        return subprocess.CompletedProcess(argv, child.wait(), out, err)

    @contextmanager
    def process(self, *module: str, **env: str) -> Iterator[Child]:
        """`python -m MODULE`, which is told to stop at the end if it still runs."""
        child = self.start("-m", *module, env=os.environ | env)
        try:
            yield child
        finally:
            child.send_signal(signal.SIGTERM)
            print(*child.communicate(), sep="\n")  # shown if the test fails

    def ask(self, **asked: Any) -> Any:
        with self._asking:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            print(json.dumps(asked), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        assert answer, f"it has ended: {self.said}"
        return json.loads(answer)


@contextmanager
def imported(*libraries: str, offline: bool = False, **env: str) -> Iterator[Warm]:
    """Have `libraries` imported; with `offline`, whoever looks for a network dies at once."""
    with (
        TemporaryDirectory(prefix="zimage-warm-") as folder,
        (Path(folder) / "said").open("w") as said,
        subprocess.Popen(
            [sys.executable, "-m", "tests.warm", "offline" if offline else "", *libraries],
            cwd=ROOT,
            env=os.environ | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        ) as process,
    ):
        yield Warm(process, Path(folder))


# --- In the process that imports ----------------------------------------------------------------


def main() -> None:
    offline, *libraries = sys.argv[1:]
    if offline:
        sys.addaudithook(_die_online)
    gc.disable()  # what is imported stays
    for library in libraries:
        importlib.import_module(library)
    gc.freeze()
    gc.enable()
    asked = _serve()
    if asked is not None:
        _become(**asked)


def _die_online(event: str, _: object) -> None:
    if event in ("socket.connect", "socket.getaddrinfo"):
        os._exit(DIES_ONLINE)


def _serve() -> dict[str, Any] | None:
    """Do what is asked until nobody can ask any more. In a fork: return what it is to be."""
    children: set[int] = set()
    for line in sys.stdin:
        asked = json.loads(line)
        if "argv" in asked:
            pid = os.fork()
            if pid == 0:
                return dict(asked)
            children.add(pid)
            print(pid, flush=True)
        else:
            pid, status = os.waitpid(asked["pid"], 0 if asked["wait"] else os.WNOHANG)
            children.discard(pid)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return None


def _become(argv: list[str], env: dict[str, str], cwd: str, files: list[str]) -> None:
    """Be `python ARGV`, without the import of what is there already."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[0] = cwd
    for name in list(sys.modules):
        if name.partition(".")[0] in OURS:
            del sys.modules[name]
    option, code, *arguments = argv
    if option == "-m":
        sys.argv = [code, *arguments]
        runpy.run_module(code, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [option, *arguments]
        exec(code, {"__name__": "__main__"})


if __name__ == "__main__":
    main()
