"""EvoLink's image API: `POST /v1/images/generations`, `GET /v1/tasks/{id}`.

Sources: EvoLink's OpenAPI document of z-image-turbo, its pages "Get task detail" and "Error codes"
(docs.evolink.ai), and what its own client reads (github.com/EvoLinkAI/evolink-mcp); read 2026-11.

Our choice, where they are silent: what exactly is wrong follows the message of a 400; null is an
optional field that was not sent; the pixels of the ratios and the default size; 404 for another
account's task, whose existence is nobody's business; a cancelled task is `failed` with
`request_cancelled`, which stays inside the documented status words; `POST /v1/tasks/{id}/cancel`;
the drawn seed in `result_data`; `results` is empty once the image has expired, and
`results_expired` says so.
"""

import math
import re
from datetime import timedelta
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from starlette.responses import Response

from api import egress, estimate
from api.answers import JSON
from api.auth import Caller, admit_create, admit_read
from api.dialects import routing
from storage import accounts, errors, events, tasks
from storage.database import transaction
from storage.models import ImageFormat, Task, TaskStatus

NAME = "evolink"
PROMPT_MAX_CHARACTERS = 2000
SEED_MIN, SEED_MAX = 1, 2147483647
SIDE_MIN_PX, SIDE_MAX_PX = 376, 1536

SIZES = {
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
"""Width and height in pixels of each ratio: our choice, all multiples of 16."""
SECRET_OVERLAP = timedelta(days=1)
DEFAULT_SIZE = "1:1"
CUSTOM_SIZE = re.compile(r"([0-9]{3,4})x([0-9]{3,4})")

STATUSES = {
    TaskStatus.PENDING: "pending",
    TaskStatus.PROCESSING: "processing",
    TaskStatus.COMPLETED: "completed",
    TaskStatus.FAILED: "failed",
    TaskStatus.CANCELLED: "failed",
}

TASK_ERRORS = {
    "GenerationFailed": "service_error",
    "GenerationTimeout": "generation_timeout",
    "ResourceExhausted": "resource_exhausted",
    "StorageUnavailable": "service_unavailable",
    "WorkerLost": "service_error",
}
"""`error.code` of a failed task, by the class that ended it."""

Row = tuple[int, str, str, str | None]
"""HTTP status, `code`, `type`, and the message where EvoLink's differs from ours."""

INVALID, API = "invalid_request_error", "api_error"
_ALWAYS: dict[type[errors.ServiceError], Row] = {
    errors.PathNotFound: (404, "not_found", INVALID, None),
    errors.MethodNotAllowed: (405, "method_not_allowed", INVALID, None),
    errors.PayloadTooLarge: (413, "request_too_large", INVALID, None),
    errors.AccountSuspended: (403, "user_disabled", INVALID, None),
    errors.ServiceUnavailable: (503, "service_unavailable", API, None),
}
CREATE_ERRORS: dict[type[errors.ServiceError], Row] = _ALWAYS | {
    errors.InvalidRequest: (400, "invalid_request", INVALID, "Invalid request parameters: {}"),
    errors.Unauthenticated: (
        401,
        "unauthorized",
        "authentication_error",
        "Invalid or expired token",
    ),
    errors.InsufficientCredits: (402, "insufficient_quota", "insufficient_quota", None),
    errors.ModelAccessDenied: (403, "model_access_denied", INVALID, None),
    errors.RateLimited: (
        429,
        "rate_limit_exceeded",
        "rate_limit_error",
        "Too many requests, please try again later",
    ),
    errors.TooManyUnfinished: (429, "rate_limit_exceeded", "rate_limit_error", None),
    errors.InternalError: (500, "internal_error", API, "Internal server error"),
}
QUERY_ERRORS: dict[type[errors.ServiceError], Row] = _ALWAYS | {
    errors.InvalidRequest: (400, "invalid_request", INVALID, "Invalid request parameters: {}"),
    errors.InvalidTaskId: (
        400,
        "invalid_task_id",
        INVALID,
        "Invalid task ID format, must start with 'task-unified-'",
    ),
    errors.Unauthenticated: (
        401,
        "unauthorized",
        "authentication_error",
        "Authentication required",
    ),
    errors.InsufficientCredits: (402, "quota_exceeded", "insufficient_quota", None),
    errors.ModelAccessDenied: (
        403,
        "permission_denied",
        INVALID,
        "You don't have permission to access this task",
    ),
    errors.TaskNotFound: (
        404,
        "task_not_found",
        INVALID,
        "The requested task could not be found",
    ),
    errors.TaskEnded: (409, "task_already_ended", INVALID, None),
    errors.RateLimited: (429, "rate_limit_exceeded", "evo_api_error", "Rate limit exceeded"),
    errors.InternalError: (500, "internal_error", API, "Failed to retrieve task status"),
}


def _size(size: str) -> str:
    if size in SIZES:
        return size
    custom = CUSTOM_SIZE.fullmatch(size)
    if custom is None:
        raise ValueError(f"must be one of {', '.join(SIZES)}, or <width>x<height> in pixels")
    if not all(SIDE_MIN_PX <= int(side) <= SIDE_MAX_PX for side in custom.groups()):
        raise ValueError(f"width and height must be {SIDE_MIN_PX} to {SIDE_MAX_PX} pixels")
    return size


def _no_strict_moderation(wanted: bool) -> bool:
    # Accepting it without doing it would be worse than saying so.
    if wanted:
        raise ValueError("strict moderation is not available on this server; send false")
    return wanted


class GenerationRequest(BaseModel):
    """The body of a create; unknown fields are ignored, as EvoLink's schema allows them."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"model": "z-image-turbo", "prompt": "a red fox in the snow", "size": "1:1"}
        }
    )

    model: Literal["z-image-turbo"]
    prompt: Annotated[
        StrictStr, Field(max_length=PROMPT_MAX_CHARACTERS), AfterValidator(routing.drawable)
    ]
    size: Annotated[StrictStr, AfterValidator(_size)] | None = None
    seed: Annotated[StrictInt, Field(ge=SEED_MIN, le=SEED_MAX)] | None = None
    nsfw_check: Annotated[StrictBool, AfterValidator(_no_strict_moderation)] | None = None
    callback_url: Annotated[StrictStr, Field(max_length=egress.URL_MAX_CHARACTERS)] | None = None

    def pixels(self) -> tuple[int, int]:
        """Width and height."""
        size = self.size or DEFAULT_SIZE
        if size in SIZES:
            return SIZES[size]
        width, _, height = size.partition("x")
        return int(width), int(height)


def _renderer(table: dict[type[errors.ServiceError], Row]) -> routing.RenderError:
    def render_error(error: errors.ServiceError) -> Response:
        row = table.get(type(error), table[errors.InternalError])
        status, code, kind, message = row
        text = str(error) if message is None else message.format(error)
        body: dict[str, Any] = {"code": code, "message": text, "type": kind}
        if isinstance(error, errors.InvalidTaskId):
            body["param"] = "task_id"
        elif error.param is not None:
            body["param"] = error.param
        return JSON({"error": body}, status, error.headers)

    return render_error


render_create_error = _renderer(CREATE_ERRORS)
render_query_error = _renderer(QUERY_ERRORS)

create_router = routing.dialect_router(render_create_error, admit_create)
query_router = routing.dialect_router(render_query_error, admit_read)


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
    if body.callback_url is not None:
        await egress.check_callback_url(body.callback_url)
    width, height = body.pixels()
    image = tasks.ImageRequest(
        prompt=body.prompt,
        width=width,
        height=height,
        image_format=ImageFormat.PNG,
        seed=body.seed,
        aspect_ratio=body.size if body.size in SIZES else None,
        callback_url=body.callback_url,
        model=body.model,
    )
    task = await routing.submit(request, caller, image, NAME)
    return JSON(render_created(task, await estimate.seconds_to_end()))


TaskId = Annotated[str, Path(description="As the create answered it: `task-unified-…`")]


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
            "result_data": [{"image_url": "https://images.example.com/x.png", "seed": 7}],
            "usage": {"billing_rule": "per_call", "credits_used": 15},
        }
    ),
)
async def get_task(request: Request, task_id: TaskId, caller: Caller) -> Response:
    _check_form(task_id)
    return JSON(render_task(await routing.find(request, caller, task_id)))


@query_router.post("/v1/tasks/{task_id}/cancel", summary="Cancel a task (our extension)")
async def cancel_task(request: Request, task_id: TaskId, caller: Caller) -> Response:
    """Free of charge while pending or processing; a task that has ended answers 409."""
    _check_form(task_id)
    await routing.find(request, caller, task_id)
    return JSON(render_task(await run_in_threadpool(_cancel, task_id, caller.account_id)))


@query_router.get("/v1/callbacks/secret", summary="Read your callback secret (our extension)")
def read_callback_secret(caller: Caller) -> Response:
    """What `webhook-signature` is made with: Standard Webhooks 1.0.0, symmetric."""
    with transaction() as session:
        account = accounts.get(session, caller.account_id)
    return JSON({"key": account.callback_secret})


@query_router.post(
    "/v1/callbacks/secret/rotate", summary="Replace your callback secret (our extension)"
)
def rotate_callback_secret(caller: Caller) -> Response:
    """For a day, callbacks carry the signatures of both."""
    with transaction() as session:
        account = accounts.rotate_callback_secret(
            session, caller.account_id, overlap=SECRET_OVERLAP
        )
    return JSON({"key": account.callback_secret})


def _cancel(task_id: str, account_id: str) -> Task:
    with transaction() as session:
        task = tasks.cancel(session, task_id, account_id=account_id)
    events.publish(task)
    return task


def _check_form(task_id: str) -> None:
    if not task_id.startswith(tasks.ID_PREFIX):
        raise errors.InvalidTaskId


def _common(task: Task) -> dict[str, Any]:
    return {
        "created": int(task.created_at.timestamp()),
        "id": task.id,
        "model": task.model,
        "object": "image.generation.task",
        "progress": task.progress,
        "status": STATUSES[task.status],
        "type": "image",
    }


def render_created(task: Task, estimated_s: float) -> dict[str, Any]:
    """The answer to a create."""
    return _common(task) | {
        "task_info": {"can_cancel": True, "estimated_time": math.ceil(estimated_s)},
        "usage": {
            "billing_rule": "per_call",
            "credits_reserved": task.price,
            "user_group": task.user_group,
        },
    }


def render_task(task: Task) -> dict[str, Any]:
    """The answer to a task query, and the body of the callback."""
    answer = _common(task) | {"task_info": {"can_cancel": not task.status.is_terminal}}
    if task.status is TaskStatus.COMPLETED:
        links = [] if task.image_expired else [task.image_url]
        answer["results"] = links
        answer["result_data"] = [{"image_url": link, "seed": task.seed} for link in links]
        answer["usage"] = {"billing_rule": "per_call", "credits_used": task.price}
        if not links:
            answer["results_expired"] = True
    elif task.status is TaskStatus.FAILED:
        code = TASK_ERRORS.get(task.error_code or "", "unknown_error")
        answer["error"] = {"code": code, "message": task.error_message, "type": "task_error"}
    elif task.status is TaskStatus.CANCELLED:
        answer["error"] = {
            "code": "request_cancelled",
            "message": "The task was cancelled. You were not charged.",
            "type": "task_error",
        }
    return answer


def routers() -> list[APIRouter]:
    rest = routing.close([create_router, query_router], "/v1", render_query_error)
    return [create_router, query_router, rest]
