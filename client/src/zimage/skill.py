"""`image.generate`: the published skill's normalised request, over DashScope's synchronous API.

Sources: the page of the skill `aliyun-zimage-turbo` for the fields, its script for what it does
with them, Alibaba Cloud's page of z-image-turbo for the answer. Our choice: `prompt_extend` must
be a boolean, so that the text "false" is an error and not true; `reasoning` is taken from the
message, where the official answer has it, as well as from its content.
"""

import uuid
from dataclasses import dataclass
from typing import Any

from zimage.answers import JSONObject, read
from zimage.errors import InvalidRequest, ServiceUnavailable
from zimage.exchange import exchange
from zimage.fetching import fetch
from zimage.operations import MODEL
from zimage.retries import Retries
from zimage.steps import Request, Steps

PATH = "/api/v1/services/aigc/multimodal-generation/generation"
SIZE = "1024*1024"
"""Sent when the request says none: the API's own default has half as many pixels again."""
ANSWER_TIMEOUT_S = 300.0
"""The connection is held while the image is queued and drawn."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """`size` is `width*height`; `base_url` is the complete address of the endpoint."""

    prompt: str
    size: str = SIZE
    seed: int | None = None
    prompt_extend: bool | None = None
    base_url: str | None = None


@dataclass(frozen=True, slots=True)
class ImageResponse:
    """The normalised answer; where nothing is rewritten, `rewritten_prompt` is the prompt."""

    image_url: str
    width: int | None
    height: int | None
    prompt: str
    rewritten_prompt: str | None
    reasoning: str | None
    request_id: str | None


def read_request(said: object) -> ImageRequest:
    """A request from JSON; unknown fields are passed over.

    Raises:
        InvalidRequest: a field has the wrong type, such as `prompt_extend` the text "false".
    """
    if not isinstance(said, dict):
        raise InvalidRequest("The request must be a JSON object")
    prompt = _field(said, "prompt", str)
    if not prompt:
        raise InvalidRequest("prompt is required")
    return ImageRequest(
        prompt=prompt,
        size=_field(said, "size", str) or SIZE,
        seed=_field(said, "seed", int),
        prompt_extend=_field(said, "prompt_extend", bool),
        base_url=_field(said, "base_url", str),
    )


def _field(said: dict[str, Any], name: str, kind: type) -> Any:
    value = said.get(name)
    if value is None or type(value) is kind:
        return value
    names = {str: "text", int: "a whole number", bool: "true or false, without quotes"}
    raise InvalidRequest(f"{name} must be {names[kind]}")


def generate(
    request: ImageRequest, endpoint: str, retries: Retries
) -> Steps[tuple[ImageResponse, bytes]]:
    """The answer and the PNG. A retry with the same key does not draw twice on this service."""
    parameters = {
        "size": request.size,
        "seed": request.seed,
        "prompt_extend": request.prompt_extend,
    }
    content = [{"text": request.prompt}]
    answer = yield from exchange(
        Request(
            "POST",
            request.base_url or endpoint,
            headers={"Idempotency-Key": uuid.uuid4().hex},
            body={
                "model": MODEL,
                "input": {"messages": [{"role": "user", "content": content}]},
                "parameters": {k: v for k, v in parameters.items() if v is not None},
            },
            read_timeout_s=ANSWER_TIMEOUT_S,
        ),
        retries,
    )
    response = read(answer.body, lambda said: _read_response(said, request.prompt))
    return response, (yield from fetch(response.image_url, retries))


def _read_response(said: JSONObject, prompt: str) -> ImageResponse:
    choices = (said.get("output") or {}).get("choices")
    if not choices:
        raise ServiceUnavailable("No choices returned by DashScope")
    message = choices[0].get("message") or {}
    content = [part for part in message.get("content") or [] if isinstance(part, dict)]

    def first(name: str) -> str | None:
        return next((part[name] for part in content if part.get(name)), None)

    image_url = first("image")
    if image_url is None:
        raise ServiceUnavailable("No image URL returned by DashScope")
    usage = said.get("usage") or {}
    return ImageResponse(
        image_url=image_url,
        width=usage.get("width"),
        height=usage.get("height"),
        prompt=prompt,
        rewritten_prompt=first("text"),
        reasoning=first("reasoning_content") or message.get("reasoning_content") or None,
        request_id=said.get("request_id"),
    )
