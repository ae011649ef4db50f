"""What OpenAI's format answers: images, the event of an image, a model."""

from base64 import b64encode
from collections.abc import Sequence
from typing import Any

from api import orders
from api.dialects.openai.refusals import describe
from api.dialects.openai.request import ImagesRequest
from storage import tasks
from storage.errors import ServiceError
from storage.models import Task

MODEL_CREATED = 1764115200
"""2025-11-26, about when Z-Image-Turbo was published: our choice, since nothing is sorted by it."""
OWNED_BY = "tongyi-mai"

Failures = dict[int, ServiceError]
"""Why an image could not be drawn, by its place among those that were asked for, from 0."""


def sort_out(found: Sequence[Task]) -> tuple[list[Task], Failures]:
    """What was drawn, and what was not. Raises: the first failure, where nothing was drawn."""
    drawn = []
    failures: Failures = {}
    for index, task in enumerate(found):
        try:
            orders.image_of(task)
        except ServiceError as error:
            failures[index] = error
        else:
            drawn.append(task)
    if not drawn:
        raise failures[0]
    return drawn, failures


async def render_images(asked: ImagesRequest, found: Sequence[Task]) -> dict[str, Any]:
    """The answer to a create. Raises: what `sort_out` raises; ServiceUnavailable."""
    drawn, failures = sort_out(found)
    answer = {"created": _ended_at(drawn[-1])} | _common(asked, drawn)
    answer["data"] = [await _render_image(asked, task) for task in drawn]
    if failures:
        answer["failures"] = [
            {"index": index, "error": describe(error)} for index, error in failures.items()
        ]
    return answer


async def _render_image(asked: ImagesRequest, task: Task) -> dict[str, Any]:
    embedded = asked.response_format == "b64_json"
    image = {
        "url": None if embedded else orders.image_of(task),
        "b64_json": await _base64(task) if embedded else None,
        "revised_prompt": None,
        "seed": task.seed,
        "task_id": task.id,
    }
    return image | ({"size": _size(task), "downscaled": True} if task.downscaled else {})


async def render_completed(asked: ImagesRequest, task: Task) -> dict[str, Any]:
    """The event of an image. Raises: ServiceUnavailable."""
    return {
        "type": "image_generation.completed",
        "b64_json": await _base64(task),
        "created_at": _ended_at(task),
        "seed": task.seed,
        "task_id": task.id,
    } | _common(asked, [task])


def render_model() -> dict[str, Any]:
    return {
        "id": tasks.MODEL,
        "object": "model",
        "created": MODEL_CREATED,
        "owned_by": OWNED_BY,
    }


def _common(asked: ImagesRequest, drawn: Sequence[Task]) -> dict[str, Any]:
    smallest = min(drawn, key=lambda task: task.image_width or task.width)
    common = {
        "background": "opaque",
        "output_format": drawn[0].image_format,
        "quality": asked.quality or "auto",
        "size": _size(smallest),
        "safety_identifier": asked.safety_identifier or asked.user or None,
        "usage": _usage(drawn),
    }
    return common | ({"downscaled": True} if smallest.downscaled else {})


def _usage(drawn: Sequence[Task]) -> dict[str, Any]:
    tokens = drawn[0].prompt_tokens or 0
    usage = {
        "input_tokens": tokens,
        "input_tokens_details": {"image_tokens": 0, "text_tokens": tokens},
        "output_tokens": 0,
        "total_tokens": tokens,
        "billing_rule": "per_call",
        "credits_used": sum(task.price for task in drawn),
    }
    if drawn[0].prompt_tokens_read is not None:
        usage["prompt_tokens_read"] = drawn[0].prompt_tokens_read
    return usage


def _size(task: Task) -> str:
    return f"{task.image_width or task.width}x{task.image_height or task.height}"


def _ended_at(task: Task) -> int:
    return int((task.finished_at or task.created_at).timestamp())


async def _base64(task: Task) -> str:
    return b64encode(await orders.bytes_of(task)).decode()
