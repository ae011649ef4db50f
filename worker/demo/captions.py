"""Captions in English and Chinese, and the scenes that they ask for, from one small grammar.

A `Wish` is what somebody may say; `said` puts it into words, and `scene_of` into a scene. What is
not said has one answer (`worker/demo/scenes.py`), so the same words always mean the same scene, and
what is left to a seed is only how it is painted.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar, TypeAlias, TypeVar

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


class Language(StrEnum):
    ENGLISH = "en"
    CHINESE = "zh"


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


def caption(dice: random.Random) -> tuple[Scene, str]:
    """Return a scene and words for it, in either language."""
    asked = wish(dice)
    language = Language.CHINESE if dice.random() < 0.4 else Language.ENGLISH
    return scene_of(asked), said(asked, language, dice)


def said(asked: Wish, language: Language, dice: random.Random) -> str:
    """Put a wish into words, one of many ways."""
    return (_English(dice) if language is Language.ENGLISH else _Chinese(dice)).say(asked)


STRANGERS = (
    "fox", "cat", "dog", "car", "dragon", "robot", "woman", "man", "castle", "bird", "horse",
    "ship", "city", "mountain", "portrait", "teapot", "elephant", "guitar", "book", "lamp", "bear",
    "猫", "狗", "狐狸", "汽车", "龙", "机器人", "女孩", "城堡", "鸟", "马", "船", "城市", "书",
)  # fmt: skip
"""Things that somebody may ask for and that the model cannot draw: it draws a circle."""


_K = TypeVar("_K")
Words: TypeAlias = Mapping[_K, tuple[str, ...]]
"""The words for each thing, one of which is used."""


class _English:
    SHAPES: ClassVar[Words[Shape]] = {
        Shape.CIRCLE: ("circle", "circle", "disc", "ball", "dot"),
        Shape.SQUARE: ("square", "square", "box"),
        Shape.TRIANGLE: ("triangle",),
        Shape.STAR: ("star", "star", "five-pointed star"),
        Shape.HEART: ("heart",),
        Shape.DIAMOND: ("diamond", "rhombus"),
        Shape.RING: ("ring", "ring", "donut"),
        Shape.CROSS: ("cross", "plus sign"),
        Shape.MOON: ("moon", "crescent moon", "crescent"),
        Shape.FLOWER: ("flower", "blossom"),
        Shape.SUN: ("sun",),
        Shape.CLOUD: ("cloud",),
        Shape.HOUSE: ("house", "house", "cottage"),
        Shape.TREE: ("tree",),
        Shape.FACE: ("smiling face", "smiley", "smiley face", "happy face", "smile"),
    }
    COLOURS: ClassVar[Words[Colour]] = {
        Colour.TURQUOISE: ("turquoise", "cyan", "teal"),
        Colour.PURPLE: ("purple", "violet"),
        Colour.PINK: ("pink",),
        Colour.GRAY: ("gray", "grey"),
        Colour.YELLOW: ("yellow", "yellow", "golden"),
    }
    SIZES: ClassVar[Words[Size]] = {
        Size.SMALL: ("small", "small", "little", "tiny"),
        Size.MEDIUM: ("medium", "medium-sized"),
        Size.LARGE: ("large", "big", "large", "big", "huge", "giant"),
    }
    ROWS: tuple[tuple[str, ...], ...] = (("top", "upper"), (), ("bottom", "lower"))
    COLUMNS = ("left", "", "right")
    GROUNDS: ClassVar[Words[Ground]] = {
        Ground.SEA: ("sea", "ocean", "water"),
        Ground.MEADOW: ("meadow", "grass", "green field", "lawn"),
        Ground.SNOW: ("snow", "snowy field", "white snow"),
    }
    SKIES: ClassVar[Words[Sky]] = {
        Sky.DAY: ("", "", "", " on a sunny day", " under a blue sky"),
        Sky.SUNSET: (" at sunset", " at sunrise", " at dusk", " in the evening"),
        Sky.NIGHT: (" at night", " at night", " under a starry sky", " in the night"),
    }
    OPENINGS = (
        "a picture of ", "an image of ", "draw ", "a drawing of ", "please draw ", "show me ",
        "a simple illustration of ", "flat illustration of ", "generate ", "an icon of ",
    )  # fmt: skip
    CLOSINGS = (
        ", flat design", ", minimalist", ", vector art", ", high quality", ", simple", ", 4k",
        ", clean lines", " please", ", digital art", ", in a simple style", ", highly detailed",
    )  # fmt: skip

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice

    def say(self, asked: Wish) -> str:
        words = self._sentence(asked)
        if self._dice.random() < 0.2:
            words = self._dice.choice(self.OPENINGS) + words
        if self._dice.random() < 0.2:
            words += self._dice.choice(self.CLOSINGS)
        chance = self._dice.random()
        if chance < 0.3:
            words = words[0].upper() + words[1:]
        elif chance < 0.33:
            words = words.upper()
        return words + ("." if self._dice.random() < 0.15 else "")

    def _sentence(self, asked: Wish) -> str:
        background = asked.background
        if background and background.ground in LANDSCAPES:
            return self._landscape(asked, background)
        if background is None:
            return self._arranged(asked)
        behind = self._background(background)
        if not asked.mentions:
            pattern = self._dice.choice(("{}", "just {}", "only {}", "an empty picture with {}"))
            return pattern.format(behind)
        words = self._arranged(asked)
        pattern = self._dice.choice(
            ("{} on {}", "{} on {}", "{} on {}", "{} against {}", "{}, {}", "{} with {}",
             "{} in front of {}", "on {}, {}", "on {} there is {}")
        )  # fmt: skip
        if pattern.startswith("on"):
            return pattern.format(behind, words)
        return pattern.format(words, behind)

    def _arranged(self, asked: Wish) -> str:
        names = [self._name(mention) for mention in asked.mentions]
        if len(names) == 1:
            return names[0] + self._place(asked.mentions[0])
        way: tuple[str, ...]
        match asked.order:
            case Order.LEFT:
                way = ("to the left of", "left of", "on the left of")
            case Order.RIGHT:
                way = ("to the right of", "right of", "on the right of")
            case Order.ABOVE:
                way = ("above", "over", "on top of")
            case Order.BELOW:
                way = ("below", "under", "beneath")
            case Order.INSIDE:
                way = ("inside", "in", "within", "in the middle of")
            case Order.ROW:
                if len(names) == 2:
                    return self._dice.choice(
                        ("{} and {}", "{} and {}", "{} next to {}", "{} beside {}")
                    ).format(*names)
                return f"{names[0]}, {names[1]} and {names[2]}"
        return f"{names[0]} {self._dice.choice(way)} {names[1]}"

    def _name(self, mention: Mention, *, article: bool = True) -> str:
        noun = mention.noun or self._dice.choice(self.SHAPES[mention.shape])
        colour = mention.colour
        adjectives = []
        if mention.size:
            adjectives.append(self._dice.choice(self.SIZES[mention.size]))
        if colour:
            adjectives.append(self._colour(colour))
        if mention.count > 1:
            number = {2: ("two", "2"), 3: ("three", "3")}[mention.count]
            plural = {"box": "boxes", "cross": "crosses"}.get(noun, noun + "s")
            return " ".join([self._dice.choice(number), *adjectives, plural])
        words = " ".join([*adjectives, noun])
        chance = self._dice.random()
        if not article or chance < 0.12:
            return words
        if chance < 0.2:
            return "the " + words
        if chance < 0.25:
            return "one " + words
        return ("an " if words[0] in "aeiou" else "a ") + words

    def _colour(self, colour: Colour) -> str:
        return self._dice.choice(self.COLOURS.get(colour, (colour.value,)))

    def _place(self, mention: Mention) -> str:
        if mention.place is None:
            return ""
        column, line = mention.place
        if (column, line) == (1, 1):
            return self._dice.choice(
                (" in the center", " in the centre", " in the middle", " at the center")
            )
        side = self.COLUMNS[column]
        if line == 1:
            return self._dice.choice((f" on the {side}", f" on the {side} side", f" at the {side}"))
        word = self._dice.choice(self.ROWS[line])
        if column == 1:
            word = self.ROWS[line][0]
            return self._dice.choice((f" at the {word}", f" at the {word}", f" near the {word}"))
        return self._dice.choice(
            (f" in the {word} {side} corner", f" in the {word} {side}", f" at the {word} {side}")
        )

    def _background(self, background: Background) -> str:
        first, last = self._colour(background.colour), self._colour(background.towards)
        if background.ground is Ground.PLAIN:
            article = "an" if first[0] in "aeiou" else "a"
            return self._dice.choice(
                (f"{article} {first} background", f"{article} {first} background",
                 f"{first} background", f"{article} plain {first} background",
                 f"{article} solid {first} background", f"{article} {first} backdrop")
            ).replace("an plain", "a plain").replace("an solid", "a solid")  # fmt: skip
        begin, end = (
            ("top", "bottom") if background.ground is Ground.DOWNWARD else ("left", "right")
        )
        direction = self._dice.choice((f" from {begin} to {end}", f" ({begin} to {end})"))
        if background.ground is Ground.DOWNWARD and self._dice.random() < 0.5:
            direction = ""
        return self._dice.choice(
            (f"a gradient from {first} to {last}{direction}",
             f"a {first} to {last} gradient background{direction}",
             f"a background fading from {first} to {last}{direction}",
             f"a gradient background, {first} at the {begin} and {last} at the {end}")
        )  # fmt: skip

    def _landscape(self, asked: Wish, background: Background) -> str:
        dice = self._dice
        names = [self._name(mention) for mention in asked.mentions]
        if background.ground is Ground.STARS:
            sky = dice.choice(
                ("night sky", "starry sky", "starry night sky", "night sky with stars")
            )
            if not names:
                return dice.choice((f"a {sky}", "stars at night", "a night full of stars", sky))
            if dice.random() < 0.3 and asked.mentions[0].place is None:
                return dice.choice(
                    (f"{names[0]} and stars", f"{names[0]} and stars at night",
                     f"{names[0]} among the stars", f"{names[0]} with stars")
                )  # fmt: skip
            return (
                f"{names[0]}{self._place(asked.mentions[0])} in {dice.choice(('a', 'the'))} {sky}"
            )
        ground = dice.choice(self.GROUNDS[background.ground])
        article = (
            dice.choice(("a ", "the "))
            if ground in ("meadow", "green field", "lawn", "snowy field")
            else "the "
        )
        light = dice.choice(self.SKIES[background.sky])
        if not names:
            return f"{article}{ground}{light}"
        words = names[0] if len(names) == 1 else f"{names[0]} and {names[1]}"
        if asked.spot is Spot.IN_THE_SKY:
            way = dice.choice(("over", "above", "in the sky over", "in the sky above"))
            return f"{words} {way} {article}{ground}{light}"
        way = "in" if ground in ("snow", "white snow", "green field", "snowy field") else "on"
        where = f" {way} {article}{ground}"
        if asked.above is None:
            return f"{words}{where}{light}"
        over = self._name(asked.above)
        return dice.choice(
            (f"{words}{where} under {over}{light}", f"{words}{where}{light} with {over} in the sky",
             f"{words}{where} and {over} in the sky{light}")
        )  # fmt: skip


class _Chinese:
    SHAPES: ClassVar[Words[Shape]] = {
        Shape.CIRCLE: ("圆形", "圆", "圆球", "圆点"),
        Shape.SQUARE: ("正方形", "方块", "方形"),
        Shape.TRIANGLE: ("三角形", "三角"),
        Shape.STAR: ("星星", "五角星", "星形"),
        Shape.HEART: ("心形", "爱心", "心"),
        Shape.DIAMOND: ("菱形", "钻石"),
        Shape.RING: ("圆环", "圆圈", "环"),
        Shape.CROSS: ("十字", "十字形", "加号"),
        Shape.MOON: ("月亮", "弯月", "月牙"),
        Shape.FLOWER: ("花", "花朵", "小花"),
        Shape.SUN: ("太阳",),
        Shape.CLOUD: ("云", "云朵", "云彩"),
        Shape.HOUSE: ("房子", "屋子", "房屋"),
        Shape.TREE: ("树", "树木"),
        Shape.FACE: ("笑脸", "笑脸表情", "微笑的脸"),
    }
    MEASURES: ClassVar[Words[Shape]] = {
        Shape.STAR: ("颗", "个"), Shape.HEART: ("颗", "个"), Shape.FLOWER: ("朵",),
        Shape.CLOUD: ("朵", "片"), Shape.SUN: ("个", "轮"), Shape.MOON: ("个", "轮"),
        Shape.HOUSE: ("座", "间", "个"), Shape.TREE: ("棵",), Shape.FACE: ("张", "个"),
    }  # fmt: skip
    COLOURS: ClassVar[Words[Colour]] = {
        Colour.RED: ("红",), Colour.ORANGE: ("橙", "橘"), Colour.YELLOW: ("黄", "黄", "金"),
        Colour.GREEN: ("绿",), Colour.TURQUOISE: ("青", "青绿", "蓝绿"), Colour.BLUE: ("蓝",),
        Colour.PURPLE: ("紫",), Colour.PINK: ("粉", "粉红"), Colour.BROWN: ("棕", "褐"),
        Colour.BLACK: ("黑",), Colour.GRAY: ("灰",), Colour.WHITE: ("白",),
    }  # fmt: skip
    SIZES: ClassVar[Words[Size]] = {
        Size.SMALL: ("小", "小", "小小的", "很小的"),
        Size.MEDIUM: ("中等大小的", "中等的"),
        Size.LARGE: ("大", "大", "巨大的", "很大的"),
    }
    PLACES: ClassVar[Words[tuple[int, int]]] = {
        (0, 0): ("左上角", "左上方"), (1, 0): ("上方", "顶部", "上面", "上边"),
        (2, 0): ("右上角", "右上方"),
        (0, 1): ("左边", "左侧", "左面"), (1, 1): ("中间", "中央", "正中", "中心"),
        (2, 1): ("右边", "右侧", "右面"), (0, 2): ("左下角", "左下方"),
        (1, 2): ("下方", "底部", "下面", "下边"), (2, 2): ("右下角", "右下方"),
    }  # fmt: skip
    GROUNDS: ClassVar[Words[Ground]] = {
        Ground.SEA: ("海", "大海", "海面"),
        Ground.MEADOW: ("草地", "草坪", "绿色草地"),
        Ground.SNOW: ("雪地", "白雪", "雪原"),
    }
    SKIES: ClassVar[Words[Sky]] = {
        Sky.DAY: ("", "", "", "晴天", "白天", "蓝天下"),
        Sky.SUNSET: ("日落时", "夕阳下", "傍晚", "日出时"),
        Sky.NIGHT: ("夜晚", "夜里", "晚上", "星空下"),
    }
    OPENINGS = ("画", "请画", "一张图片：", "画出", "生成", "一幅画，")
    CLOSINGS = ("，扁平风格", "，极简", "，简单", "，高清", "，插画", "，矢量图", "，高质量")

    def __init__(self, dice: random.Random) -> None:
        self._dice = dice

    def say(self, asked: Wish) -> str:
        words = self._sentence(asked)
        if self._dice.random() < 0.2:
            words = self._dice.choice(self.OPENINGS) + words
        if self._dice.random() < 0.2:
            words += self._dice.choice(self.CLOSINGS)
        return words + ("。" if self._dice.random() < 0.15 else "")

    def _sentence(self, asked: Wish) -> str:
        dice, background = self._dice, asked.background
        if background and background.ground in LANDSCAPES:
            return self._landscape(asked, background)
        if background is None:
            return self._arranged(asked)
        behind = self._background(background)
        if not asked.mentions:
            return dice.choice(("{}", "只有{}", "纯粹的{}")).format(behind)
        if len(asked.mentions) == 1 and asked.mentions[0].place and dice.random() < 0.4:
            name, place = self._name(asked.mentions[0]), self._place(asked.mentions[0])
            return dice.choice((f"{behind}的{place}有{name}", f"{behind}上，{place}有{name}"))
        words = self._arranged(asked)
        return dice.choice(
            (f"{behind}上的{words}", f"{behind}上有{words}", f"在{behind}上，{words}",
             f"{words}，{behind}", f"{words}，{behind}", f"{words}在{behind}上",
             f"{behind}，{words}")
        )  # fmt: skip

    def _arranged(self, asked: Wish) -> str:
        dice = self._dice
        names = [self._name(mention) for mention in asked.mentions]
        if len(names) == 1:
            mention = asked.mentions[0]
            if mention.place is None:
                return names[0]
            place = self._place(mention)
            return dice.choice(
                (f"{names[0]}在{place}", f"{place}有{names[0]}", f"{place}的{names[0]}",
                 f"{names[0]}位于{place}")
            )  # fmt: skip
        way: tuple[str, ...]
        match asked.order:
            case Order.LEFT:
                way = ("左边", "左侧", "左面")
            case Order.RIGHT:
                way = ("右边", "右侧", "右面")
            case Order.ABOVE:
                way = ("上面", "上方", "上边")
            case Order.BELOW:
                way = ("下面", "下方", "下边")
            case Order.INSIDE:
                way = ("里面", "里", "中间", "内部")
            case Order.ROW:
                if len(names) == 2:
                    return dice.choice(("和", "与", "和")).join(names)
                return dice.choice(("、", "，")).join(names[:2]) + "和" + names[2]
        where = dice.choice(way)
        return dice.choice(
            (f"{names[0]}在{names[1]}{dice.choice(('的', ''))}{where}",
             f"{names[1]}{where}有{names[0]}",
             f"{names[1]}{where}的{names[0]}")
        )  # fmt: skip

    def _name(self, mention: Mention) -> str:
        dice = self._dice
        noun = mention.noun or dice.choice(self.SHAPES[mention.shape])
        size = dice.choice(self.SIZES[mention.size]) if mention.size else ""
        colour = self._colour(mention.colour, dice.choice(("的", ""))) if mention.colour else ""
        words = size + colour + noun if dice.random() < 0.6 else colour + size + noun
        if mention.count == 1 and dice.random() < 0.3:
            return words
        number = {1: "一", 2: "两", 3: "三"}[mention.count]
        return number + dice.choice(self.MEASURES.get(mention.shape, ("个",))) + words

    def _colour(self, colour: Colour, after: str = "") -> str:
        return self._dice.choice(self.COLOURS[colour]) + "色" + after

    def _place(self, mention: Mention) -> str:
        return self._dice.choice(self.PLACES[mention.place or (1, 1)])

    def _background(self, background: Background) -> str:
        dice = self._dice
        first, last = self._colour(background.colour), self._colour(background.towards)
        if background.ground is Ground.PLAIN:
            return dice.choice((f"{first}背景", f"{first}的背景", f"纯{first}背景", f"{first}背景"))
        if background.ground is Ground.DOWNWARD:
            way = dice.choice(("", "从上到下", "上下"))
            begin, end = "上", "下"
        else:
            way = dice.choice(("从左到右", "左右"))
            begin, end = "左", "右"
        return dice.choice(
            (f"{way}从{first}到{last}的渐变背景", f"{way}由{first}渐变到{last}的背景",
             f"{begin}{first}{end}{last}的渐变背景")
        )  # fmt: skip

    def _landscape(self, asked: Wish, background: Background) -> str:
        dice = self._dice
        names = [self._name(mention) for mention in asked.mentions]
        if background.ground is Ground.STARS:
            sky = dice.choice(("夜空", "星空", "夜晚的天空", "布满星星的夜空"))
            if not names:
                return dice.choice((sky, "满天星星", f"一片{sky}"))
            if asked.mentions[0].place:
                return f"{sky}{self._place(asked.mentions[0])}的{names[0]}"
            return dice.choice(
                (f"{sky}中的{names[0]}", f"{sky}里有{names[0]}", f"{names[0]}和星星",
                 f"{names[0]}在{sky}中")
            )  # fmt: skip
        ground = dice.choice(self.GROUNDS[background.ground])
        light = dice.choice(self.SKIES[background.sky])
        if not names:
            return f"{light}的{ground}" if light else ground
        words = "和".join(names)
        if asked.spot is Spot.IN_THE_SKY:
            return dice.choice(
                (f"{light}{ground}上空的{words}", f"{light}，{ground}上方有{words}",
                 f"{words}在{ground}上空，{light}", f"{light}{ground}上的天空中有{words}")
            ).strip("，")  # fmt: skip
        where = dice.choice((f"{ground}上", f"{ground}上", f"{ground}里"))
        stands = dice.choice(
            (f"{light}{where}的{words}", f"{light}{where}有{words}", f"{words}在{where}，{light}")
        )
        stands = stands.strip("，")
        if asked.above is None:
            return stands
        over = self._name(asked.above)
        return dice.choice(
            (f"{stands}，天上有{over}", f"{stands}，天空中有{over}", f"{over}下{stands}")
        )
