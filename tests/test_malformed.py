"""Malformed requests are refused in their dialect's envelope, and leave nothing behind.

A few hundred of what `python -m soak.malformed` sends by the thousand, and what it has found.
"""

import json
import socket
from collections.abc import Callable

import httpx
import pytest

from api.app import create_app
from soak.malformed import Answer, Judge, bombard, valid_shots
from soak.target import make_names, written
from tests.conftest import Atelier, Customer, NewCustomer, assert_untouched, case

DOCUMENT = create_app().openapi()
SEED = 1
SHOTS = 150
ENOUGH = 10**9
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def rich(new_customer: NewCustomer) -> Customer:
    return new_customer(ENOUGH)


@pytest.fixture
def keys(rich: Customer, operator: Customer) -> Callable[[str], str]:
    """The key that is shown at a path."""
    return lambda path: operator.key if path.startswith("/admin") else rich.key


def test_malformed_requests_are_refused_in_their_dialect_and_write_nothing(
    server: str,
    rich: Customer,
    operator: Customer,
    keys: Callable[[str], str],
    drawing: Atelier,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = make_names(server, rich.key, operator.key)

    outcome = bombard(server, DOCUMENT, names, keys, seed=SEED, count=SHOTS)

    assert outcome.faults == []
    assert "Traceback" not in "".join(capsys.readouterr())
    refused = sum(times for status, times in outcome.answers.items() if status >= 400)
    assert refused > SHOTS / 2  # they are malformed indeed


def test_the_judge_blames_a_write_an_envelope_and_a_crash(
    rich: Customer, keys: Callable[[str], str], submit: Callable[..., object]
) -> None:
    """Or it would say of every service that it is well."""
    names = dict.fromkeys(("account_id", "delivery_id", "key_id", "model", "task_id"), "x")
    (shot,) = {
        shot.operation: shot
        for shot, _, _ in valid_shots(DOCUMENT, names, keys)
        if shot.operation == "POST /api/generate"
    }.values()
    judge = Judge(DOCUMENT)
    envelope = json.dumps({"code": 400, "message": "no", "data": None}).encode()
    refusal = Answer(400, "application/json", envelope, replayed=False)
    before = written()

    assert judge.fault(shot, refusal, before, before) is None
    assert judge.fault(shot, Answer(400, "text/html", b"no", False), before, before)
    assert judge.fault(shot, Answer(500, "application/json", envelope, False), before, before)
    assert judge.fault(shot, Answer(200, "application/json", b"{}", False), before, before)

    submit(rich)

    assert judge.fault(shot, refusal, before, written())


# --- What was found -------------------------------------------------------------------------------


def test_a_body_that_is_nested_as_deeply_as_can_be_read_is_taken_or_refused(
    rich: Customer, drawing: Atelier
) -> None:
    """It is read more than once, and not always with as much room for it."""
    for depth in range(930, 1000, 3):
        with case(str(depth)):
            nested = "[" * depth + "]" * depth
            body = f'{{"model": "z-image-turbo", "prompt": "a cat", "metadata": {nested}}}'
            answer = rich.http.post(
                "/v1/images/generations",
                content=body,
                params={"dry_run": "true"} if depth % 2 else None,
                headers=JSON | {"Idempotency-Key": str(depth)},
            )
            assert answer.status_code in (200, 400), answer.text


def test_a_model_whose_name_is_half_a_character_is_not_found(rich: Customer) -> None:
    answer = rich.http.post(
        "/openai/v1/images/generations",
        content=b'{"prompt": "a cat", "model": "\\ud800"}',
        headers=JSON,
    )

    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "moment", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", 1000, "1000"]
)
def test_a_key_expires_at_a_moment_that_exists(
    moment: object, rich: Customer, operator: Customer
) -> None:
    answer = operator.http.post(f"/admin/accounts/{rich.id}/keys", json={"expires_at": moment})

    assert answer.status_code == 400
    assert len(operator.http.get(f"/admin/accounts/{rich.id}/keys").json()["data"]) == 1


@pytest.mark.parametrize("model", ["a\0b", "\n", ""])
def test_a_model_of_a_key_has_a_name(model: str, rich: Customer, operator: Customer) -> None:
    answer = operator.http.post(f"/admin/accounts/{rich.id}/keys", json={"models": [model]})

    assert answer.status_code == 400


@pytest.mark.parametrize("amount", ["1_000", "１０", " 1", "1e3", "+-1", "1.", "NaN", True])
def test_an_amount_is_written_with_plain_digits(
    amount: object, rich: Customer, operator: Customer
) -> None:
    answer = operator.http.post(f"/admin/accounts/{rich.id}/credits", json={"amount": amount})

    assert answer.status_code == 400
    assert rich.books() == (ENOUGH, 0)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("keys", {"requests_per_minute": "60"}),
        ("callback-secret/rotate", {"overlap_s": "60"}),
        ("callback-secret/rotate", {"overlap_s": 60.0}),
    ],
)
def test_a_number_of_an_operator_is_a_number(
    path: str, body: dict[str, object], rich: Customer, operator: Customer
) -> None:
    assert operator.http.post(f"/admin/accounts/{rich.id}/{path}", json=body).status_code == 400


def test_whoever_hangs_up_in_the_middle_of_a_body_is_no_error_of_ours(
    server: str, rich: Customer, capsys: pytest.CaptureFixture[str], anyone: httpx.Client
) -> None:
    place = httpx.URL(server)
    head = (
        f"POST /api/generate HTTP/1.1\r\nHost: {place.host}\r\nAuthorization: Bearer {rich.key}\r\n"
        "Content-Type: application/json\r\nContent-Length: 99\r\nX-Request-ID: gone\r\n\r\n{"
    )
    with socket.create_connection((place.host, place.port or 0)) as line:
        line.sendall(head.encode())
        line.shutdown(socket.SHUT_WR)
        answered = line.recv(1)

    assert answered == b""
    assert "request.failed" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("field", ["user", "safety_identifier"])
def test_half_a_pair_that_an_answer_would_repeat_is_refused_before_anything_is_drawn(
    customer: Customer, field: str
) -> None:
    body = json.dumps({"model": "z-image-turbo", "prompt": "a fox", field: "\ud800"})

    answer = customer.http.post(
        "/openai/v1/images/generations",
        content=body,
        headers={"Content-Type": "application/json"},
    )

    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field
    assert_untouched(customer)
