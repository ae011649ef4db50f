"""Alembic's entry: the service's own engine, one transaction, and a bound on waiting for locks."""

from alembic import context

from storage.database import engine
from storage.models import Base


def run() -> None:
    # Two copies may start at once: the second waits here, then finds nothing to do.
    with engine.connect() as connection, connection.begin():
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7261955)")
        context.configure(connection=connection, target_metadata=Base.metadata)
        with context.begin_transaction():
            context.run_migrations()


if context.is_offline_mode():
    raise SystemExit("Migrations need a database: set ZIMAGE_DATABASE_URL")
run()
