"""What makes the transformer faster or smaller: how it attends, compiled, quantised, offloaded.

Each is tried on a toy of the same blocks first. What this machine cannot do is then a sentence at
the start, and no failure of the first customer's image.
"""

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_z_image import ZSingleStreamAttnProcessor

if TYPE_CHECKING:
    from worker.settings import WorkerSettings

QUANTISED = (".attention.", ".feed_forward.")
"""Where a block's large layers are: 97 % of the transformer's weights.

All others keep their precision: they are small and every token depends on them. These are the
embedders of time, caption and patches, the final layer, and what scales and gates each block
(`adaLN_modulation`). With all layers in float8 the images were noise (LPIPS 0.74), without such
ones they were close (0.07): https://github.com/vllm-project/vllm-omni/pull/2795
"""

COMPILED: dict[str, Any] = {"dynamic": True}
"""One compilation for all sizes and lengths of prompts: with fixed shapes each pair of them would
be compiled, and after eight none any more. Not `fullgraph`, with which that limit would be an error
of a customer's image; there is no break in the graph, which a test shows."""

ATTENTION_BACKENDS = sorted(backend.value for backend in AttentionBackendName)

COMPILATIONS_MAX = 16
"""Of one function, before torch gives up on it. A block has eight: with and without modulation,
alone and in batches, with a mask and without."""

TOY: dict[str, Any] = {
    "dim": 384,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 3,  # of 128 numbers each, as in the real one: backends are particular about it
    "n_kv_heads": 3,
    "cap_feat_dim": 64,
}
TOY_TOKENS, TOY_SIDE = 32, 16
"""Of its caption, and of its latents. An int8 product needs more than 16 rows on a GPU."""


@dataclass(frozen=True)
class Switches:
    """How fast the model shall draw and in how much memory; the settings of the same names."""

    attention_backend: str = "native"
    compile: bool = False
    quantization: Literal["none", "int8", "float8"] = "none"
    vae_channels_last: bool = False
    offload: Literal["none", "model", "sequential"] = "none"
    prompt_tokens_max: int = 512
    embedding_cache_mb: int = 64


SAFE = Switches()
"""What every machine can do."""


def switches_of(settings: "WorkerSettings") -> Switches:
    return Switches(**{field.name: getattr(settings, field.name) for field in fields(Switches)})


def check(switches: Switches, device: str, dtype: torch.dtype) -> None:
    """Try what is switched on, before the weights are read.

    Raises:
        ValueError: this machine cannot do it; the message names the setting.
    """
    if switches.offload != "none" and torch.device(device).type == "cpu":
        raise ValueError(
            f"ZIMAGE_OFFLOAD={switches.offload} needs a GPU: on a CPU all weights are in the "
            "machine's memory already"
        )
    if switches.offload == "sequential" and (switches.compile or switches.quantization != "none"):
        raise ValueError(
            "ZIMAGE_OFFLOAD=sequential moves single layers, which can be neither compiled nor "
            "quantised: use ZIMAGE_OFFLOAD=model, or switch ZIMAGE_COMPILE and "
            "ZIMAGE_QUANTIZATION off"
        )
    for name, wanted in {
        "ZIMAGE_ATTENTION_BACKEND": Switches(attention_backend=switches.attention_backend),
        "ZIMAGE_QUANTIZATION": Switches(quantization=switches.quantization),
        "ZIMAGE_COMPILE": Switches(compile=switches.compile),
    }.items():
        fault = find_fault(wanted, device, dtype)
        if fault is not None:
            value = getattr(wanted, name.removeprefix("ZIMAGE_").lower())
            raise ValueError(f"{name}={str(value).lower()} cannot be used here: {fault}")


def find_fault(switches: Switches, device: str, dtype: torch.dtype) -> str | None:
    """Return why a toy with `switches` cannot be run on `device`, in one line, or None.

    Of compiling only the compiler is tried.
    """
    if switches == SAFE:
        return None
    try:
        if switches.compile:  # the toy would take as long as the model will
            torch.compile(torch.nn.functional.silu)(torch.ones(8, device=device, dtype=dtype))
            return None
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            toy = ZImageTransformer2DModel(**TOY)
            torch.nn.Module.to(toy, device, dtype)  # diffusers' own has something to say
            apply(switches, toy, device)
            latents = torch.ones(16, 1, TOY_SIDE, TOY_SIDE, device=device, dtype=dtype)
            caption = torch.ones(TOY_TOKENS, TOY["cap_feat_dim"], device=device, dtype=dtype)
            toy([latents], torch.zeros(1, device=device, dtype=dtype), [caption])
    except Exception as error:  # whatever a backend, a compiler or a quantiser raises
        return reason(error)
    return None


def usable_backends(device: str, dtype: torch.dtype) -> Iterator[str]:
    """Those that a toy could be drawn with. What would have to be fetched first is not tried, and
    neither is `flex`, which works everywhere and slowly: it is not fused unless compiled alone."""
    for backend in ATTENTION_BACKENDS:
        if backend != "flex" and not backend.endswith("_hub"):
            with warnings.catch_warnings(action="ignore"):
                if find_fault(Switches(attention_backend=backend), device, dtype) is None:
                    yield backend


def apply(switches: Switches, transformer: ZImageTransformer2DModel, device: str) -> None:
    """Make `transformer` attend, quantise and compile as `switches` say, in this order."""
    if switches.attention_backend != SAFE.attention_backend:
        _attend_by(switches.attention_backend, transformer)
    if switches.quantization != "none":
        _quantise(switches.quantization, transformer, device)
    if switches.compile:
        torch._dynamo.config.recompile_limit = COMPILATIONS_MAX
        transformer.compile_repeated_blocks(**COMPILED)


def place(switches: Switches, pipeline: ZImagePipeline, device: str) -> None:
    """Put the weights where they are to be."""
    match switches.offload:
        case "none":
            pipeline.to(device)
        case "model":
            pipeline.enable_model_cpu_offload(device=device)
        case "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)


def reason(error: BaseException) -> str:
    """The first line of what was wrong at the root: 'Connection refused', not 'not cached'."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] or type(error).__name__


class _MaskedByTorch(ZSingleStreamAttnProcessor):  # type: ignore[misc]
    """Attends as was chosen, and by torch where there is a mask, which most backends cannot bear.

    There is one in a batch whose prompts differ in length by more than the padding to 32 tokens.
    """

    def __init__(self, backend: AttentionBackendName) -> None:
        super().__init__()
        self._attention_backend = backend
        self._masked = ZSingleStreamAttnProcessor()
        self._masked._attention_backend = AttentionBackendName.NATIVE

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> Any:
        if attention_mask is not None:
            return self._masked(
                attn, hidden_states, encoder_hidden_states, attention_mask, freqs_cis
            )
        return super().__call__(attn, hidden_states, encoder_hidden_states, None, freqs_cis)


def _attend_by(backend: str, transformer: ZImageTransformer2DModel) -> None:
    if backend.lower() not in ATTENTION_BACKENDS:
        raise ValueError(f"diffusers knows {', '.join(ATTENTION_BACKENDS)}")
    # Without the context the choice would be every other model's of this process as well.
    with attention_backend(AttentionBackendName.NATIVE):
        transformer.set_attention_backend(backend)  # says what is missing, or fetches it
    for module in transformer.modules():
        if isinstance(module, Attention):
            module.set_processor(_MaskedByTorch(AttentionBackendName(backend.lower())))


def _quantise(
    quantization: Literal["int8", "float8"], transformer: ZImageTransformer2DModel, device: str
) -> None:
    """Quantise the large layers, each moved to `device` first, so that all never lie there whole.

    Both quantise the activations as well, row by row, because that is what a GPU's tensor cores
    multiply: int8 weights alone would only save memory, and are slower than bfloat16.
    """
    if sys.modules.get("torchao", ...) is None:  # hidden from diffusers, in worker/__init__.py
        del sys.modules["torchao"]
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    config = (
        Int8DynamicActivationInt8WeightConfig()
        if quantization == "int8"
        else Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    )
    quantize_(transformer, config, filter_fn=_is_large, device=device)


def _is_large(module: torch.nn.Module, name: str) -> bool:
    return isinstance(module, torch.nn.Linear) and any(part in name for part in QUANTISED)
