"""Draw a fixed list of prompts that no training has seen, and say how much of them was obeyed.

    python -m worker.demo.evaluate                            a table of scores
    python -m worker.demo.evaluate --sheet contact-sheet.png  and 64 pictures to look at

What draws is the worker's own pipeline; what judges is `worker/demo/judge.py`. The prompts are half
English and half Chinese, of all kinds that the grammar knows except things inside of each other,
which the judge cannot tell apart. One whose scene is misjudged even as painted is left out.
"""

import argparse
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

# No server is called, but whoever imports a setting reads those of the servers too.
os.environ.setdefault("ZIMAGE_DATABASE_URL", "postgresql+psycopg://nobody@nowhere.invalid/none")
os.environ.setdefault("ZIMAGE_REDIS_URL", "redis://nowhere.invalid")

from PIL import Image, ImageDraw
from tqdm import tqdm

from worker import loading
from worker.demo.captions import Language, said
from worker.demo.judge import judge
from worker.demo.paint import paint
from worker.demo.scenes import Scene, is_held_out, jittered
from worker.demo.wishes import Order, scene_of, wish
from worker.drawing import Drawing
from worker.pipeline import TurboPipeline

PROMPTS = 300
SEED = 20261127
SIZES = (
    (512, 512), (512, 512), (512, 512), (576, 448), (448, 576), (640, 448), (448, 640),
    (720, 416), (416, 720), (768, 384), (1024, 1024),
)  # fmt: skip
"""Width and height in pixels: the shapes of the formats' sizes, most at half their length."""
GOALS = {"background": 95, "colour": 95, "shape": 90, "position": 90}
"""Per cent."""

SHEET_SIZES = ((512, 512), (512, 512), (672, 384), (384, 672), (576, 432), (432, 576))
SHEET_ROWS, SHEET_COLUMNS, TILE_PX, LINE_PX = 8, 8, 232, 15


@dataclass(frozen=True, slots=True)
class Question:
    prompt: str
    scene: Scene
    width: int
    height: int
    seed: int


def questions(count: int, *, seed: int = SEED) -> Iterator[Question]:
    """Return the first `count` of a list of held-out prompts, which is the same every time."""
    dice = random.Random(seed)
    for place in range(count):
        language = (Language.ENGLISH, Language.CHINESE)[place % 2]
        width, height = SIZES[place % len(SIZES)]
        while True:
            asked = wish(dice)
            scene = scene_of(asked)
            if asked.order is Order.INSIDE or not is_held_out(scene):
                continue
            painted = paint(jittered(scene, dice), width, height, tones=place)
            if all(right == of for right, of in asdict(judge(painted, scene)).values()):
                break
        yield Question(said(asked, language, dice), scene, width, height, seed=place)


def draw(pipeline: TurboPipeline, question: Question, *, steps: int = 8) -> Image.Image:
    drawing = Drawing(
        pipeline.read(question.prompt),
        question.width,
        question.height,
        question.seed,
        steps,
        on_step=lambda _: None,
    )
    picture = pipeline.draw([drawing])[0]
    if isinstance(picture, BaseException):
        raise picture
    return picture()


def scores(pipeline: TurboPipeline, count: int) -> dict[str, float]:
    """Return what share of each attribute is right, in per cent."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for question in tqdm(questions(count), total=count, desc="drawing", mininterval=5):
        verdict = judge(draw(pipeline, question), question.scene)
        for attribute, (good, of) in asdict(verdict).items():
            right[attribute] += good
            asked[attribute] += of
    return {attribute: 100 * right[attribute] / asked[attribute] for attribute in asked}


def contact_sheet(pipeline: TurboPipeline) -> Image.Image:
    """Return 8 x 8 held-out prompts of several sizes, each under its picture."""
    height = TILE_PX + 2 * LINE_PX
    sheet = Image.new("RGB", (SHEET_COLUMNS * TILE_PX, SHEET_ROWS * height), "white")
    pen = ImageDraw.Draw(sheet)
    dice = random.Random(SEED + 1)
    for place in range(SHEET_ROWS * SHEET_COLUMNS):
        # Pillow's own font has no Chinese letters: the English half is shown.
        while True:
            asked = wish(dice)
            scene = scene_of(asked)
            words = said(asked, Language.ENGLISH, dice)
            if is_held_out(scene) and len(words) <= 2 * 38 and words.isascii():
                break
        width, tall = SHEET_SIZES[place % len(SHEET_SIZES)]
        drawn = draw(pipeline, Question(words, scene, width, tall, seed=place))
        drawn.thumbnail((TILE_PX - 8, TILE_PX - 8))
        left, top = place % SHEET_COLUMNS * TILE_PX, place // SHEET_COLUMNS * height
        sheet.paste(
            drawn, (left + (TILE_PX - drawn.width) // 2, top + (TILE_PX - drawn.height) // 2)
        )
        for line, piece in enumerate(_lines(words)):
            pen.text((left + 4, top + TILE_PX + line * LINE_PX - 2), piece, fill="black")
    return sheet


def _lines(words: str) -> list[str]:
    lines = [""]
    for word in words.split():
        if len(lines[-1]) + len(word) > 38:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines[:2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=loading.DEMO, help="demo, or a folder of another one")
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--sheet", type=Path, help="write 64 pictures into this file as well")
    chosen = parser.parse_args()
    pipeline = loading.load(chosen.model, device="auto", dtype="float32")
    if chosen.sheet:
        contact_sheet(pipeline).save(chosen.sheet, optimize=True)
    print("| attribute | right | goal |\n| --- | --- | --- |")
    for attribute, score in scores(pipeline, chosen.prompts).items():
        goal = f"{GOALS[attribute]} %" if attribute in GOALS else ""
        print(f"| {attribute} | {score:.1f} % | {goal} |")


if __name__ == "__main__":
    main()
