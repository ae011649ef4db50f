"""The API of a self-hosted Z-Image-Turbo container: `POST /v1/generate`, image in the answer.

Source: an article on such a container (undated), by what its curl, Python and JavaScript clients
send and read; it prints no schema. From it: the fields, their defaults in its Python client, steps
of which 9 run 8, `guidance_scale` of 0 only, PNG or JPEG and no WebP, the file in plain Base64 as
`image`, errors as `{"detail": …}`, an answer within 120 seconds, no key.

Our choice, where it is silent or contradicts itself: only `prompt` is required; sides are multiples
of 16, which the model needs, not of 64, since its own example sends 800; `seed` is at most
2147483647; `detail` is always one sentence, and what is wrong with a request is 422;
`negative_prompt` is taken and has no effect, as the model is drawn without guidance; a size that
the GPU has no memory for is 503, and a smaller image only with `allow_downscale`, which the answer
then says as `downscaled`; `seed`, `format` and the file's `width` and `height` in the answer, and
how many tokens the prompt has and how many of them were read; without a key, callers of this
machine only, and only where the operator has named the account that pays (`api.auth.is_local`).
"""

import base64
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
)
from starlette.responses import Response

from api import orders
from api.answers import JSON
from api.auth import Caller, admit_local
from api.dialects import routing
from api.orders import Quote
from storage import errors, tasks
from storage.models import ImageFormat

NAME = "local"
PATH = "/v1/generate"
PROMPT_MAX_CHARACTERS = 2000
"""The article names no limit; the model reads fewer, and the answer says how many."""
SIDE_MIN_PX, SIDE_MAX_PX, SIDE_STEP_PX = 64, 2048, 16
"""The article recommends 512 to 1280, and more with much GPU memory; the model knows 2048."""
SIDE_DEFAULT_PX = 1024
SEED_MAX = 2147483647
STEPS_MAX = 9
HELD_S = 110
"""How long the line is held: the article's clients give up after 120 seconds without an answer."""
RETRY_AFTER_S = 5

FORMATS = {"png": ImageFormat.PNG, "jpeg": ImageFormat.JPEG, "jpg": ImageFormat.JPEG}

ERRORS: dict[type[errors.ServiceError], int] = {
    errors.ContentRefused: 400,
    errors.Unauthenticated: 401,
    errors.InsufficientCredits: 402,
    errors.AccountSuspended: 403,
    errors.ModelAccessDenied: 403,
    errors.PathNotFound: 404,
    errors.MethodNotAllowed: 405,
    errors.IdempotencyConflict: 409,
    errors.TaskCancelled: 409,
    errors.TaskNotFound: 410,  # the image of an earlier copy of the request, which has expired
    errors.PayloadTooLarge: 413,
    errors.InvalidRequest: 422,
    errors.RateLimited: 429,
    errors.TooManyUnfinished: 429,
    errors.BacklogFull: 503,
    errors.GenerationFailed: 500,
    errors.InternalError: 500,
    errors.RewriteFailed: 500,
    errors.ResourceExhausted: 503,
    errors.ServiceUnavailable: 503,
    errors.StorageUnavailable: 503,
    errors.WorkerLost: 503,
    errors.GenerationTimeout: 504,
}


def _side(side: int) -> int:
    if side % SIDE_STEP_PX:
        raise ValueError(f"must be a multiple of {SIDE_STEP_PX}")
    return side


def _no_guidance(scale: float) -> float:
    if scale != 0:
        raise ValueError("must be 0.0, since the model is drawn without guidance")
    return scale


Side = Annotated[StrictInt, Field(ge=SIDE_MIN_PX, le=SIDE_MAX_PX), AfterValidator(_side)]


class DrawRequest(BaseModel):
    """The body of a create; unknown fields are ignored, and null is a field that was not sent."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "prompt": "a red star on a blue background",
                "width": 768,
                "height": 768,
                "seed": 42,
            }
        }
    )

    prompt: Annotated[
        StrictStr, Field(max_length=PROMPT_MAX_CHARACTERS), AfterValidator(routing.drawable)
    ]
    negative_prompt: Annotated[StrictStr | None, Field(description="Taken, and without effect")] = (
        None
    )
    width: Side | None = None
    height: Side | None = None
    num_inference_steps: (
        Annotated[StrictInt, Field(ge=1, le=STEPS_MAX, description="9 are drawn as 8")] | None
    ) = None
    guidance_scale: Annotated[float, Field(strict=True), AfterValidator(_no_guidance)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=SEED_MAX)] | None = None
    output_format: Literal["png", "jpeg", "jpg"] | None = None
    allow_downscale: Annotated[
        StrictBool | None, Field(description="Ours: a smaller image will do if memory is short")
    ] = None

    def image(self) -> tasks.ImageRequest:
        """What is to be drawn."""
        return tasks.ImageRequest(
            prompt=self.prompt,
            width=self.width or SIDE_DEFAULT_PX,
            height=self.height or SIDE_DEFAULT_PX,
            image_format=FORMATS[self.output_format or "png"],
            seed=self.seed,
            # The article's 9 ran 8 in its library; in ours it would be a ninth step.
            steps=min(self.num_inference_steps or tasks.STEPS, tasks.STEPS),
            allow_downscale=bool(self.allow_downscale),
        )


def render_error(error: errors.ServiceError) -> Response:
    status = ERRORS.get(type(error), ERRORS[errors.InternalError])
    headers = error.headers
    if status == ERRORS[errors.ServiceUnavailable]:
        headers = {"Retry-After": str(RETRY_AFTER_S)} | headers
    return JSON({"detail": str(error)}, status, headers)


router = routing.dialect_router(render_error, admit_local)


@router.post(
    PATH,
    summary="Draw an image and answer with it",
    responses=routing.example(
        {
            "image": "iVBORw0KGgoAAAANSUhEUgAA…",
            "seed": 42,
            "width": 768,
            "height": 768,
            "format": "png",
            "prompt_tokens": 14,
            "prompt_tokens_read": 14,
        }
    ),
)
async def generate(request: Request, body: DrawRequest, caller: Caller) -> Response:
    """Needs no key from a program on the same machine, if the operator has named who pays."""
    order = await orders.draw(request, caller, [body.image()], NAME, timeout_s=HELD_S)
    if isinstance(order, Quote):
        return JSON(order.render())
    (task,) = order
    image = await orders.bytes_of(task)
    answer = {
        "image": base64.b64encode(image).decode(),
        "seed": task.seed,
        "width": task.image_width or task.width,
        "height": task.image_height or task.height,
        "format": task.image_format,
    }
    if task.downscaled:
        answer["downscaled"] = True
    if task.prompt_tokens is not None:
        answer["prompt_tokens"] = task.prompt_tokens
        answer["prompt_tokens_read"] = task.prompt_tokens_read
    return JSON(answer)


def routers() -> list[APIRouter]:
    return [router, routing.close([router], PATH, render_error)]
