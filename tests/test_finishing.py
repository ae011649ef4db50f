"""An image leaves as a file that any viewer reads: the same bytes each time, nothing besides."""

from io import BytesIO

import pytest
from PIL import Image, JpegImagePlugin

from storage.models import ImageFormat
from worker.finishing import encode


@pytest.fixture(scope="module")
def image() -> Image.Image:
    """64 x 48 pixels in which every row and every column differs, in each colour."""
    drawn = Image.new("RGB", (64, 48))
    drawn.putdata([(4 * x, 5 * y, (x * y) % 256) for y in range(48) for x in range(64)])
    return drawn


def test_a_png_gives_back_every_pixel(image: Image.Image) -> None:
    read = Image.open(BytesIO(encode(image, ImageFormat.PNG)))

    assert read.format == "PNG"
    assert read.mode == "RGB"
    assert read.tobytes() == image.tobytes()


def test_a_jpeg_keeps_size_and_colours(image: Image.Image) -> None:
    read = Image.open(BytesIO(encode(image, ImageFormat.JPEG)))

    assert read.format == "JPEG"
    assert read.size == image.size
    differences = [
        abs(one - other) for one, other in zip(read.tobytes(), image.tobytes(), strict=True)
    ]
    assert sum(differences) / len(differences) < 4  # of 255


def test_a_jpeg_keeps_colour_at_full_resolution(image: Image.Image) -> None:
    read = Image.open(BytesIO(encode(image, ImageFormat.JPEG)))

    assert isinstance(read, JpegImagePlugin.JpegImageFile)
    assert JpegImagePlugin.get_sampling(read) == 0  # 0 is 4:4:4


@pytest.mark.parametrize("image_format", ImageFormat)
def test_the_same_pixels_give_the_same_bytes(image: Image.Image, image_format: ImageFormat) -> None:
    assert encode(image, image_format) == encode(image.copy(), image_format)


def test_a_png_holds_pixels_and_nothing_else(image: Image.Image) -> None:
    assert set(_chunks(encode(image, ImageFormat.PNG))) == {b"IHDR", b"IDAT", b"IEND"}


def test_a_jpeg_holds_pixels_and_nothing_else(image: Image.Image) -> None:
    file = encode(image, ImageFormat.JPEG)

    assert b"Exif" not in file
    assert "comment" not in Image.open(BytesIO(file)).info


def test_no_time_is_spent_on_a_search_for_repeats_in_a_png() -> None:
    noise = Image.merge("RGB", [Image.effect_noise((64, 64), 100) for _ in range(3)])
    four_times = Image.new("RGB", (256, 64))
    for left in range(0, 256, 64):
        four_times.paste(noise, (left, 0))

    # A search would find that three quarters have been there before.
    assert len(encode(four_times, ImageFormat.PNG)) > 0.8 * len(four_times.tobytes())


def _chunks(png: bytes) -> list[bytes]:
    """The types of a PNG's chunks: each is 4 bytes of length, 4 of type, data, 4 of sum."""
    types, at = [], 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4])
        types.append(png[at + 4 : at + 8])
        at += 12 + length
    return types
