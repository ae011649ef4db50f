"""The model from its files: found, checked, and put on a device as the settings say."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from worker import switches as speed
from worker.canvas import Canvas, find_canvas
from worker.demo import WEIGHTS
from worker.memory import is_out_of_memory
from worker.pipeline import TurboPipeline
from worker.precision import multiplies_bfloat16
from worker.switches import SAFE
from worker.switches import Switches as Switches
from worker.switches import switches_of as switches_of

if TYPE_CHECKING:
    from worker.settings import WorkerSettings

DEMO = "demo"
"""The model name that stands for the small model that comes with the service."""

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}

LIBRARIES_LOGGING = (diffusers_logging, transformers_logging)

GPU_SIZES = [(1024, 1024)]
"""Width and height in pixels, drawn before the first task unless the settings name others."""


class ModelUnavailable(Exception):
    """The model cannot be loaded; the message says which, from where, and why, in one sentence."""


def load(model: str, *, device: str, dtype: str, switches: Switches = SAFE) -> TurboPipeline:
    """Load `model` and put it on `device`.

    Args:
        model: a folder in diffusers' layout, an id on the Hugging Face hub, or `demo`. A
            folder and the demo are loaded without a look at the network, and may hold a canvas
            (`worker/canvas.py`). The hub's files have their own cache, which `HF_HOME` moves.
        device: `auto`, or a name that torch knows: `cuda`, `cuda:1`, `mps`, `cpu`.
        dtype: `auto`, `bfloat16`, `float16` or `float32`.
        switches: what makes it faster or smaller. They are tried before the weights are read.

    Raises:
        ModelUnavailable: whatever went wrong.
    """
    for logging in LIBRARIES_LOGGING:
        logging.disable_progress_bar()  # between a worker's log lines it is noise
    folder = WEIGHTS if model == DEMO else Path(model)
    if model == DEMO:
        place = f"from {WEIGHTS}"
    elif folder.is_dir():
        place = "as a folder"
    else:
        place = "from the Hugging Face hub (there is no folder of this name)"
    try:
        device, precision = choose_here(device, dtype)
        speed.check(switches, device, precision)
        canvas = find_canvas(folder)
        pipeline = ZImagePipeline.from_pretrained(
            str(folder) if model == DEMO else model,
            dtype=precision,
            use_safetensors=True,  # never a pickle, which can run code
        )
        # diffusers only warns about this, and would fail at the first customer's image.
        if not isinstance(pipeline.transformer, ZImageTransformer2DModel):
            found = type(pipeline.transformer).__name__
            raise TypeError(f"its transformer is {found}, not ZImageTransformer2DModel")
        return prepare(
            pipeline,
            model=model,
            device=device,
            dtype=precision,
            switches=switches,
            canvas=canvas,
        )
    except Exception as error:  # the libraries raise anything, from KeyError to AssertionError
        raise ModelUnavailable(
            f"The model {model!r} could not be loaded {place}, "
            f"device {device}, dtype {dtype}: {_reason(error)}"
        ) from error


def hush() -> None:
    """Let the libraries tell errors only."""
    for logging in LIBRARIES_LOGGING:
        logging.disable_progress_bar()
        logging.set_verbosity_error()


def prepare(
    pipeline: ZImagePipeline,
    *,
    model: str,
    device: str,
    dtype: torch.dtype,
    switches: Switches,
    canvas: Canvas | None = None,
) -> TurboPipeline:
    """Apply `switches` to a pipeline whose weights were just read, and put it on `device`.

    Raises:
        Exception: anything; the libraries have no common class.
    """
    pipeline.set_progress_bar_config(disable=True)
    if switches.vae_channels_last:
        pipeline.vae.to(memory_format=torch.channels_last)
    speed.apply(switches, pipeline.transformer, device)
    speed.place(switches, pipeline, device)
    return TurboPipeline(
        pipeline,
        model=model,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        prompt_tokens_max=switches.prompt_tokens_max,
        embedding_cache_mb=switches.embedding_cache_mb,
        offload=switches.offload,
        canvas=canvas,
    )


def choose_here(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """Return what `choose` returns on this machine. Raises: ValueError."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    gpu = "cuda" if cuda else "mps" if mps else None
    bfloat16 = gpu is not None and multiplies_bfloat16(torch.device(gpu))
    return choose(device, dtype, cuda=cuda, mps=mps, bfloat16=bfloat16)


def choose(
    device: str, dtype: str, *, cuda: bool, mps: bool, bfloat16: bool
) -> tuple[str, torch.dtype]:
    """Return the device and the precision that `auto` stands for; anything else is kept.

    `cuda` and `mps` say whether torch can use such a device, `bfloat16` whether it multiplies in
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


def warmup_sizes(settings: "WorkerSettings", device: str) -> list[tuple[int, int]]:
    """Return what is to be drawn on `device` before the first task: width and height in pixels."""
    if settings.warmup_sizes is None:
        return [] if torch.device(device).type == "cpu" else GPU_SIZES
    sizes = [size.split("x") for size in settings.warmup_sizes]
    return [(int(width), int(height)) for width, height in sizes]


def _reason(error: Exception) -> str:
    if is_out_of_memory(error):
        return "it does not fit into the device's memory; ZIMAGE_OFFLOAD=model needs less"
    return speed.reason(error)


def device_name(device: str) -> str:
    """What an operator calls `device`: a GPU's product name."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return platform.processor() or platform.machine()
