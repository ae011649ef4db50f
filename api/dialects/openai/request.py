"""The body of `images.generate`, and the limits of its fields."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from api.dialects import routing
from storage.errors import InvalidRequest
from storage.models import ImageFormat
from storage.tasks import SEED_MAX, ImageRequest

PROMPT_MAX_CHARACTERS = 32_000
"""OpenAI's; the model reads fewer, and the answer says how many."""
N_MAX = 4
"""OpenAI's is 10; this many are as much as one call should hold up."""
SIDE_MIN_PX, SIDE_MAX_PX = 256, 2048
RATIO_MAX = 3
"""The longer side to the shorter; OpenAI's."""
DEFAULT_SIZE = (1024, 1024)
PARTIAL_IMAGES_MAX = 3
_SIZE = re.compile(r"([0-9]{3,4})x([0-9]{3,4})")


def _size(size: str) -> str:
    if size == "auto":
        return size
    sides = _SIZE.fullmatch(size)
    if sides is None:
        raise ValueError("must be auto, or <width>x<height> in pixels")
    shorter, longer = sorted(int(side) for side in sides.groups())
    if shorter < SIDE_MIN_PX or longer > SIDE_MAX_PX:
        raise ValueError(f"width and height must be {SIDE_MIN_PX} to {SIDE_MAX_PX} pixels")
    if longer > RATIO_MAX * shorter:
        raise ValueError(f"must be no wider than {RATIO_MAX}:1 and no taller than 1:{RATIO_MAX}")
    return size


class ImagesRequest(BaseModel):
    """The body of a create; null is a field that was not sent, and unknown fields are ignored."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "model": "z-image-turbo",
                "prompt": "a red star on a blue background",
                "n": 1,
            }
        }
    )

    prompt: Annotated[
        StrictStr, Field(max_length=PROMPT_MAX_CHARACTERS), AfterValidator(routing.drawable)
    ]
    model: StrictStr | None = None
    n: Annotated[StrictInt, Field(ge=1, le=N_MAX)] | None = None
    size: Annotated[StrictStr, AfterValidator(_size)] | None = None
    response_format: Literal["url", "b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    stream: StrictBool | None = None

    # Ours.
    allow_downscale: StrictBool | None = None
    seed: Annotated[StrictInt, Field(ge=0, le=SEED_MAX)] | None = None

    # Taken, and without effect.
    background: Literal["opaque", "auto"] | None = None
    moderation: Literal["low", "auto"] | None = None
    negative_prompt: StrictStr | None = None
    output_compression: Annotated[StrictInt, Field(ge=0, le=100)] | None = None
    partial_images: Annotated[StrictInt, Field(ge=0, le=PARTIAL_IMAGES_MAX)] | None = None
    quality: Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"] | None = (
        None
    )
    safety_identifier: Annotated[StrictStr, AfterValidator(routing.writable)] | None = None
    style: Literal["vivid", "natural"] | None = None
    user: Annotated[StrictStr, AfterValidator(routing.writable)] | None = None

    def check_stream(self) -> None:
        """Raises: InvalidRequest: an event has no room for a URL."""
        if self.stream and self.response_format == "url":
            raise InvalidRequest(
                "response_format: a stream carries b64_json only", param="response_format"
            )

    def images(self) -> list[ImageRequest]:
        """What is to be drawn."""
        width, height = self._pixels()
        return [
            ImageRequest(
                prompt=self.prompt,
                width=width,
                height=height,
                image_format=ImageFormat(self.output_format or "png"),
                # After the last seed comes the first.
                seed=None if self.seed is None else (self.seed + index) % (SEED_MAX + 1),
                allow_downscale=bool(self.allow_downscale),
            )
            for index in range(self.n or 1)
        ]

    def _pixels(self) -> tuple[int, int]:
        if self.size in (None, "auto"):
            return DEFAULT_SIZE
        width, _, height = self.size.partition("x")
        return int(width), int(height)
