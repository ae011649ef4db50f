"""Images that are drawn together are those that would be drawn alone, and each ends on its own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from tests import random_model
from worker.drawing import Drawing, Picture
from worker.pipeline import Timing, TurboPipeline, best_batch

PROMPTS = ["x", "a red cat on the moon", "月亮上的红猫 🐈 " * 12]
"""20, 40 and 307 tokens."""


class Stopped(BaseException):
    """What a test's `on_step` raises. Not an Exception, as what a signal raises."""


@pytest.fixture(scope="module")
def model() -> Any:
    model = random_model.assemble(0)
    model.set_progress_bar_config(disable=True)
    return model


@pytest.fixture
def pipeline(model: Any) -> TurboPipeline:
    return TurboPipeline(model, model="random", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def alone(model: Any) -> list[np.ndarray[Any, Any]]:
    """Each of the prompts, drawn alone; the seed is its place."""
    pipeline = TurboPipeline(model, model="random", device="cpu", dtype="float32")
    return [pixels(pipeline.draw([ask(pipeline, place)])[0]) for place in range(3)]


def ask(
    pipeline: TurboPipeline, place: int, on_step: Callable[[int], None] = lambda _: None
) -> Drawing:
    return Drawing(pipeline.read(PROMPTS[place]), 128, 96, place, steps=8, on_step=on_step)


def pixels(result: Picture | BaseException) -> np.ndarray[Any, Any]:
    assert not isinstance(result, BaseException)
    return np.asarray(result(), dtype=int)


def stop_at(step: int, told: list[int]) -> Callable[[int], None]:
    def on_step(done: int) -> None:
        told.append(done)
        if done == step:
            raise Stopped

    return on_step


@contextmanager
def batches(model: Any, largest: int = 64) -> Iterator[list[int]]:
    """How many images the transformer was given, each time; from `largest` on memory runs out."""
    sizes: list[int] = []

    def look(_: Any, given: tuple[Any, ...]) -> None:
        sizes.append(len(given[0]))
        if sizes[-1] > largest:
            torch.empty(2**60, dtype=torch.uint8)

    hook = model.transformer.register_forward_pre_hook(look)
    try:
        yield sizes
    finally:
        hook.remove()


# --- The same image -----------------------------------------------------------------------------


def test_a_seed_means_the_same_image_in_every_batch(
    pipeline: TurboPipeline, alone: list[np.ndarray[Any, Any]]
) -> None:
    """Within what `TurboPipeline.draw` says, with prompts of different lengths."""
    together = [pixels(one) for one in pipeline.draw([ask(pipeline, n) for n in range(3)])]

    for one, other in zip(together, alone, strict=True):
        assert np.abs(one - other).max() <= 1
        assert (one != other).mean() < 0.001


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_one_that_is_stopped_leaves_the_batch_and_the_others_their_images(
    pipeline: TurboPipeline, model: Any, alone: list[np.ndarray[Any, Any]], dropped: int
) -> None:
    told: list[list[int]] = [[], [], []]
    with batches(model) as sizes:
        results = pipeline.draw(
            [ask(pipeline, n, stop_at(3 if n == dropped else 9, told[n])) for n in range(3)]
        )

    assert sizes == [3, 3, 3, 2, 2, 2, 2, 2]
    assert isinstance(results[dropped], Stopped)
    for place in {0, 1, 2} - {dropped}:
        assert np.abs(pixels(results[place]) - alone[place]).max() <= 1
        assert told[place] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert told[dropped] == [1, 2, 3]


def test_each_is_stopped_by_its_own_error_and_after_the_last_nothing_is_drawn(
    pipeline: TurboPipeline, model: Any
) -> None:
    with batches(model) as sizes:
        first, second = pipeline.draw(
            [ask(pipeline, 0, stop_at(4, [])), ask(pipeline, 1, stop_at(2, []))]
        )

    assert sizes == [2, 2, 1, 1]
    assert isinstance(first, Stopped)
    assert isinstance(second, Stopped)
    assert first is not second


def test_one_that_is_stopped_at_the_last_step_has_no_picture(
    pipeline: TurboPipeline, alone: list[np.ndarray[Any, Any]]
) -> None:
    first, second = pipeline.draw([ask(pipeline, 0, stop_at(8, [])), ask(pipeline, 1)])

    assert isinstance(first, Stopped)
    assert np.abs(pixels(second) - alone[1]).max() <= 1


# --- How many -----------------------------------------------------------------------------------


def test_what_was_not_measured_is_drawn_alone(pipeline: TurboPipeline) -> None:
    pipeline.batch_limits[128, 96] = 4

    assert pipeline.batch_max(128, 96, 8) == 4
    assert pipeline.batch_max(96, 128, 8) == 1


def test_a_batch_that_does_not_fit_is_drawn_one_by_one_and_is_not_tried_again(
    pipeline: TurboPipeline, model: Any, alone: list[np.ndarray[Any, Any]]
) -> None:
    pipeline.batch_limits = {(128, 96): 4, (64, 64): 4}
    told: list[int] = []
    with batches(model, largest=2) as sizes, capture_logs() as logs:
        results = pipeline.draw([ask(pipeline, n, stop_at(9, told)) for n in range(3)])

    assert sizes == [3] + [1] * 24
    assert [np.array_equal(pixels(results[n]), alone[n]) for n in range(3)] == [True] * 3
    assert pipeline.batch_limits == {(128, 96): 2, (64, 64): 4}
    assert [(line["event"], line["rung"]) for line in logs] == [("pipeline.out_of_memory", "batch")]


def test_one_that_was_stopped_before_memory_ran_out_is_not_drawn_again(
    pipeline: TurboPipeline, model: Any
) -> None:
    told: list[int] = []
    refused = iter([2])

    def exhaust(_: Any, given: tuple[Any, ...]) -> None:
        if len(given[0]) == next(refused, 0):
            torch.empty(2**60, dtype=torch.uint8)

    def stop(done: int) -> None:
        told.append(done)
        model.transformer.register_forward_pre_hook(exhaust)
        raise Stopped

    again: list[int] = []
    results = pipeline.draw(
        [ask(pipeline, 0, stop), *(ask(pipeline, n, stop_at(9, again)) for n in (1, 2))]
    )
    model.transformer._forward_pre_hooks.clear()

    assert isinstance(results[0], Stopped)
    assert told == [1]
    assert again == [1] * 2 + [1, 2, 3, 4, 5, 6, 7, 8] * 2
    assert callable(results[1])


def timings(*seconds: float) -> list[Timing]:
    return [Timing((64, 64), 2**n, each) for n, each in enumerate(seconds)]


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ((1.0,), 1),
        ((1.0, 0.951), 1),
        ((1.0, 0.95), 2),
        ((1.0, 0.9, 0.87), 2),
        ((1.0, 0.9, 0.85), 4),
        ((1.0, 0.96, 0.94), 4),  # 2 was not kept, so it is compared with 1
        ((1.0, 1.2, 0.8, 0.79), 4),
    ],
)
def test_a_batch_pays_if_it_saves_a_twentieth_over_the_one_before(
    seconds: tuple[float, ...], best: int
) -> None:
    assert best_batch(timings(*seconds)) == best


def test_the_warm_up_draws_each_size_once_where_there_are_no_batches(
    pipeline: TurboPipeline, model: Any
) -> None:
    with batches(model) as sizes:
        assert pipeline.warm_up([(32, 32), (48, 32)], batch_max=1) == []

    assert sizes == [1] * 8 * 2
    assert pipeline.batch_limits == {}


def test_the_warm_up_measures_batches_up_to_the_largest_and_keeps_what_pays(
    pipeline: TurboPipeline, model: Any
) -> None:
    with batches(model) as sizes:
        measured = pipeline.warm_up([(48, 32)], batch_max=5)

    assert sizes == [1] * 16 + [2] * 16 + [4] * 16  # each once untimed
    assert [(one.size, one.batch) for one in measured] == [((48, 32), n) for n in (1, 2, 4)]
    assert all(one.seconds_per_image > 0 for one in measured)
    assert pipeline.batch_limits == {(48, 32): best_batch(measured)}


def test_memory_that_runs_out_ends_the_search_of_that_size(
    pipeline: TurboPipeline, model: Any
) -> None:
    with batches(model, largest=2) as sizes:
        measured = pipeline.warm_up([(32, 32), (48, 32)], batch_max=8)

    assert [(one.size, one.batch) for one in measured] == [
        ((32, 32), 1),
        ((32, 32), 2),
        ((48, 32), 1),
        ((48, 32), 2),
    ]
    assert sizes.count(4) == 2
    assert 8 not in sizes
    assert all(limit <= 2 for limit in pipeline.batch_limits.values())


def test_memory_that_runs_out_only_when_it_is_timed_ends_the_search_too(
    pipeline: TurboPipeline, model: Any
) -> None:
    sizes: list[int] = []

    def exhaust(_: Any, given: tuple[Any, ...]) -> None:
        sizes.append(len(given[0]))
        if sizes.count(2) == 9:  # after the 8 steps that are not timed
            torch.empty(2**60, dtype=torch.uint8)

    hook = model.transformer.register_forward_pre_hook(exhaust)
    measured = pipeline.warm_up([(32, 32)], batch_max=4)
    hook.remove()

    assert [one.batch for one in measured] == [1]
    assert 4 not in sizes
    assert pipeline.batch_limits == {(32, 32): 1}
