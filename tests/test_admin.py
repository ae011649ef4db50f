"""What operators' scripts rely on: the shapes under `/admin`, exact amounts, balanced books."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError

from api.dialects.routing import BODY_MAX_BYTES
from storage import accounts, ledger, tasks
from storage.database import engine, transaction
from storage.models import Account, ApiKey, EntryKind, ImageFormat, LedgerEntry, Task
from tests.conftest import case

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Customer, NewCustomer, Work

    Submit = Callable[..., Task]

ACCOUNT = {
    "id",
    "name",
    "user_group",
    "balance",
    "reserved",
    "unfinished_max",
    "suspended",
    "created_at",
}
KEY = {
    "id",
    "prefix",
    "account_id",
    "name",
    "models",
    "admin",
    "requests_per_minute",
    "created_at",
    "expires_at",
    "revoked_at",
    "last_used_at",
}
ENTRY = {
    "id",
    "account_id",
    "kind",
    "amount",
    "balance_after",
    "actor",
    "note",
    "task_id",
    "created_at",
}
JSON_TYPE = {"Content-Type": "application/json"}


def exactly(answer: httpx.Response) -> Any:
    """The JSON of an answer, its numbers as they were written."""
    return json.loads(answer.text, parse_float=Decimal, parse_int=Decimal)


def refusal(answer: httpx.Response, status: int) -> str:
    """The detail of a problem, once its form is proved."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert set(problem) == {"title", "status", "detail"}
    assert problem["status"] == status
    assert problem["title"]
    detail: str = problem["detail"]
    assert detail
    return detail


def move(operator: Customer, account_id: str, amount: str, **headers: str) -> httpx.Response:
    """Move credits; `amount` is written into the body as it is."""
    return operator.http.post(
        f"/admin/accounts/{account_id}/credits",
        content=f'{{"amount": {amount}}}',
        headers=JSON_TYPE | headers,
    )


def entries(account_id: str) -> list[LedgerEntry]:
    with transaction() as session:
        return ledger.entries(session, account_id, before=None, limit=1000)


# --- Accounts -------------------------------------------------------------------------------------


def test_an_account_is_created_with_everything_it_has(operator: Customer) -> None:
    answer = operator.http.post(
        "/admin/accounts", json={"name": "Ada", "user_group": "heavy", "unfinished_max": 7}
    )

    assert answer.status_code == 201
    assert answer.headers["content-type"] == "application/json"
    account = answer.json()
    assert set(account) == ACCOUNT
    assert account | {"id": "", "created_at": ""} == {
        "id": "",
        "name": "Ada",
        "user_group": "heavy",
        "balance": 0,
        "reserved": 0,
        "unfinished_max": 7,
        "suspended": False,
        "created_at": "",
    }
    created_at = datetime.fromisoformat(account["created_at"])
    assert created_at.utcoffset() == timedelta(0)
    assert operator.http.get(f"/admin/accounts/{account['id']}").json() == account


@pytest.mark.parametrize(
    ("asked", "limit"), [({}, 1000), ({"unfinished_max": None}, None), ({"unfinished_max": 1}, 1)]
)
def test_no_limit_is_said_with_null_and_the_default_with_nothing(
    operator: Customer, asked: dict[str, Any], limit: int | None
) -> None:
    answer = operator.http.post("/admin/accounts", json={"name": "Ada"} | asked)

    assert answer.json()["unfinished_max"] == limit


REFUSED_ACCOUNTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no name": ("name", {}),
    "null name": ("name", {"name": None}),
    "empty name": ("name", {"name": ""}),
    "name of 201 characters": ("name", {"name": "x" * 201}),
    "NUL in the name": ("name", {"name": "a\0"}),
    "line end in the name": ("name", {"name": "a\nb"}),
    "number as name": ("name", {"name": 5}),
    "space in the group": ("user_group", {"name": "a", "user_group": "a b"}),
    "null group": ("user_group", {"name": "a", "user_group": None}),
    "limit 0": ("unfinished_max", {"name": "a", "unfinished_max": 0}),
    "limit -1": ("unfinished_max", {"name": "a", "unfinished_max": -1}),
    "limit 2**31": ("unfinished_max", {"name": "a", "unfinished_max": 2**31}),
    "limit 1.5": ("unfinished_max", {"name": "a", "unfinished_max": 1.5}),
    "a misspelt field": ("usergroup", {"name": "a", "usergroup": "b"}),
    "the balance": ("balance", {"name": "a", "balance": 5}),
}


def test_an_account_that_cannot_be_is_refused_and_the_field_named(operator: Customer) -> None:
    for name, (field, body) in REFUSED_ACCOUNTS.items():
        with case(name):
            answer = operator.http.post("/admin/accounts", json=body)
            assert refusal(answer, 400).startswith(f"{field}: ")

    with transaction() as session:
        assert session.scalar(select(func.count()).select_from(Account)) == 1  # the operator's


def test_an_account_is_suspended_and_resumed(operator: Customer, customer: Customer) -> None:
    path = f"/admin/accounts/{customer.id}"
    before = operator.http.get(path).json()

    suspended = operator.http.patch(path, json={"suspended": True})
    resumed = operator.http.patch(path, json={"suspended": False})

    assert suspended.status_code == 200
    assert suspended.json() == before | {"suspended": True}
    assert resumed.json() == before


def test_a_change_changes_what_it_names_and_nothing_else(
    operator: Customer, customer: Customer
) -> None:
    path = f"/admin/accounts/{customer.id}"
    before = operator.http.get(path).json()

    changes: list[dict[str, Any]] = [
        {"name": "Grace"},
        {"user_group": "heavy"},
        {"unfinished_max": 3},
        {"unfinished_max": None},
    ]
    for change in changes:
        before |= change
        assert operator.http.patch(path, json=change).json() == before
    assert operator.http.get(path).json() == before


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"name": None},
        {"user_group": None},
        {"suspended": None},
        {"suspended": "true"},
        {"suspended": 1},
        {"unfinished_max": 0},
        {"balance": 5},
        {"id": "x"},
        [],
    ],
    ids=str,
)
def test_a_change_that_means_nothing_is_refused(
    operator: Customer, customer: Customer, body: Any
) -> None:
    path = f"/admin/accounts/{customer.id}"
    before = operator.http.get(path).json()

    refusal(operator.http.patch(path, json=body), 400)

    assert operator.http.get(path).json() == before


# --- Keys -----------------------------------------------------------------------------------------


def test_a_key_is_shown_once(operator: Customer, customer: Customer, anyone: httpx.Client) -> None:
    path = f"/admin/accounts/{customer.id}/keys"

    answer = operator.http.post(path, json={"name": "laptop"})

    assert answer.status_code == 201
    issued = answer.json()
    secret = issued.pop("key")
    assert set(issued) == KEY
    assert issued | {"id": "", "created_at": ""} == {
        "id": "",
        "prefix": secret[:11],
        "account_id": customer.id,
        "name": "laptop",
        "models": None,
        "admin": False,
        "requests_per_minute": 120,
        "created_at": "",
        "expires_at": None,
        "revoked_at": None,
        "last_used_at": None,
    }
    listed = operator.http.get(path)
    assert listed.json()["data"][0] == issued
    assert secret not in listed.text
    works = anyone.get("/api/status?task_id=x", headers={"Authorization": f"Bearer {secret}"})
    assert works.status_code == 404


@pytest.mark.parametrize(
    ("asked", "limit"),
    [({}, 120), ({"requests_per_minute": None}, None), ({"requests_per_minute": 1}, 1)],
)
def test_no_rate_limit_is_said_with_null_and_the_default_with_nothing(
    operator: Customer, customer: Customer, asked: dict[str, Any], limit: int | None
) -> None:
    answer = operator.http.post(f"/admin/accounts/{customer.id}/keys", json=asked)

    assert answer.json()["requests_per_minute"] == limit


def test_a_key_has_what_was_asked_for(operator: Customer, customer: Customer) -> None:
    answer = operator.http.post(
        f"/admin/accounts/{customer.id}/keys",
        json={
            "models": ["z-image-turbo", "another-model"],
            "admin": True,
            "expires_at": "2099-12-31T23:59:59+01:00",
        },
    )

    key = answer.json()
    assert key["models"] == ["another-model", "z-image-turbo"]
    assert key["admin"] is True
    assert key["expires_at"] == "2099-12-31T22:59:59Z"


def test_a_key_for_no_model_at_all_may_use_none(
    operator: Customer, customer: Customer, anyone: httpx.Client
) -> None:
    issued = operator.http.post(f"/admin/accounts/{customer.id}/keys", json={"models": []}).json()

    answer = anyone.post(
        "/api/generate",
        json={"prompt": "a cat", "aspect_ratio": "1:1"},
        headers={"Authorization": f"Bearer {issued['key']}"},
    )

    assert answer.status_code == 403


REFUSED_KEYS: dict[str, tuple[str, dict[str, Any]]] = {
    "limit 0": ("requests_per_minute", {"requests_per_minute": 0}),
    "limit 2**31": ("requests_per_minute", {"requests_per_minute": 2**31}),
    "a date without a zone": ("expires_at", {"expires_at": "2099-12-31T23:59:59"}),
    "no date": ("expires_at", {"expires_at": "tomorrow"}),
    "word as admin": ("admin", {"admin": "false"}),
    "number as admin": ("admin", {"admin": 1}),
    "empty model": ("models", {"models": [""]}),
    "word as models": ("models", {"models": "z-image-turbo"}),
    "a misspelt field": ("model", {"model": ["z-image-turbo"]}),
    "the key": ("key", {"key": "zk_mine"}),
}


def test_a_key_that_cannot_be_is_refused_and_the_field_named(
    operator: Customer, customer: Customer
) -> None:
    for name, (field, body) in REFUSED_KEYS.items():
        with case(name):
            answer = operator.http.post(f"/admin/accounts/{customer.id}/keys", json=body)
            assert refusal(answer, 400).startswith(field)

    with transaction() as session:
        keys = session.scalars(select(ApiKey).where(ApiKey.account_id == customer.id)).all()
    assert [key.id for key in keys] == [customer.key_id]


def test_a_rotated_key_has_a_successor_that_may_do_the_same(operator: Customer) -> None:
    account = operator.http.post("/admin/accounts", json={"name": "Ada"}).json()
    asked = {"name": "laptop", "models": ["z-image-turbo"], "requests_per_minute": 5, "admin": True}
    path = f"/admin/accounts/{account['id']}/keys"
    old = operator.http.post(path, json=asked).json()

    answer = operator.http.post(f"/admin/keys/{old['id']}/rotate", json={"overlap_s": 3600})

    assert answer.status_code == 201
    new = answer.json()
    assert set(new) == KEY | {"key"}
    assert new["key"] != old["key"]
    assert new["id"] != old["id"]
    assert {name: new[name] for name in asked} == asked
    assert new["expires_at"] is None
    (_, listed) = operator.http.get(path).json()["data"]
    left = datetime.fromisoformat(listed["expires_at"]) - datetime.now(UTC)
    assert timedelta(minutes=59) < left <= timedelta(hours=1)


def test_without_a_word_about_it_a_rotation_overlaps_for_a_day(
    operator: Customer, customer: Customer
) -> None:
    answer = operator.http.post(f"/admin/keys/{customer.key_id}/rotate")

    assert answer.status_code == 201
    with transaction() as session:
        expires_at = session.get_one(ApiKey, customer.key_id).expires_at
    assert expires_at is not None
    left = expires_at - datetime.now(UTC)
    assert timedelta(hours=23) < left <= timedelta(days=1)


@pytest.mark.parametrize("overlap_s", [-1, 30 * 24 * 3600 + 1, 1.5, "1h"])
def test_an_overlap_has_limits(
    operator: Customer, customer: Customer, overlap_s: float | str
) -> None:
    answer = operator.http.post(
        f"/admin/keys/{customer.key_id}/rotate", json={"overlap_s": overlap_s}
    )

    assert refusal(answer, 400).startswith("overlap_s: ")


def test_a_key_that_has_ended_is_not_rotated(operator: Customer, customer: Customer) -> None:
    operator.http.delete(f"/admin/keys/{customer.key_id}")

    refusal(operator.http.post(f"/admin/keys/{customer.key_id}/rotate"), 404)


def test_a_key_is_revoked_once_and_for_all(operator: Customer, customer: Customer) -> None:
    path = f"/admin/keys/{customer.key_id}"

    answer = operator.http.delete(path)

    assert answer.status_code == 200
    key = answer.json()
    assert set(key) == KEY
    assert datetime.fromisoformat(key["revoked_at"]) <= datetime.now(UTC)
    assert operator.http.delete(path).json() == key
    assert customer.http.get("/api/status?task_id=x").status_code == 401


# --- Credits --------------------------------------------------------------------------------------


def test_a_top_up_is_an_entry_and_a_balance(operator: Customer, customer: Customer) -> None:
    answer = operator.http.post(
        f"/admin/accounts/{customer.id}/credits", json={"amount": 100.5, "note": "invoice 7"}
    )

    assert answer.status_code == 201
    entry = answer.json()
    assert set(entry) == ENTRY
    assert entry | {"id": 0, "created_at": ""} == {
        "id": 0,
        "account_id": customer.id,
        "kind": "grant",
        "amount": 100.5,
        "balance_after": 1600.5,
        "actor": f"key:{operator.key_id}",
        "note": "invoice 7",
        "task_id": None,
        "created_at": "",
    }
    assert customer.books() == (Decimal("1600.5"), Decimal(0))


def test_a_negative_amount_is_an_adjustment(operator: Customer, customer: Customer) -> None:
    entry = move(operator, customer.id, "-0.5").json()

    assert (entry["kind"], entry["amount"], entry["balance_after"]) == ("adjustment", -0.5, 1499.5)


@pytest.mark.parametrize(
    "amount",
    ["0.000001", "123456789.123456", "999999999.999999", "0.1", "100000", "1e2", "-0.000001"],
)
def test_an_amount_is_exact_to_six_places(
    operator: Customer, customer: Customer, amount: str
) -> None:
    answer = move(operator, customer.id, amount)

    assert answer.status_code == 201
    entry = exactly(answer)
    assert entry["amount"] == Decimal(amount)
    assert entry["balance_after"] == 1500 + Decimal(amount)
    account = exactly(operator.http.get(f"/admin/accounts/{customer.id}"))
    assert account["balance"] == 1500 + Decimal(amount)


@pytest.mark.parametrize("amount", ["100000", "15", "0.000001", "123456789012.123456"])
def test_an_amount_is_written_out_in_all_its_digits(operator: Customer, amount: str) -> None:
    with transaction() as session:
        account = accounts.create(session, "Ada")
        ledger.grant(session, account.id, Decimal(amount), actor="test")

    assert f'"balance":{amount},' in operator.http.get(f"/admin/accounts/{account.id}").text


def test_amounts_add_up_without_a_rounding_error(operator: Customer) -> None:
    account_id = operator.http.post("/admin/accounts", json={"name": "Ada"}).json()["id"]

    for _ in range(10):
        move(operator, account_id, "0.1")
    move(operator, account_id, "123456789.000001")

    answer = operator.http.get(f"/admin/accounts/{account_id}")
    assert '"balance":123456790.000001,' in answer.text


@pytest.mark.parametrize(
    "amount",
    [
        "0",
        "-0.0",
        "0.0000001",
        "1.0000001",
        "1234567890",
        "1e400",
        "NaN",
        "Infinity",
        "null",
        "true",
        '"many"',
        "[1]",
    ],
)
def test_an_amount_that_cannot_be_kept_exactly_is_refused(
    operator: Customer, customer: Customer, amount: str
) -> None:
    assert refusal(move(operator, customer.id, amount), 400).startswith("amount: ")
    assert len(entries(customer.id)) == 1


def test_an_amount_must_be_there(operator: Customer, customer: Customer) -> None:
    answer = operator.http.post(f"/admin/accounts/{customer.id}/credits", json={"note": "x"})

    assert refusal(answer, 400).startswith("amount: ")


def test_no_account_has_more_than_can_be_kept(operator: Customer, customer: Customer) -> None:
    with transaction() as session:
        ledger.grant(session, customer.id, ledger.BALANCE_MAX - 1500 - 1, actor="test")

    refusal(move(operator, customer.id, "1.000001"), 409)
    assert move(operator, customer.id, "1").status_code == 201
    assert customer.books()[0] == ledger.BALANCE_MAX


def test_an_adjustment_leaves_what_unfinished_tasks_have_reserved(
    operator: Customer, customer: Customer, submit: Submit
) -> None:
    submit(customer)

    refusal(move(operator, customer.id, "-1485.000001"), 409)
    assert customer.books() == (Decimal(1500), Decimal(15))

    assert move(operator, customer.id, "-1485").status_code == 201
    assert customer.books() == (Decimal(15), Decimal(15))


def test_the_same_top_up_sent_again_moves_nothing(operator: Customer, customer: Customer) -> None:
    first = move(operator, customer.id, "100", **{"Idempotency-Key": "order-1"})
    again = move(operator, customer.id, "100", **{"Idempotency-Key": "order-1"})

    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert customer.books() == (Decimal(1600), Decimal(0))


def test_a_replay_answers_the_first_entry_whatever_has_happened_since(
    operator: Customer, customer: Customer
) -> None:
    first = move(operator, customer.id, "100", **{"Idempotency-Key": "order-1"})
    move(operator, customer.id, "-1600")

    again = move(operator, customer.id, "100", **{"Idempotency-Key": "order-1"})

    assert again.json() == first.json()
    assert customer.books() == (Decimal(0), Decimal(0))


@pytest.mark.parametrize("changed", [{"amount": 101}, {"note": "another"}, {"note": None}])
def test_one_idempotency_key_is_for_one_top_up(
    operator: Customer, customer: Customer, changed: dict[str, Any]
) -> None:
    path = f"/admin/accounts/{customer.id}/credits"
    asked = {"amount": 100, "note": "invoice 7"}
    headers = {"Idempotency-Key": "order-1"}
    operator.http.post(path, json=asked, headers=headers)

    refusal(operator.http.post(path, json=asked | changed, headers=headers), 422)

    assert customer.books() == (Decimal(1600), Decimal(0))


def test_accounts_do_not_share_idempotency_keys(
    operator: Customer, new_customer: NewCustomer
) -> None:
    for account in (new_customer(), new_customer()):
        answer = move(operator, account.id, "100", **{"Idempotency-Key": "order-1"})

        assert answer.status_code == 201
        assert account.books() == (Decimal(1600), Decimal(0))


def test_an_idempotency_key_may_be_quoted_as_the_draft_standard_has_it(
    operator: Customer, customer: Customer
) -> None:
    move(operator, customer.id, "100", **{"Idempotency-Key": "order-1"})
    again = move(operator, customer.id, "100", **{"Idempotency-Key": '"order-1"'})

    assert again.headers["idempotency-replayed"] == "true"


@pytest.mark.parametrize(
    ("key", "status"), [("x", 201), ("x" * 255, 201), ("", 400), ("x" * 256, 400), ("a b", 400)]
)
def test_an_idempotency_key_has_1_to_255_visible_characters(
    operator: Customer, customer: Customer, key: str, status: int
) -> None:
    answer = move(operator, customer.id, "100", **{"Idempotency-Key": key})

    assert answer.status_code == status
    assert len(entries(customer.id)) == (2 if status == 201 else 1)


def test_of_the_same_top_up_many_times_at_once_one_is_entered(
    operator: Customer, customer: Customer
) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(
                lambda _: move(operator, customer.id, "100", **{"Idempotency-Key": "order-1"}),
                range(12),
            )
        )

    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    assert customer.books() == (Decimal(1600), Decimal(0))


def test_of_adjustments_at_once_no_more_than_there_is_is_taken(
    operator: Customer, customer: Customer
) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: move(operator, customer.id, "-400"), range(8)))

    assert sorted(answer.status_code for answer in answers) == [201] * 3 + [409] * 5
    assert customer.books() == (Decimal(300), Decimal(0))


def test_a_note_has_at_most_1000_printable_characters(
    operator: Customer, customer: Customer
) -> None:
    path = f"/admin/accounts/{customer.id}/credits"

    assert operator.http.post(path, json={"amount": 1, "note": "注" * 1000}).status_code == 201
    for note in ("x" * 1001, "a\0b", "a\nb"):
        answer = operator.http.post(path, json={"amount": 1, "note": note})
        assert refusal(answer, 400).startswith("note: ")


# --- The ledger -----------------------------------------------------------------------------------


def test_a_charge_names_its_task(operator: Customer, customer: Customer, work: Work) -> None:
    asked = {"prompt": "a cat", "aspect_ratio": "1:1"}
    task_id = customer.http.post("/api/generate", json=asked).json()["data"]["task_id"]
    work()

    page = operator.http.get(f"/admin/accounts/{customer.id}/ledger").json()

    charge, grant = page["data"]
    assert charge | {"id": 0, "created_at": ""} == {
        "id": 0,
        "account_id": customer.id,
        "kind": "charge",
        "amount": -15,
        "balance_after": 1485,
        "actor": "worker",
        "note": None,
        "task_id": task_id,
        "created_at": "",
    }
    assert (grant["kind"], grant["amount"]) == ("grant", 1500)
    assert page["next_cursor"] is None


def test_the_ledger_of_all_is_that_of_each(operator: Customer, new_customer: NewCustomer) -> None:
    one, other = new_customer(), new_customer()

    every = operator.http.get("/admin/ledger").json()["data"]

    assert [entry["account_id"] for entry in every] == [other.id, one.id]
    assert operator.http.get(f"/admin/accounts/{one.id}/ledger").json()["data"] == every[1:]


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger_entries SET amount = 1",
        "UPDATE ledger_entries SET note = 'other'",
        "DELETE FROM ledger_entries",
    ],
)
def test_no_entry_can_be_changed_or_taken_away(customer: Customer, statement: str) -> None:
    with pytest.raises(DBAPIError, match="only ever added"), engine.begin() as connection:
        connection.execute(text(statement))

    (entry,) = entries(customer.id)
    assert (entry.amount, entry.note) == (Decimal(1500), None)


def test_a_task_cannot_be_charged_twice_whoever_asks(
    customer: Customer, submit: Submit, work: Work
) -> None:
    task = submit(customer)
    work()

    again = LedgerEntry(
        account_id=customer.id,
        kind=EntryKind.CHARGE,
        amount=Decimal(-15),
        balance_after=Decimal(1470),
        actor="test",
        task_id=task.id,
    )
    with pytest.raises(IntegrityError), transaction() as session:
        session.add(again)


# --- The books ------------------------------------------------------------------------------------


def test_the_books_of_a_busy_service_balance(
    operator: Customer, new_customer: NewCustomer, submit: Submit, work: Work
) -> None:
    drawn, cancelled, waiting = new_customer(), new_customer(), new_customer()
    submit(drawn)
    work()
    with transaction() as session:
        tasks.cancel(session, submit(cancelled).id)
    submit(waiting)
    move(operator, waiting.id, "-0.000001")

    answer = operator.http.get("/admin/books")

    assert answer.status_code == 200
    assert answer.json() == {"balanced": True, "accounts": 4, "faults": []}


UNGUARDED = text("SET LOCAL session_replication_role = replica")
"""The database would refuse by itself what the books are to find."""


@pytest.mark.parametrize(
    ("column", "fault"),
    [
        ("balance", "balance 1501.000000, but entries sum to 1500.000000"),
        ("reserved", "reserved 16.000000, but unfinished tasks hold 15.000000"),
        ("unfinished", "2 unfinished, but 1 tasks are"),
    ],
)
def test_a_fault_in_the_books_is_found_and_named(
    operator: Customer, customer: Customer, submit: Submit, column: str, fault: str
) -> None:
    submit(customer)
    change = f"UPDATE accounts SET {column} = {column} {{}} 1 WHERE id = '{customer.id}'"
    with engine.begin() as connection:
        connection.execute(UNGUARDED)
        connection.execute(text(change.format("+")))

    books = operator.http.get("/admin/books").json()

    with engine.begin() as connection:
        connection.execute(UNGUARDED)
        connection.execute(text(change.format("-")))
    assert books == {"balanced": False, "accounts": 2, "faults": [f"{customer.id}: {fault}"]}


def test_a_charge_for_a_task_that_was_not_drawn_is_found(
    operator: Customer, customer: Customer, submit: Submit
) -> None:
    task = submit(customer)
    wrong = "UPDATE tasks SET status = 'completed', image_key = 'x' WHERE id = :id"
    with engine.begin() as connection:
        connection.execute(UNGUARDED)
        connection.execute(text(wrong), {"id": task.id})

    books = operator.http.get("/admin/books").json()

    with engine.begin() as connection:
        connection.execute(UNGUARDED)
        right = "UPDATE tasks SET status = 'pending', image_key = NULL WHERE id = :id"
        connection.execute(text(right), {"id": task.id})
    assert not books["balanced"]
    assert f"{customer.id}: 1 completed tasks without their charge" in books["faults"]


# --- Tasks ----------------------------------------------------------------------------------------

TASK = {
    "id",
    "account_id",
    "dialect",
    "model",
    "width",
    "height",
    "seed",
    "price",
    "status",
    "progress",
    "attempt",
    "worker",
    "error_code",
    "error_message",
    "request_id",
    "created_at",
    "started_at",
    "finished_at",
}


def test_tasks_are_listed_without_what_the_customer_wrote(
    operator: Customer, customer: Customer
) -> None:
    answer = customer.http.post(
        "/api/generate",
        json={"prompt": "my own business", "aspect_ratio": "16:9", "seed": 7},
        headers={"X-Request-ID": "mine"},
    )

    listed = operator.http.get("/admin/tasks")

    (task,) = listed.json()["data"]
    assert set(task) == TASK
    assert task | {"created_at": ""} == {
        "id": answer.json()["data"]["task_id"],
        "account_id": customer.id,
        "dialect": "zimageturbo",
        "model": "z-image-turbo",
        "width": 1280,
        "height": 720,
        "seed": 7,
        "price": 15,
        "status": "pending",
        "progress": 0,
        "attempt": 0,
        "worker": None,
        "error_code": None,
        "error_message": None,
        "request_id": "mine",
        "created_at": "",
        "started_at": None,
        "finished_at": None,
    }
    assert "my own business" not in listed.text


def test_tasks_are_found_by_account_and_by_status(
    operator: Customer, new_customer: NewCustomer, submit: Submit, work: Work
) -> None:
    one, other = new_customer(), new_customer()
    drawn = submit(one)
    work()
    waiting, foreign = submit(one), submit(other)

    def found(**query: str) -> list[str]:
        return [
            task["id"] for task in operator.http.get("/admin/tasks", params=query).json()["data"]
        ]

    assert found() == [foreign.id, waiting.id, drawn.id]
    assert found(account_id=one.id) == [waiting.id, drawn.id]
    assert found(status="pending") == [foreign.id, waiting.id]
    assert found(account_id=one.id, status="completed") == [drawn.id]
    assert found(account_id="nobody") == []
    refusal(operator.http.get("/admin/tasks?status=finished"), 400)


def test_an_operator_cancels_anybodys_task_free_of_charge(
    operator: Customer, customer: Customer, submit: Submit
) -> None:
    task = submit(customer)
    path = f"/admin/tasks/{task.id}/cancel"

    answer = operator.http.post(path)

    assert answer.status_code == 200
    assert set(answer.json()) == TASK
    assert (answer.json()["id"], answer.json()["status"]) == (task.id, "cancelled")
    assert customer.books() == (Decimal(1500), Decimal(0))
    refusal(operator.http.post(path), 409)


# --- Pages ----------------------------------------------------------------------------------------


def walk(operator: Customer, path: str, limit: int) -> list[list[Any]]:
    """The ids on each page of a list."""
    pages, cursor = [], None
    while True:
        query = {"limit": str(limit)} | ({} if cursor is None else {"cursor": cursor})
        page = operator.http.get(path, params=query).json()
        assert set(page) == {"data", "next_cursor"}
        pages.append([row["id"] for row in page["data"]])
        cursor = page["next_cursor"]
        if cursor is None:
            return pages


def flat(pages: list[list[Any]]) -> list[Any]:
    return [row for page in pages for row in page]


def test_250_accounts_are_walked_newest_first_without_a_repeat(operator: Customer) -> None:
    with transaction() as session:
        made = [accounts.create(session, "one of many").id for _ in range(249)]

    pages = walk(operator, "/admin/accounts", 100)

    assert [len(page) for page in pages] == [100, 100, 50]
    assert flat(pages) == [*reversed(made), operator.id]


def test_250_keys_are_walked_newest_first_without_a_repeat(
    operator: Customer, customer: Customer
) -> None:
    with transaction() as session:
        made = [accounts.issue_key(session, customer.id)[0].id for _ in range(249)]

    pages = walk(operator, f"/admin/accounts/{customer.id}/keys", 100)

    assert flat(pages) == [*reversed(made), customer.key_id]


def test_250_entries_are_walked_newest_first_without_a_repeat(
    operator: Customer, customer: Customer
) -> None:
    with transaction() as session:
        for _ in range(249):
            ledger.grant(session, customer.id, Decimal(1), actor="test")

    for path in ("/admin/ledger", f"/admin/accounts/{customer.id}/ledger"):
        assert flat(walk(operator, path, 100)) == list(range(250, 0, -1))


def test_250_tasks_of_one_moment_are_walked_without_a_repeat(
    operator: Customer, new_customer: NewCustomer
) -> None:
    customer = new_customer(250 * 15)
    with transaction() as session:
        asked = tasks.Submission(
            account_id=customer.id,
            api_key_id=customer.key_id,
            images=(tasks.ImageRequest("a cat", 64, 64, ImageFormat.PNG),),
            dialect="test",
            price=Decimal(15),
        )
        outcomes = tasks.submit_many(session, [asked] * 250)
    made = [made.tasks[0].id for made in outcomes if isinstance(made, tasks.Submitted)]

    pages = walk(operator, "/admin/tasks", 100)

    assert flat(pages) == sorted(made, reverse=True)


def test_what_comes_in_between_two_pages_moves_nothing(operator: Customer) -> None:
    with transaction() as session:
        made = [accounts.create(session, "one of many").id for _ in range(5)]
    first = operator.http.get("/admin/accounts?limit=3").json()
    with transaction() as session:
        accounts.create(session, "a newcomer")

    second = operator.http.get(
        "/admin/accounts", params={"limit": 3, "cursor": first["next_cursor"]}
    ).json()

    ids = [row["id"] for row in first["data"] + second["data"]]
    assert ids == [*reversed(made), operator.id]
    assert second["next_cursor"] is None


LISTS = ["/admin/accounts", "/admin/accounts/{id}/keys", "/admin/accounts/{id}/ledger"]
LISTS += ["/admin/ledger", "/admin/tasks"]


@pytest.mark.parametrize("path", LISTS)
def test_a_page_has_1_to_100_rows_and_a_cursor_that_was_given(
    operator: Customer, path: str
) -> None:
    path = path.format(id=operator.id)
    for limit in (1, 100):
        assert operator.http.get(path, params={"limit": limit}).status_code == 200
    for wrong in (0, 101, -1, "many"):
        with case(f"limit {wrong}"):
            answer = operator.http.get(path, params={"limit": wrong})
            assert refusal(answer, 400).startswith("limit: ")
    made_up = [[], [1, 2, 3], ["x"], ["x", "y"], [None, None], [1.5], [True], [2**63], {"a": 1}]
    for cursor in [
        "x",
        "é",
        "\0",
        "x" * 501,
        *(base64.urlsafe_b64encode(json.dumps(each).encode()).decode() for each in made_up),
    ]:
        with case(f"cursor {cursor}"):
            answer = operator.http.get(path, params={"cursor": cursor})
            assert refusal(answer, 400).startswith("cursor: ")


def test_a_page_has_50_rows_if_nothing_is_said(operator: Customer) -> None:
    with transaction() as session:
        for _ in range(50):
            accounts.create(session, "one of many")

    page = operator.http.get("/admin/accounts").json()

    assert len(page["data"]) == 50
    assert page["next_cursor"] is not None


# --- Callback secrets -----------------------------------------------------------------------------


def test_an_operator_replaces_a_callback_secret(operator: Customer, customer: Customer) -> None:
    path = f"/admin/accounts/{customer.id}/callback-secret"
    old = operator.http.get(path)
    assert old.json() == customer.http.get("/v1/callbacks/secret").json()

    answer = operator.http.post(f"{path}/rotate", json={"overlap_s": 60})

    assert answer.status_code == 201
    assert list(answer.json()) == ["key"]
    assert answer.json() != old.json()
    assert operator.http.get(path).json() == answer.json()
    with transaction() as session:
        account = session.get_one(Account, customer.id)
    assert account.callback_secret_before == old.json()["key"]
    assert account.callback_secret_before_until is not None
    left = account.callback_secret_before_until - datetime.now(UTC)
    assert timedelta(seconds=50) < left <= timedelta(seconds=60)


# --- Who may, and what is not there ---------------------------------------------------------------

ROUTES = [
    ("POST", "/admin/accounts"),
    ("GET", "/admin/accounts"),
    ("GET", "/admin/accounts/{account}"),
    ("PATCH", "/admin/accounts/{account}"),
    ("POST", "/admin/accounts/{account}/keys"),
    ("GET", "/admin/accounts/{account}/keys"),
    ("POST", "/admin/keys/{key}/rotate"),
    ("DELETE", "/admin/keys/{key}"),
    ("GET", "/admin/accounts/{account}/callback-secret"),
    ("POST", "/admin/accounts/{account}/callback-secret/rotate"),
    ("POST", "/admin/accounts/{account}/credits"),
    ("GET", "/admin/accounts/{account}/ledger"),
    ("GET", "/admin/ledger"),
    ("GET", "/admin/books"),
    ("GET", "/admin/tasks"),
    ("POST", "/admin/tasks/{task}/cancel"),
    ("GET", "/admin/workers"),
]


def test_the_routes_here_are_all_there_are(anyone: httpx.Client) -> None:
    paths = anyone.get("/openapi.json").json()["paths"]

    documented = {
        (method.upper(), path)
        for path, methods in paths.items()
        for method in methods
        if path.startswith("/admin")
    }
    named = {
        (method, path.format(account="{account_id}", key="{key_id}", task="{task_id}"))
        for method, path in ROUTES
    }
    assert documented == named


def test_only_operators_are_let_in(
    customer: Customer, anyone: httpx.Client, submit: Submit
) -> None:
    own = {"account": customer.id, "key": customer.key_id, "task": submit(customer).id}
    for method, path in ROUTES:
        with case(f"{method} {path}"):
            refusal(anyone.request(method, path.format(**own)), 401)
            refusal(customer.http.request(method, path.format(**own)), 403)
    assert customer.books() == (Decimal(1500), Decimal(15))


def test_a_suspended_operator_is_none(operator: Customer) -> None:
    with transaction() as session:
        accounts.change(session, operator.id, suspended=True)

    refusal(operator.http.get("/admin/books"), 403)


def test_what_does_not_exist_is_404(operator: Customer) -> None:
    bodies = {"PATCH": {"name": "a"}, "POST": None}
    credit = ("POST", "/admin/accounts/{account}/credits")
    for name in ("nobody", "a%00b", "%F0%9F%A6%8A"):
        for method, path in ROUTES:
            if "{" not in path:
                continue
            with case(f"{method} {path} {name}"):
                body: Any = {"amount": 1} if (method, path) == credit else bodies.get(method)
                if path.endswith("/keys") and method == "POST":
                    body = {}
                answer = operator.http.request(
                    method, path.format(account=name, key=name, task=name), json=body
                )
                refusal(answer, 404)
    refusal(operator.http.get("/admin/nothing"), 404)


def test_a_wrong_method_is_405_and_says_the_right_ones(operator: Customer) -> None:
    answer = operator.http.put("/admin/accounts")

    refusal(answer, 405)
    assert set(answer.headers["allow"].split(", ")) == {"GET", "POST"}


def test_a_body_that_is_too_long_is_413(operator: Customer) -> None:
    refusal(operator.http.post("/admin/accounts", json={"name": "x" * BODY_MAX_BYTES}), 413)


def test_a_body_that_is_not_json_is_400(operator: Customer) -> None:
    refusal(operator.http.post("/admin/accounts", content=b"{", headers=JSON_TYPE), 400)


def test_an_operators_key_may_have_a_rate_limit(new_customer: NewCustomer) -> None:
    limited = new_customer(0, admin=True, requests_per_minute=1)
    for _ in range(500):
        answer = limited.http.get("/admin/books")
        if answer.status_code != 200:
            break

    refusal(answer, 429)
    assert int(answer.headers["retry-after"]) >= 1
