"""Every row of the crash table: what a process that died left behind is found and put right."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import update

from storage import objects, queue, repair, tasks
from storage.database import transaction
from storage.models import ImageFormat, Task, TaskStatus
from storage.settings import settings

if TYPE_CHECKING:
    from tests.conftest import Customer, Work

    Submit = Callable[..., Task]

CREATE = "/api/generate"
CAT = {"prompt": "a cat", "aspect_ratio": "1:1"}


def die_in_the_middle(times: int = 1) -> None:
    """Claim as a worker would, and be heard of no more."""
    for _ in range(times):
        with transaction() as session:
            assert tasks.claim_next(session, "a dead worker") is not None
    with transaction() as session:
        past = datetime.now(UTC) - timedelta(seconds=1)
        session.execute(
            update(Task).where(Task.status == TaskStatus.PROCESSING).values(lease_until=past)
        )


def test_a_task_whose_job_was_never_enqueued_is_rung_for(
    customer: Customer, submit: Submit, work: Work
) -> None:
    task = submit(customer)
    queue.connection.flushdb()

    assert repair.lost_jobs() == 1
    work()
    assert customer.task(task.id).status is TaskStatus.COMPLETED


def test_after_redis_lost_everything_all_that_waits_is_drawn(
    customer: Customer, submit: Submit, work: Work
) -> None:
    waiting = [submit(customer) for _ in range(20)]
    queue.connection.flushdb()

    repair.lost_jobs()
    work()

    assert {customer.task(task.id).status for task in waiting} == {TaskStatus.COMPLETED}
    assert customer.books() == (1500 - 20 * 15, 0)


def test_nothing_is_rung_for_where_no_job_is_missing(customer: Customer, submit: Submit) -> None:
    submit(customer)

    assert repair.lost_jobs() == 0
    assert queue.count() == 1


def let_wait(customer: Customer, times: int) -> None:
    with transaction() as session:
        request = tasks.ImageRequest("a cat", 64, 64, ImageFormat.PNG)
        one = tasks.Submission(customer.id, customer.key_id, (request,), "test", price=Decimal(0))
        tasks.submit_many(session, [one] * times)


def test_repairs_ring_for_no_more_than_is_kept(customer: Customer) -> None:
    let_wait(customer, queue.BELLS_MAX + 1)

    assert repair.lost_jobs() == queue.BELLS_MAX
    assert repair.lost_jobs() == 0
    assert queue.count() == queue.BELLS_MAX

    queue.generate_queue.pop_job_id()
    assert repair.lost_jobs() == 1


def test_no_more_bells_are_kept_than_fit_and_as_many_again_once_some_were_heard() -> None:
    for _ in range(3):
        queue.ring(queue.BELLS_MAX - 1)
    assert queue.count() == queue.BELLS_MAX

    queue.connection.flushdb()
    queue.ring(2)
    assert queue.count() == 2


def test_a_bell_that_was_thought_to_hang_is_hung_by_the_repairs(
    customer: Customer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "FULL_S", 1000.0)
    queue.ring(queue.BELLS_MAX)
    queue.connection.flushdb()
    assert customer.http.post(CREATE, json=CAT).status_code == 200
    assert queue.count() == 0

    assert repair.lost_jobs() == 1

    monkeypatch.setattr(queue, "FULL_S", 0.0)  # the moment for which it was believed is over
    assert customer.http.post(CREATE, json=CAT).status_code == 200
    assert queue.count() == 2


def test_what_waits_without_a_bell_is_drawn_after_what_has_one(
    customer: Customer, submit: Submit, work: Work
) -> None:
    waiting = [submit(customer) for _ in range(5)]
    queue.connection.flushdb()
    queue.ring(1)

    work()

    assert {customer.task(task.id).status for task in waiting} == {TaskStatus.COMPLETED}


def test_the_task_of_a_dead_worker_is_drawn_again_and_charged_once(
    customer: Customer, submit: Submit, work: Work
) -> None:
    task = submit(customer)
    queue.connection.flushdb()
    die_in_the_middle()

    assert repair.lost_workers() == 1
    work()

    drawn = customer.task(task.id)
    assert (drawn.status, drawn.attempt, drawn.losses) == (TaskStatus.COMPLETED, 2, 1)
    assert customer.books() == (1485, 0)


def test_a_task_that_kills_its_workers_fails_in_the_end(customer: Customer, submit: Submit) -> None:
    task = submit(customer)
    for _ in range(settings.losses_max):
        die_in_the_middle()
        repair.lost_workers()

    assert customer.task(task.id).error_code == "WorkerLost"
    assert customer.books() == (1500, 0)


def test_the_task_of_a_living_worker_is_left_alone(customer: Customer, submit: Submit) -> None:
    submit(customer)
    with transaction() as session:
        tasks.claim_next(session, "a worker")

    assert repair.lost_workers() == 0


def test_several_couriers_repair_each_task_once(customer: Customer, submit: Submit) -> None:
    for _ in range(20):
        submit(customer)
    die_in_the_middle(20)

    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda _: repair.lost_workers(), range(4)))

    assert sum(taken) == 20
    with transaction() as session:
        found = tasks.newest(session, account_id=customer.id, status=None, before=None, limit=100)
    assert {(task.status, task.losses) for task in found} == {(TaskStatus.PENDING, 1)}


def test_an_image_that_nobody_knows_goes_when_its_time_is_over() -> None:
    objects.delete_older_than(timedelta(0))
    key = objects.put(b"an image whose worker died", ImageFormat.PNG).key

    assert repair.old_images() == 0
    assert objects.delete_older_than(timedelta(days=1)) == 0
    assert objects._client().get_object(Bucket=settings.s3_bucket, Key=key)

    assert objects.delete_older_than(timedelta(0)) == 1
    listed = objects._client().list_objects_v2(Bucket=settings.s3_bucket)
    assert "Contents" not in listed
