"""The pipeline draws exactly what was asked for, and survives what goes wrong on the way."""

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import close_session
from PIL import Image, ImageStat
from safetensors.torch import load_file

from storage.errors import ResourceExhausted
from worker import loading
from worker.demo import build as demo
from worker.loading import ModelUnavailable, choose
from worker.pipeline import TurboPipeline

CAT = "a red cat on the moon"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the demo model is built in."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def pipeline(models: Path) -> TurboPipeline:
    return loading.load("demo", device="cpu", dtype="float32", cache_dir=models)


@pytest.fixture
def copy(models: Path, pipeline: TurboPipeline, tmp_path: Path) -> Path:
    """A folder of the demo's files, to load from or to damage."""
    return shutil.copytree(demo.ensure(models), tmp_path / "copy")


def ignore(done: int, steps: int) -> None:
    """Nobody waits for progress."""


def draw(pipeline: TurboPipeline, prompt: str = CAT, **changed: int) -> Image.Image:
    asked = {"width": 64, "height": 64, "seed": 1} | changed
    return pipeline(prompt, on_step=ignore, **asked)


# --- What is drawn ------------------------------------------------------------------------------


def test_the_same_request_gives_the_same_pixels(pipeline: TurboPipeline) -> None:
    assert draw(pipeline).tobytes() == draw(pipeline).tobytes()


def test_another_seed_or_prompt_gives_another_image(pipeline: TurboPipeline) -> None:
    images = [draw(pipeline), draw(pipeline, seed=2), draw(pipeline, "月亮上的红猫 🐈")]

    assert len({image.tobytes() for image in images}) == 3


@pytest.mark.parametrize("size", [(256, 256), (376, 376), (1000, 700), (17, 31)])
def test_every_size_is_exact(pipeline: TurboPipeline, size: tuple[int, int]) -> None:
    image = draw(pipeline, width=size[0], height=size[1])

    assert (image.size, image.mode) == (size, "RGB")


def test_an_odd_size_is_the_middle_of_the_next_that_can_be_drawn(pipeline: TurboPipeline) -> None:
    drawn = draw(pipeline, width=112, height=96)

    assert draw(pipeline, width=100, height=90).tobytes() == drawn.crop((6, 3, 106, 93)).tobytes()


def test_the_demo_draws_texture_in_every_colour(pipeline: TurboPipeline) -> None:
    deviations = ImageStat.Stat(draw(pipeline, width=128, height=128)).stddev

    assert all(20 < deviation < 110 for deviation in deviations)  # of 255; 0 is flat


def test_a_prompt_longer_than_the_model_reads_is_drawn(pipeline: TurboPipeline) -> None:
    assert draw(pipeline, "红" * 4000).size == (64, 64)


# --- While it is drawn --------------------------------------------------------------------------


def test_each_of_the_eight_steps_is_told(pipeline: TurboPipeline) -> None:
    told: list[tuple[int, int]] = []
    pipeline(CAT, width=64, height=64, seed=1, on_step=lambda *step: told.append(step))

    assert told == [(done, 8) for done in range(1, 9)]


def test_nothing_is_kept_for_a_gradient(pipeline: TurboPipeline) -> None:
    modes: set[bool] = set()
    pipeline(
        CAT,
        width=64,
        height=64,
        seed=1,
        on_step=lambda *_: modes.add(torch.is_inference_mode_enabled()),
    )

    assert modes == {True}


def test_a_drawing_that_is_stopped_leaves_the_next_one_as_it_would_have_been(
    pipeline: TurboPipeline,
) -> None:
    class Stopped(Exception):
        pass

    def stop(done: int, steps: int) -> None:
        if done == 3:
            raise Stopped

    undisturbed = draw(pipeline)
    with pytest.raises(Stopped):
        pipeline(CAT, width=96, height=64, seed=5, on_step=stop)

    assert draw(pipeline).tobytes() == undisturbed.tobytes()


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(2**60, dtype=torch.uint8), lambda: bytearray(2**60)],
    ids=["torch", "python"],
)
def test_memory_that_runs_out_is_told_given_back_and_the_next_image_is_drawn(
    pipeline: TurboPipeline, allocate: Callable[[], object]
) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    def exhaust(done: int, steps: int) -> None:
        for_this_image = torch.empty(8)
        kept.append(weakref.ref(for_this_image))
        allocate()

    undisturbed = draw(pipeline)
    with pytest.raises(ResourceExhausted, match="smaller size") as told:
        pipeline(CAT, width=64, height=64, seed=1, on_step=exhaust)

    assert told.value.__cause__ is not None  # the traceback is still there, what it held is not
    assert kept[0]() is None
    assert draw(pipeline).tobytes() == undisturbed.tobytes()


def test_a_bug_is_not_told_as_a_lack_of_memory(pipeline: TurboPipeline) -> None:
    def fail(done: int, steps: int) -> None:
        torch.empty(2) @ torch.empty(3)

    with pytest.raises(RuntimeError, match="size"):
        pipeline(CAT, width=64, height=64, seed=1, on_step=fail)


# --- How it is loaded ---------------------------------------------------------------------------

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("asked", "machine", "chosen"),
    [
        (("auto", "auto"), (True, False, True), ("cuda", BFLOAT16)),
        (("auto", "auto"), (True, False, False), ("cuda", FLOAT32)),
        (("auto", "auto"), (False, True, True), ("mps", BFLOAT16)),
        (("auto", "auto"), (False, True, False), ("mps", FLOAT32)),
        (("auto", "auto"), (False, False, False), ("cpu", FLOAT32)),
        (("cpu", "auto"), (True, False, True), ("cpu", FLOAT32)),
        (("cuda:1", "auto"), (True, False, True), ("cuda:1", BFLOAT16)),
        (("auto", "float16"), (True, False, True), ("cuda", FLOAT16)),
        (("cpu", "bfloat16"), (False, False, False), ("cpu", BFLOAT16)),
    ],
)
def test_auto_is_the_best_that_the_machine_has_and_anything_else_is_kept(
    asked: tuple[str, str], machine: tuple[bool, bool, bool], chosen: tuple[str, torch.dtype]
) -> None:
    cuda, mps, bfloat16 = machine

    assert choose(*asked, cuda=cuda, mps=mps, bfloat16=bfloat16) == chosen


def test_a_folder_draws_like_the_demo_it_was_copied_from(
    pipeline: TurboPipeline, copy: Path
) -> None:
    loaded = loading.load(str(copy), device="cpu", dtype="auto", cache_dir=copy)

    assert draw(loaded).tobytes() == draw(pipeline).tobytes()
    assert (loaded.model, loaded.device, loaded.dtype) == (str(copy), "cpu", "float32")


def test_the_precision_asked_for_is_the_one_that_draws(pipeline: TurboPipeline, copy: Path) -> None:
    loaded = loading.load(str(copy), device="cpu", dtype="bfloat16", cache_dir=copy)

    assert loaded.dtype == "bfloat16"
    assert draw(loaded).tobytes() != draw(pipeline).tobytes()


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"model": "/nowhere/z-image"}, "'/nowhere/z-image' could not be loaded from the"),
        ({"dtype": "float8"}, "dtype float8: the dtype is not one of auto"),
        ({"device": "toaster"}, "device toaster"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_line(
    models: Path, asked: dict[str, str], reason: str
) -> None:
    wanted = {"model": "demo", "device": "cpu", "dtype": "float32"} | asked
    with pytest.raises(ModelUnavailable, match=reason) as told:
        loading.load(**wanted, cache_dir=models)

    assert "\n" not in str(told.value)


def test_weights_that_are_a_pickle_are_refused(copy: Path) -> None:
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()

    with pytest.raises(ModelUnavailable, match=r"as a folder.*safetensors"):
        loading.load(str(copy), device="cpu", dtype="auto", cache_dir=copy)


def test_a_folder_of_another_kind_of_model_is_refused(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    index["transformer"] = index["vae"]
    (copy / "model_index.json").write_text(json.dumps(index))
    shutil.copytree(copy / "vae", copy / "transformer", dirs_exist_ok=True)

    with pytest.raises(ModelUnavailable, match="is AutoencoderKL, not ZImageTransformer2DModel"):
        loading.load(str(copy), device="cpu", dtype="auto", cache_dir=copy)


def test_a_hub_that_does_not_answer_is_named_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    close_session()  # the hub's client reads the variable when it is made
    try:
        with pytest.raises(ModelUnavailable, match=r"'a/b'.* hub .*refused") as told:
            loading.load("a/b", device="cpu", dtype="auto", cache_dir=tmp_path)
    finally:
        close_session()

    assert "\n" not in str(told.value)
