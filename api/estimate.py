"""How long a task that is submitted now will take: from what the last ones took, and the queue."""

import time

from fastapi.concurrency import run_in_threadpool
from redis.exceptions import RedisError

from storage import queue, tasks
from storage.database import transaction
from storage.errors import ServiceUnavailable

FIRST_ESTIMATE_S = 10.0
"""What is answered until a first image has been measured; EvoLink's own example."""
REFRESH_S = 2.0
"""How old a look at the queue may be."""

_seconds = FIRST_ESTIMATE_S
_looked_at = float("-inf")


async def seconds_to_end() -> float:
    """Expected seconds until a task that is submitted now has ended."""
    global _looked_at, _seconds
    if time.monotonic() - _looked_at > REFRESH_S:
        _looked_at = time.monotonic()  # before the look, so that one request of many takes it
        _seconds = await run_in_threadpool(_look)
    return _seconds


def _look() -> float:
    try:
        with transaction() as session:
            mean_s, waiting = tasks.measured(session)
        workers = max(1, queue.workers())
    except (ServiceUnavailable, RedisError):
        return _seconds  # an estimate is not worth failing for
    if mean_s is None:
        return FIRST_ESTIMATE_S
    return mean_s * (1 + waiting / workers)
