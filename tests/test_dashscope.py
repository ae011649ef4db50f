"""DashScope's format, field by field and edge by edge; what is refused leaves nothing behind.

The bodies are those of Alibaba's pages; what we chose beyond them is said in the dialect.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import httpx
import pytest
from PIL import Image
from sqlalchemy import select, update

from api.dialects.dashscope import ERRORS, render_error
from api.dialects.dashscope.routes import SYNC_TIMEOUT_S
from api.dialects.routing import BODY_MAX_BYTES
from api.orders import DEADLINE_MARGIN_S
from storage import accounts, errors, events, queue, tasks
from storage.database import transaction
from storage.models import Task, TaskStatus
from storage.settings import settings
from storage.tasks import Rewrite
from tests.conftest import Atelier, OneByOne, Paint, assert_untouched, case
from worker.drawing import Reading

if TYPE_CHECKING:
    from tests.conftest import Canvas, Customer, NewCustomer, Work
    from worker.drawing import Rewriter

    Submit = Callable[..., Task]

SERVICES = "/api/v1/services/aigc"
MULTIMODAL = f"{SERVICES}/multimodal-generation/generation"
GENERATION = f"{SERVICES}/image-generation/generation"
SYNTHESIS = f"{SERVICES}/text2image/image-synthesis"
CREATES = (MULTIMODAL, GENERATION, SYNTHESIS)
ENABLE = {"X-DashScope-Async": "enable"}
JSON_TYPE = {"Content-Type": "application/json"}
PROMPT = "film grain, a red fox in the snow"
READ = {"prompt_tokens": len(PROMPT), "prompt_tokens_read": len(PROMPT)}
"""What `usage` says of PROMPT, of which a test's pipeline reads each byte."""
BEIJING = timezone(timedelta(hours=8))
UNKNOWN_ID = "task-unified-1757165031-uyujaw3d"


def asking(text: object = PROMPT, **parameters: object) -> dict[str, Any]:
    """The body of a create with messages."""
    messages = [{"role": "user", "content": [{"text": text}]}]
    small = {"size": "512*512"} | parameters
    return {"model": "z-image-turbo", "input": {"messages": messages}, "parameters": small}


def prompting(prompt: object = PROMPT, **parameters: object) -> dict[str, Any]:
    """The body of a create with a prompt."""
    return asking(**parameters) | {"input": {"prompt": prompt}}


def body_of(path: str, **parameters: object) -> dict[str, Any]:
    return prompting(**parameters) if path == SYNTHESIS else asking(**parameters)


def success(answer: httpx.Response) -> dict[str, Any]:
    """The body without its id, once it is proved to be a success to those who read this format."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    body: dict[str, Any] = answer.json()
    assert body.pop("request_id") == answer.headers["x-request-id"]
    assert not {"code", "message"} & set(body)
    return body


def create(customer: Customer, path: str = GENERATION, **parameters: object) -> str:
    """Submit without waiting, and return the id of the task."""
    answer = customer.http.post(path, json=body_of(path, **parameters), headers=ENABLE)
    task_id: str = success(answer)["output"]["task_id"]
    return task_id


def query(customer: Customer, task_id: str) -> dict[str, Any]:
    return success(customer.http.get(f"/api/v1/tasks/{task_id}"))


def listed(customer: Customer, **params: str | int) -> dict[str, Any]:
    return success(customer.http.get("/api/v1/tasks", params=params))


def refusal(answer: httpx.Response, status: int, code: str) -> str:
    """The message of an error, once its envelope is proved."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body == {
        "request_id": answer.headers["x-request-id"],
        "code": code,
        "message": body["message"],
    }
    message: str = body["message"]
    assert message
    return message


def download(url: str) -> Image.Image:
    """The PNG that anyone gets at `url`, as a plain GET without a key."""
    with urlopen(url) as answer:
        assert answer.headers["content-type"] == "image/png"
        image = answer.read()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    return Image.open(BytesIO(image))


def only_task() -> Task:
    with transaction() as session:
        return session.scalars(select(Task)).one()


def written(moment: datetime | None) -> str:
    """A time as a task query tells it."""
    assert moment is not None
    return moment.astimezone(BEIJING).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def refusing(error: errors.ServiceError) -> Callable[..., Image.Image]:
    def pipeline(*_: object, **__: object) -> Image.Image:
        raise error

    return pipeline


# --- An image at once -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", [MULTIMODAL, GENERATION])
def test_a_create_answers_the_documented_body_and_charges_once(
    customer: Customer, drawing: None, path: str
) -> None:
    body = {
        "model": "z-image-turbo",
        "input": {"messages": [{"role": "user", "content": [{"text": PROMPT}]}]},
        "parameters": {"prompt_extend": False, "size": "1120*1440"},
    }

    found = success(customer.http.post(path, json=body))

    link = found["output"]["choices"][0]["message"]["content"][0]["image"]
    assert found == {
        "output": {
            "choices": [
                {
                    "finish_reason": "stop",
                    "message": {
                        "content": [{"image": link}, {"text": PROMPT}],
                        "reasoning_content": "",
                        "role": "assistant",
                    },
                }
            ]
        },
        "usage": {
            "height": 1440,
            "image_count": 1,
            "input_tokens": 0,
            "output_tokens": 0,
            "total_tokens": 0,
            "width": 1120,
        }
        | READ,
    }
    assert urlsplit(link).path.endswith(".png")
    assert download(link).size == (1120, 1440)
    assert customer.books() == (Decimal(1485), Decimal(0))


def test_a_prompt_is_answered_with_results(customer: Customer, drawing: None) -> None:
    found = success(customer.http.post(SYNTHESIS, json=prompting(size="768*512")))

    task = only_task()
    assert found == {
        "output": {
            "task_id": task.id,
            "task_status": "SUCCEEDED",
            "submit_time": written(task.created_at),
            "scheduled_time": written(task.started_at),
            "end_time": written(task.finished_at),
            "task_metrics": {"TOTAL": 1, "SUCCEEDED": 1, "FAILED": 0},
            "results": [
                {"orig_prompt": PROMPT, "actual_prompt": PROMPT, "url": task.image_url},
            ],
        },
        "usage": {"image_count": 1} | READ,
    }
    assert task.image_url is not None
    assert download(task.image_url).size == (768, 512)
    assert customer.books() == (Decimal(1485), Decimal(0))


def test_without_a_size_it_is_upright(customer: Customer, drawing: None) -> None:
    body = {key: value for key, value in asking().items() if key != "parameters"}

    usage = success(customer.http.post(MULTIMODAL, json=body))["usage"]

    assert (usage["width"], usage["height"]) == (1024, 1536)


def test_the_callers_own_request_id_is_answered_and_kept(customer: Customer, drawing: None) -> None:
    answer = customer.http.post(MULTIMODAL, json=asking(), headers={"X-Request-ID": "mine-1"})

    assert answer.json()["request_id"] == "mine-1"
    assert only_task().request_id == "mine-1"
    wrong = customer.http.post(MULTIMODAL, json={}, headers={"X-Request-ID": "mine-2"})
    assert wrong.json()["request_id"] == "mine-2"


def test_a_stream_that_is_asked_for_is_a_plain_answer(customer: Customer, drawing: None) -> None:
    headers = {"Accept": "text/event-stream", "X-DashScope-SSE": "enable"}

    assert "output" in success(customer.http.post(MULTIMODAL, json=asking(), headers=headers))


def test_a_held_task_is_cancelled_soon_after_its_caller_should_have_been_answered(
    customer: Customer, drawing: None
) -> None:
    success(customer.http.post(MULTIMODAL, json=asking()))

    task = only_task()
    assert task.deadline_at is not None
    held = task.deadline_at - task.created_at
    assert held == timedelta(seconds=SYNC_TIMEOUT_S + DEADLINE_MARGIN_S)


FAILURES: dict[type[errors.ServiceError], tuple[str, str]] = {
    errors.GenerationFailed: ("InternalError.Algo", "InternalError.Algo"),
    errors.GenerationTimeout: ("RequestTimeOut", "InternalError.Timeout"),
    errors.ResourceExhausted: ("InternalError.Algo", "InternalError.Algo"),
    errors.StorageUnavailable: ("InternalError.Upload", "InternalError.Upload"),
    errors.WorkerLost: ("SystemError", "SystemError"),
    errors.ContentRefused: ("DataInspectionFailed", "DataInspectionFailed"),
    errors.RewriteFailed: ("RewriteFailed", "RewriteFailed"),
}
"""What a drawing that fails is called: to a caller who is held, and on a task."""


@pytest.mark.parametrize("kind", FAILURES)
def test_a_drawing_that_fails_is_told_at_once_and_costs_nothing(
    customer: Customer, drawing: Atelier, kind: type[errors.ServiceError]
) -> None:
    drawing.draw_with(refusing(kind()))

    for path in (MULTIMODAL, SYNTHESIS):
        answer = customer.http.post(path, json=body_of(path))

        status = 400 if kind is errors.ContentRefused else 500
        assert refusal(answer, status, FAILURES[kind][0]) == str(kind())
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_a_held_caller_hears_that_the_task_was_cancelled(
    customer: Customer, canvas: Canvas
) -> None:
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(customer.http.post, MULTIMODAL, json=asking())
        assert canvas.begun.wait(30)
        cancelled = customer.http.post(f"/v1/tasks/{only_task().id}/cancel")
        assert cancelled.status_code == 200

    message = refusal(held.result(), 400, "UnsupportedOperation")
    assert message == "The task was cancelled. You were not charged."
    assert customer.books() == (Decimal(1500), Decimal(0))


@contextmanager
def ends() -> Iterator[Callable[[], None]]:
    """From now on, hear of tasks; what is given waits for the next one that ends."""
    channel = queue.connection.pubsub()  # type: ignore[no-untyped-call]
    channel.subscribe(events.CHANNEL)
    assert channel.get_message(timeout=30) is not None

    def wait() -> None:
        while True:
            message = channel.get_message(timeout=30)
            assert message is not None
            if message["type"] == "message" and json.loads(message["data"])["ended"]:
                return

    try:
        yield wait
    finally:
        channel.close()


@pytest.mark.parametrize("path", [MULTIMODAL, SYNTHESIS])
def test_whoever_hangs_up_while_held_does_not_pay(
    customer: Customer, canvas: Canvas, path: str
) -> None:
    body = json.dumps(body_of(path)).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {customer.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    address = (customer.http.base_url.host, customer.http.base_url.port)

    with ends() as ended:
        with socket.create_connection(address) as connection:
            connection.sendall(head.encode() + body)
            assert canvas.begun.wait(30)
            assert customer.books() == (Decimal(1500), Decimal(15))
        ended()

    assert only_task().status is TaskStatus.CANCELLED
    assert customer.books() == (Decimal(1500), Decimal(0))


# --- A task ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CREATES)
def test_every_create_answers_with_a_task_where_that_is_asked_for(
    customer: Customer, path: str
) -> None:
    found = success(customer.http.post(path, json=body_of(path), headers=ENABLE))

    assert found == {"output": {"task_status": "PENDING", "task_id": only_task().id}}
    assert customer.books() == (Decimal(1500), Decimal(15))


def test_the_header_may_be_written_in_any_case(customer: Customer) -> None:
    answer = customer.http.post(MULTIMODAL, json=asking(), headers={"x-dashscope-async": "Enable"})

    assert success(answer)["output"]["task_status"] == "PENDING"


def test_any_other_word_in_the_header_does_not_make_a_task(
    customer: Customer, drawing: None
) -> None:
    answer = customer.http.post(MULTIMODAL, json=asking(), headers={"X-DashScope-Async": "disable"})

    assert "choices" in success(answer)["output"]


@pytest.mark.parametrize("path", [MULTIMODAL, GENERATION])
def test_a_task_of_messages_is_polled_to_its_choices(
    customer: Customer, work: Work, path: str
) -> None:
    task_id = create(customer, path, size="1280*720")
    pending = query(customer, task_id)
    work()
    done = query(customer, task_id)

    task = customer.task(task_id)
    waiting = {
        "task_id": task_id,
        "task_status": "PENDING",
        "submit_time": written(task.created_at),
    }
    assert pending == {"output": waiting}
    assert done == {
        "output": waiting
        | {
            "task_status": "SUCCEEDED",
            "scheduled_time": written(task.started_at),
            "end_time": written(task.finished_at),
            "finished": True,
            "choices": [
                {
                    "finish_reason": "stop",
                    "message": {
                        "role": "assistant",
                        "content": [{"image": task.image_url, "type": "image"}],
                    },
                }
            ],
        },
        "usage": {
            "size": "1280*720",
            "total_tokens": 0,
            "image_count": 1,
            "output_tokens": 0,
            "input_tokens": 0,
        }
        | READ,
    }
    assert task.image_url is not None
    assert download(task.image_url).size == (1280, 720)
    assert customer.books() == (Decimal(1485), Decimal(0))


def test_a_task_of_a_prompt_is_polled_to_its_results(customer: Customer, work: Work) -> None:
    task_id = create(customer, SYNTHESIS)
    pending = query(customer, task_id)["output"]
    work()
    done = query(customer, task_id)

    task = customer.task(task_id)
    assert pending["task_metrics"] == {"TOTAL": 1, "SUCCEEDED": 0, "FAILED": 0}
    assert done["output"]["task_metrics"] == {"TOTAL": 1, "SUCCEEDED": 1, "FAILED": 0}
    assert done["output"]["results"] == [
        {"orig_prompt": PROMPT, "actual_prompt": PROMPT, "url": task.image_url}
    ]
    assert "choices" not in done["output"]
    assert done["usage"] == {"image_count": 1} | READ


def test_a_task_that_is_being_drawn_is_running(customer: Customer) -> None:
    task_id = create(customer)
    with transaction() as session:
        assert tasks.claim_next(session, "a worker") is not None

    assert query(customer, task_id)["output"]["task_status"] == "RUNNING"


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failed_task_is_200_and_says_why_inside_output(
    customer: Customer, work: Work, kind: type[errors.ServiceError]
) -> None:
    ids = [create(customer, path) for path in (GENERATION, SYNTHESIS)]
    work(refusing(kind()))

    for task_id in ids:
        found = query(customer, task_id)

        assert set(found) == {"output"}
        assert found["output"]["task_status"] == "FAILED"
        assert found["output"]["code"] == FAILURES[kind][1]
        assert found["output"]["message"] == str(kind())
        assert found["output"]["end_time"] == written(customer.task(task_id).finished_at)
    assert found["output"]["task_metrics"] == {"TOTAL": 1, "SUCCEEDED": 0, "FAILED": 1}
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_times_are_beijings_to_the_millisecond(customer: Customer) -> None:
    task_id = create(customer)
    with transaction() as session:
        moment = datetime(2025, 12, 18, 20, 3, 1, 7999, UTC)
        session.execute(update(Task).values(created_at=moment))

    assert query(customer, task_id)["output"]["submit_time"] == "2025-12-19 04:03:01.007"
    (row,) = listed(customer, start_time="20251219040300", end_time="20251219040400")["data"]
    assert row["gmt_create"] == 1766088181007


def test_an_unknown_task_is_200_and_unknown(customer: Customer, new_customer: NewCustomer) -> None:
    foreign = create(new_customer())
    for task_id in (UNKNOWN_ID, foreign, "x", "0385dc79-5ff8-4d82-bcb6-000000000000", "a%00b"):
        with case(task_id):
            found = query(customer, task_id)

            named = task_id.replace("%00", "\0")
            assert found == {"output": {"task_id": named, "task_status": "UNKNOWN"}}


@pytest.mark.parametrize("column", ["image_expires_at", "finished_at"])
def test_a_task_is_forgotten_with_its_image(customer: Customer, work: Work, column: str) -> None:
    task_id = create(customer)
    work()
    kept_s = 0 if column == "image_expires_at" else settings.image_ttl_s

    def over_in(left_s: float) -> str:
        moment = datetime.now(UTC) + timedelta(seconds=left_s - kept_s)
        with transaction() as session:
            session.execute(update(Task).values({column: moment}))
        word: str = query(customer, task_id)["output"]["task_status"]
        return word

    assert over_in(60) == "SUCCEEDED"
    assert over_in(0) == "UNKNOWN"


def test_a_failed_task_is_forgotten_as_late_as_an_image(customer: Customer, work: Work) -> None:
    task_id = create(customer)
    work(refusing(errors.GenerationFailed()))
    with transaction() as session:
        ttl = timedelta(seconds=settings.image_ttl_s)
        session.execute(update(Task).values(finished_at=datetime.now(UTC) - ttl))

    assert query(customer, task_id) == {"output": {"task_id": task_id, "task_status": "UNKNOWN"}}


def test_a_task_of_another_dialect_answers_in_choices(
    customer: Customer, submit: Submit, work: Work
) -> None:
    task = submit(customer, width=512, height=512)
    work()

    found = query(customer, task.id)

    assert found["output"]["choices"][0]["message"]["role"] == "assistant"
    assert found["usage"]["size"] == "512*512"


# --- A prompt that is rewritten -------------------------------------------------------------------

REWRITE = Rewrite("a red fox in deep snow at dawn", "it is cold", 90, 40, 25)
TOKENS = {
    "input_tokens": 90,
    "output_tokens": 40,
    "total_tokens": 130,
    "output_tokens_details": {"reasoning_tokens": 25},
}


def rewriting(prompt: str, *, seed: int, check: Callable[[], None]) -> Rewrite:
    assert prompt == PROMPT
    check()
    return REWRITE


def not_rewriting(prompt: str, *, seed: int, check: Callable[[], None]) -> Rewrite:
    raise errors.RewriteFailed


def at_once(customer: Customer, path: str, rewriter: Rewriter) -> httpx.Response:
    """The answer to a held caller who asked for a rewritten prompt, with a worker beside."""
    with closing(Atelier(Paint(), rewriter)):
        return customer.http.post(path, json=body_of(path, prompt_extend=True))


@pytest.mark.parametrize("path", [MULTIMODAL, SYNTHESIS])
def test_a_rewritten_prompt_is_answered_with_its_reasoning_at_twice_the_price(
    customer: Customer, work: Work, path: str
) -> None:
    found = success(at_once(customer, path, rewriting))

    task = only_task()
    length = len(REWRITE.text)
    ours = {"prompt_tokens": length, "prompt_tokens_read": length}
    if path == SYNTHESIS:
        assert found["output"]["results"] == [
            {
                "orig_prompt": PROMPT,
                "actual_prompt": REWRITE.text,
                "url": task.image_url,
                "reasoning_content": "it is cold",
            }
        ]
        assert found["usage"] == {"image_count": 1} | TOKENS | ours
    else:
        assert found["output"]["choices"][0]["message"] == {
            "content": [{"image": task.image_url}, {"text": REWRITE.text}],
            "reasoning_content": "it is cold",
            "role": "assistant",
        }
        assert found["usage"] == {"height": 512, "image_count": 1, "width": 512} | TOKENS | ours
    assert customer.books() == (Decimal(1470), Decimal(0))


@pytest.mark.parametrize("path", CREATES)
def test_a_task_says_of_a_rewritten_prompt_what_a_held_caller_hears(
    customer: Customer, work: Work, path: str
) -> None:
    task_id = create(customer, path, prompt_extend=True)
    assert customer.books() == (Decimal(1500), Decimal(30))
    work(rewriter=rewriting)

    found = query(customer, task_id)

    assert found["usage"].items() >= TOKENS.items()
    if path == SYNTHESIS:
        (result,) = found["output"]["results"]
        assert (result["actual_prompt"], result["orig_prompt"]) == (REWRITE.text, PROMPT)
        assert result["reasoning_content"] == "it is cold"
    else:
        assert found["output"]["choices"][0]["message"] == {
            "role": "assistant",
            "content": [
                {"image": customer.task(task_id).image_url, "type": "image"},
                {"text": REWRITE.text, "type": "text"},
            ],
            "reasoning_content": "it is cold",
        }
        assert found["usage"]["size"] == "512*512"
    assert customer.books() == (Decimal(1470), Decimal(0))


def test_a_prompt_that_could_not_be_rewritten_costs_nothing(customer: Customer, work: Work) -> None:
    for path in (MULTIMODAL, SYNTHESIS):
        answer = at_once(customer, path, not_rewriting)
        assert refusal(answer, 500, "RewriteFailed") == str(errors.RewriteFailed())
    for path in CREATES:
        task_id = create(customer, path, prompt_extend=True)
        work(rewriter=not_rewriting)

        output = query(customer, task_id)["output"]
        assert (output["task_status"], output["code"]) == ("FAILED", "RewriteFailed")
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_rewriting_is_quoted_and_reserved_at_its_own_price(new_customer: NewCustomer) -> None:
    customer = new_customer(29)
    for path in CREATES:
        for headers in ({}, ENABLE):
            body = body_of(path, prompt_extend=True)
            answer = customer.http.post(
                path, json=body, headers=headers, params={"dry_run": "true"}
            )
            quote = success(answer)["output"]
            assert (quote["usage"]["credits_reserved"], quote["affordable"]) == (30, False)
            refusal(customer.http.post(path, json=body, headers=headers), 400, "Arrearage")
    assert_untouched(customer, balance=29)


# --- What became of the order ---------------------------------------------------------------------


class Cramped(OneByOne):
    """A pipeline without memory for more than 512-scale, which reads no more than 5 tokens."""

    def __init__(self) -> None:
        super().__init__(self._draw_small)

    def read(self, prompt: str) -> Reading:
        return Reading(tuple(prompt.encode()[:5]), len(prompt.encode()))

    def _draw_small(self, *_: object, width: int, height: int, **__: object) -> Image.Image:
        if width * height > 1.1 * 512 * 512:
            raise errors.ResourceExhausted
        return Image.new("RGB", (width, height))


@pytest.mark.parametrize("path", CREATES)
def test_a_smaller_image_is_sent_only_to_whoever_allowed_it_and_is_told(
    customer: Customer, work: Work, path: str
) -> None:
    small = create(customer, path, size="2048*1024", allow_downscale=True)
    failed = create(customer, path, size="2048*1024", allow_downscale=False)
    whole = create(customer, path, size="512*512", allow_downscale=True)
    work(Cramped())

    task, usage = customer.task(small), query(customer, small)["usage"]
    assert (usage["size"], usage["downscaled"]) == ("720*368", True)
    assert task.image_url is not None
    assert download(task.image_url).size == (720, 368)
    assert query(customer, failed)["output"]["code"] == "InternalError.Algo"
    assert "downscaled" not in query(customer, whole)["usage"]
    assert customer.books() == (Decimal(1470), Decimal(0))


def test_a_held_caller_too_hears_of_a_smaller_image_and_of_a_prompt_that_was_cut(
    customer: Customer, drawing: Atelier
) -> None:
    drawing.draw_with(Cramped())

    body = asking(size="2048*1024", allow_downscale=True)
    usage = success(customer.http.post(MULTIMODAL, json=body))["usage"]

    assert usage == {
        "height": 368,
        "image_count": 1,
        "input_tokens": 0,
        "output_tokens": 0,
        "total_tokens": 0,
        "width": 720,
        "downscaled": True,
        "prompt_tokens": len(PROMPT),
        "prompt_tokens_read": 5,
    }


def test_an_image_of_the_first_version_has_the_size_that_was_asked_for(
    customer: Customer, work: Work
) -> None:
    task_id = create(customer)
    work()
    with transaction() as session:
        names = ("image_width", "image_height", "prompt_tokens", "prompt_tokens_read")
        session.execute(update(Task).values(dict.fromkeys(names)))

    usage = query(customer, task_id)["usage"]

    assert usage["size"] == "512*512"
    assert not {"prompt_tokens", "prompt_tokens_read"} & set(usage)


# --- Cancelling -----------------------------------------------------------------------------------

NOT_CANCELLED = "Failed to cancel the task, please confirm if the task is in PENDING status."


def test_a_waiting_task_is_cancelled_free_of_charge(customer: Customer) -> None:
    task_id = create(customer)

    # As the SDK does: no body and no content type.
    assert success(customer.http.post(f"/api/v1/tasks/{task_id}/cancel")) == {}

    output = query(customer, task_id)["output"]
    assert output["task_status"] == "CANCELED"
    assert output["end_time"] == written(customer.task(task_id).finished_at)
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_a_task_that_is_being_drawn_is_not_cancelled(customer: Customer) -> None:
    task_id = create(customer)
    with transaction() as session:
        assert tasks.claim_next(session, "a worker") is not None

    answer = customer.http.post(f"/api/v1/tasks/{task_id}/cancel")

    assert refusal(answer, 400, "UnsupportedOperation") == NOT_CANCELLED
    assert customer.task(task_id).status is TaskStatus.PROCESSING
    assert customer.books() == (Decimal(1500), Decimal(15))


def test_what_has_ended_or_is_not_there_is_not_cancelled(
    customer: Customer, new_customer: NewCustomer, work: Work
) -> None:
    done = create(customer)
    work()
    other = new_customer()
    foreign = create(other)

    for task_id in (done, foreign, UNKNOWN_ID, "x"):
        with case(task_id):
            answer = customer.http.post(f"/api/v1/tasks/{task_id}/cancel")

            assert refusal(answer, 400, "UnsupportedOperation") == NOT_CANCELLED
    assert other.task(foreign).status is TaskStatus.PENDING
    assert customer.books() == (Decimal(1485), Decimal(0))


# --- The list -------------------------------------------------------------------------------------


def test_the_list_answers_the_documented_body_with_and_without_a_slash(
    customer: Customer, work: Work
) -> None:
    done = create(customer)
    work()
    waiting = create(customer, SYNTHESIS)

    found = listed(customer)

    assert found == success(customer.http.get("/api/v1/tasks/"))
    first, second = found.pop("data")
    assert found == {"total": 2, "total_page": 1, "page_no": 1, "page_size": 10}
    task = customer.task(waiting)
    assert first == {
        "api_key_id": customer.key_id,
        "caller_parent_id": customer.id,
        "caller_uid": customer.id,
        "gmt_create": int(task.created_at.timestamp() * 1_000_000) // 1000,
        "model_name": "z-image-turbo",
        "region": "self-hosted",
        "request_id": task.request_id,
        "status": "PENDING",
        "task_id": waiting,
        "user_api_unique_key": "apikey:v1:aigc:text2image:image-synthesis:z-image-turbo",
    }
    assert second["task_id"] == done
    assert second["status"] == "SUCCEEDED"
    assert second["user_api_unique_key"].endswith(":image-generation:generation:z-image-turbo")
    assert second["gmt_create"] <= second["start_time"] <= second["end_time"]
    assert {type(second[name]) for name in ("gmt_create", "start_time", "end_time")} == {int}


def test_the_list_is_filtered_by_what_is_asked_for(customer: Customer, work: Work) -> None:
    done = create(customer)
    work()
    failed = create(customer)
    work(refusing(errors.GenerationFailed()))
    cancelled = create(customer)
    customer.http.post(f"/api/v1/tasks/{cancelled}/cancel")
    running = create(customer)
    with transaction() as session:
        assert tasks.claim_next(session, "a worker") is not None
    pending = create(customer)
    cases: list[tuple[dict[str, str], list[str]]] = [
        ({"status": "SUCCEEDED"}, [done]),
        ({"status": "FAILED"}, [failed]),
        ({"status": "CANCELED"}, [cancelled]),
        ({"status": "RUNNING"}, [running]),
        ({"status": "PENDING"}, [pending]),
        ({"status": "UNKNOWN"}, []),
        ({"task_id": failed}, [failed]),
        ({"task_id": "x\0"}, []),
        ({"model_name": "z-image-turbo"}, [pending, running, cancelled, failed, done]),
        ({"model_name": "wanx2.1-t2i-turbo\0"}, []),
        ({"region": "cn-beijing", "api_key_id": "1"}, [pending, running, cancelled, failed, done]),
    ]
    for params, expected in cases:
        with case(str(params)):
            found = listed(customer, **params)

            assert [row["task_id"] for row in found["data"]] == expected
            assert found["total"] == len(expected)


def test_the_list_is_paged(customer: Customer) -> None:
    ids = [create(customer) for _ in range(3)]

    first = listed(customer, page_size=2)
    second = listed(customer, page_size=2, page_no=2)
    third = listed(customer, page_size=2, page_no=3)

    assert [row["task_id"] for row in first["data"] + second["data"]] == ids[::-1]
    assert third["data"] == []
    assert {page["total_page"] for page in (first, second, third)} == {2}
    assert [page["page_no"] for page in (first, second, third)] == [1, 2, 3]


def test_the_list_is_the_accounts_own(customer: Customer, new_customer: NewCustomer) -> None:
    create(new_customer())

    found = listed(customer)

    assert found == {"total": 0, "data": [], "total_page": 0, "page_no": 1, "page_size": 10}


def test_the_list_has_a_window_of_a_day(customer: Customer) -> None:
    task_id = create(customer)

    def shown(**params: str) -> bool:
        return [row["task_id"] for row in listed(customer, **params)["data"]] == [task_id]

    def put(moment: datetime) -> None:
        with transaction() as session:
            session.execute(update(Task).values(created_at=moment))

    now = datetime.now(UTC)
    put(now - timedelta(hours=23, minutes=59))
    assert shown()
    put(now - timedelta(hours=24))
    assert not shown()
    put(datetime(2025, 4, 20, 0, 0, 0, tzinfo=BEIJING))
    assert shown(start_time="20250420000000")
    assert not shown(start_time="20250420000001")
    assert not shown(start_time="20250418235959")
    assert shown(end_time="20250420000001")
    assert not shown(end_time="20250420000000")
    assert shown(start_time="20250420000000", end_time="20250421000000")
    assert not shown(start_time="20250420000000", end_time="20250420000000")


def test_a_list_that_cannot_be_is_refused(customer: Customer) -> None:
    for name, params in {
        "end_time": {"start_time": "20250420000000", "end_time": "20250421000001"},
        "end_time ": {"start_time": "20250420000001", "end_time": "20250420000000"},
        "start_time": {"start_time": "2025042000000"},
        "start_time ": {"start_time": "20251320000000"},
        "start_time  ": {"start_time": "2025-04-20 00:00:00"},
        "start_time   ": {"start_time": "99991231235959"},
        "end_time  ": {"end_time": "00010101000000"},
        "status": {"status": "DONE"},
        "page_no": {"page_no": "0"},
        "page_no ": {"page_no": "1001"},
        "page_no  ": {"page_no": "10001"},
        "page_size": {"page_size": "0"},
        "page_size ": {"page_size": "101"},
    }.items():
        with case(str(params)):
            answer = customer.http.get("/api/v1/tasks", params=params)

            message = refusal(answer, 400, "InvalidParameter")
            assert message.startswith(f"{name.strip()}: ")
    assert listed(customer, page_no=1000)["data"] == []
    assert listed(customer, page_size=100)["data"] == []


# --- The limits of each field ---------------------------------------------------------------------


@pytest.mark.parametrize("character", ["a", "狐", "🦊"])
def test_what_a_prompt_has_beyond_800_characters_is_cut_off(
    customer: Customer, character: str
) -> None:
    bodies = [asking(character * 800), asking(character * 800 + "b" * 200)]

    for body in bodies:
        answer = customer.http.post(
            MULTIMODAL, content=json.dumps(body), headers=ENABLE | JSON_TYPE
        )
        task_id = success(answer)["output"]["task_id"]
        assert customer.task(task_id).prompt == character * 800


def test_half_a_character_is_refused_in_plain_words(customer: Customer) -> None:
    body = json.dumps(prompting("a \ud83e"))

    answer = customer.http.post(SYNTHESIS, content=body, headers=JSON_TYPE)

    assert refusal(answer, 400, "InvalidParameter") == "input.prompt: must be valid Unicode"


def test_a_prompt_that_is_cut_is_answered_as_it_was_drawn(
    customer: Customer, drawing: None
) -> None:
    found = success(customer.http.post(MULTIMODAL, json=asking("b" * 801)))

    assert found["output"]["choices"][0]["message"]["content"][1] == {"text": "b" * 800}


RECOMMENDED = """
    1024*1024 1280*1280 1536*1536 832*1248 1024*1536 1248*1872 1248*832 1536*1024 1872*1248 864*1152
    1104*1472 1296*1728 1152*864 1472*1104 1728*1296 896*1152 1120*1440 1344*1728 1152*896 1440*1120
    1728*1344 720*1280 864*1536 1152*2048 576*1344 720*1680 864*2016 1280*720 1536*864 2048*1152
    1344*576 1680*720 2016*864
"""
EDGES = "512*512 2048*2048 8192*32 32*8192 8192*512 513*511 1023*1025"


def test_every_recommended_size_and_every_edge_is_taken(customer: Customer) -> None:
    sizes = [size for size in (RECOMMENDED + EDGES).split() if size != "513*511"]
    assert len(sizes) == 33 + 6
    for size in sizes:
        with case(size):
            task = customer.task(create(customer, size=size))

            assert f"{task.width}*{task.height}" == size


@pytest.mark.parametrize("seed", [0, 1, 2147483647])
def test_a_seed_of_the_range_is_drawn(customer: Customer, seed: int) -> None:
    task = customer.task(create(customer, seed=seed))

    assert (task.seed, task.seed_given) == (seed, True)


def test_the_same_seed_gives_the_same_image(customer: Customer, drawing: None) -> None:
    def image(seed: int) -> bytes:
        answer = success(customer.http.post(MULTIMODAL, json=asking(seed=seed)))
        link = answer["output"]["choices"][0]["message"]["content"][0]["image"]
        return download(link).tobytes()

    assert image(7) == image(7)
    assert image(7) != image(2000)


def test_what_dashscope_takes_and_ignores_is_ignored(customer: Customer) -> None:
    task_id = create(
        customer,
        is_async=True,
        watermark=True,
        negative_prompt="a dog",
        n=1,
        prompt_extend=False,
        result_format="message",
        x=[1],
    )

    assert customer.task(task_id).prompt == PROMPT
    body = asking() | {"resources": [], "stream": False}
    success(customer.http.post(MULTIMODAL, json=body, headers=ENABLE))
    body = prompting() | {"input": {"prompt": PROMPT, "negative_prompt": "a dog"}}
    success(customer.http.post(SYNTHESIS, json=body, headers=ENABLE))


def test_null_is_a_parameter_that_was_not_sent(customer: Customer) -> None:
    names = ("size", "seed", "n", "prompt_extend", "allow_downscale")
    task = customer.task(create(customer, GENERATION, **dict.fromkeys(names)))

    assert (task.width, task.height, task.seed_given) == (1024, 1536, False)
    assert (task.prompt_extend, task.allow_downscale) == (False, False)
    success(customer.http.post(MULTIMODAL, json=asking() | {"parameters": None}, headers=ENABLE))


def saying(*content: object, role: object = "user") -> dict[str, Any]:
    return asking() | {"input": {"messages": [{"role": role, "content": list(content)}]}}


ONE = {"role": "user", "content": [{"text": PROMPT}]}
REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "no messages": ("BadRequest.EmptyInput", "input.messages", asking() | {"input": {}}),
    "no prompt": ("BadRequest.EmptyInput", "input.prompt", prompting() | {"input": {}}),
    "null input": ("InvalidParameter", "input", asking() | {"input": None}),
    "text as input": ("InvalidParameter", "input", asking() | {"input": PROMPT}),
    "no message": ("InvalidParameter", "input.messages", asking() | {"input": {"messages": []}}),
    "two messages": (
        "InvalidParameter",
        "input.messages",
        asking() | {"input": {"messages": [ONE, ONE]}},
    ),
    "system role": (
        "InvalidParameter",
        "input.messages.0.role",
        saying({"text": "x"}, role="system"),
    ),
    "no content": ("InvalidParameter", "input.messages.0.content", saying()),
    "two texts": (
        "InvalidParameter",
        "input.messages.0.content",
        saying({"text": "a"}, {"text": "b"}),
    ),
    "an image": (
        "BadRequest.EmptyInput",
        "input.messages.0.content.0.text",
        saying({"image": "https://example.com/x.png"}),
    ),
    "text as content": (
        "InvalidParameter",
        "input.messages.0.content",
        asking() | {"input": {"messages": [{"role": "user", "content": "a fox"}]}},
    ),
    "empty text": ("InvalidParameter", "input.messages.0.content.0.text", asking("")),
    "blank text": ("InvalidParameter", "input.messages.0.content.0.text", asking(" \n　")),
    "blank as far as it is read": (
        "InvalidParameter",
        "input.messages.0.content.0.text",
        asking(" " * 800 + "a fox"),
    ),
    "NUL in the text": ("InvalidParameter", "input.messages.0.content.0.text", asking("a\0b")),
    "number as text": ("InvalidParameter", "input.messages.0.content.0.text", asking(5)),
    "lone surrogate": ("InvalidParameter", "input.messages.0.content.0.text", asking("a \ud83e")),
    "empty prompt": ("InvalidParameter", "input.prompt", prompting("")),
    "NUL in the prompt": ("InvalidParameter", "input.prompt", prompting("a\0b")),
    "list as parameters": ("InvalidParameter", "parameters", asking() | {"parameters": []}),
    "a pixel too few": ("InvalidParameter", "parameters.size", asking(size="513*511")),
    "a pixel too many": ("InvalidParameter", "parameters.size", asking(size="1985*2113")),
    "2049 wide": ("InvalidParameter", "parameters.size", asking(size="2049*2048")),
    "8193 wide": ("InvalidParameter", "parameters.size", asking(size="8193*32")),
    "8193 high": ("InvalidParameter", "parameters.size", asking(size="32*8193")),
    "five digits": ("InvalidParameter", "parameters.size", asking(size="10000*32")),
    "one digit": ("InvalidParameter", "parameters.size", asking(size="9*9999")),
    "size with an x": ("InvalidParameter", "parameters.size", asking(size="1024x1024")),
    "size with one side": ("InvalidParameter", "parameters.size", asking(size="1024")),
    "size with a line end": ("InvalidParameter", "parameters.size", asking(size="1024*1024\n")),
    "size in other digits": (
        "InvalidParameter",
        "parameters.size",
        asking(size="１０２４*１０２４"),
    ),
    "number as size": ("InvalidParameter", "parameters.size", asking(size=1024)),
    "seed -1": ("InvalidParameter", "parameters.seed", asking(seed=-1)),
    "seed 2**31": ("InvalidParameter", "parameters.seed", asking(seed=2147483648)),
    "seed as text": ("InvalidParameter", "parameters.seed", asking(seed="7")),
    "seed 1.0": ("InvalidParameter", "parameters.seed", asking(seed=1.0)),
    "seed true": ("InvalidParameter", "parameters.seed", asking(seed=True)),
    "n 0": ("InvalidParameter", "parameters.n", asking(n=0)),
    "n as text": ("InvalidParameter", "parameters.n", asking(n="1")),
    "n true": ("InvalidParameter", "parameters.n", asking(n=True)),
    "prompt_extend as text": (
        "InvalidParameter",
        "parameters.prompt_extend",
        asking(prompt_extend="false"),
    ),
    "allow_downscale as a number": (
        "InvalidParameter",
        "parameters.allow_downscale",
        asking(allow_downscale=1),
    ),
}


@pytest.mark.parametrize("headers", [{}, ENABLE], ids=["at once", "as a task"])
def test_a_field_that_is_wrong_is_named_and_nothing_is_taken(
    customer: Customer, headers: dict[str, str]
) -> None:
    for name, (code, field, body) in REFUSED.items():
        path = SYNTHESIS if "prompt" in name.split() else MULTIMODAL
        with case(name):
            answer = customer.http.post(path, content=json.dumps(body), headers=headers | JSON_TYPE)

            assert re.search(rf"(^|\. ){re.escape(field)}: ", refusal(answer, 400, code))
    assert_untouched(customer)


def test_without_input_or_model_the_refusal_has_a_code_of_its_own(customer: Customer) -> None:
    for path in CREATES:
        body = body_of(path)
        for left_out, code in (
            ("input", "BadRequest.EmptyInput"),
            ("model", "BadRequest.EmptyModel"),
        ):
            with case(f"{path} without {left_out}"):
                rest = {key: value for key, value in body.items() if key != left_out}

                message = refusal(customer.http.post(path, json=rest), 400, code)

                assert message.startswith("Required ")
    assert_untouched(customer)


@pytest.mark.parametrize("model", ["z-image", "Z-Image-Turbo", "wan2.6-t2i", "", None, 5])
def test_another_model_is_not_found(customer: Customer, model: object) -> None:
    answer = customer.http.post(MULTIMODAL, json=asking() | {"model": model})

    assert refusal(answer, 404, "ModelNotFound").startswith("Model can not be found. ")
    assert_untouched(customer)


def test_more_than_one_image_is_refused_in_dashscopes_words(customer: Customer) -> None:
    for path in CREATES:
        answer = customer.http.post(path, json=body_of(path, n=2))

        message = refusal(answer, 400, "InvalidParameter")
        assert message == "parameters.n: num_images_per_prompt must be 1"
    assert_untouched(customer)


REFUSED_BODIES = {
    "nothing": b"",
    "half a body": b'{"model": "z-image-turbo", ',
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "a list": b"[]",
    "a string": b'"a cat"',
    "null": b"null",
    "lists in lists": b"[" * 30_000 + b"]" * 30_000,
    "an infinite seed": b'{"model": "z-image-turbo", "parameters": {"seed": 1e999}}',
}


def test_a_body_that_is_no_request_is_refused_in_the_envelope(customer: Customer) -> None:
    for name, body in REFUSED_BODIES.items():
        for path in CREATES:
            with case(f"{name} to {path}"):
                answer = customer.http.post(path, content=body, headers=JSON_TYPE)

                refusal(answer, 400, "InvalidParameter")
    assert_untouched(customer)


def test_a_body_that_is_not_said_to_be_json_is_refused(customer: Customer) -> None:
    answer = customer.http.post(MULTIMODAL, content=json.dumps(asking()))

    assert "Content-Type" in refusal(answer, 400, "InvalidParameter")
    assert_untouched(customer)


def test_the_longest_body_is_read_and_one_byte_more_gets_413(customer: Customer) -> None:
    body = json.dumps(asking()).encode().ljust(BODY_MAX_BYTES)
    headers = ENABLE | JSON_TYPE

    success(customer.http.post(MULTIMODAL, content=body, headers=headers))
    answer = customer.http.post(MULTIMODAL, content=body + b" ", headers=headers)

    assert refusal(answer, 413, "BadRequest.TooLarge") == "Payload Too Large."


# --- Who may --------------------------------------------------------------------------------------

ROUTES = [
    *(("POST", path) for path in CREATES),
    ("GET", "/api/v1/tasks"),
    ("GET", "/api/v1/tasks/"),
    ("GET", f"/api/v1/tasks/{UNKNOWN_ID}"),
    ("GET", f"/api/v1/tasks/{UNKNOWN_ID}/"),
    ("POST", f"/api/v1/tasks/{UNKNOWN_ID}/cancel"),
    ("POST", f"/api/v1/tasks/{UNKNOWN_ID}/cancel/"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_without_a_valid_key_there_is_only_401(
    customer: Customer, anyone: httpx.Client, method: str, path: str
) -> None:
    for header in (None, "Bearer", f"Basic {customer.key}", f"Bearer {customer.key}x"):
        with case(str(header)):
            headers = {} if header is None else {"Authorization": header}

            answer = anyone.request(method, path, content=b"{", headers=headers | JSON_TYPE)

            assert refusal(answer, 401, "InvalidApiKey") == "Invalid API-key provided."
    assert_untouched(customer)


def test_with_one_credit_too_few_the_account_is_in_arrears(new_customer: NewCustomer) -> None:
    customer = new_customer(14)
    for path in CREATES:
        for headers in ({}, ENABLE):
            answer = customer.http.post(path, json=body_of(path), headers=headers)

            message = refusal(answer, 400, "Arrearage")
            assert message == "Access denied, please make sure your account is in good standing."
    assert_untouched(customer, balance=14)


def test_with_just_enough_credits_it_is_not(new_customer: NewCustomer) -> None:
    create(new_customer(15))


def test_a_suspended_account_is_denied(customer: Customer) -> None:
    with transaction() as session:
        accounts.change(session, customer.id, suspended=True)

    refusal(customer.http.post(MULTIMODAL, json=asking()), 403, "AccessDenied")
    assert_untouched(customer)


def test_a_key_without_the_model_is_denied(customer: Customer, anyone: httpx.Client) -> None:
    task_id = create(customer)
    with transaction() as session:
        _, secret = accounts.issue_key(session, customer.id, models=["another-model"])
    headers = {"Authorization": f"Bearer {secret}"}

    for method, path in (
        ("POST", MULTIMODAL),
        ("GET", f"/api/v1/tasks/{task_id}"),
        ("POST", f"/api/v1/tasks/{task_id}/cancel"),
    ):
        answer = anyone.request(method, path, json=asking(), headers=headers)
        assert refusal(answer, 403, "Model.AccessDenied") == "Model access denied."
    assert success(anyone.get("/api/v1/tasks", headers=headers))["total"] == 0


def test_a_create_too_many_a_minute_is_throttled(new_customer: NewCustomer) -> None:
    customer = new_customer(requests_per_minute=2)
    for _ in range(2):
        create(customer)

    answer = customer.http.post(MULTIMODAL, json=asking())

    message = refusal(answer, 429, "Throttling.RateQuota")
    assert message == "Requests rate limit exceeded, please try again later."
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert customer.books() == (Decimal(1500), Decimal(30))
    for _ in range(20):  # as often as DashScope lets a task be polled in a second
        query(customer, UNKNOWN_ID)


def test_one_unfinished_task_too_many_is_throttled(new_customer: NewCustomer) -> None:
    customer = new_customer(unfinished_max=1)
    create(customer)

    answer = customer.http.post(MULTIMODAL, json=asking())

    assert refusal(answer, 429, "Throttling.Concurrency") == str(errors.TooManyUnfinished())
    assert int(answer.headers["retry-after"]) >= 1
    assert customer.books() == (Decimal(1500), Decimal(15))


# --- What is not there ----------------------------------------------------------------------------


def test_an_unknown_path_is_not_found_in_the_envelope(anyone: httpx.Client) -> None:
    for path in (
        "/api/v1/",
        "/api/v1/x",
        "/api/v1/services/aigc/text2image/image-synthesis/",
        "/api/v1/services/aigc/text-generation/generation",
        "/api/v1/uploads",
        f"/api/v1/tasks/{UNKNOWN_ID}/x",
    ):
        for method in ("GET", "POST", "DELETE"):
            with case(f"{method} {path}"):
                assert refusal(anyone.request(method, path), 404, "NotFound") == "Not found!"


@pytest.mark.parametrize(("right", "path"), ROUTES)
def test_a_wrong_method_gets_405_and_the_right_one(
    customer: Customer, right: str, path: str
) -> None:
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        if method != right:
            answer = customer.http.request(method, path)

            assert right in refusal(answer, 405, "UnsupportedOperation")
            assert answer.headers["allow"] == right
    assert_untouched(customer)


# --- The table of errors --------------------------------------------------------------------------

DOCUMENTED: dict[type[errors.ServiceError], tuple[int, str, str]] = {
    errors.InsufficientCredits: (
        400,
        "Arrearage",
        "Access denied, please make sure your account is in good standing.",
    ),
    errors.NotPending: (400, "UnsupportedOperation", NOT_CANCELLED),
    errors.TaskEnded: (400, "UnsupportedOperation", NOT_CANCELLED),
    errors.Unauthenticated: (401, "InvalidApiKey", "Invalid API-key provided."),
    errors.PathNotFound: (404, "NotFound", "Not found!"),
    errors.PayloadTooLarge: (413, "BadRequest.TooLarge", "Payload Too Large."),
    errors.InternalError: (
        500,
        "InternalError",
        "An internal error has occured, please try again later or contact service support.",
    ),
    errors.ServiceUnavailable: (
        503,
        "ModelUnavailable",
        "Model is unavailable, please try again later.",
    ),
}
OURS: dict[type[errors.ServiceError], tuple[int, str]] = {
    errors.InvalidRequest: (400, "InvalidParameter"),
    errors.TaskCancelled: (400, "UnsupportedOperation"),
    errors.AccountSuspended: (403, "AccessDenied"),
    errors.TaskNotFound: (404, "NotFound"),
    errors.IdempotencyConflict: (409, "InvalidParameter"),
    errors.TooManyUnfinished: (429, "Throttling.Concurrency"),
    errors.BacklogFull: (503, "ModelUnavailable"),
    errors.GenerationFailed: (500, "InternalError.Algo"),
    errors.GenerationTimeout: (500, "RequestTimeOut"),
    errors.ResourceExhausted: (500, "InternalError.Algo"),
    errors.StorageUnavailable: (500, "InternalError.Upload"),
    errors.WorkerLost: (500, "SystemError"),
    errors.ContentRefused: (400, "DataInspectionFailed"),
    errors.RewriteFailed: (500, "RewriteFailed"),
}
ARGUED: dict[errors.ServiceError, tuple[int, str, str]] = {
    errors.ModelAccessDenied("z-image-turbo"): (403, "Model.AccessDenied", "Model access denied."),
    errors.MethodNotAllowed("POST"): (
        405,
        "UnsupportedOperation",
        "This address answers only POST",
    ),
    errors.RateLimited(7): (
        429,
        "Throttling.RateQuota",
        "Requests rate limit exceeded, please try again later.",
    ),
}


def test_each_row_of_the_table_is_answered_as_it_is_documented() -> None:
    rows = dict(ARGUED)
    rows |= {kind(): row for kind, row in DOCUMENTED.items()}
    rows |= {kind("Our words {}."): (*row, "Our words {}.") for kind, row in OURS.items()}
    assert {type(error) for error in rows} == set(ERRORS)
    for error, (status, code, message) in rows.items():
        with case(type(error).__name__):
            answer = render_error(error)

            body = json.loads(bytes(answer.body))
            assert answer.status_code == status
            assert answer.headers["content-type"] == "application/json"
            assert (body["code"], body["message"]) == (code, message)


# --- What any create may ask for ------------------------------------------------------------------


def test_a_create_with_a_key_of_its_own_is_drawn_once(customer: Customer, drawing: None) -> None:
    headers = {"Idempotency-Key": "order-1"}
    first = customer.http.post(MULTIMODAL, json=asking(), headers=headers)
    again = customer.http.post(MULTIMODAL, json=asking(), headers=headers)

    assert success(first) == success(again)
    assert again.headers["idempotency-replayed"] == "true"
    assert customer.books() == (Decimal(1485), Decimal(0))
    other = customer.http.post(MULTIMODAL, json=asking("a dog"), headers=headers)
    refusal(other, 409, "InvalidParameter")
    with transaction() as session:
        session.execute(update(Task).values(image_expires_at=datetime.now(UTC)))
    late = customer.http.post(MULTIMODAL, json=asking(), headers=headers)
    refusal(late, 404, "NotFound")


@pytest.mark.parametrize("path", [GENERATION, SYNTHESIS])
def test_a_create_may_prefer_to_wait_for_its_task(
    customer: Customer, drawing: None, path: str
) -> None:
    headers = ENABLE | {"Prefer": "wait=30"}

    answer = customer.http.post(path, json=body_of(path), headers=headers)

    found = success(answer)
    assert found["output"]["task_status"] == "SUCCEEDED"
    assert answer.headers["preference-applied"] == "wait=30"
    assert found == query(customer, found["output"]["task_id"])


def test_a_query_may_prefer_to_wait_for_its_task(customer: Customer) -> None:
    task_id = create(customer)

    answer = customer.http.get(f"/api/v1/tasks/{task_id}", headers={"Prefer": "wait=0"})

    assert success(answer)["output"]["task_status"] == "PENDING"
    assert answer.headers["preference-applied"] == "wait=0"


def test_a_create_may_say_when_to_give_up(customer: Customer) -> None:
    headers = ENABLE | {"Cancel-After": "90s"}
    success(customer.http.post(GENERATION, json=asking(), headers=headers))

    task = only_task()
    assert task.deadline_at == task.created_at + timedelta(seconds=90)
    never = customer.http.post(GENERATION, json=asking(), headers={"Cancel-After": "soon"})
    assert refusal(never, 400, "InvalidParameter").startswith("Cancel-After: ")


def test_a_create_may_only_ask_for_its_price(customer: Customer) -> None:
    for path in CREATES:
        for headers in ({}, ENABLE):
            asked: list[tuple[dict[str, str], dict[str, Any]]] = [
                ({"dry_run": "true"}, {}),
                ({}, {"dry_run": True}),
                ({}, {"parameters": {"dry_run": True}}),  # where the SDK puts it
            ]
            for params, more in asked:
                answer = customer.http.post(
                    path, json=body_of(path) | more, headers=headers, params=params
                )

                found = success(answer)
                assert set(found) == {"output"}
                assert found["output"]["object"] == "image.generation.quote"
                assert found["output"]["usage"]["credits_reserved"] == 15
                assert found["output"]["affordable"] is True
    assert_untouched(customer)
