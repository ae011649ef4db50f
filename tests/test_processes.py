"""Real processes, killed without warning in the middle of their work: nothing is lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

import httpx
from sqlalchemy import select

from deploy import reach
from storage import events, queue
from storage.database import transaction
from storage.models import LedgerEntry, Task, TaskStatus

if TYPE_CHECKING:
    from tests.conftest import Customer
    from tests.warm import Warm

    Submit = Callable[..., Task]


SLEEPER = "benchmarks.sleeper"
"""A worker in everything but the drawing, and quick to start."""


def statuses() -> list[TaskStatus]:
    with transaction() as session:
        return list(session.scalars(select(Task.status)))


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not true():
        assert time.monotonic() < deadline, statuses()
        time.sleep(0.05)


def drawing() -> bool:
    """Whether a task is past its first step and not at its end."""
    with transaction() as session:
        found = session.scalars(select(Task).where(Task.status == TaskStatus.PROCESSING)).all()
    return any(task.progress > 0 for task in found)


def all_completed(times: int) -> Callable[[], bool]:
    return lambda: statuses() == [TaskStatus.COMPLETED] * times


def charged() -> list[str]:
    with transaction() as session:
        found = session.scalars(select(LedgerEntry.task_id).where(LedgerEntry.amount < 0))
        return sorted(task_id for task_id in found if task_id is not None)


def test_a_worker_killed_in_the_middle_and_redis_emptied_lose_nothing(
    customer: Customer, submit: Submit, warm: Warm
) -> None:
    submitted = [submit(customer) for _ in range(21)]
    with warm.process("api.courier"):
        with warm.process(SLEEPER, "--step-s", "0.5") as worker:
            wait_until(drawing)
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        with warm.process(SLEEPER, "--step-s", "0.01"):
            wait_until(lambda: TaskStatus.COMPLETED in statuses())
            queue.connection.flushall()
            wait_until(all_completed(21))
            wait_until(lambda: queue.workers() == 1)  # it tells again that it is there

    assert charged() == sorted(task.id for task in submitted)
    assert customer.books() == (1500 - 21 * 15, 0)
    with transaction() as session:
        drawn_again = session.scalars(select(Task.id).where(Task.losses == 1)).all()
    assert len(drawn_again) == 1


def test_a_worker_that_is_told_to_stop_finishes_its_task_first(
    customer: Customer, submit: Submit, warm: Warm
) -> None:
    for _ in range(2):
        submit(customer)
    with warm.process(SLEEPER, "--step-s", "0.2") as worker:
        wait_until(drawing)
        worker.send_signal(signal.SIGTERM)
        assert worker.wait() == 0

    assert sorted(statuses()) == [TaskStatus.COMPLETED, TaskStatus.PENDING]
    assert queue.count() == 1
    assert queue.workers() == 0


def test_a_courier_that_is_told_to_stop_does(warm: Warm) -> None:
    def listeners() -> int:
        count: int = queue.connection.pubsub_numsub(events.CHANNEL)[0][1]
        return count

    others = listeners()  # the API of these tests may be one
    with warm.process("api.courier") as courier:
        wait_until(lambda: listeners() > others)
        courier.send_signal(signal.SIGTERM)
        assert courier.wait() == 0


def test_an_api_process_that_is_told_to_stop_answers_first(customer: Customer, warm: Warm) -> None:
    port = reach.free_port()
    answers: list[int] = []
    with (
        warm.process("api", "serve", ZIMAGE_PORT=str(port)) as api,
        httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {customer.key}"}
        ) as http,
    ):
        wait_until(lambda: _answers(http))
        body = {"prompt": "a cat", "aspect_ratio": "1:1"}

        with suppress(httpx.TransportError):  # until it no longer listens
            for _ in range(50):
                answers.append(http.post("/api/generate", json=body).status_code)
                if len(answers) == 5:
                    api.send_signal(signal.SIGTERM)
        assert api.wait() == -signal.SIGTERM  # uvicorn ends by the signal, once it has answered

    assert set(answers) == {200}
    assert len(statuses()) == len(answers)  # what was answered is there, and nothing else


def test_an_api_process_that_is_told_to_stop_lets_those_go_who_wait(
    customer: Customer, warm: Warm
) -> None:
    port = reach.free_port()
    messages = {"messages": [{"role": "user", "content": [{"text": "a cat"}]}]}
    held = "/api/v1/services/aigc/multimodal-generation/generation"
    with (
        warm.process("api", "serve", ZIMAGE_PORT=str(port)) as api,
        httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {customer.key}"},
            timeout=100,
        ) as http,
        ThreadPoolExecutor(3) as pool,
    ):
        wait_until(lambda: _answers(http))
        body = {"model": "z-image-turbo", "prompt": "a cat"}
        task_id = http.post("/v1/images/generations", json=body).json()["id"]
        path = f"/v1/tasks/{task_id}"
        waits = pool.submit(http.get, path, headers={"Prefer": "wait=60"})
        holds = pool.submit(http.post, held, json={"model": "z-image-turbo", "input": messages})
        wait_until(lambda: len(statuses()) == 2)
        with http.stream("GET", f"{path}/events") as follows:
            lines = follows.iter_lines()
            wait_until(lambda: next(lines).startswith("data:"))
            api.send_signal(signal.SIGTERM)
            assert not [line for line in lines if line.startswith("data:")]

        assert waits.result().json()["status"] == "pending"
        assert holds.result().status_code == 503
        assert api.wait() == -signal.SIGTERM

    # Whoever was held and got no image does not pay for it; whoever polls finds the task.
    assert sorted(statuses()) == [TaskStatus.CANCELLED, TaskStatus.PENDING]


def _answers(http: httpx.Client) -> bool:
    try:
        return http.get("/health").status_code == 200
    except httpx.TransportError:
        return False
