"""One engine per process, the only place where a transaction begins and ends, and one clock."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, create_engine, func
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from storage.errors import ServiceUnavailable
from storage.settings import settings

CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 30
POOL_SIZE = 20
POOL_OVERFLOW_MAX = 20
"""Together no fewer than AnyIO's 40 threads, so that a thread never waits for a connection."""

engine = create_engine(
    settings.database_url.get_secret_value(),
    pool_size=POOL_SIZE,
    max_overflow=POOL_OVERFLOW_MAX,
    pool_timeout=CONNECT_TIMEOUT_S,
    pool_pre_ping=True,  # a restarted server costs a reconnect, not an error to a customer
    connect_args={
        "connect_timeout": CONNECT_TIMEOUT_S,
        "options": f"-c statement_timeout={STATEMENT_TIMEOUT_S}s -c timezone=UTC",
    },
)

# Rows are rendered after their commit, so they must stay readable then.
_sessions = sessionmaker(engine, expire_on_commit=False)


@contextmanager
def transaction() -> Iterator[Session]:
    """A session whose work is committed when the block ends, and undone when it raises.

    Raises:
        ServiceUnavailable: the database does not answer.
    """
    try:
        with _sessions.begin() as session:
            yield session
    except (OperationalError, InterfaceError, PoolTimeout) as error:
        raise ServiceUnavailable from error


def from_now(seconds: float) -> ColumnElement[datetime]:
    """A moment by the database's clock: the clocks of other machines need not agree."""
    return func.clock_timestamp() + timedelta(seconds=seconds)
