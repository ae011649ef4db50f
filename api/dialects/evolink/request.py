"""The body of a create in EvoLink's format, and the limits of its fields."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from api import egress
from api.dialects import routing
from storage.models import ImageFormat
from storage.tasks import ImageRequest

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
DEFAULT_SIZE = "1:1"
CUSTOM_SIZE = re.compile(r"([0-9]{3,4})x([0-9]{3,4})")


def _size(size: str) -> str:
    if size in SIZES:
        return size
    custom = CUSTOM_SIZE.fullmatch(size)
    if custom is None:
        raise ValueError(f"must be one of {', '.join(SIZES)}, or <width>x<height> in pixels")
    if not all(SIDE_MIN_PX <= int(side) <= SIDE_MAX_PX for side in custom.groups()):
        raise ValueError(f"width and height must be {SIDE_MIN_PX} to {SIDE_MAX_PX} pixels")
    return size


class GenerationRequest(BaseModel):
    """The body of a create; unknown fields are ignored, as EvoLink's schema allows them.

    `allow_downscale` is our extension.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "model": "z-image-turbo",
                "prompt": "a red star on a blue background",
                "size": "1:1",
            }
        }
    )

    model: Literal["z-image-turbo"]
    prompt: Annotated[
        StrictStr, Field(max_length=PROMPT_MAX_CHARACTERS), AfterValidator(routing.drawable)
    ]
    size: Annotated[StrictStr, AfterValidator(_size)] | None = None
    seed: Annotated[StrictInt, Field(ge=SEED_MIN, le=SEED_MAX)] | None = None
    nsfw_check: StrictBool | None = None
    callback_url: Annotated[StrictStr, Field(max_length=egress.URL_MAX_CHARACTERS)] | None = None
    allow_downscale: StrictBool | None = None

    def pixels(self) -> tuple[int, int]:
        """Width and height."""
        size = self.size or DEFAULT_SIZE
        if size in SIZES:
            return SIZES[size]
        width, _, height = size.partition("x")
        return int(width), int(height)

    async def check_callback_url(self) -> None:
        """Raises: InvalidRequest: it must not be called."""
        if self.callback_url is not None:
            await egress.check_callback_url(self.callback_url)

    def image(self) -> ImageRequest:
        """What is to be drawn."""
        width, height = self.pixels()
        return ImageRequest(
            prompt=self.prompt,
            width=width,
            height=height,
            image_format=ImageFormat.PNG,
            seed=self.seed,
            aspect_ratio=self.size if self.size in SIZES else None,
            callback_url=self.callback_url,
            model=self.model,
            strict_moderation=bool(self.nsfw_check),
            allow_downscale=bool(self.allow_downscale),
        )
