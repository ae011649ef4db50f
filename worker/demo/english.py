"""Wishes in English, as people may say them."""

import random
from typing import ClassVar

from worker.demo.scenes import Background, Colour, Ground, Shape, Sky
from worker.demo.wishes import LANDSCAPES, Mention, Order, Size, Spot, Wish, Words


class English:
    """Puts wishes into words; `dice` decide which of many."""

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
