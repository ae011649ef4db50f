"""A picture is compared with the scene that it should show, by plain image analysis.

Nothing here has learned anything: what differs from the background is cut out; its colour is the
nearest of the twelve, its shape that of the most similar silhouette, its place the middle of its
box. What `worker/demo/paint.py` painted is judged right nearly always: a test shows it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from worker.demo.contours import REFERENCE_PX, Mask, Pixels, box, shape_of
from worker.demo.outlines import silhouette
from worker.demo.paint import (
    GROUNDS,
    NIGHT_SHADE,
    RGB,
    SKIES,
    kept_inside,
)
from worker.demo.scenes import (
    HORIZON,
    SIZE_JITTER,
    Background,
    Colour,
    Ground,
    Scene,
    Shape,
    Sky,
    Thing,
)

SIDE_PX = 256
"""The shorter side of what is looked at; a picture is shrunk to it."""
BORDER = 0.025
"""The share of a side at the edge of which the background is known: things keep away from it."""
APART_MIN = 42.0
"""How far a thing's colour must be from what is behind it, as a distance of RGB values."""
AREA_MIN = 0.0035
"""Of the picture; smaller ones are stars of a night sky, or specks."""
PLACE_TOLERANCE = 0.1
"""Of the width, or of the height."""
SIZE_TOLERANCE = 0.25 + SIZE_JITTER
"""Of the size."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A thing that was found in a picture."""

    shape: Shape
    colour: Colour
    x: float
    """Of the middle, as a share of the width."""
    y: float
    size: float
    """The longer side of its box, as a share of the picture's shorter side."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What of a scene a picture shows, each as how many were right of how many were asked for."""

    background: tuple[int, int]
    colour: tuple[int, int]
    shape: tuple[int, int]
    position: tuple[int, int]
    size: tuple[int, int]
    count: tuple[int, int]


def judge(picture: Image.Image, scene: Scene) -> Verdict:
    """Compare a picture with a scene. Things inside of others are not found: ask for none."""
    pixels = _shrunk(picture)
    height, width = pixels.shape[:2]
    found = things_in(pixels, scene.background.ground)
    wanted = [_as_it_would_be_seen(thing, width, height) for thing in scene.things]
    pairs = list(_paired(wanted, found))
    asked = len(wanted)

    def right(is_right: Sequence[bool]) -> tuple[int, int]:
        return sum(is_right), asked

    return Verdict(
        background=(int(background_is(pixels, scene.background)), 1),
        colour=right([one.colour is seen.colour for one, seen in pairs]),
        shape=right([one.shape is seen.shape for one, seen in pairs]),
        position=right(
            [
                abs(one.x - seen.x) <= PLACE_TOLERANCE and abs(one.y - seen.y) <= PLACE_TOLERANCE
                for one, seen in pairs
            ]
        ),
        size=right([abs(seen.size / one.size - 1) <= SIZE_TOLERANCE for one, seen in pairs]),
        count=(int(len(found) == asked), 1),
    )


def background_is(pixels: Pixels, background: Background) -> bool:
    """Whether a picture's edges have the colours of a background."""
    height, width = pixels.shape[:2]
    rim = max(2, round(BORDER * min(width, height)))
    match background.ground:
        case Ground.PLAIN:
            return nearest(_middle(_rim(pixels, rim))) is background.colour
        case Ground.DOWNWARD | Ground.RIGHTWARD:
            ends = (pixels[:rim], pixels[-rim:])
            if background.ground is Ground.RIGHTWARD:
                ends = (pixels[:, :rim], pixels[:, -rim:])
            return [nearest(_middle(end)) for end in ends] == [
                background.colour,
                background.towards,
            ]
        case _:
            sides = np.concatenate([pixels[:, :rim], pixels[:, -rim:]], axis=1)
            high = _middle(sides[: round(height * HORIZON * 0.5)])
            low = _middle(sides[-round(height * 0.25) :])
            return _landscape(high, low) == (background.ground, background.sky)


def things_in(pixels: Pixels, ground: Ground) -> list[Seen]:
    """Return what stands out from a background of that kind, the largest first."""
    height, width = pixels.shape[:2]
    behind = _behind(pixels, ground)
    apart = np.linalg.norm(pixels.astype(np.float32) - behind, axis=2)
    mask = (apart > APART_MIN).astype(np.uint8)
    if ground not in (Ground.PLAIN, Ground.DOWNWARD, Ground.RIGHTWARD):
        # A horizon that is a pixel higher than at the edge is no thing.
        line = round(height * HORIZON)
        thin = cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((5, 1), np.uint8))
        mask[line - 4 : line + 5] = thin[line - 4 : line + 5]
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    found = []
    for label in range(1, count):
        left, top, wide, high, area = (int(value) for value in stats[label])
        if area < AREA_MIN * width * height:
            continue
        piece = (labels[top : top + high, left : left + wide] == label).astype(np.uint8)
        colours = pixels[top : top + high, left : left + wide]
        found.append(
            (
                area,
                Seen(
                    shape_of(piece, colours),
                    _main_colour(piece, colours),
                    (left + wide / 2) / width,
                    (top + high / 2) / height,
                    max(wide, high) / min(width, height),
                ),
            )
        )
    return [seen for _, seen in sorted(found, key=lambda each: -each[0])]


def nearest(rgb: NDArray[np.float64]) -> Colour:
    """Return the colour of the twelve that is nearest."""
    return min(RGB, key=lambda colour: float(np.linalg.norm(np.array(RGB[colour]) - rgb)))


def _shrunk(picture: Image.Image) -> Pixels:
    factor = SIDE_PX / min(picture.size)
    size = (round(picture.width * factor), round(picture.height * factor))
    return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BOX))


def _as_it_would_be_seen(thing: Thing, width: int, height: int) -> Seen:
    x, y = kept_inside(thing, width, height)
    left, top, right, bottom = box(silhouette(thing.shape, REFERENCE_PX))
    shorter = min(width, height)
    # A heart's box, say, is not in the middle of the circle that it is drawn in.
    x += ((left + right) / REFERENCE_PX - 1) / 2 * thing.size * shorter / width
    y += ((top + bottom) / REFERENCE_PX - 1) / 2 * thing.size * shorter / height
    longer = max(right - left, bottom - top) / REFERENCE_PX
    return Seen(thing.shape, thing.colour, x, y, thing.size * longer)


def _paired(wanted: list[Seen], found: list[Seen]) -> Iterator[tuple[Seen, Seen]]:
    """Pair what was asked for with what was found, so that they lie as near as they can."""
    missing: list[Seen | None] = [None] * (len(wanted) - len(found))
    best = min(
        permutations([*found[: len(wanted) + 3], *missing], len(wanted)),
        key=lambda order: sum(
            abs(one.x - seen.x) + abs(one.y - seen.y) if seen else 2.0
            for one, seen in zip(wanted, order, strict=True)
        ),
        default=(),
    )
    return ((one, seen) for one, seen in zip(wanted, best, strict=True) if seen)


def _rim(pixels: Pixels, rim: int) -> NDArray[np.uint8]:
    pieces = (pixels[:rim], pixels[-rim:], pixels[:, :rim], pixels[:, -rim:])
    return np.concatenate([piece.reshape(-1, 3) for piece in pieces])


def _middle(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    middle: NDArray[np.float64] = np.median(pixels.reshape(-1, 3), axis=0)
    return middle


def _behind(pixels: Pixels, ground: Ground) -> NDArray[np.float64]:
    """Return the background as its edges let expect it, rows x columns x 3."""
    height, width = pixels.shape[:2]
    rim = max(2, round(BORDER * min(width, height)))
    match ground:
        case Ground.PLAIN:
            return np.broadcast_to(_middle(_rim(pixels, rim)), pixels.shape)
        case Ground.RIGHTWARD:
            ends = np.concatenate([pixels[:rim], pixels[-rim:]], axis=0)
            return np.broadcast_to(np.median(ends, axis=0)[None], pixels.shape)
        case _:
            ends = np.concatenate([pixels[:, :rim], pixels[:, -rim:]], axis=1)
            return np.broadcast_to(np.median(ends, axis=1)[:, None], pixels.shape)


def _landscape(high: NDArray[np.float64], low: NDArray[np.float64]) -> tuple[Ground, Sky]:
    """Return the landscape whose sky and ground are nearest to two colours."""

    def apart(ground: Ground, sky: Sky) -> float:
        shade = NIGHT_SHADE if sky is Sky.NIGHT else 1.0
        above = np.array(SKIES[sky][0]) * 0.75 + np.array(SKIES[sky][1]) * 0.25
        below = (
            np.array(SKIES[sky][1]) if ground is Ground.STARS else np.array(GROUNDS[ground]) * shade
        )
        return float(np.linalg.norm(high - above) + np.linalg.norm(low - below))

    choices = [(ground, sky) for ground in GROUNDS for sky in Sky] + [(Ground.STARS, Sky.NIGHT)]
    ground, sky = min(choices, key=lambda choice: apart(*choice))
    return ground, Sky.NIGHT if ground is Ground.STARS else sky


def _main_colour(piece: Mask, pixels: Pixels) -> Colour:
    """Return the colour of the twelve that most of a thing's inner pixels are nearest to."""
    inner = cv2.erode(
        piece, np.ones((3, 3), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0
    )
    chosen = pixels[(inner if inner.any() else piece) > 0].astype(np.float32)
    table = np.array(list(RGB.values()), dtype=np.float32)
    nearest_ones = np.linalg.norm(chosen[:, None] - table[None], axis=2).argmin(axis=1)
    return list(RGB)[int(np.bincount(nearest_ones, minlength=len(RGB)).argmax())]
