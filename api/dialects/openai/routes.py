"""OpenAI's routes: create, models, model."""

from typing import Annotated

from fastapi import Path, Request
from starlette.responses import Response

from api import orders
from api.answers import JSON
from api.auth import Caller, admit_create, admit_read
from api.dialects import routing
from api.dialects.openai import answers, stream
from api.dialects.openai.refusals import model_not_found, render_error
from api.dialects.openai.request import ImagesRequest
from api.orders import Quote
from storage import tasks

NAME = "openai"
SYNC_TIMEOUT_S = 570
"""How long a create is held: the library hangs up after 600 s, and the images must be fetched."""

create_router = routing.dialect_router(render_error, admit_create)
models_router = routing.dialect_router(render_error, admit_read)


@create_router.post(
    "/openai/v1/images/generations",
    summary="Generate images",
    responses=routing.example(
        {
            "created": 1757165031,
            "background": "opaque",
            "output_format": "png",
            "quality": "auto",
            "size": "1024x1024",
            "safety_identifier": None,
            "usage": {
                "input_tokens": 14,
                "input_tokens_details": {"image_tokens": 0, "text_tokens": 14},
                "output_tokens": 0,
                "total_tokens": 14,
                "billing_rule": "per_call",
                "credits_used": 15,
                "prompt_tokens_read": 14,
            },
            "data": [
                {
                    "url": "https://images.example.com/x.png",
                    "b64_json": None,
                    "revised_prompt": None,
                    "seed": 1093847,
                    "task_id": "task-unified-1757165031-uyujaw3d",
                }
            ],
        },
        streams=True,
    ),
)
async def generate(request: Request, body: ImagesRequest, caller: Caller) -> Response:
    """Answers when the images are there. `seed` and `allow_downscale` are our extensions."""
    if body.model not in (None, tasks.MODEL):
        raise model_not_found(body.model)
    body.check_stream()
    drawing = orders.draw(
        request,
        caller,
        body.images(),
        NAME,
        timeout_s=SYNC_TIMEOUT_S,
        # Once a stream has begun, the library does not come again.
        resends=not body.stream,
    )
    if body.stream:
        return await stream.respond(body, drawing)
    order = await drawing
    if isinstance(order, Quote):
        return JSON(order.render())
    return JSON(await answers.render_images(body, order))


@models_router.get(
    "/openai/v1/models",
    summary="List the models",
    responses=routing.example({"object": "list", "data": [answers.render_model()]}),
)
async def list_models(caller: Caller) -> Response:
    """Those that the key may use."""
    data = [answers.render_model()] if caller.may_use(tasks.MODEL) else []
    return JSON({"object": "list", "data": data})


@models_router.get(
    "/openai/v1/models/{model}",
    summary="Get a model",
    responses=routing.example(answers.render_model()),
)
async def get_model(
    model: Annotated[str, Path(description="`z-image-turbo`")], caller: Caller
) -> Response:
    if model != tasks.MODEL or not caller.may_use(model):
        raise model_not_found(model)
    return JSON(answers.render_model())
