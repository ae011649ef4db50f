"""A text or a picture on a copy of an image; the image itself stays as it was drawn."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zimage.errors import InvalidRequest

if TYPE_CHECKING:
    from PIL import Image

MARGIN, TEXT_HEIGHT, PICTURE_WIDTH = 0.02, 0.04, 0.25
"""Shares of the image's shorter side, its height and its width."""
WHITE, SHADOW = (255, 255, 255, 170), (0, 0, 0, 130)


@dataclass(frozen=True, slots=True)
class Watermark:
    """Either a `text`, or a `picture` (bytes of a PNG).

    `font` is the bytes of a font file, None for Pillow's own.
    """

    text: str | None = None
    font: bytes | None = None
    picture: bytes | None = None

    @property
    def digest(self) -> str:
        """Changes exactly when the copies have to be made again; hex."""
        parts = [(self.text or "").encode(), self.font or b"", self.picture or b""]
        digests = b"".join(hashlib.sha256(part).digest() for part in parts)
        return hashlib.sha256(digests).hexdigest()

    def apply(self, png: bytes) -> bytes:
        """A copy of `png`, marked in its lower right corner, as PNG."""
        from PIL import Image

        with Image.open(io.BytesIO(png)) as image:
            canvas = image.convert("RGBA")
        layer = self._picture(canvas) if self.picture is not None else self._text(canvas)
        margin = round(MARGIN * min(canvas.size))
        corner = (canvas.width - layer.width - margin, canvas.height - layer.height - margin)
        canvas.alpha_composite(layer, (max(0, corner[0]), max(0, corner[1])))
        marked = io.BytesIO()
        canvas.convert("RGB").save(marked, "PNG")
        return marked.getvalue()

    def _picture(self, canvas: "Image.Image") -> "Image.Image":
        from PIL import Image

        with Image.open(io.BytesIO(self.picture or b"")) as picture:
            layer = picture.convert("RGBA")
        width = max(1, min(layer.width, round(PICTURE_WIDTH * canvas.width)))
        height = max(1, min(round(layer.height * width / layer.width), canvas.height))
        return layer.resize((width, height))

    def _text(self, canvas: "Image.Image") -> "Image.Image":
        from PIL import Image, ImageDraw, ImageFont

        size = max(10, round(TEXT_HEIGHT * canvas.height))
        font = (
            ImageFont.load_default(size)
            if self.font is None
            else ImageFont.truetype(io.BytesIO(self.font), size)
        )
        measure = ImageDraw.Draw(Image.new("RGBA", (1, 1)))
        left, top, right, bottom = measure.textbbox((0, 0), self.text or "", font, stroke_width=1)
        layer = Image.new("RGBA", (round(right - left), round(bottom - top)))
        ImageDraw.Draw(layer).text(
            (-left, -top), self.text or "", WHITE, font, stroke_width=1, stroke_fill=SHADOW
        )
        return layer.crop((0, 0, min(layer.width, canvas.width), min(layer.height, canvas.height)))


def read_watermark(
    text: str | None, picture: Path | None, font: Path | None = None
) -> Watermark | None:
    """The watermark that is asked for, tried out before anything is paid for.

    Raises:
        InvalidRequest: Pillow is missing, a file is none, or the letters need another font.
    """
    if text is None and picture is None:
        return None
    try:
        from PIL import Image
    except ImportError:
        raise InvalidRequest(
            "Watermarks need Pillow: pip install 'zimage-client[watermark]'"
        ) from None
    if text is not None and font is None and not text.isascii():
        raise InvalidRequest("Pillow's own font knows only English letters; give --watermark-font")
    watermark = Watermark(
        text=text,
        font=None if font is None else font.read_bytes(),
        picture=None if picture is None else picture.read_bytes(),
    )
    sample = io.BytesIO()
    Image.new("RGB", (64, 64)).save(sample, "PNG")
    try:
        watermark.apply(sample.getvalue())
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"The watermark cannot be drawn: {error}") from None
    return watermark
