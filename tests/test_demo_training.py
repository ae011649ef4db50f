"""The demo can be trained again: courses go on where they were, and all of it is rehearsed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from worker import loading
from worker.canvas import CELL_PX, find_canvas
from worker.demo import architecture
from worker.demo.architecture import GRIDS
from worker.demo.scenes import LARGE, Background, Colour, Scene, Shape, Thing
from worker.demo.train import STEPS, train
from worker.demo.training import course
from worker.demo.training.autoencoder import Phase, crops
from worker.demo.training.painter import HARD_SIZE, is_hard, noise_shares, on_things
from worker.drawing import Drawing

if TYPE_CHECKING:
    from collections.abc import Iterator


class Line:
    """Learns y = 3x - 1 from points that each step makes anew."""

    name = "line"
    decay = 0.5
    average = 0.9

    def __init__(self, steps: int, *, ends_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.model: torch.nn.Module = torch.nn.Linear(1, 1)
        self.steps = steps
        self.ends_at = ends_at
        self.shown: list[int] = []

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(self.model.parameters(), lr=0.3)]

    def batch(self, step: int) -> list[torch.Tensor]:
        if step == self.ends_at:
            raise KeyboardInterrupt
        return [torch.randn(16, 1, generator=torch.Generator().manual_seed(step))]

    def loss(
        self, batch: list[torch.Tensor], step: int
    ) -> tuple[torch.Tensor, Mapping[str, float]]:
        (points,) = batch
        noise = 0.01 * torch.randn_like(points)
        return (self.model(points) - (3 * points - 1 + noise)).pow(2).mean(), {
            "noise": float(noise[0])
        }

    def show(self, folder: Path, step: int) -> None:
        self.shown.append(step)


@pytest.fixture(autouse=True)
def _dice_as_they_were() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def weights(model: torch.nn.Module) -> list[float]:
    return [float(weight) for each in model.parameters() for weight in each.detach().flatten()]


def test_a_course_teaches_shows_and_logs(tmp_path: Path) -> None:
    line = Line(300)
    course.run(line, tmp_path, show_steps=100, helpers=0)

    assert weights(line.model) == pytest.approx([3, -1], abs=0.05)
    assert line.shown == [100, 200, 300]
    rows = [row.split("\t") for row in (tmp_path / "line.tsv").read_text().splitlines()]
    assert [int(row[0]) for row in rows] == [50, 100, 150, 200, 250, 300]
    assert float(rows[-1][1]) < float(rows[0][1])


def test_a_course_that_was_interrupted_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = Line(course.SAVE_STEPS * 2 + 50)
    course.run(whole, tmp_path / "whole", show_steps=None, helpers=0)

    with pytest.raises(KeyboardInterrupt):
        course.run(Line(whole.steps, ends_at=course.SAVE_STEPS + 30), tmp_path / "cut", helpers=0)
    goes_on = Line(whole.steps)
    course.run(goes_on, tmp_path / "cut", show_steps=None, helpers=0)

    assert weights(goes_on.model) == weights(whole.model)


def test_a_course_that_has_ended_is_not_taken_again(tmp_path: Path) -> None:
    first = Line(20)
    course.run(first, tmp_path, helpers=0)
    again = Line(20, ends_at=0)
    course.run(again, tmp_path, helpers=0)

    assert weights(again.model) == weights(first.model)


def test_the_pace_rises_stays_and_falls_to_nothing() -> None:
    paces = [course.pace(step, 1000, 0.5) for step in range(1000)]

    assert paces[0] < 0.05
    assert paces[course.WARMUP_STEPS : 500] == [1.0] * (500 - course.WARMUP_STEPS)
    assert paces[500:] == sorted(paces[500:], reverse=True)
    assert paces[-1] < 0.001


def test_noise_is_shared_out_as_the_scheduler_shifts_it() -> None:
    shares = noise_shares(20_000)

    assert 0 < shares.min() < shares.max() < 1
    # The middle of a logit-normal is a half, which a shift of 3 moves to three quarters.
    assert float(shares.median()) == pytest.approx(0.75, abs=0.02)


def test_what_a_thing_touches_and_what_lies_beside_that_is_on_things() -> None:
    covered = torch.zeros(2, 4 * 6, 48)
    covered[1, 2 * 6 + 5, 7] = 0.1  # of the third of four rows of patches, the last of six

    near = on_things(covered, torch.zeros(2, 8, 12))

    assert not near[0].any()
    first, last = near[1].nonzero().aminmax(dim=0)
    assert (first.tolist(), last.tolist()) == ([2, 8], [7, 11])
    assert int(near[1].sum()) == 6 * 4


@pytest.mark.parametrize(
    ("shape", "size", "hard"),
    [
        (Shape.STAR, HARD_SIZE, True),
        (Shape.STAR, HARD_SIZE + 0.001, False),
        (Shape.SUN, LARGE, True),
    ],
)
def test_small_things_and_suns_are_hard(shape: Shape, size: float, hard: bool) -> None:
    large = Thing(Shape.CIRCLE, Colour.RED, LARGE, 0.3, 0.5)
    thing = Thing(shape, Colour.RED, size, 0.7, 0.5)

    assert is_hard(Scene(Background(), (large, thing))) is hard


def test_crops_that_are_aimed_show_things_more_often() -> None:
    phase = Phase(1.0, 40, 16, 16, (6.0,))

    def plain(phase: Phase) -> int:
        _, pieces, corners, scale = crops(random.Random(3), phase)
        last = phase.side_cells * scale - phase.crop_cells
        assert 0 <= int(corners.min()) <= int(corners.max()) <= last
        return sum(float(piece.float().std(dim=(1, 2)).max()) < 12 for piece in pieces)

    assert plain(replace(phase, aimed=1.0)) < plain(phase) / 2


def test_the_grids_are_what_the_transformer_reads_without_padding_further() -> None:
    for rows, columns in GRIDS:
        assert rows % 2 == columns % 2 == 0
        assert rows * columns // 4 <= 128
        assert (columns, rows) in GRIDS
    assert architecture.VAE["sample_size"] % CELL_PX == 0


def test_a_rehearsal_of_the_training_makes_a_model_that_the_worker_loads(tmp_path: Path) -> None:
    model = train(tmp_path, seed=3, share=0.0001, helpers=0, show_steps=None)

    canvas = find_canvas(model)
    assert canvas is not None
    assert tuple(canvas.grids) == GRIDS
    assert {file.stem for file in tmp_path.glob("*.pt")} == set(STEPS)
    pipeline = loading.load(str(model), device="cpu", dtype="auto")
    drawing = Drawing(pipeline.read("a red circle"), 72, 48, 1, 2, on_step=lambda _: None)
    (picture,) = pipeline.draw([drawing])
    assert not isinstance(picture, BaseException)
    assert picture().size == (72, 48)

    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    train(tmp_path, seed=3, share=0.0001, helpers=0, show_steps=None)
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before
