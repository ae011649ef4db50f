"""What to do when memory runs out: draw again with less, and be back at full speed for the next.

    nothing ──► caches ──► tiling ──► offload ──► ResourceExhausted

Each rung keeps what the ones before it saved.
"""

import gc
import os
import resource
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import structlog
import torch
from diffusers import ZImagePipeline

from storage.errors import ResourceExhausted

Rung = Literal["nothing", "caches", "tiling", "offload"]
"""What is saved: nothing; what is kept for later images; the decoder works in tiles; weights wait
in the machine's memory until their model is at work, which costs seconds an image."""

Offload = Literal["none", "model", "sequential"]

TILE_PX = 512
"""A quarter of a 1024 x 1024 image. The model's own size is no help: the published VAE's tiles are
1024 x 1024 (its `sample_size`), so an image of that size would not be cut at all."""

# What an allocator says that has no exception class of its own: CUDA's libraries and Apple's GPU,
# the CPU on Linux and macOS, the CPU on Windows, cuBLAS, oneDNN.
OUT_OF_MEMORY = (
    *("out of memory", "can't allocate memory", "not enough memory"),
    *("ALLOC_FAILED", "could not create a primitive"),
)

MB = 2**20

logger = structlog.get_logger()


def rungs(device: str, offload: Offload) -> tuple[Rung, ...]:
    """The ladder of this pipeline. Weights can move only between an accelerator and the machine,
    and where they always do, that is no help any more."""
    if torch.device(device).type == "cpu" or offload != "none":
        return ("nothing", "caches", "tiling")
    return ("nothing", "caches", "tiling", "offload")


class Ladder:
    """Attempts to draw, in less and less memory."""

    def __init__(
        self,
        pipeline: ZImagePipeline,
        *,
        device: str,
        rungs: tuple[Rung, ...],
        weights_lock: threading.RLock,
        free_caches: Callable[[], None],
    ) -> None:
        self.rungs = rungs
        self._pipeline = pipeline
        self._device = device
        self._weights_lock = weights_lock
        self._weights_moved = False
        self._free_caches = free_caches

    def climb(self, work: Callable[[], None]) -> None:
        """Do `work`, again and in less memory as long as memory runs out.

        Raises:
            ResourceExhausted: the last rung was not enough.
        """
        error = None
        try:
            for rung in self.rungs:
                error = self.attempt(work, rung)
                if error is None:
                    if rung != "nothing":
                        logger.warning("pipeline.out_of_memory", rung=rung)
                    return
        finally:
            self._return_to_full_speed()
        logger.warning("pipeline.out_of_memory", rung=None)
        raise ResourceExhausted from error

    def attempt(self, work: Callable[[], None], rung: Rung = "nothing") -> Exception | None:
        """Do `work`. If memory runs out, give back what it held and return the error."""
        try:
            self._arrange(rung)
            work()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            let_go(error)  # or the allocator would have nothing to give back
            self._free_caches()
            gc.collect(1)  # what this image made is young; to look at all takes long
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            return error
        return None

    def _arrange(self, rung: Rung) -> None:
        vae = self._pipeline.vae
        if rung in ("tiling", "offload"):
            # Slicing is not needed: images are decoded one by one in any case.
            vae.enable_tiling()
            vae.tile_sample_min_size = TILE_PX
            vae.tile_latent_min_size = TILE_PX // self._pipeline.vae_scale_factor
        else:
            vae.disable_tiling()
        if rung == "offload":
            self._move_weights_out()
        elif self._weights_moved:
            self._move_weights_back()

    def _move_weights_out(self) -> None:
        if not self._weights_moved:
            self._weights_lock.acquire()
            self._weights_moved = True
        self._pipeline.enable_model_cpu_offload(device=self._device)

    def _move_weights_back(self) -> None:
        """Put every model on the device again. If that fails, the lock stays: nobody else may use
        weights of which nobody knows where they are."""
        self._pipeline.remove_all_hooks()
        self._pipeline.to(self._device)
        self._weights_moved = False
        self._weights_lock.release()

    def _return_to_full_speed(self) -> None:
        """For the next image, which begins with the same: if another process took the memory
        meanwhile, it tries again, and can still climb."""
        error = self.attempt(lambda: None)
        if error is not None:
            logger.error("pipeline.weights_not_back", error=str(error))


def let_go(error: BaseException) -> None:
    """Empty the frames that `error` came through, and the ended ones that called them.

    Whoever keeps an error keeps its traceback, that keeps frames, these keep their callers, and
    one of those is the pipeline's with all its tensors.
    """
    trace = error.__traceback__
    if trace is None:
        return
    for frame, _ in [*traceback.walk_stack(trace.tb_frame), *traceback.walk_tb(trace)]:
        with suppress(RuntimeError):  # it is still at work: we are among its callees
            frame.clear()
            _ = frame.f_locals  # forgets what `locals()` copied, which the pipeline calls


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY
    )


def measure_mb(device: str) -> dict[str, int]:
    """What this process holds of the device's memory, held at most, and what there is, in MiB.

    On a CPU the system tells only the peak, so `used` is that too; so it is with Apple's GPU, which
    tells only what is held.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        used = torch.cuda.memory_reserved(device)
        peak = torch.cuda.max_memory_reserved(device)
        _, total = torch.cuda.mem_get_info(device)
    elif kind == "mps":
        used = peak = torch.mps.driver_allocated_memory()
        total = torch.mps.recommended_max_memory()
    else:
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        used = peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"used": used // MB, "peak": peak // MB, "total": total // MB}
