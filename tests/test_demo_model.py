"""The demo model lies in the repository, is loaded as any other, and draws what it is told."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from PIL import Image

from worker import loading
from worker.canvas import CELL_PX, find_canvas
from worker.demo import WEIGHTS
from worker.demo.evaluate import Question, draw
from worker.demo.judge import judge
from worker.demo.scenes import Background, Colour, Ground, Scene, Shape, Sky, Thing
from worker.prompt_extend.encoder import language_model

if TYPE_CHECKING:
    from tests.conftest import Customer, Work
    from tests.warm import Warm
    from worker.pipeline import TurboPipeline

DRAW = """
from worker import loading
from worker.drawing import Drawing

pipeline = loading.load("demo", device="cpu", dtype="auto")
drawing = Drawing(pipeline.read("a red star on a blue background"), 200, 120, 1, 8, lambda _: None)
print(pipeline.draw([drawing])[0]().size)
"""


FILES_MB_MAX = 20
PROMISED = ("background", "colour", "shape", "position", "size", "count")
"""Of all shapes of medium size; small suns, faces and flowers are rough, as its card says."""
CHANNEL_SPREAD = 40
"""How far apart two pictures may be in the mean, of 255, that mean the same: the seed is the same,
but what the encoder says of two languages is not, to the last digit."""


@pytest.fixture(scope="module")
def demo() -> TurboPipeline:
    return loading.load("demo", device="cpu", dtype="auto")


def plain(colour: Colour) -> Background:
    return Background(Ground.PLAIN, colour, colour)


def one(shape: Shape, colour: Colour, background: Background, *, x: float = 0.5) -> Scene:
    return Scene(background, (Thing(shape, colour, 0.38, x, 0.5),))


def drawn(
    demo: TurboPipeline,
    prompt: str,
    *,
    size: tuple[int, int] = (256, 256),
    seed: int = 7,
    steps: int = 8,
) -> Image.Image:
    return draw(
        demo,
        Question(prompt, one(Shape.STAR, Colour.RED, plain(Colour.BLUE)), *size, seed),
        steps=steps,
    )


def apart(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of two pictures' values, of 255."""
    values = np.asarray(one, np.float32) - np.asarray(other, np.float32)
    return float(np.abs(values).mean())


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("a red star on a blue background", one(Shape.STAR, Colour.RED, plain(Colour.BLUE))),
        ("a red circle", one(Shape.CIRCLE, Colour.RED, plain(Colour.WHITE))),
        ("黄色背景上的绿色三角形", one(Shape.TRIANGLE, Colour.GREEN, plain(Colour.YELLOW))),
        (
            "白色背景，右边有一颗粉色爱心",
            one(Shape.HEART, Colour.PINK, plain(Colour.WHITE), x=0.73),
        ),
        (
            "a yellow sun over the sea",
            Scene(
                Background(Ground.SEA, sky=Sky.DAY),
                (Thing(Shape.SUN, Colour.YELLOW, 0.38, 0.5, 0.27),),
            ),
        ),
        (
            "a white moon over the sea at night",
            Scene(
                Background(Ground.SEA, sky=Sky.NIGHT),
                (Thing(Shape.MOON, Colour.WHITE, 0.38, 0.5, 0.27),),
            ),
        ),
        (
            "two black squares on an orange background",
            Scene(
                plain(Colour.ORANGE),
                tuple(Thing(Shape.SQUARE, Colour.BLACK, 0.38, x, 0.5) for x in (0.28, 0.72)),
            ),
        ),
    ],
)
def test_it_draws_what_it_is_told(demo: TurboPipeline, prompt: str, scene: Scene) -> None:
    verdict = asdict(judge(drawn(demo, prompt, size=(512, 512)), scene))

    assert {name: verdict[name][0] for name in PROMISED} == {
        name: verdict[name][1] for name in PROMISED
    }


@pytest.mark.parametrize("size", [(1024, 1024), (896, 512), (384, 640), (333, 250), (64, 64)])
def test_it_draws_it_in_every_size_and_exactly(demo: TurboPipeline, size: tuple[int, int]) -> None:
    picture = drawn(demo, "a red star on a blue background", size=size)

    assert picture.size == size
    verdict = judge(picture, one(Shape.STAR, Colour.RED, plain(Colour.BLUE)))
    for attribute in ("background", "colour", "shape", "position"):
        assert getattr(verdict, attribute) == (1, 1), attribute


def test_a_seed_repeats_a_picture_and_another_one_paints_the_same_thing_otherwise(
    demo: TurboPipeline,
) -> None:
    prompt = "a red star on a blue background"
    first, same, other = (drawn(demo, prompt, seed=seed) for seed in (1, 1, 2))

    assert first.tobytes() == same.tobytes()
    assert 1 < apart(first, other) < CHANNEL_SPREAD


def test_english_and_chinese_mean_the_same(demo: TurboPipeline) -> None:
    english = drawn(demo, "a small green heart in the top left corner on a yellow background")
    chinese = drawn(demo, "黄色背景的左上角有一颗小的绿色爱心")
    another = drawn(demo, "黄色背景的右下角有一颗小的红色爱心")

    assert apart(english, chinese) < apart(english, another) / 2


def test_more_steps_are_closer_to_what_very_many_would_draw(demo: TurboPipeline) -> None:
    prompt = "a purple ring on a white background"
    reference = drawn(demo, prompt, steps=60)
    far, nearer, near = (apart(drawn(demo, prompt, steps=n), reference) for n in (2, 8, 24))

    assert far > nearer > near


def test_what_nobody_taught_it_is_drawn_all_the_same(demo: TurboPipeline) -> None:
    for prompt in ("a fox in a forest, oil painting", "", "🦊", "x" * 1000):
        assert drawn(demo, prompt).size == (256, 256)


def test_a_customer_sees_what_was_asked_for(
    customer: Customer, work: Work, demo: TurboPipeline
) -> None:
    body = {
        "model": "z-image-turbo",
        "prompt": "a red star on a blue background",
        "size": "1024x1024",
        "seed": 3,
    }
    task_id = customer.http.post("/v1/images/generations", json=body).json()["id"]
    work(demo)
    (link,) = customer.http.get(f"/v1/tasks/{task_id}").json()["results"]

    picture = Image.open(io.BytesIO(httpx.get(link).content))
    verdict = asdict(judge(picture, one(Shape.STAR, Colour.RED, plain(Colour.BLUE))))
    assert picture.size == (1024, 1024)
    assert all(verdict[name][0] == verdict[name][1] for name in PROMISED)


def test_all_its_files_are_small() -> None:
    size = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file())

    assert size <= FILES_MB_MAX * 1e6


def test_it_is_loaded_and_draws_in_silence_and_without_a_network(warm_model: Warm) -> None:
    drawn = warm_model.start("-c", DRAW)

    assert drawn.communicate() == ("(200, 120)\n", "")
    assert drawn.wait() == 0  # as nobody's is who goes online
    assert warm_model.said == ""  # nor does the import say anything


def test_it_draws_at_a_scale_of_its_own() -> None:
    canvas = find_canvas(WEIGHTS)

    assert canvas is not None
    assert canvas.nearest(1024, 1024).columns * CELL_PX < 1024


def test_its_text_encoder_cannot_write(demo: TurboPipeline) -> None:
    assert language_model(demo.text_encoder) is None


@pytest.mark.parametrize(
    "prompt", ["a cat", "月亮上的红猫 🐈", "Ünïcode\t\n  two spaces", "", "红" * 4000]
)
def test_every_prompt_is_read(demo: TurboPipeline, prompt: str) -> None:
    reading = demo.read(prompt)

    assert 0 < len(reading.tokens) <= min(reading.given, 512)
    assert max(reading.tokens) < demo.text_encoder.config.vocab_size


def test_whoever_may_read_one_file_of_it_may_read_all() -> None:
    """safetensors writes files that only their owner can read, and containers run as another."""
    assert len({path.stat().st_mode for path in WEIGHTS.rglob("*") if path.is_file()}) == 1
