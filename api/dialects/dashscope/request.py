"""The bodies of a create in DashScope's format, and the limits of their fields."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from api.dialects import routing
from storage.models import ImageFormat
from storage.tasks import ImageRequest

PROMPT_MAX_CHARACTERS = 800
"""What is beyond is cut off, as DashScope documents it, and not an error."""
SEED_MAX = 2147483647
AREA_MIN_PX, AREA_MAX_PX = 512 * 512, 2048 * 2048
SIDE_MAX_PX = 8192
"""Our choice: 512 patches of 16 pixels, which is how far the model can count along a side."""
DEFAULT_SIZE = "1024*1536"
SIZE = re.compile(r"([0-9]{2,4})\*([0-9]{2,4})")


def _cut(prompt: str) -> str:
    cut = prompt[:PROMPT_MAX_CHARACTERS]
    try:
        cut.encode()
    except UnicodeEncodeError:  # half of an escaped pair, which no database takes
        raise ValueError("must be valid Unicode") from None
    return cut


Prompt = Annotated[StrictStr, AfterValidator(_cut), AfterValidator(routing.drawable)]


def _size(size: str) -> str:
    sides = SIZE.fullmatch(size)
    if sides is None:
        raise ValueError("must be <width>*<height> in pixels")
    width, height = int(sides[1]), int(sides[2])
    if not AREA_MIN_PX <= width * height <= AREA_MAX_PX:
        raise ValueError("the total pixels must be between 512*512 and 2048*2048")
    if max(width, height) > SIDE_MAX_PX:
        raise ValueError(f"width and height must be at most {SIDE_MAX_PX} pixels")
    return size


def _one(n: int) -> int:
    if n != 1:
        raise ValueError("num_images_per_prompt must be 1")
    return n


class Parameters(BaseModel):
    """Every other parameter is taken and ignored, as DashScope does; its SDK sends `is_async`."""

    size: Annotated[StrictStr, AfterValidator(_size)] | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=SEED_MAX)] | None = None
    n: Annotated[StrictInt, AfterValidator(_one)] | None = None
    prompt_extend: StrictBool | None = None
    allow_downscale: StrictBool | None = None
    """Ours: rather a smaller image than none, where there is no memory for this one."""


class _Create(BaseModel):
    model: Literal["z-image-turbo"]
    parameters: Parameters | None = None

    def _image(self, prompt: str) -> ImageRequest:
        asked = self.parameters or Parameters()
        width, _, height = (asked.size or DEFAULT_SIZE).partition("*")
        return ImageRequest(
            prompt=prompt,
            width=int(width),
            height=int(height),
            image_format=ImageFormat.PNG,
            seed=asked.seed,
            model=self.model,
            prompt_extend=bool(asked.prompt_extend),
            allow_downscale=bool(asked.allow_downscale),
        )


class Text(BaseModel):
    text: Prompt


class Message(BaseModel):
    role: Literal["user"]
    content: Annotated[list[Text], Field(min_length=1, max_length=1)]


class Messages(BaseModel):
    messages: Annotated[list[Message], Field(min_length=1, max_length=1)]


class MessagesRequest(_Create):
    """The body of the two creates that take messages: one message with one text."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "model": "z-image-turbo",
                "input": {
                    "messages": [
                        {"role": "user", "content": [{"text": "a red star on a blue background"}]}
                    ]
                },
                "parameters": {"size": "1120*1440"},
            }
        }
    )

    input: Messages

    def image(self) -> ImageRequest:
        """What is to be drawn."""
        return self._image(self.input.messages[0].content[0].text)


class PromptInput(BaseModel):
    prompt: Prompt


class PromptRequest(_Create):
    """The body of the create that takes a prompt."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "model": "z-image-turbo",
                "input": {"prompt": "a red star on a blue background"},
                "parameters": {"size": "1024*1024", "n": 1},
            }
        }
    )

    input: PromptInput

    def image(self) -> ImageRequest:
        """What is to be drawn."""
        return self._image(self.input.prompt)
