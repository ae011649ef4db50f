"""A create that comes twice is submitted once, in every dialect; what differs is refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from sqlalchemy import func, select, update

from api.dialects import routing
from storage import idempotency, ledger, queue, repair, tasks
from storage.database import transaction
from storage.models import ImageFormat, RememberedRequest, Task
from storage.tasks import Submitted
from tests.conftest import case

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer, Work

CREATE = "/v1/images/generations"
CAT: dict[str, Any] = {"model": "z-image-turbo", "prompt": "a cat"}
CREATES: dict[str, tuple[str, dict[str, Any]]] = {
    "evolink": (CREATE, CAT),
    "zimageturbo": ("/api/generate", {"prompt": "a cat", "aspect_ratio": "1:1"}),
}
"""The creates that answer at once."""


def create(customer: Customer, key: str, **body: object) -> httpx.Response:
    return customer.http.post(CREATE, json=CAT | body, headers={"Idempotency-Key": key})


def tasks_of(customer: Customer) -> int:
    with transaction() as session:
        query = select(func.count()).select_from(Task).where(Task.account_id == customer.id)
        return session.scalar(query) or 0


@pytest.mark.parametrize("dialect", CREATES)
def test_the_same_key_and_body_is_the_first_task_again(customer: Customer, dialect: str) -> None:
    path, body = CREATES[dialect]
    headers = {"Idempotency-Key": "order-4711"}

    first = customer.http.post(path, json=body, headers=headers)
    second = customer.http.post(path, json=body, headers=headers)

    assert (first.status_code, second.status_code) == (200, 200)
    assert "idempotency-replayed" not in first.headers
    assert second.headers["idempotency-replayed"] == "true"
    assert second.json() == first.json()
    assert tasks_of(customer) == 1
    assert queue.count() == 1
    assert customer.books() == (Decimal(1500), Decimal(15))


@pytest.mark.parametrize("dialect", CREATES)
def test_the_same_key_with_another_body_is_a_conflict(customer: Customer, dialect: str) -> None:
    path, body = CREATES[dialect]
    headers = {"Idempotency-Key": "order-4711"}
    customer.http.post(path, json=body, headers=headers)

    answer = customer.http.post(path, json=body | {"prompt": "a dog"}, headers=headers)

    assert answer.status_code == 409
    assert "already used" in answer.text
    assert tasks_of(customer) == 1
    assert customer.books() == (Decimal(1500), Decimal(15))


def test_the_conflict_has_evolinks_code(customer: Customer) -> None:
    create(customer, "order-4711")

    error = create(customer, "order-4711", prompt="a dog").json()["error"]

    assert (error["code"], error["type"]) == ("idempotency_conflict", "invalid_request_error")


def test_the_same_key_in_another_dialect_is_a_conflict(customer: Customer) -> None:
    headers = {"Idempotency-Key": "order-4711"}
    body = {"model": "z-image-turbo", "prompt": "a cat", "aspect_ratio": "1:1"}
    assert customer.http.post(CREATE, json=body, headers=headers).status_code == 200

    answer = customer.http.post("/api/generate", json=body, headers=headers)

    assert answer.status_code == 409


def test_order_and_spaces_of_the_body_do_not_matter(customer: Customer) -> None:
    headers = {"Idempotency-Key": "order-4711", "Content-Type": "application/json"}
    bodies = (
        '{"model": "z-image-turbo", "prompt": "caf\\u00e9", "seed": 7}',
        '{"seed":7,\n"prompt":"café","model":"z-image-turbo"}',
    )

    ids = {
        customer.http.post(CREATE, content=body, headers=headers).json()["id"] for body in bodies
    }

    assert len(ids) == 1


def test_any_json_may_have_a_key(customer: Customer) -> None:
    headers = {"Idempotency-Key": "order-4711", "Content-Type": "application/json"}
    strange = (
        '"big": 123456789012345678901234567890, "odd": NaN, "half": "\\ud83e", "dry_run": null'
    )
    body = f'{{"model": "z-image-turbo", "prompt": "a cat", {strange}}}'

    answers = [customer.http.post(CREATE, content=body, headers=headers) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[1].headers["idempotency-replayed"] == "true"


def test_a_key_may_be_quoted_as_the_ietf_writes_it(customer: Customer) -> None:
    first = create(customer, '"order-4711"').json()

    assert create(customer, "order-4711").json() == first


def test_a_key_is_its_accounts_own(customer: Customer, new_customer: NewCustomer) -> None:
    first = create(customer, "order-4711").json()

    assert create(new_customer(), "order-4711").json()["id"] != first["id"]


def test_a_replay_tells_what_became_of_the_task(customer: Customer, work: Work) -> None:
    first = create(customer, "order-4711").json()
    work()

    again = create(customer, "order-4711")

    assert again.json() == customer.http.get(f"/v1/tasks/{first['id']}").json()
    assert again.json()["status"] == "completed"
    assert customer.books() == (Decimal(1485), Decimal(0))


def test_at_the_same_moment_one_key_makes_one_task(customer: Customer) -> None:
    lanes = 16
    start = threading.Barrier(lanes)

    def race(number: int) -> tuple[str, bool]:
        with httpx.Client(
            base_url=customer.http.base_url, headers=customer.http.headers, verify=False
        ) as http:
            start.wait()
            headers = {"Idempotency-Key": f"order-{number}"}
            answer = http.post(CREATE, json=CAT, headers=headers)
            return answer.json()["id"], "idempotency-replayed" in answer.headers

    with ThreadPoolExecutor(lanes) as pool:
        for number in range(10):
            answers = list(pool.map(race, [number] * lanes))

            assert len({task_id for task_id, _ in answers}) == 1
            assert sum(replayed for _, replayed in answers) == lanes - 1
    assert tasks_of(customer) == 10
    assert customer.books() == (Decimal(1500), Decimal(150))


def submission(customer: Customer, prompt: str, **mark: Any) -> tasks.Submission:
    return tasks.Submission(
        customer.id,
        customer.key_id,
        (tasks.ImageRequest(prompt, 64, 64, ImageFormat.PNG),),
        "test",
        Decimal(15),
        mark=idempotency.Mark(prompt.encode(), **mark),
    )


def test_in_one_batch_the_second_use_of_a_key_finds_the_first(customer: Customer) -> None:
    batch = [("cat", "a"), ("cat", "b"), ("cat", "a"), ("dog", "a"), ("cat", "b")]
    with transaction() as session:
        outcomes = tasks.submit_many(
            session, [submission(customer, prompt, key=key) for prompt, key in batch]
        )

    ids = [made.tasks[0].id if isinstance(made, Submitted) else None for made in outcomes]
    assert ids == [ids[0], ids[1], ids[0], None, ids[1]]
    assert ids[0] != ids[1]
    assert tasks_of(customer) == 2


def test_in_one_batch_a_resend_finds_what_it_repeats(customer: Customer) -> None:
    sent = [1, 0, 0, 1]
    with transaction() as session:
        outcomes = tasks.submit_many(
            session,
            [submission(customer, "cat", resend=n, resend_window_s=60) for n in sent],
        )

    first, second, third, fourth = (
        made.tasks[0].id for made in outcomes if isinstance(made, Submitted)
    )
    assert {first, fourth} == {second, third}
    assert tasks_of(customer) == 2


def test_a_resend_comes_within_its_window_and_as_often_as_it_says(customer: Customer) -> None:
    def send(resend: int) -> str:
        with transaction() as session:
            (made,) = tasks.submit_many(
                session, [submission(customer, "cat", resend=resend, resend_window_s=60)]
            )
        assert isinstance(made, Submitted)
        return made.tasks[0].id

    def grow_older(seconds: int) -> None:
        with transaction() as session:
            aged = RememberedRequest.created_at - timedelta(seconds=seconds)
            session.execute(update(RememberedRequest).values(created_at=aged))

    first = send(0)
    assert send(1) == first
    assert send(2) == first
    assert send(2) != first  # of another request, whose first copy never came
    late = send(0)
    grow_older(50)
    assert send(1) == late
    too_late = send(0)
    grow_older(60)
    assert send(1) != too_late


def test_nothing_is_remembered_of_a_request_that_was_refused(new_customer: NewCustomer) -> None:
    customer = new_customer(0)
    assert create(customer, "order-4711").status_code == 402
    with transaction() as session:
        ledger.grant(session, customer.id, Decimal(15), actor="test")

    answer = create(customer, "order-4711")

    assert answer.status_code == 200
    assert "idempotency-replayed" not in answer.headers


def test_a_key_is_remembered_for_24_hours_and_then_free(customer: Customer) -> None:
    first = create(customer, "order-4711").json()

    def grow_older(seconds: int) -> None:
        with transaction() as session:
            aged = RememberedRequest.created_at - timedelta(seconds=seconds)
            session.execute(update(RememberedRequest).values(created_at=aged))

    grow_older(idempotency.KEEP_S - 60)
    assert create(customer, "order-4711").json()["id"] == first["id"]
    assert repair.old_requests() == 0

    grow_older(61)
    anew = create(customer, "order-4711", prompt="a dog")
    assert anew.status_code == 200
    assert anew.json()["id"] != first["id"]
    assert create(customer, "order-4711", prompt="a dog").json()["id"] == anew.json()["id"]


def test_what_is_too_old_to_be_repeated_is_forgotten(customer: Customer) -> None:
    create(customer, "order-4711")
    with transaction() as session:
        aged = RememberedRequest.created_at - timedelta(seconds=idempotency.KEEP_S + 1)
        session.execute(update(RememberedRequest).values(created_at=aged))

    assert repair.old_requests() == 1
    assert repair.old_requests() == 0
    assert tasks_of(customer) == 1


@pytest.mark.parametrize("dialect", CREATES)
def test_a_key_has_at_most_255_visible_characters(customer: Customer, dialect: str) -> None:
    path, body = CREATES[dialect]
    for key, status in {"k" * 255: 200, "k" * 256: 400, "two words": 400, "": 400}.items():
        with case(f"{len(key)} characters"):
            answer = customer.http.post(path, json=body, headers={"Idempotency-Key": key})

            assert answer.status_code == status, answer.text
            assert ("Idempotency-Key" in answer.text) == (status == 400)
    assert tasks_of(customer) == 1


def test_the_bound_of_a_body_is_no_way_around(customer: Customer) -> None:
    body = '{"model": "z-image-turbo", "prompt": "a cat"' + " " * routing.BODY_MAX_BYTES + "}"
    headers = {"Idempotency-Key": "order-4711", "Content-Type": "application/json"}

    assert customer.http.post(CREATE, content=body, headers=headers).status_code == 413
