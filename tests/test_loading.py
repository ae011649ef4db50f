"""A switch does what it says and changes no image much, or is refused in one sentence at once."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests import random_model
from worker import loading, switches
from worker.drawing import Drawing
from worker.loading import ModelUnavailable
from worker.pipeline import TurboPipeline
from worker.settings import WorkerSettings
from worker.switches import SAFE, Switches

CAT, LONG = "a red cat on the moon", "a red cat on the moon, " * 8
EXEMPT = ("t_embedder", "cap_embedder", "all_x_embedder", "all_final_layer", "adaLN_modulation")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model.build(tmp_path_factory.mktemp("model"))


def load(model: Path, **switched: Any) -> TurboPipeline:
    return loading.load(str(model), device="cpu", dtype="float32", switches=Switches(**switched))


def transformer(pipeline: TurboPipeline) -> Any:
    return pipeline._pipeline.transformer


def draw(pipeline: TurboPipeline, *prompts: str, side: int = 64) -> list[NDArray[np.int16]]:
    drawings = [
        Drawing(pipeline.read(prompt), side, side, seed=1, steps=2, on_step=lambda _: None)
        for prompt in prompts
    ]
    return [pixels(drawn) for drawn in pipeline.draw(drawings)]


def pixels(drawn: Any) -> NDArray[np.int16]:
    if isinstance(drawn, BaseException):
        raise drawn
    return np.asarray(drawn()).astype(np.int16)


def close(images: Sequence[NDArray[np.int16]], others: Sequence[NDArray[np.int16]]) -> bool:
    """No value differs by more than 3 of 255."""
    return all(
        np.abs(image - other).max() <= 3 for image, other in zip(images, others, strict=True)
    )


@pytest.fixture(scope="module")
def safe(model: Path) -> list[NDArray[np.int16]]:
    """What is drawn with nothing switched on."""
    return draw(load(model), CAT, LONG)


# --- What is switched on ------------------------------------------------------------------------


def test_int8_quantises_the_large_layers_and_leaves_the_sensitive_ones_alone(
    model: Path, safe: list[NDArray[np.int16]]
) -> None:
    pipeline = load(model, quantization="int8")
    plain = dict(transformer(load(model)).named_parameters())
    quantised = {
        name: parameter
        for name, parameter in transformer(pipeline).named_parameters()
        if type(parameter.data) is not torch.Tensor
    }

    blocks = random_model.TRANSFORMER["n_layers"] + 2 * random_model.TRANSFORMER["n_refiner_layers"]
    assert len(quantised) == blocks * (4 + 3)  # query, key, value and out; three feed forward
    assert not [name for name in quantised if any(exempt in name for exempt in EXEMPT)]
    assert all(
        torch.equal(parameter, plain[name])
        for name, parameter in transformer(pipeline).named_parameters()
        if name not in quantised
    )
    drawn = draw(pipeline, CAT, LONG)
    assert close(drawn, safe)
    assert not np.array_equal(drawn[0], safe[0])


def test_a_backend_that_bears_no_mask_draws_prompts_of_unequal_length_together(
    model: Path, safe: list[NDArray[np.int16]]
) -> None:
    pipeline = load(model, attention_backend="_native_flash")
    chosen = {
        module.processor._attention_backend.value
        for module in transformer(pipeline).modules()
        if hasattr(module, "processor")
    }

    assert chosen == {"_native_flash"}
    assert close(draw(pipeline, CAT, LONG), safe)


def test_a_backend_is_the_choice_of_one_model_and_not_of_the_process(
    model: Path, safe: list[NDArray[np.int16]]
) -> None:
    load(model, attention_backend="_native_flash")

    assert close(draw(load(model), CAT, LONG), safe)


def test_the_vae_may_keep_its_numbers_channels_last(
    model: Path, safe: list[NDArray[np.int16]]
) -> None:
    pipeline = load(model, vae_channels_last=True)
    weight = pipeline._pipeline.vae.decoder.conv_in.weight

    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert close(draw(pipeline, CAT, LONG), safe)


# torch's own compiler, as it is imported.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiling_is_of_every_block(model: Path) -> None:
    plain = transformer(load(model))
    switches.apply(Switches(compile=True), plain, "cpu")
    compiled = [
        name for name, module in plain.named_modules() if module._compiled_call_impl is not None
    ]

    assert compiled == ["noise_refiner.0", "context_refiner.0", "layers.0", "layers.1"]


def test_a_block_is_one_graph_for_all_sizes_and_lengths_of_prompts(model: Path) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    pipeline = load(model)
    transformer(pipeline).compile_repeated_blocks(backend=keep, fullgraph=True, **switches.COMPILED)
    draw(pipeline, CAT)
    compiled = len(graphs)
    draw(pipeline, LONG, side=96)
    torch.compiler.reset()

    assert compiled == len(graphs) == 3  # two kinds of refiners, and the layers


def test_prompts_are_read_as_far_as_is_set(model: Path) -> None:
    reading = load(model, prompt_tokens_max=40).read(LONG)

    assert (len(reading.tokens), reading.given > 40) == (40, True)


# --- What is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switched", "sentence"),
    [
        ({"attention_backend": "flash"}, "ZIMAGE_ATTENTION_BACKEND=flash cannot .*flash-attn"),
        ({"attention_backend": "_native_cudnn"}, "_native_cudnn cannot be used here: No viable"),
        ({"attention_backend": "quick"}, "=quick cannot be used here: diffusers knows .*, native,"),
        ({"quantization": "float8"}, "ZIMAGE_QUANTIZATION=float8 cannot .* capability"),
        ({"offload": "model"}, "ZIMAGE_OFFLOAD=model needs a GPU"),
        ({"offload": "sequential"}, "ZIMAGE_OFFLOAD=sequential needs a GPU"),
        ({"prompt_tokens_max": 993}, "is 993, but this model bears 992 tokens"),
    ],
)
def test_what_this_machine_cannot_do_is_told_in_one_sentence(
    model: Path, switched: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ModelUnavailable, match=sentence) as told:
        load(model, **switched)

    assert "\n" not in str(told.value)


@pytest.mark.parametrize("switched", [{"compile": True}, {"quantization": "int8"}])
def test_single_layers_that_move_are_neither_compiled_nor_quantised(
    switched: dict[str, Any],
) -> None:
    with pytest.raises(ValueError, match="neither compiled nor quantised"):
        switches.check(Switches(offload="sequential", **switched), "cuda", torch.bfloat16)


def test_a_switch_is_tried_before_the_weights_are_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="ZIMAGE_OFFLOAD"):
        loading.load(
            str(tmp_path),  # a folder without a model
            device="cpu",
            dtype="auto",
            switches=Switches(offload="model"),
        )


def test_nothing_is_tried_where_nothing_is_switched_on() -> None:
    assert switches.find_fault(SAFE, "no such device", torch.float32) is None


# --- By settings --------------------------------------------------------------------------------


def test_every_switch_is_a_setting_with_the_same_default() -> None:
    changed = WorkerSettings(
        attention_backend="sage",
        compile=True,
        quantization="int8",
        vae_channels_last=True,
        offload="model",
        prompt_tokens_max=900,
        embedding_cache_mb=1,
    )

    assert loading.switches_of(WorkerSettings()) == SAFE
    assert loading.switches_of(changed) == Switches("sage", True, "int8", True, "model", 900, 1)
    assert len(fields(Switches)) == 7


def test_a_gpu_is_warmed_up_at_the_models_own_size_and_a_cpu_is_not() -> None:
    named = WorkerSettings(warmup_sizes=["512x768", "64x64"])

    assert loading.warmup_sizes(WorkerSettings(), "cuda:1") == [(1024, 1024)]
    assert loading.warmup_sizes(WorkerSettings(), "cpu") == []
    assert loading.warmup_sizes(named, "cpu") == [(512, 768), (64, 64)]
