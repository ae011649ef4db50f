"""The OpenAI Images API on the wire: every field at its edge, every refusal, streams, hang-ups.

What the real library makes of it is in `test_openai_sdk`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import httpx
import pytest
from PIL import Image
from sqlalchemy import select, update
from structlog.testing import capture_logs

from api.dialects.openai import stream
from api.dialects.openai.request import PROMPT_MAX_CHARACTERS, ImagesRequest
from api.dialects.openai.routes import SYNC_TIMEOUT_S
from api.dialects.routing import BODY_MAX_BYTES
from api.orders import DEADLINE_MARGIN_S, CallerGone
from storage import errors, queue, tasks
from storage.database import transaction
from storage.errors import GenerationFailed, ServiceError
from storage.models import Task, TaskStatus
from tests.conftest import Paint, assert_untouched, case

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer, Work

CREATE = "/openai/v1/images/generations"
CAT: dict[str, Any] = {"prompt": "a cat", "size": "256x256"}
JSON_TYPE = {"Content-Type": "application/json"}
TOKENS = len("a cat")
"""The tests' pipeline reads bytes."""
USAGE = {
    "input_tokens": TOKENS,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": TOKENS},
    "output_tokens": 0,
    "total_tokens": TOKENS,
    "billing_rule": "per_call",
    "prompt_tokens_read": TOKENS,
}


def create(customer: Customer, **body: object) -> httpx.Response:
    return customer.http.post(CREATE, json=CAT | body)


def created(customer: Customer, **body: object) -> dict[str, Any]:
    answer = create(customer, **body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def refusal(answer: httpx.Response, status: int, code: str, param: str | None = None) -> str:
    """The message of an error, once its envelope is proved."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert answer.json() == {"error": error}
    assert list(error) == ["message", "type", "param", "code"]
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"]
    message: str = error["message"]
    return message


def statuses() -> list[TaskStatus]:
    with transaction() as session:
        return list(session.scalars(select(Task.status)))


def wait_until(true: Callable[[], bool]) -> None:
    while not true():  # pytest's own limit ends it
        time.sleep(0.01)


def download(url: str) -> tuple[str, bytes]:
    """Content type and bytes of what anyone gets at `url`."""
    with urlopen(url) as answer:
        return answer.headers["content-type"], answer.read()


def opened(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    image.load()
    return image


class Picky(Paint):
    """Draws all seeds but some."""

    def __init__(self, error: ServiceError, *seeds: int) -> None:
        self.error = error
        self.seeds = seeds

    def __call__(self, prompt: str, *, seed: int, **how: Any) -> Image.Image:
        if not self.seeds or seed in self.seeds:
            raise self.error
        return super().__call__(prompt, seed=seed, **how)


Held = Callable[..., "Future[httpx.Response]"]


@pytest.fixture
def held(customer: Customer) -> Iterator[Held]:
    """Start a create that is held, and return once its images wait to be drawn."""
    with ThreadPoolExecutor() as pool:

        def start(**body: object) -> Future[httpx.Response]:
            future = pool.submit(create, customer, **body)
            images = int(str(body.get("n", 1)))
            wait_until(lambda: future.done() or queue.count() == images)
            return future

        yield start


# --- The answers ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("drawing")
def test_the_answer_has_every_field_and_a_link_to_the_image(customer: Customer) -> None:
    before = int(datetime.now(UTC).timestamp())

    answer = create(customer, seed=7)

    body = answer.json()
    (image,) = body["data"]
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert body == {
        "created": body["created"],
        "background": "opaque",
        "output_format": "png",
        "quality": "auto",
        "size": "256x256",
        "safety_identifier": None,
        "usage": USAGE | {"credits_used": 15},
        "data": [
            {
                "url": image["url"],
                "b64_json": None,
                "revised_prompt": None,
                "seed": 7,
                "task_id": image["task_id"],
            }
        ],
    }
    assert before <= body["created"] <= int(datetime.now(UTC).timestamp())
    content_type, file = download(image["url"])
    assert content_type == "image/png"
    assert opened(file).size == (256, 256)
    assert opened(file).getpixel((0, 0)) == (7, 0, 0)
    assert customer.task(image["task_id"]).dialect == "openai"
    assert customer.books() == (Decimal(1485), Decimal(0))


@pytest.mark.usefixtures("drawing")
def test_the_image_itself_is_in_the_answer_where_that_is_asked_for(customer: Customer) -> None:
    (image,) = created(customer, response_format="b64_json", seed=7)["data"]

    assert image["url"] is None
    file = base64.b64decode(image["b64_json"], validate=True)
    assert opened(file).getpixel((0, 0)) == (7, 0, 0)
    assert file == download(customer.task(image["task_id"]).image_url or "")[1]


@pytest.mark.usefixtures("drawing")
def test_several_images_have_the_seeds_after_the_first_and_a_price_each(
    customer: Customer,
) -> None:
    body = created(customer, n=4, seed=41)

    assert [image["seed"] for image in body["data"]] == [41, 42, 43, 44]
    drawn = [opened(download(image["url"])[1]).getpixel((0, 0)) for image in body["data"]]
    assert drawn == [(41, 0, 0), (42, 0, 0), (43, 0, 0), (44, 0, 0)]
    assert body["usage"]["credits_used"] == 60
    assert "failures" not in body
    assert customer.books() == (Decimal(1440), Decimal(0))


@pytest.mark.usefixtures("drawing")
def test_after_the_last_seed_comes_the_first(customer: Customer) -> None:
    body = created(customer, n=2, seed=tasks.SEED_MAX)

    assert [image["seed"] for image in body["data"]] == [tasks.SEED_MAX, 0]


@pytest.mark.usefixtures("drawing")
def test_without_a_seed_each_image_has_one_of_its_own(customer: Customer) -> None:
    body = created(customer, n=3)

    assert len({image["seed"] for image in body["data"]}) == 3


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize(
    ("size", "pixels"),
    [
        (None, (1024, 1024)),
        ("auto", (1024, 1024)),
        ("256x256", (256, 256)),
        ("2048x2048", (2048, 2048)),
        ("768x256", (768, 256)),
        ("256x768", (256, 768)),
        ("257x301", (257, 301)),
    ],
)
def test_the_image_has_the_pixels_that_were_asked_for(
    customer: Customer, size: str | None, pixels: tuple[int, int]
) -> None:
    body = created(customer, size=size, output_format="jpeg")

    assert body["size"] == f"{pixels[0]}x{pixels[1]}"
    assert opened(download(body["data"][0]["url"])[1]).size == pixels


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_the_file_is_of_the_format_that_was_asked_for(
    customer: Customer, output_format: str
) -> None:
    body = created(customer, output_format=output_format)

    content_type, file = download(body["data"][0]["url"])
    assert body["output_format"] == output_format
    assert content_type == f"image/{output_format}"
    assert opened(file).format == output_format.upper()


TAKEN: dict[str, list[object]] = {
    "allow_downscale": [True, False, None],
    "background": ["opaque", "auto", None],
    "moderation": ["low", "auto", None],
    "n": [1, None],
    "negative_prompt": ["dogs", None],
    "output_compression": [0, 100, None],
    "output_format": [None],
    "partial_images": [0, 3, None],
    "quality": ["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd", None],
    "response_format": ["url", None],
    "safety_identifier": ["", None],
    "seed": [0, tasks.SEED_MAX, None],
    "stream": [False, None],
    "style": ["vivid", "natural", None],
    "user": ["somebody", None],
    "model": ["z-image-turbo", None],
    "dry_run": [True],
    "something_else": [1],
}


def test_every_value_of_every_field_is_taken(customer: Customer) -> None:
    for field, values in TAKEN.items():
        for value in values:
            with case(f"{field}: {value}"):
                assert create(customer, **{"dry_run": True, field: value}).status_code == 200
    assert_untouched(customer)


REFUSED: dict[str, list[object]] = {
    "allow_downscale": ["true", 1],
    "prompt": ["", "  ", None, 5, ["a cat"], "a\0cat", "x" * (PROMPT_MAX_CHARACTERS + 1)],
    "n": [0, 5, -1, "1", 1.5, True],
    "size": [
        *("255x256", "256x255", "2049x2048", "2048x2049", "769x256", "256x769", "0x0", "99x256"),
        *(
            "1024",
            "1024x",
            "1024*1024",
            "1024X1024",
            " 256x256",
            "256x256\n",
            "１２８０x720",
            "",
            5,
        ),
    ],
    "response_format": ["png", "", 1],
    "output_format": ["gif", "svg", "jpg", "PNG", ""],
    "output_compression": [-1, 101, "50"],
    "background": ["transparent", "white"],
    "quality": ["best", 1],
    "style": ["modern"],
    "moderation": ["none"],
    "partial_images": [-1, 4],
    "stream": ["true", 1],
    "seed": [-1, tasks.SEED_MAX + 1, "7", 1.5, True],
    "user": [5],
    "safety_identifier": [5],
    "negative_prompt": [5],
    "model": [5],
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_value_beyond_its_limit_is_refused_by_its_name(customer: Customer, field: str) -> None:
    for value in REFUSED[field]:
        with case(repr(value)[:40]):
            message = refusal(create(customer, **{field: value}), 400, "invalid_value", field)
            assert message.startswith(f"{field}: ")
    assert_untouched(customer)


@pytest.mark.usefixtures("drawing")
def test_the_longest_prompt_fits_however_it_is_escaped(customer: Customer) -> None:
    prompt = "🦊" * PROMPT_MAX_CHARACTERS
    escaped = json.dumps(CAT | {"prompt": prompt, "user": "x" * 255})
    assert len(escaped) > 12 * PROMPT_MAX_CHARACTERS

    answer = customer.http.post(CREATE, content=escaped, headers=JSON_TYPE)

    (image,) = answer.json()["data"]
    assert customer.task(image["task_id"]).prompt == prompt


def test_who_uses_it_is_told_back(customer: Customer, held: Held, work: Work) -> None:
    for body, told in (
        ({"user": "u1"}, "u1"),
        ({"user": "u1", "safety_identifier": "s1"}, "s1"),
        ({"user": "u1", "safety_identifier": ""}, "u1"),
    ):
        answer = held(**body)
        work()
        assert answer.result().json()["safety_identifier"] == told


@pytest.mark.usefixtures("drawing")
@pytest.mark.parametrize("moderation", ["auto", "low"])
def test_moderation_is_the_one_that_is_always_on(customer: Customer, moderation: str) -> None:
    (image,) = created(customer, moderation=moderation)["data"]

    assert not customer.task(image["task_id"]).strict_moderation


# --- What cannot be drawn -------------------------------------------------------------------------


def test_of_several_images_those_that_could_be_drawn_are_answered(
    customer: Customer, held: Held, work: Work
) -> None:
    answer = held(n=3, seed=1)
    work(Picky(GenerationFailed("Not this one."), 2))

    body = answer.result().json()
    assert [image["seed"] for image in body["data"]] == [1, 3]
    assert body["failures"] == [
        {
            "index": 1,
            "error": {
                "message": "Not this one.",
                "type": "api_error",
                "param": None,
                "code": "generation_failed",
            },
        }
    ]
    assert body["usage"]["credits_used"] == 30
    assert customer.books() == (Decimal(1470), Decimal(0))


ENDS: dict[type[ServiceError], tuple[int, str, bool]] = {
    errors.GenerationFailed: (500, "generation_failed", True),
    errors.StorageUnavailable: (500, "storage_unavailable", True),
    errors.ResourceExhausted: (500, "resource_exhausted", False),
    errors.WorkerLost: (500, "worker_lost", False),
    errors.ContentRefused: (400, "content_policy_violation", False),
    errors.RewriteFailed: (500, "rewrite_failed", True),
    errors.GenerationTimeout: (504, "generation_timeout", False),
}
"""For each end of a task: the answer, and whether the library is to send the request again."""


@pytest.mark.parametrize("kind", ENDS)
def test_what_ends_all_images_is_the_answer_and_costs_nothing(
    customer: Customer, held: Held, work: Work, kind: type[ServiceError]
) -> None:
    status, code, again = ENDS[kind]
    answer = held(n=2)
    work(Picky(errors.of_task(kind.__name__, None)))
    while TaskStatus.PENDING in statuses():  # an unreachable store is tried again
        work(Picky(errors.of_task(kind.__name__, None)))

    assert refusal(answer.result(), status, code) == str(kind())
    # A 400 it does not send again anyway.
    told = {"x-should-retry": "false"} if not again and status >= 500 else {}
    headers = answer.result().headers
    assert {name: headers[name] for name in headers if name == "x-should-retry"} == told
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_a_create_whose_task_is_cancelled_elsewhere_is_told_so(
    customer: Customer, held: Held
) -> None:
    answer = held()
    with transaction() as session:
        task_id = session.scalars(select(Task.id)).one()
    customer.http.post(f"/v1/tasks/{task_id}/cancel")

    refusal(answer.result(), 409, "request_cancelled")
    assert answer.result().headers["x-should-retry"] == "false"
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_whoever_waits_in_vain_does_not_pay(
    customer: Customer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.dialects.openai.routes.SYNC_TIMEOUT_S", 0.1)

    answer = create(customer, n=2)

    refusal(answer, 504, "generation_timeout")
    assert answer.headers["x-should-retry"] == "false"
    assert statuses() == [TaskStatus.CANCELLED] * 2
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_an_image_that_has_expired_is_not_answered_again(
    customer: Customer, held: Held, work: Work
) -> None:
    headers = {"Idempotency-Key": "order-4711"}
    with ThreadPoolExecutor() as pool:
        first = pool.submit(customer.http.post, CREATE, json=CAT, headers=headers)
        wait_until(lambda: queue.count() == 1)
        work()
        assert first.result().status_code == 200
    with transaction() as session:
        session.execute(update(Task).values(image_expires_at=datetime.now(UTC) - timedelta(days=1)))

    refusal(customer.http.post(CREATE, json=CAT, headers=headers), 404, "image_expired")


def test_a_held_task_ends_after_its_caller_if_this_process_does_not(
    customer: Customer, held: Held, work: Work
) -> None:
    answer = held()
    with transaction() as session:
        task = session.scalars(select(Task)).one()
    work()
    answer.result()

    assert task.deadline_at is not None
    assert task.deadline_at - task.created_at == timedelta(
        seconds=SYNC_TIMEOUT_S + DEADLINE_MARGIN_S
    )


# --- Refusals -------------------------------------------------------------------------------------


def test_a_prompt_that_is_missing_is_named(customer: Customer) -> None:
    answer = customer.http.post(CREATE, json={})

    assert refusal(answer, 400, "missing_required_parameter", "prompt").startswith("prompt: ")
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert_untouched(customer)


def test_an_unknown_model_is_404_as_openai_says_it(customer: Customer) -> None:
    for model in ("gpt-image-1", "Z-Image-Turbo", "", "x" * 1000):
        message = refusal(create(customer, model=model), 404, "model_not_found", "model")
        assert message == f"The model `{model}` does not exist or you do not have access to it."
    assert_untouched(customer)


def test_a_stream_of_links_is_refused(customer: Customer) -> None:
    answer = create(customer, stream=True, response_format="url")

    refusal(answer, 400, "invalid_value", "response_format")
    assert_untouched(customer)


def test_a_body_that_is_not_json_is_400(customer: Customer) -> None:
    for content in (b"", b"{", b"[]", b'"a cat"', b"prompt=a+cat", b"\xff"):
        with case(repr(content)):
            answer = customer.http.post(CREATE, content=content, headers=JSON_TYPE)
            assert answer.status_code == 400
            assert list(answer.json()) == ["error"]
    form = customer.http.post(CREATE, data={"prompt": "a cat"})
    assert form.status_code == 400
    assert "Content-Type" in form.json()["error"]["message"]
    assert_untouched(customer)


def test_a_body_that_is_too_long_is_413(customer: Customer) -> None:
    refusal(create(customer, user="x" * BODY_MAX_BYTES), 413, "request_too_large")
    assert_untouched(customer)


def test_a_stranger_is_401_before_anything_is_read(anyone: httpx.Client) -> None:
    for method, path in (("POST", CREATE), ("GET", "/openai/v1/models")):
        for headers in ({}, {"Authorization": "Bearer zk_wrong"}, {"Authorization": "Basic eDp5"}):
            answer = anyone.request(method, path, headers=headers)
            refusal(answer, 401, "invalid_api_key")
            assert answer.json()["error"]["type"] == "authentication_error"
            assert answer.headers["www-authenticate"] == "Bearer"


def test_all_images_of_a_request_are_paid_for_or_none(new_customer: NewCustomer) -> None:
    customer = new_customer(45)

    answer = create(customer, n=4)

    refusal(answer, 402, "insufficient_quota")
    assert answer.json()["error"]["type"] == "insufficient_quota"
    assert_untouched(customer, 45)


def test_a_key_without_the_model_is_403(new_customer: NewCustomer) -> None:
    customer = new_customer(models=["another"])

    refusal(create(customer), 403, "model_access_denied")
    assert_untouched(customer)


def test_more_unfinished_images_than_allowed_are_429(new_customer: NewCustomer) -> None:
    customer = new_customer(unfinished_max=1)

    answer = create(customer, n=2)

    refusal(answer, 429, "too_many_unfinished")
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert answer.headers["retry-after"] == "5"
    assert_untouched(customer)


def test_more_creates_than_allowed_are_429(new_customer: NewCustomer) -> None:
    customer = new_customer(0, requests_per_minute=1)
    create(customer)

    answer = create(customer)

    refusal(answer, 429, "rate_limit_exceeded")
    assert int(answer.headers["retry-after"]) >= 1


def test_an_unknown_path_is_404_in_the_envelope(anyone: httpx.Client) -> None:
    for path in ("images", "images/edits", "images/generations/", "models/", "models/a/b", "x"):
        for method in ("GET", "POST", "DELETE", "OPTIONS", "TRACE"):
            with case(f"{method} {path}"):
                refusal(anyone.request(method, f"/openai/v1/{path}"), 404, "not_found")


def test_a_wrong_method_is_405_and_says_the_right_one(anyone: httpx.Client) -> None:
    for path, allow in (
        (CREATE, "POST"),
        ("/openai/v1/models", "GET"),
        ("/openai/v1/models/x", "GET"),
    ):
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"} - {allow}:
            with case(f"{method} {path}"):
                answer = anyone.request(method, path)
                refusal(answer, 405, "method_not_allowed")
                assert answer.headers["allow"] == allow


# --- Asked for twice, or only for the price -------------------------------------------------------


@pytest.mark.usefixtures("drawing")
def test_a_key_makes_a_create_one_and_another_body_is_422_not_409(customer: Customer) -> None:
    headers = {"Idempotency-Key": "order-4711"}

    first = customer.http.post(CREATE, json=CAT, headers=headers)
    second = customer.http.post(CREATE, json=CAT, headers=headers)
    other = customer.http.post(CREATE, json=CAT | {"prompt": "a dog"}, headers=headers)

    assert second.json() == first.json()
    assert second.headers["idempotency-replayed"] == "true"
    refusal(other, 422, "idempotency_conflict")
    assert customer.books() == (Decimal(1485), Decimal(0))


def test_a_dry_run_says_the_price_of_all_images(customer: Customer) -> None:
    quote = created(customer, n=3, dry_run=True)

    assert quote["usage"]["credits_reserved"] == 45
    assert_untouched(customer)


# --- Models ---------------------------------------------------------------------------------------

MODEL = {
    "id": "z-image-turbo",
    "object": "model",
    "created": int(datetime(2025, 11, 26, tzinfo=UTC).timestamp()),
    "owned_by": "tongyi-mai",
}


def test_there_is_one_model(customer: Customer) -> None:
    listed = customer.http.get("/openai/v1/models")

    assert listed.json() == {"object": "list", "data": [MODEL]}
    assert customer.http.get("/openai/v1/models/z-image-turbo").json() == MODEL
    refusal(customer.http.get("/openai/v1/models/dall-e-3"), 404, "model_not_found", "model")


def test_a_key_without_the_model_does_not_see_it(new_customer: NewCustomer) -> None:
    customer = new_customer(models=["another"])

    assert customer.http.get("/openai/v1/models").json() == {"object": "list", "data": []}
    answer = customer.http.get("/openai/v1/models/z-image-turbo")
    refusal(answer, 404, "model_not_found", "model")


# --- Streams --------------------------------------------------------------------------------------


def events(text: str) -> list[tuple[str | None, dict[str, Any]]]:
    """Name and data of each server-sent event; comments are left out."""
    found = []
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line and line[0] != ":"]
        fields = dict(line.split(": ", 1) for line in lines)
        if fields:
            found.append((fields.get("event"), json.loads(fields["data"])))
    return found


@pytest.mark.usefixtures("drawing")
def test_a_stream_has_one_event_for_each_image_and_no_previews(customer: Customer) -> None:
    answer = create(customer, stream=True, n=2, seed=7, partial_images=3, output_format="webp")

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    found = events(answer.text)
    for (name, event), seed in zip(found, (7, 8), strict=True):
        task = customer.task(event["task_id"])
        assert task.finished_at is not None
        assert name == "image_generation.completed"
        assert event == {
            "type": "image_generation.completed",
            "b64_json": event["b64_json"],
            "created_at": int(task.finished_at.timestamp()),
            "seed": seed,
            "task_id": task.id,
            "background": "opaque",
            "output_format": "webp",
            "quality": "auto",
            "size": "256x256",
            "safety_identifier": None,
            "usage": USAGE | {"credits_used": 15},
        }
        assert opened(base64.b64decode(event["b64_json"])).format == "WEBP"
    assert customer.books() == (Decimal(1470), Decimal(0))


def test_what_goes_wrong_before_the_first_event_is_an_answer_of_its_own(
    customer: Customer, new_customer: NewCustomer, held: Held, work: Work
) -> None:
    refusal(create(new_customer(0), stream=True), 402, "insufficient_quota")
    refusal(create(customer, stream=True, n=9), 400, "invalid_value", "n")
    answer = held(stream=True)
    work(Picky(GenerationFailed()))
    refusal(answer.result(), 500, "generation_failed")


def test_of_several_images_in_a_stream_a_failure_comes_last(
    customer: Customer, held: Held, work: Work
) -> None:
    answer = held(stream=True, n=3, seed=1)
    work(Picky(GenerationFailed("Not this one."), 1))

    first, second, last = events(answer.result().text)
    assert (first[1]["seed"], second[1]["seed"]) == (2, 3)
    assert last == (
        "error",
        {
            "error": {
                "message": "Not this one.",
                "type": "api_error",
                "param": None,
                "code": "generation_failed",
            }
        },
    )
    assert customer.books() == (Decimal(1470), Decimal(0))


def test_a_dry_run_of_a_stream_is_a_stream(customer: Customer) -> None:
    ((_, quote),) = events(create(customer, stream=True, dry_run=True).text)

    assert quote["usage"]["credits_reserved"] == 15
    assert_untouched(customer)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams begin, and say that they are there, after next to no silence."""
    monkeypatch.setattr("api.dialects.openai.stream.PING_S", 0.02)


@pytest.mark.usefixtures("_impatient")
def test_while_it_waits_a_stream_says_that_it_is_there(customer: Customer, work: Work) -> None:
    with customer.http.stream("POST", CREATE, json=CAT | {"stream": True}) as answer:
        lines = answer.iter_lines()
        assert [next(lines), next(lines), next(lines)] == [": ping", "", ": ping"]
        work()
        found = events("\n".join(lines))

    assert [name for name, _ in found] == ["image_generation.completed"]


@pytest.mark.usefixtures("_impatient")
def test_what_goes_wrong_later_is_an_event(customer: Customer, work: Work) -> None:
    with customer.http.stream("POST", CREATE, json=CAT | {"stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines) == ": ping"
        work(Picky(errors.ResourceExhausted()))
        ((name, data),) = events("\n".join(lines))

    assert (name, data["error"]["code"]) == ("error", "resource_exhausted")
    assert customer.books() == (Decimal(1500), Decimal(0))


@pytest.mark.usefixtures("_impatient")
def test_whoever_hangs_up_a_stream_does_not_pay(customer: Customer) -> None:
    with customer.http.stream("POST", CREATE, json=CAT | {"stream": True}) as answer:
        assert next(answer.iter_lines()) == ": ping"
    wait_until(lambda: statuses() == [TaskStatus.CANCELLED])

    assert customer.books() == (Decimal(1500), Decimal(0))


def test_whoever_hangs_up_before_a_stream_begins_does_not_pay(customer: Customer) -> None:
    with pytest.raises(httpx.ReadTimeout):
        customer.http.post(CREATE, json=CAT | {"stream": True}, timeout=0.5)
    wait_until(lambda: statuses() == [TaskStatus.CANCELLED])

    assert customer.books() == (Decimal(1500), Decimal(0))


async def _streamed(ending: Exception) -> str:
    """What a stream sends of a drawing that ends so, once it has begun."""
    begun = asyncio.Event()

    async def drawing() -> list[Task]:
        await begun.wait()
        raise ending

    asked = ImagesRequest.model_validate(CAT | {"stream": True})
    answer = await stream.respond(asked, drawing())
    sent = []
    async for chunk in answer.body_iterator:
        assert isinstance(chunk, bytes)
        sent.append(chunk)
        begun.set()
    return b"".join(sent).decode()


@pytest.mark.usefixtures("_impatient")
def test_a_bug_in_a_stream_is_an_event_and_the_logs_traceback() -> None:
    with capture_logs() as logs:
        sent = asyncio.run(_streamed(RuntimeError("swordfish")))

    ((name, data),) = events(sent)
    assert (name, data["error"]["code"]) == ("error", "internal_error")
    assert "swordfish" not in sent
    assert [log["event"] for log in logs if log.get("exc_info")] == ["request.failed"]


@pytest.mark.usefixtures("_impatient")
def test_a_stream_whose_caller_is_gone_just_ends() -> None:
    assert events(asyncio.run(_streamed(CallerGone()))) == []
