"""EvoLink's lists: tasks, batches of tasks, and credits, as its own client reads them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import update

from storage import accounts, ledger, tasks
from storage.database import transaction
from storage.errors import GenerationFailed
from storage.models import Task
from tests.conftest import case

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer, Work

    Submit = Callable[..., Task]

NOBODYS = "task-unified-1757165031-uyujaw3d"


def listed(customer: Customer, **query: object) -> dict[str, Any]:
    answer = customer.http.get("/v1/tasks", params={k: str(v) for k, v in query.items()})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def ids(customer: Customer, **query: object) -> list[str]:
    return [row["id"] for row in listed(customer, **query)["data"]]


def in_every_state(customer: Customer, submit: Submit, work: Work) -> dict[str, str]:
    """The ids of a task in each state."""
    made = {}
    made["completed"] = submit(customer).id
    work()
    made["failed"] = submit(customer).id
    with transaction() as session:
        task = tasks.claim_next(session, "a worker")
        assert task is not None
        tasks.fail(session, tasks.claim_of(task), GenerationFailed())
    made["cancelled"] = submit(customer).id
    with transaction() as session:
        tasks.cancel(session, made["cancelled"])
    made["processing"] = submit(customer).id
    with transaction() as session:
        tasks.claim_next(session, "a worker")
    made["pending"] = submit(customer).id
    return made


def test_a_list_shows_each_task_without_its_links(
    customer: Customer, submit: Submit, work: Work
) -> None:
    made = in_every_state(customer, submit, work)

    body = listed(customer)
    rows = {row["id"]: row for row in body["data"]}

    assert (body["total"], body["page"], body["page_size"]) == (5, 1, 20)
    assert list(rows) == list(reversed(made.values()))
    done = rows[made["completed"]]
    assert done == {
        "id": made["completed"],
        "model": "z-image-turbo",
        "type": "image",
        "status": "completed",
        "progress": 100,
        "created_at": int(customer.task(made["completed"]).created_at.timestamp()),
        "duration": done["duration"],
        "has_results": True,
        "result_count": 1,
        "has_error": False,
        "credits_used": 15,
    }
    assert done["duration"] >= 0
    failed = rows[made["failed"]]
    assert (failed["status"], failed["has_error"], failed["credits_used"]) == ("failed", True, 0)
    assert rows[made["cancelled"]]["status"] == "failed"
    waiting = rows[made["pending"]]
    assert (waiting["status"], waiting["has_results"], waiting["result_count"]) == (
        "pending",
        False,
        0,
    )
    assert "duration" not in waiting


def test_an_expired_image_is_no_result(customer: Customer, submit: Submit, work: Work) -> None:
    submit(customer)
    work()
    with transaction() as session:
        session.execute(update(Task).values(image_expires_at=datetime.now(UTC)))

    (row,) = listed(customer)["data"]

    assert (row["status"], row["has_results"], row["result_count"]) == ("completed", False, 0)


def test_a_list_is_asked_by_status(customer: Customer, submit: Submit, work: Work) -> None:
    made = in_every_state(customer, submit, work)
    expected = {
        "pending": ["pending"],
        "processing": ["pending", "processing"],
        "completed": ["completed"],
        "failed": ["cancelled", "failed"],
        "cancelled": ["cancelled"],
    }

    for status, shown in expected.items():
        with case(status):
            assert ids(customer, status=status) == [made[name] for name in shown]


def test_a_list_is_asked_by_type_and_model(customer: Customer, submit: Submit) -> None:
    task = submit(customer)

    assert ids(customer, type="image", model="z-image-turbo") == [task.id]
    assert ids(customer, type="video") == []
    assert ids(customer, model="gpt-4o-image") == []


def test_a_list_is_paged(customer: Customer, submit: Submit) -> None:
    made = [submit(customer).id for _ in range(5)]
    newest_first = list(reversed(made))

    pages = [listed(customer, page=page, page_size=2) for page in (1, 2, 3, 4)]

    assert [[row["id"] for row in page["data"]] for page in pages] == [
        newest_first[:2],
        newest_first[2:4],
        newest_first[4:],
        [],
    ]
    assert {page["total"] for page in pages} == {5}


def test_the_edges_of_a_page(customer: Customer) -> None:
    deepest = tasks.LIST_MAX // 100
    for query, status in (
        ({"page": 1, "page_size": 100}, 200),
        ({"page": deepest, "page_size": 100}, 200),
        ({"page": deepest + 1, "page_size": 100}, 400),
        ({"page": 0}, 400),
        ({"page_size": 0}, 400),
        ({"page_size": 101}, 400),
        ({"page": "x"}, 400),
        ({"status": "done"}, 400),
        ({"type": "smell"}, 400),
    ):
        with case(str(query)):
            answer = customer.http.get("/v1/tasks", params=query)
            assert answer.status_code == status


def test_nobody_sees_anothers_tasks(
    customer: Customer, new_customer: NewCustomer, submit: Submit
) -> None:
    task = submit(customer)
    other = new_customer()

    assert listed(other) == {"data": [], "total": 0, "page": 1, "page_size": 20}
    batch = other.http.post("/v1/tasks/batch", json={"task_ids": [task.id]})
    assert batch.json() == {"data": []}


def test_a_key_without_the_model_sees_none_of_its_tasks(customer: Customer, submit: Submit) -> None:
    task = submit(customer)
    with transaction() as session:
        _, secret = accounts.issue_key(session, customer.id, models=["another-model"])
    headers = {"Authorization": f"Bearer {secret}"}

    lists = customer.http.get("/v1/tasks", headers=headers)
    batch = customer.http.post("/v1/tasks/batch", json={"task_ids": [task.id]}, headers=headers)

    assert (lists.json()["data"], lists.json()["total"]) == ([], 0)
    assert batch.json() == {"data": []}


# --- Batch ----------------------------------------------------------------------------------------


def test_a_batch_answers_what_the_queries_would(
    customer: Customer, submit: Submit, work: Work
) -> None:
    made = [submit(customer).id for _ in range(2)]
    work()

    asked = [made[1], NOBODYS, "x", made[0], made[1], "task-unified-\0"]
    answer = customer.http.post("/v1/tasks/batch", json={"task_ids": asked})

    each = [customer.http.get(f"/v1/tasks/{task_id}").json() for task_id in (made[1], made[0])]
    assert answer.json() == {"data": each}


def test_a_batch_has_at_most_50_ids(customer: Customer) -> None:
    for count, status in ((0, 200), (50, 200), (51, 400)):
        with case(f"{count} ids"):
            answer = customer.http.post("/v1/tasks/batch", json={"task_ids": [NOBODYS] * count})
            assert answer.status_code == status


@pytest.mark.parametrize("body", [{}, {"task_ids": NOBODYS}, {"task_ids": [1]}, []])
def test_a_batch_of_another_form_is_refused(customer: Customer, body: object) -> None:
    answer = customer.http.post("/v1/tasks/batch", json=body)

    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_request"


# --- Credits --------------------------------------------------------------------------------------


def test_credits_say_what_is_left_and_what_was_used(
    customer: Customer, submit: Submit, work: Work
) -> None:
    with transaction() as session:
        _, secret = accounts.issue_key(session, customer.id)
    submit(customer)
    work()
    submit(customer)

    own = customer.http.get("/v1/credits").json()
    others = customer.http.get("/v1/credits", headers={"Authorization": f"Bearer {secret}"}).json()

    user = {"remaining_credits": 1470, "used_credits": 15}
    token = {"remaining_credits": 1470, "unlimited_credits": True, "used_credits": 15}
    assert own == {"data": {"token": token, "user": user}, "message": "", "success": True}
    assert others["data"] == {"token": token | {"used_credits": 0}, "user": user}


def test_used_credits_are_exact_after_grants_and_adjustments(customer: Customer) -> None:
    with transaction() as session:
        ledger.grant(session, customer.id, Decimal("0.000001"), actor="test")
        ledger.grant(session, customer.id, Decimal(-100), actor="test")

    body = customer.http.get("/v1/credits")

    assert '"remaining_credits":1400.000001' in body.text
    assert body.json()["data"]["user"]["used_credits"] == 0
