"""How far the CPU runs ahead of a CUDA device: one step while it draws, and past every picture.

Elsewhere the CPU never is ahead, and all of this does nothing.
"""

import torch
from PIL import Image

from worker.drawing import Picture


class Pace:
    """Keeps the CPU at most one step ahead.

    A step that "ended" is only in the GPU's queue, and all of them are within milliseconds. Unless
    the CPU waits, progress says 8 of 8 at once, a cancel finds nothing left to stop, and a GPU that
    hangs is not noticed. One step ahead, and not none, so that the GPU always finds the next step
    in its queue.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._before: torch.cuda.Event | None = None

    def step_queued(self) -> None:
        """Wait until the GPU has ended the step before the one that was just queued."""
        if self._device.type != "cuda":
            return
        before, self._before = self._before, _mark(self._device)
        if before is not None:
            before.synchronize()


def _mark(device: torch.device) -> torch.cuda.Event:
    """An event that happens when the GPU has done all that is in its queue now.

    `blocking` lets the thread sleep while it waits; otherwise it would take a core. On the device's
    own stream: an event's default is the current device, which is another one for `cuda:1`.
    """
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


def picture_of(pixels: torch.Tensor) -> Picture:
    """The picture of height x width x 3 bytes. A CUDA device copies them when it comes to it."""
    if pixels.device.type != "cuda":
        on_cpu = pixels.cpu()
        return lambda: Image.fromarray(on_cpu.numpy())
    # Only into pinned memory does the GPU copy by itself. Neither buffer is used for anything else
    # before the copy has ended: the device's is in the same queue, and torch's allocator of pinned
    # memory keeps an event for each copy.
    arrived = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True)
    arrived.copy_(pixels, non_blocking=True)
    copied = _mark(pixels.device)

    def picture() -> Image.Image:
        copied.synchronize()
        return Image.fromarray(arrived.numpy())

    return picture
