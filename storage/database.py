"""One engine per process, the only place where a transaction begins and ends, and one clock.

A server that refuses is away at once. One that hangs says nothing, and no timeout of its own ends
what it does not do: so whoever has waited for ANSWER_S asks by another connection whether it lives.
"""

import select
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timedelta
from typing import Any, TypeVar, cast

import psycopg
from sqlalchemy import ColumnElement, Connection, create_engine, event, func
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from storage.errors import ServiceUnavailable
from storage.settings import settings
from storage.silence import Silence, Silent

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
POOL_SIZE = 20
POOL_OVERFLOW_MAX = 20
"""Together no fewer than AnyIO's 40 threads, so that a thread never waits for a connection."""
KEEPALIVES = {
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
"""Seconds and, for the last, milliseconds: a machine or a network that is gone is noticed."""
AWAY = frozenset({"25006", "25P03", "25P04"})
"""Errors of PostgreSQL's that say more of the server than of the statement, beside those that
psycopg calls operational: it is a standby that only reads, or has ended our transaction for us."""

HANGS = "the database server does not answer"

T = TypeVar("T")
Driver = psycopg.Connection[tuple[Any, ...]]

server = Silence()
"""What this process knows of the database server."""


class ServerHangs(psycopg.OperationalError):
    """The server took a statement, or a connection, and does not answer."""


class Impatient(psycopg.Connection[Any]):
    """A connection that waits for no server that hangs. Raises: ServerHangs, and is then closed."""

    give_up_after_s: float | None = None
    address: dict[str, Any]

    def wait(
        self, gen: Generator[Any, Any, T], interval: float = 0.1, timeout: float | None = None
    ) -> T:
        return super().wait(self._impatient(gen), interval, timeout)

    def _impatient(self, waiting: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        """`waiting`, which is resumed every 0.1 s also while nothing comes."""
        began = time.monotonic()
        ask_at = began + ANSWER_S
        try:
            wanted = next(waiting)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > ask_at:
                    self._check(began)
                    ask_at = time.monotonic() + ANSWER_S
                wanted = waiting.send(ready)
        except StopIteration as answered:
            answer: T = answered.value
            return answer

    def _check(self, began: float) -> None:
        """Raises: ServerHangs."""
        given_up = (
            self.give_up_after_s is not None and time.monotonic() - began > self.give_up_after_s
        )
        if given_up or server.paused or not _lives(self.address):
            if not given_up:
                server.begins()
            self.pgconn.finish()  # it counts as broken, and the pool forgets all that are like it
            raise ServerHangs(HANGS)


def _lives(address: dict[str, Any]) -> bool:
    """Whether the server answers one more who comes in, be it with a refusal."""
    try:
        psycopg.connect(**address).close()
    except psycopg.Error as error:
        return "FATAL:" in str(error)
    return True


_OPTIONS: dict[str, Any] = {
    "pool_timeout": CONNECT_TIMEOUT_S,
    "hide_parameters": True,  # they are what customers wrote
    "connect_args": {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "options": f"-c statement_timeout={STATEMENT_TIMEOUT_S}s"
        f" -c idle_in_transaction_session_timeout={IDLE_TIMEOUT_S}s -c timezone=UTC",
        **KEEPALIVES,
    },
}
engine = create_engine(
    settings.database_url.get_secret_value(),
    pool_size=POOL_SIZE,
    max_overflow=POOL_OVERFLOW_MAX,
    **_OPTIONS,
)
_looking = create_engine(  # whose connections are never in a transaction
    settings.database_url.get_secret_value(), pool_reset_on_return=None, **_OPTIONS
)

# Rows are rendered after their commit, so they must stay readable then.
_sessions = sessionmaker(engine, expire_on_commit=False)


@event.listens_for(engine, "do_connect")
def _connect(dialect: Any, record: Any, args: list[Any], address: dict[str, Any]) -> Impatient:
    """Raises: psycopg.OperationalError."""
    if server.paused:  # the pool tries once more where a ping has just waited in vain
        raise ServerHangs(HANGS)
    try:
        connection = Impatient.connect(*args, **address)
    except psycopg.errors.ConnectionTimeout as error:
        server.begins()
        raise ServerHangs(HANGS) from error
    connection.address = address
    return connection


@event.listens_for(_looking, "do_connect")
def _connect_to_look(dialect: Any, record: Any, args: list[Any], address: dict[str, Any]) -> Any:
    """Raises: psycopg.OperationalError."""
    connection = _connect(dialect, record, args, address)
    connection.autocommit = True
    connection.give_up_after_s = GIVE_UP_S
    return connection


@event.listens_for(engine, "checkout")
@event.listens_for(_looking, "checkout")
def _still_there(driver: Any, record: Any, proxy: Any) -> None:
    """Nobody speaks to an idle connection but a server that ends it, or that is gone: so a server
    that was restarted costs a reconnect, not an error to a customer, and no round trip tells.

    Raises: DisconnectionError, and the pool connects anew.
    """
    try:
        ears = select.poll()
        ears.register(driver.fileno(), select.POLLIN)
        spoken_to = ears.poll(0)
    except psycopg.Error as error:  # it is closed
        raise DisconnectionError from error
    if spoken_to:
        raise DisconnectionError


@event.listens_for(_sessions, "after_begin")
def _bound(session: Session, transaction: Any, connection: Connection) -> None:
    """Only what a transaction waits for is bounded: a migration may take as long as it needs."""
    driver = connection.connection.driver_connection
    if isinstance(driver, Impatient):
        driver.give_up_after_s = GIVE_UP_S


@contextmanager
def transaction() -> Iterator[Session]:
    """A session whose work is committed when the block ends, and undone when it raises.

    Raises:
        ServiceUnavailable: the database does not answer, cannot do it now, or went away. If that
            was during the commit, nobody knows whether it happened: what is done again must find
            what it did the first time.
    """
    with _asking(), _sessions.begin() as session:
        yield session


@contextmanager
def look() -> Iterator[Driver]:
    """The driver's own connection, for statements that only read: each costs one round trip, where
    a transaction has two more, and each sees what is committed when it begins.

    Raises: ServiceUnavailable, as `transaction` does.
    """
    with _asking(), closing(_looking.raw_connection()) as pooled:
        yield cast(Driver, pooled.driver_connection)


def driver(session: Session) -> Driver:
    """The driver's own connection, in the transaction of `session`: for the statements that every
    request runs, around which SQLAlchemy does several times the work that they are.
    """
    return cast(Driver, session.connection().connection.driver_connection)


@contextmanager
def _asking() -> Iterator[None]:
    try:
        with server.asking():
            yield
    except (Silent, PoolTimeout) as error:
        raise ServiceUnavailable from error
    except DBAPIError as error:
        if not _is_away(error):
            raise
        raise ServiceUnavailable from error
    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
        raise ServiceUnavailable from error
    except psycopg.Error as error:
        if error.sqlstate not in AWAY:
            raise
        raise ServiceUnavailable from error


def _is_away(error: DBAPIError) -> bool:
    """Whether the server is at fault, and not the statement."""
    if isinstance(error, OperationalError | InterfaceError) or error.connection_invalidated:
        return True
    return getattr(error.orig, "sqlstate", None) in AWAY


def from_now(seconds: float) -> ColumnElement[datetime]:
    """A moment by the database's clock: the clocks of other machines need not agree."""
    return func.clock_timestamp() + timedelta(seconds=seconds)
