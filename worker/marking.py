"""What is written into images: how they were made, and that AI made them, unseen and seen.

The label that is not seen follows two rules, in one XMP packet:

* IPTC's Digital Source Type `trainedAlgorithmicMedia`, the machine-readable mark that Article 50(2)
  of the EU's AI Act asks for and that IPTC's photo metadata guide recommends for images made by
  trained models.
* China's implicit label: the JSON of GB 45438-2025, appendix E, as the property `AIGC` in the
  namespace that TC260's practice guide TC260-PG-20258A gives for images. The standard wants one
  such label in a file, so it stands nowhere else. `Label` 1 is "is AI-generated". What a publisher
  adds (ContentPropagator, PropagateID) and the reserved fields are left empty: our choice.

The label that is seen stands in a corner, its capitals 5 % of the shorter side high, as GB 45438
asks for images.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import lru_cache
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin

from worker.settings import WorkerSettings

SOFTWARE = "zimage-service"

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
TC260 = "http://www.tc260.org.cn/ns/AIGC/1.0/"

LABEL_HEIGHT = 0.05
"""Of the shorter side, that a capital letter of the visible label has at least."""
_MARGIN = 0.02
"""Of the shorter side, between the label's box and the edges of the image."""
_INK, _BOX = (255, 255, 255, 255), (0, 0, 0, 176)
"""White on a box that darkens any ground: a contrast of 8 to 1 at least (our choice)."""

_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about=""
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:TC260="{tc260}">
<Iptc4xmpExt:DigitalSourceType>{source_type}</Iptc4xmpExt:DigitalSourceType>
<TC260:AIGC>{aigc}</TC260:AIGC>
</rdf:Description>
</rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""


class LabelUnusable(Exception):
    """The visible label cannot be drawn; the message says why."""


@dataclass(frozen=True, slots=True)
class About:
    """How an image came to be. `prompt` is what was drawn, `made_at` an aware moment."""

    task_id: str
    model: str
    seed: int
    steps: int
    prompt: str
    made_at: datetime


@dataclass(frozen=True, slots=True)
class Marks:
    """What is written into every image."""

    metadata: bool
    """How it was made."""
    prompt: bool
    """The prompt too, where `metadata` is on."""
    label: bool
    """That AI made it, unseen."""
    visible: str | None
    """The words that say so on the image; None for none."""
    font: Path | None = None
    """None is Pillow's own, which has ASCII and little more."""
    producer: str = ""
    """Who answers for the image: the ContentProducer of China's label."""


def of_settings(settings: WorkerSettings) -> Marks:
    """Return the marks that the settings describe.

    Raises:
        LabelUnusable: the visible label cannot be drawn. A process must not start so.
    """
    visible = settings.ai_label_text if settings.ai_label == "visible" else None
    if visible is not None:
        _check(visible, settings.ai_label_font)
    return Marks(
        metadata=settings.metadata,
        prompt=settings.metadata_prompt,
        label=settings.ai_label != "off",
        visible=visible,
        font=settings.ai_label_font,
        producer=settings.ai_label_producer,
    )


def xmp(about: About, marks: Marks) -> bytes | None:
    """Return the label that is not seen, as an XMP packet in UTF-8; None if there is to be none."""
    if not marks.label:
        return None
    aigc = {
        "Label": "1",
        "ContentProducer": marks.producer,
        "ProduceID": about.task_id,
        "ReservedCode1": "",
        "ContentPropagator": "",
        "PropagateID": "",
        "ReservedCode2": "",
    }
    packet = _XMP.format(
        tc260=TC260,
        source_type=SOURCE_TYPE,
        aigc=escape(json.dumps(aigc, ensure_ascii=False, separators=(",", ":"))),
    )
    return packet.encode()


def png_text(about: About, marks: Marks) -> PngImagePlugin.PngInfo:
    """Return the text chunks of a PNG: the XMP packet, and a chunk for each thing to be told."""
    chunks = PngImagePlugin.PngInfo()
    if packet := xmp(about, marks):
        chunks.add_itxt("XML:com.adobe.xmp", packet.decode())
    if marks.metadata:
        # "Software" and "Creation Time" (as in a mail) are the PNG standard's, the others ours.
        made_at = format_datetime(about.made_at.astimezone(UTC))
        chunks.add_text("Software", SOFTWARE)
        chunks.add_text("Creation Time", made_at)
        for name, value in _told(about, marks).items():
            if str(value).isascii():
                chunks.add_text(name, str(value))
            else:
                chunks.add_itxt(name, str(value))
    return chunks


def exif(about: About, marks: Marks) -> bytes:
    """Return the EXIF of a JPEG or WebP, its UserComment being JSON in ASCII; empty for none."""
    if not marks.metadata:
        return b""
    made_at = about.made_at.astimezone(UTC).strftime("%Y:%m:%d %H:%M:%S")
    tags = Image.Exif()
    tags[ExifTags.Base.Software] = SOFTWARE
    tags[ExifTags.Base.DateTime] = made_at
    details = tags.get_ifd(ExifTags.IFD.Exif)
    details[ExifTags.Base.OffsetTime] = "+00:00"
    # The eight bytes in front say how the comment is written, as EXIF has it.
    details[ExifTags.Base.UserComment] = b"ASCII\0\0\0" + json.dumps(_told(about, marks)).encode()
    return tags.tobytes()


def with_label(image: Image.Image, marks: Marks) -> Image.Image:
    """Return the image with the label that is seen, in its lower right corner."""
    if marks.visible is None:
        return image
    box = _box(marks.visible, marks.font, *image.size)
    margin = round(_MARGIN * min(image.size))
    corner = (
        max(0, image.width - box.width - margin),
        max(0, image.height - box.height - margin),
    )
    labelled = image.copy()
    labelled.paste(box, corner, box)
    return labelled


def _told(about: About, marks: Marks) -> dict[str, str | int]:
    told: dict[str, str | int] = {
        "model": about.model,
        "seed": about.seed,
        "steps": about.steps,
        "task_id": about.task_id,
    }
    return told | ({"prompt": about.prompt} if marks.prompt else {})


@lru_cache(maxsize=32)
def _box(text: str, font_file: Path | None, width: int, height: int) -> Image.Image:
    """Return the label for an image of this size, in as many lines as it needs."""
    wanted = LABEL_HEIGHT * min(width, height)
    size = wanted
    while _capital_height(font := _font(font_file, size), text) < wanted:
        size += max(0.5, wanted / 50)
    padding = max(2, round(wanted / 2))
    lines = "\n".join(_lines(text, font, width - 2 * padding))
    left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox(
        (0, 0), lines, font=font
    )
    box = Image.new(
        "RGBA", (round(right - left) + 2 * padding, round(bottom - top) + 2 * padding), _BOX
    )
    ImageDraw.Draw(box).multiline_text(
        (padding - left, padding - top), lines, font=font, fill=_INK, align="right"
    )
    return box


def _capital_height(font: ImageFont.FreeTypeFont, text: str) -> float:
    """The height in pixels of the letters of `text` over their line, once they are capitals."""
    return -font.getbbox(text.upper(), anchor="ls")[1]


def _lines(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Break `text` at spaces where there are any, else anywhere, into lines of `width` pixels."""
    lines = [""]
    for word in text.split():
        tried = f"{lines[-1]} {word}".strip()
        if font.getlength(tried) <= width:
            lines[-1] = tried
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _font(file: Path | None, size: float) -> ImageFont.FreeTypeFont:
    if file is not None:
        return ImageFont.truetype(file, size)
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise LabelUnusable("This Pillow has no FreeType, without which no label can be drawn")
    return font


def _check(text: str, file: Path | None) -> None:
    """Raises: LabelUnusable."""
    name = f"The font {file}" if file else "Pillow's own font"
    try:
        font = _font(file, 32)
    except OSError as error:
        raise LabelUnusable(f"{name} cannot be read: {error}") from None
    if not any(letter.isalnum() for letter in text):
        raise LabelUnusable(f"The label {text!r} has no letters")
    # What a font lacks it draws as what it draws for a character that there is not.
    missing = bytes(font.getmask("\U0010ffff"))
    lacking = {
        letter
        for letter in text
        if not letter.isspace() and bytes(font.getmask(letter)) in (missing, b"")
    }
    if lacking:
        raise LabelUnusable(
            f"{name} lacks {' '.join(sorted(lacking))} of the label {text!r}: "
            "ZIMAGE_AI_LABEL_FONT names a file that has them"
        )
