"""The demo model lies in the repository, is loaded as any other, and rewrites nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from worker import loading
from worker.canvas import CELL_PX, find_canvas
from worker.demo import WEIGHTS
from worker.prompt_extend.encoder import language_model

if TYPE_CHECKING:
    from tests.warm import Warm
    from worker.pipeline import TurboPipeline

DRAW = """
from worker import loading
from worker.drawing import Drawing

pipeline = loading.load("demo", device="cpu", dtype="auto")
drawing = Drawing(pipeline.read("a red star on a blue background"), 200, 120, 1, 8, lambda _: None)
print(pipeline.draw([drawing])[0]().size)
"""


@pytest.fixture(scope="module")
def demo() -> TurboPipeline:
    return loading.load("demo", device="cpu", dtype="auto")


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
