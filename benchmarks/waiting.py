"""`python -m benchmarks.waiting`: what callers who wait cost those who do not.

One API process with its embedded servers, on this machine. First status reads and creates alone,
then the same while 200 callers wait by `Prefer: wait` and 200 by server-sent events, each for a
task of its own; then all their tasks end, and it is measured how long until all have heard.
Both measurements are taken in turns, so that a noisy machine disturbs both alike.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from decimal import Decimal
from pathlib import Path

import httpx
import psutil

from deploy import reach, servers

WAITERS = 200
ROUNDS = 5
REQUESTS = 200
"""Of each kind in a round."""
WAIT_S = 60
CREATE = {"model": "z-image-turbo", "prompt": "a cat"}

Latencies = dict[str, list[float]]


def main() -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zimage-bench-")))
        folder.chmod(0o755)  # PostgreSQL may have to run as another user
        os.environ.update(stack.enter_context(servers.running(folder, durable=True)))
        port = reach.free_port()
        os.environ.update(ZIMAGE_PORT=str(port))
        subprocess.run([sys.executable, "-m", "api", "prepare"], check=True)
        key = _key()
        api = subprocess.Popen([sys.executable, "-m", "api", "serve"], stdout=subprocess.DEVNULL)
        try:
            asyncio.run(_measure(f"http://127.0.0.1:{port}", key, psutil.Process(api.pid)))
        finally:
            api.terminate()
            api.wait(60)


def _key() -> str:
    from storage import accounts, ledger
    from storage.database import transaction

    with transaction() as session:
        account = accounts.create(session, "benchmark", unfinished_max=None)
        ledger.grant(session, account.id, Decimal(10**6), actor="benchmark")
        _, secret = accounts.issue_key(session, account.id, requests_per_minute=None)
    return secret


async def _measure(url: str, key: str, api: psutil.Process) -> None:
    def client() -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {key}"}
        limits = httpx.Limits(max_connections=None)
        return httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=2 * WAIT_S)

    # Two clients: one with hundreds of connections is slow at finding a free one.
    async with client() as http, client() as patient:
        await _until_ready(http)
        alone: Latencies = {}
        beside: Latencies = {}
        heard_after_s, memory_mb, threads = [], [], []
        for _ in range(ROUNDS):
            await _requests(http, {})  # until what the round before has left behind is forgotten
            await _requests(http, alone)
            idle_mb = api.memory_info().rss / 1e6
            async with AsyncExitStack() as stack:
                waits, task_ids = await _waiters(patient, stack)
                await _requests(http, {})
                await _requests(http, beside)
                memory_mb.append(api.memory_info().rss / 1e6 - idle_mb)
                threads.append(api.num_threads())
                await _cancel(http, task_ids)
                ended_at = time.perf_counter()
                await asyncio.gather(*waits)
                heard_after_s.append(time.perf_counter() - ended_at)
        _report(alone, beside)
        print(
            f"last of {2 * WAITERS} waiters heard, after the last task ended: "
            f"{statistics.median(heard_after_s) * 1000:.0f} ms"
        )
        print(f"API process: {threads[-1]} threads, {memory_mb[0]:+.0f} MB with the first waiters")


async def _until_ready(http: httpx.AsyncClient) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            (await http.get("/ready")).raise_for_status()
        except httpx.HTTPError:
            await asyncio.sleep(0.1)
        else:
            return
    raise SystemExit("The API did not become ready")


async def _waiters(
    http: httpx.AsyncClient, stack: AsyncExitStack
) -> tuple[list[asyncio.Task[None]], list[str]]:
    """Half by `Prefer: wait`, half by events; returns when all of them wait."""
    begun = asyncio.Barrier(WAITERS + 1)

    async def prefer(task_id: str) -> None:
        answer = await http.get(f"/v1/tasks/{task_id}", headers={"Prefer": f"wait={WAIT_S}"})
        assert answer.json()["status"] == "failed", answer.text

    async def follow(task_id: str) -> None:
        async with http.stream("GET", f"/v1/tasks/{task_id}/events") as answer:
            lines = answer.aiter_lines()
            async for line in lines:
                if line.startswith("data:"):
                    break
            await begun.wait()
            last = [line async for line in lines if line.startswith("data:")][-1]
            assert '"failed"' in last, last

    ids = [await _create(http) for _ in range(2 * WAITERS)]
    waits = [asyncio.create_task(prefer(task_id)) for task_id in ids[:WAITERS]]
    waits += [asyncio.create_task(follow(task_id)) for task_id in ids[WAITERS:]]
    stack.push_async_callback(_end, waits)
    await begun.wait()
    return waits, ids


async def _end(waits: list[asyncio.Task[None]]) -> None:
    for wait in waits:
        wait.cancel()
    await asyncio.gather(*waits, return_exceptions=True)


async def _requests(http: httpx.AsyncClient, into: Latencies) -> None:
    """Reads of a waiting task, and creates; all are cancelled, so that no backlog builds up."""
    ids = [await _create(http)]
    path = f"/v1/tasks/{ids[0]}"

    async def read() -> None:
        (await http.get(path)).raise_for_status()

    async def create() -> None:
        ids.append(await _create(http))

    kinds: dict[str, Callable[[], Awaitable[None]]] = {"read": read, "create": create}
    for kind, ask in kinds.items():
        for _ in range(REQUESTS):
            started = time.perf_counter()
            await ask()
            into.setdefault(kind, []).append(time.perf_counter() - started)
    await _cancel(http, ids)


async def _create(http: httpx.AsyncClient) -> str:
    answer = await http.post("/v1/images/generations", json=CREATE)
    task_id: str = answer.raise_for_status().json()["id"]
    return task_id


async def _cancel(http: httpx.AsyncClient, task_ids: list[str]) -> None:
    for task_id in task_ids:
        (await http.post(f"/v1/tasks/{task_id}/cancel")).raise_for_status()


def _report(alone: Latencies, beside: Latencies) -> None:
    print(f"one caller at a time, {ROUNDS * REQUESTS} of each; milliseconds")
    print(f"{'':8}{'alone p50':>11}{'p99':>8}{'  with waiters p50':>20}{'p99':>8}{'p50 ratio':>11}")
    for kind, times in alone.items():
        first, then = _quantiles(times), _quantiles(beside[kind])
        print(
            f"{kind:8}{first[0]:11.2f}{first[1]:8.2f}{then[0]:20.2f}{then[1]:8.2f}"
            f"{then[0] / first[0]:11.2f}"
        )


def _quantiles(seconds: list[float]) -> tuple[float, float]:
    ms = sorted(second * 1000 for second in seconds)
    return statistics.median(ms), ms[int(len(ms) * 0.99)]


if __name__ == "__main__":
    main()
