"""The local container's format, field by field and edge by edge, for callers who show a key.

The fields are those of an article on such a container; what we chose beyond it is said in the
dialect. Callers without a key, and the article's clients, are in `test_local_door.py`.
"""

from __future__ import annotations

import base64
import json
import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from decimal import Decimal
from io import BytesIO
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from PIL import Image
from sqlalchemy import select

from api.dialects import local
from api.dialects.routing import BODY_MAX_BYTES
from api.orders import DEADLINE_MARGIN_S
from storage import accounts, errors, events, objects, queue
from storage.database import transaction
from storage.models import Task, TaskStatus
from tests.conftest import assert_untouched

if TYPE_CHECKING:
    from tests.conftest import Atelier, Canvas, Customer, NewCustomer

GENERATE = "/v1/generate"
CAT: dict[str, Any] = {"prompt": "一只橘猫坐在窗台晒太阳", "width": 64, "height": 64}
JSON_TYPE = {"Content-Type": "application/json"}


def create(customer: Customer, **body: object) -> dict[str, Any]:
    """The answer to a create, once it is proved to be one."""
    answer = customer.http.post(GENERATE, json=CAT | body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    found: dict[str, Any] = answer.json()
    return found


def opened(answer: dict[str, Any]) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(answer["image"], validate=True)))


def colour(seed: int) -> tuple[int, int, int]:
    """What the tests' pipeline paints."""
    return (seed % 256, seed // 256 % 256, seed // 65536 % 256)


def refusal(answer: httpx.Response, status: int) -> str:
    """The sentence of an error, once its envelope is proved."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    detail: str = answer.json()["detail"]
    assert answer.json() == {"detail": detail}
    assert detail
    return detail


def only_task() -> Task:
    with transaction() as session:
        return session.scalars(select(Task)).one()


# --- The answer -----------------------------------------------------------------------------------


def test_the_answer_is_the_file_in_base64_and_what_it_shows(
    customer: Customer, drawing: None
) -> None:
    answer = create(customer, width=80, height=64, seed=42)

    assert answer == {
        "image": answer["image"],
        "seed": 42,
        "width": 80,
        "height": 64,
        "format": "png",
        "prompt_tokens": answer["prompt_tokens"],
        "prompt_tokens_read": answer["prompt_tokens_read"],
    }
    assert re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", answer["image"])
    assert len(answer["image"]) % 4 == 0
    image = opened(answer)
    assert (image.format, image.size) == ("PNG", (80, 64))
    assert image.getpixel((0, 0)) == colour(42)


def test_an_image_is_charged_once(customer: Customer, drawing: None) -> None:
    create(customer)
    assert customer.books() == (Decimal(1485), Decimal(0))

    create(customer)
    assert customer.books() == (Decimal(1470), Decimal(0))


def test_a_prompt_is_enough(customer: Customer, drawing: None) -> None:
    answer = customer.http.post(GENERATE, json={"prompt": "a cat"}).json()

    image = opened(answer)
    assert (image.format, image.size) == ("PNG", (1024, 1024))
    assert image.getpixel((0, 0)) == colour(answer["seed"])
    task = only_task()
    assert (task.prompt, task.steps, task.seed_given) == ("a cat", 8, False)
    assert task.seed == answer["seed"]


def test_null_is_a_field_that_was_not_sent(customer: Customer, drawing: None) -> None:
    fields = local.DrawRequest.model_fields
    answer = customer.http.post(GENERATE, json=dict.fromkeys(fields) | {"prompt": "a cat"})

    assert (answer.json()["width"], answer.json()["height"]) == (1024, 1024)
    assert answer.json()["format"] == "png"
    task = only_task()
    assert (task.steps, task.seed_given) == (8, False)


def test_two_images_without_a_seed_differ(customer: Customer, drawing: None) -> None:
    assert create(customer)["seed"] != create(customer)["seed"]


@pytest.mark.parametrize(
    ("asked", "named", "kind"),
    [("png", "png", "PNG"), ("jpeg", "jpeg", "JPEG"), ("jpg", "jpeg", "JPEG")],
)
def test_the_file_has_the_format_that_was_asked_for(
    customer: Customer, drawing: None, asked: str, named: str, kind: str
) -> None:
    answer = create(customer, output_format=asked)

    assert answer["format"] == named
    assert opened(answer).format == kind


def test_the_file_is_the_one_that_was_stored(customer: Customer, drawing: None) -> None:
    answer = create(customer, output_format="jpeg")

    assert base64.b64decode(answer["image"]) == objects.get(only_task().image_key or "")


@pytest.mark.parametrize("seed", [0, 1, 999_999, 2147483647])
def test_a_seed_is_drawn_as_it_was_given(customer: Customer, drawing: None, seed: int) -> None:
    answer = create(customer, seed=seed)

    assert answer["seed"] == seed
    assert opened(answer).getpixel((0, 0)) == colour(seed)
    assert only_task().seed_given


@pytest.mark.parametrize(("asked", "drawn"), [(1, 1), (7, 7), (8, 8), (9, 8)])
def test_nine_steps_are_drawn_as_eight(
    customer: Customer, drawing: None, asked: int, drawn: int
) -> None:
    create(customer, num_inference_steps=asked)

    assert only_task().steps == drawn


def test_a_negative_prompt_has_no_effect(customer: Customer, drawing: None) -> None:
    without = opened(create(customer, seed=7)).tobytes()

    assert opened(create(customer, seed=7, negative_prompt="")).tobytes() == without
    long = create(customer, seed=7, negative_prompt="模糊、失真" * 1000)
    assert opened(long).tobytes() == without


@pytest.mark.parametrize("scale", [0, 0.0, -0.0])
def test_no_guidance_is_no_guidance_however_it_is_written(
    customer: Customer, drawing: None, scale: float
) -> None:
    create(customer, guidance_scale=scale)


@pytest.mark.parametrize(
    "size", [(64, 64), (64, 2048), (2048, 64), (800, 800), (896, 512), (80, 96)]
)
def test_sides_are_multiples_of_16_in_their_limits(
    customer: Customer, drawing: None, size: tuple[int, int]
) -> None:
    answer = create(customer, width=size[0], height=size[1])

    assert (answer["width"], answer["height"]) == size
    assert opened(answer).size == size


def test_the_longest_prompt_is_drawn(customer: Customer, drawing: None) -> None:
    create(customer, prompt="猫" * 2000)

    assert only_task().prompt == "猫" * 2000


def test_fields_that_we_do_not_know_are_ignored(customer: Customer, drawing: None) -> None:
    create(customer, lora="none", batch_size=1)


def test_the_answer_says_what_is_left_of_a_limit(new_customer: NewCustomer, drawing: None) -> None:
    answer = new_customer(requests_per_minute=2).http.post(GENERATE, json=CAT)

    assert answer.headers["ratelimit-policy"] == '"create";q=2;w=60'


# --- Refusals -------------------------------------------------------------------------------------

REFUSED: list[tuple[str, object, str]] = [
    ("prompt", None, "prompt: "),
    ("prompt", "", "prompt: must not be empty"),
    ("prompt", " \n", "prompt: must not be empty"),
    ("prompt", "a\0b", "prompt: must not contain the NUL character"),
    ("prompt", "猫" * 2001, "prompt: String should have at most 2000 characters"),
    ("prompt", ["a cat"], "prompt: "),
    ("negative_prompt", 7, "negative_prompt: "),
    ("width", 48, "width: Input should be greater than or equal to 64"),
    ("width", 2064, "width: Input should be less than or equal to 2048"),
    ("height", 0, "height: "),
    ("height", 2**70, "height: "),
    ("width", 1000, "width: must be a multiple of 16"),
    ("height", 1025, "height: must be a multiple of 16"),
    ("width", "1024", "width: "),
    ("width", 1024.0, "width: "),
    ("height", True, "height: "),
    ("num_inference_steps", 0, "num_inference_steps: Input should be greater than or equal to 1"),
    ("num_inference_steps", 10, "num_inference_steps: Input should be less than or equal to 9"),
    ("num_inference_steps", 8.5, "num_inference_steps: "),
    ("guidance_scale", 0.1, "guidance_scale: must be 0.0"),
    ("guidance_scale", -1, "guidance_scale: must be 0.0"),
    ("guidance_scale", "0.0", "guidance_scale: "),
    ("guidance_scale", False, "guidance_scale: "),
    ("seed", -1, "seed: Input should be greater than or equal to 0"),
    ("seed", 2147483648, "seed: Input should be less than or equal to 2147483647"),
    ("seed", "42", "seed: "),
    ("output_format", "webp", "output_format: Input should be 'png', 'jpeg' or 'jpg'"),
    ("output_format", "PNG", "output_format: "),
    ("output_format", "", "output_format: "),
    ("allow_downscale", "true", "allow_downscale: "),
    ("allow_downscale", 1, "allow_downscale: "),
]


@pytest.mark.parametrize(("field", "value", "said"), REFUSED)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(
    customer: Customer, field: str, value: object, said: str
) -> None:
    answer = customer.http.post(GENERATE, json=CAT | {field: value})

    assert refusal(answer, 422).startswith(said)
    assert_untouched(customer)


def test_a_prompt_must_be_sent(customer: Customer) -> None:
    answer = customer.http.post(GENERATE, json={"width": 64})

    assert refusal(answer, 422) == "prompt: Field required"
    assert_untouched(customer)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"a cat"',
        b"\xff",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a cat", "guidance_scale": NaN}',
        b'{"prompt": "a cat", "width": 1e999}',
        b"[" * 60_000,
    ],
)
def test_a_body_that_is_no_request_is_refused_in_one_sentence(
    customer: Customer, body: bytes
) -> None:
    refusal(customer.http.post(GENERATE, content=body, headers=JSON_TYPE), 422)
    assert_untouched(customer)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_said_to_be_json_is_not_read(
    customer: Customer, kind: str | None
) -> None:
    """A page of another origin may send those without asking first."""
    headers = {} if kind is None else {"Content-Type": kind}
    answer = customer.http.post(GENERATE, content=json.dumps(CAT).encode(), headers=headers)

    assert "Content-Type: application/json" in refusal(answer, 422)
    assert_untouched(customer)


def test_a_body_may_be_as_long_as_is_said_and_no_longer(customer: Customer, drawing: None) -> None:
    body = json.dumps(CAT).encode()
    longest = body + b" " * (BODY_MAX_BYTES - len(body))

    answer = customer.http.post(GENERATE, content=longest + b" ", headers=JSON_TYPE)
    assert refusal(answer, 413)
    assert_untouched(customer)
    assert customer.http.post(GENERATE, content=longest, headers=JSON_TYPE).status_code == 200


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_only_post_is_answered(anyone: httpx.Client, method: str) -> None:
    answer = anyone.request(method, GENERATE)

    assert answer.headers["allow"] == "POST"
    assert answer.status_code == 405
    if method != "HEAD":
        assert refusal(answer, 405) == "This address answers only POST"


@pytest.mark.parametrize("path", ["/v1/generate/", "/v1/generate/1"])
def test_below_the_address_there_is_nothing(customer: Customer, path: str) -> None:
    refusal(customer.http.post(path, json=CAT), 404)


def test_what_is_not_ours_under_the_version_is_still_evolinks(customer: Customer) -> None:
    assert customer.http.get("/v1/generated").json()["error"]["code"] == "not_found"
    assert customer.http.get("/v1/tasks").status_code == 200


def test_whoever_may_not_or_cannot_pay_is_told_so(
    new_customer: NewCustomer, customer: Customer
) -> None:
    poor = new_customer(14)
    assert refusal(poor.http.post(GENERATE, json=CAT), 402)
    assert_untouched(poor, 14)

    other = new_customer(models=["another-model"])
    assert "z-image-turbo" in refusal(other.http.post(GENERATE, json=CAT), 403)
    assert_untouched(other)

    suspended = new_customer()
    with transaction() as session:
        accounts.change(session, suspended.id, suspended=True)
    assert "suspended" in refusal(suspended.http.post(GENERATE, json=CAT), 403)
    assert_untouched(suspended)

    wrong = {"Authorization": "Bearer zk_nobodys"}
    answer = customer.http.post(GENERATE, json=CAT, headers=wrong)
    assert refusal(answer, 401) == "Invalid or expired API key."
    assert answer.headers["www-authenticate"] == "Bearer"
    assert_untouched(customer)


def test_too_many_at_once_and_too_many_in_a_minute_are_told_when_to_come_back(
    new_customer: NewCustomer, submit: Callable[..., Task]
) -> None:
    busy = new_customer(unfinished_max=1)
    submit(busy)
    answer = busy.http.post(GENERATE, json=CAT)
    assert refusal(answer, 429)
    assert int(answer.headers["retry-after"]) > 0
    assert busy.books() == (Decimal(1500), Decimal(15))

    hasty = new_customer(requests_per_minute=1)
    assert hasty.http.post(GENERATE, json={}).status_code == 422
    answer = hasty.http.post(GENERATE, json=CAT)
    assert refusal(answer, 429)
    assert int(answer.headers["retry-after"]) > 0
    assert hasty.books() == (Decimal(1500), Decimal(0))


# --- While the line is held -----------------------------------------------------------------------


FAILURES: list[tuple[type[errors.ServiceError], int]] = [
    (errors.ContentRefused, 400),
    (errors.GenerationFailed, 500),
    (errors.GenerationTimeout, 504),
    (errors.ResourceExhausted, 503),
]


@pytest.mark.parametrize(("kind", "status"), FAILURES)
def test_an_image_that_cannot_be_drawn_is_an_error_and_costs_nothing(
    customer: Customer, drawing: Atelier, kind: type[errors.ServiceError], status: int
) -> None:
    def refuse(*_: object, **__: object) -> Image.Image:
        raise kind

    drawing.draw_with(refuse)
    answer = customer.http.post(GENERATE, json=CAT)

    assert refusal(answer, status) == str(kind())
    assert ("retry-after" in answer.headers) == (status == 503)
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_an_order_that_is_cancelled_elsewhere_is_an_error_and_costs_nothing(
    customer: Customer, canvas: Canvas
) -> None:
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(customer.http.post, GENERATE, json=CAT)
        assert canvas.begun.wait(30)
        customer.http.post(f"/v1/tasks/{only_task().id}/cancel")

    assert "cancelled" in refusal(held.result(), 409)
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_the_answer_begins_before_the_clients_give_up(customer: Customer, canvas: Canvas) -> None:
    """They wait for 120 seconds; what a process leaves behind that dies ends soon after."""
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(customer.http.post, GENERATE, json=CAT)
        assert canvas.begun.wait(30)
        task = only_task()
        customer.http.post(f"/v1/tasks/{task.id}/cancel")
        held.result()

    assert task.deadline_at is not None
    held_s = (task.deadline_at - task.created_at).total_seconds() - DEADLINE_MARGIN_S
    assert held_s == 110


def test_whoever_hangs_up_pays_nothing(customer: Customer, canvas: Canvas) -> None:
    body = json.dumps(CAT).encode()
    head = (
        f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {customer.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    address = (customer.http.base_url.host, customer.http.base_url.port)
    with queue.connection.pubsub() as moved:  # type: ignore[no-untyped-call]
        moved.subscribe(events.CHANNEL)
        with socket.create_connection(address) as connection:
            connection.sendall(head.encode() + body)
            assert canvas.begun.wait(30)
            assert customer.books() == (Decimal(1500), Decimal(15))
        while only_task().status is not TaskStatus.CANCELLED:
            assert moved.get_message(timeout=30) is not None

    assert customer.books() == (Decimal(1500), Decimal(0))


# --- What we add to every format ------------------------------------------------------------------


def test_a_request_that_comes_again_with_its_key_is_answered_with_the_same_image(
    customer: Customer, drawing: None
) -> None:
    key = {"Idempotency-Key": "of-this-image"}
    first = customer.http.post(GENERATE, json=CAT, headers=key)
    again = customer.http.post(GENERATE, json=CAT, headers=key)
    other = customer.http.post(GENERATE, json=CAT | {"seed": 1}, headers=key)

    assert again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true"
    assert refusal(other, 409)
    assert customer.books() == (Decimal(1485), Decimal(0))


def test_an_image_that_has_expired_is_gone_and_never_an_empty_success(
    customer: Customer, drawing: None
) -> None:
    key = {"Idempotency-Key": "of-this-image"}
    customer.http.post(GENERATE, json=CAT, headers=key)
    objects.delete_older_than(timedelta(minutes=-1))

    again = customer.http.post(GENERATE, json=CAT, headers=key)

    assert "expired" in refusal(again, 410)


def test_what_it_would_cost_is_told_without_an_image(customer: Customer) -> None:
    answer = customer.http.post(GENERATE, params={"dry_run": "true"}, json=CAT)

    assert answer.status_code == 200
    assert answer.json()["usage"]["credits_reserved"] == 15
    assert_untouched(customer)
