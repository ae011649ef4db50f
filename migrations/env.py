"""Alembic's entry: the service's own engine, one migration after the other on one connection, each
in a transaction of its own, and a bound on waiting for locks.
"""

import time

from alembic import context
from sqlalchemy import Connection

from storage.database import engine
from storage.models import Base

ONE_AT_A_TIME = 7261955
"""The advisory lock of whoever migrates."""
TURN_TIMEOUT_S = 600
"""How long a second copy waits for the first."""
POLL_S = 0.2
LOCK_TIMEOUT_S = 5
"""Also outside a transaction, where `SET LOCAL` in a migration means nothing."""


def run() -> None:
    with engine.connect() as connection:
        try:
            _wait_for_our_turn(connection)
            # An index on a large table takes longer than any request may.
            connection.exec_driver_sql("SET statement_timeout = 0")
            connection.exec_driver_sql(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
            connection.commit()
            context.configure(
                connection=connection, target_metadata=Base.metadata, transaction_per_migration=True
            )
            with context.begin_transaction():
                context.run_migrations()
        finally:
            connection.invalidate()  # what was set, and the advisory lock, end with the connection


def _wait_for_our_turn(connection: Connection) -> None:
    """Two copies may start at once: the second waits here, then finds nothing to do.

    It asks again and again with no statement open in between: CREATE INDEX CONCURRENTLY of the
    first waits for all statements that were there before it, and would wait for one that waits.
    """
    until = time.monotonic() + TURN_TIMEOUT_S
    ask = f"SELECT pg_try_advisory_lock({ONE_AT_A_TIME})"
    while not connection.exec_driver_sql(ask).scalar_one():
        connection.commit()
        if time.monotonic() > until:
            raise SystemExit(f"Another migration has run for {TURN_TIMEOUT_S} s; try again later")
        time.sleep(POLL_S)
    connection.commit()


if context.is_offline_mode():
    raise SystemExit("Migrations need a database: set ZIMAGE_DATABASE_URL")
run()
