"""The doorbell from one edge to the other. Jobs are named, not imported: no edge needs the other.

A job says that one more task waits, not which: that is decided when a GPU is free.
Losing one costs a delay, never a task: the repairs ring for what is still pending.
"""

import structlog
from redis import Redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from rq import Queue
from rq.serializers import JSONSerializer

from storage.settings import settings

NAME = "generate"
GENERATE = "worker.generate.run"

CONNECT_TIMEOUT_S = 2
ANSWER_TIMEOUT_S = 5
RING_MAX = 1000
"""Jobs in one round trip: the bound on one pipeline, and on what one repair rings."""
FAILURE_TTL_S = 7 * 24 * 3600
"""How long RQ keeps a job that raised, with its traceback."""
JOB_TIMEOUT_MARGIN_S = 60
"""RQ's time limit is the last resort behind the task's own: it leaves time to store and settle."""

ANNOUNCE_S = 3
"""How often a worker says that it is alive."""
HEARD_S = 10
"""For how long it is believed."""
_WORKERS = "zimage:workers"

logger = structlog.get_logger()


def connect() -> Redis:
    """A client of its own; RQ's workers change the timeouts of theirs."""
    return Redis.from_url(
        settings.redis_url.get_secret_value(),
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=ANSWER_TIMEOUT_S,
        retry=Retry(ConstantBackoff(0.05), 1),
        health_check_interval=30,
    )


connection = connect()
generate_queue = Queue(NAME, connection=connection, serializer=JSONSerializer)


def ring(times: int) -> None:
    """Put `times` jobs, RING_MAX in a round trip. Bells are alike: the claim decides on the task.

    What goes wrong is logged, not raised: the tasks are committed, and the repairs ring later.
    """
    job = Queue.prepare_data(
        GENERATE,
        timeout=settings.task_timeout_s + JOB_TIMEOUT_MARGIN_S,
        result_ttl=0,
        failure_ttl=FAILURE_TTL_S,
        description=GENERATE,
    )
    try:
        for start in range(0, times, RING_MAX):
            generate_queue.enqueue_many([job] * min(RING_MAX, times - start))
    except Exception:
        # Whatever it is: who asked for the tasks must not be told that there are none.
        logger.exception("queue.ring_failed", times=times)


def count() -> int:
    """Jobs that wait. Raises: RedisError."""
    return generate_queue.count


def announce(worker: str) -> None:
    """Tell that `worker` is alive. Raises: RedisError."""
    connection.zadd(_WORKERS, {worker: _now_s()})


def withdraw(worker: str) -> None:
    """Tell that `worker` has stopped. Raises: RedisError."""
    connection.zrem(_WORKERS, worker)


def workers() -> int:
    """Workers that were heard of in the last HEARD_S seconds; forgets others. Raises: RedisError.

    RQ's own list is no help: it believes in a killed worker for as long as its job might take.
    """
    connection.zremrangebyscore(_WORKERS, "-inf", _now_s() - HEARD_S)
    return connection.zcard(_WORKERS)


def _now_s() -> int:
    """By the clock of Redis, since those of the machines may differ."""
    seconds, _microseconds = connection.time()
    return seconds
