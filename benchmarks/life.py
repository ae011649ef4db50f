"""`python -m benchmarks.life`: the life of a task, and how soon its end is known.

1. 32 callers, each of an account of its own, live through one task after the other: submitted,
   claimed, drawn at once, stored, charged, answered to whoever waits, read. One API process, two
   workers, a courier. The callers are another process.
2. From the commit of an end to the first byte at the caller who waits for it, and to the callback
   at its receiver, with nothing else to do. This process takes the part of the worker: it claims,
   completes and publishes as the worker does, so that it knows the moment of the commit.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

from benchmarks import receiver, stage
from benchmarks.callers import Caller
from benchmarks.figures import Figure, say, tell

CALLERS = 32
WORKERS = 2
UNCOUNTED_S = 3.0
SECONDS = 10.0
ENDS = 100
"""Of each kind that are measured one by one."""
UNCOUNTED = 10
SETTLES_S = 0.03
"""Until a caller waits, and the processes have nothing left to do."""
HEARD_S = 20.0


def main() -> None:
    with ExitStack() as stack:
        folder = stack.enter_context(stage.running())
        told = stack.enter_context(receiver.running(folder))
        url, _ = stack.enter_context(stage.api())
        port = int(url.rpartition(":")[2])
        accounts = stage.accounts(CALLERS)
        with stage.process("api.courier"):
            asyncio.run(_ends(port, accounts[0], told))
            _lives(port, [account.key for account in accounts])


def _lives(port: int, keys: Sequence[str]) -> None:
    with ExitStack() as stack:
        for _ in range(WORKERS):
            stack.enter_context(stage.process("benchmarks.sleeper", "--step-s", "0"))
        _call(port, UNCOUNTED_S, keys)
        lives_ms = _call(port, SECONDS, keys)
    per_s, p50_ms = len(lives_ms) / SECONDS, statistics.median(lives_ms)
    p99_ms = statistics.quantiles(lives_ms, n=100)[98]
    detail = f"{len(lives_ms)} tasks of {CALLERS} callers, p50 {p50_ms:.0f} ms, p99 {p99_ms:.0f} ms"
    tell(Figure("tasks from create to image", per_s, 200, "per s", detail=detail))
    tell(Figure("a task's whole life, p50", p50_ms, 150, "ms", at_most=True, detail=detail))


def _call(port: int, seconds: float, keys: Sequence[str]) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.callers", str(port), str(seconds), *keys]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    lives_ms: list[float] = json.loads(ran.stdout)
    return lives_ms


async def _ends(port: int, account: stage.Account, told: receiver.Receiver) -> None:
    caller = await Caller.connect(port, account.key)
    answered_s, called_s = [], []
    for _ in range(ENDS):
        task = await caller.create()
        waiting = asyncio.create_task(_answered_at(caller, task["id"]))
        await asyncio.sleep(SETTLES_S)
        committed_at = await asyncio.to_thread(_end)
        answered_s.append(await waiting - committed_at)
    for number in range(ENDS):
        await caller.create(callback_url=told.url(number))
        await asyncio.sleep(SETTLES_S)
        committed_at = await asyncio.to_thread(_end)
        _, heard_at = await asyncio.to_thread(told.hear, HEARD_S)
        called_s.append(heard_at - committed_at)
    _tell("from an end to the caller who waits, p50", answered_s, 10)
    _tell("from an end to its callback, p50", called_s, 15)


async def _answered_at(caller: Caller, task_id: str) -> float:
    await caller.read(task_id, wait=True)
    return time.monotonic()


def _end() -> float:
    """End the one task that waits, as a worker does. Returns when that was committed."""
    from storage import events, tasks
    from storage.database import transaction

    with transaction() as session:
        claimed = tasks.claim_next(session, "benchmark")
        assert claimed is not None
    with transaction() as session:
        ended = tasks.complete(
            session,
            tasks.claim_of(claimed),
            image_key="images/x.png",
            image_sha256="00" * 32,
            image_size_bytes=1,
            image_width=claimed.width,
            image_height=claimed.height,
            image_url="https://x/x.png",
            expires_at=datetime.now(UTC) + timedelta(hours=1),
            prompt_tokens=3,
            prompt_tokens_read=3,
        )
    committed_at = time.monotonic()
    assert ended is not None
    events.publish(ended)
    return committed_at


def _tell(name: str, times_s: Sequence[float], goal_ms: float) -> None:
    ms = [time_s * 1000 for time_s in times_s[UNCOUNTED:]]
    p99_ms = statistics.quantiles(ms, n=100)[98]
    detail = f"of {len(ms)}, p99 {p99_ms:.1f} ms"
    tell(Figure(name, statistics.median(ms), goal_ms, "ms", at_most=True, detail=detail))


if __name__ == "__main__":
    say("The life of a task")
    main()
