"""A worker whose clock is wrong would sign wrong URLs: it leaves the tasks to others."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
import time_machine

from storage import queue
from storage.models import Task, TaskStatus
from tests.conftest import Paint, employ
from worker import clock

if TYPE_CHECKING:
    from tests.conftest import Customer

    Submit = Callable[..., Task]


@pytest.mark.parametrize("off_s", [-(clock.OFF_MAX_S + 5), clock.OFF_MAX_S + 5])
def test_a_worker_with_a_wrong_clock_leaves_the_task_and_its_bell_to_others(
    customer: Customer, submit: Submit, off_s: int
) -> None:
    task = submit(customer)
    queue.connection.flushdb()
    worker = employ(Paint())
    try:
        with time_machine.travel(datetime.now(UTC) + timedelta(seconds=off_s), tick=True):
            worker.take()

            assert worker.facts()["state"] == "clock_wrong"
            assert not worker.wait_until_wanted(0)
    finally:
        worker.close()
    left = customer.task(task.id)
    assert (left.status, left.attempt) == (TaskStatus.PENDING, 0)
    assert queue.count() == 1


def test_a_clock_that_is_a_little_off_is_good_enough(customer: Customer, submit: Submit) -> None:
    task = submit(customer)
    worker = employ(Paint())
    try:
        off = timedelta(seconds=clock.OFF_MAX_S - 5)
        with time_machine.travel(datetime.now(UTC) + off, tick=True):
            worker.take()
            worker.drain()
    finally:
        worker.close()
    assert customer.task(task.id).status is TaskStatus.COMPLETED
