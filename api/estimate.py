"""How long a task that is submitted now will take: from what the last ones took, and the queue."""

import time
from dataclasses import dataclass

from fastapi.concurrency import run_in_threadpool
from redis.exceptions import RedisError

from storage import queue, tasks
from storage.database import transaction
from storage.errors import ServiceUnavailable

FIRST_ESTIMATE_S = 10.0
"""What is answered until a first image has been measured; EvoLink's own example."""
REFRESH_S = 2.0
"""How old a look at the queue may be."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the last images took, mean in seconds, what waits now, and who draws."""

    mean_s: float | None
    waiting: int
    workers: int


_measured = Measured(None, 0, 1)
_looked_at = float("-inf")


async def seconds_to_end(place: int | None = None, progress: int = 0) -> float:
    """Expected seconds until a task has ended.

    `place` is the number of tasks before it: None counts all that wait, as for one that is
    submitted now; `progress` is in percent.
    """
    global _looked_at, _measured
    if time.monotonic() - _looked_at > REFRESH_S:
        _looked_at = time.monotonic()  # before the look, so that one request of many takes it
        _measured = await run_in_threadpool(_look)
    if _measured.mean_s is None:
        return FIRST_ESTIMATE_S
    before = _measured.waiting if place is None else place
    return _measured.mean_s * (before / _measured.workers + 1 - progress / 100)


def _look() -> Measured:
    try:
        with transaction() as session:
            mean_s, waiting = tasks.measured(session)
        return Measured(mean_s, waiting, max(1, queue.workers()))
    except (ServiceUnavailable, RedisError):
        return _measured  # an estimate is not worth failing for
