"""zimageturbo.ai's API: `POST /api/generate`, `GET /api/status`.

Source: zimageturbo.ai/docs, v1.0.0 (Japanese and English copies, read 2026-11): the fields, both
success bodies, the three status words, and the titles of 401, 402 and 429.

Our choice, where it is silent: the pixels of each ratio; errors in the same envelope with `code`
equal to the HTTP status; 400 for a prompt that is too long, not a silent cut; 404 for an unknown
task; `size`, `seed` and `allow_downscale` in the request; in the status the drawn `seed`, how many
tokens the prompt has and how many of them were read, and, where a smaller image was drawn, its
`size` beside `downscaled`; an empty `response` with an `error_message` once the image has expired.
"""

import re
from datetime import UTC
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictStr,
)
from starlette.responses import Response

from api import orders
from api.answers import JSON
from api.auth import Caller, admit_create, admit_read
from api.dialects import routing
from api.orders import Quote
from storage import errors, tasks
from storage.models import ImageFormat, Task, TaskStatus

NAME = "zimageturbo"
PROMPT_MAX_CHARACTERS = 1000
RANDOM_SEED = -1
SEED_MAX = 2147483647
SIDE_MIN_PX, SIDE_MAX_PX = 256, 1536

SIZES = {
    "1:1": (1024, 1024),
    "4:3": (1152, 864),
    "3:4": (864, 1152),
    "16:9": (1280, 720),
    "9:16": (720, 1280),
}
"""Width and height in pixels of each ratio. 1:1 is in the documentation's example, the others are
our choice from DashScope's list of sizes near 1024*1024."""
CUSTOM_SIZE = re.compile(r"([0-9]{3,4})\*([0-9]{3,4})")

STATUSES = {
    TaskStatus.PENDING: "IN_PROGRESS",
    TaskStatus.PROCESSING: "IN_PROGRESS",
    TaskStatus.COMPLETED: "SUCCESS",
    TaskStatus.FAILED: "FAILED",
    TaskStatus.CANCELLED: "FAILED",
}

ERRORS: dict[type[errors.ServiceError], int] = {
    errors.InvalidRequest: 400,
    errors.InvalidTaskId: 400,
    errors.Unauthenticated: 401,
    errors.InsufficientCredits: 402,
    errors.AccountSuspended: 403,
    errors.ModelAccessDenied: 403,
    errors.PathNotFound: 404,
    errors.TaskNotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.IdempotencyConflict: 409,
    errors.TaskEnded: 409,
    errors.PayloadTooLarge: 413,
    errors.RateLimited: 429,
    errors.TooManyUnfinished: 429,
    errors.BacklogFull: 503,
    errors.InternalError: 500,
    errors.ServiceUnavailable: 503,
}


_WRITTEN_SEED = r"-?[0-9]{1,10}"
Seed = (
    Annotated[int, Field(ge=RANDOM_SEED, le=SEED_MAX)]
    | Annotated[str, Field(pattern=f"^{_WRITTEN_SEED}$")]
)
"""As the document has it."""


def _size(size: str) -> str:
    custom = CUSTOM_SIZE.fullmatch(size)
    if custom is None:
        raise ValueError("must be <width>*<height> in pixels")
    if not all(SIDE_MIN_PX <= int(side) <= SIDE_MAX_PX for side in custom.groups()):
        raise ValueError(f"width and height must be {SIDE_MIN_PX} to {SIDE_MAX_PX} pixels")
    return size


def _seed(seed: object) -> object:
    """The status answers the seed as a string, so a string is taken as well."""
    if isinstance(seed, str) and re.fullmatch(_WRITTEN_SEED, seed):
        return int(seed)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError("must be an integer")
    return seed


class GenerateRequest(BaseModel):
    """The body of a create.

    `size` (wins over the ratio), `seed` (-1: random) and `allow_downscale` are extensions.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"prompt": "a red star on a blue background", "aspect_ratio": "16:9"}
        }
    )

    prompt: Annotated[
        StrictStr, Field(max_length=PROMPT_MAX_CHARACTERS), AfterValidator(routing.drawable)
    ]
    aspect_ratio: Literal["1:1", "4:3", "3:4", "16:9", "9:16"]
    size: Annotated[StrictStr, AfterValidator(_size)] | None = None
    seed: (
        Annotated[
            int,
            Field(ge=RANDOM_SEED, le=SEED_MAX),
            BeforeValidator(_seed, json_schema_input_type=Seed),
        ]
        | None
    ) = None
    allow_downscale: StrictBool | None = None

    def pixels(self) -> tuple[int, int]:
        """Width and height."""
        if self.size is None:
            return SIZES[self.aspect_ratio]
        width, _, height = self.size.partition("*")
        return int(width), int(height)


def render_error(error: errors.ServiceError) -> Response:
    status = ERRORS.get(type(error), ERRORS[errors.InternalError])
    return JSON({"code": status, "message": str(error), "data": None}, status, error.headers)


create_router = routing.dialect_router(render_error, admit_create)
status_router = routing.dialect_router(render_error, admit_read)


@create_router.post(
    "/api/generate",
    summary="Create an image generation task",
    responses=routing.example(
        {
            "code": 200,
            "message": "success",
            "data": {"task_id": "task-unified-1757165031-uyujaw3d", "status": "IN_PROGRESS"},
        }
    ),
)
async def generate(request: Request, body: GenerateRequest, caller: Caller) -> Response:
    width, height = body.pixels()
    image = tasks.ImageRequest(
        prompt=body.prompt,
        width=width,
        height=height,
        image_format=ImageFormat.JPEG,
        seed=None if body.seed == RANDOM_SEED else body.seed,
        aspect_ratio=body.aspect_ratio,
        allow_downscale=bool(body.allow_downscale),
    )
    order = await orders.place(request, caller, [image], NAME)
    if isinstance(order, Quote):
        return _success(order.render())
    (task,) = order
    if task.status.is_terminal:
        return _success(render_task(task))
    return _success({"task_id": task.id, "status": STATUSES[task.status]})


@status_router.get(
    "/api/status",
    summary="Get the status and the images of a task",
    responses=routing.example(
        {
            "code": 200,
            "message": "success",
            "data": {
                "status": "SUCCESS",
                "task_id": "task-unified-1757165031-uyujaw3d",
                "request": {"prompt": "a red fox", "size": "1280*720", "seed": "-1"},
                "response": ["https://images.example.com/x.jpeg"],
                "consumed_credits": 15,
                "created_at": "2025-09-06 13:23:51",
                "error_message": None,
                "seed": "1093847",
                "prompt_tokens": 14,
                "prompt_tokens_read": 14,
            },
        }
    ),
)
async def status(
    request: Request,
    caller: Caller,
    task_id: Annotated[str, Query(description="As the create answered it")],
) -> Response:
    return _success(render_task(await orders.find(request, caller, task_id)))


def render_task(task: Task) -> dict[str, Any]:
    """`data` of the answer to a status query."""
    completed = task.status is TaskStatus.COMPLETED
    expired = completed and task.image_expired
    asked = {
        "prompt": task.prompt,
        "size": f"{task.width}*{task.height}",
        "seed": str(task.seed if task.seed_given else RANDOM_SEED),
    }
    if task.aspect_ratio is not None:
        asked["aspect_ratio"] = task.aspect_ratio
    message = task.error_message
    if task.status is TaskStatus.CANCELLED:
        message = "The task was cancelled. You were not charged."
    elif expired:
        message = "The image has expired and was deleted."
    data = {
        "status": STATUSES[task.status],
        "task_id": task.id,
        "request": asked,
        "response": [task.image_url] if completed and not expired else [],
        "consumed_credits": task.price if completed else 0,
        "created_at": f"{task.created_at.astimezone(UTC):%Y-%m-%d %H:%M:%S}",
        "error_message": message,
        "seed": str(task.seed),
    }
    if task.downscaled:
        data |= {"size": f"{task.image_width}*{task.image_height}", "downscaled": True}
    if task.prompt_tokens is not None:
        data["prompt_tokens"] = task.prompt_tokens
        data["prompt_tokens_read"] = task.prompt_tokens_read
    return data


def _success(data: dict[str, Any]) -> Response:
    return JSON({"code": 200, "message": "success", "data": data})


def routers() -> list[APIRouter]:
    rest = routing.close([create_router, status_router], "/api", render_error)
    return [create_router, status_router, rest]
