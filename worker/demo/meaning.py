"""What the text encoder has to say of a prompt: its scene, as numbers at four tokens.

The demo's chat template ends in four tokens at which the whole prompt has been read. What the
encoder says there is trained to be these numbers, one row for the background and one for each
thing: the transformer then has to learn how scenes look, and not also how people talk.
"""

from collections.abc import Sequence
from enum import StrEnum
from functools import cache

import numpy as np
from numpy.typing import NDArray

from worker.demo.architecture import TEXT_WIDTH
from worker.demo.outlines import silhouette
from worker.demo.scenes import Background, Colour, Ground, Scene, Shape, Sky, Thing

BACKGROUND, FIRST, SECOND, THIRD = "<|background|>", "<|first|>", "<|second|>", "<|third|>"
HEARD = (BACKGROUND, FIRST, SECOND, THIRD)
"""The tokens at which the encoder says what it has understood, in this order."""

THINGS_MAX = len(HEARD) - 1

LOUD = 3.0
"""How large a number says yes; no is 0."""

GROUNDS, SKIES, COLOURS, SHAPES = list(Ground), list(Sky), list(Colour), list(Shape)
STEPS = np.linspace(0.1, 0.9, 9)
"""Places from left to right or from top to bottom: the ones nearest say how near."""
SIZE_STEPS = np.linspace(0.1, 0.7, 7)
STEP_WIDTH = 0.1
THUMB_PX = 6
"""The side of the tiny silhouette of a shape, which is said beside its name: what a patch shows is
then the same question for all shapes, and not one for each of fifteen names."""

Numbers = NDArray[np.float32]


def _layout(*lengths: int) -> list[slice]:
    ends = np.cumsum(lengths)
    return [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]


GROUND, SKY, COLOUR, TOWARDS, ABSENT, SHAPE, HUE, SIZE, X, Y, ROW, OUTLINE = _layout(
    len(GROUNDS), len(SKIES), len(COLOURS), len(COLOURS), 1,
    len(SHAPES), len(COLOURS), len(SIZE_STEPS), len(STEPS), len(STEPS), len(HEARD), THUMB_PX**2,
)  # fmt: skip
"""Where in a row of `TEXT_WIDTH` numbers each thing is said."""
SILENT = TEXT_WIDTH - 1
"""What every other token says: that it says nothing."""


def meaning(scene: Scene) -> Numbers:
    """Return a scene as numbers, 4 x `TEXT_WIDTH`."""
    said = np.zeros((len(HEARD), TEXT_WIDTH), np.float32)
    said[:, ROW] = np.eye(len(HEARD)) * LOUD
    background = scene.background
    said[0, GROUND] = _one(GROUNDS, background.ground)
    if background.ground in (Ground.SEA, Ground.MEADOW, Ground.SNOW):
        said[0, SKY] = _one(SKIES, background.sky)
    elif background.ground is not Ground.STARS:
        said[0, COLOUR] = _one(COLOURS, background.colour)
        said[0, TOWARDS] = _one(COLOURS, background.towards)
    for place in range(1, len(HEARD)):
        if place > len(scene.things):
            said[place, ABSENT] = LOUD
            continue
        thing = scene.things[place - 1]
        said[place, SHAPE] = _one(SHAPES, thing.shape)
        said[place, OUTLINE] = thumb(thing.shape)
        said[place, HUE] = _one(COLOURS, thing.colour)
        said[place, SIZE] = _near(SIZE_STEPS, thing.size)
        said[place, X] = _near(STEPS, thing.x)
        said[place, Y] = _near(STEPS, thing.y)
    return said


@cache
def thumb(shape: Shape) -> Numbers:
    """Return how much of each of 6 x 6 fields a shape covers, row by row."""
    tiles = silhouette(shape, THUMB_PX * 32).reshape(THUMB_PX, 32, THUMB_PX, 32)
    covered: Numbers = (tiles.mean((1, 3)).ravel() / 255 * LOUD).astype(np.float32)
    return covered


def scene_in(said: Numbers) -> Scene:
    """Return the scene that numbers mean, 4 x `TEXT_WIDTH`: `meaning` the other way around."""
    ground = GROUNDS[said[0, GROUND].argmax()]
    background = Background(
        ground,
        COLOURS[said[0, COLOUR].argmax()],
        COLOURS[said[0, TOWARDS].argmax()],
        SKIES[said[0, SKY].argmax()],
    )
    things = tuple(
        Thing(
            SHAPES[row[SHAPE].argmax()],
            COLOURS[row[HUE].argmax()],
            _middle(SIZE_STEPS, row[SIZE]),
            _middle(STEPS, row[X]),
            _middle(STEPS, row[Y]),
        )
        for row in said[1:]
        if row[ABSENT] < LOUD / 2
    )
    return Scene(background, things)


def _one(names: Sequence[StrEnum], name: StrEnum) -> Numbers:
    said = np.zeros(len(names), np.float32)
    said[names.index(name)] = LOUD
    return said


def _near(steps: NDArray[np.float64], value: float) -> Numbers:
    return (LOUD * np.exp(-0.5 * ((steps - value) / STEP_WIDTH) ** 2)).astype(np.float32)


def _middle(steps: NDArray[np.float64], said: Numbers) -> float:
    weights = np.maximum(said, 0.2) - 0.2
    return float((weights * steps).sum() / max(weights.sum(), 1e-6))
