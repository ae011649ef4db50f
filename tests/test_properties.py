"""Ledger and task life against a model, one step after another and all at once.

More of it: `ZIMAGE_PROPERTY_EXAMPLES=500 pytest tests/test_properties.py`, each time another.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from storage import accounts, deliveries, ledger, tasks
from storage.database import engine, transaction
from storage.errors import (
    GenerationFailed,
    IdempotencyConflict,
    InsufficientCredits,
    NotPending,
    ServiceError,
    ServiceUnavailable,
    StorageUnavailable,
    TaskEnded,
    WouldOverdraw,
)
from storage.idempotency import Mark
from storage.models import (
    Account,
    Base,
    Delivery,
    DeliveryState,
    EntryKind,
    ImageFormat,
    LedgerEntry,
    Task,
    TaskStatus,
)
from storage.settings import settings as storage_settings
from storage.tasks import Claim

if TYPE_CHECKING:
    from tests.conftest import NewCustomer

set_hypothesis_home_dir(os.environ["ZIMAGE_DATA_DIR"])  # or it would write into this folder

EXAMPLES = int(os.environ.get("ZIMAGE_PROPERTY_EXAMPLES", "0"))
STEPS = 35
CALLBACK = "https://203.0.113.7/told"
PRICES = (Decimal(0), Decimal("0.000001"), Decimal(15))


def submit(
    session: Session, account_id: str, images: int, price: Decimal, callback: bool, key: str | None
) -> tasks.Outcome:
    image = tasks.ImageRequest(
        "a cat", 64, 64, ImageFormat.PNG, callback_url=CALLBACK if callback else None
    )
    mark = None if key is None else Mark(f"{images} {price} {callback}".encode(), key)
    asked = tasks.Submission(account_id, None, (image,) * images, "test", price, mark=mark)
    (outcome,) = tasks.submit_many(session, [asked])
    return outcome


def complete(session: Session, claim: Claim) -> Task | None:
    return tasks.complete(
        session,
        claim,
        image_key="images/x.png",
        image_sha256="0" * 64,
        image_size_bytes=1,
        image_url="https://images/x.png",
        expires_at=datetime.now(UTC) + timedelta(hours=24),
        image_width=64,
        image_height=64,
        prompt_tokens=9,
        prompt_tokens_read=9,
    )


def fail(session: Session, claim: Claim) -> Task | None:
    return tasks.fail(session, claim, GenerationFailed())


def lose(session: Session, claim: Claim) -> Task | None:
    return tasks.lose(session, claim, StorageUnavailable())


def expire(session: Session, task_id: str) -> None:
    past = func.clock_timestamp() - timedelta(seconds=1)
    running = update(Task).where(Task.id == task_id, Task.status == TaskStatus.PROCESSING)
    session.execute(running.values(lease_until=past))


# --- One step after another -----------------------------------------------------------------------


@dataclass
class Expected:
    """A task as it must be."""

    account: int
    price: Decimal
    callback: bool
    status: TaskStatus = TaskStatus.PENDING
    attempt: int = 0
    losses: int = 0
    told: tuple[str, int] | None = None
    """State and attempts of its delivery."""

    def holds(self, claim: Claim) -> bool:
        return (self.status, self.attempt) == (TaskStatus.PROCESSING, claim.attempt)

    def move(self, to: TaskStatus) -> None:
        self.status = to
        if to.is_terminal and self.callback:
            self.told = ("waiting", 0)

    def lose(self) -> None:
        self.losses += 1
        last = self.losses >= storage_settings.losses_max
        self.move(TaskStatus.FAILED if last else TaskStatus.PENDING)


class Life(RuleBasedStateMachine):
    """Everything that can happen to credits and tasks, and what must have come of it."""

    def __init__(self) -> None:
        super().__init__()
        with transaction() as session:
            made = [accounts.create(session, "x", user_group=group) for group in ("a", "heavy")]
        self.ids = [account.id for account in made]
        self.given: list[list[Decimal]] = [[], []]
        self.keys: dict[tuple[int, str], tuple[Any, Any]] = {}
        self.tasks: dict[str, Expected] = {}
        self.claims: list[Claim] = []
        self.attempts: list[deliveries.Attempt] = []

    def teardown(self) -> None:
        tables = set(Base.metadata.tables) - {"fair_clock"}
        emptying = "; ".join(f"DELETE FROM {table}" for table in tables)
        with engine.begin() as connection:
            connection.execute(text(f"SET LOCAL session_replication_role = replica; {emptying}"))

    # Derived, so that the model cannot be wrong in the same way.

    def balance(self, account: int) -> Decimal:
        mine = [task for task in self.tasks.values() if task.account == account]
        charged = sum(t.price for t in mine if t.status is TaskStatus.COMPLETED)
        return sum(self.given[account], Decimal(0)) - charged

    def open(self, account: int) -> list[Decimal]:
        return [
            task.price
            for task in self.tasks.values()
            if task.account == account and not task.status.is_terminal
        ]

    def free(self, account: int) -> Decimal:
        return self.balance(account) - sum(self.open(account))

    @initialize()
    def begin(self) -> None:
        self.move_credits(0, 100, key=False)
        self.submit(0, 2, Decimal(15), callback=True, key=None)

    # Credits.

    @rule(
        account=st.integers(0, 1), amount=st.sampled_from((-40, -1, 1, 30, 100)), key=st.booleans()
    )
    def move_credits(self, account: int, amount: int, key: bool) -> None:
        word = "k" if key else None
        before = self.keys.get((account, "grant")) if key else None
        grant = partial(ledger.grant, actor="test", idempotency_key=word)
        try:
            with transaction() as session:
                _, replayed = grant(session, self.ids[account], Decimal(amount))
        except IdempotencyConflict:
            assert before is not None
            assert before[0] != amount
        except WouldOverdraw:
            assert before is None
            assert self.free(account) + amount < 0
        else:
            assert replayed == (before is not None)
            if not replayed:
                self.given[account].append(Decimal(amount))
                if key:
                    self.keys[account, "grant"] = (amount, None)

    @rule(
        account=st.integers(0, 1),
        images=st.integers(1, 3),
        price=st.sampled_from(PRICES),
        callback=st.booleans(),
        key=st.sampled_from((None, None, "one", "two")),
    )
    def submit(
        self, account: int, images: int, price: Decimal, callback: bool, key: str | None
    ) -> None:
        before = None if key is None else self.keys.get((account, key))
        asked = (images, price, callback)
        with transaction() as session:
            outcome = submit(session, self.ids[account], *asked, key)
        if isinstance(outcome, IdempotencyConflict):
            assert before is not None
            assert before[0] != asked
        elif isinstance(outcome, InsufficientCredits):
            assert before is None
            assert self.free(account) < price * images
        else:
            assert isinstance(outcome, tasks.Submitted)
            made = [task.id for task in outcome.tasks]
            assert outcome.replayed == (before is not None)
            if before is not None:
                assert before == (asked, made)
                return
            assert self.free(account) >= price * images
            self.tasks |= {task_id: Expected(account, price, callback) for task_id in made}
            if key is not None:
                self.keys[account, key] = (asked, made)

    # Workers.

    @rule()
    def claim(self) -> None:
        with transaction() as session:
            task = tasks.claim_next(session, "a worker")
        waiting = [t for t in self.tasks.values() if t.status is TaskStatus.PENDING]
        assert (task is None) == (not waiting)
        if task is not None:
            expected = self.tasks[task.id]
            assert expected.status is TaskStatus.PENDING
            expected.move(TaskStatus.PROCESSING)
            expected.attempt += 1
            self.claims.append(tasks.claim_of(task))

    @rule()
    def let_another_go_on(self) -> None:
        """So that there are claims which are over: by chance alone there are few."""
        self.claim()
        for claim in self.claims[-1:]:
            with transaction() as session:
                if tasks.hand_back(session, claim):
                    self.tasks[claim.task_id].move(TaskStatus.PENDING)
        self.claim()

    def act(self, data: st.DataObject, do: Callable[[Session, Claim], object]) -> Expected | None:
        """Let any claim that there ever was be used; returns its task if it must have worked."""
        if not self.claims:
            return None
        claim = data.draw(st.sampled_from(self.claims))
        expected = self.tasks[claim.task_id]
        with transaction() as session:
            done = do(session, claim)
        assert bool(done) == expected.holds(claim)
        return expected if done else None

    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        if task := self.act(data, complete):
            task.move(TaskStatus.COMPLETED)

    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        if task := self.act(data, fail):
            task.move(TaskStatus.FAILED)

    @rule(data=st.data())
    def hand_back(self, data: st.DataObject) -> None:
        if task := self.act(data, tasks.hand_back):
            task.move(TaskStatus.PENDING)

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        if task := self.act(data, lose):
            task.lose()

    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        self.act(data, lambda session, claim: tasks.renew(session, {claim: 50}))

    @rule(data=st.data())
    def be_too_early_to_give_up(self, data: st.DataObject) -> None:
        if not self.claims:
            return
        claim = data.draw(st.sampled_from(self.claims))
        with transaction() as session:
            session.execute(text("UPDATE tasks SET lease_until = lease_until + interval '1 h'"))
            assert tasks.give_up(session, claim) is None

    @rule(data=st.data())
    def let_a_lease_run_out(self, data: st.DataObject) -> None:
        def give_up(session: Session, claim: Claim) -> Task | None:
            expire(session, claim.task_id)
            return tasks.give_up(session, claim)

        if task := self.act(data, give_up):
            task.lose()

    # Customers.

    @rule(data=st.data(), only_pending=st.booleans())
    def cancel(self, data: st.DataObject, only_pending: bool) -> None:
        if not self.tasks:
            return
        task_id = data.draw(st.sampled_from(list(self.tasks)))
        expected = self.tasks[task_id]
        allowed = not expected.status.is_terminal
        if only_pending:
            allowed = expected.status is TaskStatus.PENDING
        if not allowed:
            refusal = TaskEnded if expected.status.is_terminal else NotPending
            with pytest.raises(refusal), transaction() as session:
                tasks.cancel(session, task_id, only_pending=only_pending)
            return
        with transaction() as session:
            tasks.cancel(session, task_id, only_pending=only_pending)
        expected.move(TaskStatus.CANCELLED)

    @rule(data=st.data())
    def miss_a_deadline(self, data: st.DataObject) -> None:
        waiting = [i for i, task in self.tasks.items() if not task.status.is_terminal]
        if not waiting:
            return
        task_id = data.draw(st.sampled_from(waiting))
        with transaction() as session:
            past = func.clock_timestamp() - timedelta(seconds=1)
            session.execute(update(Task).where(Task.id == task_id).values(deadline_at=past))
            assert tasks.overdue(session, 10) == [task_id]
            tasks.cancel(session, task_id)
        self.tasks[task_id].move(TaskStatus.CANCELLED)

    # Couriers.

    @rule()
    def begin_attempts(self) -> None:
        with transaction() as session:
            session.execute(text("UPDATE deliveries SET next_attempt_at = now()"))
            taken = deliveries.claim_due(session, limit=100, except_accounts=())
        owed = [i for i, task in self.tasks.items() if task.told and task.told[0] == "waiting"]
        assert sorted(attempt.task.id for attempt in taken) == sorted(owed)
        self.attempts += taken

    @rule(data=st.data(), answered=st.booleans(), final=st.booleans())
    def end_an_attempt(self, data: st.DataObject, answered: bool, final: bool) -> None:
        if not self.attempts:
            return
        attempt = data.draw(st.sampled_from(self.attempts))
        expected = self.tasks[attempt.task.id]
        assert expected.told is not None
        state, tried = expected.told
        newest = max(
            a.delivery.claim for a in self.attempts if a.delivery.id == attempt.delivery.id
        )
        error = None if answered else "answered 500"
        with transaction() as session:
            became = deliveries.record(
                session, attempt.delivery, status=200, error=error, final=final and not answered
            )
        if attempt.delivery.claim != newest or state != "waiting":
            assert became is None
            return
        last = final or attempt.delivery.attempts >= len(deliveries.RETRIES_S)
        after = "delivered" if answered else "gave_up" if last else "waiting"
        assert became == after
        expected.told = (after, tried + 1)

    @rule(account=st.integers(0, 1))
    def ask_again(self, account: int) -> None:
        with transaction() as session:
            which = deliveries.Filter(self.ids[account])
            deliveries.redeliver(session, which, limit=100)
        for task in self.tasks.values():
            if task.account == account and task.told and task.told[0] != "waiting":
                task.told = ("waiting", 0)

    # What must be so after every step.

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        with transaction() as session:
            rows = {task.id: task for task in session.scalars(select(Task))}
            held = [session.get_one(Account, account_id) for account_id in self.ids]
            entries = list(session.scalars(select(LedgerEntry).order_by(LedgerEntry.id)))
            told = {
                delivery.task_id: (str(delivery.state), delivery.attempts)
                for delivery in session.scalars(select(Delivery))
            }
            books = ledger.check_books(session)
        assert books.balanced, books.faults
        assert {i: (t.status, t.attempt, t.losses) for i, t in rows.items()} == {
            i: (t.status, t.attempt, t.losses) for i, t in self.tasks.items()
        }
        for number, account in enumerate(held):
            unfinished = self.open(number)
            assert account.balance == self.balance(number)
            assert account.reserved == sum(unfinished)
            assert account.unfinished == len(unfinished)
            mine = [entry for entry in entries if entry.account_id == account.id]
            given = [entry.amount for entry in mine if entry.kind is not EntryKind.CHARGE]
            assert given == self.given[number]
        charges = {entry.task_id: -entry.amount for entry in entries if entry.task_id is not None}
        assert charges == {
            i: t.price for i, t in self.tasks.items() if t.status is TaskStatus.COMPLETED
        }
        assert told == {i: t.told for i, t in self.tasks.items() if t.told is not None}


def test_every_history_is_as_the_model_says() -> None:
    run_state_machine_as_test(
        Life,
        settings=settings(
            max_examples=EXAMPLES or 10,
            stateful_step_count=STEPS,
            derandomize=not EXAMPLES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


# --- All at once ----------------------------------------------------------------------------------


@dataclass
class Seen:
    """What one thread did and was told."""

    given: Counter[str] = field(default_factory=Counter)
    ended: list[tuple[str, TaskStatus]] = field(default_factory=list)
    submitted: int = 0
    delivered: int = 0


def live(seed: int, steps: int, account_ids: list[str]) -> Seen:
    """Do anything, in an order that only the seed decides, as one of many."""
    chosen, seen, claims = random.Random(seed), Seen(), []  # type: ignore[var-annotated]

    def end(task: Task | None) -> None:
        if task is not None and task.status.is_terminal:
            seen.ended.append((task.id, task.status))

    for step in range(steps):
        account_id, what = chosen.choice(account_ids), chosen.random()
        try:
            with transaction() as session:
                if what < 0.1:
                    amount = chosen.choice((30, 15, -15))
                    ledger.grant(session, account_id, Decimal(amount), actor="test")
                    done: Callable[[], object] = partial(seen.given.update, {account_id: amount})
                elif what < 0.4:
                    key = chosen.choice((None, f"key {step % 5}"))
                    outcome = submit(session, account_id, 2, Decimal(15), True, key)
                    new = isinstance(outcome, tasks.Submitted) and not outcome.replayed
                    done = partial(setattr, seen, "submitted", seen.submitted + 2 * new)
                elif what < 0.6:
                    task = tasks.claim_next(session, "a worker")
                    done = partial(claims.extend, [] if task is None else [tasks.claim_of(task)])
                elif what < 0.85 and claims:
                    claim = chosen.choice(claims)
                    move = chosen.choice((complete, complete, fail, lose, tasks.hand_back))
                    done = partial(end, move(session, claim))
                elif what < 0.95:
                    newest = tasks.newest(
                        session, account_id=account_id, status=None, before=None, limit=5
                    )
                    if not newest:
                        continue
                    task = chosen.choice(newest)
                    done = partial(end, tasks.cancel(session, task.id, account_id=account_id))
                else:
                    for attempt in deliveries.claim_due(session, limit=3, except_accounts=()):
                        state = deliveries.record(
                            session, attempt.delivery, status=200, error=None, final=False
                        )
                        seen.delivered += state is DeliveryState.DELIVERED
                    done = partial(int)
            done()
        except ServiceUnavailable:
            raise  # a deadlock would be one
        except ServiceError:
            pass
    return seen


@pytest.mark.parametrize("seed", range(2))
def test_many_at_once_leave_a_history_that_one_could_have_made(
    new_customer: NewCustomer, seed: int
) -> None:
    account_ids = [new_customer(600).id for _ in range(3)]

    with ThreadPoolExecutor(8) as pool:
        lives = pool.map(lambda n: live(seed * 100 + n, 40, account_ids), range(8))
        seen = list(lives)

    ended = [end for one in seen for end in one.ended]
    with transaction() as session:
        rows = {task.id: task for task in session.scalars(select(Task))}
        charged = {entry.task_id for entry in session.scalars(select(LedgerEntry))} - {None}
        assert len(rows) == sum(one.submitted for one in seen)
        assert len(ended) == len(dict(ended))  # each once
        assert dict(ended) == {i: t.status for i, t in rows.items() if t.status.is_terminal}
        assert charged == {i for i, status in ended if status is TaskStatus.COMPLETED}
        assert charged
        owed = session.scalars(select(Delivery.task_id)).all()
        assert sorted(owed) == sorted(dict(ended))
        for account_id in account_ids:
            account = session.get_one(Account, account_id)
            mine = select(LedgerEntry).where(LedgerEntry.account_id == account_id)
            entries = session.scalars(mine.order_by(LedgerEntry.id)).all()
            given = 600 + sum(one.given[account_id] for one in seen)
            assert given == sum(e.amount for e in entries if e.kind is not EntryKind.CHARGE)
            balance = Decimal(0)
            for entry in entries:
                balance += entry.amount
                assert entry.balance_after == balance
            assert account.balance == balance
