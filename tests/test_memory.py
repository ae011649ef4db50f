"""When memory runs out an image is drawn in less of it, or fails alone; the next is as ever.

Not covered, for want of an accelerator: that weights really move to the machine's memory and back.
The hooks that move them are the real ones, from the CPU to the CPU.
"""

from __future__ import annotations

import json
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from accelerate import cpu_offload  # type: ignore[import-untyped]
from accelerate.hooks import ModelHook, add_hook_to_module  # type: ignore[import-untyped]
from structlog.testing import capture_logs
from transformers import Qwen3Config, Qwen3ForCausalLM

from storage.errors import ResourceExhausted
from tests import random_model
from worker.drawing import Drawing
from worker.memory import Ladder, Offload, Rung, is_out_of_memory, rungs
from worker.pipeline import TurboPipeline

if TYPE_CHECKING:
    from tests.warm import Warm

ALL: tuple[Rung, ...] = ("nothing", "caches", "tiling", "offload")


def refuse() -> object:
    """Ask torch's allocator for more than any machine has."""
    return torch.empty(2**60, dtype=torch.uint8)


def refuse_python() -> object:
    return bytearray(2**60)


@pytest.fixture(scope="module")
def model() -> Any:
    model = random_model.assemble(0)
    model.set_progress_bar_config(disable=True)
    return model


@pytest.fixture
def pipeline(model: Any) -> TurboPipeline:
    return employ(model)


def employ(model: Any, offload: Offload = "none") -> TurboPipeline:
    return TurboPipeline(model, model="random", device="cpu", dtype="float32", offload=offload)


def ask(
    pipeline: TurboPipeline, *, seed: int = 1, on_step: Callable[[int], None] = lambda _: None
) -> Drawing:
    return Drawing(pipeline.read("a fox"), 64, 64, seed, steps=2, on_step=on_step)


def draw(pipeline: TurboPipeline, **asked: Any) -> bytes:
    [picture] = pipeline.draw([ask(pipeline, **asked)])
    assert not isinstance(picture, BaseException)
    return picture().tobytes()


@contextmanager
def before(part: Any, hook: Callable[..., object]) -> Iterator[None]:
    """Call `hook` whenever this part of the model begins to work."""
    handle = part.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# --- A system that refuses ----------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux refuses beyond RLIMIT_AS")
def test_a_system_that_refuses_memory_gets_tiles_then_a_failure_and_then_images_as_before(
    warm_model: Warm,
) -> None:
    run = warm_model.run("-m", "tests.short_of_memory")

    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout.splitlines()[-1])

    assert told["tiled"].pop("sha256", None), told["tiled"]
    # The step is told once: what ran out was the decoder, and only that was done again.
    assert told["tiled"] == {"steps": [1], "rungs": ["tiling"], "size": [2048, 512]}
    assert told["exhausted"].pop("steps") in ([], [1])
    assert told["exhausted"] == {"rungs": [None], "failed": "ResourceExhausted"}
    assert told["after"] == told["before"]
    assert told["after"]["rungs"] == []


# --- The ladder ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "offload", "ladder"),
    [
        ("cpu", "none", ALL[:3]),
        ("cuda", "none", ALL),
        ("cuda:1", "none", ALL),
        ("mps", "none", ALL),
        ("cuda", "model", ALL[:3]),
        ("cuda", "sequential", ALL[:3]),
    ],
)
def test_weights_are_moved_where_there_is_an_accelerator_and_they_do_not_move_anyway(
    device: str, offload: Offload, ladder: tuple[Rung, ...]
) -> None:
    assert rungs(device, offload) == ladder


class Climber:
    """A ladder for the model, with all rungs, and what was there at each attempt."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.lock = threading.RLock()
        self.freed = 0
        self.seen: list[tuple[bool, bool, bool, int]] = []
        self.ladder = Ladder(
            model, device="cpu", rungs=ALL, weights_lock=self.lock, free_caches=self._free
        )

    def look(self) -> None:
        """Write down whether there are tiles, and hooks, and others may use the weights, and how
        often caches were freed."""
        hooked = hasattr(self.model.transformer, "_hf_hook")
        with ThreadPoolExecutor(1) as pool:
            free = pool.submit(self._lock_is_free).result()
        self.seen.append((self.model.vae.use_tiling, hooked, free, self.freed))

    def refuse_and_look(self) -> None:
        self.look()
        refuse()

    def _lock_is_free(self) -> bool:
        if not self.lock.acquire(blocking=False):
            return False
        self.lock.release()
        return True

    def _free(self) -> None:
        self.freed += 1


def test_caches_then_tiles_then_moved_weights_then_a_failure_and_all_is_as_before(
    model: Any,
) -> None:
    climber = Climber(model)
    with capture_logs() as logs, pytest.raises(ResourceExhausted, match="smaller size"):
        climber.ladder.climb(climber.refuse_and_look)
    climber.look()

    assert climber.seen == [
        (False, False, True, 0),
        (False, False, True, 1),
        (True, False, True, 2),
        (True, True, False, 3),
        (False, False, True, 4),
    ]
    assert [(line["event"], line["rung"]) for line in logs] == [("pipeline.out_of_memory", None)]


@pytest.mark.parametrize("rung", ALL)
def test_the_first_rung_that_helps_is_the_last_that_is_climbed_and_the_log_names_it(
    model: Any, rung: Rung
) -> None:
    climber = Climber(model)
    tries: list[Rung] = []

    def work() -> None:
        tries.append(ALL[len(tries)])
        if tries[-1] != rung:
            refuse()

    with capture_logs() as logs:
        climber.ladder.climb(work)
    climber.look()

    assert tries == list(ALL[: ALL.index(rung) + 1])
    assert [line["rung"] for line in logs] == [rung] * (rung != "nothing")
    assert climber.seen[0][:3] == (False, False, True)


def test_a_tile_is_512_pixels_whatever_the_model_says(model: Any) -> None:
    tiles: list[tuple[int, ...]] = []
    decoded: list[tuple[int, int]] = []
    climber = Climber(model)
    latents = torch.zeros(1, 16, 8, 72)

    def work() -> None:
        with torch.no_grad():
            decoded.append(model.vae.decode(latents).sample.shape[-2:])
        if not model.vae.use_tiling:
            refuse()

    with before(model.vae.decoder, lambda _, given: tiles.append(tuple(given[0].shape[-2:]))):
        climber.ladder.climb(work)

    assert tiles == [(8, 72), (8, 72), (8, 64), (8, 24)]
    assert decoded == [(64, 576)] * 3


def test_an_image_is_drawn_while_weights_move_and_after_it(model: Any) -> None:
    pipeline = employ(model)
    climber = Climber(model)
    undisturbed = draw(pipeline)
    drawn: list[bytes] = []

    def work() -> None:
        if not hasattr(model.transformer, "_hf_hook"):
            refuse()
        drawn.append(draw(pipeline, seed=2))  # its own ladder begins with full speed

    climber.ladder.climb(work)

    assert drawn == [draw(pipeline, seed=2)]
    assert draw(pipeline) == undisturbed


def test_weights_that_cannot_come_back_are_kept_from_others_until_the_next_image(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process took the memory meanwhile. The next image begins with trying again."""
    climber = Climber(model)
    back = model.to
    refusals = iter([True])

    def to(device: str, **options: bool) -> object:
        if not options and next(refusals, False):  # with options it is diffusers', on the way out
            refuse()
        return back(device, **options)

    monkeypatch.setattr(model, "to", to)

    def work() -> None:
        if not hasattr(model.transformer, "_hf_hook"):
            refuse()

    with capture_logs() as logs:
        climber.ladder.climb(work)
    climber.look()
    climber.ladder.climb(climber.look)

    assert [line["event"] for line in logs] == [
        "pipeline.out_of_memory",
        "pipeline.weights_not_back",
    ]
    assert [free for _, _, free, _ in climber.seen] == [False, True]


def test_a_bug_is_no_lack_of_memory_and_leaves_full_speed_behind(model: Any) -> None:
    climber = Climber(model)

    def work() -> None:
        climber.look()
        if model.vae.use_tiling:
            raise ValueError("a bug")
        refuse()

    with pytest.raises(ValueError, match="a bug"):
        climber.ladder.climb(work)
    climber.look()

    assert [tiles for tiles, _, _, _ in climber.seen] == [False, False, True, False]
    assert not is_out_of_memory(RuntimeError("size mismatch"))


# --- The pipeline on it -------------------------------------------------------------------------


@pytest.mark.parametrize("allocate", [refuse, refuse_python], ids=["torch", "python"])
@pytest.mark.parametrize("part", ["text_encoder", "transformer", "decoder"])
def test_memory_that_runs_out_is_told_given_back_and_the_next_image_is_drawn(
    model: Any, allocate: Callable[[], object], part: str
) -> None:
    pipeline = employ(model)
    kept: list[weakref.ref[torch.Tensor]] = []

    def exhaust(*_: object) -> None:
        for_this_image = torch.empty(8)
        kept.append(weakref.ref(for_this_image))
        allocate()

    with before(model.vae.decoder if part == "decoder" else getattr(model, part), exhaust):
        [told] = pipeline.draw([ask(pipeline)])

    assert isinstance(told, ResourceExhausted)
    assert told.__cause__ is not None  # the traceback is still there, what it held is not
    assert [one() for one in kept] == [None] * 3
    assert draw(pipeline) == draw(employ(model))


def test_only_the_image_that_does_not_fit_fails(pipeline: TurboPipeline, model: Any) -> None:
    """The batch does not fit, and of its images the second one does not fit alone."""
    alone = [draw(pipeline, seed=seed) for seed in (1, 3)]
    with_seed_2 = torch.Generator().manual_seed(2)
    noise = torch.randn(1, 16, 8, 8, generator=with_seed_2)

    def exhaust(_: Any, given: tuple[Any, ...]) -> None:
        if len(given[0]) > 1 or torch.equal(given[0][0][:, 0], noise[0]):
            refuse()

    with before(model.transformer, exhaust):
        first, second, third = pipeline.draw([ask(pipeline, seed=seed) for seed in (1, 2, 3)])

    assert isinstance(second, ResourceExhausted)
    assert pipeline.batch_max(64, 64, 2) == 1  # a batch that fails raises no limit
    assert [callable(one) and one().tobytes() for one in (first, third)] == alone


def test_embeddings_that_are_kept_are_given_back_first(pipeline: TurboPipeline, model: Any) -> None:
    encoded: list[object] = []
    refusals = iter([True])

    def exhaust(*_: object) -> None:
        if next(refusals, False):
            refuse()

    with before(model.text_encoder, lambda *_: encoded.append(1)):
        draw(pipeline)
        with before(model.transformer, exhaust), capture_logs() as logs:
            draw(pipeline)

    assert len(encoded) == 2
    assert [line["rung"] for line in logs] == ["caches"]


# --- Where weights always move ------------------------------------------------------------------


def offloaded(offload: Offload) -> tuple[Any, TurboPipeline]:
    model = random_model.assemble(0)
    model.set_progress_bar_config(disable=True)
    if offload == "model":
        model.enable_model_cpu_offload(device="cpu")
    else:
        # As diffusers does it, which calls the CPU "cpu:0" and then takes it for another device.
        for part in (model.text_encoder, model.transformer, model.vae):
            cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
    return model, employ(model, offload)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_with_weights_that_always_move_the_same_image_is_drawn_and_nobody_else_uses_them(
    pipeline: TurboPipeline, offload: Offload
) -> None:
    class Stopped(Exception):
        pass

    model, moving = offloaded(offload)
    free: list[bool] = []

    def look(done: int) -> None:
        with ThreadPoolExecutor(1) as pool:
            free.append(pool.submit(moving.weights_lock.acquire, blocking=False).result())

    def stop(done: int) -> None:
        raise Stopped

    hooks = [hasattr(part, "_hf_hook") for part in (model.text_encoder, model.vae)]
    expected = draw(pipeline)
    [stopped] = moving.draw([ask(moving, on_step=stop)])

    assert isinstance(stopped, Stopped)
    assert draw(moving, on_step=look) == expected
    assert free == [False, False]
    assert hooks == [hasattr(part, "_hf_hook") for part in (model.text_encoder, model.vae)]
    assert hooks == [True, True]
    assert moving.weights_lock.acquire(blocking=False)


@pytest.mark.parametrize("ended", ["drawn", "stopped", "out of memory"])
def test_however_a_drawing_ends_it_leaves_no_model_on_the_device(ended: str) -> None:
    """Diffusers moves the last one out only at its own regular end; two would not fit."""
    model, moving = offloaded("model")
    moved_out: list[str] = []
    end = model.maybe_free_model_hooks

    def count_and_end() -> None:
        moved_out.append(ended)
        end()

    model.maybe_free_model_hooks = count_and_end

    def stop(done: int) -> None:
        raise ValueError

    if ended == "drawn":
        draw(moving)
        assert moved_out == [ended] * 2  # the transformer, then the decoder
    elif ended == "stopped":
        moving.draw([ask(moving, on_step=stop)])
        assert moved_out == [ended]
    else:
        with before(model.transformer, lambda *_: refuse()):
            moving.draw([ask(moving)])
        assert moved_out == [ended] * 3


def test_a_text_encoder_that_can_write_is_brought_back_before_its_inner_model_reads() -> None:
    """Its hook hangs on the outer model, which is not called."""
    brought: list[Any] = []

    class Bring(ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            brought.append(module)
            return args, kwargs

    model = random_model.assemble(0)
    writer = Qwen3ForCausalLM(Qwen3Config(**random_model.TEXT_ENCODER))
    add_hook_to_module(writer, Bring())
    model.register_modules(text_encoder=writer)
    model.set_progress_bar_config(disable=True)
    draw(employ(model))

    assert brought == [writer]
