"""`python -m benchmarks.waits`: the memory of one API process while 5 000 callers wait in it.

Half of them by `Prefer: wait=60`, half by server-sent events, ten for each task and each on a
connection of its own. Then all tasks end, and everybody must hear of it.
"""

import asyncio
import resource
import time
from collections.abc import Sequence

import psutil

from benchmarks import stage
from benchmarks.figures import Figure, say, tell
from benchmarks.stage import Account

TASKS = 500
EACH = 5
"""Callers of each kind for each task."""
CALLERS = 2 * EACH * TASKS
WAIT_S = 60
OPEN_FILES = CALLERS + 1000
CONNECTING_MAX = 64
"""Callers that come at the same time."""
SETTLED_S = 4.0
"""For how long the memory is looked at once all of them wait."""
HEARD_S = 20.0
"""After how long whoever has not heard is given up."""
GOAL_MB = 300

ASKS = "GET {path} HTTP/1.1\r\nHost: benchmark\r\nAuthorization: Bearer {key}\r\n{more}\r\n"
ENDED = b'"status":"failed"'
"""As EvoLink's format says of a task that was cancelled."""


def main() -> None:
    _allow_open_files()
    with stage.running(), stage.api() as (url, process):
        asyncio.run(_measure(int(url.rpartition(":")[2]), process))


def _allow_open_files() -> None:
    """For this process and those that it starts. Raises: SystemExit: the system's limit is less."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        raise SystemExit(f"{OPEN_FILES} open files are needed, and `ulimit -Hn` says {hard}")
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, hard))


class Caller(asyncio.Protocol):
    """One connection that asks once; `spoke` at its first byte, `heard` at the end of its task."""

    def __init__(self, asks: bytes) -> None:
        loop = asyncio.get_running_loop()
        self._asks = asks
        self._answer = b""
        self.spoke: asyncio.Future[None] = loop.create_future()
        self.heard: asyncio.Future[float] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._asks)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if not self.spoke.done():
            self.spoke.set_result(None)
        if not self.heard.done() and ENDED in self._answer:
            self.heard.set_result(time.perf_counter())

    def connection_lost(self, error: Exception | None) -> None:
        for future in (self.spoke, self.heard):
            if not future.done():
                future.set_exception(ConnectionError(f"hung up after {self._answer[-300:]!r}"))
                future.exception()  # looked at, so that it is not told once more


async def _measure(port: int, api: psutil.Process) -> None:
    (account,) = stage.accounts(1)
    ids = _submit(account)
    idle_mb = api.memory_info().rss / 1e6
    began = time.perf_counter()
    callers = await _connected(port, account, ids)
    connected_s = time.perf_counter() - began
    rss_mb, until = 0.0, time.monotonic() + SETTLED_S
    while time.monotonic() < until:
        await asyncio.sleep(0.1)
        rss_mb = max(rss_mb, api.memory_info().rss / 1e6)
    waiting = sum(not caller.heard.done() for caller in callers)
    full, threads = api.memory_full_info(), api.num_threads()
    say(f"{waiting} callers wait, after {connected_s:.1f} s")

    ended_at = time.perf_counter()
    await asyncio.to_thread(_cancel, ids)
    ended_s = time.perf_counter() - ended_at
    await asyncio.wait([caller.heard for caller in callers], timeout=HEARD_S)
    heard = [c.heard for c in callers if c.heard.done()]
    times = [each.result() - ended_at for each in heard if each.exception() is None]
    for error in {str(each.exception()) for each in heard if each.exception() is not None}:
        say(error)
    after_mb = api.memory_info().rss / 1e6
    tell(
        Figure(
            "memory of an API process in which 5 000 callers wait",
            round(rss_mb, 1),
            GOAL_MB,
            "MB",
            at_most=True,
            detail=f"RSS, of which {full.uss / 1e6:.0f} MB are its own; before them "
            f"{idle_mb:.0f} MB, after they were told {after_mb:.0f} MB; "
            f"{(rss_mb - idle_mb) * 1e3 / CALLERS:.1f} kB for each; {threads} threads",
        )
    )
    tell(
        Figure(
            "callers that waited and have heard the end",
            len(times) if waiting == CALLERS else 0,
            CALLERS,
            detail=f"{len(ids)} tasks were ended one by one in {ended_s:.2f} s; "
            f"the last caller heard {max(times, default=0):.2f} s after the first end",
        )
    )


def _submit(account: Account) -> list[str]:
    from storage import tasks
    from storage.database import transaction
    from storage.models import ImageFormat
    from storage.tasks import ImageRequest, Submission

    image = ImageRequest("a red fox in the snow", 1024, 1024, ImageFormat.PNG)
    order = Submission(account.id, account.key_id, (image,), "evolink", image.price)
    made = []
    with transaction() as session:
        for outcome in tasks.submit_many(session, [order] * TASKS):
            if isinstance(outcome, Exception):
                raise outcome
            made += [task.id for task in outcome.tasks]
    return made


def _cancel(ids: Sequence[str]) -> None:
    from storage import events, tasks
    from storage.database import transaction

    for task_id in ids:
        with transaction() as session:
            task = tasks.cancel(session, task_id)
        events.publish(task)


async def _connected(port: int, account: Account, ids: Sequence[str]) -> list[Caller]:
    """All callers. Those that prefer to wait hear nothing meanwhile, so the streams come last."""
    loop = asyncio.get_running_loop()
    connecting = asyncio.Semaphore(CONNECTING_MAX)

    async def connect(asks: str, *, speaks: bool) -> Caller:
        async with connecting:
            _, caller = await loop.create_connection(
                lambda: Caller(asks.encode()), "127.0.0.1", port
            )
            if speaks:
                await caller.spoke
        return caller

    async def connect_all(path: str, more: str, *, speaks: bool) -> list[Caller]:
        asks = [ASKS.format(path=path.format(each), key=account.key, more=more) for each in ids]
        return await asyncio.gather(*(connect(a, speaks=speaks) for a in asks for _ in range(EACH)))

    prefer = f"Prefer: wait={WAIT_S}\r\n"
    return [
        *await connect_all("/v1/tasks/{}", prefer, speaks=False),
        *await connect_all("/v1/tasks/{}/events", "", speaks=True),
    ]


if __name__ == "__main__":
    main()
