"""What customers wrote is gone a day after the end of their tasks, or when they ask; bills stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from botocore.exceptions import ClientError
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import IntegrityError

from storage import deliveries, objects, queue, repair, tasks
from storage.database import engine, transaction
from storage.errors import WorkerLost
from storage.models import (
    Delivery,
    DeliveryAttempt,
    ImageFormat,
    RememberedRequest,
    Task,
    TaskStatus,
)
from storage.settings import settings
from tests.conftest import case

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer, Work

    Submit = Callable[..., Task]

PROMPT = "my grandmother's house in Bremen"
CALLBACK = "https://127.0.0.2:9/grandmother"
CREATE = {"model": "z-image-turbo", "prompt": PROMPT, "size": "1:1", "seed": 7}


def ordered(customer: Customer, key: str = "grandmother-0001", **more: object) -> str:
    """The id of a task that was created with an idempotency key."""
    answer = customer.http.post(
        "/v1/images/generations",
        json=CREATE | more,
        headers={"Idempotency-Key": key, "X-Request-ID": "grandmother"},
    )
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def grow_old(seconds: float = settings.task_data_ttl_s + 1) -> None:
    """Let that much time pass for every task and request there is."""
    past = timedelta(seconds=seconds)
    with transaction() as session:
        session.execute(
            update(Task).values(
                created_at=Task.created_at - past,
                finished_at=Task.finished_at - past,
                image_expires_at=Task.image_expires_at - past,
            )
        )
        session.execute(
            update(RememberedRequest).values(created_at=RememberedRequest.created_at - past)
        )


def tell(*, error: str | None = None) -> None:
    """Report the next attempt of every callback that is due; an error is its last."""
    with transaction() as session:
        for attempt in deliveries.claim_due(session, limit=10, except_accounts=()):
            deliveries.record(session, attempt.delivery, status=200, error=error, final=True)


def rows_of(*tables: type[Delivery | DeliveryAttempt | RememberedRequest]) -> list[int]:
    with transaction() as session:
        return [session.scalar(select(func.count()).select_from(each)) or 0 for each in tables]


def exists(key: str | None) -> bool:
    try:
        objects.get(key or "")
    except FileNotFoundError:
        return False
    return True


def written(task_id: str) -> str:
    """All that the database holds of a task, and of what belongs to it."""
    look = text("""
        SELECT jsonb_build_array(
            (SELECT to_jsonb(t) FROM tasks t WHERE id = :id),
            (SELECT jsonb_agg(d) FROM deliveries d WHERE task_id = :id),
            (SELECT jsonb_agg(a) FROM delivery_attempts a JOIN deliveries d ON d.id = delivery_id
              WHERE task_id = :id),
            (SELECT jsonb_agg(r) FROM remembered_requests r WHERE :id = ANY (task_ids)))::text
    """)
    with engine.connect() as connection:
        return str(connection.scalar(look, {"id": task_id}))


def assert_like_none(customer: Customer, task_id: str) -> None:
    """Every door answers as for a task that never was."""
    never = f"{task_id[:-8]}zzzzzzzz"
    http = customer.http

    def answers(task_id: str) -> dict[str, tuple[int, str]]:
        asked = {
            "evolink": http.get(f"/v1/tasks/{task_id}"),
            "events": http.get(f"/v1/tasks/{task_id}/events"),
            "cancel": http.post(f"/v1/tasks/{task_id}/cancel"),
            "batch": http.post("/v1/tasks/batch", json={"task_ids": [task_id]}),
            "list": http.get("/v1/tasks"),
            "dashscope": http.get(f"/api/v1/tasks/{task_id}"),
            "dashscope cancel": http.post(f"/api/v1/tasks/{task_id}/cancel"),
            "dashscope list": http.get("/api/v1/tasks", params={"task_id": task_id}),
            "zimageturbo": http.get("/api/status", params={"task_id": task_id}),
            "callbacks": http.get("/v1/callbacks", params={"task_id": task_id}),
        }
        found = {}
        for name, answer in asked.items():
            body = answer.text.replace(task_id, "")
            for line in (answer.headers["X-Request-ID"], answer.headers.get("date", "-")):
                body = body.replace(line, "")
            found[name] = (answer.status_code, body)
        return found

    gone, none = answers(task_id), answers(never)
    for name in gone:
        with case(name):
            assert gone[name] == none[name]
    assert gone["evolink"][0] == gone["zimageturbo"][0] == 404
    assert '"UNKNOWN"' in str(gone["dashscope"][1])


def test_a_day_after_its_end_nothing_is_left_of_a_task_but_its_bill(
    customer: Customer, operator: Customer, work: Work
) -> None:
    task_id = ordered(customer, callback_url=CALLBACK)
    work()
    tell()
    before = customer.task(task_id)
    assert "grandmother" in written(task_id)
    assert repair.old_tasks() == 0  # its time is not over

    grow_old()
    assert repair.old_tasks() == 1
    assert repair.old_tasks() == 0

    after = customer.task(task_id)
    assert "grandmother" not in written(task_id)
    assert before.image_sha256 is not None
    assert before.image_sha256 not in written(task_id)
    assert "images/" not in written(task_id)
    assert rows_of(Delivery, DeliveryAttempt, RememberedRequest) == [0, 0, 0]
    kept = ("status", "price", "api_key_id", "width", "height", "steps", "prompt_tokens", "attempt")
    for column in (*kept, "dialect", "image_size_bytes", "started_at", "worker", "model"):
        assert getattr(after, column) == getattr(before, column) or column == "started_at", column
    assert customer.books() == (1485, 0)
    assert_like_none(customer, task_id)
    seen = operator.http.get("/admin/tasks", params={"account_id": customer.id}).json()["data"]
    assert [row["id"] for row in seen] == [task_id]


def test_failed_and_cancelled_tasks_are_erased_as_well_and_unfinished_ones_are_not(
    customer: Customer, submit: Submit
) -> None:
    lost, cancelled, drawn, waits = (submit(customer, prompt=PROMPT) for _ in range(4))
    with transaction() as session:
        claim = tasks.claim_of(tasks.claim_next(session, "w") or lost)
        assert claim.task_id == lost.id
        tasks.fail(session, claim, WorkerLost(f"of {PROMPT}"))
        tasks.cancel(session, cancelled.id)
        assert (tasks.claim_next(session, "w") or lost).id == drawn.id
    grow_old(10 * settings.task_data_ttl_s)

    assert repair.old_tasks() == 2

    assert "Bremen" not in written(lost.id) + written(cancelled.id)
    assert customer.task(lost.id).error_code == "WorkerLost"
    assert customer.task(drawn.id).prompt == customer.task(waits.id).prompt == PROMPT


def test_a_task_is_not_erased_while_its_callback_is_owed(
    customer: Customer, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = ordered(customer, callback_url=CALLBACK)
    younger = ordered(customer, "grandmother-0002")
    work()
    grow_old()
    with transaction() as session:
        session.get_one(Task, task_id).finished_at = datetime(2020, 1, 1, tzinfo=UTC)
    monkeypatch.setattr(repair, "ERASED_MAX", 1)

    assert repair.old_tasks() == 1  # what is owed stands in nobody's way
    assert customer.task(younger).erased_at is not None
    assert repair.old_tasks() == 0
    tell(error="refused")
    (row,) = customer.http.get("/v1/callbacks").json()["data"]
    customer.http.post(f"/v1/callbacks/{row['id']}/redeliver")
    assert repair.old_tasks() == 0  # owed once more
    tell(error="refused")

    assert repair.old_tasks() == 1
    assert "grandmother" not in written(task_id)
    again = customer.http.post(f"/v1/callbacks/{row['id']}/redeliver")
    assert again.status_code == 404


def test_what_somebody_works_with_is_left_for_the_next_look(customer: Customer, work: Work) -> None:
    told = ordered(customer, callback_url=CALLBACK)
    _, free, taken = (ordered(customer, f"grandmother-000{n}") for n in (2, 3, 4))
    work()
    tell()
    grow_old()
    with transaction() as session:  # waits for none of these, which are held until it ends
        session.execute(select(Delivery).where(Delivery.task_id == told).with_for_update()).one()
        session.execute(
            select(RememberedRequest)
            .where(RememberedRequest.idempotency_key == "grandmother-0002")
            .with_for_update()
        ).one()
        session.execute(select(Task).where(Task.id == taken).with_for_update(key_share=True)).one()

        assert repair.old_tasks() == 1

    assert customer.task(free).erased_at is not None
    assert repair.old_tasks() == 3


def test_a_look_goes_on_until_nothing_is_due(
    customer: Customer, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repair, "ERASED_MAX", 2)
    for task in [submit(customer) for _ in range(5)]:
        with transaction() as session:
            tasks.cancel(session, task.id)
    grow_old()

    assert repair.old_tasks() == 5


@pytest.mark.parametrize(
    "column",
    [
        *("prompt", "rewritten_prompt", "reasoning", "aspect_ratio", "callback_url", "request_id"),
        *("image_url", "image_sha256", "error_message"),
    ],
)
def test_the_database_refuses_an_erased_task_that_holds_anything(
    customer: Customer, submit: Submit, column: str
) -> None:
    task = submit(customer)
    with transaction() as session:
        tasks.cancel(session, task.id)
    grow_old()
    assert repair.old_tasks() == 1

    with pytest.raises(IntegrityError, match="erased_holds_nothing"), transaction() as session:
        session.execute(update(Task).values({column: "x"}))


def test_a_customer_deletes_a_task_and_its_image(customer: Customer, work: Work) -> None:
    task_id = ordered(customer, callback_url=CALLBACK)
    work()
    tell()
    key = customer.task(task_id).image_key
    assert exists(key)

    for _ in range(2):
        answer = customer.http.delete(f"/v1/tasks/{task_id}")
        assert (answer.status_code, answer.json()) == (
            200,
            {"id": task_id, "object": "image.generation.task", "deleted": True},
        )

    assert not exists(key)
    assert "grandmother" not in written(task_id)
    assert "images/" not in written(task_id)
    assert customer.books() == (1485, 0)
    assert_like_none(customer, task_id)
    # The key is free again: what it made is gone.
    assert ordered(customer) != task_id


def test_an_image_that_cannot_be_deleted_now_is_deleted_by_the_repairs(
    customer: Customer, work: Work
) -> None:
    task_id = ordered(customer)
    work()
    key = customer.task(task_id).image_key
    with image_store_refuses():
        assert customer.http.delete(f"/v1/tasks/{task_id}").status_code == 200
        assert repair.unwanted_images() == 0
    assert_like_none(customer, task_id)
    assert exists(key)

    assert repair.unwanted_images() == 1

    assert not exists(key)
    assert customer.task(task_id).image_key is None
    assert repair.unwanted_images() == 0


def test_a_task_in_use_is_not_deleted(
    customer: Customer, new_customer: NewCustomer, submit: Submit, work: Work
) -> None:
    task_id = ordered(customer, callback_url=CALLBACK)

    def refused() -> tuple[int, str, str]:
        answer = customer.http.delete(f"/v1/tasks/{task_id}")
        error = answer.json()["error"]
        return answer.status_code, error["code"], error["message"]

    cancel_first = (
        409,
        "task_in_use",
        "Only a task that has ended can be deleted: cancel it first.",
    )
    assert refused() == cancel_first
    with transaction() as session:
        claim = tasks.claim_of(tasks.claim_next(session, "w") or submit(customer))
    assert refused() == cancel_first
    with transaction() as session:
        tasks.hand_back(session, claim)
    queue.ring(1)
    work()
    status, code, message = refused()
    assert (status, code) == (409, "task_in_use")
    assert "callback" in message
    assert customer.task(task_id).prompt == PROMPT


def test_nobody_deletes_what_is_not_theirs(
    customer: Customer, new_customer: NewCustomer, submit: Submit, work: Work
) -> None:
    other, blind = new_customer(), new_customer(models=["another"])
    task_id, unseen = ordered(customer), submit(blind)
    work()

    answers = {
        "another's": other.http.delete(f"/v1/tasks/{task_id}"),
        "none": other.http.delete("/v1/tasks/task-unified-1757165031-uyujaw3d"),
        "malformed": other.http.delete("/v1/tasks/task-unified-x"),
    }

    for name, answer in answers.items():
        with case(name):
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "task_not_found")
    assert blind.http.delete(f"/v1/tasks/{unseen.id}").status_code == 403
    assert customer.task(task_id).status is TaskStatus.COMPLETED
    assert customer.task(task_id).erased_at is None


def test_all_old_images_are_found_where_there_are_more_than_a_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    objects.delete_older_than(timedelta(0))
    monkeypatch.setattr(objects, "DELETE_MAX", 3)
    for _ in range(7):
        objects.put(b"x", ImageFormat.PNG)

    assert objects.delete_older_than(timedelta(0)) == 7
    assert objects.delete_older_than(timedelta(0)) == 0


@contextmanager
def image_store_refuses() -> Iterator[None]:
    """Every call is answered with an error, as it is with wrong credentials."""

    def refuse(**_: object) -> None:
        raise ClientError({"Error": {"Code": "AccessDenied"}}, "any")

    events = objects._client().meta.events
    events.register("before-send.s3", refuse)
    try:
        yield
    finally:
        events.unregister("before-send.s3", refuse)
