"""REST for operators. Errors are RFC 9457 problem details, lists are cursor pages, newest first."""

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import APIRouter, Header, Query
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, StrictBool
from starlette.responses import Response

from api.answers import JSON, Problem
from api.auth import Caller, admit_admin
from api.dialects import routing
from storage import accounts, errors, events, ledger, tasks
from storage.accounts import CREATES_PER_MINUTE
from storage.database import transaction
from storage.models import Account, ApiKey, LedgerEntry, Task, TaskStatus
from storage.settings import settings

PAGE_MAX = 100
PAGE_DEFAULT = 50
NAME_MAX_CHARACTERS = 200
NOTE_MAX_CHARACTERS = 1000
OVERLAP_S = 24 * 3600
"""How long a rotated key or secret stays valid, unless the operator says otherwise."""
OVERLAP_MAX_S = 30 * 24 * 3600
AMOUNT_DIGITS_MAX = 15
"""Of one movement, six of them after the point: what a JSON number carries exactly."""
IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")

ERRORS: dict[type[errors.ServiceError], int] = {
    errors.InvalidRequest: 400,
    errors.Unauthenticated: 401,
    errors.AccountSuspended: 403,
    errors.AdminOnly: 403,
    errors.AccountNotFound: 404,
    errors.KeyNotFound: 404,
    errors.PathNotFound: 404,
    errors.TaskNotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.TaskEnded: 409,
    errors.WouldOverdraw: 409,
    errors.PayloadTooLarge: 413,
    errors.IdempotencyConflict: 422,
    errors.RateLimited: 429,
    errors.InternalError: 500,
    errors.ServiceUnavailable: 503,
}


def render_error(error: errors.ServiceError) -> Response:
    status = ERRORS.get(type(error), ERRORS[errors.InternalError])
    body = {"title": HTTPStatus(status).phrase, "status": status, "detail": str(error)}
    return Problem(body, status, error.headers)


router = routing.dialect_router(render_error, admit_admin)


def routers() -> list[APIRouter]:
    return [router, routing.close([router], "/admin", render_error)]


# --- Shapes -------------------------------------------------------------------------------------


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("must not contain control characters")
    return name


Name = Annotated[str, Field(max_length=NAME_MAX_CHARACTERS), AfterValidator(_printable)]
Group = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Limit = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Strict(BaseModel):
    """A body in which a misspelt field is an error, not a silent default."""

    model_config = ConfigDict(extra="forbid")


def _example(**body: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"example": body})


class NewAccount(Strict):
    model_config = _example(name="Ada Lovelace", unfinished_max=100)

    name: Annotated[Name, Field(min_length=1)]
    user_group: Group = "default"
    unfinished_max: Limit | None = settings.unfinished_max


class AccountChange(Strict):
    model_config = _example(suspended=True)

    name: Annotated[Name, Field(min_length=1)] | None = None
    user_group: Group | None = None
    unfinished_max: Limit | None = None
    suspended: StrictBool | None = None


class NewKey(Strict):
    model_config = _example(name="laptop", requests_per_minute=60)

    name: Name = ""
    models: list[Annotated[str, Field(min_length=1, max_length=200)]] | None = None
    requests_per_minute: Limit | None = CREATES_PER_MINUTE
    expires_at: AwareDatetime | None = None
    admin: StrictBool = False


class Rotation(Strict):
    model_config = _example(overlap_s=3600)

    overlap_s: Annotated[int, Field(ge=0, le=OVERLAP_MAX_S)] = OVERLAP_S


class Movement(Strict):
    model_config = _example(amount=1500, note="invoice 7")

    amount: Annotated[Decimal, Field(max_digits=AMOUNT_DIGITS_MAX, decimal_places=6)]
    note: (
        Annotated[str, Field(max_length=NOTE_MAX_CHARACTERS), AfterValidator(_printable)] | None
    ) = None


def render_account(account: Account) -> dict[str, Any]:
    return {
        "id": account.id,
        "name": account.name,
        "user_group": account.user_group,
        "balance": account.balance,
        "reserved": account.reserved,
        "unfinished_max": account.unfinished_max,
        "suspended": account.suspended,
        "created_at": account.created_at,
    }


def render_key(key: ApiKey) -> dict[str, Any]:
    return {
        "id": key.id,
        "prefix": key.prefix,
        "account_id": key.account_id,
        "name": key.name,
        "models": key.models,
        "admin": key.admin,
        "requests_per_minute": key.requests_per_minute,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "last_used_at": key.last_used_at,
    }


def render_entry(entry: LedgerEntry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "account_id": entry.account_id,
        "kind": entry.kind,
        "amount": entry.amount,
        "balance_after": entry.balance_after,
        "actor": entry.actor,
        "note": entry.note,
        "task_id": entry.task_id,
        "created_at": entry.created_at,
    }


def render_task(task: Task) -> dict[str, Any]:
    return {
        "id": task.id,
        "account_id": task.account_id,
        "dialect": task.dialect,
        "model": task.model,
        "width": task.width,
        "height": task.height,
        "seed": task.seed,
        "price": task.price,
        "status": task.status,
        "progress": task.progress,
        "attempt": task.attempt,
        "worker": task.worker,
        "error_code": task.error_code,
        "error_message": task.error_message,
        "request_id": task.request_id,
        "created_at": task.created_at,
        "started_at": task.started_at,
        "finished_at": task.finished_at,
    }


# --- Pages --------------------------------------------------------------------------------------

PageLimit = Annotated[int, Query(ge=1, le=PAGE_MAX)]
Cursor = Annotated[
    str | None, Query(max_length=500, description="`next_cursor` of the page before")
]
Row = TypeVar("Row")


def _page(
    rows: Sequence[Row],
    limit: int,
    render: Callable[[Row], dict[str, Any]],
    position: Callable[[Row], tuple[object, ...]],
) -> Response:
    """A page of at most `limit` rows; `rows` holds one more where there is a next page."""
    shown = rows[:limit]
    more = len(rows) > limit
    cursor = _cursor(*position(shown[-1])) if more else None
    return JSON({"data": [render(row) for row in shown], "next_cursor": cursor})


def _cursor(*position: object) -> str:
    return base64.urlsafe_b64encode(orjson.dumps(position)).decode()


def _position(cursor: str | None) -> list[Any] | None:
    if cursor is None:
        return None
    try:
        position = orjson.loads(base64.urlsafe_b64decode(cursor))
    except (binascii.Error, ValueError):
        position = None
    if not isinstance(position, list):
        raise errors.InvalidRequest(
            "cursor: is not one that this service has given", param="cursor"
        )
    return position


def _moment(cursor: str | None) -> tuple[datetime, str] | None:
    """A cursor of rows that are ordered by when they were created."""
    position = _position(cursor)
    if position is None:
        return None
    try:
        moment, row_id = position
        return datetime.fromisoformat(moment), str(row_id).replace("\0", "")
    except (TypeError, ValueError):
        raise errors.InvalidRequest(
            "cursor: is not one that this service has given", param="cursor"
        ) from None


def _number(cursor: str | None) -> int | None:
    position = _position(cursor)
    if position is None:
        return None
    if len(position) != 1 or type(position[0]) is not int or abs(position[0]) >= 2**63:
        raise errors.InvalidRequest(
            "cursor: is not one that this service has given", param="cursor"
        )
    return int(position[0])


# --- Accounts -----------------------------------------------------------------------------------


@router.post("/admin/accounts", status_code=201, summary="Create an account")
def create_account(body: NewAccount) -> Response:
    with transaction() as session:
        account = accounts.create(
            session, body.name, user_group=body.user_group, unfinished_max=body.unfinished_max
        )
    return JSON(render_account(account), 201)


@router.get("/admin/accounts", summary="List accounts")
def list_accounts(limit: PageLimit = PAGE_DEFAULT, cursor: Cursor = None) -> Response:
    with transaction() as session:
        rows = accounts.newest(session, before=_moment(cursor), limit=limit + 1)
    return _page(rows, limit, render_account, lambda row: (row.created_at, row.id))


@router.get("/admin/accounts/{account_id}", summary="Read an account")
def read_account(account_id: str) -> Response:
    with transaction() as session:
        account = accounts.get(session, _id(account_id))
    return JSON(render_account(account))


@router.patch("/admin/accounts/{account_id}", summary="Suspend, resume or change an account")
def change_account(account_id: str, body: AccountChange) -> Response:
    changes = {name: getattr(body, name) for name in body.model_fields_set}
    for name in changes.keys() - {"unfinished_max"}:
        if changes[name] is None:
            raise errors.InvalidRequest(f"{name}: must not be null", param=name)
    if not changes:
        raise errors.InvalidRequest("body: names nothing to change")
    with transaction() as session:
        account = accounts.change(session, _id(account_id), **changes)
    return JSON(render_account(account))


# --- Keys ---------------------------------------------------------------------------------------


@router.post("/admin/accounts/{account_id}/keys", status_code=201, summary="Issue a key")
def issue_key(account_id: str, body: NewKey) -> Response:
    """The answer is the only place where `key` is ever shown."""
    with transaction() as session:
        key, secret = accounts.issue_key(session, _id(account_id), **body.model_dump())
    return JSON({"id": key.id, "key": secret} | render_key(key), 201)


@router.get("/admin/accounts/{account_id}/keys", summary="List the keys of an account")
def list_keys(account_id: str, limit: PageLimit = PAGE_DEFAULT, cursor: Cursor = None) -> Response:
    with transaction() as session:
        rows = accounts.keys(session, _id(account_id), before=_moment(cursor), limit=limit + 1)
    return _page(rows, limit, render_key, lambda row: (row.created_at, row.id))


@router.post("/admin/keys/{key_id}/rotate", status_code=201, summary="Replace a key")
def rotate_key(key_id: str, body: Rotation | None = None) -> Response:
    """The old key stays valid for `overlap_s` seconds, a day if the body does not say."""
    overlap = timedelta(seconds=(body or Rotation()).overlap_s)
    with transaction() as session:
        key, secret = accounts.rotate_key(session, _id(key_id), overlap=overlap)
    return JSON({"id": key.id, "key": secret} | render_key(key), 201)


@router.delete("/admin/keys/{key_id}", summary="Revoke a key")
def revoke_key(key_id: str) -> Response:
    """In force within a second, on every API process."""
    with transaction() as session:
        key = accounts.revoke_key(session, _id(key_id))
    return JSON(render_key(key))


@router.get("/admin/accounts/{account_id}/callback-secret", summary="Read the callback secret")
def read_callback_secret(account_id: str) -> Response:
    with transaction() as session:
        account = accounts.get(session, _id(account_id))
    return JSON({"key": account.callback_secret})


@router.post(
    "/admin/accounts/{account_id}/callback-secret/rotate",
    status_code=201,
    summary="Replace the callback secret",
)
def rotate_callback_secret(account_id: str, body: Rotation | None = None) -> Response:
    """For `overlap_s` seconds, a day if the body does not say, callbacks carry both signatures."""
    overlap = timedelta(seconds=(body or Rotation()).overlap_s)
    with transaction() as session:
        account = accounts.rotate_callback_secret(session, _id(account_id), overlap=overlap)
    return JSON({"key": account.callback_secret}, 201)


# --- Credits ------------------------------------------------------------------------------------


@router.post("/admin/accounts/{account_id}/credits", status_code=201, summary="Move credits")
def move_credits(
    account_id: str,
    body: Movement,
    caller: Caller,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    """A positive amount tops up, a negative one adjusts.

    Sent again with the same Idempotency-Key it moves nothing, and answers the first entry.
    """
    if body.amount == 0:
        raise errors.InvalidRequest("amount: must not be zero", param="amount")
    with transaction() as session:
        entry, replayed = ledger.grant(
            session,
            _id(account_id),
            body.amount,
            actor=f"key:{caller.key_id}",
            note=body.note,
            idempotency_key=_idempotency_key(idempotency_key),
        )
    return JSON(render_entry(entry), 201, {"Idempotency-Replayed": "true"} if replayed else None)


def _idempotency_key(header: str | None) -> str | None:
    """The draft standard quotes the key, most clients do not; both are the same key."""
    if header is None:
        return None
    key = header[1:-1] if len(header) > 1 and header[0] == header[-1] == '"' else header
    if not IDEMPOTENCY_KEY.fullmatch(key):
        raise errors.InvalidRequest("Idempotency-Key: must be 1 to 255 visible ASCII characters")
    return key


@router.get("/admin/accounts/{account_id}/ledger", summary="Read the ledger of an account")
def read_account_ledger(
    account_id: str, limit: PageLimit = PAGE_DEFAULT, cursor: Cursor = None
) -> Response:
    with transaction() as session:
        accounts.get(session, _id(account_id))
        rows = ledger.entries(session, account_id, before=_number(cursor), limit=limit + 1)
    return _page(rows, limit, render_entry, lambda row: (row.id,))


@router.get("/admin/ledger", summary="Read the ledger")
def read_ledger(limit: PageLimit = PAGE_DEFAULT, cursor: Cursor = None) -> Response:
    with transaction() as session:
        rows = ledger.entries(session, None, before=_number(cursor), limit=limit + 1)
    return _page(rows, limit, render_entry, lambda row: (row.id,))


@router.get("/admin/books", summary="Prove that the books balance")
def check_books() -> Response:
    with transaction() as session:
        books = ledger.check_books(session)
    return JSON({"balanced": books.balanced, "accounts": books.accounts, "faults": books.faults})


# --- Tasks --------------------------------------------------------------------------------------


@router.get("/admin/tasks", summary="List tasks")
def list_tasks(
    account_id: str | None = None,
    status: TaskStatus | None = None,
    limit: PageLimit = PAGE_DEFAULT,
    cursor: Cursor = None,
) -> Response:
    with transaction() as session:
        rows = tasks.newest(
            session,
            account_id=None if account_id is None else _id(account_id),
            status=status,
            before=_moment(cursor),
            limit=limit + 1,
        )
    return _page(rows, limit, render_task, lambda row: (row.created_at, row.id))


@router.post("/admin/tasks/{task_id}/cancel", summary="Cancel a task, free of charge")
def cancel_task(task_id: str) -> Response:
    with transaction() as session:
        task = tasks.cancel(session, _id(task_id))
    events.publish(task)
    return JSON(render_task(task))


def _id(text: str) -> str:
    """An id from a path, harmless to ask the database for."""
    return text.replace("\0", "")
