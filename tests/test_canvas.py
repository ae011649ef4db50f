"""A model with a canvas draws in a grid of its own, and its images have the size asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests import random_model
from worker import loading
from worker.canvas import Canvas, Grid, enlarge, find_canvas, fitted
from worker.drawing import Drawing
from worker.loading import ModelUnavailable
from worker.pipeline import TurboPipeline

SQUARE, WIDE, TALL = Grid(8, 8), Grid(6, 10), Grid(10, 6)
"""64 x 64, 80 x 48 and 48 x 80 pixels."""
CANVAS = Canvas((SQUARE, WIDE, TALL))


@pytest.fixture(scope="module")
def model() -> Any:
    model = random_model.assemble(0)
    model.set_progress_bar_config(disable=True)
    return model


def employ(model: Any, canvas: Canvas | None = CANVAS) -> TurboPipeline:
    return TurboPipeline(model, model="random", device="cpu", dtype="float32", canvas=canvas)


def draw(pipeline: TurboPipeline, width: int, height: int, *seeds: int) -> list[Image.Image]:
    drawings = [
        Drawing(pipeline.read("a red star"), width, height, seed, 2, lambda _: None)
        for seed in seeds or (1,)
    ]
    images = []
    for picture in pipeline.draw(drawings):
        assert not isinstance(picture, BaseException)
        images.append(picture())
    return images


class Watch:
    """The rows and columns of cells that the transformer and the decoder were given."""

    def __init__(self, model: Any) -> None:
        self.drawn: list[tuple[int, int]] = []
        self.decoded: list[tuple[int, int]] = []
        self._hooks = [
            model.transformer.register_forward_pre_hook(
                lambda _, given: self.drawn.append(tuple(given[0][0].shape[-2:]))
            ),
            model.vae.decoder.register_forward_pre_hook(
                lambda _, given: self.decoded.append(tuple(given[0].shape[-2:]))
            ),
        ]

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


# --- Which grid ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((1024, 1024), SQUARE),
        ((1, 1), SQUARE),
        # Half way from 1 : 1 to 10 : 6, by the logarithm, is 1.291 : 1.
        ((1290, 1000), SQUARE),
        ((1292, 1000), WIDE),
        ((1000, 1290), SQUARE),
        ((1000, 1292), TALL),
        ((1536, 1024), WIDE),
        ((4096, 16), WIDE),
        ((16, 4096), TALL),
    ],
)
def test_the_grid_of_the_nearest_shape_is_drawn_in(size: tuple[int, int], grid: Grid) -> None:
    assert CANVAS.nearest(*size) == grid


# --- From a folder ------------------------------------------------------------------------------


def test_a_folder_without_the_file_has_no_canvas(tmp_path: Path) -> None:
    assert find_canvas(tmp_path) is None
    assert find_canvas(tmp_path / "nowhere") is None


def test_grids_are_rows_and_columns(tmp_path: Path) -> None:
    (tmp_path / "canvas.json").write_text('{"grids": [[16, 16], [12, 20]]}')

    assert find_canvas(tmp_path) == Canvas((Grid(16, 16), Grid(rows=12, columns=20)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "grids",
        "[]",
        "{}",
        '{"grids": []}',
        '{"grids": 16}',
        '{"grids": [16, 16]}',
        '{"grids": [[16]]}',
        '{"grids": [[16, 16, 16]]}',
        '{"grids": [[16, 15]]}',
        '{"grids": [[16, 0]]}',
        '{"grids": [[16, -2]]}',
        '{"grids": [[16, 16.0]]}',
        '{"grids": [["16", "16"]]}',
        '{"grids": [[16, 16], [16, true]]}',
        "\udcff",
    ],
)
def test_a_file_that_is_none_such_is_told_in_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "canvas.json").write_text(text, errors="surrogateescape")

    with pytest.raises(ModelUnavailable, match=r"as a folder.*its canvas.json is not like") as told:
        loading.load(str(tmp_path), device="cpu", dtype="auto")

    assert "\n" not in str(told.value)


def test_a_folder_is_drawn_with_as_its_file_says_or_as_ever(model: Any, tmp_path: Path) -> None:
    folder = random_model.build(tmp_path)
    as_ever = loading.load(str(folder), device="cpu", dtype="float32")
    (folder / "canvas.json").write_text(json.dumps({"grids": CANVAS.grids}))
    with_canvas = loading.load(str(folder), device="cpu", dtype="float32")

    assert draw(as_ever, 96, 96) == draw(employ(model, None), 96, 96)
    assert draw(with_canvas, 96, 96) == draw(employ(model), 96, 96)
    assert draw(with_canvas, 96, 96) != draw(as_ever, 96, 96)


# --- What is drawn ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "drawn", "decoded"),
    [
        ((64, 64), (8, 8), (8, 8)),  # the canvas itself
        ((80, 48), (6, 10), (6, 10)),
        ((160, 96), (6, 10), (12, 20)),
        ((256, 192), (6, 10), (24, 32)),  # another shape than the grid's
        ((100, 90), (8, 8), (12, 14)),  # no multiples of 16
        ((65, 64), (8, 8), (8, 10)),
        ((32, 32), (8, 8), (8, 8)),  # smaller than the canvas
        ((17, 31), (10, 6), (10, 10)),
        ((16, 64), (10, 6), (24, 6)),  # only narrower
        ((64, 16), (6, 10), (6, 24)),
        ((16, 16), (8, 8), (8, 8)),
    ],
)
def test_every_size_is_exact_and_no_cell_of_the_grid_is_left_out(
    model: Any, size: tuple[int, int], drawn: tuple[int, int], decoded: tuple[int, int]
) -> None:
    with Watch(model) as watch:
        [image] = draw(employ(model), *size)

    assert (image.size, image.mode) == (size, "RGB")
    assert watch.drawn == [drawn] * 2
    assert watch.decoded == [decoded]


def test_at_the_size_of_its_grid_an_image_is_the_one_without_a_canvas(model: Any) -> None:
    assert draw(employ(model), 80, 48) == draw(employ(model, None), 80, 48)


def test_what_is_shrunk_is_the_whole_of_what_was_decoded(model: Any) -> None:
    [large], [small] = draw(employ(model), 64, 64), draw(employ(model), 32, 32)
    expected = large.resize((32, 32), Image.Resampling.BILINEAR)

    assert np.abs(np.asarray(small, dtype=int) - np.asarray(expected, dtype=int)).max() <= 2


def test_an_odd_size_is_the_middle_of_the_next_that_can_be_drawn(model: Any) -> None:
    [odd], [next_] = draw(employ(model), 100, 90), draw(employ(model), 112, 96)

    assert odd == next_.crop((6, 3, 106, 93))


def test_a_seed_repeats_alone_and_in_a_batch_which_has_one_grid(model: Any) -> None:
    alone = [draw(employ(model), 200, 120, seed)[0] for seed in (1, 2)]
    with Watch(model) as watch:
        together = draw(employ(model), 200, 120, 1, 2)

    assert draw(employ(model), 200, 120, 1)[0] == alone[0]
    assert alone[0] != alone[1]
    assert watch.drawn == [(6, 10)] * 2
    assert watch.decoded == [(16, 26)] * 2
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1


def test_a_decoder_that_runs_out_of_memory_begins_again_from_the_grid(model: Any) -> None:
    expected = draw(employ(model), 256, 256)
    refused = iter([True, True])

    def refuse(*_: object) -> None:
        if next(refused, False):
            torch.empty(2**60, dtype=torch.uint8)

    hook = model.vae.decoder.register_forward_pre_hook(refuse)
    try:
        with Watch(model) as watch:
            again = draw(employ(model), 256, 256)
    finally:
        hook.remove()

    assert again == expected  # at 256 x 256 there is one tile
    assert watch.drawn == [(8, 8)] * 2
    assert watch.decoded == [(32, 32)]


def test_latents_are_enlarged_in_full_precision() -> None:
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()

    assert enlarge(latents, 64, 64).dtype == torch.float32
    assert torch.equal(enlarge(latents, 64, 64), latents.float())
    assert enlarge(latents, 1000, 504).shape == (1, 16, 63, 125)


def test_pixels_of_the_right_size_are_left_alone() -> None:
    pixels = torch.zeros(1, 3, 48, 80, dtype=torch.bfloat16)

    assert fitted(pixels, 80, 48) is pixels
    assert fitted(pixels, 16, 32).shape == (1, 3, 32, 16)
