"""A create that comes twice is submitted once: the tasks of the first are the answer to the second.

A caller that can name its requests does so with a key, for KEEP_S. A library that re-sends without
a key, but says that it re-sends, is known by what it asks for: re-send number n of a request
belongs to one that has been re-sent fewer than n times, so each is answered from another.

Everything here happens under the lock of the account, in the transaction that submits, so of two
at the same moment one is the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, func, select, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from storage.database import from_now
from storage.errors import IdempotencyConflict
from storage.models import RememberedRequest, Task, TaskStatus

KEEP_S = 24 * 3600
"""How long a request is remembered; the key may be used anew afterwards."""


@dataclass(frozen=True, slots=True)
class Mark:
    """By what a create is known again."""

    fingerprint: bytes
    """SHA-256 of what is asked for; where there is no key, of whose key asks as well."""
    key: str | None = None
    resend: int = 0
    """How often the caller says to have sent this before; only looked at where there is no key."""
    resend_window_s: float = 0.0
    """For how long after the first a re-send may come."""


Known = dict[tuple[str, str], RememberedRequest]
"""Requests by account and key."""


def known(session: Session, asked: Sequence[tuple[str, Mark]], now: datetime) -> Known:
    """The requests that were made with these keys."""
    keys = [(account_id, mark.key) for account_id, mark in asked if mark.key is not None]
    if not keys:
        return {}
    rows = session.scalars(
        select(RememberedRequest).where(
            tuple_(RememberedRequest.account_id, RememberedRequest.idempotency_key).in_(keys),
            RememberedRequest.created_at > now - timedelta(seconds=KEEP_S),
        )
    )
    return {(row.account_id, row.idempotency_key or ""): row for row in rows}


def first_of(session: Session, account_id: str, mark: Mark, known: Known) -> list[Task] | None:
    """The tasks that this request has become before; None: it has not been made yet.

    Raises: IdempotencyConflict: its key was used for another request.
    """
    if mark.key is not None:
        row = known.get((account_id, mark.key))
        if row is not None and row.fingerprint != mark.fingerprint:
            raise IdempotencyConflict
        return None if row is None else _tasks(session, row)
    if not mark.resend:
        return None
    row = session.scalar(
        select(RememberedRequest)
        .where(
            RememberedRequest.account_id == account_id,
            RememberedRequest.fingerprint == mark.fingerprint,
            RememberedRequest.idempotency_key.is_(None),
            RememberedRequest.resend < mark.resend,
            RememberedRequest.created_at > from_now(-mark.resend_window_s * mark.resend),
        )
        .order_by(RememberedRequest.id.desc())
        .limit(1)
    )
    if row is None:
        return None
    row.resend = mark.resend
    tasks = _tasks(session, row)
    # Where nothing came of it nothing was charged, and drawing it again is what the caller wants.
    in_vain = all(task.status in (TaskStatus.FAILED, TaskStatus.CANCELLED) for task in tasks)
    return None if in_vain else tasks


def _tasks(session: Session, row: RememberedRequest) -> list[Task]:
    found = {
        task.id: task for task in session.scalars(select(Task).where(Task.id.in_(row.task_ids)))
    }
    return [found[task_id] for task_id in row.task_ids]


def remember(session: Session, made: Sequence[tuple[str, Mark, Sequence[Task]]]) -> None:
    """Note for (account, mark, tasks) what the requests became, in the commit that submits them."""
    if not made:
        return
    rows = [
        {
            "account_id": account_id,
            "idempotency_key": mark.key,
            "fingerprint": mark.fingerprint,
            "resend": mark.resend,
            "task_ids": [task.id for task in tasks],
        }
        for account_id, mark, tasks in made
    ]
    added = insert(RememberedRequest).values(rows)
    # A key that is there already is older than KEEP_S: `known` would have found a younger one.
    anew = {name: added.excluded[name] for name in ("fingerprint", "resend", "task_ids")}
    session.execute(
        added.on_conflict_do_update(
            index_elements=["account_id", "idempotency_key"],
            set_=anew | {"created_at": func.clock_timestamp()},
        )
    )


def forget(session: Session, limit: int) -> int:
    """Delete at most `limit` requests that are remembered for longer than KEEP_S; says how many."""
    old = (
        select(RememberedRequest.id)
        .where(RememberedRequest.created_at < from_now(-KEEP_S))
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    gone = session.execute(
        delete(RememberedRequest)
        .where(RememberedRequest.id.in_(old))
        .returning(RememberedRequest.id)
        .execution_options(synchronize_session=False)
    )
    return len(gone.all())
