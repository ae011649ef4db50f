"""The database's driver: connections that wait for no server that hangs, in a thread or, for what
runs in `on_loop`, on the event loop itself.

A server that refuses is away at once. One that hangs says nothing, and no timeout of its own ends
what it does not do: so whoever has waited for ANSWER_S asks by another connection whether it lives.
"""

import asyncio
import select
import time
from collections.abc import Callable, Generator
from typing import Any, TypeVar, TypeVarTuple

import psycopg
from psycopg.abc import PQGen
from psycopg.waiting import Ready, Wait
from sqlalchemy.util import await_, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet

from storage.silence import Silence

CONNECT_TIMEOUT_S = 3
ANSWER_S = 3.0
"""After so long without an answer a server is asked by another connection whether it lives: one
that hangs is away within ANSWER_S + CONNECT_TIMEOUT_S, and one that works may take its time."""
STATEMENT_TIMEOUT_S = 30
GIVE_UP_S = STATEMENT_TIMEOUT_S + 5
"""A statement of a transaction that the server has not ended by then is given up, as one that hangs
where the rest of the server does not."""
IDLE_TIMEOUT_S = 5
"""A process that stands still in the middle of a transaction loses it, and its locks, after this:
nothing but statements is ever done in one."""
OPTIONS: dict[str, Any] = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "options": f"-c statement_timeout={STATEMENT_TIMEOUT_S}s"
    f" -c idle_in_transaction_session_timeout={IDLE_TIMEOUT_S}s -c timezone=UTC",
    # Seconds and, for the last, milliseconds: a machine or a network that is gone is noticed.
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}

HANGS = "the database server does not answer"

Arguments = TypeVarTuple("Arguments")
T = TypeVar("T")

server = Silence()
"""What this process knows of the database server."""


class ServerHangs(psycopg.OperationalError):
    """The server took a statement, or a connection, and does not answer."""


async def on_loop(function: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
    """Call `function` so that the event loop goes on wherever it waits for the database.

    It is written as for a thread, and runs beside the loop's coroutines as one of them would: what
    takes time otherwise, or waits for something else, holds up all of them. To hand it to a thread
    and back takes longer than most statements, and the two threads keep each other waiting.
    """
    return await greenlet_spawn(function, *arguments)


class Impatient(psycopg.Connection[Any]):
    """A connection that waits for no server that hangs. Raises: ServerHangs, and is then closed."""

    address: dict[str, Any]
    give_up_after_s: float | None = None
    may_wait_on_loop = False
    """What SQLAlchemy asks of a new connection it asks while it holds a lock, on which the next one
    would wait: for ever, if that were on the same loop."""

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        if self.may_wait_on_loop and in_greenlet():
            return await_(self._awaited(gen))
        return super().wait(self._impatient(gen), interval, timeout)

    def _impatient(self, waiting: PQGen[T]) -> Generator[Any, Any, T]:
        """`waiting`, which is resumed every 0.1 s also while nothing comes."""
        began = time.monotonic()
        ask_at = began + ANSWER_S
        try:
            wanted = next(waiting)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > ask_at:
                    if self._given_up(began) or server.paused or not _lives(self.address):
                        self._hangs(began)
                    ask_at = time.monotonic() + ANSWER_S
                wanted = waiting.send(ready)
        except StopIteration as answered:
            answer: T = answered.value
            return answer

    async def _awaited(self, waiting: PQGen[T]) -> T:
        """As `_impatient`. Whoever waits no longer closes the connection.

        psycopg's own makes a task of asyncio's for every look at the socket, which is most of what
        a small statement costs.
        """
        began = time.monotonic()
        try:
            wanted = next(waiting)
            while True:
                try:
                    found = await _ready(self.pgconn.socket, wanted)
                    hangs = not found and (
                        self._given_up(began)
                        or server.paused
                        or not await asyncio.to_thread(_lives, self.address)
                    )
                except BaseException:  # the answer to come would be taken for the next one's
                    self.pgconn.finish()
                    raise
                if hangs:
                    self._hangs(began)
                if found:
                    wanted = waiting.send(found)
        except StopIteration as answered:
            answer: T = answered.value
            return answer

    def _given_up(self, began: float) -> bool:
        return self.give_up_after_s is not None and time.monotonic() - began > self.give_up_after_s

    def _hangs(self, began: float) -> None:
        """Raises: ServerHangs."""
        if not self._given_up(began):
            server.begins()
        self.pgconn.finish()  # it counts as broken, and the pool forgets all that are like it
        raise ServerHangs(HANGS)


async def _ready(socket: int, wanted: Wait) -> Ready:
    """What of `wanted` can be done at the socket; NONE if nothing can for ANSWER_S."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[Ready] = loop.create_future()
    silent = loop.call_later(ANSWER_S, _set, ready, Ready.NONE)
    if wanted & Wait.R:
        loop.add_reader(socket, _set, ready, Ready.R)
    if wanted & Wait.W:
        loop.add_writer(socket, _set, ready, Ready.W)
    try:
        return await ready
    finally:
        silent.cancel()
        if wanted & Wait.R:
            loop.remove_reader(socket)
        if wanted & Wait.W:
            loop.remove_writer(socket)


def _set(ready: "asyncio.Future[Ready]", found: Ready) -> None:
    if not ready.done():
        ready.set_result(found)


def connect(address: dict[str, Any]) -> Impatient:
    """Raises: psycopg.OperationalError, at once while the server is known to hang."""
    if server.paused:  # the pool tries once more where a connection was just found to be gone
        raise ServerHangs(HANGS)
    try:
        if in_greenlet():
            connection: Impatient = await_(asyncio.to_thread(Impatient.connect, **address))
        else:
            connection = Impatient.connect(**address)
    except psycopg.errors.ConnectionTimeout as error:
        server.begins()
        raise ServerHangs(HANGS) from error
    connection.address = address
    return connection


def is_gone(connection: psycopg.Connection[Any]) -> bool:
    """Whether an idle connection cannot be used: nobody speaks to one but a server that ends it, or
    that is gone. So a server that was restarted costs a reconnect, not an error to a customer, and
    no round trip tells.
    """
    if connection.closed:
        return True
    ears = select.poll()
    ears.register(connection.fileno(), select.POLLIN)
    return bool(ears.poll(0))


def _lives(address: dict[str, Any]) -> bool:
    """Whether the server answers one more who comes in, be it with a refusal."""
    try:
        psycopg.connect(**address).close()
    except psycopg.Error as error:
        return "FATAL:" in str(error)
    return True
