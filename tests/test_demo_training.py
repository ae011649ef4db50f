"""The demo can be trained again: courses go on where they were, and all of it is rehearsed."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from worker import loading
from worker.canvas import CELL_PX, find_canvas
from worker.demo import WEIGHTS, architecture
from worker.demo.architecture import GRIDS
from worker.demo.scenes import LARGE, Background, Colour, Scene, Shape, Thing
from worker.demo.train import STEPS, train
from worker.demo.training import course, precision
from worker.demo.training.autoencoder import Phase, crops
from worker.demo.training.muon import Muon, orthogonal
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


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_muon_moves_matrices_as_the_one_of_torch_does(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    first, gradients = torch.randn(shape), torch.randn(5, *shape)
    ours, theirs = torch.nn.Parameter(first.clone()), torch.nn.Parameter(first.clone())
    here = Muon([ours], lr=0.1)
    there = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        here.step()
        there.step()  # type: ignore[no-untyped-call]

    # Theirs multiplies in bfloat16, of which three digits are right.
    moved = theirs.detach() - first
    assert float((ours.detach() - theirs.detach()).norm() / moved.norm()) < 0.02


def test_muon_takes_a_kernel_for_a_matrix_and_leaves_what_has_no_gradient() -> None:
    torch.manual_seed(1)
    first, gradient = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    kernel = torch.nn.Parameter(first.clone().to(memory_format=torch.channels_last))
    matrix = torch.nn.Parameter(first.reshape(4, -1).clone())
    idle = torch.nn.Parameter(torch.ones(2, 2))
    kernel.grad = gradient.to(memory_format=torch.channels_last)
    matrix.grad = gradient.reshape(4, -1).clone()

    Muon([kernel, matrix, idle], lr=0.1).step()

    assert torch.equal(kernel.reshape(4, -1), matrix)
    assert not torch.equal(kernel, first)
    assert torch.equal(idle, torch.ones(2, 2))


def test_an_orthogonal_matrix_keeps_directions_and_evens_out_lengths() -> None:
    torch.manual_seed(1)
    left, _, right = torch.linalg.svd(torch.randn(8, 8))
    matrix = left @ torch.diag(torch.tensor([50.0, 20, 9, 5, 4, 3, 2, 1])) @ right

    lengths = torch.diag(left.T @ orthogonal(matrix).float() @ right.T)

    assert 0.6 < float(lengths.min()) <= float(lengths.max()) < 1.3


@pytest.mark.parametrize(
    ("abilities", "fastest"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"avx2": True, "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"neon": True, "bf16": True}, torch.bfloat16),
        ({"neon": True, "bf16": False}, torch.float32),
    ],
)
def test_bfloat16_is_for_processors_that_multiply_in_it(
    abilities: dict[str, bool], fastest: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    a_cpu = torch.device("cpu")

    with precision.mixed(a_cpu):
        product = torch.ones(2, 2) @ torch.ones(2, 2)

    assert precision.fast(a_cpu) is product.dtype is fastest


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


def test_a_transformer_is_trained_anew_for_the_other_parts_of_a_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = train(run, seed=3, share=0.0001, helpers=0, show_steps=None, parts_of=WEIGHTS)

    assert {file.stem for file in run.glob("*.pt")} == {"sketcher", "painter", "repainter"}
    for part in ("text_encoder", "vae"):
        before, after = (_weights(folder / part) for folder in (WEIGHTS, model))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = (_weights(folder / "transformer") for folder in (WEIGHTS, model))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def _weights(part: Path) -> dict[str, torch.Tensor]:
    (file,) = part.glob("*.safetensors")
    return load_file(file)
