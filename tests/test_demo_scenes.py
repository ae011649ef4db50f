"""What the demo is taught: captions mean scenes, scenes are painted, and a judge sees them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from worker.demo.captions import Language, said
from worker.demo.evaluate import questions
from worker.demo.judge import judge, nearest
from worker.demo.meaning import HEARD, THINGS_MAX, meaning, scene_in
from worker.demo.paint import RGB, Window, kept_inside, paint
from worker.demo.scenes import (
    Background,
    Colour,
    Ground,
    Scene,
    Shape,
    Sky,
    Thing,
    is_held_out,
    jittered,
)
from worker.demo.training.painter import TOKENS_LONG
from worker.demo.training.reader import alike
from worker.demo.training.tokens import tokenizer
from worker.demo.wishes import Mention, Order, Size, Spot, Wish, scene_of, wish

RED_STAR = Thing(Shape.STAR, Colour.RED, 0.4, 0.5, 0.5)
ON_BLUE = Background(Ground.PLAIN, Colour.BLUE, Colour.BLUE)


def wishes(count: int) -> list[Wish]:
    dice = random.Random(4)
    return [wish(dice) for _ in range(count)]


@pytest.mark.parametrize("language", Language)
def test_the_same_words_never_mean_two_scenes(language: Language) -> None:
    meant: dict[str, Scene] = {}
    dice = random.Random(1)
    for asked in wishes(4000):
        words = said(asked, language, dice)
        scene = scene_of(asked)
        assert alike(meant.setdefault(words, scene), scene), words


def test_every_wish_is_of_at_most_three_things_that_the_picture_has_room_for() -> None:
    for asked in wishes(2000):
        scene = scene_of(asked)
        assert len(scene.things) <= THINGS_MAX
        for thing in scene.things:
            x, y = kept_inside(thing, 512, 512)
            assert thing.size / 2 <= x <= 1 - thing.size / 2
            assert thing.size / 2 <= y <= 1 - thing.size / 2


def test_what_is_left_unsaid_has_one_answer() -> None:
    (star,) = scene_of(Wish((Mention(Shape.STAR),))).things
    assert (star.colour, star.x, star.y) == (Colour.YELLOW, 0.5, 0.5)
    assert scene_of(Wish((Mention(Shape.STAR),))).background.colour is Colour.WHITE
    assert scene_of(Wish((Mention(Shape.CLOUD),))).background.colour is Colour.BLUE


def test_where_things_stand_to_each_other_is_where_they_are() -> None:
    def middle(order: Order) -> tuple[float, float, float, float]:
        one, other = scene_of(
            Wish((Mention(Shape.CIRCLE), Mention(Shape.SQUARE)), order=order)
        ).things
        assert (one.shape, other.shape) == (Shape.CIRCLE, Shape.SQUARE)
        return one.x - other.x, one.y - other.y, one.size, other.size

    assert middle(Order.LEFT)[0] < -0.3
    assert middle(Order.RIGHT)[0] > 0.3
    assert middle(Order.ABOVE)[1] < -0.3
    assert middle(Order.BELOW)[1] > 0.3
    x, y, inner, outer = middle(Order.INSIDE)
    assert (x, y) == (0, 0)
    assert inner < outer / 2


def test_a_landscape_has_a_sky_and_a_ground_for_things() -> None:
    sea = Background(Ground.SEA, sky=Sky.SUNSET)
    (sun,) = scene_of(Wish((Mention(Shape.SUN),), sea, spot=Spot.IN_THE_SKY)).things
    house, moon = scene_of(
        Wish((Mention(Shape.HOUSE),), sea, spot=Spot.ON_THE_GROUND, above=Mention(Shape.MOON))
    ).things

    assert sun.y < 0.4 < house.y
    assert moon.y < 0.3
    assert moon.x > house.x


def test_a_wish_is_said_in_both_languages() -> None:
    asked = Wish((Mention(Shape.HEART, Colour.RED, Size.SMALL),), ON_BLUE)
    dice = random.Random(0)
    english = {said(asked, Language.ENGLISH, dice) for _ in range(200)}
    chinese = {said(asked, Language.CHINESE, dice) for _ in range(200)}

    assert "a small red heart on a blue background" in english
    assert any("红色" in words and "蓝色" in words for words in chinese)
    assert len(english) > 50 < len(chinese)
    assert all(words.isascii() for words in english)
    assert not any("heart" in words for words in chinese)


def test_a_meaning_says_the_scene_and_nothing_else() -> None:
    for asked in wishes(1000):
        scene = scene_of(asked)
        said_of_it = meaning(scene)

        assert said_of_it.shape[0] == len(HEARD)
        assert alike(scene, scene_in(said_of_it))
    one = replace(RED_STAR, x=0.27)
    assert not alike(Scene(ON_BLUE, (RED_STAR,)), Scene(ON_BLUE, (one,)))


def test_a_tenth_of_all_combinations_is_held_out_whatever_else_is_in_the_scene() -> None:
    def held_out(thing: Thing, colour: Colour) -> bool:
        return is_held_out(Scene(Background(Ground.PLAIN, colour, colour), (thing,)))

    combinations = [
        (Thing(shape, colour, 0.3, 0.5, 0.5), before)
        for shape in Shape
        for colour in Colour
        for before in Colour
    ]
    out = [each for each in combinations if held_out(*each)]

    assert 0.08 < len(out) / len(combinations) < 0.12
    thing, before = out[0]
    elsewhere = replace(thing, size=0.2, x=0.2)
    beside = next(one for one, colour in combinations if colour is before and one != thing)
    assert held_out(elsewhere, before)
    assert is_held_out(Scene(Background(Ground.PLAIN, before, before), (beside, thing)))


def test_a_picture_is_the_same_at_every_size_and_by_every_window() -> None:
    dice = random.Random(2)
    scene = Scene(Background(Ground.STARS, sky=Sky.NIGHT), (RED_STAR,))
    scene = jittered(scene, dice)
    small = paint(scene, 128, 128, tones=3)
    large = paint(scene, 512, 512, tones=3)
    window = paint(scene, 512, 512, tones=3, window=Window(120, 64, 200, 136))

    shrunk = np.asarray(large.resize((128, 128), Image.Resampling.BOX), np.float32)
    assert np.abs(np.asarray(small, np.float32) - shrunk).mean() < 1.5
    assert window.tobytes() == large.crop((120, 64, 320, 200)).tobytes()
    assert paint(scene, 128, 128, tones=4).tobytes() != small.tobytes()


def test_edges_are_antialiased() -> None:
    picture = paint(Scene(ON_BLUE, (RED_STAR,)), 128, 128)

    assert len(picture.getcolors() or ()) > 10  # two colours, and some of what is between


@pytest.mark.parametrize("colour", Colour)
def test_every_shade_that_is_painted_is_nearest_to_its_own_colour(colour: Colour) -> None:
    for tones in range(40):
        ground = Background(Ground.PLAIN, colour, colour)
        rgb = paint(Scene(ground, ()), 1, 1, tones=tones).getpixel((0, 0))
        assert nearest(np.array(rgb, np.float64)) is colour
    assert len(RGB) == len(Colour)


def test_what_was_painted_is_judged_right() -> None:
    """Not always: things touch small stars, or hide where they look like what is behind them."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    dice = random.Random(5)
    for place, one in enumerate(wishes(300)):
        if one.order is Order.INSIDE:
            continue
        scene = scene_of(one)
        painted = paint(jittered(scene, dice), *dice.choice([(512, 512), (640, 384)]), tones=place)
        for attribute, (good, of) in asdict(judge(painted, scene)).items():
            right[attribute] += good
            asked[attribute] += of

    shares = {attribute: right[attribute] / asked[attribute] for attribute in asked}
    assert min(shares["background"], shares["colour"], shares["position"]) > 0.98
    assert min(shares["shape"], shares["count"], shares["size"]) > 0.94


@pytest.mark.parametrize(
    ("attribute", "other"),
    [
        ("background", Scene(Background(Ground.PLAIN, Colour.GREEN, Colour.GREEN), (RED_STAR,))),
        ("colour", Scene(ON_BLUE, (replace(RED_STAR, colour=Colour.PINK),))),
        ("shape", Scene(ON_BLUE, (replace(RED_STAR, shape=Shape.HEART),))),
        ("position", Scene(ON_BLUE, (replace(RED_STAR, x=0.27),))),
        ("size", Scene(ON_BLUE, (replace(RED_STAR, size=0.2),))),
        ("count", Scene(ON_BLUE, (replace(RED_STAR, x=0.25), replace(RED_STAR, x=0.75)))),
    ],
)
def test_the_judge_sees_what_is_wrong_and_only_that(attribute: str, other: Scene) -> None:
    scene = Scene(ON_BLUE, (RED_STAR,))
    verdict = asdict(judge(paint(other, 400, 400), scene))

    wrong = {name for name, (good, of) in verdict.items() if good < of}
    assert attribute in wrong
    assert wrong <= {attribute, "position"}


@pytest.mark.parametrize("shape", [Shape.STAR, Shape.DIAMOND, Shape.TRIANGLE, Shape.MOON])
def test_a_shape_with_blunt_corners_is_still_that_shape(shape: Shape) -> None:
    scene = Scene(ON_BLUE, (replace(RED_STAR, shape=shape),))

    assert judge(_blunt(scene, 0.03), scene).shape == (1, 1)


def test_a_sun_without_rays_is_none() -> None:
    scene = Scene(ON_BLUE, (replace(RED_STAR, shape=Shape.SUN),))

    assert judge(paint(scene, 400, 400), scene).shape == (1, 1)
    assert judge(_blunt(scene, 0.06), scene).shape == (0, 1)


def _blunt(scene: Scene, share: float) -> Image.Image:
    """Paint a scene of one red thing on blue, its corners rounded by a share of its size."""
    (thing,) = scene.things
    blurred = paint(scene, 400, 400).filter(ImageFilter.GaussianBlur(share * thing.size * 400))
    red = (
        np.asarray(blurred)[..., 0]
        > sum(RGB[colour][0] for colour in (Colour.RED, Colour.BLUE)) / 2
    )
    return Image.fromarray(
        np.where(red[..., None], RGB[Colour.RED], RGB[Colour.BLUE]).astype(np.uint8)
    )


def test_an_empty_picture_shows_nothing_of_what_was_asked_for() -> None:
    verdict = judge(paint(Scene(ON_BLUE, ()), 256, 256), Scene(ON_BLUE, (RED_STAR,)))

    assert (verdict.background, verdict.colour, verdict.shape) == ((1, 1), (0, 1), (0, 1))


def test_the_evaluation_asks_the_same_unseen_things_every_time() -> None:
    first, again = list(questions(40)), list(questions(40))

    assert first == again
    assert all(is_held_out(question.scene) for question in first)
    assert sum(question.prompt.isascii() for question in first) >= 18  # half of them are English
    assert len({(question.width, question.height) for question in first}) > 6


def test_the_tokenizer_is_the_same_every_time_and_knows_every_byte() -> None:
    one, same = tokenizer(1), tokenizer(1)

    assert one.get_vocab() == same.get_vocab()
    for words in ("a small red heart", "月亮上的红猫 🐈", "Ünïcode\t\n  two spaces"):
        assert one.decode(one(words).input_ids) == words
    assert len(one("a small red heart on a blue background").input_ids) < 12 < TOKENS_LONG
