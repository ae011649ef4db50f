"""The pipeline draws exactly what was asked for, as diffusers would, and not what was cancelled."""

import json
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import close_session
from PIL import Image, ImageStat
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests import random_model
from worker import loading
from worker.drawing import Drawing, Reading
from worker.loading import ModelUnavailable, choose
from worker.pipeline import TurboPipeline

CAT = "a red cat on the moon"
PROMPTS = ["x", CAT, "月亮上的红猫 🐈 " * 12]
"""20, 40 and 307 tokens."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the random model."""
    return random_model.build(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def pipeline(folder: Path) -> TurboPipeline:
    return loading.load(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def stock() -> Any:
    """The same model, as diffusers draws with it."""
    stock = random_model.assemble(0)
    stock.set_progress_bar_config(disable=True)
    return stock


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The same files, to damage."""
    return shutil.copytree(folder, tmp_path / "copy")


def ignore(done: int) -> None:
    """Nobody waits for progress."""


def ask(
    pipeline: TurboPipeline,
    prompt: str = CAT,
    *,
    width: int = 64,
    height: int = 64,
    seed: int = 1,
    steps: int = 8,
    on_step: Callable[[int], None] = ignore,
) -> Drawing:
    return Drawing(pipeline.read(prompt), width, height, seed, steps, on_step)


def draw(pipeline: TurboPipeline, prompt: str = CAT, **asked: int) -> Image.Image:
    [picture] = pipeline.draw([ask(pipeline, prompt, **asked)])  # type: ignore[arg-type]
    assert not isinstance(picture, BaseException)
    return picture()


def draw_stock(stock: Any, prompt: str, *, seed: int = 1, **asked: Any) -> Any:
    return stock(
        prompt=[prompt],
        num_inference_steps=8,
        guidance_scale=0.0,
        generator=torch.Generator("cpu").manual_seed(seed),
        **asked,
    ).images[0]


def difference(one: Image.Image, other: Image.Image) -> int:
    """The largest between two values of a pixel, of 255."""
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


# --- What is read -------------------------------------------------------------------------------


def test_a_prompt_is_read_as_diffusers_reads_it(pipeline: TurboPipeline, stock: Any) -> None:
    turn = f"<|im_start|>user\n{CAT}<|im_end|>\n<|im_start|>assistant\n"
    reading = pipeline.read(CAT)

    assert list(reading.tokens) == stock.tokenizer(turn).input_ids
    assert reading.given == len(reading.tokens) == 40


def test_a_long_prompt_is_cut_where_diffusers_cuts_it_and_what_was_given_is_known(
    pipeline: TurboPipeline, stock: Any
) -> None:
    prompt = "".join(map(str, range(4000)))
    text = stock.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    whole = stock.tokenizer(text).input_ids
    cut = stock.tokenizer(text, padding="max_length", max_length=512, truncation=True).input_ids

    assert pipeline.read(prompt) == Reading(tuple(cut), given=len(whole))


def test_nobody_changes_the_tokenizer_while_threads_read() -> None:
    """One that is changed while it works says "Already borrowed", to whoever comes then."""
    model = random_model.assemble(0)
    state = model.tokenizer.backend_tokenizer
    model.tokenizer("as its file may set it", truncation=True, max_length=16, padding="max_length")
    assert state.truncation is not None

    pipeline = TurboPipeline(model, model="random", device="cpu", dtype="float32")
    assert (state.truncation, state.padding) == (None, None)

    with ThreadPoolExecutor(4) as pool:
        readings = set(pool.map(pipeline.read, ["cat " * 200] * 40))

    assert [reading.given for reading in readings] == [819]
    assert (state.truncation, state.padding) == (None, None)


def test_the_longest_prompt_that_the_model_bears_is_drawn_and_one_more_token_is_refused(
    stock: Any,
) -> None:
    """The model has 1024 positions, as the real one: 992 tokens are the last multiple of 32 that
    leaves one for the image."""

    def reading(tokens: int) -> TurboPipeline:
        return TurboPipeline(
            stock, model="random", device="cpu", dtype="float32", prompt_tokens_max=tokens
        )

    assert len(reading(992).read("红" * 4000).tokens) == 992
    assert draw(reading(992), "红" * 4000, steps=1).size == (64, 64)
    with pytest.raises(ValueError, match="prompt_tokens_max is 993, but this model bears 992"):
        reading(993)
    with pytest.raises(IndexError):  # so it would have been
        draw_stock(stock, "红" * 4000, width=64, height=64, max_sequence_length=993)


@pytest.mark.parametrize(("positions", "tokens"), [(65, 32), (66, 64), (1024, 992)])
def test_prompts_fill_positions_from_one_on_in_blocks_of_32_and_the_image_needs_another(
    positions: int, tokens: int
) -> None:
    model = random_model.assemble(0)
    model.transformer.register_to_config(axes_lens=[positions, 512, 512])
    TurboPipeline(model, model="", device="cpu", dtype="", prompt_tokens_max=tokens)
    with pytest.raises(ValueError, match=f"bears {tokens} tokens"):
        TurboPipeline(model, model="", device="cpu", dtype="", prompt_tokens_max=tokens + 1)


def test_a_text_encoder_with_fewer_positions_sets_the_limit() -> None:
    model = random_model.assemble(0)
    model.text_encoder.config.max_position_embeddings = 600
    with pytest.raises(ValueError, match="601, but this model bears 600 tokens"):
        TurboPipeline(model, model="", device="cpu", dtype="", prompt_tokens_max=601)


# --- What is drawn ------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_it_draws_what_diffusers_draws(pipeline: TurboPipeline, stock: Any, prompt: str) -> None:
    ours = draw(pipeline, prompt, width=256, height=192)

    assert difference(ours, draw_stock(stock, prompt, width=256, height=192)) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latents_become_the_bytes_that_diffusers_makes_of_them(dtype: torch.dtype) -> None:
    """With the same embeddings, so that nothing else differs."""
    model = random_model.assemble(0).to(dtype)
    model.set_progress_bar_config(disable=True)
    pipeline = TurboPipeline(model, model="random", device="cpu", dtype="")
    ours = draw(pipeline, width=112, height=64)
    [tokens] = [torch.tensor([pipeline.read(CAT).tokens])]
    with torch.no_grad():
        states = model.text_encoder(input_ids=tokens, output_hidden_states=True).hidden_states
    theirs = model(
        prompt_embeds=[states[-2][0]],
        width=112,
        height=64,
        num_inference_steps=8,
        guidance_scale=0.0,
        generator=torch.Generator("cpu").manual_seed(1),
    ).images[0]

    assert ours.tobytes() == theirs.tobytes()


def test_a_text_encoder_with_a_head_is_read_without_it(stock: Any) -> None:
    config = Qwen3Config(**random_model.TEXT_ENCODER, tie_word_embeddings=True)
    writer = Qwen3ForCausalLM(config).eval()
    writer.model.load_state_dict(stock.text_encoder.state_dict())
    writer.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the head is at work"))
    model = random_model.assemble(0)
    model.register_modules(text_encoder=writer)
    model.set_progress_bar_config(disable=True)
    pipeline = TurboPipeline(model, model="random", device="cpu", dtype="float32")

    assert pipeline.text_encoder is writer
    assert difference(draw(pipeline), draw_stock(stock, CAT, width=64, height=64)) <= 1


def test_a_prompt_that_comes_again_is_not_encoded_again(stock: Any) -> None:
    encoded = 0

    def count(*_: object) -> None:
        nonlocal encoded
        encoded += 1

    def encodings(cache_mb: int, *prompts: str) -> int:
        nonlocal encoded
        encoded = 0
        pipeline = TurboPipeline(
            stock, model="random", device="cpu", dtype="float32", embedding_cache_mb=cache_mb
        )
        for prompt in prompts:
            draw(pipeline, prompt, steps=1)
        return encoded

    hook = stock.text_encoder.register_forward_pre_hook(count)
    # 512 tokens of 64 numbers of 4 bytes: 128 KiB, so that 8 have room in 1 MiB.
    long = [f"{number}" * 512 for number in range(9)]
    try:
        assert encodings(1, CAT, CAT) == 1
        assert encodings(0, CAT, CAT) == 2
        assert encodings(1, *long[:8], long[0]) == 8
        assert encodings(1, *long, long[0]) == 10
    finally:
        hook.remove()


def test_the_same_request_gives_the_same_pixels(pipeline: TurboPipeline) -> None:
    assert draw(pipeline).tobytes() == draw(pipeline).tobytes()


def test_another_seed_or_prompt_gives_another_image(pipeline: TurboPipeline) -> None:
    images = [draw(pipeline), draw(pipeline, seed=2), draw(pipeline, "月亮上的红猫 🐈")]

    assert len({image.tobytes() for image in images}) == 3


@pytest.mark.parametrize("size", [(256, 256), (376, 376), (1000, 700), (17, 31)])
def test_every_size_is_exact(pipeline: TurboPipeline, size: tuple[int, int]) -> None:
    image = draw(pipeline, width=size[0], height=size[1], steps=1)

    assert (image.size, image.mode) == (size, "RGB")


def test_an_odd_size_is_the_middle_of_the_next_that_can_be_drawn(pipeline: TurboPipeline) -> None:
    drawn = draw(pipeline, width=112, height=96)

    assert draw(pipeline, width=100, height=90).tobytes() == drawn.crop((6, 3, 106, 93)).tobytes()


def test_what_is_compared_here_is_texture_in_every_colour(pipeline: TurboPipeline) -> None:
    deviations = ImageStat.Stat(draw(pipeline, width=128, height=128)).stddev

    assert all(20 < deviation < 110 for deviation in deviations)  # of 255; 0 is flat


# --- While it is drawn --------------------------------------------------------------------------


def test_each_of_the_eight_steps_is_told(pipeline: TurboPipeline) -> None:
    told: list[int] = []
    pipeline.draw([ask(pipeline, on_step=told.append)])

    assert told == [1, 2, 3, 4, 5, 6, 7, 8]


def test_nothing_is_kept_for_a_gradient(pipeline: TurboPipeline) -> None:
    modes: set[bool] = set()
    decoded: list[bool] = []
    watch = pipeline.text_encoder.register_forward_hook(
        lambda *_: decoded.append(torch.is_grad_enabled())
    )
    try:
        pipeline.draw([ask(pipeline, "new", on_step=lambda _: modes.add(torch.is_grad_enabled()))])
    finally:
        watch.remove()

    assert modes == {False}
    assert decoded == [False]


class Stopped(Exception):
    """What a test's `on_step` raises."""


def stop_at(step: int) -> Callable[[int], None]:
    def on_step(done: int) -> None:
        if done == step:
            raise Stopped

    return on_step


def test_a_drawing_that_is_stopped_leaves_the_next_one_as_it_would_have_been(
    pipeline: TurboPipeline,
) -> None:
    undisturbed = draw(pipeline)
    [stopped] = pipeline.draw([ask(pipeline, width=96, seed=5, on_step=stop_at(3))])

    assert isinstance(stopped, Stopped)
    assert draw(pipeline).tobytes() == undisturbed.tobytes()


@pytest.mark.parametrize("step", [1, 8])
def test_a_drawing_that_is_stopped_holds_no_memory_though_its_error_is_kept(step: int) -> None:
    model = random_model.assemble(0)
    model.set_progress_bar_config(disable=True)
    pipeline = TurboPipeline(model, model="random", device="cpu", dtype="float32")
    made: list[weakref.ref[torch.Tensor]] = []
    model.transformer.register_forward_hook(
        lambda _, __, output: made.append(weakref.ref(output[0][0]))
    )
    [stopped] = pipeline.draw([ask(pipeline, on_step=stop_at(step))])

    assert isinstance(stopped, Stopped)
    assert len(made) == step
    assert [one() for one in made] == [None] * step


def test_a_bug_is_not_told_as_a_lack_of_memory(stock: Any) -> None:
    pipeline = TurboPipeline(stock, model="random", device="cpu", dtype="float32")
    bug = stock.vae.decoder.register_forward_pre_hook(lambda *_: torch.empty(2) @ torch.empty(3))
    try:
        with pytest.raises(RuntimeError, match="size"):
            pipeline.draw([ask(pipeline)])
    finally:
        bug.remove()


def test_the_memory_of_this_process_is_told_in_mib(pipeline: TurboPipeline) -> None:
    told = pipeline.memory_mb()

    assert set(told) == {"used", "peak", "total"}
    assert 100 < told["used"] <= told["peak"] < told["total"]


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


def test_a_folder_draws_like_the_model_it_was_written_from(folder: Path, stock: Any) -> None:
    loaded = loading.load(str(folder), device="cpu", dtype="auto")
    written = TurboPipeline(stock, model="random", device="cpu", dtype="float32")

    assert draw(loaded).tobytes() == draw(written).tobytes()
    assert (loaded.model, loaded.device, loaded.dtype) == (str(folder), "cpu", "float32")


def test_the_precision_asked_for_is_the_one_that_draws(
    pipeline: TurboPipeline, folder: Path
) -> None:
    loaded = loading.load(str(folder), device="cpu", dtype="bfloat16")

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
    folder: Path, asked: dict[str, str], reason: str
) -> None:
    wanted: dict[str, Any] = {"model": str(folder), "device": "cpu", "dtype": "float32"} | asked
    with pytest.raises(ModelUnavailable, match=reason) as told:
        loading.load(**wanted)

    assert "\n" not in str(told.value)


def test_weights_that_are_a_pickle_are_refused(copy: Path) -> None:
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()

    with pytest.raises(ModelUnavailable, match=r"as a folder.*safetensors"):
        loading.load(str(copy), device="cpu", dtype="auto")


def test_a_folder_of_another_kind_of_model_is_refused(copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    index["transformer"] = index["vae"]
    (copy / "model_index.json").write_text(json.dumps(index))
    shutil.copytree(copy / "vae", copy / "transformer", dirs_exist_ok=True)

    with pytest.raises(ModelUnavailable, match="is AutoencoderKL, not ZImageTransformer2DModel"):
        loading.load(str(copy), device="cpu", dtype="auto")


def test_a_hub_that_does_not_answer_is_named_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there
    close_session()  # the hub's client reads the variable when it is made
    try:
        with pytest.raises(ModelUnavailable, match=r"'a/b'.* hub .*refused") as told:
            loading.load("a/b", device="cpu", dtype="auto")
    finally:
        close_session()

    assert "\n" not in str(told.value)
