"""zimageturbo.ai's format, field by field and edge by edge; what is refused leaves nothing behind.

The bodies are those of zimageturbo.ai/docs; what we chose beyond them is said in the dialect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import httpx
import pytest
from PIL import Image
from sqlalchemy import update

from api.dialects.routing import BODY_MAX_BYTES
from storage import accounts, tasks
from storage.database import transaction
from storage.errors import ContentRefused, GenerationFailed, ServiceError
from storage.models import Task, TaskStatus
from tests.conftest import assert_untouched, case

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer, Work

    Submit = Callable[..., Task]

FOX = {"prompt": "a red fox in the snow", "aspect_ratio": "16:9"}
RATIOS = {
    "1:1": (1024, 1024),
    "4:3": (1152, 864),
    "3:4": (864, 1152),
    "16:9": (1280, 720),
    "9:16": (720, 1280),
}
JSON_TYPE = {"Content-Type": "application/json"}


def create(customer: Customer, **body: object) -> str:
    """Submit and return the id of the task."""
    answer = customer.http.post("/api/generate", json=FOX | body)
    assert answer.status_code == 200, answer.text
    task_id: str = answer.json()["data"]["task_id"]
    return task_id


def status(customer: Customer, task_id: str) -> dict[str, Any]:
    answer = customer.http.get("/api/status", params={"task_id": task_id})
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


def refusal(answer: httpx.Response, code: int) -> str:
    """The message of an error, once its envelope is proved."""
    assert answer.status_code == code, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body == {"code": code, "message": body["message"], "data": None}
    assert type(body["code"]) is int
    assert body["message"]
    message: str = body["message"]
    return message


def download(url: str) -> tuple[str, bytes]:
    """Content type and bytes of what anyone gets at `url`."""
    with urlopen(url) as answer:
        return answer.headers["content-type"], answer.read()


def size_of(url: str) -> tuple[int, int]:
    _, image = download(url)
    return Image.open(BytesIO(image)).size


# --- The answers ----------------------------------------------------------------------------------


def test_a_create_answers_the_documented_body(customer: Customer) -> None:
    answer = customer.http.post("/api/generate", json=FOX)

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    task_id = body["data"]["task_id"]
    assert body == {
        "code": 200,
        "message": "success",
        "data": {"task_id": task_id, "status": "IN_PROGRESS"},
    }
    assert type(body["code"]) is int
    assert re.fullmatch(r"task-unified-[0-9]{10}-[a-z0-9]{8}", task_id)


def test_a_create_reserves_one_price_and_charges_nothing(customer: Customer) -> None:
    create(customer)

    assert customer.books() == (Decimal(1500), Decimal(15))


def test_a_task_in_progress_has_every_field_and_no_image(customer: Customer) -> None:
    task_id = create(customer)

    answer = customer.http.get("/api/status", params={"task_id": task_id})

    task = customer.task(task_id)
    assert answer.json() == {
        "code": 200,
        "message": "success",
        "data": {
            "status": "IN_PROGRESS",
            "task_id": task_id,
            "request": {
                "prompt": "a red fox in the snow",
                "size": "1280*720",
                "seed": "-1",
                "aspect_ratio": "16:9",
            },
            "response": [],
            "consumed_credits": 0,
            "created_at": f"{task.created_at.astimezone(UTC):%Y-%m-%d %H:%M:%S}",
            "error_message": None,
            "seed": str(task.seed),
        },
    }


def test_a_task_that_is_being_drawn_is_still_in_progress(customer: Customer) -> None:
    task_id = create(customer)
    with transaction() as session:
        assert tasks.claim_next(session, "a worker") is not None

    assert customer.task(task_id).status is TaskStatus.PROCESSING
    assert status(customer, task_id)["status"] == "IN_PROGRESS"


def test_a_finished_task_has_one_link_and_what_it_cost(customer: Customer, work: Work) -> None:
    task_id = create(customer)
    waiting = status(customer, task_id)

    work()
    done = status(customer, task_id)

    assert waiting["status"] == "IN_PROGRESS"
    assert done == waiting | {
        "status": "SUCCESS",
        "response": done["response"],
        "consumed_credits": 15,
        "prompt_tokens": done["prompt_tokens"],
        "prompt_tokens_read": done["prompt_tokens_read"],
    }
    assert type(done["consumed_credits"]) is int
    assert [type(link) for link in done["response"]] == [str]
    assert customer.books() == (Decimal(1485), Decimal(0))


def test_created_at_is_utc_to_the_second(customer: Customer) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    created_at = status(customer, create(customer))["created_at"]
    after = datetime.now(UTC)

    moment = datetime.strptime(created_at, "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC)
    assert before <= moment <= after


@pytest.mark.parametrize("kind", [GenerationFailed, ContentRefused])
def test_a_failed_task_says_why_and_costs_nothing(
    customer: Customer, work: Work, kind: type[ServiceError]
) -> None:
    def refuse(*_: object, **__: object) -> Image.Image:
        raise kind

    task_id = create(customer)
    waiting = status(customer, task_id)
    work(refuse)

    assert status(customer, task_id) == waiting | {
        "status": "FAILED",
        "error_message": str(kind()),
    }
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_a_cancelled_task_is_failed_and_says_that_it_was_cancelled(customer: Customer) -> None:
    task_id = create(customer)
    waiting = status(customer, task_id)
    with transaction() as session:
        tasks.cancel(session, task_id)

    assert status(customer, task_id) == waiting | {
        "status": "FAILED",
        "error_message": "The task was cancelled. You were not charged.",
    }


def test_an_expired_image_is_said_and_no_longer_linked(customer: Customer, work: Work) -> None:
    task_id = create(customer)
    work()
    done = status(customer, task_id)
    with transaction() as session:
        session.execute(update(Task).values(image_expires_at=datetime.now(UTC)))

    assert status(customer, task_id) == done | {
        "response": [],
        "error_message": "The image has expired and was deleted.",
    }


def test_a_link_that_lives_for_another_minute_is_given(customer: Customer, work: Work) -> None:
    task_id = create(customer)
    work()
    done = status(customer, task_id)
    with transaction() as session:
        in_a_minute = datetime.now(UTC) + timedelta(minutes=1)
        session.execute(update(Task).values(image_expires_at=in_a_minute))

    assert status(customer, task_id) == done


# --- The image ------------------------------------------------------------------------------------


def test_bytes_content_type_and_ending_say_jpeg(customer: Customer, work: Work) -> None:
    task_id = create(customer)
    work()
    (link,) = status(customer, task_id)["response"]

    content_type, image = download(link)

    assert urlsplit(link).path.endswith(".jpeg")
    assert content_type == "image/jpeg"
    assert image.startswith(b"\xff\xd8\xff")


def test_each_ratio_gives_its_pixels(customer: Customer, work: Work) -> None:
    ids = {ratio: create(customer, aspect_ratio=ratio) for ratio in RATIOS}

    work()

    found = {ratio: status(customer, task_id) for ratio, task_id in ids.items()}
    assert {ratio: data["request"]["aspect_ratio"] for ratio, data in found.items()} == {
        ratio: ratio for ratio in RATIOS
    }
    assert {ratio: data["request"]["size"] for ratio, data in found.items()} == {
        ratio: f"{width}*{height}" for ratio, (width, height) in RATIOS.items()
    }
    assert {ratio: size_of(data["response"][0]) for ratio, data in found.items()} == RATIOS


def test_a_size_in_pixels_wins_over_the_ratio(customer: Customer, work: Work) -> None:
    task_id = create(customer, size="257*400")
    work()

    data = status(customer, task_id)
    assert data["request"]["size"] == "257*400"
    assert data["request"]["aspect_ratio"] == "16:9"
    assert size_of(data["response"][0]) == (257, 400)


def test_the_same_seed_gives_the_same_pixels(customer: Customer, work: Work) -> None:
    ids = [create(customer, seed=seed, size="256*256") for seed in (7, 7, 2000)]
    work()

    files = [download(status(customer, i)["response"][0])[1] for i in ids]
    first, again, other = (Image.open(BytesIO(file)).tobytes() for file in files)
    assert first == again
    assert first != other


# --- The limits of each field ---------------------------------------------------------------------


@pytest.mark.parametrize("character", ["a", "é", "狐", "🦊"])
def test_a_prompt_has_at_most_1000_characters_of_any_script(
    customer: Customer, character: str
) -> None:
    task_id = create(customer, prompt=character * 1000)
    assert status(customer, task_id)["request"]["prompt"] == character * 1000

    answer = customer.http.post("/api/generate", json=FOX | {"prompt": character * 1001})
    assert refusal(answer, 400).startswith("prompt: ")
    assert customer.books() == (Decimal(1500), Decimal(15))


def test_the_longest_prompt_may_be_escaped(customer: Customer) -> None:
    body = json.dumps(FOX | {"prompt": "🦊" * 1000}, ensure_ascii=True)
    assert len(body) > 12 * 1000

    answer = customer.http.post("/api/generate", content=body, headers=JSON_TYPE)

    assert answer.status_code == 200


@pytest.mark.parametrize("seed", [0, 1, 2147483647, "0", "2147483647"])
def test_a_seed_is_drawn_and_echoed_as_a_string(customer: Customer, seed: int | str) -> None:
    task_id = create(customer, seed=seed)

    data = status(customer, task_id)
    assert data["request"]["seed"] == str(seed)
    assert data["seed"] == str(seed)
    assert customer.task(task_id).seed == int(seed)


@pytest.mark.parametrize("seed", [-1, "-1", None])
def test_minus_one_is_a_random_seed_that_is_still_known(
    customer: Customer, seed: int | str | None
) -> None:
    ids = [create(customer, seed=seed) for _ in range(2)]

    found = [status(customer, task_id) for task_id in ids]
    assert [data["request"]["seed"] for data in found] == ["-1", "-1"]
    assert [data["seed"] for data in found] == [str(customer.task(i).seed) for i in ids]
    assert found[0]["seed"] != found[1]["seed"]
    assert all(1 <= int(data["seed"]) <= 2147483647 for data in found)


@pytest.mark.parametrize("size", ["256*256", "256*1536", "1536*256", "1536*1536"])
def test_a_side_may_have_256_to_1536_pixels(customer: Customer, size: str) -> None:
    assert status(customer, create(customer, size=size))["request"]["size"] == size


def test_unknown_fields_are_ignored(customer: Customer) -> None:
    create(customer, negative_prompt="a dog", steps=99)


REFUSED_FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "no prompt": ("prompt", {"aspect_ratio": "1:1"}),
    "null prompt": ("prompt", FOX | {"prompt": None}),
    "empty prompt": ("prompt", FOX | {"prompt": ""}),
    "blank prompt": ("prompt", FOX | {"prompt": " \t\n　"}),
    "number as prompt": ("prompt", FOX | {"prompt": 5}),
    "list as prompt": ("prompt", FOX | {"prompt": ["a cat"]}),
    "NUL in the prompt": ("prompt", FOX | {"prompt": "a\0cat"}),
    "lone surrogate": ("prompt", FOX | {"prompt": "a \ud83e cat"}),
    "no ratio": ("aspect_ratio", {"prompt": "a cat"}),
    "null ratio": ("aspect_ratio", FOX | {"aspect_ratio": None}),
    "a ratio of the other vendor": ("aspect_ratio", FOX | {"aspect_ratio": "2:3"}),
    "pixels as ratio": ("aspect_ratio", FOX | {"aspect_ratio": "1024*1024"}),
    "ratio with a space": ("aspect_ratio", FOX | {"aspect_ratio": "1:1 "}),
    "list as ratio": ("aspect_ratio", FOX | {"aspect_ratio": ["1:1"]}),
    "255 pixels wide": ("size", FOX | {"size": "255*256"}),
    "255 pixels high": ("size", FOX | {"size": "256*255"}),
    "1537 pixels wide": ("size", FOX | {"size": "1537*1536"}),
    "1537 pixels high": ("size", FOX | {"size": "1536*1537"}),
    "size with an x": ("size", FOX | {"size": "1024x1024"}),
    "size with one side": ("size", FOX | {"size": "1024"}),
    "size with a line end": ("size", FOX | {"size": "1024*1024\n"}),
    "size in other digits": ("size", FOX | {"size": "１０２４*１０２４"}),
    "number as size": ("size", FOX | {"size": 1024}),
    "seed -2": ("seed", FOX | {"seed": -2}),
    "seed 2**31": ("seed", FOX | {"seed": 2147483648}),
    "seed 2**31 as string": ("seed", FOX | {"seed": "2147483648"}),
    "seed 2**64": ("seed", FOX | {"seed": 2**64}),
    "seed with a fraction": ("seed", FOX | {"seed": 1.5}),
    "seed 1.0": ("seed", FOX | {"seed": 1.0}),
    "seed true": ("seed", FOX | {"seed": True}),
    "word as seed": ("seed", FOX | {"seed": "seven"}),
    "word as allow_downscale": ("allow_downscale", FOX | {"allow_downscale": "true"}),
    "number as allow_downscale": ("allow_downscale", FOX | {"allow_downscale": 1}),
    "seed in other digits": ("seed", FOX | {"seed": "７"}),
}


def test_a_field_that_is_wrong_is_named_and_nothing_is_taken(customer: Customer) -> None:
    for name, (field, body) in REFUSED_FIELDS.items():
        with case(name):
            answer = customer.http.post(
                "/api/generate", content=json.dumps(body), headers=JSON_TYPE
            )

            assert refusal(answer, 400).startswith(f"{field}: ")
            assert_untouched(customer)


REFUSED_BODIES = {
    "nothing": b"",
    "spaces": b"  ",
    "half a body": b'{"prompt": "a cat", ',
    "two bodies": json.dumps(FOX).encode() * 2,
    "single quotes": b"{'prompt': 'a cat', 'aspect_ratio': '1:1'}",
    "not UTF-8": b'{"prompt": "\xff\xfe", "aspect_ratio": "1:1"}',
    "not UTF-8 at all": b"\xff\xfe\x00",
    "UTF-8 of a surrogate": b'{"prompt": "\xed\xa0\x80", "aspect_ratio": "1:1"}',
    "a list": b"[]",
    "a string": b'"a cat"',
    "a number": b"1",
    "null": b"null",
    "lists in lists": b"[" * 30_000 + b"]" * 30_000,
    "objects in objects": b'{"prompt":' * 5_000,
    "a number of 5000 digits": b'{"prompt": "a", "aspect_ratio": "1:1", "seed": %s}'
    % (b"9" * 5000),
    "infinity": b'{"prompt": "a", "aspect_ratio": "1:1", "seed": 1e999}',
    "not a number": b'{"prompt": "a", "aspect_ratio": "1:1", "seed": NaN}',
}


def test_a_body_that_is_no_request_is_refused_in_the_envelope(customer: Customer) -> None:
    for name, body in REFUSED_BODIES.items():
        with case(name):
            answer = customer.http.post("/api/generate", content=body, headers=JSON_TYPE)

            refusal(answer, 400)
            assert_untouched(customer)


def test_a_body_that_is_not_said_to_be_json_is_refused_in_plain_words(customer: Customer) -> None:
    for content_type in (None, "text/plain", "application/x-www-form-urlencoded"):
        with case(str(content_type)):
            headers = {} if content_type is None else {"Content-Type": content_type}

            answer = customer.http.post("/api/generate", content=json.dumps(FOX), headers=headers)

            assert "Content-Type" in refusal(answer, 400)
            assert_untouched(customer)


def test_json_may_name_its_character_set(customer: Customer) -> None:
    answer = customer.http.post(
        "/api/generate",
        content=json.dumps(FOX),
        headers={"Content-Type": "application/json; charset=utf-8"},
    )

    assert answer.status_code == 200


# --- Who may --------------------------------------------------------------------------------------

STRANGERS = {
    "nothing": None,
    "an empty header": "",
    "the word alone": "Bearer",
    "another scheme": "Basic {key}",
    "the key alone": "{key}",
    "a wrong key": "Bearer {key}x",
    "the key's prefix": "Bearer zk_",
    "a key in a list": "Bearer {key}, Bearer {key}",
}


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/api/generate"), ("GET", "/api/status?task_id=x")]
)
def test_without_a_valid_key_there_is_only_401(
    customer: Customer, anyone: httpx.Client, method: str, path: str
) -> None:
    for name, header in STRANGERS.items():
        with case(name):
            headers = {} if header is None else {"Authorization": header.format(key=customer.key)}

            answer = anyone.request(method, path, json=FOX, headers=headers)

            refusal(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert_untouched(customer)


def test_the_scheme_may_be_written_in_any_case(customer: Customer, anyone: httpx.Client) -> None:
    answer = anyone.post(
        "/api/generate", json=FOX, headers={"Authorization": f"bearer {customer.key}"}
    )

    assert answer.status_code == 200


def test_a_stranger_cannot_make_us_parse(anyone: httpx.Client) -> None:
    refusal(anyone.post("/api/generate", content=b"{", headers=JSON_TYPE), 401)


def test_with_one_credit_too_few_there_is_402(new_customer: NewCustomer) -> None:
    customer = new_customer(14)

    message = refusal(customer.http.post("/api/generate", json=FOX), 402)

    assert message == "Insufficient quota. Please top up your account."
    assert_untouched(customer, balance=14)


def test_with_just_enough_credits_there_is_none(new_customer: NewCustomer) -> None:
    create(new_customer(15))


def test_a_key_without_the_model_gets_403(new_customer: NewCustomer) -> None:
    customer = new_customer(models=["another-model"])

    refusal(customer.http.post("/api/generate", json=FOX), 403)
    assert_untouched(customer)


def test_a_key_with_the_model_is_let_in(new_customer: NewCustomer) -> None:
    create(new_customer(models=["z-image-turbo"]))


def test_a_key_without_the_model_may_not_read_either(
    customer: Customer, anyone: httpx.Client
) -> None:
    task_id = create(customer)
    with transaction() as session:
        _, secret = accounts.issue_key(session, customer.id, models=["another-model"])

    answer = anyone.get(
        "/api/status", params={"task_id": task_id}, headers={"Authorization": f"Bearer {secret}"}
    )

    refusal(answer, 403)


def test_a_suspended_account_gets_403(customer: Customer) -> None:
    with transaction() as session:
        accounts.change(session, customer.id, suspended=True)

    refusal(customer.http.post("/api/generate", json=FOX), 403)
    assert_untouched(customer)


def test_the_fourth_of_three_creates_a_minute_gets_429(new_customer: NewCustomer) -> None:
    customer = new_customer(requests_per_minute=3)
    for _ in range(3):
        create(customer)

    answer = customer.http.post("/api/generate", json=FOX)

    refusal(answer, 429)
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert customer.books() == (Decimal(1500), Decimal(45))


def test_one_unfinished_task_too_many_gets_429(new_customer: NewCustomer, work: Work) -> None:
    customer = new_customer(unfinished_max=2)
    for _ in range(2):
        create(customer)

    answer = customer.http.post("/api/generate", json=FOX)

    refusal(answer, 429)
    assert int(answer.headers["retry-after"]) >= 1
    assert customer.books() == (Decimal(1500), Decimal(30))
    work(max_jobs=1)
    create(customer)


# --- What is not there ----------------------------------------------------------------------------


def test_an_unknown_task_gets_404(customer: Customer) -> None:
    for task_id in (
        "",
        "task_1234567890",
        "task-unified-1757165031-uyujaw3d",
        "task-unified-1757165031-UYUJAW3D",
        "' OR '1'='1",
        "a\0b",
        "🦊",
        "x" * 5000,
    ):
        with case(task_id[:40]):
            refusal(customer.http.get("/api/status", params={"task_id": task_id}), 404)


def test_a_task_is_known_to_its_owner_only(customer: Customer, new_customer: NewCustomer) -> None:
    task_id = create(customer)
    ask = {"task_id": task_id}

    foreign = refusal(new_customer().http.get("/api/status", params=ask), 404)

    unknown = {"task_id": "task-unified-1757165031-uyujaw3d"}
    assert foreign == refusal(customer.http.get("/api/status", params=unknown), 404)
    assert status(customer, task_id)["status"] == "IN_PROGRESS"


def test_every_key_of_the_account_may_read(customer: Customer, anyone: httpx.Client) -> None:
    task_id = create(customer)
    with transaction() as session:
        _, secret = accounts.issue_key(session, customer.id)

    answer = anyone.get(
        "/api/status", params={"task_id": task_id}, headers={"Authorization": f"Bearer {secret}"}
    )

    assert answer.status_code == 200


def test_a_status_query_without_an_id_gets_400(customer: Customer) -> None:
    assert refusal(customer.http.get("/api/status"), 400).startswith("task_id: ")


def test_an_unknown_path_gets_404_in_the_envelope(anyone: httpx.Client) -> None:
    for path in ("/api/", "/api/x", "/api/generate/", "/api/v2/generate", "/api//"):
        for method in ("GET", "POST", "PUT", "DELETE", "TRACE"):
            with case(f"{method} {path}"):
                refusal(anyone.request(method, path), 404)


@pytest.mark.parametrize(
    ("path", "allow", "methods"),
    [
        ("/api/generate", "POST", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]),
        ("/api/status", "GET", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]),
    ],
)
def test_a_wrong_method_gets_405_and_the_right_ones(
    customer: Customer, path: str, allow: str, methods: list[str]
) -> None:
    for method in methods:
        answer = customer.http.request(method, path)

        assert allow in refusal(answer, 405)
        assert answer.headers["allow"] == allow
    assert_untouched(customer)


def test_the_longest_body_is_read_and_one_byte_more_gets_413(customer: Customer) -> None:
    body = json.dumps(FOX).encode().ljust(BODY_MAX_BYTES)

    assert customer.http.post("/api/generate", content=body, headers=JSON_TYPE).status_code == 200
    refusal(customer.http.post("/api/generate", content=body + b" ", headers=JSON_TYPE), 413)
    assert customer.books() == (Decimal(1500), Decimal(15))


def test_a_body_of_unsaid_length_is_bounded_as_well(customer: Customer) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(BODY_MAX_BYTES // 8192 + 1):
            yield b" " * 8192

    answer = customer.http.post("/api/generate", content=endless(), headers=JSON_TYPE)

    refusal(answer, 413)
    assert_untouched(customer)
