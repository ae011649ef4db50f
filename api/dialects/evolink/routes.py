"""EvoLink's routes: create, task, list of tasks, batch of tasks, credits."""

import asyncio
from typing import Annotated, Literal

from fastapi import Path, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, StrictStr
from starlette.responses import Response

from api import estimate, orders
from api.answers import JSON
from api.auth import Caller, admit_create, admit_read
from api.batching import Batcher
from api.dialects import routing
from api.dialects.evolink import answers
from api.dialects.evolink.refusals import render_create_error, render_query_error
from api.dialects.evolink.request import GenerationRequest
from api.orders import Quote
from storage import errors, ledger, tasks
from storage.accounts import Credential
from storage.database import transaction
from storage.models import Account, ApiKey, Task
from storage.tasks import Filter, State

NAME = "evolink"
BATCH_MAX = 50
"""Ids in one batch query, as EvoLink's own client knows it."""
PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX = 20, 100

create_router = routing.dialect_router(render_create_error, admit_create)
query_router = routing.dialect_router(render_query_error, admit_read)

TaskId = Annotated[str, Path(description="As the create answered it: `task-unified-…`")]


@create_router.post(
    "/v1/images/generations",
    summary="Create an image generation task",
    responses=routing.example(
        {
            "created": 1757165031,
            "id": "task-unified-1757165031-uyujaw3d",
            "model": "z-image-turbo",
            "object": "image.generation.task",
            "progress": 0,
            "status": "pending",
            "type": "image",
            "task_info": {"can_cancel": True, "estimated_time": 10},
            "usage": {"billing_rule": "per_call", "credits_reserved": 15, "user_group": "default"},
        }
    ),
)
async def create(request: Request, body: GenerationRequest, caller: Caller) -> Response:
    await body.check_callback_url()
    order = await orders.place(request, caller, [body.image()], NAME)
    if isinstance(order, Quote):
        return JSON(order.render())
    (task,) = order
    if task.status.is_terminal:
        return JSON(answers.render_task(task))
    return JSON(answers.render_created(task, await estimate.seconds_to_end()))


@query_router.get(
    "/v1/tasks/{task_id}",
    summary="Get task detail",
    responses=routing.example(
        {
            "created": 1757165031,
            "id": "task-unified-1757165031-uyujaw3d",
            "model": "z-image-turbo",
            "object": "image.generation.task",
            "progress": 100,
            "status": "completed",
            "type": "image",
            "task_info": {"can_cancel": False},
            "results": ["https://images.example.com/x.png"],
            "result_data": [
                {
                    "image_url": "https://images.example.com/x.png",
                    "seed": 7,
                    "width": 1024,
                    "height": 1024,
                }
            ],
            "usage": {
                "billing_rule": "per_call",
                "credits_used": 15,
                "prompt_tokens": 14,
                "prompt_tokens_read": 14,
            },
        }
    ),
)
async def get_task(request: Request, task_id: TaskId, caller: Caller) -> Response:
    check_form(task_id)
    return JSON(await render_state(await orders.find_state(request, caller, task_id)))


@query_router.get("/v1/tasks", summary="List tasks, newest first")
def list_tasks(
    caller: Caller,
    status: Literal["pending", "processing", "completed", "failed", "cancelled"] | None = None,
    type: Literal["text", "image", "audio", "video"] = "image",  # noqa: A002 - EvoLink's word
    model: str | None = None,
    page: Annotated[int, Query(ge=1, le=tasks.LIST_MAX)] = 1,
    page_size: Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX)] = PAGE_SIZE_DEFAULT,
) -> Response:
    """`processing` has what is queued as well; no more than 10 000 tasks are counted or paged."""
    offset = routing.offset(page, page_size, "page")
    rows: list[Task] = []
    total = 0
    if type == "image" and caller.may_use(tasks.MODEL) and model in (None, tasks.MODEL):
        which = Filter(
            caller.account_id, statuses=None if status is None else answers.LISTED[status]
        )
        with transaction() as session:
            rows, total = tasks.page(session, which, offset=offset, limit=page_size)
    data = [answers.render_row(task) for task in rows]
    return JSON({"data": data, "total": total, "page": page, "page_size": page_size})


class BatchQuery(BaseModel):
    """The body of a batch query."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"task_ids": ["task-unified-1757165031-uyujaw3d"]}}
    )

    task_ids: Annotated[list[StrictStr], Field(max_length=BATCH_MAX)]


@query_router.post("/v1/tasks/batch", summary="Get the details of up to 50 tasks")
async def get_tasks(request: Request, body: BatchQuery, caller: Caller) -> Response:
    """Ids that are unknown, or another account's, are left out."""
    reads: Batcher[tuple[str, str], State] = request.app.state.reads
    found = []
    for task_id in dict.fromkeys(body.task_ids):
        if tasks.is_id(task_id):
            found.append(_find_or_none(reads, caller, task_id))
    rows = [task for task in await asyncio.gather(*found) if task is not None]
    return JSON(
        {"data": [answers.render_task(task) for task in rows if caller.may_use(task.model)]}
    )


async def _find_or_none(
    reads: Batcher[tuple[str, str], State], caller: Credential, task_id: str
) -> Task | None:
    try:
        return (await reads.add((caller.account_id, task_id))).task
    except errors.TaskNotFound:
        return None


@query_router.get("/v1/credits", summary="What can be spent, and what was")
async def get_credits(caller: Caller) -> Response:
    return JSON(await run_in_threadpool(_credits, caller))


def _credits(caller: Credential) -> dict[str, object]:
    with transaction() as session:
        account = session.get_one(Account, caller.account_id)
        key = session.get_one(ApiKey, caller.key_id)
        return answers.render_credits(account, key, ledger.spent(session, account))


async def render_state(state: State) -> dict[str, object]:
    """A task; while it is unfinished, with its place in the queue and what time it will take."""
    if state.task.status.is_terminal:
        return answers.render_task(state.task)
    left_s = await estimate.seconds_to_end(state.place or 0, state.task.progress)
    return answers.render_unfinished(state.task, state.place, left_s)


def check_form(task_id: str) -> None:
    """Raises: InvalidTaskId."""
    if not task_id.startswith(tasks.ID_PREFIX):
        raise errors.InvalidTaskId
