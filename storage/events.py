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

from storage import queue
from storage.models import Task, TaskStatus
from storage.settings import settings

CHANNEL = "zimage:tasks"
CANCELLED = "zimage:cancelled"
"""Besides CHANNEL, for workers: they need not read what moves elsewhere."""
LISTEN_S = 0.5
"""How often a worker that listens looks whether it shall stop."""
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
        settings.redis_url.get_secret_value(), socket_connect_timeout=queue.CONNECT_TIMEOUT_S
    )
    async with client, client.pubsub() as channel:
        await channel.subscribe(CHANNEL)
        async for message in channel.listen():
            subscribed = message["type"] == "subscribe"
            yield Event() if subscribed else Event(**json.loads(message["data"]))


async def stop(listener: asyncio.Task[None]) -> None:
    """End a task that listens.

    The Redis client swallows a cancellation that comes while it subscribes (redis 8.1.0), and
    would then listen for ever: so it is told until it ends.
    """
    while not listener.done():
        listener.cancel()
        await asyncio.wait({listener}, timeout=STOP_AGAIN_S)
