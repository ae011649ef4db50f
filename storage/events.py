"""A task moved: told once to whoever listens now, so that nobody has to poll to notice.

An event may be lost, and whoever misses it finds the same in the row a little later.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from storage import queue
from storage.models import Task
from storage.settings import settings

CHANNEL = "zimage:tasks"

logger = structlog.get_logger()


def publish(task: Task) -> None:
    """Tell that `task` moved. Failing to is logged, not raised."""
    event = {
        "id": task.id,
        "status": task.status,
        "ended": task.status.is_terminal,
        "callback": task.callback_url is not None,
    }
    try:
        queue.connection.publish(CHANNEL, json.dumps(event))
    except RedisError as error:
        logger.warning("events.publish_failed", task_id=task.id, error=str(error))


async def listen() -> AsyncIterator[dict[str, Any]]:
    """Every event from now on. Raises: RedisError, when the connection is lost."""
    client = Redis.from_url(
        settings.redis_url.get_secret_value(), socket_connect_timeout=queue.CONNECT_TIMEOUT_S
    )
    async with client, client.pubsub(ignore_subscribe_messages=True) as channel:
        await channel.subscribe(CHANNEL)
        async for message in channel.listen():
            yield json.loads(message["data"])
