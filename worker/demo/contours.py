"""Which of the shapes a piece of a picture is, by its contour and what is inside of it."""

from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from worker.demo.outlines import silhouette
from worker.demo.scenes import Shape

FRAME_PX = 64
"""The side of the square in which silhouettes are compared."""
REFERENCE_PX = 256
"""The side of the silhouettes that they are compared with, before they are framed."""
TURNS_DEG = (-8.0, -4.0, 0.0, 4.0, 8.0)
ROUNDINGS = (0.0, 0.03)
"""How much corners may be rounded, as the deviation of a blur in sides of the silhouette. Without,
a star with blunt points is a house: framed, its middle is larger. With 0.06, a splash is a sun.
"""

Pixels = NDArray[np.uint8]
Mask = NDArray[Any]
"""0 or 1."""


def shape_of(piece: Mask, pixels: Pixels) -> Shape:
    """Return the shape whose silhouette covers most of what a piece covers."""
    framed = _framed(piece * 255)
    filled = _framed(_without_small_holes(piece) * 255)

    def alike(shape: Shape) -> float:
        own = framed if shape is Shape.RING else filled
        return max(
            float(np.minimum(own, other).sum() / np.maximum(own, other).sum())
            for other in _silhouettes(shape)
        )

    best = max((shape for shape in Shape if shape is not Shape.FACE), key=alike)
    if best in (Shape.CIRCLE, Shape.RING) and _has_features(piece, pixels):
        return Shape.FACE
    return best


def _has_features(piece: Mask, pixels: Pixels) -> bool:
    """Whether a round thing has eyes: two dark spots, or holes, in its upper half."""
    high, wide = piece.shape
    solid = _without_small_holes(piece)
    main = np.median(pixels[piece > 0], axis=0)
    other = (np.linalg.norm(pixels.astype(np.float32) - main, axis=2) > 60).astype(np.uint8)
    kernel = np.ones((max(3, high // 12),) * 2, np.uint8)
    inner = cv2.erode(solid, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    upper = (other & inner)[: high // 2]
    left, right = upper[:, : wide // 2].mean(), upper[:, wide // 2 :].mean()
    return bool(min(left, right) > 0.015 and max(left, right) < 0.4)


def _without_small_holes(piece: Mask) -> Mask:
    """Fill holes of less than a ninth of the piece, such as eyes that are as dark as the night."""
    contours, levels = cv2.findContours(piece, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    solid = piece.copy()
    for contour, (_, _, _, parent) in zip(
        contours, levels[0] if levels is not None else [], strict=True
    ):
        if parent >= 0 and cv2.contourArea(contour) < piece.sum() / 9:
            cv2.drawContours(solid, [contour], -1, 1, cv2.FILLED)
    return solid


def _framed(mask: Mask) -> NDArray[np.float32]:
    """Return a mask's content in the middle of a square, as large as it fits, 0 to 1."""
    left, top, right, bottom = box(mask)
    content = mask[top:bottom, left:right]
    factor = FRAME_PX / max(content.shape)
    size = (max(1, round(content.shape[1] * factor)), max(1, round(content.shape[0] * factor)))
    fitted = cv2.resize(content, size, interpolation=cv2.INTER_AREA)
    frame = np.zeros((FRAME_PX, FRAME_PX), np.float32)
    x, y = (FRAME_PX - size[0]) // 2, (FRAME_PX - size[1]) // 2
    frame[y : y + size[1], x : x + size[0]] = fitted / 255
    return frame


@cache
def _silhouettes(shape: Shape) -> list[NDArray[np.float32]]:
    upright = np.pad(silhouette(shape, REFERENCE_PX), REFERENCE_PX // 4)
    middle = (upright.shape[0] / 2,) * 2
    return [
        _framed(cv2.warpAffine(one, cv2.getRotationMatrix2D(middle, turn, 1.0), one.shape))
        for one in (_rounded(upright, share) for share in ROUNDINGS)
        for turn in TURNS_DEG
    ]


def _rounded(mask: Mask, share: float) -> Mask:
    if not share:
        return mask
    blurred = cv2.GaussianBlur(mask, (0, 0), share * REFERENCE_PX)
    return np.where(blurred > 127, 255, 0).astype(np.uint8)


def box(mask: Mask) -> tuple[int, int, int, int]:
    """Return the left, the top, the right and the bottom of what a mask covers."""
    left, top, wide, high = cv2.boundingRect((mask > 0).astype(np.uint8))
    return left, top, left + wide, top + high
