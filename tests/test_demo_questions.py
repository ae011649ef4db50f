"""What the demo's transformer is asked while it learns has the right answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from worker.demo import architecture
from worker.demo.meaning import THINGS_MAX
from worker.demo.paint import cover, paint
from worker.demo.scenes import Background, Colour, Ground, Scene, Shape, Thing
from worker.demo.training.questions import (
    FIELDS,
    QUESTIONS,
    SKETCH_PX,
    Taught,
    answers,
    around,
    covered,
    sketch,
    where,
)

ROWS, COLUMNS = 8, 14
SCENE = Scene(
    Background(Ground.PLAIN, Colour.BLUE, Colour.BLUE),
    (
        Thing(Shape.SQUARE, Colour.RED, 0.5, 0.25, 0.5),
        Thing(Shape.RING, Colour.YELLOW, 0.5, 0.75, 0.5),
    ),
)


def in_rows(answer: np.ndarray) -> np.ndarray:
    return answer.reshape(ROWS, COLUMNS, -1)


def test_every_question_has_answers_of_its_length() -> None:
    right = answers(SCENE, ROWS, COLUMNS)

    assert {name: each.shape for name, each in right.items()} == {
        name: (ROWS * COLUMNS, question.numbers) for name, question in QUESTIONS.items()
    }
    assert all(each.dtype == np.float32 for each in right.values())
    layers = [question.layer for question in QUESTIONS.values()]
    assert layers == sorted(layers)
    assert max(layers) < architecture.TRANSFORMER["n_layers"]


def test_no_two_patches_are_in_the_same_place() -> None:
    places = where(ROWS, COLUMNS)

    apart = np.linalg.norm(places[:, None] - places[None], axis=2)
    assert apart[~np.eye(len(places), dtype=bool)].min() > 0.05


def test_a_patch_knows_on_which_side_of_a_thing_it_is() -> None:
    seen = in_rows(around(SCENE, ROWS, COLUMNS)).reshape(ROWS, COLUMNS, THINGS_MAX, -1)
    across, down, middle = np.split(seen, [len(FIELDS), 2 * len(FIELDS)], axis=3)

    # The square's middle is at 3.5 of 14 columns and 4 of 8 rows, and it is 4 patches wide.
    assert across[4, 2, 0].argmax() < len(FIELDS) // 2 < across[4, 4, 0].argmax()
    assert down[2, 3, 0].argmax() < len(FIELDS) // 2 < down[5, 3, 0].argmax()
    assert np.unravel_index(middle[:, :, 0, 0].argmax(), (ROWS, COLUMNS))[1] == 3
    assert not seen[:, :, 2].any()


def test_a_thing_covers_what_is_painted_of_it_and_a_hole_is_none_of_it() -> None:
    width, height = COLUMNS * 8, ROWS * 8
    painted = np.asarray(paint(SCENE, width, height), np.int64)

    for thing in SCENE.things:
        alone = Scene(SCENE.background, (thing,))
        differs = (np.asarray(paint(alone, width, height)) != painted[0, 0]).any(axis=2)
        assert np.array_equal(cover(thing, width, height) > 0, differs)
    assert cover(SCENE.things[1], width, height)[height // 2, width * 3 // 4] == 0


def test_what_covers_a_patch_is_told_thing_by_thing() -> None:
    seen = in_rows(covered(SCENE, ROWS, COLUMNS)).reshape(ROWS, COLUMNS, THINGS_MAX, -1)

    assert seen[4, 3, 0].min() == 1.0
    assert seen[4, 3, 1].max() == seen[..., 2, :].max() == 0.0


def test_a_sketch_shows_the_scene_in_few_pixels() -> None:
    tiles = in_rows(sketch(SCENE, ROWS, COLUMNS)).reshape(ROWS, COLUMNS, SKETCH_PX, SKETCH_PX, 3)
    pixels = tiles.swapaxes(1, 2).reshape(ROWS * SKETCH_PX, COLUMNS * SKETCH_PX, 3)

    assert np.array_equal(
        np.rint((pixels + 1) * 127.5),
        np.asarray(paint(SCENE, COLUMNS * SKETCH_PX, ROWS * SKETCH_PX)),
    )


def test_answers_are_compared_with_what_was_said_of_the_image_alone() -> None:
    taught = Taught(architecture.transformer())
    rows, columns = 4, 6
    latents = [torch.randn(architecture.LATENT_CHANNELS, 1, 2 * rows, 2 * columns)]
    captions = [torch.randn(5, architecture.TEXT_WIDTH)]
    with torch.no_grad():
        taught(latents, torch.ones(1), captions, return_dict=False)
        right = {
            name: torch.zeros(1, rows * columns, question.numbers)
            for name, question in QUESTIONS.items()
        }
        nought = taught.wrong(right)
        for name, weights in taught.answers.named_parameters():
            weights.fill_(2.0 if name.endswith("bias") else 0.0)
        wrong = taught.wrong(right)

    assert all(float(each) > 0 for each in nought.values())
    assert {name: float(each) for name, each in wrong.items()} == pytest.approx(
        dict.fromkeys(QUESTIONS, 4.0)
    )
    assert taught.sketched(rows, columns).shape == (3, rows * SKETCH_PX, columns * SKETCH_PX)
