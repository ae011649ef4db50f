"""What each shape is made of: polygons, in a square from -1 to 1."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from worker.demo.scenes import Shape

Rgb = tuple[int, int, int]
Points = NDArray[np.float64]
"""Corners, n x 2: x to the right, y down. Of a shape: -1 to 1 is its size."""

ROOF, DOOR, PANE, TRUNK = (158, 48, 40), (96, 58, 36), (236, 240, 190), (112, 72, 42)
DARK = (36, 32, 36)
HEART_OF_FLOWER = (252, 224, 96)


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a thing: outlines that are filled, and outlines that are left out of them."""

    filled: tuple[Points, ...]
    rgb: Rgb | None = None
    """None is the thing's own colour."""
    holes: tuple[Points, ...] = ()


def silhouette(shape: Shape, side_px: int) -> NDArray[np.uint8]:
    """Return what a shape covers, `side_px` x `side_px`, 0 or 255: to compare pictures with."""
    mask = Image.new("L", (side_px, side_px))
    draw = ImageDraw.Draw(mask)
    for part in parts(shape):
        for fill, outlines in ((255, part.filled), (0, part.holes)):
            for outline in outlines:
                draw.polygon([(x, y) for x, y in (outline + 1) / 2 * side_px], fill=fill)
    return np.asarray(mask)


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
            return [Part((STAR,))]
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


STAR = np.array(
    [
        (radius * math.sin(math.pi * n / 5), -radius * math.cos(math.pi * n / 5) + 0.06)
        for n in range(10)
        for radius in [1.0 if n % 2 == 0 else 0.42]
    ]
)
