"""The books, watched: proved again and again by the couriers, and the result kept in one row.

One courier at a time, and none before it is due: what the last look found says when the next is.
"""

import time
from dataclasses import dataclass

import structlog
from sqlalchemy import func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from storage import ledger
from storage.database import transaction
from storage.driver import Impatient
from storage.models import BooksCheck, TaskStatus

CHECK_S = 300.0
"""The books are proved this often, as long as that costs little."""
PAUSE_FACTOR = 100
"""A look is followed by a pause of so many times what it took: it reads every row, so with more
rows the looks become rarer, never a burden of more than 1 % of one core of the database."""
CHECK_TIMEOUT_S = 600
FAULTS_LOGGED_MAX = 20
_LOCK = 7261956
"""Of PostgreSQL's advisory locks; that of the migrations is the one before."""

logger = structlog.get_logger()


def watch() -> bool:
    """Prove the books if it is time and nobody else does. Returns whether they were proved."""
    with transaction() as session:
        if not session.scalar(select(func.pg_try_advisory_xact_lock(_LOCK))):
            return False
        if not _is_due(session):
            return False
        _take_time(session)
        started = time.monotonic()
        books = ledger.check_books(session)
        _keep(session, books, time.monotonic() - started)
    if not books.balanced:
        logger.error(
            "books.drift", faults=len(books.faults), first=books.faults[:FAULTS_LOGGED_MAX]
        )
    return True


def _take_time(session: Session) -> None:
    """Let the statements of this transaction take CHECK_TIMEOUT_S."""
    session.execute(text(f"SET LOCAL statement_timeout = '{CHECK_TIMEOUT_S}s'"))
    driver = session.connection().connection.driver_connection
    if isinstance(driver, Impatient):
        driver.give_up_after_s = CHECK_TIMEOUT_S


def _is_due(session: Session) -> bool:
    pause_s = func.greatest(CHECK_S, BooksCheck.took_s * PAUSE_FACTOR)
    # Of a moment to come, as after a change of the clock, nothing is believed.
    return (
        session.scalar(
            select(
                ~select(BooksCheck.id)
                .where(
                    BooksCheck.checked_at
                    > func.clock_timestamp() - pause_s * text("interval '1 s'"),
                    BooksCheck.checked_at <= func.clock_timestamp(),
                )
                .exists()
            )
        )
        is not False
    )


def _keep(session: Session, books: ledger.Books, took_s: float) -> None:
    found = {
        "checked_at": func.clock_timestamp(),
        "took_s": took_s,
        "accounts": books.accounts,
        "faults": len(books.faults),
        "completed": books.ended[TaskStatus.COMPLETED],
        "failed": books.ended[TaskStatus.FAILED],
        "cancelled": books.ended[TaskStatus.CANCELLED],
        "callbacks_given_up": books.callbacks_given_up,
    }
    added = insert(BooksCheck).values(id=1, **found)
    session.execute(added.on_conflict_do_update(index_elements=["id"], set_=found))


@dataclass(frozen=True, slots=True)
class Counts:
    """What the database says of the service at one moment; ages in seconds, None where of nothing.

    `waiting` is counted no further than asked, and the oldest is looked for among those.
    """

    waiting: int
    oldest_waiting_s: float | None
    processing: int
    callbacks_waiting: int
    oldest_callback_s: float | None
    """For how long the callback that is most overdue could have been tried."""
    check: BooksCheck | None
    check_age_s: float | None


_COUNTS = text("""
    SELECT w.n AS waiting, extract(epoch FROM clock_timestamp() - w.oldest) AS oldest_waiting_s,
           p.n AS processing,
           d.n AS callbacks_waiting,
           greatest(extract(epoch FROM clock_timestamp() - d.oldest), 0) AS oldest_callback_s
      FROM (SELECT count(*) AS n, min(created_at) AS oldest
              FROM (SELECT created_at FROM tasks WHERE status = 'pending'
                     ORDER BY fair_tag, id LIMIT :at_most) AS counted) AS w,
           (SELECT count(*) AS n FROM (SELECT FROM tasks WHERE status = 'processing'
                                        LIMIT :at_most) AS counted) AS p,
           (SELECT count(*) AS n, min(next_attempt_at) AS oldest
              FROM (SELECT next_attempt_at FROM deliveries WHERE state = 'waiting'
                     ORDER BY next_attempt_at LIMIT :at_most) AS counted) AS d
""")


def count(session: Session, *, at_most: int) -> Counts:
    """Count what can be counted by an index, and tell what the last look at the books found."""
    row = session.execute(_COUNTS, {"at_most": at_most}).one()
    last = session.execute(
        select(BooksCheck, func.extract("epoch", func.clock_timestamp() - BooksCheck.checked_at))
    ).one_or_none()
    check, age_s = (None, None) if last is None else (last[0], float(last[1]))
    return Counts(
        waiting=row.waiting,
        oldest_waiting_s=_float(row.oldest_waiting_s),
        processing=row.processing,
        callbacks_waiting=row.callbacks_waiting,
        oldest_callback_s=_float(row.oldest_callback_s) if row.callbacks_waiting else None,
        check=check,
        check_age_s=age_s,
    )


def _float(number: object) -> float | None:
    return None if number is None else float(str(number))
