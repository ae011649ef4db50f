"""A script in Redis, run for whoever waits on an event loop: to hand a command to a thread, and its
answer back, costs several times what the command does.
"""

import asyncio
import hashlib
import select
from collections.abc import Sequence
from typing import Any

from redis.exceptions import ConnectionError as NotConnected
from redis.exceptions import NoScriptError
from redis.exceptions import TimeoutError as NotAnswered

from storage import queue


class Script:
    """One script, over a connection of its own; its callers come one at a time."""

    def __init__(self, text: str) -> None:
        self._text = text
        # What Redis names a script by, and no secret.
        self._name = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self._connection: Any = queue.connection.connection_pool.make_connection()

    async def run(self, keys: Sequence[str], arguments: Sequence[float]) -> Any:
        """What the script returns. Raises: RedisError, at once where Redis is known to hang."""
        command: tuple[str | float, ...] = ("EVALSHA", self._name, len(keys), *keys, *arguments)
        with queue.asking():
            try:
                return await self._ask(*command)
            except NoScriptError:  # Redis is a new one
                await self._ask("SCRIPT", "LOAD", self._text)
            except NotConnected:  # it went away since the last time, and may be there again
                pass
            return await self._ask(*command)

    async def _ask(self, *command: str | float) -> Any:
        """Raises: RedisError. Whoever waits no longer closes the connection."""
        connection = self._connection
        if not connection.is_connected or _spoken_to(connection):
            connection.disconnect()
            await asyncio.to_thread(connection.connect)
        connection.send_command(*command, check_health=False)
        try:
            await _answer_of(connection)
        except BaseException:
            connection.disconnect()
            raise
        return connection.read_response()  # which is all there as soon as it begins, being short


async def _answer_of(connection: Any) -> None:
    """Return when there is something to read. Raises: redis' TimeoutError."""
    loop = asyncio.get_running_loop()
    answered = loop.create_future()
    descriptor = _descriptor(connection)
    silent = loop.call_later(queue.ANSWER_TIMEOUT_S, _set, answered, False)
    loop.add_reader(descriptor, _set, answered, True)
    try:
        if not await answered:
            raise NotAnswered("Redis does not answer")
    finally:
        silent.cancel()
        loop.remove_reader(descriptor)


def _set(answered: "asyncio.Future[bool]", value: bool) -> None:
    if not answered.done():
        answered.set_result(value)


def _spoken_to(connection: Any) -> bool:
    """Whether Redis has ended an idle connection: nobody else speaks to one."""
    ears = select.poll()
    ears.register(_descriptor(connection), select.POLLIN)
    return bool(ears.poll(0))


def _descriptor(connection: Any) -> int:
    # redis-py knows blocking sockets, or streams of asyncio's; its connection has no other way to
    # the socket that it has opened, greeted and encrypted as the URL says.
    descriptor: int = connection._sock.fileno()
    return descriptor
