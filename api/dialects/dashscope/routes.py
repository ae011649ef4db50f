"""DashScope's routes: three creates, each at once or as a task; query, list and cancel of tasks.

Those of tasks are answered with and without a slash at their end: DashScope's page lists tasks with
one and its SDK without, while the SDK's Aio classes query and cancel with one.
"""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from fastapi import Header, Path, Query, Request
from starlette.responses import Response

from api import orders
from api.auth import Caller, admit_create, admit_read
from api.dialects import routing
from api.dialects.dashscope import answers
from api.dialects.dashscope.answers import NAME, SYNTHESIS, ZONE, answer
from api.dialects.dashscope.refusals import render_error
from api.dialects.dashscope.request import MessagesRequest, PromptRequest
from api.orders import Quote
from storage import tasks
from storage.accounts import Credential
from storage.database import transaction
from storage.errors import InvalidRequest, NotPending, TaskNotFound
from storage.models import Task
from storage.tasks import Filter, ImageRequest

SYNC_TIMEOUT_S = 240
"""How long a synchronous caller is held: DashScope's SDK hangs up after 300 s."""
WINDOW_MAX = timedelta(hours=24)
"""How far apart `start_time` and `end_time` of a list may be, and what is listed without them."""
PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX = 10, 100
MOMENT = re.compile(r"20[0-9]{12}")

create_router = routing.dialect_router(render_error, admit_create)
task_router = routing.dialect_router(render_error, admit_read)

Async = Annotated[
    str | None, Header(alias="X-DashScope-Async", description="`enable`: answer with a task")
]
TaskId = Annotated[str, Path(description="As the create answered it")]
Moment = Annotated[str | None, Query(description="YYYYMMDDhhmmss, in UTC+8")]

DRAWN = {
    "request_id": "req_8a0809b4a79647f4a095394b",
    "output": {
        "choices": [
            {
                "finish_reason": "stop",
                "message": {
                    "content": [
                        {"image": "https://images.example.com/x.png"},
                        {"text": "a red star on a blue background"},
                    ],
                    "reasoning_content": "",
                    "role": "assistant",
                },
            }
        ]
    },
    "usage": {
        "height": 1440,
        "image_count": 1,
        "input_tokens": 0,
        "output_tokens": 0,
        "total_tokens": 0,
        "width": 1120,
    },
}


@create_router.post(
    "/api/v1/services/aigc/multimodal-generation/generation",
    summary="Generate an image from messages",
    responses=routing.example(DRAWN),
)
@create_router.post(
    "/api/v1/services/aigc/image-generation/generation",
    summary="Generate an image from messages, as the SDK's ImageGeneration.async_call does",
    responses=routing.example(DRAWN),
)
async def generate(
    request: Request, body: MessagesRequest, caller: Caller, wanted: Async = None
) -> Response:
    """Holds the line until the image is there; with `X-DashScope-Async: enable` answers a task."""
    if _as_task(wanted):
        return await _place(request, caller, body.image(), NAME)
    order = await _draw(request, caller, body.image(), NAME)
    if isinstance(order, Quote):
        return answer({"output": order.render()})
    return answer(answers.render_drawn(order, orders.image_of(order)))


@create_router.post(
    "/api/v1/services/aigc/text2image/image-synthesis",
    summary="Generate an image from a prompt, as the SDK's ImageSynthesis does",
)
async def synthesize(
    request: Request, body: PromptRequest, caller: Caller, wanted: Async = None
) -> Response:
    """Holds the line until the image is there; with `X-DashScope-Async: enable` answers a task."""
    if _as_task(wanted):
        return await _place(request, caller, body.image(), SYNTHESIS)
    order = await _draw(request, caller, body.image(), SYNTHESIS)
    if isinstance(order, Quote):
        return answer({"output": order.render()})
    orders.image_of(order)
    return answer(answers.render_task(order))


def _as_task(wanted: str | None) -> bool:
    return wanted is not None and wanted.lower() == "enable"


async def _draw(
    request: Request, caller: Credential, image: ImageRequest, dialect: str
) -> Task | Quote:
    order = await orders.draw(request, caller, [image], dialect, timeout_s=SYNC_TIMEOUT_S)
    return order if isinstance(order, Quote) else order[0]


async def _place(
    request: Request, caller: Credential, image: ImageRequest, dialect: str
) -> Response:
    order = await orders.place(request, caller, [image], dialect)
    if isinstance(order, Quote):
        return answer({"output": order.render()})
    (task,) = order
    if task.status.is_terminal:
        return answer(answers.render_task(task))
    return answer(answers.render_created(task))


@task_router.get(
    "/api/v1/tasks/{task_id}",
    summary="Query a task",
    responses=routing.example(
        {
            "request_id": "req_2ddf53fa699a42679446d0c1",
            "output": {
                "task_id": "task-unified-1757165031-uyujaw3d",
                "task_status": "SUCCEEDED",
                "submit_time": "2025-12-18 20:03:01.802",
                "scheduled_time": "2025-12-18 20:03:01.834",
                "end_time": "2025-12-18 20:03:29.260",
                "finished": True,
                "choices": [
                    {
                        "finish_reason": "stop",
                        "message": {
                            "role": "assistant",
                            "content": [
                                {"image": "https://images.example.com/x.png", "type": "image"}
                            ],
                        },
                    }
                ],
            },
            "usage": {"size": "1280*1280", "image_count": 1},
        }
    ),
)
@task_router.get("/api/v1/tasks/{task_id}/", include_in_schema=False)
async def get_task(request: Request, task_id: TaskId, caller: Caller) -> Response:
    """A task that is not there, or whose image has expired, has the status `UNKNOWN`."""
    try:
        task = await orders.find(request, caller, task_id)
    except TaskNotFound:
        return answer(answers.render_unknown(task_id))
    return answer(answers.render_task(task))


@task_router.get("/api/v1/tasks", summary="List tasks, newest first")
@task_router.get("/api/v1/tasks/", include_in_schema=False)
def list_tasks(
    caller: Caller,
    start_time: Moment = None,
    end_time: Moment = None,
    model_name: str | None = None,
    status: Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "CANCELED", "UNKNOWN"]
    | None = None,
    page_no: Annotated[int, Query(ge=1, le=tasks.LIST_MAX)] = 1,
    page_size: Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX)] = PAGE_SIZE_DEFAULT,
    task_id: str | None = None,
) -> Response:
    """Those that were created in a window of at most 24 hours, without one in the last 24."""
    offset = routing.offset(page_no, page_size, "page_no")
    since, until = _window(start_time, end_time)
    rows: list[Task] = []
    total = 0
    named = model_name in (None, tasks.MODEL) and (task_id is None or tasks.is_id(task_id))
    if named and caller.may_use(tasks.MODEL):
        which = Filter(
            caller.account_id,
            statuses=None
            if status is None
            else [each for each, word in answers.STATUSES.items() if word == status],
            task_id=task_id,
            since=since,
            until=until,
        )
        with transaction() as session:
            rows, total = tasks.page(session, which, offset=offset, limit=page_size)
    return answer(answers.render_page(rows, total, page_no, page_size))


@task_router.post("/api/v1/tasks/{task_id}/cancel", summary="Cancel a task that still waits")
@task_router.post("/api/v1/tasks/{task_id}/cancel/", include_in_schema=False)
async def cancel_task(request: Request, task_id: TaskId, caller: Caller) -> Response:
    """Free of charge. A task that is being drawn, has ended or is unknown answers 400."""
    try:
        await orders.cancel(request, caller, task_id, only_pending=True)
    except TaskNotFound:
        raise NotPending from None
    return answer({})


def _window(start_time: str | None, end_time: str | None) -> tuple[datetime, datetime | None]:
    """From when to when; None where it is still open. Raises: InvalidRequest."""
    since = None if start_time is None else _moment("start_time", start_time)
    until = None if end_time is None else _moment("end_time", end_time)
    if since is None:
        return (until or datetime.now(UTC)) - WINDOW_MAX, until
    if until is None:
        return since, since + WINDOW_MAX
    if not timedelta(0) <= until - since <= WINDOW_MAX:
        raise InvalidRequest(
            "end_time: must be at most 24 hours after start_time", param="end_time"
        )
    return since, until


def _moment(name: str, text: str) -> datetime:
    try:
        if MOMENT.fullmatch(text) is None:
            raise ValueError
        return datetime.strptime(text, "%Y%m%d%H%M%S").replace(tzinfo=ZONE)
    except ValueError:
        raise InvalidRequest(f"{name}: must be YYYYMMDDhhmmss", param=name) from None
