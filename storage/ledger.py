"""Credits: granted, reserved at submission, settled on success, released on any other end.

grant ──► balance        reserve ──► reserved ──► settle:  balance and reserved shrink, one entry
                                          └─────► release: reserved shrinks, no entry

No other module writes `balance`, `reserved` or `unfinished`. Amounts are exact to six places.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from storage import fairness
from storage.backlog import backlog
from storage.errors import (
    AccountNotFound,
    AccountSuspended,
    IdempotencyConflict,
    InsufficientCredits,
    ServiceError,
    TooManyUnfinished,
    WouldOverdraw,
    WouldOverflow,
)
from storage.models import Account, ApiKey, EntryKind, FairClock, LedgerEntry, Task, TaskStatus

BALANCE_MAX = Decimal(10**12 - 1)
"""Credits on one account: what the column holds."""


@dataclass(frozen=True, slots=True)
class Locked:
    """Accounts that nobody else can reserve from until the commit, and the moment it was so."""

    accounts: dict[str, Account]
    virtual_now: float
    now: datetime
    """By the database's clock."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Credits that are held, and the places in the fair order that came with them."""

    fair_tags: list[float]
    user_group: str


def lock(session: Session, account_ids: Collection[str]) -> Locked:
    """Lock accounts until the caller commits, so that no two requests ever hold the same credit.

    They are locked in the order of their ids, so that no two callers wait for each other.
    """
    backlog.look(session)
    rows = session.execute(
        select(Account, select(FairClock.virtual_now).scalar_subquery(), func.clock_timestamp())
        .where(Account.id.in_(account_ids))
        .order_by(Account.id)
        .with_for_update(of=Account, key_share=True)
        .execution_options(populate_existing=True)
    ).all()
    return Locked({account.id: account for account, _, _ in rows}, rows[-1][1], rows[-1][2])


def reserve(
    locked: Locked, account_id: str, price: Decimal, costs: Sequence[float]
) -> Hold | ServiceError:
    """Hold `price` credits for each task of a request, or for none of them.

    `costs` are the tasks' shares of a GPU in virtual time. What is held is written with the
    caller's next flush.

    Errors: AccountSuspended, TooManyUnfinished, InsufficientCredits, BacklogFull.
    """
    account = locked.accounts[account_id]
    fault = _refusal(account, price * len(costs), len(costs))
    if fault is not None:
        return fault
    tags = []
    for cost in costs:
        tag, account.virtual_finish = fairness.schedule(
            locked.virtual_now, account.virtual_finish, cost, account.user_group
        )
        tags.append(tag)
    account.reserved += price * len(costs)
    account.unfinished += len(costs)
    backlog.take(len(costs))
    return Hold(tags, account.user_group)


def _refusal(account: Account, price: Decimal, tasks: int) -> ServiceError | None:
    if account.suspended:
        return AccountSuspended()
    if account.unfinished_max is not None and account.unfinished + tasks > account.unfinished_max:
        return TooManyUnfinished()
    if account.balance - account.reserved < price:
        return InsufficientCredits()
    return backlog.refusal(tasks)


def settle(session: Session, task: Task) -> None:
    """Charge what `task` had reserved. The entry's unique `task_id` makes a second time fail."""
    balance_after = session.execute(
        update(Account)
        .where(Account.id == task.account_id)
        .values(
            balance=Account.balance - task.price,
            reserved=Account.reserved - task.price,
            unfinished=Account.unfinished - 1,
        )
        .returning(Account.balance)
        .execution_options(synchronize_session=False)
    ).scalar_one()
    session.execute(
        update(ApiKey)
        .where(ApiKey.id == task.api_key_id)
        .values(used_credits=ApiKey.used_credits + task.price)
        .execution_options(synchronize_session=False)
    )
    session.add(
        LedgerEntry(
            account_id=task.account_id,
            kind=EntryKind.CHARGE,
            amount=-task.price,
            balance_after=balance_after,
            actor="worker",
            task_id=task.id,
        )
    )
    session.flush()


def release(session: Session, task: Task) -> None:
    """Let go of what `task` had reserved; nothing was charged, so nothing is entered."""
    session.execute(
        update(Account)
        .where(Account.id == task.account_id)
        .values(reserved=Account.reserved - task.price, unfinished=Account.unfinished - 1)
        .execution_options(synchronize_session=False)
    )


def grant(
    session: Session,
    account_id: str,
    amount: Decimal,
    *,
    actor: str,
    note: str | None = None,
    idempotency_key: str | None = None,
) -> tuple[LedgerEntry, bool]:
    """Add credits to an account, or take some away with a negative `amount`.

    With an `idempotency_key` that was used before, nothing moves and the first entry is returned.

    Returns:
        the entry, and whether it is a replay.

    Raises:
        AccountNotFound, IdempotencyConflict (same key, other amount or note), WouldOverdraw
        (less than zero would be left beside what unfinished tasks reserve), WouldOverflow.
    """
    account = session.scalar(
        select(Account)
        .where(Account.id == account_id)
        .with_for_update(key_share=True)
        .execution_options(populate_existing=True)
    )
    if account is None:
        raise AccountNotFound
    # Looked up under the account's lock, so of two calls with one key the second finds the first.
    if idempotency_key is not None:
        first = session.scalar(
            select(LedgerEntry).where(
                LedgerEntry.account_id == account_id,
                LedgerEntry.idempotency_key == idempotency_key,
            )
        )
        if first is not None:
            if (first.amount, first.note) != (amount, note):
                raise IdempotencyConflict
            return first, True
    if account.balance + amount < account.reserved:
        raise WouldOverdraw
    if account.balance + amount > BALANCE_MAX:
        raise WouldOverflow
    account.balance += amount
    entry = LedgerEntry(
        account_id=account_id,
        kind=EntryKind.GRANT if amount > 0 else EntryKind.ADJUSTMENT,
        amount=amount,
        balance_after=account.balance,
        actor=actor,
        note=note,
        idempotency_key=idempotency_key,
    )
    session.add(entry)
    session.flush()
    return entry, False


@dataclass(frozen=True, slots=True)
class Books:
    """What a look at all the books found: the number of accounts, a line for every fault, and
    what was counted on the way."""

    accounts: int
    faults: list[str]
    ended: dict[TaskStatus, int]
    callbacks_given_up: int

    @property
    def balanced(self) -> bool:
        return not self.faults


_BOOKS = text("""
    SELECT a.id, a.balance, a.reserved, a.unfinished,
           coalesce(e.entered, 0) AS entered,
           coalesce((SELECT balance_after FROM ledger_entries WHERE account_id = a.id
                      ORDER BY id DESC LIMIT 1), 0) AS last_said,
           coalesce(t.held, 0) AS held, coalesce(t.open, 0) AS open,
           coalesce(t.uncharged, 0) AS uncharged,
           coalesce(e.charges, 0) - coalesce(t.charged, 0) AS overcharged,
           coalesce(t.untold, 0) AS untold,
           coalesce(t.completed, 0) AS completed, coalesce(t.failed, 0) AS failed,
           coalesce(t.cancelled, 0) AS cancelled, coalesce(t.given_up, 0) AS given_up
      FROM accounts a
      LEFT JOIN (SELECT account_id, sum(amount) AS entered,
                        count(*) FILTER (WHERE kind = 'charge') AS charges
                   FROM ledger_entries GROUP BY 1) e
             ON e.account_id = a.id
      LEFT JOIN (SELECT t.account_id,
                        sum(price) FILTER (WHERE status IN ('pending', 'processing')) AS held,
                        count(*) FILTER (WHERE status IN ('pending', 'processing')) AS open,
                        count(*) FILTER (WHERE status = 'completed'
                                           AND c.amount IS DISTINCT FROM -price) AS uncharged,
                        count(c.id) FILTER (WHERE status = 'completed') AS charged,
                        count(*) FILTER (WHERE status = 'completed') AS completed,
                        count(*) FILTER (WHERE status = 'failed') AS failed,
                        count(*) FILTER (WHERE status = 'cancelled') AS cancelled,
                        count(*) FILTER (WHERE status NOT IN ('pending', 'processing')
                                           AND callback_url IS NOT NULL
                                           AND d.id IS NULL) AS untold,
                        count(*) FILTER (WHERE d.state = 'gave_up') AS given_up
                   FROM tasks t
                   LEFT JOIN ledger_entries c ON c.task_id = t.id AND c.account_id = t.account_id
                   LEFT JOIN deliveries d ON d.task_id = t.id
                  GROUP BY 1) t
             ON t.account_id = a.id
     ORDER BY a.id
""")


def check_books(session: Session) -> Books:
    """Prove, for every account, that its balance is the sum of its entries, that its reservation
    is the sum of the prices of its unfinished tasks, that exactly its completed tasks are charged,
    and that every end is told whose task asks for it. One statement, so one moment: it may run
    while others submit and settle.
    """
    faults: dict[str, list[str]] = defaultdict(list)
    ended = dict.fromkeys((TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED), 0)
    given_up = 0
    rows = session.execute(_BOOKS).all()
    for row in rows:
        for status in ended:
            ended[status] += getattr(row, status)
        given_up += row.given_up
        if row.balance != row.entered:
            faults[row.id].append(f"balance {row.balance}, but entries sum to {row.entered}")
        elif row.balance != row.last_said:
            faults[row.id].append(f"balance {row.balance}, but the last entry says {row.last_said}")
        if row.reserved != row.held:
            faults[row.id].append(f"reserved {row.reserved}, but unfinished tasks hold {row.held}")
        if row.unfinished != row.open:
            faults[row.id].append(f"{row.unfinished} unfinished, but {row.open} tasks are")
        if row.uncharged:
            faults[row.id].append(f"{row.uncharged} completed tasks without their charge")
        if row.overcharged:
            faults[row.id].append(f"{row.overcharged} charges of tasks that did not complete")
        if row.untold:
            faults[row.id].append(f"{row.untold} ended tasks without the callback they owe")
    lines = [f"{account}: {fault}" for account in faults for fault in faults[account]]
    return Books(len(rows), lines, ended, given_up)


def spent(session: Session, account: Account) -> Decimal:
    """What an account was charged so far: what it was given less what it still has."""
    given = session.scalar(
        select(func.sum(LedgerEntry.amount)).where(
            LedgerEntry.account_id == account.id, LedgerEntry.kind != text("'charge'")
        )
    )
    return (given or Decimal(0)) - account.balance


def entries(
    session: Session, account_id: str | None, *, before: int | None, limit: int
) -> list[LedgerEntry]:
    """Entries of one account or of all, newest first, older than entry `before`."""
    query = select(LedgerEntry).order_by(LedgerEntry.id.desc()).limit(limit)
    if account_id is not None:
        query = query.where(LedgerEntry.account_id == account_id)
    if before is not None:
        query = query.where(LedgerEntry.id < before)
    return list(session.scalars(query))
