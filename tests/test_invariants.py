"""What the database itself refuses, whoever asks: each promise is broken by SQL, and is not."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from storage import deliveries, tasks
from storage.database import engine, transaction
from storage.errors import GenerationFailed
from storage.models import Task, TaskStatus
from tests.conftest import case

if TYPE_CHECKING:
    from tests.conftest import Customer

    Submit = Callable[..., Task]

CALLBACK = "https://203.0.113.7/told"
ENDED = [TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED]


LOADING = "SET LOCAL session_replication_role = replica"
"""Makes of a transaction one that restores rows."""


def execute(*statements: str, **values: object) -> None:
    """Run statements in one transaction."""
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement), values)


def refuses(why: str, *statements: str, **values: object) -> None:
    """The statements go through, or the last of them does not; their commit does not."""
    with pytest.raises(IntegrityError, match=why):
        execute(*statements, **values)


def claim() -> tasks.Claim:
    with transaction() as session:
        task = tasks.claim_next(session, "a worker")
    assert task is not None
    return tasks.claim_of(task)


def bring(task: Task, status: TaskStatus) -> None:
    """Let `task`, the only one that waits, come to `status` as the service does it."""
    if status is TaskStatus.PENDING:
        return
    if status is TaskStatus.CANCELLED:
        with transaction() as session:
            tasks.cancel(session, task.id)
        return
    held = claim()
    with transaction() as session:
        if status is TaskStatus.FAILED:
            tasks.fail(session, held, GenerationFailed())
        elif status is TaskStatus.COMPLETED:
            tasks.complete(
                session,
                held,
                image_key="images/x.png",
                image_sha256="0" * 64,
                image_size_bytes=1,
                image_url="https://images/x.png",
                expires_at=task.created_at,
                image_width=64,
                image_height=64,
                prompt_tokens=9,
                prompt_tokens_read=9,
            )


MOVE = """
    UPDATE tasks SET status = CAST(:to AS text),
           attempt = attempt + CAST(status = 'pending' AND :to = 'processing' AS int),
           lease_until = CASE WHEN :to = 'processing' THEN now() END,
           image_key = CASE WHEN :to = 'completed' THEN 'x' END,
           error_code = CASE WHEN :to = 'failed' THEN 'x' END
     WHERE id = :id
"""


# --- Where a task may go --------------------------------------------------------------------------


def test_the_database_allows_exactly_the_moves_that_the_code_knows(
    customer: Customer, submit: Submit
) -> None:
    for start in TaskStatus:
        for end in TaskStatus:
            if start is end:
                continue
            allowed = start in tasks.BEFORE[end]
            with case(f"{start} to {end}"):
                task = submit(customer)
                bring(task, start)
                if allowed:
                    # Its credits do not move with it here, so it gets no further than to commit.
                    with engine.connect() as connection:
                        connection.execute(text(MOVE), {"to": end, "id": task.id})
                else:
                    refuses("final|cannot go", MOVE, to=end, id=task.id)
                if not start.is_terminal:
                    with transaction() as session:
                        tasks.cancel(session, task.id)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("attempt = attempt - 1", "number of its claims"),
        ("attempt = attempt + 1", "number of its claims"),
        ("losses = losses - 1", "fewer workers"),
        ("losses = attempt + 1", "losses_are_of_attempts"),
        ("account_id = :other", "cannot change its account"),
        ("price = price + 1", "do not balance"),
    ],
)
def test_what_a_task_has_been_through_cannot_be_rewritten(
    customer: Customer, new_customer: Callable[..., Customer], submit: Submit, change: str, why: str
) -> None:
    task = submit(customer)
    execute(LOADING, "UPDATE tasks SET attempt = 1, losses = 1 WHERE id = :id", id=task.id)
    other = new_customer(0).id if ":other" in change else customer.id
    refuses(why, f"UPDATE tasks SET {change} WHERE id = :id", id=task.id, other=other)


@pytest.mark.parametrize("status", ENDED)
@pytest.mark.parametrize("change", ["price = 0", "attempt = attempt + 1", "losses = -1"])
def test_what_has_ended_stays_as_it_ended(
    customer: Customer, submit: Submit, status: TaskStatus, change: str
) -> None:
    task = submit(customer)
    bring(task, status)

    refuses("final|losses", f"UPDATE tasks SET {change} WHERE id = :id", id=task.id)


def test_a_claim_takes_the_next_number(customer: Customer, submit: Submit) -> None:
    task = submit(customer)

    claiming = "UPDATE tasks SET status = 'processing', lease_until = now() WHERE id = :id"
    refuses("number of its claims", claiming, id=task.id)


# --- Charges --------------------------------------------------------------------------------------

CHARGE = """
    INSERT INTO ledger_entries (account_id, kind, amount, balance_after, actor, task_id)
    SELECT id, 'charge', :amount, balance, 'test', :id FROM accounts WHERE id = :account
"""
PAY = """
    UPDATE accounts SET balance = balance + :amount, reserved = reserved - 15,
           unfinished = unfinished - 1
     WHERE id = :account
"""


def test_nothing_is_completed_without_its_charge(customer: Customer, submit: Submit) -> None:
    task = submit(customer)
    claim()

    refuses("not charged", MOVE, PAY, to="completed", id=task.id, account=customer.id, amount=0)


def test_a_charge_is_the_price(customer: Customer, submit: Submit) -> None:
    task = submit(customer)
    claim()
    values = {"to": "completed", "id": task.id, "account": customer.id}

    refuses("not charged|at that price", MOVE, PAY, CHARGE, amount=-14, **values)
    execute(MOVE, PAY, CHARGE, amount=-15, **values)
    assert customer.books() == (1485, 0)


@pytest.mark.parametrize("status", [status for status in TaskStatus if status != "completed"])
def test_nothing_else_is_charged(customer: Customer, submit: Submit, status: TaskStatus) -> None:
    task = submit(customer)
    bring(task, status)

    pay = "UPDATE accounts SET balance = balance - 15 WHERE id = :account"
    refuses("not completed", pay, CHARGE, id=task.id, account=customer.id, amount=-15)


def test_nobody_pays_for_the_task_of_another(
    customer: Customer, new_customer: Callable[..., Customer], submit: Submit
) -> None:
    task, other = submit(customer), new_customer()
    claim()
    release = PAY.replace("+ :amount", "+ 0")
    pay = "UPDATE accounts SET balance = balance - 15 WHERE id = :other"

    values = {"id": task.id, "account": customer.id, "other": other.id, "amount": -15}
    charge = CHARGE.replace(":account", ":other")
    refuses("not charged|not completed", MOVE, release, pay, charge, to="completed", **values)


# --- The books ------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["balance", "reserved", "unfinished"])
def test_no_number_of_an_account_moves_alone(
    customer: Customer, submit: Submit, column: str
) -> None:
    submit(customer)

    refuses("do not balance", f"UPDATE accounts SET {column} = {column} + 1")


def test_no_account_begins_with_credits() -> None:
    began = """
        INSERT INTO accounts (id, name, user_group, balance, reserved, unfinished, suspended,
                              virtual_finish, callback_secret)
        VALUES ('x', 'x', 'x', 1, 0, 0, false, 0, 'x')
    """
    refuses("do not balance", began)


def test_what_one_account_loses_is_not_for_another(
    customer: Customer, new_customer: Callable[..., Customer]
) -> None:
    other = new_customer()

    move = "UPDATE accounts SET balance = balance + CASE id WHEN :to THEN 1 ELSE -1 END"
    refuses("do not balance", move, to=other.id)


@pytest.mark.parametrize(
    "change", ["DELETE FROM tasks", "UPDATE accounts SET unfinished = unfinished - 1"]
)
def test_an_unfinished_task_does_not_vanish(
    customer: Customer, submit: Submit, change: str
) -> None:
    submit(customer)

    refuses("do not balance", change)


def test_a_task_that_reserved_nothing_does_not_begin(customer: Customer, submit: Submit) -> None:
    task = submit(customer)
    columns = ", ".join(column.name for column in Task.__table__.columns if column.name != "id")

    again = f"INSERT INTO tasks (id, {columns}) SELECT 'x', {columns} FROM tasks WHERE id = :id"
    refuses("do not balance", again, id=task.id)


@pytest.mark.parametrize(
    ("kind", "amount", "why"),
    [
        ("grant", -1, "sign"),
        ("grant", 0, "sign"),
        ("adjustment", 1, "sign"),
        ("charge", 1, "sign"),
        ("grant", 1, "does not say|do not balance"),
        ("adjustment", -1, "does not say|do not balance"),
    ],
)
def test_an_entry_has_the_sign_of_its_kind_and_moves_the_balance(
    customer: Customer, kind: str, amount: int, why: str
) -> None:
    entry = """
        INSERT INTO ledger_entries (account_id, kind, amount, balance_after, actor, task_id)
        VALUES (:account, :kind, :amount, 1500, 'test', :task)
    """
    task = "x" if kind == "charge" else None
    refuses(why, entry, account=customer.id, kind=kind, amount=amount, task=task)


def test_an_entry_says_what_the_balance_was_after_it(customer: Customer) -> None:
    entry = """
        INSERT INTO ledger_entries (account_id, kind, amount, balance_after, actor)
        VALUES (:account, 'grant', 1, :after, 'test')
    """
    grow = "UPDATE accounts SET balance = balance + 1 WHERE id = :account"

    refuses("does not say", grow, entry, account=customer.id, after=1502)
    execute(grow, entry, account=customer.id, after=1501)


# --- Callbacks ------------------------------------------------------------------------------------


@pytest.fixture
def owed(customer: Customer, submit: Submit) -> str:
    """The id of a delivery that waits."""
    bring(submit(customer, callback_url=CALLBACK), TaskStatus.FAILED)
    with engine.connect() as connection:
        delivery_id: str = connection.scalar(text("SELECT id FROM deliveries"))
    return delivery_id


@pytest.mark.parametrize("status", ENDED)
def test_no_task_ends_without_the_callback_it_owes(
    customer: Customer, submit: Submit, status: TaskStatus
) -> None:
    task = submit(customer, callback_url=CALLBACK)
    claim()
    amount = -15 if status is TaskStatus.COMPLETED else 0
    statements = [MOVE, PAY] + ([CHARGE] if amount else [])

    values = {"to": status, "id": task.id, "account": customer.id, "amount": amount}
    refuses("owes no callback", *statements, **values)
    execute("UPDATE tasks SET callback_url = NULL")
    execute(*statements, **values)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("attempts = -1", "attempts_bounded"),
        ("attempts = 5, state = 'gave_up'", "attempts_bounded"),
        ("attempts = 4", "waits_for_an_attempt"),
        ("claim = claim - 1", "number of its claims"),
    ],
)
@pytest.mark.usefixtures("owed")
def test_a_delivery_is_tried_as_often_as_promised(change: str, why: str) -> None:
    refuses(why, f"UPDATE deliveries SET {change}")


def test_the_bound_is_the_one_of_the_code(owed: str) -> None:
    assert len(deliveries.RETRIES_S) + 1 == 4
    execute("UPDATE deliveries SET attempts = 4, state = 'gave_up' WHERE id = :id", id=owed)


# --- What must still go ---------------------------------------------------------------------------


@pytest.mark.parametrize("status", ENDED)
def test_what_has_ended_may_be_erased(
    customer: Customer, submit: Submit, status: TaskStatus
) -> None:
    task = submit(customer, callback_url=CALLBACK)
    bring(task, status)

    execute(
        "UPDATE tasks SET prompt = '', callback_url = NULL WHERE id = :id",
        "DELETE FROM deliveries WHERE task_id = :id",
        id=task.id,
    )


def test_a_part_that_is_undone_leaves_no_trace(customer: Customer) -> None:
    with engine.begin() as connection:
        part = connection.begin_nested()
        connection.execute(text("UPDATE accounts SET balance = balance + 1"))
        part.rollback()
        connection.execute(text("UPDATE accounts SET name = 'after'"))

    assert customer.books() == (Decimal(1500), 0)


def test_books_that_were_wrong_before_stop_nobody(customer: Customer, submit: Submit) -> None:
    task = submit(customer)
    execute(LOADING, "UPDATE accounts SET balance = balance + 1")
    bring(task, TaskStatus.COMPLETED)

    assert customer.books() == (1486, 0)
    execute(
        LOADING,
        "UPDATE accounts SET balance = balance - 1",
        "UPDATE ledger_entries SET balance_after = balance_after - 1 WHERE kind = 'charge'",
    )
