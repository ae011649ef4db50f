"""What is watched in production: the books, proved on a schedule, and what Prometheus reads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import select, text, update
from structlog.testing import capture_logs

from storage import books, ledger, queue, tasks
from storage.database import engine, transaction
from storage.models import BooksCheck, Task
from tests.test_operating import closed_port, process

if TYPE_CHECKING:
    from tests.conftest import Customer, Work

    Submit = Callable[..., Task]

METRICS_KEY = "swordfish-swordfish"


@pytest.fixture(autouse=True)
def _never_checked() -> None:
    """Every test begins before the first look at the books."""
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM books_checks"))


def last_check() -> BooksCheck | None:
    with transaction() as session:
        return session.scalar(select(BooksCheck))


def read(answer: httpx.Response) -> dict[tuple[str, ...], float]:
    """The samples of an answer by name and the values of their labels."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def spoil(customer: Customer, by: int) -> None:
    """Change a balance as only a bug in the database could."""
    with engine.begin() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        change = text("UPDATE accounts SET balance = balance + :by WHERE id = :id")
        connection.execute(change, {"by": by, "id": customer.id})


# --- The books, on a schedule ---------------------------------------------------------------------


def test_the_books_are_proved_once_in_a_while(customer: Customer) -> None:
    assert books.watch()
    assert not books.watch()

    check = last_check()
    assert check is not None
    assert (check.accounts, check.faults) == (1, 0)

    long_ago = BooksCheck.checked_at - text(f"interval '{books.CHECK_S + 1} s'")
    with transaction() as session:
        session.execute(update(BooksCheck).values(checked_at=long_ago))
    assert books.watch()


def test_what_takes_long_is_done_rarely(customer: Customer) -> None:
    books.watch()
    aged = {
        "checked_at": BooksCheck.checked_at - text(f"interval '{books.CHECK_S + 1} s'"),
        "took_s": books.CHECK_S / books.PAUSE_FACTOR * 2,
    }
    with transaction() as session:
        session.execute(update(BooksCheck).values(aged))

    assert not books.watch()


def test_a_look_of_the_future_is_not_believed(customer: Customer) -> None:
    books.watch()
    with transaction() as session:
        later = BooksCheck.checked_at + text("interval '1 day'")
        session.execute(update(BooksCheck).values(checked_at=later))

    assert books.watch()


def test_one_courier_looks_at_a_time(customer: Customer) -> None:
    together = threading.Barrier(8)

    def look(_: int) -> bool:
        together.wait()
        return books.watch()

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(look, range(8))) == 1


def test_a_fault_is_counted_logged_and_gone_when_it_is_put_right(
    customer: Customer, anyone: httpx.Client
) -> None:
    spoil(customer, 1)
    try:
        with capture_logs() as logs:
            books.watch()
        drift = [line for line in logs if line["event"] == "books.drift"]
        assert [line["faults"] for line in drift] == [1]
        assert customer.id in drift[0]["first"][0]
        assert read(anyone.get("/metrics"))["zimage_books_faults",] == 1
    finally:
        spoil(customer, -1)

    with engine.begin() as connection:
        connection.execute(text("DELETE FROM books_checks"))
    books.watch()
    assert read(anyone.get("/metrics"))["zimage_books_faults",] == 0


def test_a_callback_that_nobody_owes_is_a_fault(customer: Customer, submit: Submit) -> None:
    task = submit(customer, callback_url="https://203.0.113.7/told")
    with transaction() as session:
        tasks.cancel(session, task.id)
    assert faults() == []

    with engine.begin() as connection:
        connection.execute(text("DELETE FROM deliveries"))
    assert faults() == [f"{customer.id}: 1 ended tasks without the callback they owe"]

    with engine.begin() as connection:  # erased, it is told to nobody
        connection.execute(text("UPDATE tasks SET callback_url = NULL"))
    assert faults() == []


def test_a_last_entry_that_says_another_balance_is_a_fault(customer: Customer) -> None:
    change = "UPDATE ledger_entries SET balance_after = balance_after {} 1"
    replica = "SET LOCAL session_replication_role = replica; "
    with engine.begin() as connection:
        connection.execute(text(replica + change.format("+")))
    found = faults()
    with engine.begin() as connection:
        connection.execute(text(replica + change.format("-")))

    assert found == [f"{customer.id}: balance 1500.000000, but the last entry says 1501.000000"]


def faults() -> list[str]:
    with transaction() as session:
        return ledger.check_books(session).faults


# --- What Prometheus reads ------------------------------------------------------------------------


def test_metrics_say_what_waits_and_who_works(
    anyone: httpx.Client, customer: Customer, submit: Submit, work: Work
) -> None:
    submit(customer)
    work()
    for _ in range(3):
        submit(customer)
    with transaction() as session:
        claimed = tasks.claim_next(session, "a")
        assert claimed is not None
        owing = session.get_one(Task, submit(customer, callback_url="https://203.0.113.7/").id)
        tasks.cancel(session, owing.id)
    for name, state in (("a", "drawing"), ("b", "idle"), ("c", "idle")):
        queue.announce(name, {"state": state})
    books.watch()

    found = read(anyone.get("/metrics"))

    assert found["zimage_up", "database"] == found["zimage_up", "redis"] == 1
    assert found["zimage_tasks", "pending"] == found["zimage_tasks_waiting",] == 2
    assert found["zimage_tasks", "processing"] == 1
    assert found["zimage_tasks", "completed"] == found["zimage_tasks", "cancelled"] == 1
    assert found["zimage_tasks", "failed"] == 0
    assert 0 < found["zimage_oldest_waiting_task_age_seconds",] < 60
    assert found["zimage_jobs_waiting",] == 4
    assert found["zimage_workers", "drawing"] == 1
    assert found["zimage_workers", "idle"] == 2
    assert found["zimage_callbacks", "waiting"] == 1
    assert found["zimage_callbacks", "gave_up"] == 0
    assert 0 < found["zimage_callback_overdue_seconds",] < 60
    assert found["zimage_books_faults",] == 0
    assert found["zimage_books_accounts",] == 1
    assert 0 < found["zimage_books_check_age_seconds",] < 60


def test_requests_are_counted_by_format_and_status(
    anyone: httpx.Client, customer: Customer
) -> None:
    def counted(*labels: str) -> float:
        return read(anyone.get("/metrics")).get(("zimage_requests_total", *labels), 0)

    before = counted("evolink", "404"), counted("none", "404"), counted("zimageturbo", "401")
    customer.http.get("/v1/tasks/task-unified-1757165031-uyujaw3d")
    anyone.get("/nowhere")
    anyone.post("/api/generate", json={})

    after = counted("evolink", "404"), counted("none", "404"), counted("zimageturbo", "401")
    assert after == tuple(count + 1 for count in before)
    found = read(anyone.get("/metrics"))
    assert found["zimage_request_duration_seconds_count", "evolink"] >= 1


@pytest.mark.parametrize(
    "header", [("Host", "api.example.com"), ("X-Forwarded-For", "203.0.113.7")]
)
def test_without_a_key_only_this_machine_may_read_them(
    anyone: httpx.Client, operator: Customer, header: tuple[str, str]
) -> None:
    assert anyone.get("/metrics", headers=[header]).status_code == 401
    assert operator.http.get("/metrics", headers=[header]).status_code == 401


def test_with_a_key_it_is_asked_for_and_suffices_while_all_servers_are_away() -> None:
    away = {
        "ZIMAGE_DATABASE_URL": f"postgresql+psycopg://x@127.0.0.1:{closed_port()}/x",
        "ZIMAGE_REDIS_URL": f"redis://127.0.0.1:{closed_port()}/0",
    }
    with process(ZIMAGE_METRICS_KEY=METRICS_KEY, **away) as (http, _):
        refused = [
            http.get("/metrics"),
            http.get("/metrics", headers={"Authorization": f"Bearer {METRICS_KEY}x"}),
            http.get("/metrics", headers={"Authorization": "Bearer x"}),
            http.get("/metrics", headers={"Authorization": f"Basic {METRICS_KEY}"}),
        ]
        shown = http.get("/metrics", headers={"Authorization": f"Bearer {METRICS_KEY}"})

    assert [answer.status_code for answer in refused] == [401] * 4
    found = read(shown)
    assert found["zimage_up", "database"] == found["zimage_up", "redis"] == 0
    assert found["zimage_requests_total", "operating", "401"] == 4
    assert not [name for name in found if name[0].startswith(("zimage_books", "zimage_tasks"))]
