"""Customers who know nothing better than to ask again: submit, poll every 50 ms, begin again."""

import asyncio
import time
from collections.abc import Sequence

from benchmarks.callers import Caller

POLL_S = 0.05


async def lives_ms(port: int, seconds: float, keys: Sequence[str]) -> list[float]:
    """How long each life took that ended within `seconds`, with one caller for each key."""
    found: list[float] = []
    until = time.monotonic() + seconds

    async def live(key: str) -> None:
        caller = await Caller.connect(port, key)
        while (began := time.monotonic()) < until:
            task = await caller.create()
            while task["status"] != "completed":
                await asyncio.sleep(POLL_S)
                task = await caller.read(task["id"])
                if task["status"] not in ("pending", "processing", "completed"):
                    raise SystemExit(f"A task is {task['status']}")
            if time.monotonic() < until:
                found.append((time.monotonic() - began) * 1000)

    await asyncio.gather(*map(live, keys))
    return found


async def created(port: int, keys: Sequence[str], each: int) -> list[tuple[str, str]]:
    """Tasks that wait, `each` for a key: their ids and their keys."""
    tasks = []
    for key in keys:
        caller = await Caller.connect(port, key)
        tasks += [((await caller.create())["id"], key) for _ in range(each)]
    return tasks
