"""Callbacks that are owed: who must be told what ended, and how often that was tried.

waiting ──► delivered    an attempt was answered with 2xx
   └──────► gave_up      the last attempt failed

Both go back to waiting when the customer asks for the delivery again.
"""

import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, func, select, text, tuple_, update
from sqlalchemy.orm import Session

from storage.database import from_now
from storage.models import Account, Delivery, DeliveryAttempt, DeliveryState, Task

RETRIES_S = (1, 2, 4)
"""Seconds between a failed attempt and the next, so four attempts in all. Source: EvoLink's API
manual, Z-Image-Turbo, parameter callback_url (read 2026-11)."""

ATTEMPT_LEASE_S = 30
"""An attempt that was not reported after this long is tried again: its courier was lost. Longer
than an attempt may take."""


ID_PREFIX = "msg_"
_ID = re.compile(ID_PREFIX + r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One delivery to try now, with all that it takes: what ended, and the secrets that sign."""

    delivery: Delivery
    task: Task
    secrets: tuple[str, ...]
    """As they lie in the database: one that cannot be opened is the trouble of its own attempt."""


def is_id(text: str) -> bool:
    """Whether `text` has the form of a delivery's id."""
    return _ID.fullmatch(text) is not None


def owe(session: Session, task: Task) -> None:
    """Note that the end of `task` must be told; in the commit that ends it."""
    if task.callback_url is not None:
        session.add(
            Delivery(
                id=ID_PREFIX + secrets.token_hex(16),
                task_id=task.id,
                account_id=task.account_id,
                url=task.callback_url,
            )
        )
        session.flush()


def claim_due(session: Session, *, limit: int, except_accounts: Collection[str]) -> list[Attempt]:
    """Take at most `limit` deliveries that are due; none of `except_accounts`.

    An attempt counts when it is recorded: what a courier took before it died is due again after
    ATTEMPT_LEASE_S and has used up nothing, so a receiver may hear once more, never once less.
    """
    due = (
        select(Delivery.id)
        .where(
            Delivery.state == text("'waiting'"),
            Delivery.next_attempt_at <= func.clock_timestamp(),
            Delivery.account_id.not_in(except_accounts),
        )
        .order_by(Delivery.next_attempt_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    claimed = session.scalars(
        update(Delivery)
        .where(Delivery.id == due.c.id)
        .values(claim=Delivery.claim + 1, next_attempt_at=from_now(ATTEMPT_LEASE_S))
        .returning(Delivery)
        .execution_options(populate_existing=True)
    ).all()
    found = session.execute(
        select(Task, Account)
        .join(Account, Account.id == Task.account_id)
        .where(Task.id.in_([delivery.task_id for delivery in claimed]))
    )
    by_task = {task.id: (task, account) for task, account in found}
    return [
        Attempt(delivery, by_task[delivery.task_id][0], _secrets(by_task[delivery.task_id][1]))
        for delivery in claimed
    ]


def _secrets(account: Account) -> tuple[str, ...]:
    """The newest first; beside it the one before, while receivers may still check with that."""
    newest, before = account.sealed_callback_secret, account.sealed_callback_secret_before
    until = account.callback_secret_before_until
    if until is None or before is None or until <= datetime.now(until.tzinfo):
        return (newest,)
    return (newest, before)


def record(
    session: Session, delivery: Delivery, *, status: int | None, error: str | None, final: bool
) -> DeliveryState | None:
    """Note how an attempt ended; returns what became of the delivery.

    `status` is HTTP's, None where there was no answer; `error` None means delivered; `final`
    means that another attempt cannot help. None: another courier has taken the delivery since.
    """
    values: dict[str, Any]
    if error is None:
        values = {"state": DeliveryState.DELIVERED, "delivered_at": func.clock_timestamp()}
    elif final or delivery.attempts >= len(RETRIES_S):
        values = {"state": DeliveryState.GAVE_UP}
    else:
        values = {"next_attempt_at": from_now(RETRIES_S[delivery.attempts])}
    state = session.scalar(
        update(Delivery)
        .where(
            Delivery.id == delivery.id,
            Delivery.claim == delivery.claim,
            Delivery.state == DeliveryState.WAITING,
        )
        .values(attempts=Delivery.attempts + 1, last_status=status, last_error=error, **values)
        .returning(Delivery.state)
        .execution_options(synchronize_session=False)
    )
    if state is not None:
        session.add(DeliveryAttempt(delivery_id=delivery.id, status=status, error=error))
    return state


@dataclass(frozen=True, slots=True)
class Filter:
    """Which deliveries of an account are meant; a moment is when the task ended."""

    account_id: str
    delivery_id: str | None = None
    task_id: str | None = None
    state: DeliveryState | None = None
    since: datetime | None = None
    until: datetime | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        conditions = [Delivery.account_id == self.account_id]
        if self.delivery_id is not None:
            conditions.append(Delivery.id == self.delivery_id)
        if self.task_id is not None:
            conditions.append(Delivery.task_id == self.task_id)
        if self.state is not None:
            conditions.append(Delivery.state == self.state)
        if self.since is not None:
            conditions.append(Delivery.created_at >= self.since)
        if self.until is not None:
            conditions.append(Delivery.created_at < self.until)
        return conditions


Logged = tuple[Delivery, list[DeliveryAttempt]]
"""A delivery with its attempts, the first one first."""


def log(
    session: Session, which: Filter, *, before: tuple[datetime, str] | None, limit: int
) -> list[Logged]:
    """Deliveries with their attempts, newest first, older than (created_at, id) `before`."""
    query = select(Delivery).where(*which.conditions())
    if before is not None:
        query = query.where(tuple_(Delivery.created_at, Delivery.id) < before)
    query = query.order_by(Delivery.created_at.desc(), Delivery.id.desc()).limit(limit)
    return _with_attempts(session, session.scalars(query).all())


def redeliver(session: Session, which: Filter, *, limit: int) -> list[Logged]:
    """Owe at most `limit` deliveries anew, with all their attempts; returns them, oldest first.

    Those that are waiting already stay as they are.
    """
    asked = session.scalars(
        select(Delivery)
        .where(*which.conditions())
        .order_by(Delivery.created_at, Delivery.id)
        .limit(limit)
        .with_for_update()
    ).all()
    now = session.execute(select(func.clock_timestamp())).scalar_one()
    for delivery in asked:
        if delivery.state is not DeliveryState.WAITING:
            delivery.state = DeliveryState.WAITING
            delivery.attempts = 0
            delivery.delivered_at = None
            delivery.next_attempt_at = now
    session.flush()
    return _with_attempts(session, asked)


def _with_attempts(session: Session, deliveries: Sequence[Delivery]) -> list[Logged]:
    attempts: dict[str, list[DeliveryAttempt]] = {delivery.id: [] for delivery in deliveries}
    for attempt in session.scalars(
        select(DeliveryAttempt)
        .where(DeliveryAttempt.delivery_id.in_(attempts))
        .order_by(DeliveryAttempt.id)
    ):
        attempts[attempt.delivery_id].append(attempt)
    return [(delivery, attempts[delivery.id]) for delivery in deliveries]


def next_due_in_s(session: Session, *, except_accounts: Collection[str]) -> float | None:
    """Seconds until the next delivery is due, 0 if one is; None where none waits."""
    due = session.scalar(
        select(
            func.extract("epoch", func.min(Delivery.next_attempt_at) - func.clock_timestamp())
        ).where(Delivery.state == text("'waiting'"), Delivery.account_id.not_in(except_accounts))
    )
    return None if due is None else max(0.0, float(due))
