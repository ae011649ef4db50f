"""What the demo model knows of the world: a background and up to three things in front of it.

A scene is what a caption says (`wishes.py`), what is painted (`paint.py`), and what the text
encoder must have understood (`meaning.py`). Places and sizes are
shares: `x` of the width, `y` of the height, `size` of the shorter side.
"""

import random
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import sha256


class Shape(StrEnum):
    CIRCLE = "circle"
    SQUARE = "square"
    TRIANGLE = "triangle"
    STAR = "star"
    HEART = "heart"
    DIAMOND = "diamond"
    RING = "ring"
    CROSS = "cross"
    MOON = "moon"
    FLOWER = "flower"
    SUN = "sun"
    CLOUD = "cloud"
    HOUSE = "house"
    TREE = "tree"
    FACE = "face"


class Colour(StrEnum):
    RED = "red"
    ORANGE = "orange"
    YELLOW = "yellow"
    GREEN = "green"
    TURQUOISE = "turquoise"
    BLUE = "blue"
    PURPLE = "purple"
    PINK = "pink"
    BROWN = "brown"
    BLACK = "black"
    GRAY = "gray"
    WHITE = "white"


class Ground(StrEnum):
    """What the background is made of."""

    PLAIN = "plain"
    DOWNWARD = "downward"  # a gradient from the top to the bottom
    RIGHTWARD = "rightward"  # a gradient from the left to the right
    SEA = "sea"
    MEADOW = "meadow"
    SNOW = "snow"
    STARS = "stars"  # a night sky and nothing below it


class Sky(StrEnum):
    """The light over a sea, a meadow or snow."""

    DAY = "day"
    SUNSET = "sunset"
    NIGHT = "night"


NATURAL = {
    Shape.CIRCLE: Colour.RED,
    Shape.SQUARE: Colour.BLUE,
    Shape.TRIANGLE: Colour.GREEN,
    Shape.STAR: Colour.YELLOW,
    Shape.HEART: Colour.RED,
    Shape.DIAMOND: Colour.TURQUOISE,
    Shape.RING: Colour.PURPLE,
    Shape.CROSS: Colour.RED,
    Shape.MOON: Colour.YELLOW,
    Shape.FLOWER: Colour.PINK,
    Shape.SUN: Colour.YELLOW,
    Shape.CLOUD: Colour.WHITE,
    Shape.HOUSE: Colour.ORANGE,
    Shape.TREE: Colour.GREEN,
    Shape.FACE: Colour.YELLOW,
}
"""The colour of a thing whose colour nobody named."""

SMALL, MEDIUM, LARGE = 0.25, 0.38, 0.56
MIDDLE, NEAR, FAR = 0.5, 0.27, 0.73
"""The left or upper place is `NEAR`, the right or lower one `FAR`."""
HORIZON = 0.58
"""Where a sea, a meadow or snow ends, as a share of the height."""
MARGIN = 0.03
"""Between a thing and the edge, as a share of the shorter side."""

PLACE_JITTER, SIZE_JITTER, TURN_JITTER_DEG = 0.015, 0.04, 3.0
"""How far a painted thing is from what its caption says: what a seed decides."""


@dataclass(frozen=True, slots=True)
class Thing:
    shape: Shape
    colour: Colour
    size: float
    x: float
    y: float
    turn_deg: float = 0.0


@dataclass(frozen=True, slots=True)
class Background:
    ground: Ground = Ground.PLAIN
    colour: Colour = Colour.WHITE
    """Of the whole, or of a gradient's beginning."""
    towards: Colour = Colour.WHITE
    """Of a gradient's end; `colour` again where there is none."""
    sky: Sky = Sky.DAY


@dataclass(frozen=True, slots=True)
class Scene:
    """What a caption says. The first thing is in front of the second, which is before the third."""

    background: Background
    things: tuple[Thing, ...]


def default_background(things: tuple[Thing, ...]) -> Background:
    """What is behind things of which a caption says no more: white, or blue behind white ones."""
    white = any(thing.colour is Colour.WHITE for thing in things)
    colour = Colour.BLUE if white else Colour.WHITE
    return Background(Ground.PLAIN, colour, colour)


def row(things: list[Thing]) -> tuple[Thing, ...]:
    """Put things side by side, from the left to the right; as large as there is place for."""
    count = len(things)
    places = {1: (0.5,), 2: (0.28, 0.72), 3: (0.19, 0.5, 0.81)}[count]
    most = {1: 0.9, 2: 0.4, 3: 0.27}[count]
    return tuple(
        replace(thing, x=x, size=min(thing.size, most))
        for thing, x in zip(things, places, strict=True)
    )


def jittered(scene: Scene, dice: random.Random) -> Scene:
    """Return the scene as one painter would paint it: a little elsewhere, larger, turned."""

    def moved(thing: Thing) -> Thing:
        upright = thing.shape in (Shape.HOUSE, Shape.TREE, Shape.CLOUD, Shape.FACE)
        return replace(
            thing,
            x=thing.x + dice.uniform(-PLACE_JITTER, PLACE_JITTER),
            y=thing.y + dice.uniform(-PLACE_JITTER, PLACE_JITTER),
            size=thing.size * dice.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER),
            turn_deg=0.0 if upright else dice.uniform(-TURN_JITTER_DEG, TURN_JITTER_DEG),
        )

    return replace(scene, things=tuple(moved(thing) for thing in scene.things))


def is_held_out(scene: Scene) -> bool:
    """Whether the model is never trained on the like of it: a tenth of all combinations.

    What counts is which shape in which colour is before which colour, for any thing in the scene.
    """
    before = scene.background.colour
    return any(
        sha256(f"{thing.shape} {thing.colour} {before}".encode()).digest()[0] < 26
        for thing in scene.things
    )
