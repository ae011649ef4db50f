"""What was not drawn quite as it was asked for is said: a smaller image, a prompt that was cut off.

In every format that has our `allow_downscale`; DashScope's is in `test_dashscope.py`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from decimal import Decimal
from io import BytesIO
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

import httpx
import pytest
from PIL import Image
from sqlalchemy import select, update

from storage.database import transaction
from storage.errors import ResourceExhausted
from storage.models import Task
from tests.conftest import OneByOne, Paint
from worker.drawing import Reading

if TYPE_CHECKING:
    from tests.conftest import Atelier, Customer

ZIMAGETURBO, EVOLINK = "/api/generate", "/v1/images/generations"
OPENAI, LOCAL = "/openai/v1/images/generations", "/v1/generate"
PROMPT = "a cat in the sun"
BODIES: dict[str, dict[str, Any]] = {
    ZIMAGETURBO: {"prompt": PROMPT, "aspect_ratio": "1:1"},
    EVOLINK: {"prompt": PROMPT, "model": "z-image-turbo"},
    OPENAI: {"prompt": PROMPT},
    LOCAL: {"prompt": PROMPT},
}
"""All of 1024 x 1024 pixels."""
formats = pytest.mark.parametrize("path", BODIES)
AREA_MAX_PX = 512 * 512
TOKENS_MAX = 5


def cramped(prompt: str, *, width: int, height: int, seed: int, **how: Any) -> Image.Image:
    """Has memory for more than 512 x 512 pixels only where the seed is even."""
    if width * height > AREA_MAX_PX and seed % 2:
        raise ResourceExhausted
    return Paint()(prompt, width=width, height=height, seed=seed, **how)


class ShortSighted(OneByOne):
    """Reads the first tokens of a prompt and no more."""

    def read(self, prompt: str) -> Reading:
        read = super().read(prompt)
        return Reading(read.tokens[:TOKENS_MAX], read.given)


def ask(customer: Customer, path: str, **fields: object) -> httpx.Response:
    """A create with an odd seed, answered when its image is there."""
    headers = {"Prefer": "wait=30", "Idempotency-Key": "1"}
    return customer.http.post(path, json=BODIES[path] | {"seed": 7} | fields, headers=headers)


def drawn(customer: Customer, path: str, **fields: object) -> dict[str, Any]:
    answer = ask(customer, path, **fields)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body["data"] if path == ZIMAGETURBO else body


def file_of(path: str, answer: dict[str, Any]) -> bytes:
    if path == LOCAL:
        return base64.b64decode(answer["image"])
    links: dict[str, Callable[[], str]] = {
        ZIMAGETURBO: lambda: answer["response"][0],
        EVOLINK: lambda: answer["results"][0],
        OPENAI: lambda: answer["data"][0]["url"],
    }
    with urlopen(links[path]()) as file:
        data: bytes = file.read()
        return data


def told_size(path: str, answer: dict[str, Any]) -> dict[str, Any]:
    """What the answer says of its image's size."""
    image = answer["result_data"][0] if path == EVOLINK else answer
    return {
        name: image[name] for name in ("size", "width", "height", "downscaled") if name in image
    }


@formats
def test_a_smaller_image_is_sent_where_it_is_allowed_and_the_answer_says_so(
    customer: Customer, drawing: Atelier, path: str
) -> None:
    drawing.draw_with(cramped)

    answer = drawn(customer, path, allow_downscale=True)

    assert Image.open(BytesIO(file_of(path, answer))).size == (512, 512)
    assert (
        told_size(path, answer)
        == {
            ZIMAGETURBO: {"size": "512*512", "downscaled": True},
            EVOLINK: {"width": 512, "height": 512, "downscaled": True},
            OPENAI: {"size": "512x512", "downscaled": True},
            LOCAL: {"width": 512, "height": 512, "downscaled": True},
        }[path]
    )
    assert customer.books() == (Decimal(1485), Decimal(0))


@formats
@pytest.mark.parametrize("fields", [{}, {"allow_downscale": False}, {"allow_downscale": None}])
def test_a_smaller_image_is_never_sent_to_whoever_did_not_allow_it(
    customer: Customer, drawing: Atelier, path: str, fields: dict[str, object]
) -> None:
    drawing.draw_with(cramped)

    answer = ask(customer, path, **fields)

    assert str(ResourceExhausted()) in answer.text
    assert customer.books() == (Decimal(1500), Decimal(0))


@formats
@pytest.mark.usefixtures("drawing")
def test_an_image_as_large_as_was_asked_for_is_not_called_smaller(
    customer: Customer, path: str
) -> None:
    answer = drawn(customer, path, allow_downscale=True)

    assert Image.open(BytesIO(file_of(path, answer))).size == (1024, 1024)
    assert (
        told_size(path, answer)
        == {
            ZIMAGETURBO: {},
            EVOLINK: {"width": 1024, "height": 1024},
            OPENAI: {"size": "1024x1024"},
            LOCAL: {"width": 1024, "height": 1024},
        }[path]
    )


def test_of_several_images_each_smaller_one_says_its_size_and_the_answer_the_smallest(
    customer: Customer, drawing: Atelier
) -> None:
    drawing.draw_with(cramped)

    answer = drawn(customer, OPENAI, n=2, seed=2, allow_downscale=True)

    large, small = answer["data"]
    assert not {"size", "downscaled"} & set(large)
    assert (small["size"], small["downscaled"]) == ("512x512", True)
    assert told_size(OPENAI, answer) == {"size": "512x512", "downscaled": True}


def test_an_event_of_a_stream_says_that_its_image_is_smaller(
    customer: Customer, drawing: Atelier
) -> None:
    drawing.draw_with(cramped)

    answer = ask(customer, OPENAI, stream=True, allow_downscale=True)

    assert '"size":"512x512"' in answer.text
    assert '"downscaled":true' in answer.text


def told_tokens(path: str, answer: dict[str, Any]) -> dict[str, Any]:
    """What the answer says of the prompt's tokens."""
    told = answer["usage"] if path in (EVOLINK, OPENAI) else answer
    return {name: value for name, value in told.items() if "tokens" in name}


@formats
def test_the_answer_says_how_many_tokens_there_were_and_how_many_were_read(
    customer: Customer, drawing: Atelier, path: str
) -> None:
    drawing.draw_with(ShortSighted(Paint()))

    told = told_tokens(path, drawn(customer, path))

    if path == OPENAI:
        assert told == {
            "input_tokens": len(PROMPT),
            "input_tokens_details": {"image_tokens": 0, "text_tokens": len(PROMPT)},
            "output_tokens": 0,
            "total_tokens": len(PROMPT),
            "prompt_tokens_read": TOKENS_MAX,
        }
    else:
        assert told == {"prompt_tokens": len(PROMPT), "prompt_tokens_read": TOKENS_MAX}


@pytest.mark.usefixtures("drawing")
def test_a_prompt_that_is_drawn_several_times_is_counted_once(customer: Customer) -> None:
    assert told_tokens(OPENAI, drawn(customer, OPENAI, n=3))["input_tokens"] == len(PROMPT)


@formats
@pytest.mark.usefixtures("drawing")
def test_of_a_task_of_an_earlier_version_nothing_is_said_that_nobody_knows(
    customer: Customer, path: str
) -> None:
    before = drawn(customer, path)
    unknown = ("prompt_tokens", "prompt_tokens_read", "image_width", "image_height")
    with transaction() as session:
        session.execute(update(Task).values(dict.fromkeys(unknown)))

    after = drawn(customer, path)  # the same request: answered with the same task

    with transaction() as session:
        assert session.scalars(select(Task.prompt_tokens)).all() == [None]
    assert told_size(path, after) == told_size(path, before)
    tokens = told_tokens(path, after)
    assert not {"prompt_tokens", "prompt_tokens_read"} & set(tokens)
    if path == OPENAI:
        assert tokens["input_tokens"] == tokens["total_tokens"] == 0
