"""A task moved: told once to whoever listens now, so that nobody has to poll to notice.

An event may be lost, and whoever misses it finds the same in the row a little later.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as NotAnswered

from storage import queue
from storage.models import Task, TaskStatus
from storage.settings import settings

CHANNEL = "zimage:tasks"
CANCELLED = "zimage:cancelled"
"""Besides CHANNEL, for workers: they need not read what moves elsewhere."""
LISTEN_S = 0.5
"""How often a worker that listens looks whether it shall stop."""
PING_S = 3.0
"""Where nothing was heard for so long Redis is asked whether it lives, and then for as long again:
one that hangs, or a network that is gone, looks like one at which nothing happens."""
STOP_AGAIN_S = 0.1

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Event:
    """What moved. One without a `task_id` says that what came before it was not heard."""

    task_id: str | None = None
    ended: bool = False
    started: bool = False
    """Whether it left the queue, so that others moved up."""
    callback: bool = False


def publish(task: Task) -> None:
    """Tell that `task` moved. Failing to is logged, not raised."""
    if task.status is TaskStatus.CANCELLED:
        _tell(CANCELLED, task.id, task.id)
    _publish(
        Event(
            task.id,
            ended=task.status.is_terminal,
            started=task.status is not TaskStatus.PENDING,
            callback=task.callback_url is not None,
        )
    )


def publish_owed(task_id: str) -> None:
    """Tell that the callback of a task is owed anew. Failing to is logged, not raised."""
    _publish(Event(task_id, ended=True, callback=True))


def publish_progress(task_id: str) -> None:
    """Tell that a task came a step further. Failing to is logged, not raised."""
    _publish(Event(task_id))


def _publish(event: Event) -> None:
    _tell(CHANNEL, json.dumps(asdict(event)), event.task_id)


def _tell(channel: str, message: str, task_id: str | None) -> None:
    try:
        with queue.asking():
            queue.connection.publish(channel, message)
    except RedisError as error:
        logger.warning("events.publish_failed", task_id=task_id, error=str(error))


def cancelled(stopped: threading.Event) -> Iterator[str]:
    """The ids of tasks as they are cancelled, from now on until `stopped` is set.

    Raises: RedisError, when the connection is lost.
    """
    with queue.connect() as client, client.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(CANCELLED)
        while not stopped.is_set():
            message = channel.get_message(timeout=LISTEN_S)
            if message is not None:
                yield message["data"].decode()


async def listen() -> AsyncIterator[Event]:
    """Every event from now on, after an empty one as soon as we listen.

    Raises: RedisError, when the connection is lost.
    """
    client = Redis.from_url(
        settings.redis_url.get_secret_value(),
        socket_connect_timeout=queue.CONNECT_TIMEOUT_S,
        socket_timeout=queue.ANSWER_TIMEOUT_S,
        # Whoever listens connects again by itself, and must first know that it heard nothing.
        retry=None,
    )
    async with client, client.pubsub() as channel:
        await channel.subscribe(CHANNEL)
        pinged = True  # to subscribe is to ask as well
        while True:
            message = await channel.get_message(timeout=PING_S)
            if message is None and pinged:
                raise NotAnswered("Redis is silent")
            if message is None:
                await channel.ping()
            pinged = message is None
            match message:
                case {"type": "subscribe"}:
                    yield Event()
                case {"type": "message", "data": data}:
                    yield Event(**json.loads(data))


async def stop(listener: asyncio.Task[None]) -> None:
    """End a task that listens.

    The Redis client swallows a cancellation that comes while it subscribes (redis 8.1.0), and
    would then listen for ever: so it is told until it ends.
    """
    while not listener.done():
        listener.cancel()
        await asyncio.wait({listener}, timeout=STOP_AGAIN_S)
