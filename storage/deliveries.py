"""Callbacks that are owed: who must be told what ended, and how often that was tried.

waiting ──► delivered    an attempt was answered with 2xx
   └──────► gave_up      the last attempt failed
"""

import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from storage.database import from_now
from storage.models import Account, Delivery, DeliveryState, Task

RETRIES_S = (1, 2, 4)
"""Seconds between a failed attempt and the next, so four attempts in all. Source: EvoLink's API
manual, Z-Image-Turbo, parameter callback_url (read 2026-11)."""

ATTEMPT_LEASE_S = 30
"""An attempt that was not reported after this long is tried again: its courier was lost. Longer
than an attempt may take."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One delivery to try now, with all that it takes: what ended, and the secrets that sign."""

    delivery: Delivery
    task: Task
    secrets: tuple[str, ...]


def owe(session: Session, task: Task) -> None:
    """Note that the end of `task` must be told; in the commit that ends it."""
    if task.callback_url is not None:
        session.add(
            Delivery(
                id=f"msg_{secrets.token_hex(16)}",
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
    until = account.callback_secret_before_until
    if until is None or account.callback_secret_before is None:
        return (account.callback_secret,)
    if until <= datetime.now(until.tzinfo):
        return (account.callback_secret,)
    return (account.callback_secret, account.callback_secret_before)


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
    return session.scalar(
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


def next_due_in_s(session: Session, *, except_accounts: Collection[str]) -> float | None:
    """Seconds until the next delivery is due, 0 if one is; None where none waits."""
    due = session.scalar(
        select(
            func.extract("epoch", func.min(Delivery.next_attempt_at) - func.clock_timestamp())
        ).where(Delivery.state == text("'waiting'"), Delivery.account_id.not_in(except_accounts))
    )
    return None if due is None else max(0.0, float(due))
