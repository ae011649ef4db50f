"""Callbacks that are owed: who must be told what ended, and how often that was tried.

waiting ──► delivered    an attempt was answered with 2xx
   └──────► gave_up      the last attempt failed

Both go back to waiting when the customer asks for the delivery again.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import (
    ARRAY,
    CTE,
    ColumnElement,
    Integer,
    Text,
    all_,
    any_,
    bindparam,
    cast,
    func,
    insert,
    literal,
    select,
    text,
    tuple_,
    update,
)
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

    @property
    def receiver(self) -> str:
        """Whose it is and which server it is for: one that hangs must not hold up others."""
        return f"{self.delivery.account_id} {self.delivery.url.split('/')[2]}"


def is_id(text: str) -> bool:
    """Whether `text` has the form of a delivery's id."""
    return _ID.fullmatch(text) is not None


def owe(ended: CTE) -> list[CTE]:
    """What notes that the end of the one task of `ended` must be told, as a part of the statement
    that ends it."""
    owed = {
        Delivery.id: literal(ID_PREFIX) + func.replace(cast(func.gen_random_uuid(), Text), "-", ""),
        Delivery.task_id: ended.c.id,
        Delivery.account_id: ended.c.account_id,
        Delivery.url: ended.c.callback_url,
    }
    asked = select(*owed.values()).where(ended.c.callback_url.is_not(None))
    return [insert(Delivery).from_select([*owed], asked).returning(Delivery.id).cte("delivery")]


# Made once: to make a statement takes several times as long as to run it.
_NOT_BUSY = (
    Delivery.account_id != all_(bindparam("except_accounts", type_=ARRAY(Text))),
    # As `Attempt.receiver` says it.
    Delivery.account_id + " " + func.split_part(Delivery.url, "/", 3)
    != all_(bindparam("except_receivers", type_=ARRAY(Text))),
)
_DUE = (
    select(Delivery.id)
    .where(
        Delivery.state == text("'waiting'"),
        Delivery.next_attempt_at <= func.clock_timestamp(),
        *_NOT_BUSY,
    )
    .order_by(Delivery.next_attempt_at)
    .limit(bindparam("at_most", type_=Integer))
    .with_for_update(skip_locked=True)
    .cte("due")
)
_CLAIMED = (
    update(Delivery)
    .where(Delivery.id == _DUE.c.id)
    .values(claim=Delivery.claim + 1, next_attempt_at=from_now(ATTEMPT_LEASE_S))
    .returning(Delivery)
    .cte("claimed")
)
_CLAIM = (
    select(Delivery).from_statement(select(*_CLAIMED.c)).execution_options(populate_existing=True)
)
_ENDED = (
    select(Task, Account)
    .join(Account, Account.id == Task.account_id)
    .where(Task.id == any_(bindparam("ids", type_=ARRAY(Text))))
)


def claim_due(
    session: Session,
    *,
    limit: int,
    except_accounts: Collection[str],
    except_receivers: Collection[str] = (),
) -> list[Attempt]:
    """Take at most `limit` deliveries that are due; none of `except_accounts`, nor to
    `except_receivers`, which are named as `Attempt.receiver` does.

    An attempt counts when it is recorded: what a courier took before it died is due again after
    ATTEMPT_LEASE_S and has used up nothing, so a receiver may hear once more, never once less.
    """
    claimed: Sequence[Delivery] = session.scalars(
        _CLAIM, {"at_most": limit, **_busy(except_accounts, except_receivers)}
    ).all()
    if not claimed:
        return []
    found = session.execute(_ENDED, {"ids": [delivery.task_id for delivery in claimed]})
    by_task = {task.id: (task, account) for task, account in found}
    return [
        Attempt(delivery, by_task[delivery.task_id][0], _secrets(by_task[delivery.task_id][1]))
        for delivery in claimed
    ]


def _busy(accounts: Collection[str], receivers: Collection[str]) -> dict[str, list[str]]:
    return {"except_accounts": list(accounts), "except_receivers": list(receivers)}


def _secrets(account: Account) -> tuple[str, ...]:
    """The newest first; beside it the one before, while receivers may still check with that."""
    newest, before = account.sealed_callback_secret, account.sealed_callback_secret_before
    until = account.callback_secret_before_until
    if until is None or before is None or until <= datetime.now(until.tzinfo):
        return (newest,)
    return (newest, before)


@dataclass(frozen=True, slots=True)
class End:
    """How an attempt ended. `status` is HTTP's, None where there was no answer; `error` None means
    delivered; `final` means that another attempt cannot help."""

    delivery: Delivery
    status: int | None
    error: str | None
    final: bool

    @property
    def again_s(self) -> int | None:
        """Seconds until the next attempt; None where there is none."""
        if self.error is None or self.final or self.delivery.attempts >= len(RETRIES_S):
            return None
        return RETRIES_S[self.delivery.attempts]


_RECORD = text("""
    WITH ended AS (
        UPDATE deliveries
           SET attempts = deliveries.attempts + 1, last_status = e.status, last_error = e.error,
               state = CASE WHEN e.error IS NULL THEN 'delivered'
                            WHEN e.again_s IS NULL THEN 'gave_up'
                            ELSE 'waiting' END,
               delivered_at = CASE WHEN e.error IS NULL THEN clock_timestamp()
                                   ELSE delivered_at END,
               next_attempt_at = coalesce(clock_timestamp() + make_interval(secs => e.again_s),
                                          next_attempt_at)
          FROM unnest(CAST(:ids AS text[]), CAST(:claims AS int[]), CAST(:statuses AS int[]),
                      CAST(:errors AS text[]), CAST(:again_s AS int[]))
               AS e(id, claim, status, error, again_s)
         WHERE deliveries.id = e.id AND deliveries.claim = e.claim AND state = 'waiting'
        RETURNING deliveries.id, state, last_status, last_error
    ), noted AS (
        INSERT INTO delivery_attempts (delivery_id, status, error)
        SELECT id, last_status, last_error FROM ended
    )
    SELECT id, state FROM ended
""")


def record_many(session: Session, ends: Sequence[End]) -> list[DeliveryState | None]:
    """Note how attempts ended, each at a delivery of its own; returns what became of these.

    None: another courier has taken the delivery since.
    """
    rows = session.execute(
        _RECORD,
        {
            "ids": [end.delivery.id for end in ends],
            "claims": [end.delivery.claim for end in ends],
            "statuses": [end.status for end in ends],
            "errors": [end.error for end in ends],
            "again_s": [end.again_s for end in ends],
        },
    )
    became = {delivery_id: DeliveryState(state) for delivery_id, state in rows}
    return [became.get(end.delivery.id) for end in ends]


def record(
    session: Session, delivery: Delivery, *, status: int | None, error: str | None, final: bool
) -> DeliveryState | None:
    """`record_many` of one."""
    (became,) = record_many(session, [End(delivery, status, error, final)])
    return became


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


_NEXT_DUE = select(
    func.extract("epoch", func.min(Delivery.next_attempt_at) - func.clock_timestamp())
).where(Delivery.state == text("'waiting'"), *_NOT_BUSY)


def next_due_in_s(
    session: Session, *, except_accounts: Collection[str], except_receivers: Collection[str] = ()
) -> float | None:
    """Seconds until the next delivery is due, 0 if one is; None where none waits."""
    due = session.scalar(_NEXT_DUE, _busy(except_accounts, except_receivers))
    return None if due is None else max(0.0, float(due))
