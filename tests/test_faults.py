"""The whole service under load and faults for some seconds, and an auditor who finds nothing.

The long run is `make soak`. Here it is shown that it runs, that its seed decides what happens, and
that the auditor would find what is wrong.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from sqlalchemy import text

from soak import schedule
from soak.checker import ATTEMPTS, PROMISES, Checker
from soak.colours import colour_of
from soak.customers import Wish
from soak.receiver import Heard
from soak.stage import Addresses
from storage import deliveries
from storage.database import engine, transaction
from storage.models import Delivery, Task
from storage.settings import settings
from tests.conftest import OneByOne

if TYPE_CHECKING:
    from tests.conftest import Customer, Work

    Submit = Callable[..., Task]

SEED = 20261121
SECONDS = 12
FAULTS = 20


def test_the_same_seed_has_the_same_faults_and_another_has_others() -> None:
    plan = schedule.plan(SEED, 1800, 1000)

    assert plan == schedule.plan(SEED, 1800, 1000)
    assert plan != schedule.plan(SEED + 1, 1800, 1000)
    assert len(plan) == 1000
    assert {fault.kind for fault in plan} == set(schedule.WEIGHTS)
    assert all(0 <= fault.at_s <= 1800 for fault in plan)


@pytest.mark.timeout(240)
def test_nothing_is_lost_and_nothing_is_charged_wrongly_whatever_dies() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "soak.faults", "--seed", str(SEED)),
            *("--apis", "2", "--couriers", "2", "--workers", "2", "--customers", "8"),
            *("--seconds", str(SECONDS), "--faults", str(FAULTS)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    line = done.stdout.splitlines()[-1]
    assert f"seed {SEED}" in line
    assert f"{FAULTS} faults" in line
    assert all(f"0 {promise}" in line for promise in PROMISES)
    tasks = re.search(r"(\d+) tasks", line)
    assert tasks is not None
    assert int(tasks[1]) >= 20


# --- The auditor ----------------------------------------------------------------------------------

CALLBACK = "https://127.0.0.2:1/fail/wish"


@pytest.fixture
def checker() -> Checker:
    """One that looks at the servers of these tests."""
    socket = engine.url.query["host"]
    secret = settings.s3_secret_access_key
    assert secret is not None
    return Checker(
        Addresses(
            database=f"host={socket} port=5432 user=postgres dbname=zimage",
            s3_endpoint=str(settings.s3_endpoint_url),
            s3_access_key_id=settings.s3_access_key_id or "",
            s3_secret_access_key=secret.get_secret_value(),
            bucket=settings.s3_bucket,
        )
    )


@pytest.fixture
def drawn(customer: Customer, submit: Submit, work: Work) -> Task:
    """A task that was drawn by the soak's own painter, and whose callback was given up."""

    def paint(prompt: str, *, width: int, height: int, seed: int, **_: object) -> Image.Image:
        return Image.new("RGB", (width, height), colour_of(seed))

    task = submit(customer, prompt="wish", callback_url=CALLBACK)
    work(OneByOne(paint), name="painter-1")
    for _ in range(ATTEMPTS):
        with transaction() as session:
            session.execute(text("UPDATE deliveries SET next_attempt_at = clock_timestamp()"))
            (attempt,) = deliveries.claim_due(session, limit=1, except_accounts=())
            deliveries.record(session, attempt.delivery, status=500, error="500", final=False)
    return customer.task(task.id)


def wish_of(task: Task, **values: object) -> Wish:
    known = {
        "name": task.prompt,
        "account_id": task.account_id,
        "dialect": "evolink",
        "images": 1,
        "seed": task.seed,
        "key": "key",
        "sends": 1,
        "task_ids": {task.id},
        "ends": {task.id: "completed"},
    }
    return Wish(**(known | values))  # type: ignore[arg-type]


def heard_of(task: Task) -> list[Heard]:
    with transaction() as session:
        (message_id,) = session.scalars(
            Delivery.__table__.select().with_only_columns(Delivery.id)
        ).all()
    return [Heard(message_id, "fail", task.id, "completed", 500) for _ in range(ATTEMPTS)]


def test_the_auditor_finds_nothing_where_nothing_is_wrong(checker: Checker, drawn: Task) -> None:
    checker.check([wish_of(drawn)], heard_of(drawn), [])

    assert checker.findings.clean, list(checker.findings.details())
    assert checker.findings.counted["completed"] == 1


BROKEN = {
    "DELETE FROM ledger_entries WHERE kind = 'charge'": "uncharged with an image",
    "UPDATE ledger_entries SET amount = -1 WHERE kind = 'charge'": "uncharged with an image",
    "UPDATE tasks SET status = 'pending', image_key = NULL": "lost",
    "UPDATE tasks SET status = 'failed', image_key = NULL, error_code = 'X'": (
        "charged without an image"
    ),
    "UPDATE tasks SET image_key = 'images/other'": "charged without an image",
    "UPDATE tasks SET image_sha256 = 'other'": "charged without an image",
    "UPDATE tasks SET seed = seed + 1": "charged without an image",
    "UPDATE tasks SET id = 'task-other'": "lost",
    "UPDATE accounts SET balance = balance + 1": "books out of balance",
    "UPDATE accounts SET reserved = reserved + 1": "books out of balance",
    "DELETE FROM deliveries": "callbacks fewer than promised",
    "UPDATE deliveries SET state = 'waiting', attempts = 3": "callbacks fewer than promised",
    "UPDATE deliveries SET state = 'delivered'": "callbacks fewer than promised",
    "DELETE FROM delivery_attempts WHERE id = (SELECT max(id) FROM delivery_attempts)": (
        "callbacks fewer than promised"
    ),
}


@pytest.mark.parametrize("sql", BROKEN)
def test_the_auditor_finds_what_is_broken(checker: Checker, drawn: Task, sql: str) -> None:
    heard = heard_of(drawn)
    with engine.connect() as connection, connection.begin() as undone:
        # Past every guard of the database's own, as if it had none.
        connection.execute(text(f"SET LOCAL session_replication_role = replica; {sql}"))
        driver = connection.connection.driver_connection
        assert driver is not None
        checker.read_by(driver)
        checker.check([wish_of(drawn)], heard, [])
        undone.rollback()

    assert checker.findings.breaches[BROKEN[sql]]


@pytest.mark.parametrize(
    ("values", "promise"),
    [
        ({"task_ids": {"task-unknown"}, "ends": {}}, "lost"),
        ({"ends": {"ID": "failed"}}, "ended twice"),
        ({"shown": 2}, "uncharged with an image"),
        ({"faults": ["500"]}, "wrong answers"),
        ({"name": "another"}, "wrong answers"),
        ({"images": 0}, "submitted twice"),
    ],
)
def test_the_auditor_believes_the_customer(
    checker: Checker, drawn: Task, values: dict[str, object], promise: str
) -> None:
    if values.get("ends"):
        values = values | {"ends": {drawn.id: "failed"}}

    checker.check([wish_of(drawn, **values)], heard_of(drawn), [])

    assert checker.findings.breaches[promise]


def test_the_auditor_believes_the_receiver(checker: Checker, drawn: Task) -> None:
    checker.check([wish_of(drawn)], heard_of(drawn)[1:], [])

    assert checker.findings.breaches["callbacks fewer than promised"]
