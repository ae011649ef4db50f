"""Processes that are meant to run: how each is started, struck, and started again."""

import asyncio
import json
import os
import pwd
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from deploy import servers
from deploy.servers import Server
from soak.nursery import end_with_parent

RESTART_S = 0.4
"""Between the end of a process and its next start."""
STOP_S = 60


class Child:
    """A process that is meant to run, until `end`. Subclasses know how it is started."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pid: int | None = None
        """None: it does not run."""
        self.starts = 0
        self._wanted = False
        self._ended = asyncio.Event()

    async def _start(self) -> int:
        """Returns the process's id."""
        raise NotImplementedError

    async def start(self) -> None:
        self._wanted = True
        self.starts += 1
        self._ended.clear()
        self.pid = await self._start()

    def has_ended(self) -> None:
        """To be called when the process is gone: it is started again, if it is meant to run."""
        self.pid = None
        self._ended.set()
        if self._wanted:
            loop = asyncio.get_running_loop()
            loop.call_later(RESTART_S, lambda: loop.create_task(self._start_again()))

    async def _start_again(self) -> None:
        if self._wanted and self.pid is None:
            await self.start()

    def send(self, number: signal.Signals) -> None:
        if self.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def kill(self) -> None:
        """Returns when it is gone."""
        if self.pid is not None:
            self.send(signal.SIGKILL)
            await self._ended.wait()

    async def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Stop it in order, and for good."""
        self._wanted = False
        if self.pid is None:
            return
        self.send(signal.SIGCONT)
        self.send(number)
        try:
            async with asyncio.timeout(STOP_S):
                await self._ended.wait()
        except TimeoutError:
            await self.kill()


class ServerChild(Child):
    """One of the three servers."""

    def __init__(self, server: Server, folder: Path) -> None:
        super().__init__(server.name)
        self.server = server
        self.argv = list(server.argv)
        self._log = folder / f"{server.name}.log"
        self._user = pwd.getpwnam(server.user) if server.user else None

    async def _start(self) -> int:
        with self._log.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *self.argv,
                env=servers.inherited_environment() | dict(self.server.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=end_with_parent,
                user=self._user.pw_uid if self._user else None,
                group=self._user.pw_gid if self._user else None,
                extra_groups=[] if self._user else None,
            )
        asyncio.get_running_loop().create_task(self._wait_for(process))
        return process.pid

    async def _wait_for(self, process: asyncio.subprocess.Process) -> None:
        await process.wait()
        self.has_ended()

    async def ready(self) -> None:
        """Returns when it does its work. Raises: CannotStart."""
        await asyncio.to_thread(
            servers.wait_until_ready, self.server, self._log, lambda: self.pid is not None
        )


class NurseryGone(Exception):
    """The process that all are forked from has ended; why stands in its output."""


class Nursery:
    """The process that the service's processes are forked from."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._born: asyncio.Queue[int | None] = asyncio.Queue()
        self._children: dict[int, Child] = {}
        self._gone: set[int] = set()

    async def open(self, env: dict[str, str], imports: Sequence[str], without: str | None) -> None:
        guard = ["--without", without] if without else []
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "soak.nursery", *guard, "--with", *imports),
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        asyncio.get_running_loop().create_task(self._hear())

    async def start(self, child: Child, asked: Mapping[str, object]) -> int:
        assert self._process is not None
        assert self._process.stdin is not None
        async with self._turn:
            self._process.stdin.write(json.dumps(dict(asked)).encode() + b"\n")
            pid = await self._born.get()
        if pid is None:
            raise NurseryGone
        if pid in self._gone:
            self._gone.discard(pid)
            asyncio.get_running_loop().call_soon(child.has_ended)
        else:
            self._children[pid] = child
        return pid

    async def _hear(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            told = json.loads(line)
            if "started" in told:
                self._born.put_nowait(told["started"])
            elif child := self._children.pop(told["ended"], None):
                child.has_ended()
            else:
                self._gone.add(told["ended"])
        self._born.put_nowait(None)  # nobody waits for one that is gone

    async def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            await self._process.wait()


class ServiceChild(Child):
    """A process of the service: what `python -m MODULE` would be."""

    def __init__(self, name: str, nursery: Nursery, folder: Path, *module: str, **env: str) -> None:
        super().__init__(name)
        self.clock_off_s = 0.0
        """How wrong the clock of its next start is."""
        self._module = list(module)
        self._nursery = nursery
        self._log = str(folder / f"{name}.log")
        self._env = env

    async def _start(self) -> int:
        asked = {
            "module": self._module,
            "env": self._env,
            "log": self._log,
            "clock_off_s": self.clock_off_s,
        }
        return await self._nursery.start(self, asked)
