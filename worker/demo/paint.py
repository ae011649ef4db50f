"""Scenes as pictures: polygons, drawn by Pillow at four times their size and shrunk."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from worker.demo.outlines import STAR, Part, Points, Rgb, parts
from worker.demo.scenes import HORIZON, MARGIN, Background, Colour, Ground, Scene, Shape, Sky, Thing

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
STARLIGHT = (250, 246, 214)


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
            spot = _outline_in(STAR, star.size, star.x, star.y * below, 0.0, width, height)
            _fill(canvas, Part((spot,), STARLIGHT), STARLIGHT, window)
    for thing in reversed(scene.things):
        x, y = kept_inside(thing, width, height)
        for part in parts(thing.shape):
            placed = _placed(part, thing, x, y, width, height)
            _fill(canvas, placed, part.rgb or tone(thing.colour), window)
    return canvas


def cover(thing: Thing, width: int, height: int) -> NDArray[np.uint8]:
    """Return how much of each pixel a thing covers, `height` x `width`, 0 to 255."""
    canvas = Image.new("RGB", (width, height))
    x, y = kept_inside(thing, width, height)
    for part in parts(thing.shape):
        placed = _placed(part, thing, x, y, width, height)
        _fill(canvas, placed, (255, 255, 255), Window(0, 0, width, height))
    return np.asarray(canvas)[:, :, 0]


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


def _placed(part: Part, thing: Thing, x: float, y: float, width: int, height: int) -> Part:
    """Return a part of a thing at `x`, `y`, its outlines in pixels of the picture."""

    def placed(outlines: tuple[Points, ...]) -> tuple[Points, ...]:
        return tuple(
            _outline_in(each, thing.size, x, y, thing.turn_deg, width, height) for each in outlines
        )

    return Part(placed(part.filled), part.rgb, placed(part.holes))


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
