"""The doorbell from one edge to the other. Jobs are named, not imported: no edge needs the other.

A job says that one more task waits, not which: that is decided when a GPU is free.
Losing one costs a delay, never a task: the repairs ring for what is still pending. So no more than
BELLS_MAX are kept, however much waits: who finds none after a task looks at the rows.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import orjson
import structlog
from redis import Redis
from redis.backoff import ConstantBackoff
from redis.exceptions import ConnectionError as NotConnected
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as NotAnswered
from redis.retry import Retry
from rq import Queue
from rq.queue import EnqueueData
from rq.serializers import JSONSerializer

from storage.settings import settings
from storage.silence import Silence, Silent

NAME = "generate"
GENERATE = "worker.generate.run"

CONNECT_TIMEOUT_S = 2
ANSWER_TIMEOUT_S = 2
"""One caller waits so long for a Redis that hangs; nobody else does until it answers again."""
BELLS_MAX = 1000
"""Jobs that are kept, about: several processes that ring at once may pass it by what each rings.
More than there are workers, which is what bells are for; a million would be a gigabyte of Redis."""
FAILURE_TTL_S = 7 * 24 * 3600
"""How long RQ keeps a job that raised, with its traceback."""
JOB_TIMEOUT_S = 60
"""A job only takes a task, which is not drawn in it: this ends a claim that hangs."""

ANNOUNCE_S = 3
"""How often a worker says that it is alive."""
HEARD_S = 10
"""For how long it is believed."""
_WORKERS = "zimage:workers"
"""Names, by the second in which each was heard of last."""
_FACTS = "zimage:workers:facts"
"""What each name tells of itself, as JSON."""

logger = structlog.get_logger()

server = Silence()
"""What this process knows of Redis."""


@contextmanager
def asking() -> Iterator[None]:
    """Ask Redis in this block. Raises: RedisError, at once where Redis is known to hang."""
    try:
        with server.asking(NotAnswered):
            yield
    except Silent as silent:
        raise NotConnected("Redis does not answer") from silent


def connect() -> Redis:
    """A client of its own; RQ's workers change the timeouts of theirs."""
    return Redis.from_url(
        settings.redis_url.get_secret_value(),
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=ANSWER_TIMEOUT_S,
        # Once more where a connection broke, and not where an answer was waited for in vain.
        retry=Retry(ConstantBackoff(0.05), 1, supported_errors=(NotConnected,)),
        health_check_interval=30,
    )


connection = connect()
generate_queue = Queue(NAME, connection=connection, serializer=JSONSerializer)


FULL_S = 0.1
"""For how long a process believes that no bell is missing: workers take no BELLS_MAX in that."""

_heard_of = 0
"""Jobs that waited when this process rang last."""
_heard_at = float("-inf")


def is_full() -> bool:
    """Whether all bells that are kept hung a moment ago, so that to `ring` would change nothing."""
    return _heard_of >= BELLS_MAX and time.monotonic() - _heard_at < FULL_S


def ring(times: int) -> None:
    """Put `times` jobs in one round trip, or what BELLS_MAX leaves room for.

    Bells are alike: the claim decides on the task. What goes wrong is logged, not raised: the tasks
    are committed, and the repairs ring later.
    """
    global _heard_of, _heard_at
    if times < 1:
        return
    try:
        with asking():
            if _heard_of + times > BELLS_MAX:  # there, or not any longer
                _heard_of = generate_queue.count
            _heard_at = time.monotonic()
            if (fitting := min(times, BELLS_MAX - _heard_of)) > 0:
                with connection.pipeline() as together:
                    generate_queue.enqueue_many([_job()] * fitting, pipeline=together)
                    together.llen(generate_queue.key)
                    _heard_of = together.execute()[-1]
    except RedisError as error:
        logger.warning("queue.ring_failed", times=times, error=str(error))
    except Exception:
        # Whatever it is: who asked for the tasks must not be told that there are none.
        logger.exception("queue.ring_failed", times=times)


def _job() -> EnqueueData:
    return Queue.prepare_data(
        GENERATE,
        timeout=JOB_TIMEOUT_S,
        result_ttl=0,
        failure_ttl=FAILURE_TTL_S,
        description=GENERATE,
    )


def count() -> int:
    """Jobs that wait. Raises: RedisError."""
    with asking():
        return generate_queue.count


def announce(worker: str, facts: Mapping[str, object]) -> None:
    """Tell that `worker` is alive, and what operators may know of it. Raises: RedisError."""
    # Better an odd fact than a worker unheard of.
    told = orjson.dumps(dict(facts), default=str, option=orjson.OPT_NON_STR_KEYS)
    with asking(), connection.pipeline() as both:
        now_s = _now_s()
        both.zadd(_WORKERS, {worker: now_s})
        both.hset(_FACTS, worker, told)
        both.execute()


def withdraw(worker: str) -> None:
    """Tell that `worker` has stopped. Raises: RedisError."""
    with asking(), connection.pipeline() as both:
        both.zrem(_WORKERS, worker)
        both.hdel(_FACTS, worker)
        both.execute()


def workers() -> int:
    """Workers that were heard of in the last HEARD_S seconds; forgets others. Raises: RedisError.

    RQ's own list is no help: it believes in a killed worker for as long as its job might take.
    """
    with asking():
        connection.zremrangebyscore(_WORKERS, "-inf", _now_s() - HEARD_S)
        return connection.zcard(_WORKERS)


def worker_facts() -> list[dict[str, Any]]:
    """What those that `workers` counts tell of themselves, by name. Raises: RedisError.

    A worker of another version may tell other things, or nothing: only `name` is always there.
    """
    with asking(), connection.pipeline() as look:
        now_s = _now_s()
        look.zremrangebyscore(_WORKERS, "-inf", now_s - HEARD_S)
        look.zrange(_WORKERS, 0, -1)
        look.hgetall(_FACTS)
        _, heard_of, told = look.execute()
        # One that comes back just now is without its facts until it announces itself again.
        if forgotten := told.keys() - set(heard_of):
            connection.hdel(_FACTS, *forgotten)
    return [_facts(worker.decode(), told.get(worker, b"{}")) for worker in sorted(heard_of)]


def _facts(worker: str, told: bytes) -> dict[str, Any]:
    try:
        return {**orjson.loads(told), "name": worker}
    except (ValueError, TypeError) as error:
        logger.warning("queue.worker_not_understood", worker=worker, error=str(error))
        return {"name": worker}


def _now_s() -> int:
    """By the clock of Redis, since those of the machines may differ."""
    seconds, _microseconds = connection.time()
    return seconds
