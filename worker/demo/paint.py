"""Scenes as pictures: polygons, drawn by Pillow at four times their size and shrunk."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from worker.demo.scenes import HORIZON, MARGIN, Background, Colour, Ground, Scene, Shape, Sky, Thing

Rgb = tuple[int, int, int]
Points = NDArray[np.float64]
"""Corners, n x 2: x to the right, y down. Of a shape: -1 to 1 is its size."""

SUPERSAMPLING = 4
TONE_JITTER = 8
"""A colour's shades differ by so much of 255 from picture to picture."""

RGB: dict[Colour, Rgb] = {
    Colour.RED: (218, 38, 42),
    Colour.ORANGE: (245, 135, 28),
    Colour.YELLOW: (250, 212, 52),
    Colour.GREEN: (48, 158, 68),
    Colour.TURQUOISE: (52, 192, 190),
    Colour.BLUE: (42, 92, 212),
    Colour.PURPLE: (132, 62, 178),
    Colour.PINK: (245, 142, 186),
    Colour.BROWN: (128, 82, 48),
    Colour.BLACK: (24, 24, 28),
    Colour.GRAY: (138, 140, 144),
    Colour.WHITE: (247, 247, 245),
}
SKIES: dict[Sky, tuple[Rgb, Rgb]] = {
    Sky.DAY: ((108, 178, 238), (196, 226, 246)),
    Sky.SUNSET: ((242, 112, 84), (252, 196, 112)),
    Sky.NIGHT: ((18, 22, 58), (44, 50, 104)),
}
"""At the top and at the horizon."""
GROUNDS: dict[Ground, Rgb] = {
    Ground.SEA: (28, 88, 158),
    Ground.MEADOW: (92, 172, 74),
    Ground.SNOW: (234, 240, 248),
}
NIGHT_SHADE = 0.45
"""How bright the ground is at night."""
ROOF, DOOR, PANE, TRUNK = (158, 48, 40), (96, 58, 36), (236, 240, 190), (112, 72, 42)
DARK = (36, 32, 36)
HEART_OF_FLOWER = (252, 224, 96)
STARLIGHT = (250, 246, 214)


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a thing: outlines that are filled, and outlines that are left out of them."""

    filled: tuple[Points, ...]
    rgb: Rgb | None = None
    """None is the thing's own colour."""
    holes: tuple[Points, ...] = ()


@dataclass(frozen=True, slots=True)
class Window:
    """The piece of a picture that is painted, in pixels of the whole."""

    left: int
    top: int
    width: int
    height: int


def paint(
    scene: Scene, width: int, height: int, *, tones: int = 0, window: Window | None = None
) -> Image.Image:
    """Return the scene as an RGB image of `width` x `height` pixels, or of its `window`.

    `tones` decides the shades of colours and where small stars stand: the same number gives the
    same picture at every size. Things are moved into the picture where they would leave it.
    """
    window = window or Window(0, 0, width, height)
    dice = random.Random(tones)
    shift = {
        colour: tuple(dice.randint(-TONE_JITTER, TONE_JITTER) for _ in range(3))
        for colour in Colour
    }

    def tone(colour: Colour) -> Rgb:
        red, green, blue = (
            min(255, max(0, value + move))
            for value, move in zip(RGB[colour], shift[colour], strict=True)
        )
        return red, green, blue

    canvas = Image.fromarray(_background(scene.background, width, height, window, tone))
    if _has_stars(scene.background):
        for _ in range(12):
            star = Thing(Shape.STAR, Colour.WHITE, 0.05, dice.random(), dice.random() * 0.9)
            below = HORIZON - 0.08 if scene.background.ground is not Ground.STARS else 1.0
            spot = _outline_in(_STAR, star.size, star.x, star.y * below, 0.0, width, height)
            _fill(canvas, Part((spot,), STARLIGHT), STARLIGHT, window)
    for thing in reversed(scene.things):
        x, y = kept_inside(thing, width, height)
        for part in parts(thing.shape):
            placed = Part(
                tuple(
                    _outline_in(each, thing.size, x, y, thing.turn_deg, width, height)
                    for each in part.filled
                ),
                part.rgb,
                tuple(
                    _outline_in(each, thing.size, x, y, thing.turn_deg, width, height)
                    for each in part.holes
                ),
            )
            _fill(canvas, placed, part.rgb or tone(thing.colour), window)
    return canvas


def silhouette(shape: Shape, side_px: int) -> NDArray[np.uint8]:
    """Return what a shape covers, `side_px` x `side_px`, 0 or 255: to compare pictures with."""
    mask = Image.new("L", (side_px, side_px))
    draw = ImageDraw.Draw(mask)
    for part in parts(shape):
        for fill, outlines in ((255, part.filled), (0, part.holes)):
            for outline in outlines:
                draw.polygon([(x, y) for x, y in (outline + 1) / 2 * side_px], fill=fill)
    return np.asarray(mask)


def kept_inside(thing: Thing, width: int, height: int) -> tuple[float, float]:
    """Return a thing's middle as shares of width and height, moved so that all of it is seen."""
    half = thing.size / 2 + MARGIN
    shorter = min(width, height)
    edge_x, edge_y = half * shorter / width, half * shorter / height
    return (
        min(max(thing.x, edge_x), max(1 - edge_x, 0.5)),
        min(max(thing.y, edge_y), max(1 - edge_y, 0.5)),
    )


def _has_stars(background: Background) -> bool:
    if background.ground is Ground.STARS:
        return True
    return background.ground in GROUNDS and background.sky is Sky.NIGHT


def _background(
    background: Background,
    width: int,
    height: int,
    window: Window,
    tone: Callable[[Colour], Rgb],
) -> NDArray[np.uint8]:
    """Return the background's pixels, rows x columns x 3."""
    across = (np.arange(window.left, window.left + window.width) + 0.5) / width
    down = (np.arange(window.top, window.top + window.height) + 0.5) / height
    pixels = np.empty((window.height, window.width, 3))
    match background.ground:
        case Ground.PLAIN:
            pixels[:] = tone(background.colour)
        case Ground.DOWNWARD:
            pixels[:] = _blend(tone(background.colour), tone(background.towards), down)[:, None]
        case Ground.RIGHTWARD:
            pixels[:] = _blend(tone(background.colour), tone(background.towards), across)[None]
        case Ground.STARS:
            pixels[:] = _blend(*SKIES[Sky.NIGHT], down)[:, None]
        case ground:
            pixels[:] = _blend(*SKIES[background.sky], np.minimum(down / HORIZON, 1))[:, None]
            shade = NIGHT_SHADE if background.sky is Sky.NIGHT else 1.0
            # The horizon is as soft as every other edge: a pixel that it crosses is both.
            share = np.clip((down - HORIZON) * height + 0.5, 0, 1)[:, None, None]
            pixels += share * (np.array(GROUNDS[ground]) * shade - pixels)
    return np.rint(pixels).astype(np.uint8)


def _blend(first: Rgb, last: Rgb, share: NDArray[np.float64]) -> NDArray[np.float64]:
    blended: NDArray[np.float64] = np.array(first) + share[:, None] * np.subtract(last, first)
    return blended


def _outline_in(
    outline: Points, size: float, x: float, y: float, turn_deg: float, width: int, height: int
) -> Points:
    """Return a shape's outline in pixels of the picture."""
    turn = math.radians(turn_deg)
    turned = outline @ np.array(
        [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]
    )
    placed: Points = turned * (size / 2 * min(width, height)) + (x * width, y * height)
    return placed


def _fill(canvas: Image.Image, part: Part, rgb: Rgb, window: Window) -> None:
    """Fill a part, whose outlines are in pixels of the whole, where the window shows it."""
    corners = np.concatenate(part.filled) - (window.left, window.top)
    left, top = np.maximum(np.floor(corners.min(0)).astype(int), 0)
    right, bottom = np.minimum(np.ceil(corners.max(0)).astype(int), (window.width, window.height))
    if right <= left or bottom <= top:
        return
    mask = Image.new("L", ((right - left) * SUPERSAMPLING, (bottom - top) * SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    for fill, outlines in ((255, part.filled), (0, part.holes)):
        for outline in outlines:
            inside = (outline - (window.left + left, window.top + top)) * SUPERSAMPLING
            # Pillow's pixel n is painted from n - 0.5 to n + 0.5.
            draw.polygon([(x, y) for x, y in inside - 0.5], fill=fill)
    canvas.paste(rgb, (int(left), int(top)), mask.reduce(SUPERSAMPLING))


@cache
def parts(shape: Shape) -> Sequence[Part]:
    """Return what a shape is made of, from the back to the front."""
    match shape:
        case Shape.CIRCLE:
            return [Part((_oval(0, 0, 0.95),))]
        case Shape.SQUARE:
            return [Part((_box(-0.82, -0.82, 0.82, 0.82),))]
        case Shape.TRIANGLE:
            return [Part((_corners((0, -0.95), (0.98, 0.8), (-0.98, 0.8)),))]
        case Shape.STAR:
            return [Part((_STAR,))]
        case Shape.HEART:
            return [Part((_heart(),))]
        case Shape.DIAMOND:
            return [Part((_corners((0, -1), (0.7, 0), (0, 1), (-0.7, 0)),))]
        case Shape.RING:
            return [Part((_oval(0, 0, 0.95),), holes=(_oval(0, 0, 0.52),))]
        case Shape.CROSS:
            return [Part((_box(-0.3, -0.9, 0.3, 0.9), _box(-0.9, -0.3, 0.9, 0.3)))]
        case Shape.MOON:
            return [Part((_crescent(),))]
        case Shape.FLOWER:
            petals = [_oval(0.56 * x, 0.56 * y, 0.4) for x, y in _around(6)]
            return [Part(tuple(petals)), Part((_oval(0, 0, 0.32),), HEART_OF_FLOWER)]
        case Shape.SUN:
            rays = [
                _corners(
                    (0.98 * math.cos(at), 0.98 * math.sin(at)),
                    (0.55 * math.cos(at + 0.19), 0.55 * math.sin(at + 0.19)),
                    (0.55 * math.cos(at - 0.19), 0.55 * math.sin(at - 0.19)),
                )
                for at in (2 * math.pi * n / 10 for n in range(10))
            ]
            return [Part((_oval(0, 0, 0.6), *rays))]
        case Shape.CLOUD:
            puffs = (_oval(-0.5, 0.12, 0.4), _oval(0.02, -0.14, 0.5), _oval(0.54, 0.14, 0.38))
            return [Part((*puffs, _box(-0.5, 0.1, 0.54, 0.52)))]
        case Shape.HOUSE:
            return [
                Part((_box(-0.72, -0.15, 0.72, 0.95),)),
                Part((_corners((0, -0.98), (0.95, -0.1), (-0.95, -0.1)),), ROOF),
                Part((_box(-0.18, 0.35, 0.2, 0.95),), DOOR),
                Part((_box(0.36, 0.15, 0.6, 0.45), _box(-0.56, 0.15, -0.32, 0.45)), PANE),
            ]
        case Shape.TREE:
            return [
                Part((_box(-0.14, 0.2, 0.14, 0.98),), TRUNK),
                Part((_oval(0, -0.42, 0.54), _oval(-0.36, -0.02, 0.42), _oval(0.36, -0.02, 0.42))),
            ]
        case Shape.FACE:
            smile = [_arc(0, 0.02, 0.6, 0.35, 2.79), _arc(0, 0.02, 0.46, 2.79, 0.35)]
            return [
                Part((_oval(0, 0, 0.95),)),
                Part((_oval(-0.34, -0.28, 0.14), _oval(0.34, -0.28, 0.14)), DARK),
                Part((np.concatenate(smile),), DARK),
            ]


def _corners(*points: tuple[float, float]) -> Points:
    return np.array(points, dtype=np.float64)


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return _corners((left, top), (right, top), (right, bottom), (left, bottom))


def _arc(x: float, y: float, radius: float, begin: float, end: float) -> Points:
    """Part of a circle between two angles in radians, clockwise from the right if they grow."""
    at = np.linspace(begin, end, 48)
    return np.stack([x + radius * np.cos(at), y + radius * np.sin(at)], axis=1)


def _oval(x: float, y: float, radius: float) -> Points:
    return _arc(x, y, radius, 0, 2 * math.pi)


def _around(count: int) -> list[tuple[float, float]]:
    at = [2 * math.pi * n / count - math.pi / 2 for n in range(count)]
    return [(math.cos(angle), math.sin(angle)) for angle in at]


def _heart() -> Points:
    at = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    x = 16 * np.sin(at) ** 3
    y = -(13 * np.cos(at) - 5 * np.cos(2 * at) - 2 * np.cos(3 * at) - np.cos(4 * at))
    return np.stack([x / 17, (y - 2.5) / 16], axis=1)


def _crescent() -> Points:
    """A circle less another one up and to the right of it."""
    outer = _arc(0, 0, 0.95, 0.55, 2 * math.pi - 1.35)
    inner = _arc(0.42, -0.17, 0.78, 2 * math.pi - 1.72, 0.93)
    return np.concatenate([outer, inner])


_STAR = np.array(
    [
        (radius * math.sin(math.pi * n / 5), -radius * math.cos(math.pi * n / 5) + 0.06)
        for n in range(10)
        for radius in [1.0 if n % 2 == 0 else 0.42]
    ]
)
