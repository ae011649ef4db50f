"""What a worker does with a task, whatever goes wrong while it draws."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING

import httpx
import pytest
from PIL import Image
from sqlalchemy import func, select

from storage import objects, queue, tasks
from storage.database import transaction
from storage.errors import GenerationTimeout, ResourceExhausted
from storage.models import Task, TaskStatus
from storage.settings import settings
from tests import random_model
from tests.conftest import Canvas, employ
from tests.outages import remove_bucket
from worker import generate
from worker.leases import Leases
from worker.pipeline import TurboPipeline

if TYPE_CHECKING:
    from tests.conftest import Customer, Work

    Submit = Callable[..., Task]


def blank(asked: dict[str, int]) -> Image.Image:
    return Image.new("RGB", (asked["width"], asked["height"]))


class Raises:
    """A pipeline that draws half and then raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.times = 0

    def __call__(
        self, prompt: str, *, on_step: Callable[[int, int], None], **_: int
    ) -> Image.Image:
        self.times += 1
        on_step(4, 8)
        raise self.error


class Meanwhile:
    """A pipeline during which something else happens, and which then goes on drawing."""

    def __init__(self, happens: Callable[[], object]) -> None:
        self.happens = happens
        self.drew_to_the_end = False

    def __call__(
        self, prompt: str, *, on_step: Callable[[int, int], None], **asked: int
    ) -> Image.Image:
        self.happens()
        for _ in range(10_000_000):
            on_step(1, 8)
        self.drew_to_the_end = True
        return blank(asked)


@pytest.fixture(scope="session")
def real() -> TurboPipeline:
    model = random_model.assemble(0)
    model.set_progress_bar_config(disable=True)
    return TurboPipeline(model, model="random", device="cpu", dtype="float32")


def test_the_real_pipeline_draws_what_was_asked_for(
    customer: Customer, work: Work, real: TurboPipeline
) -> None:
    body = {"model": "z-image-turbo", "prompt": "a cat", "size": "400x376", "seed": 7}
    ids = [customer.http.post("/v1/images/generations", json=body).json()["id"] for _ in range(2)]
    work(real)

    links = [customer.http.get(f"/v1/tasks/{task_id}").json()["results"][0] for task_id in ids]
    first, second = (httpx.get(link) for link in links)
    image = Image.open(io.BytesIO(first.content))
    assert (image.format, image.size) == ("PNG", (400, 376))
    assert first.headers["content-type"] == "image/png"
    again = Image.open(io.BytesIO(second.content))
    assert image.tobytes() == again.tobytes()
    assert (image.info["seed"], again.info["seed"]) == ("7", "7")
    assert customer.books() == (1470, 0)


def test_a_pipeline_that_raises_fails_the_task_and_charges_nothing(
    customer: Customer, submit: Submit, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    task = submit(customer)
    work(Raises(KeyError("a secret of ours")))

    data = customer.http.get("/api/status", params={"task_id": task.id}).json()["data"]
    assert data["status"] == "FAILED"
    assert "try again" in data["error_message"]
    assert "secret" not in json.dumps(data)
    assert customer.books() == (1500, 0)
    assert "a secret of ours" in capsys.readouterr().out  # the log keeps the traceback


@pytest.mark.parametrize("error", [ResourceExhausted(), GenerationTimeout()])
def test_what_the_customer_may_know_is_said_in_its_own_words(
    customer: Customer, submit: Submit, work: Work, error: Exception
) -> None:
    task = submit(customer)
    work(Raises(error))

    ended = customer.task(task.id)
    assert ended.status is TaskStatus.FAILED
    assert ended.error_code == type(error).__name__
    assert ended.error_message == str(error)


def test_a_failing_task_does_not_stop_the_next(
    customer: Customer, submit: Submit, work: Work
) -> None:
    submit(customer)
    work(Raises(ValueError()))
    task = submit(customer)
    work()

    assert customer.task(task.id).status is TaskStatus.COMPLETED


def test_a_worker_that_is_stopped_hands_its_task_back(customer: Customer, submit: Submit) -> None:
    task = submit(customer)
    canvas = Canvas()
    worker = employ(canvas)
    worker.take()
    canvas.begun.wait()
    worker.hand_back()
    worker.close()

    assert customer.task(task.id).status is TaskStatus.PENDING
    assert customer.task(task.id).losses == 0
    assert customer.books() == (1500, 15)
    assert queue.count() == 2  # the job that was not taken here, and the one that rings again


def test_a_cancelled_task_is_not_drawn_to_its_end(
    customer: Customer, submit: Submit, work: Work
) -> None:
    task = submit(customer)

    def cancel() -> None:
        assert customer.http.post(f"/v1/tasks/{task.id}/cancel").status_code == 200

    pipeline = Meanwhile(cancel)
    work(pipeline)

    assert not pipeline.drew_to_the_end
    assert customer.task(task.id).status is TaskStatus.CANCELLED
    assert customer.books() == (1500, 0)


def test_progress_is_seen_while_it_is_drawn(customer: Customer, submit: Submit, work: Work) -> None:
    task = submit(customer)
    seen: list[int] = []

    class Half:
        def __call__(
            self, prompt: str, *, on_step: Callable[[int, int], None], **asked: int
        ) -> Image.Image:
            on_step(4, 8)
            while not seen or seen[-1] == 0:
                answer = customer.http.get(f"/v1/tasks/{task.id}").json()
                assert answer["status"] == "processing"
                seen.append(answer["progress"])
            return blank(asked)

    work(Half())

    assert seen[-1] == 50
    assert customer.task(task.id).progress == 100


def test_a_lease_is_kept_for_longer_than_it_lasts(
    customer: Customer, submit: Submit, work: Work
) -> None:
    task = submit(customer)

    class Slow:
        """Draws until the lease that came with the claim is over by the database's own clock."""

        def __call__(
            self, prompt: str, *, on_step: Callable[[int, int], None], **asked: int
        ) -> Image.Image:
            first = customer.task(task.id).lease_until
            assert first is not None
            while True:
                with transaction() as session:
                    now = session.execute(select(func.clock_timestamp())).scalar_one()
                    assert tasks.expired(session, 10) == []
                if now > first:
                    return blank(asked)

    work(Slow())

    assert customer.task(task.id).status is TaskStatus.COMPLETED


def test_a_task_past_its_time_limit_is_stopped_at_the_next_step(
    customer: Customer, submit: Submit
) -> None:
    submit(customer)
    with transaction() as session:
        task = tasks.claim_next(session, "tester")
    assert task is not None
    leases = Leases()
    held = leases.hold(task)
    held.step(1, 8)
    held.begin()
    assert held._deadline is not None
    held._deadline -= settings.task_timeout_s

    try:
        with pytest.raises(GenerationTimeout):
            held.step(2, 8)
    finally:
        leases.close()


def test_an_image_store_that_refuses_is_tried_again_and_then_fails_uncharged(
    customer: Customer, submit: Submit, work: Work
) -> None:
    task = submit(customer)
    objects.delete_older_than(timedelta(0))
    remove_bucket()
    try:
        work()
    finally:
        objects.make_bucket()

    ended = customer.task(task.id)
    assert ended.losses == settings.losses_max
    assert ended.error_code == "StorageUnavailable"
    assert customer.books() == (1500, 0)


def test_a_ring_too_many_finds_nothing(customer: Customer, submit: Submit, work: Work) -> None:
    submit(customer)
    queue.ring(5)
    work()

    assert customer.books() == (1485, 0)
    assert queue.count() == 0


def test_the_queue_shows_the_true_number_waiting(
    customer: Customer, submit: Submit, work: Work
) -> None:
    for _ in range(5):
        submit(customer)
    work(max_jobs=2)

    assert queue.count() == 3


def test_the_job_that_is_rung_for_is_the_one_the_worker_has() -> None:
    module, _, name = queue.GENERATE.rpartition(".")
    assert module == generate.__name__
    assert getattr(generate, name) is generate.run
