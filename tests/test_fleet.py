"""Several worker processes: one hangs, one is killed, and every task ends right all the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from sqlalchemy import select, text, update

from storage import queue
from storage.database import transaction
from storage.models import Task, TaskStatus
from tests.test_processes import SLEEPER, all_completed, charged, statuses, wait_until
from worker.stages import EXIT_HUNG

if TYPE_CHECKING:
    from tests.conftest import Customer
    from tests.warm import Warm

    Submit = Callable[..., Task]


def test_a_hung_gpu_ends_its_worker_and_its_task_is_drawn_elsewhere(
    customer: Customer, submit: Submit, warm: Warm
) -> None:
    submitted = [submit(customer) for _ in range(2)]
    with warm.process(
        SLEEPER, "--step-s", "0.01", "--hang-at", "3", ZIMAGE_STEP_TIMEOUT_S="1"
    ) as hung:
        assert hung.wait() == EXIT_HUNG
    # Given back by the process itself, before any lease ran out.
    assert statuses() == [TaskStatus.PENDING] * 2

    with warm.process(SLEEPER, "--step-s", "0.01"):
        wait_until(all_completed(2))

    assert charged() == sorted(task.id for task in submitted)
    assert customer.books() == (1470, 0)
    with transaction() as session:
        assert session.scalars(select(Task.losses).order_by(Task.losses)).all() == [0, 1]


def test_a_task_that_hangs_every_gpu_fails_uncharged(
    customer: Customer, submit: Submit, warm: Warm
) -> None:
    task = submit(customer)
    with transaction() as session:
        hung_before = {"losses": 2, "attempt": 2}
        session.execute(text("SET LOCAL session_replication_role = replica"))
        session.execute(update(Task).where(Task.id == task.id).values(**hung_before))
    with warm.process(SLEEPER, "--hang-at", "1", ZIMAGE_STEP_TIMEOUT_S="0.5") as hung:
        assert hung.wait() == EXIT_HUNG

    assert customer.task(task.id).error_code == "WorkerLost"
    assert customer.books() == (1500, 0)


def test_one_of_four_workers_is_killed_and_nothing_is_lost(
    customer: Customer, submit: Submit, warm: Warm
) -> None:
    def all_draw() -> bool:
        with transaction() as session:
            drawing = select(Task.worker).where(Task.status == TaskStatus.PROCESSING).distinct()
            return len(session.scalars(drawing).all()) == 4

    submitted = [submit(customer) for _ in range(20)]
    with warm.process("api.courier"), ExitStack() as stack:
        workers = [stack.enter_context(warm.process(SLEEPER, "--step-s", "0.03")) for _ in range(4)]
        wait_until(lambda: queue.workers() == 4)
        submitted += [submit(customer) for _ in range(12)]
        wait_until(all_draw)
        workers[0].kill()
        workers[0].wait()
        wait_until(all_completed(32))

    assert charged() == sorted(task.id for task in submitted)
    assert customer.books() == (1500 - 32 * 15, 0)
    with transaction() as session:
        lost = session.scalars(select(Task.losses).where(Task.losses > 0)).all()
        by = session.scalars(select(Task.worker).distinct()).all()
    assert lost
    assert set(lost) == {1}
    assert len(by) >= 3
