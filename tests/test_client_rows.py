"""What a batch's file asks for, and what a watermark does to a picture."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from zimage import InvalidRequest
from zimage.batch.rows import read_rows, read_styles
from zimage.batch.watermark import Watermark, read_watermark

from tests.test_client_faults import _books_balance, _empty

__all__ = ["_books_balance", "_empty"]  # fixtures

Rows = Callable[..., list[tuple[str, str]]]


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    def read(text: str, **options: Any) -> list[tuple[str, str]]:
        path = tmp_path / "in.csv"
        path.write_text(text, "utf-8")
        return [(row.key, row.prompt) for row in read_rows(path, **options)]

    return read


def test_rows_without_an_id_are_known_by_what_they_ask_for(rows: Rows) -> None:
    first = rows("prompt,size\na cat,1:1\na dog,1:1\na dog,1:1\n")
    second = rows("size,prompt\n1:1,a fox\n1:1,a dog\n1:1,a cat\n1:1,a dog\n")
    assert len({key for key, _ in first}) == 3
    assert {key for key, _ in first} <= {key for key, _ in second}
    assert first[0][0].startswith("a-cat-")


def test_a_file_that_cannot_be_meant_is_refused_before_anything_is_drawn(rows: Rows) -> None:
    wrong = {
        "text\na cat\n": "prompt",
        "prompt\n": "no rows",
        "id,prompt\n1,a cat\n1,a dog\n": "line 3: 1 is the name of line 2",
        "id,prompt\nA,a cat\na,a dog\n": "line 3: a is the name of line 2",
        "id,prompt\n1,\n": "line 2: no prompt",
        "prompt\na cat, black\n": "line 2: more cells",
        "prompt,seed\na cat,x\n": "line 2: the seed 'x'",
    }
    for text, complaint in wrong.items():
        with pytest.raises(InvalidRequest, match=complaint):
            rows(text)
    with pytest.raises(InvalidRequest, match="the template"):
        rows("prompt\na cat\n", template="{colour}")


def test_names_of_files_stay_in_the_folder(rows: Rows) -> None:
    names = ("../../etc/passwd", "a/b", "C:\\x", ".hidden", "茶壶", "x" * 300, "x" * 301)
    keys = [key for key, _ in rows("id,prompt\n" + "".join(f"{n},cat\n" for n in names))]
    assert keys[:5] == ["etc-passwd", "a-b", "C-x", "hidden", "茶壶"]
    assert len(set(keys)) == len(names)
    assert all(len(f"{key}.png".encode()) < 256 for key in keys)


def test_a_picture_is_put_in_the_corner_of_a_copy() -> None:
    logo = png("RGBA", (50, 50), (255, 0, 0, 255))
    watermark = Watermark(picture=logo)
    with Image.open(io.BytesIO(watermark.apply(png("RGB", (400, 400))))) as marked:
        assert marked.getpixel((380, 380)) == (255, 0, 0)
        assert marked.getpixel((20, 20)) == (0, 0, 0)
    assert watermark.digest != Watermark(text="ACME").digest


def png(*shape: Any) -> bytes:
    file = io.BytesIO()
    Image.new(*shape).save(file, "PNG")
    return file.getvalue()


def test_a_text_is_legible_on_white_and_on_black_and_stays_inside() -> None:
    watermark = Watermark(text="ACME GmbH & Co. KG " * 20)
    for colour in ((0, 0, 0), (255, 255, 255)):
        data = watermark.apply(png("RGB", (376, 376), colour))
        with Image.open(io.BytesIO(data)) as marked:
            assert marked.size == (376, 376)
            colours = marked.getcolors(1 << 16)
            assert colours is not None
            assert len(colours) > 10


def test_a_watermark_is_tried_out_before_anything_is_drawn(tmp_path: Path) -> None:
    assert read_watermark(None, None) is None
    (tmp_path / "logo.png").write_bytes(b"not a picture")
    with pytest.raises(InvalidRequest, match="cannot be drawn"):
        read_watermark(None, tmp_path / "logo.png")
    with pytest.raises(InvalidRequest, match="--watermark-font"):
        read_watermark("茶", None)


def test_styles_are_a_list_without_twins() -> None:
    assert read_styles(" main, detail,") == ["main", "detail"]
    assert read_styles(None) == []
    with pytest.raises(InvalidRequest, match="twice"):
        read_styles("main,main")


def test_a_style_of_the_row_is_put_into_its_prompt(rows: Rows) -> None:
    text = "id,prompt,style\n1,a cat,ink\n2,a cat,\n"
    assert rows(text) == [("1", "a cat, ink style"), ("2", "a cat")]
    assert rows(text, template="{style}: {prompt}")[0] == ("1", "ink: a cat")
