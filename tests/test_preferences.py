"""What may be asked of a create in any dialect: to wait, a deadline, the price alone."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import func, select, update

from api import preferences
from storage import queue, repair, tasks
from storage.database import transaction
from storage.models import Delivery, Task, TaskStatus
from tests.conftest import case

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer, Work

CREATE = "/v1/images/generations"
CAT: dict[str, Any] = {"model": "z-image-turbo", "prompt": "a cat"}
GENERATE = "/api/generate"
SQUARE: dict[str, Any] = {"prompt": "a cat", "aspect_ratio": "1:1"}


# --- Prefer: wait ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("drawing")
def test_a_create_may_wait_for_its_image(customer: Customer) -> None:
    answer = customer.http.post(CREATE, json=CAT, headers={"Prefer": "wait=30"})

    assert answer.headers["preference-applied"] == "wait=30"
    done = answer.json()
    assert done["status"] == "completed"
    assert done == customer.http.get(f"/v1/tasks/{done['id']}").json()
    assert customer.books() == (Decimal(1485), Decimal(0))


@pytest.mark.usefixtures("drawing")
def test_the_other_format_may_wait_as_well(customer: Customer) -> None:
    answer = customer.http.post(GENERATE, json=SQUARE, headers={"Prefer": "wait=30"})

    done = answer.json()["data"]
    assert done["status"] == "SUCCESS"
    status = customer.http.get("/api/status", params={"task_id": done["task_id"]})
    assert done == status.json()["data"]


def test_waiting_in_vain_answers_the_unfinished_task(customer: Customer) -> None:
    answer = customer.http.post(CREATE, json=CAT, headers={"Prefer": "wait=1"})

    assert answer.status_code == 200
    assert answer.headers["preference-applied"] == "wait=1"
    assert answer.json()["status"] == "pending"
    assert customer.books() == (Decimal(1500), Decimal(15))


@pytest.mark.usefixtures("drawing")
def test_a_query_may_wait_as_well(customer: Customer) -> None:
    task_id = customer.http.post(CREATE, json=CAT).json()["id"]

    answer = customer.http.get(f"/v1/tasks/{task_id}", headers={"Prefer": "wait=30"})

    assert answer.json()["status"] == "completed"


@pytest.mark.usefixtures("drawing")
def test_the_longest_wait_is_bounded(customer: Customer) -> None:
    wait = preferences.WAIT_MAX_S
    for asked in (wait, wait + 1, 999999):
        answer = customer.http.post(CREATE, json=CAT, headers={"Prefer": f"wait={asked}"})
        assert answer.headers["preference-applied"] == f"wait={wait}"


@pytest.mark.parametrize(
    "prefer", ["wait", "wait=", "wait=-1", "wait=x", "waits=9", "return=minimal"]
)
def test_what_is_no_preference_to_wait_is_answered_at_once(customer: Customer, prefer: str) -> None:
    answer = customer.http.post(CREATE, json=CAT, headers={"Prefer": prefer})

    assert answer.status_code == 200
    assert "preference-applied" not in answer.headers


# --- Cancel-After ---------------------------------------------------------------------------------


def finish_deadlines() -> None:
    """Let the deadlines of all tasks be over."""
    with transaction() as session:
        session.execute(update(Task).values(deadline_at=func.clock_timestamp()))


@pytest.mark.parametrize(
    ("sent", "seconds"), {"1": 1, "90s": 90, "5m": 300, "1h": 3600, "24h": 86400}.items()
)
def test_a_deadline_is_kept_on_the_task(customer: Customer, sent: str, seconds: int) -> None:
    answer = customer.http.post(CREATE, json=CAT, headers={"Cancel-After": sent})

    task = customer.task(answer.json()["id"])
    assert task.deadline_at == task.created_at + timedelta(seconds=seconds)


@pytest.mark.parametrize("sent", ["0", "0s", "-1", "soon", "25h", "86401", "1d", "1.5h", ""])
def test_a_deadline_is_1_second_to_24_hours(customer: Customer, sent: str) -> None:
    for path, body in ((CREATE, CAT), (GENERATE, SQUARE)):
        answer = customer.http.post(path, json=body, headers={"Cancel-After": sent})

        assert answer.status_code == 400
        assert "Cancel-After" in answer.text
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_a_task_past_its_deadline_is_cancelled_free_of_charge(
    customer: Customer, work: Work
) -> None:
    told = {"callback_url": "https://8.8.8.8/told"}
    sent = customer.http.post(CREATE, json=CAT | told, headers={"Cancel-After": "1h"}).json()
    assert repair.missed_deadlines() == 0
    finish_deadlines()

    assert repair.missed_deadlines() == 1
    assert repair.missed_deadlines() == 0
    work()

    task = customer.http.get(f"/v1/tasks/{sent['id']}").json()
    assert (task["status"], task["error"]["code"]) == ("failed", "request_cancelled")
    assert customer.books() == (Decimal(1500), Decimal(0))
    with transaction() as session:
        assert session.scalar(select(func.count()).select_from(Delivery)) == 1


def test_a_task_past_its_deadline_is_not_begun(customer: Customer) -> None:
    customer.http.post(CREATE, json=CAT, headers={"Cancel-After": "1h"})
    finish_deadlines()

    with transaction() as session:
        assert tasks.claim_next(session, "a worker") is None


def test_a_task_is_stopped_while_it_is_drawn_when_its_deadline_comes(customer: Customer) -> None:
    sent = customer.http.post(CREATE, json=CAT, headers={"Cancel-After": "1h"}).json()
    with transaction() as session:
        task = tasks.claim_next(session, "a worker")
    assert task is not None
    finish_deadlines()

    assert repair.missed_deadlines() == 1

    with transaction() as session:
        assert not tasks.renew(session, {tasks.claim_of(task): 50})
    assert customer.task(sent["id"]).status is TaskStatus.CANCELLED


# --- dry_run --------------------------------------------------------------------------------------

QUOTE = {
    "object": "image.generation.quote",
    "model": "z-image-turbo",
    "estimated_time": 10.0,
    "usage": {
        "billing_rule": "per_call",
        "credits_reserved": 15,
        "images": 1,
        "user_group": "default",
    },
    "balance": {"available": 1500},
    "affordable": True,
}


def test_a_quote_says_the_price_and_submits_nothing(customer: Customer) -> None:
    in_query = customer.http.post(f"{CREATE}?dry_run=true", json=CAT)
    in_body = customer.http.post(CREATE, json=CAT | {"dry_run": True})
    other = customer.http.post(GENERATE, json=SQUARE | {"dry_run": True})

    for quote in (in_query.json(), in_body.json(), other.json()["data"]):
        assert quote == QUOTE | {"estimated_time": quote["estimated_time"]}
    with transaction() as session:
        assert session.scalar(select(func.count()).select_from(Task)) == 0
    assert queue.count() == 0
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_a_quote_says_what_cannot_be_paid(new_customer: NewCustomer) -> None:
    for credits_, affordable in ((15, True), (14, False)):
        quote = new_customer(credits_).http.post(f"{CREATE}?dry_run=true", json=CAT).json()

        assert quote["balance"] == {"available": credits_}
        assert quote["affordable"] is affordable


def test_a_quote_refuses_what_a_create_refuses(customer: Customer) -> None:
    answer = customer.http.post(f"{CREATE}?dry_run=true", json=CAT | {"size": "1x1"})

    assert answer.status_code == 400


def test_false_is_no_quote(customer: Customer) -> None:
    asked: tuple[dict[str, Any], ...] = (
        {"params": {"dry_run": "false"}, "json": CAT},
        {"json": CAT | {"dry_run": False}},
        {"json": CAT | {"dry_run": None}},
    )
    for sent in asked:
        assert "id" in customer.http.post(CREATE, **sent).json()


def test_dry_run_is_true_or_false(customer: Customer) -> None:
    sent: dict[str, dict[str, Any]] = {
        "a word": {"params": {"dry_run": "yes"}, "json": CAT},
        "a number": {"json": CAT | {"dry_run": 1}},
    }
    for name, request in sent.items():
        with case(name):
            answer = customer.http.post(CREATE, **request)
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "dry_run"
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_a_prompt_about_a_dry_run_is_a_prompt(customer: Customer) -> None:
    answer = customer.http.post(CREATE, json=CAT | {"prompt": '"dry_run": true'})

    assert "id" in answer.json()


# --- Rate limits ----------------------------------------------------------------------------------


def test_answers_say_how_many_requests_are_left(new_customer: NewCustomer) -> None:
    customer = new_customer(requests_per_minute=2)

    first = customer.http.post(CREATE, json=CAT)
    second = customer.http.post(CREATE, json=CAT | {"size": "1x1"})
    refused = customer.http.post(CREATE, json=CAT)
    read = customer.http.get(f"/v1/tasks/{first.json()['id']}")

    assert [answer.status_code for answer in (first, second, refused, read)] == [200, 400, 429, 200]
    for answer, left in ((first, 1), (second, 0), (refused, 0)):
        assert answer.headers["ratelimit-policy"] == '"create";q=2;w=60'
        policy, remaining, reset = answer.headers["ratelimit"].split(";")
        assert (policy, remaining) == ('"create"', f"r={left}")
        assert 1 <= int(reset.removeprefix("t=")) <= 60
    assert int(refused.headers["retry-after"]) >= int(refused.headers["ratelimit"][-2:].strip("=t"))
    assert read.headers["ratelimit-policy"] == '"read";q=50;w=1'


def test_a_key_without_limits_hears_of_none(customer: Customer) -> None:
    answer = customer.http.post(CREATE, json=CAT)

    assert "ratelimit" not in answer.headers
    assert "ratelimit-policy" not in answer.headers
