"""`python -m benchmarks.gpu`: seconds and memory per image of the full-size model, on a GPU.

The architecture is Z-Image-Turbo's; the weights are random, whose values do not change the speed,
so nothing is downloaded. Each row of the table begins with a model that is built anew. With
`--meta` it is built without memory, on any machine, and only its size is printed.
"""

import argparse
import gc
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import BoundedSemaphore
from typing import Any

# No server is called, but whoever imports a setting reads those of the servers too.
os.environ.setdefault("ZIMAGE_DATABASE_URL", "postgresql+psycopg://nobody@nowhere.invalid/none")
os.environ.setdefault("ZIMAGE_REDIS_URL", "redis://nowhere.invalid")

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import Qwen3Config, Qwen3Model

from benchmarks import byte_tokens
from storage.models import ImageFormat
from storage.tasks import STEPS
from worker import loading
from worker.drawing import Drawing, Picture
from worker.finishing import encode
from worker.memory import measure_mb
from worker.pipeline import GUIDANCE, TurboPipeline
from worker.switches import SAFE, Switches, check, reason, usable_backends

SIDE_PX = 1024
UNCOUNTED, COUNTED = 2, 5
"""Images of each row: the first ones choose kernels, or compile them."""
BATCH_SIDES_PX, BATCH_MAX = (1024, 512), 4
BACKLOG = 50
FINISHERS = 2
SAMPLE_MS = 200
PROMPT = "a red fox in the snow, photograph no. {:05}"
"""With the turns around it 62 tokens, and never the same, so that no embedding is kept."""

TARGETS = (
    ("our defaults, against stock diffusers", "1.3 times as fast"),
    ("our best in bfloat16", "0.70 s"),
    ("our best quantised", "0.45 s"),
    ("peak memory of our defaults", "under 24 GB"),
    ("peak memory of some mode", "under 16 GB"),
)
"""On a GPU of 790 TFLOP/s in bfloat16, where eight forwards of 60 TFLOP alone take 0.61 s."""

TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1_000_000,
    "tie_word_embeddings": True,
}
"""Source: config.json of Qwen/Qwen3-4B."""

VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
    "force_upcast": True,
}
"""Source: vae/config.json of black-forest-labs/FLUX.1-dev."""

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": False,
    "shift": 3.0,
}
"""Source: scheduler/scheduler_config.json of Tongyi-MAI/Z-Image-Turbo."""

Build = Callable[[], ZImagePipeline]


@dataclass(frozen=True)
class Bench:
    """What is measured, and where."""

    build: Build
    device: str
    dtype: torch.dtype
    side_px: int = SIDE_PX


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--meta", action="store_true", help="print the model's size, and end")
    loading.hush()
    if parser.parse_args(arguments).meta:
        print_size(assemble("meta"))
        return
    if not torch.cuda.is_available():
        sys.exit("This needs a CUDA device, and torch finds none; --meta runs on any machine.")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    bench = Bench(lambda: assemble("cuda"), "cuda", torch.bfloat16)
    compare(bench)
    batches(bench)
    backlog(bench)
    print("\nTo beat:")
    for what, target in TARGETS:
        print(f"  {what}: {target}")


def assemble(device: str) -> ZImagePipeline:
    """Return the full-size pipeline in bfloat16 on `device`, its weights as torch begins them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            transformer = ZImageTransformer2DModel()  # its defaults are the published sizes
            text_encoder = Qwen3Model(Qwen3Config(**TEXT_ENCODER))
            vae = AutoencoderKL(**VAE)
    finally:
        torch.set_default_dtype(before)
    return ZImagePipeline(
        transformer=transformer.eval(),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        tokenizer=byte_tokens.tokenizer(),  # its numbers are below the vocabulary's
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
    )


def print_size(pipeline: ZImagePipeline) -> None:
    total = 0
    for name in ("transformer", "text_encoder", "vae"):
        weights = list(getattr(pipeline, name).parameters())
        numbers = sum(weight.numel() for weight in weights)
        size = sum(weight.nbytes for weight in weights)
        total += size
        print(f"{name:14}{numbers / 1e9:8.3f} B parameters{size / 1e9:8.2f} GB")
    print(f"{'together':14}{'':21}{total / 1e9:8.2f} GB")


# --- One image after another --------------------------------------------------------------------


def compare(bench: Bench) -> None:
    print(f"\n{bench.side_px} x {bench.side_px}, {STEPS} steps, one image at a time")
    print(f"{'':32}{'s/image':>10}{'times stock':>14}{'peak GB':>10}")
    stock_s: float | None = None
    for name, switches in rows(bench):
        try:
            seconds, peak_gb = measure(bench, switches)
        except Exception as error:  # a switch that this GPU does not bear is an answer too
            print(f"{name:32}  {reason(error)}", flush=True)
            continue
        finally:
            free()
        stock_s = stock_s or seconds
        print(f"{name:32}{seconds:10.3f}{stock_s / seconds:14.2f}{peak_gb:10.1f}", flush=True)


def rows(bench: Bench) -> Iterator[tuple[str, Switches | None]]:
    """What is compared; None is the stock pipeline."""
    yield "stock diffusers", None
    yield "our defaults", SAFE
    for backend in usable_backends(bench.device, bench.dtype):
        if backend != SAFE.attention_backend:
            yield f"attention {backend}", Switches(attention_backend=backend)
    yield "VAE channels-last", Switches(vae_channels_last=True)
    yield "compile", Switches(compile=True)
    yield "compile, VAE channels-last", Switches(compile=True, vae_channels_last=True)
    yield "int8", Switches(quantization="int8")
    yield "int8, compile", Switches(quantization="int8", compile=True)
    yield "float8", Switches(quantization="float8")
    yield "float8, compile", Switches(quantization="float8", compile=True)
    yield "offload model", Switches(offload="model")
    yield "int8, offload model", Switches(quantization="int8", offload="model")


def free() -> None:
    """Give back what a pipeline held that nobody refers to any more."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(bench: Bench, switches: Switches | None) -> tuple[float, float]:
    """Return the median of the seconds until an image's pixels are there, and the peak in GB."""
    if switches is not None:
        check(switches, bench.device, bench.dtype)
    pipeline = bench.build()
    pipeline.set_progress_bar_config(disable=True)
    draw = stock(bench, pipeline) if switches is None else ours(bench, pipeline, switches)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(UNCOUNTED + COUNTED):
        began = time.perf_counter()
        draw(number)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[UNCOUNTED:]), measure_mb(bench.device)["peak"] * 2**20 / 1e9


def stock(bench: Bench, pipeline: ZImagePipeline) -> Callable[[int], None]:
    def draw(number: int) -> None:
        pipeline(
            prompt=[PROMPT.format(number)],
            width=bench.side_px,
            height=bench.side_px,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=torch.Generator("cpu").manual_seed(number),
        )

    return draw


def ours(bench: Bench, pipeline: ZImagePipeline, switches: Switches) -> Callable[[int], None]:
    turbo = prepare(bench, pipeline, switches)
    return lambda number: draw_one(turbo, bench.side_px, number)()  # type: ignore[return-value]


def prepare(bench: Bench, pipeline: ZImagePipeline, switches: Switches) -> TurboPipeline:
    return loading.prepare(
        pipeline, model="full-size", device=bench.device, dtype=bench.dtype, switches=switches
    )


def draw_one(pipeline: TurboPipeline, side_px: int, number: int) -> Picture:
    reading = pipeline.read(PROMPT.format(number))
    (drawn,) = pipeline.draw([Drawing(reading, side_px, side_px, number, STEPS, lambda _: None)])
    if isinstance(drawn, BaseException):
        raise drawn
    return drawn


# --- Together, and under a backlog ----------------------------------------------------------------


def batches(bench: Bench) -> None:
    print("\nour defaults, images drawn together")
    print(f"{'':32}{'s/image':>10}{'times alone':>14}")
    sizes = [(side, side) for side in BATCH_SIDES_PX]
    timings = prepare(bench, bench.build(), SAFE).warm_up(sizes, BATCH_MAX)
    free()
    for size, of_size in itertools.groupby(timings, lambda timing: timing.size):
        alone_s: float | None = None
        for timing in of_size:
            alone_s = alone_s or timing.seconds_per_image
            name = f"{size[0]} x {size[1]}, {timing.batch} together"
            gain = alone_s / timing.seconds_per_image
            print(f"{name:32}{timing.seconds_per_image:10.3f}{gain:14.2f}", flush=True)


def backlog(bench: Bench) -> None:
    """Draw as a worker does: threads encode one image while the next is drawn."""
    turbo = prepare(bench, bench.build(), SAFE)
    with ThreadPoolExecutor(FINISHERS) as finishers:
        for number in range(UNCOUNTED):
            draw_one(turbo, bench.side_px, number)()
        unfinished = BoundedSemaphore(2 * FINISHERS)

        def finish(picture: Picture) -> None:
            encode(picture(), ImageFormat.PNG)
            unfinished.release()

        with busy_samples() as samples:
            began = time.perf_counter()
            finished = []
            for number in range(BACKLOG):
                unfinished.acquire()
                finished.append(finishers.submit(finish, draw_one(turbo, bench.side_px, number)))
            for each in finished:
                each.result()
            seconds = time.perf_counter() - began
    print(f"\na backlog of {BACKLOG}, encoded as PNG in {FINISHERS} threads")
    print(f"{'seconds per image':32}{seconds / BACKLOG:10.3f}")
    busy = f"{statistics.mean(samples):9.1f} %" if samples else "unknown: there is no nvidia-smi"
    print(f"{'share of time the GPU is busy':32}{busy}")


@contextmanager
def busy_samples() -> Iterator[list[float]]:
    """Percent of the last moment in which the GPU had work, by its driver; filled at the end."""
    samples: list[float] = []
    command = shutil.which("nvidia-smi")
    if command is None:
        yield samples
        return
    index = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    with subprocess.Popen(
        [command, f"--id={index}", *query, f"--loop-ms={SAMPLE_MS}"],
        stdout=subprocess.PIPE,
        text=True,
    ) as sampler:
        try:
            yield samples
        finally:
            sampler.terminate()
            said, _ = sampler.communicate()
            # The first ones look back to before we began.
            samples += [float(line) for line in said.splitlines()[5:] if line.strip().isdigit()]


if __name__ == "__main__":
    main()
