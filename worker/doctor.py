"""`python -m worker doctor`: what this machine has, what will be used, what it costs, how fast.

It needs no servers, only what is installed. At the end it loads the model and draws.
"""

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

# Who imports a setting reads them all, and those of the floor want servers. No server is called
# from here: these addresses only stand where none is set, and lead nowhere.
os.environ.setdefault("ZIMAGE_DATABASE_URL", "postgresql+psycopg://nobody@nowhere.invalid/none")
os.environ.setdefault("ZIMAGE_REDIS_URL", "redis://nowhere.invalid")

import torch
from huggingface_hub import snapshot_download

from storage.settings import settings as storage_settings
from storage.tasks import STEPS
from worker import loading
from worker.demo import WEIGHTS
from worker.devices import resolve_devices
from worker.drawing import Drawing, Pipeline
from worker.footprint import Footprint, footprint
from worker.loading import DEMO, ModelUnavailable
from worker.machine import devices, machine, size, version
from worker.pipeline import TurboPipeline
from worker.settings import WorkerSettings, settings
from worker.switches import Switches, switches_of, usable_backends

PROMPT = "a red fox in the snow"
CPU_SIZES = [(512, 512)]
LIBRARIES = ("torch", "diffusers", "transformers", "torchao")
SHOWN = ("device", "dtype", *Switches.__dataclass_fields__, "warmup_sizes", "batch_max")
"""The settings of which the rest is about; they are described in `worker/settings.py`."""
FULL = 0.95
"""A GPU of which more than this is used has no room for the next larger image."""

Rows = Iterable[tuple[str, str]]


def main() -> int:
    loading.hush()
    return examine(storage_settings.model, settings)


def examine(model: str, settings: WorkerSettings) -> int:
    """Print everything about `model` under `settings`; return 0 if an image was drawn, else 1."""
    show("Machine", machine())
    show("Devices", devices())
    show("Versions", ((name, version(name)) for name in LIBRARIES))
    asked = resolve_devices(settings.device)
    try:
        device, dtype = loading.choose_here(asked[0], settings.dtype)
    except ValueError as error:
        return _give_up(str(error))
    show("Settings", chosen(model, settings, device, str(dtype).removeprefix("torch.")))
    show("Attention", [("can be used here", ", ".join(usable_backends(device, dtype)))])
    switches = switches_of(settings)
    sizes = loading.warmup_sizes(settings, device) or CPU_SIZES
    try:
        folder = _folder(model)
        cost = footprint(folder, bytes_per_number=dtype.itemsize, switches=switches, sizes=sizes)
        show("Memory, estimated", costs(cost, switches.offload))
    except (OSError, ValueError, KeyError):  # loading will say what is wrong, or fetch what is not
        cost = None
        show("Memory, estimated", [("unknown", "the model's files are not on this machine")])
    try:
        pipeline = loading.load(model, device=device, dtype=settings.dtype, switches=switches)
        show("One image", drawn(pipeline, sizes))
    except ModelUnavailable as error:
        return _give_up(str(error))
    except Exception as error:
        return _give_up(f"No image could be drawn: {error or type(error).__name__}")
    if len(asked) > 1:
        print(f"\nDrawn on the first of {len(asked)} devices only.")
    for advised in advice(
        model,
        device,
        switches,
        cost,
        gpus=torch.cuda.device_count(),
        processes=len(asked),
        memory_mb=pipeline.memory_mb(),
    ):
        print(f"\nAdvice: {advised}")
    return 0


def show(title: str, rows: Rows) -> None:
    rows = list(rows)
    width = max((len(name) for name, _ in rows), default=0)
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:{width}}  {value}", flush=True)


# --- What will be used --------------------------------------------------------------------------


def chosen(model: str, settings: WorkerSettings, device: str, dtype: str) -> Rows:
    """Each setting, as it will be used, and its default where that is another one."""
    yield "ZIMAGE_MODEL", model
    for name in SHOWN:
        value = getattr(settings, name)
        used = {"device": device, "dtype": dtype}.get(name, value)
        default = WorkerSettings.model_fields[name].default
        if name == "warmup_sizes":
            used = ", ".join(value) if value else "by the device" if value is None else "none"
        if value != default:
            note = f"  (default: {default})"
        else:
            note = "" if used == value or name == "warmup_sizes" else f"  ({value})"
        shown = str(used).lower() if isinstance(used, bool) else used
        yield f"ZIMAGE_{name.upper()}", f"{shown}{note}"


# --- What it costs and how fast it is -----------------------------------------------------------


def _folder(model: str) -> Path:
    """Where the model's files are. Raises: OSError, ValueError: they are not on this machine."""
    if model == DEMO:
        return WEIGHTS
    if Path(model).is_dir():
        return Path(model)
    return Path(snapshot_download(model, local_files_only=True))


def costs(cost: Footprint, offload: str) -> Rows:
    for part, part_mb in cost.parts.items():
        yield f"weights of {part}", size(part_mb)
    yield "one image", size(cost.activations)
    yield f"peak with offload {offload}", size(cost.peak(offload))


def drawn(pipeline: TurboPipeline, sizes: Sequence[tuple[int, int]]) -> Rows:
    """Draw each size and tell what it took. Raises: what drawing raises."""
    for width, height in sizes:
        if torch.device(pipeline.device).type != "cpu":
            draw(pipeline, width, height)  # the first one chooses kernels, or compiles them
        seconds = draw(pipeline, width, height)
        memory_mb = pipeline.memory_mb()
        yield (
            f"{width}x{height}",
            f"{seconds:.2f} s, {STEPS} steps; memory at most {size(memory_mb['peak'])} "
            f"of {size(memory_mb['total'])}",
        )


def draw(pipeline: Pipeline, width: int, height: int) -> float:
    """Draw one image; return the seconds until its pixels were there. Raises: what ended it."""
    began = time.monotonic()
    reading = pipeline.read(PROMPT)
    (picture,) = pipeline.draw([Drawing(reading, width, height, 1, STEPS, lambda _: None)])
    if isinstance(picture, BaseException):
        raise picture
    picture()
    return time.monotonic() - began


# --- What we would change -----------------------------------------------------------------------


def advice(
    model: str,
    device: str,
    switches: Switches,
    cost: Footprint | None,
    *,
    gpus: int,
    processes: int,
    memory_mb: dict[str, int],
) -> Iterable[str]:
    """Say in sentences what would suit this machine better."""
    on_gpu = torch.device(device).type != "cpu"
    if model == DEMO:
        yield (
            "the demo model draws coloured shapes and nothing else: "
            "set ZIMAGE_MODEL=Tongyi-MAI/Z-Image-Turbo for images"
        )
    elif not on_gpu:
        yield "there is no GPU, and on a CPU an image of this model takes minutes"
    if gpus > processes and on_gpu:
        yield f"this machine has {gpus} GPUs and uses {processes}: set ZIMAGE_DEVICE=all"
    if not on_gpu or cost is None:
        return
    total = memory_mb["total"]
    if max(cost.peak(switches.offload), memory_mb["peak"]) > FULL * total:
        fits = [mode for mode in ("model", "sequential") if cost.peak(mode) <= FULL * total]
        if switches.offload not in fits and fits:
            yield f"this GPU has {size(total)}, which is too little: set ZIMAGE_OFFLOAD={fits[0]}"
        elif not fits:
            yield f"this GPU has {size(total)}, which is too little for the model in any mode"
    elif switches.offload != "none" and cost.peak("none") <= FULL * total:
        yield f"all weights fit into this GPU's {size(total)}: ZIMAGE_OFFLOAD=none is faster"
    if model != DEMO and not switches.compile and switches.offload != "sequential":
        yield "ZIMAGE_COMPILE=true is tried best here: a slower start, and often faster images"


def _give_up(sentence: str) -> int:
    print(f"\n{sentence}")
    return 1
