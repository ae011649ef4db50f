"""What the transformer is asked while it learns, besides what it is for.

However much noise there is, it then learns from every picture what was asked for looks like: from
noisy latents alone, shapes were blobs for a thousand steps. The questions lead from one to the
next, as somebody would draw: where is this patch, how does it lie to each thing, what does each
thing cover of it, and so what is to be seen there? What answers them is thrown away in the end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from worker.demo import architecture
from worker.demo.meaning import THINGS_MAX
from worker.demo.paint import cover, kept_inside, paint
from worker.demo.scenes import Scene

Answers = NDArray[np.float32]
"""Of each patch, row by row: patches x numbers."""

PLACE_WAVES = 3
FIELDS = np.linspace(-1.15, 1.15, 7)
"""Places in a thing from left to right or from top to bottom, in halves of its size."""
FIELD_WIDTH = 0.38
SKETCH_PX = 4
"""A patch's side in sketches."""


@dataclass(frozen=True, slots=True)
class Question:
    layer: int
    """After which it is asked."""
    numbers: int
    """Of an answer, for each patch."""
    weight: float
    """Of the mean square of what is wrong about it, in the loss."""


QUESTIONS = {
    "where": Question(layer=0, numbers=2 * PLACE_WAVES, weight=0.5),
    "around": Question(layer=1, numbers=THINGS_MAX * (2 * len(FIELDS) + 1), weight=1.0),
    "covered": Question(layer=3, numbers=THINGS_MAX * SKETCH_PX**2, weight=3.0),
    "sketch": Question(layer=4, numbers=3 * SKETCH_PX**2, weight=1.0),
}


class Taught(nn.Module):
    """The transformer while it learns, and what answers the questions after its layers."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        width = architecture.TRANSFORMER["dim"]
        self.answers = nn.ModuleDict(
            {name: nn.Linear(width, question.numbers) for name, question in QUESTIONS.items()}
        )
        self._heard: dict[str, torch.Tensor] = {}
        for name, question in QUESTIONS.items():
            transformer.layers[question.layer].register_forward_hook(self._hear(name))

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.transformer(*inputs, **options)

    def wrong(self, right: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return how wrong the last forward pass was about each question, as mean squares.

        `right` are the answers, N x patches x numbers.
        """
        return {
            name: (self.answers[name](self._heard[name][:, : wanted.shape[1]].float()) - wanted)
            .pow(2)
            .mean()
            for name, wanted in right.items()
        }

    def sketched(self, rows: int, columns: int) -> torch.Tensor:
        """Return the sketch of the last forward pass's first picture, 3 x height x width."""
        said = self._heard["sketch"][0, : rows * columns].float()
        tiles = self.answers["sketch"](said).view(rows, columns, SKETCH_PX, SKETCH_PX, 3)
        drawn: torch.Tensor = tiles.permute(4, 0, 2, 1, 3).reshape(3, rows * SKETCH_PX, -1)
        return drawn.detach()

    def _hear(self, name: str) -> Any:
        def hear(_: nn.Module, __: Any, said: torch.Tensor) -> None:
            self._heard[name] = said

        return hear


def answers(scene: Scene, rows: int, columns: int) -> dict[str, Answers]:
    """Return the right answers to all questions about a scene in `rows` x `columns` patches."""
    return {
        "where": where(rows, columns),
        "around": around(scene, rows, columns),
        "covered": covered(scene, rows, columns),
        "sketch": sketch(scene, rows, columns),
    }


def where(rows: int, columns: int) -> Answers:
    """Return where each patch is in the whole, as waves down and across."""
    down, across = (((np.arange(count) + 0.5) / count) for count in (rows, columns))
    waves = np.pi * np.arange(1, PLACE_WAVES + 1)
    place = np.empty((rows, columns, 2, PLACE_WAVES), np.float32)
    place[:, :, 0] = np.cos(down[:, None] * waves)[:, None]
    place[:, :, 1] = np.cos(across[:, None] * waves)[None]
    return place.reshape(rows * columns, -1)


def around(scene: Scene, rows: int, columns: int) -> Answers:
    """Return how each patch lies to each thing that was asked for.

    Of each thing: how near the patch is to its fields from left to right, to those from top to
    bottom, and to its middle, from 0 to 1. Of a thing that is not there: zeros.
    """
    seen = np.zeros((rows, columns, THINGS_MAX, 2 * len(FIELDS) + 1), np.float32)
    for place, thing in enumerate(scene.things):
        x, y = kept_inside(thing, columns, rows)
        half = thing.size / 2 * min(rows, columns)
        right = ((np.arange(columns) + 0.5) - x * columns)[None, :] / half
        below = ((np.arange(rows) + 0.5) - y * rows)[:, None] / half
        for first, off in ((0, right), (len(FIELDS), below)):
            near = np.exp(-0.5 * ((off[..., None] - FIELDS) / FIELD_WIDTH) ** 2)
            seen[:, :, place, first : first + len(FIELDS)] = near
        seen[:, :, place, -1] = np.exp(-(right**2 + below**2))
    return seen.reshape(rows * columns, -1)


def covered(scene: Scene, rows: int, columns: int) -> Answers:
    """Return how much each thing covers of each of a patch's 4 x 4 pixels, 0 to 1."""
    seen = np.zeros((THINGS_MAX, rows * SKETCH_PX, columns * SKETCH_PX, 1), np.float32)
    for place, thing in enumerate(scene.things):
        seen[place, :, :, 0] = cover(thing, columns * SKETCH_PX, rows * SKETCH_PX) / 255
    return np.concatenate([_patches(each) for each in seen], axis=1)


def sketch(scene: Scene, rows: int, columns: int) -> Answers:
    """Return what is to be seen in each patch: 4 x 4 pixels of RGB from -1 to 1."""
    painted = np.asarray(paint(scene, columns * SKETCH_PX, rows * SKETCH_PX), np.float32)
    return _patches(painted) / 127.5 - 1


def _patches(pixels: Answers) -> Answers:
    """Return pixels, height x width x C, as one row for each patch of 4 x 4."""
    height, width, channels = pixels.shape
    tiles = pixels.reshape(
        height // SKETCH_PX, SKETCH_PX, width // SKETCH_PX, SKETCH_PX, channels
    ).swapaxes(1, 2)
    return tiles.reshape(-1, SKETCH_PX**2 * channels)
