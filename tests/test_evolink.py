"""EvoLink's format, field by field and edge by edge; what is refused leaves nothing behind.

The bodies and the error tables are those of EvoLink's API manual; what we chose beyond them is said
in the dialect.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import httpx
import pytest
from PIL import Image
from sqlalchemy import select, update

from api.dialects import evolink
from api.dialects.routing import BODY_MAX_BYTES
from storage import accounts, errors, tasks
from storage.database import transaction
from storage.errors import ServiceError
from storage.models import Account, Delivery, Task
from tests.conftest import assert_untouched, case

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer, Work

CREATE = "/v1/images/generations"
CAT = {"model": "z-image-turbo", "prompt": "一只可爱的猫咪", "size": "1:1"}
RATIOS = {
    "1:1": (1024, 1024),
    "2:3": (832, 1248),
    "3:2": (1248, 832),
    "3:4": (864, 1152),
    "4:3": (1152, 864),
    "9:16": (720, 1280),
    "16:9": (1280, 720),
    "1:2": (720, 1440),
    "2:1": (1440, 720),
}
JSON_TYPE = {"Content-Type": "application/json"}
NOBODYS = "task-unified-1757165031-uyujaw3d"
PUBLIC = "https://8.8.8.8/told"


def create(customer: Customer, **body: object) -> str:
    """Submit and return the id of the task."""
    answer = customer.http.post(CREATE, json=CAT | body)
    assert answer.status_code == 200, answer.text
    task_id: str = answer.json()["id"]
    return task_id


def query(customer: Customer, task_id: str) -> dict[str, Any]:
    answer = customer.http.get(f"/v1/tasks/{task_id}")
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def refusal(answer: httpx.Response, status: int) -> dict[str, str]:
    """The error object of an answer, once its envelope is proved."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error: dict[str, str] = answer.json()["error"]
    assert answer.json() == {"error": error}
    assert set(error) - {"param"} == {"code", "message", "type"}
    assert all(type(value) is str for value in error.values())
    return error


def claim() -> tasks.Claim:
    with transaction() as session:
        task = tasks.claim_next(session, "a worker")
    assert task is not None
    return tasks.claim_of(task)


def other_key(customer: Customer, models: list[str] | None) -> dict[str, str]:
    """The header of a second key of `customer`."""
    with transaction() as session:
        _, secret = accounts.issue_key(session, customer.id, models=models)
    return {"Authorization": f"Bearer {secret}"}


# --- The answers ----------------------------------------------------------------------------------


def test_a_create_answers_the_documented_body(customer: Customer) -> None:
    before = int(datetime.now(UTC).timestamp())
    answer = customer.http.post(CREATE, json=CAT)
    after = int(datetime.now(UTC).timestamp())

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body == {
        "created": body["created"],
        "id": body["id"],
        "model": "z-image-turbo",
        "object": "image.generation.task",
        "progress": 0,
        "status": "pending",
        "task_info": {
            "can_cancel": True,
            "estimated_time": body["task_info"]["estimated_time"],
        },
        "type": "image",
        "usage": {"billing_rule": "per_call", "credits_reserved": 15, "user_group": "default"},
    }
    assert type(body["created"]) is int
    assert before <= body["created"] <= after
    assert re.fullmatch(f"task-unified-{body['created']}-[a-z0-9]{{8}}", body["id"])
    assert type(body["task_info"]["estimated_time"]) is int
    assert body["task_info"]["estimated_time"] >= 0


def test_a_create_says_the_group_of_the_account(new_customer: NewCustomer) -> None:
    answer = new_customer(user_group="heavy").http.post(CREATE, json=CAT)

    assert answer.json()["usage"]["user_group"] == "heavy"


def test_a_create_reserves_one_price_and_charges_nothing(customer: Customer) -> None:
    create(customer)

    assert customer.books() == (Decimal(1500), Decimal(15))


def test_a_waiting_task(customer: Customer) -> None:
    created = customer.http.post(CREATE, json=CAT).json()

    assert query(customer, created["id"]) == {
        "created": created["created"],
        "id": created["id"],
        "model": "z-image-turbo",
        "object": "image.generation.task",
        "progress": 0,
        "status": "pending",
        "task_info": {"can_cancel": True, "queue_position": 0, "estimated_time": 10},
        "type": "image",
    }


def test_a_task_that_is_being_drawn_tells_its_progress(customer: Customer) -> None:
    task_id = create(customer)
    waiting = query(customer, task_id)
    with transaction() as session:
        task = tasks.claim_next(session, "a worker")
        assert task is not None
        tasks.renew(session, {tasks.claim_of(task): 37})

    assert query(customer, task_id) == waiting | {
        "status": "processing",
        "progress": 37,
        "task_info": {"can_cancel": True, "estimated_time": 10},
    }


def test_a_finished_task_has_one_link(customer: Customer, work: Work) -> None:
    task_id = create(customer, seed=12345)
    waiting = query(customer, task_id)

    work()
    done = query(customer, task_id)

    (link,) = done["results"]
    assert type(link) is str
    with urlopen(link) as answer:
        image = answer.read()
    assert done == waiting | {
        "status": "completed",
        "progress": 100,
        "task_info": {"can_cancel": False},
        "results": [link],
        "result_data": [
            {
                "image_url": link,
                "seed": 12345,
                "sha256": hashlib.sha256(image).hexdigest(),
                "size_bytes": len(image),
                "width": 1024,
                "height": 1024,
            }
        ],
        "usage": {
            "billing_rule": "per_call",
            "credits_used": 15,
            "prompt_tokens": done["usage"]["prompt_tokens"],
            "prompt_tokens_read": done["usage"]["prompt_tokens_read"],
        },
    }
    assert customer.books() == (Decimal(1485), Decimal(0))


def test_a_random_seed_is_told_with_the_image(customer: Customer, work: Work) -> None:
    task_id = create(customer)
    work()

    (result,) = query(customer, task_id)["result_data"]
    assert result["seed"] == customer.task(task_id).seed
    assert 1 <= result["seed"] <= 2147483647


def test_an_expired_image_is_said_and_no_longer_linked(customer: Customer, work: Work) -> None:
    task_id = create(customer)
    work()
    done = query(customer, task_id)
    with transaction() as session:
        session.execute(update(Task).values(image_expires_at=datetime.now(UTC)))

    assert query(customer, task_id) == done | {
        "results": [],
        "result_data": [],
        "results_expired": True,
    }


FAILURES = {
    errors.GenerationFailed: "service_error",
    errors.GenerationTimeout: "generation_timeout",
    errors.ResourceExhausted: "resource_exhausted",
    errors.StorageUnavailable: "service_unavailable",
    errors.WorkerLost: "service_error",
    errors.ContentRefused: "content_policy_violation",
    errors.RewriteFailed: "service_error",
}
"""EvoLink's word for each way in which a task can fail."""


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_task_is_answered_with_its_cause(
    customer: Customer, failure: type[ServiceError]
) -> None:
    task_id = create(customer)
    waiting = query(customer, task_id)
    with transaction() as session:
        tasks.fail(session, claim(), failure())

    assert query(customer, task_id) == waiting | {
        "status": "failed",
        "task_info": {"can_cancel": False},
        "error": {"code": FAILURES[failure], "message": str(failure()), "type": "task_error"},
    }
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_an_image_that_moderation_refuses_is_not_charged(customer: Customer, work: Work) -> None:
    def refuse(*_: object, **__: object) -> Image.Image:
        raise errors.ContentRefused

    task_id = create(customer)
    work(refuse)

    done = query(customer, task_id)
    assert done["status"] == "failed"
    assert done["error"] == {
        "code": "content_policy_violation",
        "message": str(errors.ContentRefused()),
        "type": "task_error",
    }
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_every_task_error_has_a_word_of_the_catalogue() -> None:
    catalogue = {
        "content_policy_violation",
        "generation_failed_no_content",
        "service_error",
        "generation_timeout",
        "resource_exhausted",
        "service_unavailable",
    }

    assert set(evolink.TASK_ERRORS.values()) <= catalogue


# --- The image ------------------------------------------------------------------------------------


def test_bytes_content_type_and_ending_say_png(customer: Customer, work: Work) -> None:
    task_id = create(customer)
    work()
    (link,) = query(customer, task_id)["results"]

    with urlopen(link) as answer:
        content_type, image = answer.headers["content-type"], answer.read()

    assert urlsplit(link).path.endswith(".png")
    assert content_type == "image/png"
    assert image.startswith(b"\x89PNG\r\n\x1a\n")


def test_each_size_is_drawn_to_the_pixel(customer: Customer, work: Work) -> None:
    asked = RATIOS | {
        "376x376": (376, 376),
        "376x1536": (376, 1536),
        "1536x376": (1536, 376),
        "1536x1536": (1536, 1536),
        "1024x768": (1024, 768),
        "777x393": (777, 393),
    }
    ids = {size: create(customer, size=size) for size in asked}

    work()

    drawn = {}
    for size, task_id in ids.items():
        (link,) = query(customer, task_id)["results"]
        with urlopen(link) as answer:
            drawn[size] = Image.open(BytesIO(answer.read())).size
    assert drawn == asked


def test_without_a_size_it_is_a_square_of_1024_pixels(customer: Customer) -> None:
    answer = customer.http.post(CREATE, json={"model": "z-image-turbo", "prompt": "a cat"})

    task = customer.task(answer.json()["id"])
    assert (task.width, task.height) == (1024, 1024)


# --- The limits of each field ---------------------------------------------------------------------


@pytest.mark.parametrize("character", ["a", "狐", "🦊"])
def test_a_prompt_has_at_most_2000_characters_of_any_script(
    customer: Customer, character: str
) -> None:
    task_id = create(customer, prompt=character * 2000)
    assert customer.task(task_id).prompt == character * 2000

    answer = customer.http.post(CREATE, json=CAT | {"prompt": character * 2001})
    assert refusal(answer, 400)["param"] == "prompt"
    assert customer.books() == (Decimal(1500), Decimal(15))


def test_the_longest_prompt_may_be_escaped(customer: Customer) -> None:
    body = json.dumps(CAT | {"prompt": "🦊" * 2000}, ensure_ascii=True)
    assert len(body) > 12 * 2000

    answer = customer.http.post(CREATE, content=body, headers=JSON_TYPE)

    assert answer.status_code == 200


@pytest.mark.parametrize("seed", [1, 12345, 2147483647])
def test_a_seed_of_the_range_is_drawn(customer: Customer, seed: int) -> None:
    assert customer.task(create(customer, seed=seed)).seed == seed


def test_no_seed_or_none_is_random(customer: Customer) -> None:
    drawn = [customer.task(create(customer, **asked)) for asked in ({}, {}, {"seed": None})]

    assert len({task.seed for task in drawn}) == 3
    assert not any(task.seed_given for task in drawn)


def test_null_is_an_optional_field_that_was_not_sent(customer: Customer) -> None:
    nothing = dict.fromkeys(["size", "seed", "nsfw_check", "callback_url", "allow_downscale"])
    task = customer.task(create(customer, **nothing))

    assert (task.width, task.height) == (1024, 1024)


@pytest.mark.parametrize(("sent", "strict"), [(True, True), (False, False), (None, False)])
def test_strict_moderation_is_asked_for_with_true(
    customer: Customer, sent: bool | None, *, strict: bool
) -> None:
    assert customer.task(create(customer, nsfw_check=sent)).strict_moderation is strict


def test_unknown_fields_are_ignored(customer: Customer) -> None:
    create(customer, n=4, negative_prompt="a dog", quality="hd")


REFUSED_FIELDS: dict[str, tuple[str, dict[str, Any]]] = {
    "no model": ("model", {"prompt": "a cat"}),
    "null model": ("model", CAT | {"model": None}),
    "another model": ("model", CAT | {"model": "gpt-4o-image"}),
    "model in capitals": ("model", CAT | {"model": "Z-Image-Turbo"}),
    "list as model": ("model", CAT | {"model": ["z-image-turbo"]}),
    "no prompt": ("prompt", {"model": "z-image-turbo"}),
    "null prompt": ("prompt", CAT | {"prompt": None}),
    "empty prompt": ("prompt", CAT | {"prompt": ""}),
    "blank prompt": ("prompt", CAT | {"prompt": " \t\n　"}),
    "number as prompt": ("prompt", CAT | {"prompt": 5}),
    "NUL in the prompt": ("prompt", CAT | {"prompt": "a\0cat"}),
    "lone surrogate": ("prompt", CAT | {"prompt": "a \ud83e cat"}),
    "an unknown ratio": ("size", CAT | {"size": "5:4"}),
    "a ratio and a space": ("size", CAT | {"size": "1:1 "}),
    "375 pixels wide": ("size", CAT | {"size": "375x376"}),
    "375 pixels high": ("size", CAT | {"size": "376x375"}),
    "1537 pixels wide": ("size", CAT | {"size": "1537x1536"}),
    "1537 pixels high": ("size", CAT | {"size": "1536x1537"}),
    "size with an asterisk": ("size", CAT | {"size": "1024*1024"}),
    "size with a capital": ("size", CAT | {"size": "1024X1024"}),
    "size with a line end": ("size", CAT | {"size": "1024x1024\n"}),
    "size in other digits": ("size", CAT | {"size": "１０２４x１０２４"}),
    "number as size": ("size", CAT | {"size": 1024}),
    "empty size": ("size", CAT | {"size": ""}),
    "seed 0": ("seed", CAT | {"seed": 0}),
    "seed -1": ("seed", CAT | {"seed": -1}),
    "seed 2**31": ("seed", CAT | {"seed": 2147483648}),
    "seed 2**64": ("seed", CAT | {"seed": 2**64}),
    "seed as string": ("seed", CAT | {"seed": "7"}),
    "seed 1.0": ("seed", CAT | {"seed": 1.0}),
    "seed true": ("seed", CAT | {"seed": True}),
    "word as nsfw_check": ("nsfw_check", CAT | {"nsfw_check": "false"}),
    "number as nsfw_check": ("nsfw_check", CAT | {"nsfw_check": 0}),
    "number as callback_url": ("callback_url", CAT | {"callback_url": 5}),
    "word as allow_downscale": ("allow_downscale", CAT | {"allow_downscale": "true"}),
    "number as allow_downscale": ("allow_downscale", CAT | {"allow_downscale": 1}),
}


def test_a_field_that_is_wrong_is_named_and_nothing_is_taken(customer: Customer) -> None:
    for name, (field, body) in REFUSED_FIELDS.items():
        with case(name):
            answer = customer.http.post(CREATE, content=json.dumps(body), headers=JSON_TYPE)

            error = refusal(answer, 400)
            assert error == {
                "code": "invalid_request",
                "message": error["message"],
                "type": "invalid_request_error",
                "param": field,
            }
            assert error["message"].startswith(f"Invalid request parameters: {field}: ")
            assert_untouched(customer)


REFUSED_BODIES = {
    "nothing": b"",
    "half a body": b'{"prompt": "a cat", ',
    "not UTF-8": b'{"prompt": "\xff\xfe", "model": "z-image-turbo"}',
    "a list": b"[]",
    "null": b"null",
    "lists in lists": b"[" * 30_000 + b"]" * 30_000,
    "a number of 5000 digits": b'{"seed": %s}' % (b"9" * 5000),
    "not a number": b'{"model": "z-image-turbo", "prompt": "a", "seed": NaN}',
}


def test_a_body_that_is_no_request_is_refused_in_the_envelope(customer: Customer) -> None:
    for name, body in REFUSED_BODIES.items():
        with case(name):
            answer = customer.http.post(CREATE, content=body, headers=JSON_TYPE)

            error = refusal(answer, 400)
            assert error["code"] == "invalid_request"
            assert error["type"] == "invalid_request_error"
            assert_untouched(customer)


def test_a_body_that_is_not_said_to_be_json_is_refused_in_plain_words(customer: Customer) -> None:
    answer = customer.http.post(CREATE, content=json.dumps(CAT))

    assert "Content-Type" in refusal(answer, 400)["message"]
    assert_untouched(customer)


def test_the_longest_body_is_read_and_one_byte_more_gets_413(customer: Customer) -> None:
    body = json.dumps(CAT).encode().ljust(BODY_MAX_BYTES)

    assert customer.http.post(CREATE, content=body, headers=JSON_TYPE).status_code == 200
    answer = customer.http.post(CREATE, content=body + b" ", headers=JSON_TYPE)
    assert refusal(answer, 413)["code"] == "request_too_large"
    assert customer.books() == (Decimal(1500), Decimal(15))


def test_a_body_of_unsaid_length_is_bounded_as_well(customer: Customer) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(BODY_MAX_BYTES // 8192 + 1):
            yield b" " * 8192

    refusal(customer.http.post(CREATE, content=endless(), headers=JSON_TYPE), 413)
    assert_untouched(customer)


# --- The callback's address -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        PUBLIC,
        "https://8.8.8.8:8443/told?task=1",
        "HTTPS://8.8.8.8/told",
        "https://[2001:4860:4860::8888]/told",
        PUBLIC + "?" + "x" * (2048 - len(PUBLIC) - 1),
    ],
    ids=["plain", "with a port", "in capitals", "IPv6", "2048 characters"],
)
def test_a_public_https_address_is_taken_and_owed_when_the_task_ends(
    customer: Customer, url: str
) -> None:
    task_id = create(customer, callback_url=url)
    assert customer.http.post(f"/v1/tasks/{task_id}/cancel").status_code == 200

    with transaction() as session:
        delivery = session.scalars(select(Delivery)).one()
    assert (delivery.task_id, delivery.url) == (task_id, url)


def test_no_callback_is_asked_for_with_null(customer: Customer) -> None:
    assert customer.task(create(customer, callback_url=None)).callback_url is None


REFUSED_URLS = {
    "http": "http://8.8.8.8/told",
    "another scheme": "ftp://8.8.8.8/told",
    "no scheme": "8.8.8.8/told",
    "a script": "javascript:alert(1)",
    "empty": "",
    "no host": "https:///told",
    "a broken port": "https://8.8.8.8:port/told",
    "a broken bracket": "https://[::1/told",
    "2049 characters": PUBLIC + "?" + "x" * (2048 - len(PUBLIC)),
    "a user name": "https://someone@8.8.8.8/told",
    "a password": "https://someone:secret@8.8.8.8/told",
    "an empty user name": "https://@8.8.8.8/told",
    "a hidden host": "https://8.8.8.8\\@127.0.0.1/told",
    "loopback": "https://127.0.0.1/told",
    "loopback with a port": "https://127.0.0.1:8443/told",
    "the rest of loopback": "https://127.1.2.3/told",
    "loopback by name": "https://localhost/told",
    "loopback as a number": "https://2130706433/told",
    "loopback in hexadecimal": "https://0x7f000001/told",
    "loopback in octal": "https://0177.0.0.1/told",
    "loopback in short": "https://127.1/told",
    "loopback in wide digits": "https://１２７.０.０.１/told",
    "loopback in IPv6": "https://[::1]/told",
    "loopback mapped": "https://[::ffff:127.0.0.1]/told",
    "loopback translated": "https://[64:ff9b::7f00:1]/told",
    "no address": "https://0.0.0.0/told",
    "no address in IPv6": "https://[::]/told",
    "10/8": "https://10.0.0.1/told",
    "172.16/12": "https://172.16.0.1/told",
    "172.31": "https://172.31.255.255/told",
    "192.168/16": "https://192.168.1.1/told",
    "the cloud's own data": "https://169.254.169.254/latest/meta-data",
    "carrier's": "https://100.64.0.1/told",
    "multicast": "https://224.0.0.1/told",
    "broadcast": "https://255.255.255.255/told",
    "link local IPv6": "https://[fe80::1]/told",
    "unique local IPv6": "https://[fd00::1]/told",
    "multicast IPv6": "https://[ff02::1]/told",
    "6to4": "https://[2002:7f00:1::]/told",
}


def test_an_address_that_must_not_be_called_is_refused_at_once(customer: Customer) -> None:
    for name, url in REFUSED_URLS.items():
        with case(name):
            answer = customer.http.post(CREATE, json=CAT | {"callback_url": url})

            error = refusal(answer, 400)
            assert error["code"] == "invalid_request"
            assert error["type"] == "invalid_request_error"
            assert error["param"] == "callback_url"
            assert error["message"].startswith("Invalid request parameters: callback_url: ")
            assert_untouched(customer)


# --- The table of errors: create ------------------------------------------------------------------


STRANGERS = ("", "Bearer", "Basic {key}", "{key}", "Bearer {key}x")


def test_a_create_without_a_valid_key(customer: Customer, anyone: httpx.Client) -> None:
    for header in STRANGERS:
        with case(header):
            answer = anyone.post(
                CREATE, json=CAT, headers={"Authorization": header.format(key=customer.key)}
            )

            assert refusal(answer, 401) == {
                "code": "unauthorized",
                "message": "Invalid or expired token",
                "type": "authentication_error",
            }
            assert_untouched(customer)


def test_a_create_without_a_header(anyone: httpx.Client) -> None:
    assert refusal(anyone.post(CREATE, json=CAT), 401)["code"] == "unauthorized"


def test_a_stranger_cannot_make_us_parse(anyone: httpx.Client) -> None:
    refusal(anyone.post(CREATE, content=b"{", headers=JSON_TYPE), 401)


def test_a_create_without_credits(new_customer: NewCustomer) -> None:
    customer = new_customer(14)

    assert refusal(customer.http.post(CREATE, json=CAT), 402) == {
        "code": "insufficient_quota",
        "message": "Insufficient quota. Please top up your account.",
        "type": "insufficient_quota",
    }
    assert_untouched(customer, balance=14)


def test_a_create_with_a_key_for_other_models(new_customer: NewCustomer) -> None:
    customer = new_customer(models=["another-model"])

    assert refusal(customer.http.post(CREATE, json=CAT), 403) == {
        "code": "model_access_denied",
        "message": "Token does not have access to model: z-image-turbo",
        "type": "invalid_request_error",
    }
    assert_untouched(customer)


def test_a_create_for_a_suspended_account(customer: Customer) -> None:
    with transaction() as session:
        accounts.change(session, customer.id, suspended=True)

    assert refusal(customer.http.post(CREATE, json=CAT), 403)["code"] == "user_disabled"
    assert_untouched(customer)


def test_a_create_too_many_a_minute(new_customer: NewCustomer) -> None:
    customer = new_customer(requests_per_minute=1)
    create(customer)

    answer = customer.http.post(CREATE, json=CAT)

    assert refusal(answer, 429) == {
        "code": "rate_limit_exceeded",
        "message": "Too many requests, please try again later",
        "type": "rate_limit_error",
    }
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert customer.books() == (Decimal(1500), Decimal(15))


def test_a_create_with_too_many_unfinished(new_customer: NewCustomer) -> None:
    customer = new_customer(unfinished_max=1)
    create(customer)

    answer = customer.http.post(CREATE, json=CAT)

    error = refusal(answer, 429)
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert int(answer.headers["retry-after"]) >= 1
    assert customer.books() == (Decimal(1500), Decimal(15))


# --- The table of errors: query -------------------------------------------------------------------


def test_a_query_for_what_is_no_task_id(customer: Customer) -> None:
    for task_id in ("x", "task_1234567890", "TASK-UNIFIED-1-x", "task-unified", "🦊"):
        with case(task_id):
            assert refusal(customer.http.get(f"/v1/tasks/{task_id}"), 400) == {
                "code": "invalid_task_id",
                "message": "Invalid task ID format, must start with 'task-unified-'",
                "type": "invalid_request_error",
                "param": "task_id",
            }


def test_a_query_without_a_valid_key(customer: Customer, anyone: httpx.Client) -> None:
    for header in STRANGERS:
        with case(header):
            answer = anyone.get(
                f"/v1/tasks/{NOBODYS}", headers={"Authorization": header.format(key=customer.key)}
            )

            assert refusal(answer, 401) == {
                "code": "unauthorized",
                "message": "Authentication required",
                "type": "authentication_error",
            }


@pytest.mark.parametrize(("method", "tail"), [("GET", ""), ("POST", "/cancel")])
def test_a_key_for_other_models_may_not_touch_the_task(
    customer: Customer, anyone: httpx.Client, method: str, tail: str
) -> None:
    task_id = create(customer)

    answer = anyone.request(
        method, f"/v1/tasks/{task_id}{tail}", headers=other_key(customer, ["another-model"])
    )

    assert refusal(answer, 403) == {
        "code": "permission_denied",
        "message": "You don't have permission to access this task",
        "type": "invalid_request_error",
    }
    assert query(customer, task_id)["status"] == "pending"


def test_another_key_of_the_account_may_read_the_task(
    customer: Customer, anyone: httpx.Client
) -> None:
    task_id = create(customer)

    answer = anyone.get(f"/v1/tasks/{task_id}", headers=other_key(customer, ["z-image-turbo"]))

    assert answer.status_code == 200


def test_a_query_for_an_unknown_task(customer: Customer) -> None:
    for tail in ("1757165031-uyujaw3d", "1757165031-UYUJAW3D", "", "1-x", "%00", "🦊"):
        with case(tail):
            assert refusal(customer.http.get(f"/v1/tasks/task-unified-{tail}"), 404) == {
                "code": "task_not_found",
                "message": "The requested task could not be found",
                "type": "invalid_request_error",
            }


@pytest.mark.parametrize(("method", "tail"), [("GET", ""), ("POST", "/cancel")])
def test_another_customers_task_is_as_unknown_as_none(
    customer: Customer, new_customer: NewCustomer, method: str, tail: str
) -> None:
    task_id = create(customer)
    other = new_customer().http

    foreign = refusal(other.request(method, f"/v1/tasks/{task_id}{tail}"), 404)

    assert foreign == refusal(other.request(method, f"/v1/tasks/{NOBODYS}{tail}"), 404)
    assert query(customer, task_id)["status"] == "pending"


def test_a_query_too_many_a_second(new_customer: NewCustomer) -> None:
    customer = new_customer(requests_per_minute=120)
    for _ in range(500):
        answer = customer.http.get(f"/v1/tasks/{NOBODYS}")
        if answer.status_code == 429:
            break

    assert refusal(answer, 429) == {
        "code": "rate_limit_exceeded",
        "message": "Rate limit exceeded",
        "type": "evo_api_error",
    }
    assert int(answer.headers["retry-after"]) == 1


# --- What is not there ----------------------------------------------------------------------------


def test_an_unknown_path(anyone: httpx.Client) -> None:
    for path in (
        "/v1/",
        "/v1/x",
        "/v1/images/generations/",
        "/v1/images",
        "/v1/tasks/",
        f"/v1/tasks/{NOBODYS}/x",
    ):
        for method in ("GET", "POST", "DELETE", "TRACE"):
            with case(f"{method} {path}"):
                assert refusal(anyone.request(method, path), 404)["code"] == "not_found"


@pytest.mark.parametrize(
    ("path", "allow", "methods"),
    [
        (CREATE, "POST", ["GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]),
        (f"/v1/tasks/{NOBODYS}", "DELETE, GET", ["POST", "PUT", "PATCH", "TRACE"]),
        (f"/v1/tasks/{NOBODYS}/cancel", "POST", ["GET", "PUT", "DELETE"]),
        ("/v1/callbacks/secret", "GET", ["POST", "PUT", "DELETE"]),
        ("/v1/callbacks/secret/rotate", "POST", ["GET", "PUT", "DELETE"]),
    ],
)
def test_a_wrong_method(customer: Customer, path: str, allow: str, methods: list[str]) -> None:
    for method in methods:
        answer = customer.http.request(method, path)

        assert refusal(answer, 405)["code"] == "method_not_allowed"
        assert answer.headers["allow"] == allow


# --- Cancelling -----------------------------------------------------------------------------------


def test_a_waiting_task_is_cancelled_free_of_charge(customer: Customer) -> None:
    task_id = create(customer)
    waiting = query(customer, task_id)

    answer = customer.http.post(f"/v1/tasks/{task_id}/cancel")

    assert answer.status_code == 200
    assert answer.json() == waiting | {
        "status": "failed",
        "task_info": {"can_cancel": False},
        "error": {
            "code": "request_cancelled",
            "message": "The task was cancelled. You were not charged.",
            "type": "task_error",
        },
    }
    assert query(customer, task_id) == answer.json()
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_a_task_that_is_being_drawn_is_cancelled_free_of_charge(customer: Customer) -> None:
    task_id = create(customer)
    held = claim()

    answer = customer.http.post(f"/v1/tasks/{task_id}/cancel")

    assert answer.json()["error"]["code"] == "request_cancelled"
    assert customer.books() == (Decimal(1500), Decimal(0))
    with transaction() as session:
        assert not tasks.renew(session, {held: 50})


def test_a_finished_task_cannot_be_cancelled(customer: Customer, work: Work) -> None:
    task_id = create(customer)
    work()
    done = query(customer, task_id)

    error = refusal(customer.http.post(f"/v1/tasks/{task_id}/cancel"), 409)

    assert (error["code"], error["type"]) == ("task_already_ended", "invalid_request_error")
    assert query(customer, task_id) == done
    assert customer.books() == (Decimal(1485), Decimal(0))


def test_a_task_is_cancelled_once(customer: Customer) -> None:
    task_id = create(customer)

    answers = [customer.http.post(f"/v1/tasks/{task_id}/cancel") for _ in range(2)]

    assert [answer.status_code for answer in answers] == [200, 409]
    assert customer.books() == (Decimal(1500), Decimal(0))


def test_cancelling_what_is_no_task_id(customer: Customer) -> None:
    assert refusal(customer.http.post("/v1/tasks/x/cancel"), 400)["code"] == "invalid_task_id"


# --- The secret that signs callbacks --------------------------------------------------------------


def test_the_callback_secret_is_one_that_standard_webhooks_takes(customer: Customer) -> None:
    answer = customer.http.get("/v1/callbacks/secret")

    assert answer.status_code == 200
    assert list(answer.json()) == ["key"]
    kind, _, encoded = answer.json()["key"].partition("_")
    assert kind == "whsec"
    assert 24 <= len(base64.b64decode(encoded, validate=True)) <= 64


def test_the_callback_secret_is_the_accounts_own(
    customer: Customer, new_customer: NewCustomer, anyone: httpx.Client
) -> None:
    other = new_customer()

    secrets = {each.http.get("/v1/callbacks/secret").json()["key"] for each in (customer, other)}

    assert len(secrets) == 2
    refusal(anyone.get("/v1/callbacks/secret"), 401)


def test_a_replaced_callback_secret_signs_for_another_day(customer: Customer) -> None:
    old = customer.http.get("/v1/callbacks/secret").json()["key"]

    answer = customer.http.post("/v1/callbacks/secret/rotate")

    assert answer.status_code == 200
    new = answer.json()["key"]
    assert new != old
    assert customer.http.get("/v1/callbacks/secret").json() == {"key": new}
    with transaction() as session:
        account = session.get_one(Account, customer.id)
    assert account.callback_secret_before == old
    assert account.callback_secret_before_until is not None
    left_s = (account.callback_secret_before_until - datetime.now(UTC)).total_seconds()
    assert 23 * 3600 < left_s <= 24 * 3600


# --- One task, two dialects -----------------------------------------------------------------------


def test_the_other_dialect_reads_a_task_of_this_one(customer: Customer, work: Work) -> None:
    task_id = create(customer, size="400x377", seed=5)
    work()
    (link,) = query(customer, task_id)["results"]

    data = customer.http.get("/api/status", params={"task_id": task_id}).json()["data"]

    assert data["status"] == "SUCCESS"
    assert data["response"] == [link]
    assert data["request"] == {"prompt": "一只可爱的猫咪", "size": "400*377", "seed": "5"}


def test_this_dialect_reads_a_task_of_the_other_one(customer: Customer, work: Work) -> None:
    asked = {"prompt": "a cat", "aspect_ratio": "1:1"}
    task_id = customer.http.post("/api/generate", json=asked).json()["data"]["task_id"]
    work()
    (link,) = customer.http.get("/api/status", params={"task_id": task_id}).json()["data"][
        "response"
    ]

    body = query(customer, task_id)

    assert body["status"] == "completed"
    assert body["results"] == [link]
    assert urlsplit(link).path.endswith(".jpeg")


def test_nobody_else_reads_it_through_either(customer: Customer, new_customer: NewCustomer) -> None:
    other = new_customer().http
    asked = {"prompt": "a cat", "aspect_ratio": "1:1"}
    for task_id in (
        create(customer),
        customer.http.post("/api/generate", json=asked).json()["data"]["task_id"],
    ):
        assert other.get(f"/v1/tasks/{task_id}").status_code == 404
        assert other.get("/api/status", params={"task_id": task_id}).status_code == 404
