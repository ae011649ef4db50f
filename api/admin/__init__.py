"""REST for operators. Errors are RFC 9457 problem details, lists are cursor pages, newest first.

Only the workers are listed at once and by name: there are as many as GPUs.
"""

import re
from datetime import timedelta
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Header
from redis.exceptions import RedisError
from starlette.responses import Response

from api import cursors
from api.admin import shapes
from api.answers import JSON, Problem
from api.auth import Caller, admit_admin
from api.dialects import routing
from storage import accounts, errors, events, ledger, queue, tasks
from storage.database import transaction
from storage.models import TaskStatus

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
    errors.WouldOverflow: 409,
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


# --- Accounts -----------------------------------------------------------------------------------


@router.post("/admin/accounts", status_code=201, summary="Create an account")
def create_account(body: shapes.NewAccount) -> Response:
    with transaction() as session:
        account = accounts.create(
            session, body.name, user_group=body.user_group, unfinished_max=body.unfinished_max
        )
    return JSON(shapes.render_account(account), 201)


@router.get("/admin/accounts", summary="List accounts")
def list_accounts(
    limit: cursors.PageLimit = cursors.PAGE_DEFAULT, cursor: cursors.Cursor = None
) -> Response:
    with transaction() as session:
        rows = accounts.newest(session, before=cursors.moment(cursor), limit=limit + 1)
    return cursors.page(rows, limit, shapes.render_account, lambda row: (row.created_at, row.id))


@router.get("/admin/accounts/{account_id}", summary="Read an account")
def read_account(account_id: str) -> Response:
    with transaction() as session:
        account = accounts.get(session, _id(account_id))
    return JSON(shapes.render_account(account))


@router.patch("/admin/accounts/{account_id}", summary="Suspend, resume or change an account")
def change_account(account_id: str, body: shapes.AccountChange) -> Response:
    changes = {name: getattr(body, name) for name in body.model_fields_set}
    for name in changes.keys() - {"unfinished_max"}:
        if changes[name] is None:
            raise errors.InvalidRequest(f"{name}: must not be null", param=name)
    if not changes:
        raise errors.InvalidRequest("body: names nothing to change")
    with transaction() as session:
        account = accounts.change(session, _id(account_id), **changes)
    return JSON(shapes.render_account(account))


# --- Keys ---------------------------------------------------------------------------------------


@router.post("/admin/accounts/{account_id}/keys", status_code=201, summary="Issue a key")
def issue_key(account_id: str, body: shapes.NewKey) -> Response:
    """The answer is the only place where `key` is ever shown."""
    with transaction() as session:
        key, secret = accounts.issue_key(session, _id(account_id), **body.model_dump())
    return JSON({"id": key.id, "key": secret} | shapes.render_key(key), 201)


@router.get("/admin/accounts/{account_id}/keys", summary="List the keys of an account")
def list_keys(
    account_id: str, limit: cursors.PageLimit = cursors.PAGE_DEFAULT, cursor: cursors.Cursor = None
) -> Response:
    with transaction() as session:
        rows = accounts.keys(
            session, _id(account_id), before=cursors.moment(cursor), limit=limit + 1
        )
    return cursors.page(rows, limit, shapes.render_key, lambda row: (row.created_at, row.id))


@router.post("/admin/keys/{key_id}/rotate", status_code=201, summary="Replace a key")
def rotate_key(key_id: str, body: shapes.Rotation | None = None) -> Response:
    """The old key stays valid for `overlap_s` seconds, a day if the body does not say."""
    overlap = timedelta(seconds=(body or shapes.Rotation()).overlap_s)
    with transaction() as session:
        key, secret = accounts.rotate_key(session, _id(key_id), overlap=overlap)
    return JSON({"id": key.id, "key": secret} | shapes.render_key(key), 201)


@router.delete("/admin/keys/{key_id}", summary="Revoke a key")
def revoke_key(key_id: str) -> Response:
    """In force within a second, on every API process."""
    with transaction() as session:
        key = accounts.revoke_key(session, _id(key_id))
    return JSON(shapes.render_key(key))


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
def rotate_callback_secret(account_id: str, body: shapes.Rotation | None = None) -> Response:
    """For `overlap_s` seconds, a day if the body does not say, callbacks carry both signatures."""
    overlap = timedelta(seconds=(body or shapes.Rotation()).overlap_s)
    with transaction() as session:
        account = accounts.rotate_callback_secret(session, _id(account_id), overlap=overlap)
    return JSON({"key": account.callback_secret}, 201)


# --- Credits ------------------------------------------------------------------------------------


@router.post("/admin/accounts/{account_id}/credits", status_code=201, summary="Move credits")
def move_credits(
    account_id: str,
    body: shapes.Movement,
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
    return JSON(
        shapes.render_entry(entry), 201, {"Idempotency-Replayed": "true"} if replayed else None
    )


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
    account_id: str, limit: cursors.PageLimit = cursors.PAGE_DEFAULT, cursor: cursors.Cursor = None
) -> Response:
    with transaction() as session:
        accounts.get(session, _id(account_id))
        rows = ledger.entries(session, account_id, before=cursors.number(cursor), limit=limit + 1)
    return cursors.page(rows, limit, shapes.render_entry, lambda row: (row.id,))


@router.get("/admin/ledger", summary="Read the ledger")
def read_ledger(
    limit: cursors.PageLimit = cursors.PAGE_DEFAULT, cursor: cursors.Cursor = None
) -> Response:
    with transaction() as session:
        rows = ledger.entries(session, None, before=cursors.number(cursor), limit=limit + 1)
    return cursors.page(rows, limit, shapes.render_entry, lambda row: (row.id,))


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
    limit: cursors.PageLimit = cursors.PAGE_DEFAULT,
    cursor: cursors.Cursor = None,
) -> Response:
    with transaction() as session:
        rows = tasks.newest(
            session,
            account_id=None if account_id is None else _id(account_id),
            status=status,
            before=cursors.moment(cursor),
            limit=limit + 1,
        )
    return cursors.page(rows, limit, shapes.render_task, lambda row: (row.created_at, row.id))


@router.post("/admin/tasks/{task_id}/cancel", summary="Cancel a task, free of charge")
def cancel_task(task_id: str) -> Response:
    with transaction() as session:
        task = tasks.cancel(session, _id(task_id))
    events.publish(task)
    return JSON(shapes.render_task(task))


# --- Workers ------------------------------------------------------------------------------------


@router.get("/admin/workers", summary="List the workers")
def list_workers() -> Response:
    """Those that were heard of in the last seconds: what they draw with, on what, and how fast.

    What one of another version does not tell is null.
    """
    try:
        found = queue.worker_facts()
    except RedisError as error:
        raise errors.ServiceUnavailable from error
    return JSON({"data": [shapes.render_worker(facts) for facts in found]})


def _id(text: str) -> str:
    """An id from a path, harmless to ask the database for."""
    return text.replace("\0", "")
