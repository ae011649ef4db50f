"""What an image says about itself: how it was made, and that AI made it, unseen and seen."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from io import BytesIO
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import ExifTags, Image, ImageFont, PngImagePlugin

from storage.models import ImageFormat
from worker import marking
from worker.finishing import encode
from worker.marking import About, LabelUnusable, Marks
from worker.settings import WorkerSettings

ABOUT = About(
    task_id="task-unified-1-abcdefgh",
    model="z-image-turbo",
    seed=7,
    steps=8,
    prompt="一只狐狸 & a <fox>",
    made_at=datetime(2026, 3, 4, 6, 6, 7, tzinfo=timezone(timedelta(hours=1))),
)
NONE = Marks(metadata=False, prompt=False, label=False, visible=None)
TOLD = {
    "model": "z-image-turbo",
    "seed": 7,
    "steps": 8,
    "task_id": "task-unified-1-abcdefgh",
}


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.effect_noise((160, 120), 90).convert("RGB")


def read(file: bytes) -> Image.Image:
    image = Image.open(BytesIO(file))
    image.load()
    return image


def told(file: bytes) -> dict[str, object]:
    """What the file says of how it was made, without software and time."""
    image = read(file)
    if isinstance(image, PngImagePlugin.PngImageFile):
        ours = ("model", "seed", "steps", "task_id", "prompt")
        text = {name: str(image.text[name]) for name in ours if name in image.text}
        return {name: int(value) if value.isdigit() else value for name, value in text.items()}
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if comment is None:
        return {}
    assert comment.startswith(b"ASCII\0\0\0")
    told = json.loads(comment[8:])
    assert isinstance(told, dict)
    return told


def label(file: bytes) -> dict[str, str]:
    """The properties of the XMP packet by their names."""
    image = read(file)
    packet = image.info.get("xmp")
    if packet is None:
        return {}
    root = ElementTree.fromstring(packet.decode() if isinstance(packet, bytes) else packet)
    description = root.find(".//{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    assert description is not None
    return {child.tag: child.text or "" for child in description}


@pytest.mark.parametrize("image_format", ImageFormat)
def test_an_image_says_how_it_was_made(image: Image.Image, image_format: ImageFormat) -> None:
    file = encode(image, image_format, ABOUT, replace(NONE, metadata=True))

    assert told(file) == TOLD


@pytest.mark.parametrize("image_format", ImageFormat)
def test_the_prompt_is_told_only_if_that_is_set(
    image: Image.Image, image_format: ImageFormat
) -> None:
    file = encode(image, image_format, ABOUT, replace(NONE, metadata=True, prompt=True))

    assert told(file) == TOLD | {"prompt": ABOUT.prompt}


def test_a_png_names_its_software_and_moment(image: Image.Image) -> None:
    png = read(encode(image, ImageFormat.PNG, ABOUT, replace(NONE, metadata=True)))

    assert isinstance(png, PngImagePlugin.PngImageFile)
    assert png.text["Software"] == "zimage-service"
    assert png.text["Creation Time"] == "Wed, 04 Mar 2026 05:06:07 +0000"


@pytest.mark.parametrize("image_format", [ImageFormat.JPEG, ImageFormat.WEBP])
def test_exif_names_software_and_moment(image: Image.Image, image_format: ImageFormat) -> None:
    exif = read(encode(image, image_format, ABOUT, replace(NONE, metadata=True))).getexif()

    assert exif[ExifTags.Base.Software] == "zimage-service"
    assert exif[ExifTags.Base.DateTime] == "2026:03:04 05:06:07"
    assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.OffsetTime] == "+00:00"


@pytest.mark.parametrize("image_format", ImageFormat)
def test_an_image_is_marked_as_the_eu_and_china_ask(
    image: Image.Image, image_format: ImageFormat
) -> None:
    marks = replace(NONE, label=True, producer="示例 <公司> & Co")

    properties = label(encode(image, image_format, ABOUT, marks))

    assert (
        properties["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"]
        == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    )
    assert json.loads(properties["{http://www.tc260.org.cn/ns/AIGC/1.0/}AIGC"]) == {
        "Label": "1",
        "ContentProducer": "示例 <公司> & Co",
        "ProduceID": "task-unified-1-abcdefgh",
        "ReservedCode1": "",
        "ContentPropagator": "",
        "PropagateID": "",
        "ReservedCode2": "",
    }


@pytest.mark.parametrize("image_format", ImageFormat)
def test_there_is_one_label_in_a_file(image: Image.Image, image_format: ImageFormat) -> None:
    file = encode(image, image_format, ABOUT, replace(NONE, metadata=True, label=True))

    assert file.count(b"ContentProducer") == 1
    assert told(file) == TOLD


@pytest.mark.parametrize("image_format", ImageFormat)
def test_all_switched_off_leaves_pixels_and_nothing_else(
    image: Image.Image, image_format: ImageFormat
) -> None:
    assert encode(image, image_format, ABOUT, NONE) == encode(image, image_format)


@pytest.mark.parametrize("image_format", ImageFormat)
def test_what_is_not_seen_changes_no_pixel(image: Image.Image, image_format: ImageFormat) -> None:
    marked = encode(image, image_format, ABOUT, replace(NONE, metadata=True, label=True))

    assert read(marked).tobytes() == read(encode(image, image_format)).tobytes()


@pytest.mark.parametrize("image_format", ImageFormat)
def test_the_same_image_and_words_give_the_same_bytes(
    image: Image.Image, image_format: ImageFormat
) -> None:
    marks = replace(NONE, metadata=True, label=True, visible="AI-generated")

    assert encode(image, image_format, ABOUT, marks) == encode(
        image.copy(), image_format, ABOUT, marks
    )


def test_without_marks_those_of_the_settings_are_written(image: Image.Image) -> None:
    file = encode(image, ImageFormat.PNG, ABOUT)

    assert told(file) == TOLD
    assert label(file)


def test_the_settings_say_what_is_written() -> None:
    default = marking.of_settings(WorkerSettings())
    chosen = marking.of_settings(
        WorkerSettings(
            metadata=False,
            metadata_prompt=True,
            ai_label="visible",
            ai_label_text="Made by AI",
            ai_label_producer="Example Ltd",
        )
    )
    off = marking.of_settings(WorkerSettings(ai_label="off"))

    assert default == Marks(metadata=True, prompt=False, label=True, visible=None)
    assert chosen == Marks(
        metadata=False, prompt=True, label=True, visible="Made by AI", producer="Example Ltd"
    )
    assert off == replace(default, label=False)


def test_a_moment_is_told_in_utc() -> None:
    in_utc = replace(ABOUT, made_at=ABOUT.made_at.astimezone(UTC))

    assert marking.exif(ABOUT, replace(NONE, metadata=True)) == marking.exif(
        in_utc, replace(NONE, metadata=True)
    )


# --- The label that is seen -------------------------------------------------------------------


def ink(size: tuple[int, int], ground: str, text: str = "AI-generated") -> Image.Image:
    """Where a label on a plain ground is brighter than its box, as a picture of 0 and 255."""
    marks = replace(NONE, visible=text)
    image = read(encode(Image.new("RGB", size, ground), ImageFormat.PNG, ABOUT, marks))
    return image.convert("L").point(lambda value: 255 if value > 240 else 0)


@pytest.mark.parametrize("size", [(1024, 1024), (1536, 640), (640, 1536), (256, 256)])
def test_a_visible_label_is_as_high_as_the_standard_asks(size: tuple[int, int]) -> None:
    box = ink(size, "black", "HHHH").getbbox()

    assert box is not None
    assert box[3] - box[1] >= 0.05 * min(size)
    assert box[3] - box[1] <= 0.07 * min(size)
    # In the lower right corner.
    assert box[0] > size[0] / 2
    assert box[1] > size[1] * 0.8


@pytest.mark.parametrize("ground", ["black", "white", "red", "yellow"])
def test_a_visible_label_is_read_on_any_ground(ground: str) -> None:
    size = (512, 512)
    marks = replace(NONE, visible="AI-generated")
    plain = Image.new("RGB", size, ground)
    labelled = read(encode(plain, ImageFormat.PNG, ABOUT, marks)).convert("RGB")
    right, low = 512 - round(0.02 * 512), 512 - round(0.02 * 512)
    edge = labelled.getpixel((right - 1, low - 1))  # of the box, beside the letters

    assert isinstance(edge, tuple)
    assert (255, 255, 255) in {colour for _, colour in labelled.getcolors(1 << 18) or []}
    assert (1.05) / (_luminance(edge) + 0.05) >= 4.5  # WCAG's contrast, to white


def test_the_rest_of_a_labelled_image_is_as_it_was_drawn() -> None:
    drawn = Image.effect_noise((300, 300), 90).convert("RGB")
    marks = replace(NONE, visible="AI-generated")

    labelled = read(encode(drawn, ImageFormat.PNG, ABOUT, marks))

    assert labelled.crop((0, 0, 300, 240)).tobytes() == drawn.crop((0, 0, 300, 240)).tobytes()
    assert labelled.tobytes() != drawn.tobytes()
    assert drawn.getpixel((290, 290)) != (0, 0, 0)  # and the drawing itself was left alone


def test_a_long_label_is_broken_into_lines_and_cut_nowhere() -> None:
    size = (256, 256)

    once = ink(size, "black", "H" * 8).histogram()[255]
    five_times = ink(size, "black", "H" * 40).histogram()[255]
    box = ink(size, "black", "H" * 40).getbbox()

    assert box is not None
    assert box[0] >= 2
    assert box[2] <= 254
    assert five_times == pytest.approx(5 * once, rel=0.05)


def test_a_label_that_the_font_lacks_letters_for_stops_the_start() -> None:
    with pytest.raises(LabelUnusable, match=r"Pillow's own font lacks 成 生 .*AI生成"):
        marking.of_settings(WorkerSettings(ai_label="visible", ai_label_text="AI生成"))


def test_a_label_that_is_not_drawn_stops_nothing() -> None:
    marks = marking.of_settings(WorkerSettings(ai_label="metadata", ai_label_text="AI生成"))

    assert marks.visible is None


def test_a_label_is_drawn_with_the_font_that_is_named(tmp_path: Path) -> None:
    source = ImageFont.load_default(10)
    assert isinstance(source, ImageFont.FreeTypeFont)
    assert isinstance(source.path, BytesIO)
    font = tmp_path / "our.ttf"
    font.write_bytes(source.path.getvalue())
    plain = Image.new("RGB", (128, 128), "black")

    marks = marking.of_settings(WorkerSettings(ai_label="visible", ai_label_font=font))
    encode(plain, ImageFormat.PNG, ABOUT, marks)

    with pytest.raises(OSError, match="cannot open resource"):
        encode(plain, ImageFormat.PNG, ABOUT, replace(marks, font=tmp_path / "other.ttf"))


@pytest.mark.parametrize("content", [None, b"no font"])
def test_a_font_that_cannot_be_read_stops_the_start(tmp_path: Path, content: bytes | None) -> None:
    font = tmp_path / "our.ttf"
    if content is not None:
        font.write_bytes(content)

    with pytest.raises(LabelUnusable, match=r"our\.ttf cannot be read"):
        marking.of_settings(WorkerSettings(ai_label="visible", ai_label_font=font))


def test_a_label_without_letters_stops_the_start() -> None:
    with pytest.raises(LabelUnusable, match="no letters"):
        marking.of_settings(WorkerSettings(ai_label="visible", ai_label_text="***"))


def _luminance(colour: tuple[int, ...]) -> float:
    """Relative luminance of an sRGB colour, as WCAG computes it."""
    parts = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (part / 255 for part in colour[:3])
    ]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
