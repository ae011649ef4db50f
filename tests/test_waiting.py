"""Whoever waits is woken by what happens, hears all of it, and holds nothing but a coroutine."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from httpx_sse import EventSource, ServerSentEvent

from api import batching
from api.batching import Batcher
from api.waiting import Waiting
from storage import events, queue, tasks
from storage.database import transaction
from storage.errors import GenerationFailed, ServiceUnavailable
from storage.models import TaskStatus
from tests.conftest import Paint

if TYPE_CHECKING:
    from storage.models import Task
    from tests.conftest import Customer, NewCustomer, Work

    Submit = Callable[..., Task]

CAT: dict[str, Any] = {"model": "z-image-turbo", "prompt": "a cat", "seed": 7}


def create(customer: Customer) -> str:
    task_id: str = customer.http.post("/v1/images/generations", json=CAT).json()["id"]
    return task_id


@contextmanager
def following(customer: Customer, task_id: str, **headers: str) -> Iterator[Iterator[Any]]:
    """The bodies of a task's events, as they come."""
    with customer.http.stream("GET", f"/v1/tasks/{task_id}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield bodies(EventSource(answer).iter_sse())


def bodies(stream: Iterator[ServerSentEvent]) -> Iterator[Any]:
    for event in stream:
        if event.event == "task":
            yield json.loads(event.data)


def claim() -> tasks.Claim:
    with transaction() as session:
        task = tasks.claim_next(session, "a worker")
    assert task is not None
    events.publish(task)
    return tasks.claim_of(task)


def progress(claim: tasks.Claim, percent: int) -> None:
    with transaction() as session:
        assert tasks.renew(session, {claim: percent})
    events.publish_progress(claim.task_id)


# --- Events ---------------------------------------------------------------------------------------


def test_a_task_is_followed_from_the_queue_to_its_image(customer: Customer, work: Work) -> None:
    first, second = create(customer), create(customer)
    with following(customer, second) as events_of_second:
        assert next(events_of_second)["task_info"]["queue_position"] == 1

        held = claim()
        moved_up = next(events_of_second)
        assert (moved_up["status"], moved_up["task_info"]["queue_position"]) == ("pending", 0)
        with transaction() as session:
            tasks.hand_back(session, held)
        work()
        rest = list(events_of_second)

    assert [body["progress"] for body in rest] == sorted(body["progress"] for body in rest)
    assert rest[-1] == customer.http.get(f"/v1/tasks/{second}").json()
    assert rest[-1]["status"] == "completed"
    assert held.task_id == first


def test_each_step_is_told(customer: Customer) -> None:
    task_id = create(customer)
    with following(customer, task_id) as stream:
        assert next(stream)["status"] == "pending"
        held = claim()
        assert next(stream)["status"] == "processing"
        for percent in (12, 25, 99):
            progress(held, percent)
            body = next(stream)
            assert (body["status"], body["progress"]) == ("processing", percent)
            assert "queue_position" not in body["task_info"]
        with transaction() as session:
            ended = tasks.fail(session, held, GenerationFailed())
        assert ended is not None
        events.publish(ended)

        assert next(stream)["error"]["code"] == "service_error"
        assert list(stream) == []


def test_a_worker_tells_its_steps(customer: Customer, work: Work) -> None:
    told = threading.Event()

    class Patient(Paint):
        """Draws on once its first step was heard of."""

        def __call__(
            self, prompt: str, *, on_step: Callable[[int, int], None], **asked: int
        ) -> Any:
            on_step(1, 8)
            assert told.wait(30)
            return super().__call__(prompt, on_step=on_step, **asked)

    task_id = create(customer)
    seen = []

    def follow() -> None:
        with following(customer, task_id) as stream:
            for body in stream:
                seen.append((body["status"], body["progress"]))
                if body["progress"] == 12:
                    told.set()
        told.set()

    follower = threading.Thread(target=follow)
    follower.start()
    work(Patient())
    follower.join(30)

    assert ("processing", 12) in seen
    assert seen[-1] == ("completed", 100)


def test_whoever_comes_back_hears_the_present_state_first(customer: Customer, work: Work) -> None:
    task_id = create(customer)
    with following(customer, task_id) as stream:
        next(stream)
    work()

    with following(customer, task_id, **{"Last-Event-ID": "pending-0-0"}) as stream:
        (only,) = stream

    assert only["status"] == "completed"


def test_a_stream_is_refused_like_a_query(customer: Customer, new_customer: NewCustomer) -> None:
    task_id = create(customer)
    for http, path, status in (
        (customer.http, "/v1/tasks/x/events", 400),
        (customer.http, "/v1/tasks/task-unified-1757165031-uyujaw3d/events", 404),
        (new_customer().http, f"/v1/tasks/{task_id}/events", 404),
    ):
        answer = http.get(path)
        assert answer.status_code == status
        assert "error" in answer.json()
    with httpx.Client(base_url=customer.http.base_url, verify=False) as stranger:
        assert stranger.get(f"/v1/tasks/{task_id}/events").status_code == 401


def test_cancelling_while_waiting_is_heard_at_once(customer: Customer) -> None:
    task_id = create(customer)
    with following(customer, task_id) as stream:
        next(stream)

        answer = customer.http.post(f"/v1/tasks/{task_id}/cancel")

        assert answer.json() == next(stream)
    assert answer.json()["error"]["code"] == "request_cancelled"
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_who_prefers_to_wait_is_cancelled_and_followed_at_once(customer: Customer) -> None:
    task_id = create(customer)
    with following(customer, task_id, Prefer="wait=5") as stream:
        assert next(stream)["status"] == "pending"

        answer = customer.http.post(f"/v1/tasks/{task_id}/cancel", headers={"Prefer": "wait=5"})

        assert "preference-applied" not in answer.headers
        assert next(stream)["error"]["code"] == "request_cancelled"


def test_a_task_that_is_cancelled_while_it_is_drawn_stops_at_a_step(
    customer: Customer, work: Work
) -> None:
    steps = []
    task_id = create(customer)

    class Cancelled(Paint):
        """Hears of each step, and cancels after the first."""

        def __call__(
            self, prompt: str, *, on_step: Callable[[int, int], None], **asked: int
        ) -> Any:
            for step in range(1, 1000):
                steps.append(step)
                if step == 1:
                    assert customer.http.post(f"/v1/tasks/{task_id}/cancel").status_code == 200
                on_step(step, 1000)
                renewed.wait(0.02)
            raise AssertionError("was not stopped")

    renewed = threading.Event()
    work(Cancelled())

    assert len(steps) < 100
    assert customer.task(task_id).status is TaskStatus.CANCELLED
    assert customer.books() == (Decimal(1500), Decimal(0))


# --- Within the process ---------------------------------------------------------------------------


def waiting() -> Waiting:
    return Waiting(Batcher(batching.find))


def test_many_wait_for_one_task_and_all_are_woken(customer: Customer, submit: Submit) -> None:
    task = submit(customer)

    async def wait() -> list[list[Task]]:
        here = waiting()
        waits = [
            asyncio.create_task(here.until_ended(customer.id, [task.id], 30)) for _ in range(200)
        ]
        await asyncio.sleep(0)
        await asyncio.to_thread(_complete)
        found = await asyncio.gather(*waits)
        assert not here._watches
        await here.close()
        return found

    def _complete() -> None:
        with transaction() as session:
            ended = tasks.cancel(session, task.id)
        events.publish(ended)

    found = asyncio.run(wait())

    assert {each.status for (each,) in found} == {TaskStatus.CANCELLED}


def test_several_tasks_are_waited_for_until_the_last_has_ended(
    customer: Customer, submit: Submit
) -> None:
    made = [submit(customer) for _ in range(3)]

    async def wait() -> list[Task]:
        here = waiting()
        waits = asyncio.create_task(here.until_ended(customer.id, [t.id for t in made], 30))
        for task in made:
            assert not waits.done()
            await asyncio.to_thread(_cancel, task)
        found = await waits
        await here.close()
        return found

    def _cancel(task: Task) -> None:
        with transaction() as session:
            ended = tasks.cancel(session, task.id)
        events.publish(ended)

    found = asyncio.run(wait())

    assert [task.id for task in found] == [task.id for task in made]
    assert all(task.status is TaskStatus.CANCELLED for task in found)


def test_an_end_that_no_event_told_is_found_by_looking(
    customer: Customer, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.waiting.LOOK_S", 0.05)
    task = submit(customer)

    async def wait() -> Task:
        here = waiting()
        waits = asyncio.create_task(here.until_ended(customer.id, [task.id], 30))
        await asyncio.to_thread(_cancel_silently)
        (found,) = await waits
        await here.close()
        return found

    def _cancel_silently() -> None:
        with transaction() as session:
            tasks.cancel(session, task.id)

    assert asyncio.run(wait()).status is TaskStatus.CANCELLED


def test_a_connection_to_redis_that_breaks_is_made_again(
    customer: Customer, submit: Submit
) -> None:
    task = submit(customer)

    async def wait() -> Task:
        here = waiting()
        waits = asyncio.create_task(here.until_ended(customer.id, [task.id], 30))
        while not here._hears:  # noqa: ASYNC110 - nothing tells it
            await asyncio.sleep(0.01)
        queue.connection.client_kill_filter(_type="pubsub")
        await asyncio.to_thread(_cancel)
        (found,) = await waits
        await here.close()
        return found

    def _cancel() -> None:
        with transaction() as session:
            ended = tasks.cancel(session, task.id)
        events.publish(ended)

    assert asyncio.run(wait()).status is TaskStatus.CANCELLED


def test_a_listener_can_be_stopped_at_any_moment() -> None:
    async def listen() -> None:
        async for _ in events.listen():
            pass

    async def stop_after(delay_s: float) -> None:
        listener = asyncio.create_task(listen())
        await asyncio.sleep(delay_s)
        async with asyncio.timeout(30):
            await events.stop(listener)
        assert listener.cancelled()

    async def stop_at_many_moments() -> None:
        for half_ms in range(20):
            await stop_after(half_ms / 2000)

    asyncio.run(stop_at_many_moments())


def test_when_the_process_stops_nobody_waits_on(customer: Customer, submit: Submit) -> None:
    task = submit(customer)

    async def wait() -> tuple[Task, list[TaskStatus]]:
        here = waiting()
        waits = asyncio.create_task(here.until_ended(customer.id, [task.id], 300))
        heard = []
        follows_now = asyncio.Event()

        async def follow() -> None:
            async for state in here.states(customer.id, task.id):
                if state is not None:
                    heard.append(state.task.status)
                    follows_now.set()

        follows = asyncio.create_task(follow())
        await follows_now.wait()
        here.stop()
        (found,) = await waits
        await follows
        await here.close()
        return found, heard

    found, heard = asyncio.run(wait())

    assert found.status is TaskStatus.PENDING
    assert heard == [TaskStatus.PENDING]


def test_no_more_than_a_bounded_number_may_wait(
    customer: Customer, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.waiting.WATCHES_MAX", 2)
    task = submit(customer)

    async def wait() -> None:
        here = waiting()
        waits = [
            asyncio.create_task(here.until_ended(customer.id, [task.id], 30)) for _ in range(2)
        ]
        await asyncio.sleep(0)
        with pytest.raises(ServiceUnavailable):
            await here.until_ended(customer.id, [task.id], 30)
        here.stop()
        await asyncio.gather(*waits)
        await here.close()

    asyncio.run(wait())


def test_a_place_in_the_queue_is_counted_by_fair_tags(
    new_customer: NewCustomer, submit: Submit
) -> None:
    busy, modest = new_customer(), new_customer()
    many = [submit(busy, width=1024, height=1024) for _ in range(5)]
    one = submit(modest, width=1024, height=1024)

    asked = [(task.account_id, task.id) for task in (*many, one)]
    found = asyncio.run(tasks.find_many(asked))
    places = [found[each].place or 0 for each in asked]

    assert sorted(places) == [0, 1, 2, 3, 4, 5]
    assert places[-1] <= 1
    assert places[:5] == sorted(places[:5])
