"""The model from its files: found, checked, and put on a device as the settings say."""

from pathlib import Path

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from worker.demo import build as demo
from worker.pipeline import TurboPipeline

DEMO = "demo"
"""The model name that stands for the small model with random weights."""

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


class ModelUnavailable(Exception):
    """The model cannot be loaded; the message says which, from where, and why, in one sentence."""


def load(model: str, *, device: str, dtype: str, cache_dir: Path) -> TurboPipeline:
    """Load `model` and put it on `device`.

    Args:
        model: a folder in diffusers' layout, an id on the Hugging Face hub, or `demo`. A
            folder and the demo are loaded without a look at the network.
        device: `auto`, or a name that torch knows: `cuda`, `cuda:1`, `mps`, `cpu`.
        dtype: `auto`, `bfloat16`, `float16` or `float32`.
        cache_dir: where the demo model is built. The hub's files have their own cache, which
            `HF_HOME` moves.

    Raises:
        ModelUnavailable: whatever went wrong.
    """
    # Bars are for terminals; between a worker's log lines they are noise.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if model == DEMO:
        place = f"in {cache_dir}"
    elif Path(model).is_dir():
        place = "as a folder"
    else:
        place = "from the Hugging Face hub (there is no folder of this name)"
    try:
        device, precision = choose(
            device,
            dtype,
            cuda=torch.cuda.is_available(),
            mps=torch.backends.mps.is_available(),
            bfloat16=_has_bfloat16(),
        )
        pipeline = ZImagePipeline.from_pretrained(
            demo.ensure(cache_dir) if model == DEMO else model,
            dtype=precision,
            use_safetensors=True,  # never a pickle, which can run code
        )
        # diffusers only warns about this, and would fail at the first customer's image.
        if not isinstance(pipeline.transformer, ZImageTransformer2DModel):
            found = type(pipeline.transformer).__name__
            raise TypeError(f"its transformer is {found}, not ZImageTransformer2DModel")
        pipeline.to(device)
    except Exception as error:  # the libraries raise anything, from KeyError to AssertionError
        raise ModelUnavailable(
            f"The model {model!r} could not be loaded {place}, "
            f"device {device}, dtype {dtype}: {_reason(error)}"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return TurboPipeline(
        pipeline, model=model, device=device, dtype=str(precision).removeprefix("torch.")
    )


def choose(
    device: str, dtype: str, *, cuda: bool, mps: bool, bfloat16: bool
) -> tuple[str, torch.dtype]:
    """Return the device and the precision that `auto` stands for; anything else is kept.

    `cuda` and `mps` say whether torch can use such a device, `bfloat16` whether it computes in
    that. Z-Image is published in bfloat16. A GPU without it gets float32, not float16, whose range
    the weights were not made for (our choice); most CPUs only emulate both, so they get float32.

    Raises:
        ValueError: `dtype` is none that we know.
    """
    if device == "auto":
        device = "cuda" if cuda else "mps" if mps else "cpu"
    if dtype == "auto":
        return device, torch.bfloat16 if bfloat16 and device != "cpu" else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"the dtype is not one of auto, {', '.join(DTYPES)}")
    return device, DTYPES[dtype]


def _reason(error: BaseException) -> str:
    """The first line of what was wrong at the root: 'Connection refused', not 'not cached'."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).partition("\n")[0] or type(error).__name__


def _has_bfloat16() -> bool:
    """Whether the GPU of this machine computes in bfloat16: Ampere and later, or macOS 14."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.backends.mps.is_available() and torch.backends.mps.is_macos_or_newer(14, 0)
