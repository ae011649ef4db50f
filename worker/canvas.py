"""A small model draws at its own scale; its latents are enlarged on the way into the decoder.

    asked for: W x H px ─► the grid of the nearest shape ─► drawn in it ─► enlarged ─► decoded

Its decoder was trained on enlarged latents, so that edges come out crisp at any size. A model is
drawn with in this way if a file `canvas.json` lies in its folder; the real one has none.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import interpolate

CELL_PX = 8
"""Pixels along the side of a cell of latents: the VAE's factor."""
FILE = "canvas.json"


class Grid(NamedTuple):
    """A size in cells. Both are even, because the transformer reads patches of 2 x 2."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class Canvas:
    """The grids in which a model was trained to draw.

    Raises:
        ValueError: there is none, or one that the transformer cannot draw.
    """

    grids: tuple[Grid, ...]

    def __post_init__(self) -> None:
        if not self.grids:
            raise ValueError("there is no grid")
        for grid in self.grids:
            if any(type(cells) is not int or cells < 2 or cells % 2 for cells in grid):
                raise ValueError(f"{list(grid)} is no grid of even numbers")

    def nearest(self, width: int, height: int) -> Grid:
        """The grid whose shape is nearest to that of `width` x `height` pixels.

        By the logarithm of the aspect ratio, so that twice as wide is as far off as half as wide.
        """
        shape = math.log(width / height)
        return min(self.grids, key=lambda grid: abs(math.log(grid.columns / grid.rows) - shape))


def find_canvas(folder: Path) -> Canvas | None:
    """Read the canvas of the model in `folder`: {"grids": [[rows, columns], …]}, in cells.

    Raises:
        ValueError: the file is none such.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        grids = json.loads(file.read_text(encoding="utf-8"))["grids"]
        return Canvas(tuple(Grid(rows, columns) for rows, columns in grids))
    except (ValueError, TypeError, KeyError) as error:
        # Not `from error`: an operator is told the root of what is wrong, and this says more.
        raise ValueError(
            f'its {FILE} is not like {{"grids": [[16, 16], [12, 20]]}}: {error!r}'
        ) from None


def write(folder: Path, canvas: Canvas) -> None:
    """Say in `folder` how the model in it is drawn with."""
    (folder / FILE).write_text(json.dumps({"grids": canvas.grids}) + "\n", encoding="utf-8")


def enlarge(latents: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Return `latents` in the cells of `width` x `height` pixels, or of a larger image that shape.

    Larger where the image would have fewer cells than there are, in either direction: to leave out
    cells would leave out what was drawn. `fitted` then makes the pixels fewer.
    """
    *_, rows, columns = latents.shape
    size = height / CELL_PX, width / CELL_PX
    factor = max(1.0, rows / size[0], columns / size[1])
    return interpolate(
        latents.float(),
        size=[round(cells * factor) for cells in size],
        mode="bicubic",
        align_corners=False,
    )


def fitted(pixels: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Return `pixels`, … x height x width, in this size; as they are if they have it.

    They are the decoder's: from -1 to 1, and what is beyond is meant as that.
    """
    if pixels.shape[-2:] == (height, width):
        return pixels
    return interpolate(
        pixels.float().clamp(-1, 1),
        size=(height, width),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
