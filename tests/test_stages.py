"""The stages of a worker: none waits for another, each is bounded, each fails for one task only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from storage import events, objects, queue
from storage.database import transaction
from storage.errors import ResourceExhausted, RewriteFailed
from storage.models import Task, TaskStatus
from storage.tasks import Rewrite
from tests.conftest import MODERATION, OneByOne, Paint, employ
from tests.outages import remove_bucket
from tests.test_processes import wait_until
from worker import stages
from worker.drawing import Drawing, Picture
from worker.stages import Worker
from worker.watch import Watch

if TYPE_CHECKING:
    from tests.conftest import Customer, Work

    Submit = Callable[..., Task]

REWRITE = Rewrite("a cat in a hat", "cats like hats", 5, 9, 4)


@contextmanager
def working(worker: Worker) -> Iterator[Worker]:
    """`worker` beside the test, as RQ would drive it."""
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            if worker.wait_until_wanted(0.01):
                worker.take()
                ended.wait(0.01)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield worker
    finally:
        ended.set()
        thread.join()
        worker.close()


def statuses(submitted: Sequence[Task]) -> list[TaskStatus]:
    with transaction() as session:
        return [session.get_one(Task, task.id).status for task in submitted]


def processing(submitted: Sequence[Task]) -> int:
    return statuses(submitted).count(TaskStatus.PROCESSING)


def _same(image: Image.Image) -> Image.Image:
    return image


def _after(event: threading.Event, picture: Picture) -> Image.Image:
    event.wait()
    return picture()


class Together:
    """A pipeline that draws up to four together, and remembers which."""

    def __init__(
        self, on_step: Callable[[Drawing, int], None] = lambda drawing, done: None
    ) -> None:
        self.batches: list[int] = []
        self._on_step = on_step
        self.read = OneByOne(Paint()).read

    def batch_max(self, width: int, height: int, steps: int) -> int:
        return 4

    def draw(self, drawings: Sequence[Drawing]) -> list[Picture | BaseException]:
        self.batches.append(len(drawings))
        results: dict[int, Picture | BaseException] = {}
        for done in range(1, 9):
            for index, drawing in enumerate(drawings):
                if index in results:
                    continue
                try:
                    self._on_step(drawing, done)
                    drawing.on_step(done)
                except Exception as error:
                    results[index] = error
        for index, drawing in enumerate(drawings):
            image = Image.new("RGB", (drawing.width, drawing.height), (drawing.seed, 0, 0))
            results.setdefault(index, partial(_same, image))
        return [results[index] for index in range(len(drawings))]


# --- The GPU never waits ------------------------------------------------------------------------


def test_the_next_task_is_claimed_while_the_one_before_is_at_its_last_steps(
    customer: Customer, submit: Submit
) -> None:
    submitted = [submit(customer) for _ in range(3)]
    claimed: dict[int, int] = {}

    def draw(prompt: str, *, on_step: Callable[[int, int], None], **asked: int) -> Image.Image:
        for done in range(1, 9):
            on_step(done, 8)
            if len(claimed) < 8:
                if done == 8 - stages.LOOK_AHEAD_STEPS:
                    wait_until(lambda: processing(submitted) == 2)
                claimed[done] = processing(submitted)
        return Image.new("RGB", (asked["width"], asked["height"]))

    with working(employ(draw)):
        wait_until(lambda: statuses(submitted) == [TaskStatus.COMPLETED] * 3)

    # Not before, so that a worker that is free earlier can have it; and one, not all that wait.
    assert list(claimed.values()) == [1] * 5 + [2] * 3


def test_the_gpu_draws_on_while_an_image_is_finished(customer: Customer, submit: Submit) -> None:
    submitted = [submit(customer) for _ in range(2)]
    second_is_drawn = threading.Event()

    class SlowPixels(OneByOne):
        def draw(self, drawings: Sequence[Drawing]) -> list[Picture | BaseException]:
            (picture,) = super().draw(drawings)
            assert callable(picture)
            if drawings[0].seed == submitted[1].seed:
                second_is_drawn.set()
            return [partial(_after, second_is_drawn, picture)]

    with working(employ(SlowPixels(Paint()))):
        wait_until(lambda: statuses(submitted) == [TaskStatus.COMPLETED] * 2)


def test_what_is_drawn_and_cannot_be_finished_stops_the_intake(
    customer: Customer, submit: Submit
) -> None:
    most = stages.FINISHING_MAX + 2  # one that is drawn and finds no room, one ahead of it
    submitted = [submit(customer) for _ in range(most + 5)]
    go_on = threading.Event()

    class Stuck(OneByOne):
        def draw(self, drawings: Sequence[Drawing]) -> list[Picture | BaseException]:
            (picture,) = super().draw(drawings)
            assert callable(picture)
            return [partial(_after, go_on, picture)]

    with working(employ(Stuck(Paint()))) as worker:
        wait_until(lambda: processing(submitted) == most)
        assert not worker.wait_until_wanted(1)
        assert processing(submitted) == most
        go_on.set()
        wait_until(lambda: statuses(submitted) == [TaskStatus.COMPLETED] * len(submitted))

    assert customer.books() == (1500 - 15 * len(submitted), 0)


def test_an_image_waits_for_a_store_that_comes_back(
    customer: Customer, submit: Submit, capsys: pytest.CaptureFixture[str]
) -> None:
    task = submit(customer)
    objects.delete_older_than(timedelta(0))
    remove_bucket()
    try:
        with working(employ(Paint())):
            printed = ""
            while "task.stored_later" not in printed:
                printed += capsys.readouterr().out
            objects.make_bucket()
            wait_until(lambda: statuses([task]) == [TaskStatus.COMPLETED])
    finally:
        objects.make_bucket()

    assert customer.task(task.id).losses == 0


@pytest.mark.parametrize("broken", ["pixels", "read"])
def test_a_failure_in_one_stage_is_the_end_of_its_own_task_only(
    customer: Customer, submit: Submit, work: Work, broken: str
) -> None:
    first, middle, last = (submit(customer, prompt=name) for name in ("one", "two", "three"))

    class Breaks(OneByOne):
        def read(self, prompt: str) -> object:  # type: ignore[override]
            if broken == "read" and prompt == "two":
                raise ValueError("a bug")
            return super().read(prompt)

        def draw(self, drawings: Sequence[Drawing]) -> list[Picture | BaseException]:
            (picture,) = super().draw(drawings)
            if broken == "pixels" and drawings[0].seed == middle.seed:
                return [lambda: 1 / 0]  # type: ignore[list-item,return-value]
            return [picture]

    work(Breaks(Paint()))

    completed, failed = TaskStatus.COMPLETED, TaskStatus.FAILED
    assert statuses([first, middle, last]) == [completed, failed, completed]
    assert customer.task(middle.id).error_code == "GenerationFailed"
    assert customer.books() == (1470, 0)


# --- Drawn together -----------------------------------------------------------------------------


def test_tasks_of_one_size_and_steps_that_wait_are_drawn_together(
    customer: Customer, submit: Submit, work: Work
) -> None:
    alike = [submit(customer, seed=seed) for seed in range(1, 6)]
    other_size = submit(customer, width=128)
    other_steps = submit(customer, steps=4)
    pipeline = Together()
    work(pipeline)

    assert pipeline.batches == [4, 1, 1, 1]
    assert set(statuses([*alike, other_size, other_steps])) == {TaskStatus.COMPLETED}
    for task in alike:
        drawn = customer.task(task.id)
        image = Image.open(BytesIO(objects.get(drawn.image_key or "")))
        assert image.getpixel((0, 0)) == (task.seed, 0, 0)


def test_one_of_a_batch_that_is_cancelled_ends_and_the_others_are_drawn(
    customer: Customer, submit: Submit, work: Work
) -> None:
    submitted = [submit(customer, seed=seed) for seed in (1, 2, 3)]
    steps: dict[int, int] = {}

    def cancel_the_second(drawing: Drawing, done: int) -> None:
        if drawing.seed == 2:
            if done == 3:
                path = f"/v1/tasks/{submitted[1].id}/cancel"
                assert customer.http.post(path).status_code == 200
            if done > 3:
                threading.Event().wait(0.2)  # a step's time, in which it is heard of
            steps[done] = done

    work(Together(cancel_the_second))

    cancelled, completed = TaskStatus.CANCELLED, TaskStatus.COMPLETED
    assert statuses(submitted) == [completed, cancelled, completed]
    assert max(steps) <= 5
    assert customer.books() == (1470, 0)


def test_a_cancel_is_told_to_the_workers() -> None:
    stopped = threading.Event()
    heard: list[str] = []

    def listen() -> None:
        for task_id in events.cancelled(stopped):
            heard.append(task_id)
            stopped.set()

    listener = threading.Thread(target=listen)
    listener.start()
    task = Task(id="task-1", status=TaskStatus.CANCELLED)
    while not heard:
        events.publish(Task(id="task-0", status=TaskStatus.COMPLETED))
        events.publish(task)
    listener.join()
    assert heard == ["task-1"]


# --- A smaller picture, where the caller allowed it ---------------------------------------------


def _no_room(prompt: str, *, width: int, height: int, **asked: object) -> Image.Image:
    if width * height > 600 * 500:
        raise ResourceExhausted
    return Image.new("RGB", (width, height))


def test_a_smaller_picture_is_drawn_only_where_it_was_allowed(
    customer: Customer, submit: Submit, work: Work
) -> None:
    strict = submit(customer, width=1024, height=768)
    easy = submit(customer, width=1024, height=768, allow_downscale=True)
    work(_no_room)

    refused, drawn = customer.task(strict.id), customer.task(easy.id)
    assert (refused.status, refused.error_code) == (TaskStatus.FAILED, "ResourceExhausted")
    assert drawn.status is TaskStatus.COMPLETED
    assert (drawn.image_width, drawn.image_height) == (592, 448)
    assert drawn.downscaled
    assert customer.books() == (1485, 0)


def test_what_does_not_fit_at_the_smaller_size_fails(
    customer: Customer, submit: Submit, work: Work
) -> None:
    def never(*_: object, **__: object) -> Image.Image:
        raise ResourceExhausted

    tasks_ = [submit(customer, width=w, height=512, allow_downscale=True) for w in (512, 2048)]
    work(never)

    assert {customer.task(task.id).error_code for task in tasks_} == {"ResourceExhausted"}
    assert customer.books() == (1500, 0)


# --- Rewriting ----------------------------------------------------------------------------------


def test_a_prompt_is_rewritten_once_and_then_drawn(
    customer: Customer, submit: Submit, work: Work
) -> None:
    task = submit(customer, prompt_extend=True)
    drawn: list[str] = []

    def rewrite(prompt: str, *, seed: int, check: Callable[[], None]) -> Rewrite:
        assert (prompt, seed) == (task.prompt, task.seed)
        check()
        return REWRITE

    def draw(prompt: str, **asked: object) -> Image.Image:
        drawn.append(prompt)
        if len(drawn) == 1:
            worker.hand_back()
        return Paint()(prompt, **asked)  # type: ignore[arg-type]

    worker = employ(draw, rewriter=rewrite)
    with working(worker):
        wait_until(lambda: drawn != [] and statuses([task]) != [TaskStatus.PROCESSING])
    work(draw)  # by a worker that has nobody who rewrites

    ended = customer.task(task.id)
    assert drawn == ["a cat in a hat"] * 2
    assert ended.status is TaskStatus.COMPLETED
    assert (ended.rewritten_prompt, ended.reasoning) == (REWRITE.text, REWRITE.reasoning)
    assert (ended.rewrite_input_tokens, ended.rewrite_output_tokens) == (5, 9)
    assert ended.rewrite_reasoning_tokens == 4


def test_a_rewriting_holds_up_nobody_else_and_no_more_are_claimed_than_can_be_rewritten(
    customer: Customer, submit: Submit
) -> None:
    slow = [submit(customer, prompt_extend=True) for _ in range(2)]
    quick = submit(customer)
    go_on = threading.Event()

    def rewrite(prompt: str, *, seed: int, check: Callable[[], None]) -> Rewrite:
        go_on.wait()
        return REWRITE

    with working(employ(Paint(), rewriter=rewrite)):
        wait_until(lambda: statuses([quick]) == [TaskStatus.COMPLETED])
        assert statuses(slow) == [TaskStatus.PROCESSING, TaskStatus.PENDING]
        go_on.set()
        wait_until(lambda: statuses(slow) == [TaskStatus.COMPLETED] * 2)


def test_a_rewriting_that_fails_costs_nothing(
    customer: Customer, submit: Submit, work: Work
) -> None:
    def refuse(prompt: str, *, seed: int, check: Callable[[], None]) -> Rewrite:
        raise RewriteFailed

    task = submit(customer, prompt_extend=True)
    work(rewriter=refuse)

    assert customer.task(task.id).error_code == "RewriteFailed"
    assert customer.books() == (1500, 0)


def test_a_worker_that_stops_leaves_a_rewriting_to_another(
    customer: Customer, submit: Submit
) -> None:
    task = submit(customer, prompt_extend=True)
    begun = threading.Event()

    def rewrite(prompt: str, *, seed: int, check: Callable[[], None]) -> Rewrite:
        begun.set()
        while True:
            check()
            threading.Event().wait(0.01)

    worker = employ(Paint(), rewriter=rewrite)
    worker.take()
    begun.wait()
    worker.stop()
    worker.close()

    assert statuses([task]) == [TaskStatus.PENDING]
    assert customer.task(task.id).losses == 0
    assert queue.count() >= 2


# --- What can be said of a worker ---------------------------------------------------------------


def test_a_task_knows_how_much_of_its_prompt_was_read(
    customer: Customer, submit: Submit, work: Work
) -> None:
    class Short(OneByOne):
        def read(self, prompt: str) -> object:  # type: ignore[override]
            whole = super().read(prompt)
            return type(whole)(whole.tokens[:4], whole.given)

    task = submit(customer, prompt="abcdefg")
    work(Short(Paint()))

    ended = customer.task(task.id)
    assert (ended.prompt_tokens, ended.prompt_tokens_read) == (7, 4)


def test_a_worker_says_what_it_is_doing(customer: Customer, submit: Submit) -> None:
    task = submit(customer)
    seen: list[dict[str, object]] = []

    def draw(prompt: str, **asked: object) -> Image.Image:
        seen.append(worker.facts())
        return Paint()(prompt, **asked)  # type: ignore[arg-type]

    worker = employ(draw)
    with working(worker):
        wait_until(lambda: statuses([task]) == [TaskStatus.COMPLETED])
        worker.drain()
        seen.append(worker.facts())

    assert [(facts["state"], facts["claimed"]) for facts in seen] == [("drawing", 1), ("idle", 0)]
    assert [facts["images_total"] for facts in seen] == [0, 1]
    assert seen[-1]["images_per_minute"] == 1


# --- A GPU that hangs ---------------------------------------------------------------------------


def test_what_makes_no_step_is_told_once_and_what_rests_is_not() -> None:
    told: list[set[object]] = []
    hung = threading.Event()

    def on_hang(keys: set[object]) -> None:
        told.append(keys)
        hung.set()

    watch = Watch(0.2, on_hang)
    watch.step("hangs")
    watch.step("waits for room")
    watch.rest("waits for room")
    while not hung.wait(0.02):
        watch.step("goes on")
    watch.close()

    assert told == [{"hangs"}]


def test_pixels_that_never_come_are_a_hung_gpu(customer: Customer, submit: Submit) -> None:
    """A GPU may have everything in its queue when it hangs, and nobody draws any more."""
    task = submit(customer)
    go_on, exited = threading.Event(), threading.Event()

    class NoPixels(OneByOne):
        def draw(self, drawings: Sequence[Drawing]) -> list[Picture | BaseException]:
            (picture,) = super().draw(drawings)
            assert callable(picture)
            return [partial(_after, go_on, picture)]

    worker = Worker("tester", NoPixels(Paint()), moderation=MODERATION, on_hang=exited.set)
    worker._watch._timeout_s = 0.2
    worker.take()
    exited.wait()
    try:
        assert statuses([task]) == [TaskStatus.PENDING]
        assert customer.task(task.id).losses == 1
    finally:
        go_on.set()
        worker.close()
