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
from typing import Any

from sqlalchemy import (
    CTE,
    func,
    insert,
    literal,
    select,
    text,
    true,
    update,
)
from sqlalchemy.orm import Session

from storage import fairness
from storage.backlog import backlog
from storage.database import driver_of
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
from storage.models import Account, ApiKey, EntryKind, LedgerEntry, TaskStatus

BALANCE_MAX = Decimal(10**12 - 1)
"""Credits on one account: what the column holds."""


@dataclass(slots=True)
class Purse:
    """What an account has while it is locked, and what was reserved from it since."""

    suspended: bool
    user_group: str
    balance: Decimal
    reserved: Decimal
    unfinished: int
    unfinished_max: int | None
    virtual_finish: float
    tasks: int = 0
    """How many were reserved for since it was locked."""


@dataclass(frozen=True, slots=True)
class Locked:
    """Accounts that nobody else can reserve from until the commit, and the moment it was so."""

    purses: dict[str, Purse]
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
    rows = driver_of(session).execute(_LOCK, [list(account_ids)]).fetchall()
    purses = {row[0]: Purse(*row[3:]) for row in rows}
    return Locked(purses, rows[-1][1], rows[-1][2])


_LOCK = """
    SELECT id, (SELECT virtual_now FROM fair_clock), clock_timestamp(), suspended, user_group,
           balance, reserved, unfinished, unfinished_max, virtual_finish
      FROM accounts WHERE id = ANY(%s) ORDER BY id FOR NO KEY UPDATE OF accounts
"""


def reserve(
    locked: Locked, account_id: str, price: Decimal, costs: Sequence[float]
) -> Hold | ServiceError:
    """Hold `price` credits for each task of a request, or for none of them.

    `costs` are the tasks' shares of a GPU in virtual time. What is held is written by `HOLD`.

    Errors: AccountSuspended, TooManyUnfinished, InsufficientCredits, BacklogFull.
    """
    purse = locked.purses[account_id]
    fault = _refusal(purse, price * len(costs), len(costs))
    if fault is not None:
        return fault
    tags = []
    for cost in costs:
        tag, purse.virtual_finish = fairness.schedule(
            locked.virtual_now, purse.virtual_finish, cost, purse.user_group
        )
        tags.append(tag)
    purse.reserved += price * len(costs)
    purse.unfinished += len(costs)
    purse.tasks += len(costs)
    backlog.take(len(costs))
    return Hold(tags, purse.user_group)


HOLD = """
    held AS (UPDATE accounts
                SET reserved = held.reserved, unfinished = held.unfinished,
                    virtual_finish = held.virtual_finish
               FROM unnest(%(held_ids)s::text[], %(held_reserved)s::numeric[],
                           %(held_unfinished)s::int[], %(held_finish)s::float8[])
                    AS held(id, reserved, unfinished, virtual_finish)
              WHERE accounts.id = held.id)
"""
"""A part of the statement that inserts the tasks: writes what was reserved from the accounts."""


def held(locked: Locked) -> dict[str, Any]:
    """The parameters of `HOLD`."""
    purses = {account_id: purse for account_id, purse in locked.purses.items() if purse.tasks}
    return {
        "held_ids": list(purses),
        "held_reserved": [purse.reserved for purse in purses.values()],
        "held_unfinished": [purse.unfinished for purse in purses.values()],
        "held_finish": [purse.virtual_finish for purse in purses.values()],
    }


def _refusal(purse: Purse, price: Decimal, tasks: int) -> ServiceError | None:
    if purse.suspended:
        return AccountSuspended()
    if purse.unfinished_max is not None and purse.unfinished + tasks > purse.unfinished_max:
        return TooManyUnfinished()
    if purse.balance - purse.reserved < price:
        return InsufficientCredits()
    return backlog.refusal(tasks)


def settle(ended: CTE) -> list[CTE]:
    """What charges the one task of `ended`, as parts of the statement that ends it.

    One statement, so that the account is locked for no round trip, and locked before the entry has
    its number: entries of an account say their balances in order. The entry's unique `task_id`
    makes a second time fail.
    """
    account = _let_go(ended, balance=Account.balance - ended.c.price)
    key = (
        update(ApiKey)
        .where(ApiKey.id == ended.c.api_key_id, ended.c.account_id == account.c.id)
        .values(used_credits=ApiKey.used_credits + ended.c.price)
        .returning(ApiKey.id)
        .cte("charged_key")
    )
    charge = {
        LedgerEntry.account_id: account.c.id,
        LedgerEntry.kind: literal(EntryKind.CHARGE, LedgerEntry.kind.type),
        LedgerEntry.amount: -ended.c.price,
        LedgerEntry.balance_after: account.c.balance,
        LedgerEntry.actor: literal("worker"),
        LedgerEntry.task_id: ended.c.id,
    }
    charged = select(*charge.values()).join_from(account, ended, true())
    entry = insert(LedgerEntry).from_select([*charge], charged).returning(LedgerEntry.id)
    return [account, key, entry.cte("charge")]


def release(ended: CTE) -> list[CTE]:
    """What lets go of what the one task of `ended` had reserved; nothing is charged or entered."""
    return [_let_go(ended)]


def _let_go(ended: CTE, **values: Any) -> CTE:
    return (
        update(Account)
        .where(Account.id == ended.c.account_id)
        .values(
            reserved=Account.reserved - ended.c.price, unfinished=Account.unfinished - 1, **values
        )
        .returning(Account.id, Account.balance)
        .cte("account")
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
