"""The last step of an image: pixels to the bytes of a file, with what is to be known about them."""

import zlib
from functools import cache
from io import BytesIO

from PIL import Image

from storage.models import ImageFormat
from worker import marking
from worker.marking import About, Marks
from worker.settings import settings

__all__ = ["About", "Marks", "encode"]

JPEG_QUALITY = 95
"""Of 100. Above it files grow "with hardly any gain in image quality", says Pillow's manual."""

JPEG_SUBSAMPLING = "4:4:4"
"""Colour at full resolution: Z-Image is known for its lettering, whose edges 4:2:0 smears."""

WEBP_QUALITY = 90
"""Of 100, lossy. WebP halves the colour's resolution at any quality; above this, files grow for
nothing that could be seen (our choice)."""


def encode(
    image: Image.Image,
    image_format: ImageFormat,
    about: About | None = None,
    marks: Marks | None = None,
) -> bytes:
    """Return an RGB image as the bytes of a PNG, JPEG or WebP file.

    Without `about` the file has pixels and nothing else. With it the file says what `marks` asks
    for; None are the marks of the settings. Only a visible label changes pixels. The same image
    and arguments give the same bytes.

    Raises:
        LabelUnusable: the marks of the settings ask for a label that cannot be drawn.
    """
    text, exif, xmp = None, b"", None
    if about is not None:
        marks = marks or _marks()
        image = marking.with_label(image, marks)
        if image_format is ImageFormat.PNG:
            text = marking.png_text(about, marks)
        else:
            exif, xmp = marking.exif(about, marks), marking.xmp(about, marks)
    file = BytesIO()
    match image_format:
        case ImageFormat.PNG:
            # Run lengths and Huffman codes only. The filters leave little else to find in a drawn
            # image: the default looks for repeats, costs 4 to 5 times as much (420 to 510 ms for a
            # photograph of 1024 x 1024 on one core; this: 90 ms), and saves nothing.
            image.save(file, "PNG", compress_type=zlib.Z_RLE, pnginfo=text)
        case ImageFormat.JPEG:
            image.save(
                file,
                "JPEG",
                quality=JPEG_QUALITY,
                subsampling=JPEG_SUBSAMPLING,
                exif=exif,
                xmp=xmp,
            )
        case ImageFormat.WEBP:
            image.save(file, "WEBP", quality=WEBP_QUALITY, exif=exif, xmp=xmp or b"")
    return file.getvalue()


@cache
def _marks() -> Marks:
    return marking.of_settings(settings)
