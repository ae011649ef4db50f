"""Wishes in Chinese, as people may say them."""

import random
from typing import ClassVar

from worker.demo.scenes import Background, Colour, Ground, Shape, Sky
from worker.demo.wishes import LANDSCAPES, Mention, Order, Size, Spot, Wish, Words


class Chinese:
    """Puts wishes into words; `dice` decide which of many."""

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
