"""What somebody may wish for, and the scene that it means.

What is not said has one answer (`worker/demo/scenes.py`), so the same words always mean the same
scene, and what is left to a seed is only how it is painted.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeAlias, TypeVar

from worker.demo.scenes import (
    FAR,
    LARGE,
    MEDIUM,
    MIDDLE,
    NATURAL,
    NEAR,
    SMALL,
    Background,
    Colour,
    Ground,
    Scene,
    Shape,
    Sky,
    Thing,
    default_background,
    row,
)


class Size(StrEnum):
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"


class Order(StrEnum):
    """How several things stand to each other."""

    ROW = "row"
    LEFT = "left"  # the first is to the left of the second
    RIGHT = "right"
    ABOVE = "above"
    BELOW = "below"
    INSIDE = "inside"


class Spot(StrEnum):
    """Where things are in a landscape."""

    IN_THE_SKY = "sky"
    ON_THE_GROUND = "ground"


@dataclass(frozen=True, slots=True)
class Mention:
    """One thing, or two or three of the same, as somebody mentions it."""

    shape: Shape
    colour: Colour | None = None
    size: Size | None = None
    place: tuple[int, int] | None = None
    """Column and row of nine fields, 0 to 2. Of several, only the row counts."""
    count: int = 1
    noun: str | None = None
    """A word that the model does not know, for a circle."""


@dataclass(frozen=True, slots=True)
class Wish:
    mentions: tuple[Mention, ...]
    background: Background | None = None
    order: Order = Order.ROW
    spot: Spot | None = None
    above: Mention | None = None
    """A sun, moon or cloud over whatever stands on the ground."""


SIZES = {Size.SMALL: SMALL, Size.MEDIUM: MEDIUM, Size.LARGE: LARGE}
PLACES = (NEAR, MIDDLE, FAR)
SKY_Y, SKY_SIZE, GROUND_Y = 0.27, 0.4, 0.62
ABOVE_X, ABOVE_Y, ABOVE_SIZE = 0.78, 0.2, 0.26
INNER, OUTER = 0.28, 0.64
LANDSCAPES = (Ground.SEA, Ground.MEADOW, Ground.SNOW, Ground.STARS)


def scene_of(wish: Wish) -> Scene:
    """Return what a wish means."""
    named = [_thing(mention) for mention in wish.mentions for _ in range(mention.count)]
    things = tuple(named)
    match wish.order:
        case Order.INSIDE:
            inner, outer = named
            things = (replace(inner, size=INNER), replace(outer, size=OUTER))
        case Order.LEFT:
            things = row(named)
        case Order.RIGHT:
            things = tuple(reversed(row(list(reversed(named)))))
        case Order.ABOVE | Order.BELOW:
            upper, lower = named if wish.order is Order.ABOVE else reversed(named)
            upper = replace(upper, size=min(upper.size, 0.4), y=0.28)
            lower = replace(lower, size=min(lower.size, 0.4), y=0.72)
            things = (upper, lower) if wish.order is Order.ABOVE else (lower, upper)
        case Order.ROW:
            if len(named) > 1:
                things = row(named)
    if wish.spot is Spot.IN_THE_SKY:
        things = tuple(replace(thing, y=SKY_Y, size=min(thing.size, SKY_SIZE)) for thing in things)
    if wish.spot is Spot.ON_THE_GROUND:
        things = tuple(replace(thing, y=GROUND_Y) for thing in things)
    if wish.above is not None:
        over = replace(_thing(wish.above), x=ABOVE_X, y=ABOVE_Y, size=ABOVE_SIZE)
        things = (*(replace(thing, x=thing.x * 0.85) for thing in things), over)
    return Scene(wish.background or default_background(things), things)


def _thing(mention: Mention) -> Thing:
    column, line = mention.place or (1, 1)
    return Thing(
        mention.shape,
        mention.colour or NATURAL[mention.shape],
        SIZES[mention.size or Size.MEDIUM],
        PLACES[column],
        PLACES[line],
    )


def wish(dice: random.Random) -> Wish:
    """Return something that somebody may wish for."""
    kind = dice.random()
    if kind < 0.4:
        background = _background(dice)
        mention = _mention(dice, background, place=dice.random() < 0.45)
        return Wish((mention,), background)
    if kind < 0.5:
        background = _background(dice)
        mention = replace(_mention(dice, background), count=dice.choice((2, 2, 3)))
        if dice.random() < 0.3:
            mention = replace(mention, place=(1, dice.choice((0, 2))))
        return Wish((mention,), background)
    if kind < 0.74:
        background = _background(dice)
        order = dice.choice([*Order, Order.ROW, Order.ROW])
        count = 3 if order is Order.ROW and dice.random() < 0.3 else 2
        mentions = [_mention(dice, background) for _ in range(count)]
        if order is Order.INSIDE:
            outer = dice.choice((Shape.CIRCLE, Shape.SQUARE, Shape.HEART, Shape.DIAMOND))
            free = [c for c in Colour if c not in (_colour(mentions[0]), *_colours(background))]
            mentions = [
                replace(mentions[0], size=None),
                Mention(outer, dice.choice(free)),
            ]
        return Wish(tuple(mentions), background, order)
    if kind < 0.97:
        return _landscape(dice)
    return Wish((), _background(dice) or Background(dice.choice(LANDSCAPES), sky=_sky(dice)))


def _landscape(dice: random.Random) -> Wish:
    ground = dice.choice(LANDSCAPES)
    if ground is Ground.STARS:
        background = Background(ground, sky=Sky.NIGHT)
        shape = Shape.MOON if dice.random() < 0.5 else dice.choice(list(Shape))
        place = (dice.randrange(3), dice.randrange(3)) if dice.random() < 0.3 else None
        return Wish((Mention(shape, _maybe_colour(dice), place=place),), background)
    background = Background(ground, sky=_sky(dice))
    if ground is Ground.SEA or dice.random() < 0.3:
        usual = [Shape.SUN, Shape.SUN, Shape.MOON, Shape.CLOUD, Shape.STAR, Shape.HEART]
        shape = dice.choice(usual if dice.random() < 0.7 else list(Shape))
        colour = _maybe_colour(dice) if dice.random() < 0.5 else None
        return Wish((Mention(shape, colour),), background, spot=Spot.IN_THE_SKY)
    usual = [Shape.HOUSE, Shape.TREE, Shape.FLOWER]
    count = dice.choice((1, 1, 2))
    mentions = tuple(
        Mention(
            dice.choice(usual if dice.random() < 0.7 else list(Shape)),
            _maybe_colour(dice) if dice.random() < 0.5 else None,
            dice.choice([None, None, *Size]),
        )
        for _ in range(count)
    )
    above = None
    if dice.random() < 0.45:
        above = Mention(dice.choice((Shape.SUN, Shape.MOON, Shape.CLOUD)))
    return Wish(mentions, background, spot=Spot.ON_THE_GROUND, above=above)


def _mention(dice: random.Random, background: Background | None, *, place: bool = False) -> Mention:
    """Return a thing whose colour is not that of what is behind it."""
    shape = dice.choice(list(Shape))
    noun = None
    if dice.random() < 0.04:
        shape, noun = Shape.CIRCLE, dice.choice(STRANGERS)
    taken = _colours(background)
    colour = _maybe_colour(dice)
    while (colour or NATURAL[shape]) in taken:
        colour = dice.choice(list(Colour))
    size = dice.choice([None, None, *Size])
    where = (dice.randrange(3), dice.randrange(3)) if place else None
    return Mention(shape, colour, size, where, noun=noun)


def _maybe_colour(dice: random.Random) -> Colour | None:
    return dice.choice(list(Colour)) if dice.random() < 0.85 else None


def _colour(mention: Mention) -> Colour:
    return mention.colour or NATURAL[mention.shape]


def _colours(background: Background | None) -> tuple[Colour, ...]:
    return (background.colour, background.towards) if background else ()


def _background(dice: random.Random) -> Background | None:
    """Return a plain one or a gradient; None: nothing is said."""
    chance = dice.random()
    if chance < 0.2:
        return None
    first, last = dice.sample(list(Colour), 2)
    if chance < 0.82:
        return Background(Ground.PLAIN, first, first)
    return Background(dice.choice((Ground.DOWNWARD, Ground.RIGHTWARD)), first, last)


def _sky(dice: random.Random) -> Sky:
    return dice.choice((Sky.DAY, Sky.DAY, Sky.SUNSET, Sky.NIGHT))


STRANGERS = (
    "fox", "cat", "dog", "car", "dragon", "robot", "woman", "man", "castle", "bird", "horse",
    "ship", "city", "mountain", "portrait", "teapot", "elephant", "guitar", "book", "lamp", "bear",
    "猫", "狗", "狐狸", "汽车", "龙", "机器人", "女孩", "城堡", "鸟", "马", "船", "城市", "书",
)  # fmt: skip
"""Things that somebody may ask for and that the model cannot draw: it draws a circle."""

_K = TypeVar("_K")
Words: TypeAlias = Mapping[_K, tuple[str, ...]]
"""The words for each thing, one of which is used."""
