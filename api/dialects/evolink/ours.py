"""What we add under EvoLink's prefix: cancelling, deleting, events, the callback secret and the
delivery log.

All of it serves tasks of every dialect. `POST /v1/tasks/{id}/cancel`, `DELETE /v1/tasks/{id}`,
`GET /v1/tasks/{id}/events`,
`GET /v1/callbacks`, `POST /v1/callbacks/{id}/redeliver`, `POST /v1/callbacks/redeliver`,
`GET /v1/callbacks/secret` and `POST /v1/callbacks/secret/rotate`.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import timedelta
from typing import Annotated, Any

import anyio
import anyio.to_thread
import structlog
from fastapi import Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import format_sse_event
from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict
from starlette.responses import Response, StreamingResponse

from api import cursors, orders
from api.answers import JSON, encode
from api.auth import Caller, admit_read
from api.dialects import routing
from api.dialects.evolink import answers
from api.dialects.evolink.refusals import render_query_error
from api.dialects.evolink.routes import TaskId, check_form, render_state
from api.waiting import Waiting
from storage import accounts, deliveries, erasure, errors, events, repair, tasks
from storage.database import transaction
from storage.deliveries import Filter
from storage.models import DeliveryState

SECRET_OVERLAP = timedelta(days=1)
REDELIVER_MAX = 100
"""Callbacks that one call asks for again."""
IMAGE_TIMEOUT_S = 5
"""How long the answer to a DELETE waits for the image store."""
RECONNECT_MS = 2000
"""After how long a browser comes back to a stream that broke."""

logger = structlog.get_logger()

router = routing.dialect_router(render_query_error, admit_read)


@router.post("/v1/tasks/{task_id}/cancel", summary="Cancel a task (our extension)")
async def cancel_task(request: Request, task_id: TaskId, caller: Caller) -> Response:
    """Free of charge: at once while pending, at its next step while it is drawn; a task that has
    ended answers 409.
    """
    check_form(task_id)
    return JSON(answers.render_task(await orders.cancel(request, caller, task_id)))


@router.delete("/v1/tasks/{task_id}", summary="Delete a task (our extension)")
async def delete_task(task_id: TaskId, caller: Caller) -> Response:
    """Erases what you wrote and its image, for ever; what it cost stays on your bill. A task that
    has not ended answers 409, to be cancelled first, and so does one whose callback is still owed:
    it is told, or given up, within a minute. Deleting it once more answers the same.
    """
    check_form(task_id)
    if not tasks.is_id(task_id):
        raise errors.TaskNotFound
    if not caller.may_use(tasks.MODEL):
        raise errors.ModelAccessDenied(tasks.MODEL)
    image_key = await run_in_threadpool(_erase, task_id, caller.account_id)
    if image_key is not None:
        # Whoever waits in vain has deleted it all the same: the repairs see to the image.
        with anyio.move_on_after(IMAGE_TIMEOUT_S):
            await anyio.to_thread.run_sync(
                repair.delete_images,
                {task_id: image_key},
                abandon_on_cancel=True,
                limiter=orders.FETCHES,
            )
    return JSON({"id": task_id, "object": "image.generation.task", "deleted": True})


def _erase(task_id: str, account_id: str) -> str | None:
    with transaction() as session:
        image_key = erasure.erase(session, task_id, account_id)
    logger.info("task.deleted", task_id=task_id, account_id=account_id)
    return image_key


@router.get(
    "/v1/tasks/{task_id}/events",
    summary="Follow a task (our extension)",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def follow_task(request: Request, task_id: TaskId, caller: Caller) -> Response:
    """Server-sent events `task`, each with the body of the task query: the present state first,
    so that whoever comes back misses nothing, then every change until the end.
    """
    check_form(task_id)
    await orders.find_now(request, caller, task_id)
    waiting: Waiting = request.app.state.waiting
    return StreamingResponse(
        _stream(waiting, caller.account_id, task_id),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _stream(waiting: Waiting, account_id: str, task_id: str) -> AsyncIterator[bytes]:
    yield format_sse_event(retry=RECONNECT_MS)
    async with aclosing(waiting.states(account_id, task_id)) as states:
        async for state in states:
            if state is None:
                yield format_sse_event(comment="ping")
                continue
            body = encode(await render_state(state)).decode()
            moment = "-".join(map(str, state.key()))
            yield format_sse_event(event="task", data_str=body, id=moment)


# --- Callbacks ----------------------------------------------------------------------------------


def _written(moment: object) -> object:
    """Keeps pydantic from reading a number as seconds since 1970."""
    if isinstance(moment, str) and moment[:5].endswith("-"):
        return moment
    raise ValueError("must be a date and a time with its zone, as RFC 3339 writes them")


Moment = Annotated[AwareDatetime, BeforeValidator(_written)]


class Redelivery(BaseModel):
    """Which callbacks are to be told again: by task, by state, by when the tasks ended."""

    model_config = ConfigDict(json_schema_extra={"example": {"state": "gave_up"}})

    task_id: str | None = None
    state: DeliveryState | None = None
    since: Moment | None = None
    until: Moment | None = None


@router.get("/v1/callbacks", summary="Read the delivery log (our extension)")
def list_callbacks(
    caller: Caller,
    task_id: str | None = None,
    state: DeliveryState | None = None,
    since: Annotated[Moment | None, Query(description="Of tasks that ended then")] = None,
    until: Moment | None = None,
    limit: cursors.PageLimit = cursors.PAGE_DEFAULT,
    cursor: cursors.Cursor = None,
) -> Response:
    """Newest first, each with its attempts."""
    _check_id(task_id)
    which = Filter(caller.account_id, task_id=task_id, state=state, since=since, until=until)
    before = cursors.moment(cursor)
    with transaction() as session:
        rows = deliveries.log(session, which, before=before, limit=limit + 1)
    return cursors.page(
        rows,
        limit,
        lambda row: answers.render_delivery(*row),
        lambda row: (row[0].created_at, row[0].id),
    )


@router.post("/v1/callbacks/redeliver", summary="Tell callbacks again (our extension)")
async def redeliver_many(body: Redelivery, caller: Caller) -> Response:
    """At most 100, the oldest first: with the same `webhook-id`, signed anew."""
    if not body.model_fields_set:
        raise errors.InvalidRequest("body: names nothing to deliver again")
    _check_id(body.task_id)
    which = Filter(caller.account_id, **body.model_dump())
    return JSON({"data": await run_in_threadpool(_redeliver, which)})


@router.post("/v1/callbacks/{delivery_id}/redeliver", summary="Tell a callback again")
async def redeliver(delivery_id: str, caller: Caller) -> Response:
    """Our extension: with the same `webhook-id`, a fresh timestamp and signature, and all its
    attempts anew.
    """
    if not deliveries.is_id(delivery_id):
        raise errors.DeliveryNotFound
    found = await run_in_threadpool(_redeliver, Filter(caller.account_id, delivery_id=delivery_id))
    if not found:
        raise errors.DeliveryNotFound
    return JSON(found[0])


def _check_id(task_id: str | None) -> None:
    """Raises: InvalidTaskId."""
    if task_id is not None and not tasks.is_id(task_id):
        raise errors.InvalidTaskId


def _redeliver(which: Filter) -> list[dict[str, Any]]:
    with transaction() as session:
        found = deliveries.redeliver(session, which, limit=REDELIVER_MAX)
    for delivery, _ in found:
        events.publish_owed(delivery.task_id)
    return [answers.render_delivery(*logged) for logged in found]


@router.get("/v1/callbacks/secret", summary="Read your callback secret (our extension)")
def read_callback_secret(caller: Caller) -> Response:
    """What `webhook-signature` is made with: Standard Webhooks 1.0.0, symmetric."""
    with transaction() as session:
        account = accounts.get(session, caller.account_id)
    return JSON({"key": account.callback_secret})


@router.post("/v1/callbacks/secret/rotate", summary="Replace your callback secret (our extension)")
def rotate_callback_secret(caller: Caller) -> Response:
    """For a day, callbacks carry the signatures of both."""
    with transaction() as session:
        account = accounts.rotate_callback_secret(
            session, caller.account_id, overlap=SECRET_OVERLAP
        )
    return JSON({"key": account.callback_secret})
