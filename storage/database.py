"""The engines of a process, the only place where a transaction begins and ends, and one clock."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, cast

import psycopg
from sqlalchemy import ColumnElement, Connection, create_engine, event, func
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.util.concurrency import in_greenlet

from storage import driver
from storage.driver import CONNECT_TIMEOUT_S, Impatient
from storage.errors import ServiceUnavailable
from storage.settings import settings
from storage.silence import Silent

POOL_SIZE = 20
POOL_OVERFLOW_MAX = 20
"""Together no fewer than AnyIO's 40 threads, so that a thread never waits for a connection."""
AWAY = frozenset({"25006", "25P03", "25P04"})
"""Errors of PostgreSQL's that say more of the server than of the statement, beside those that
psycopg calls operational: it is a standby that only reads, or has ended our transaction for us."""

Driver = psycopg.Connection[tuple[Any, ...]]

_OPTIONS: dict[str, Any] = {
    "pool_timeout": CONNECT_TIMEOUT_S,
    "hide_parameters": True,  # they are what customers wrote
    "connect_args": driver.OPTIONS,
}
engine = create_engine(
    settings.database_url.get_secret_value(),
    pool_size=POOL_SIZE,
    max_overflow=POOL_OVERFLOW_MAX,
    **_OPTIONS,
)
# For what is called by `driver.on_loop`, which is one batch at a time: no loop may wait for a pool.
_on_loop = create_engine(
    settings.database_url.get_secret_value(), pool_size=1, max_overflow=-1, **_OPTIONS
)

# Rows are rendered after their commit, so they must stay readable then.
_sessions = sessionmaker(engine, expire_on_commit=False)
_sessions_on_loop = sessionmaker(_on_loop, expire_on_commit=False)


@event.listens_for(engine, "do_connect")
@event.listens_for(_on_loop, "do_connect")
def _connect(dialect: Any, record: Any, args: list[Any], address: dict[str, Any]) -> Impatient:
    """Raises: psycopg.OperationalError."""
    return driver.connect(address)


@event.listens_for(engine, "checkout")
@event.listens_for(_on_loop, "checkout")
def _still_there(connection: Any, record: Any, proxy: Any) -> None:
    """Raises: DisconnectionError, and the pool connects anew."""
    if driver.is_gone(connection):
        raise DisconnectionError
    connection.may_wait_on_loop = True


def address() -> dict[str, Any]:
    """Where the server is and how it is spoken to, as psycopg takes it."""
    _, where = engine.dialect.create_connect_args(engine.url)
    return {**where, **driver.OPTIONS}


@event.listens_for(_sessions, "after_begin")
@event.listens_for(_sessions_on_loop, "after_begin")
def _bound(session: Session, transaction: Any, connection: Connection) -> None:
    """Only what a transaction waits for is bounded: a migration may take as long as it needs."""
    theirs = connection.connection.driver_connection
    if isinstance(theirs, Impatient):
        theirs.give_up_after_s = driver.GIVE_UP_S


@contextmanager
def transaction() -> Iterator[Session]:
    """A session whose work is committed when the block ends, and undone when it raises.

    In a thread, or in what is called by `driver.on_loop`.

    Raises:
        ServiceUnavailable: the database does not answer, cannot do it now, or went away. If that
            was during the commit, nobody knows whether it happened: what is done again must find
            what it did the first time.
    """
    sessions = _sessions_on_loop if in_greenlet() else _sessions
    with asking(), sessions.begin() as session:
        yield session


def driver_of(session: Session) -> Driver:
    """The driver's own connection, in the transaction of `session`: for the statements that every
    request runs, around which SQLAlchemy does several times the work that they are.
    """
    return cast(Driver, session.connection().connection.driver_connection)


@contextmanager
def asking() -> Iterator[None]:
    """Ask the server in this block. Raises: ServiceUnavailable."""
    try:
        with driver.server.asking():
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
