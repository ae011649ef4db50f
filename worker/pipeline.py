"""Prompts in, images out: the one file that knows torch and diffusers at work."""

import os
import traceback
from collections.abc import Callable
from typing import Any

# Read once, when torch is loaded. On a CPU, torch's threads otherwise spin while they wait for each
# other and take the cores from the rest of the machine, and so from themselves: with one other busy
# process on two cores 512 x 512 took 7 to 15 s, so it takes 0.8 s; alone there is no difference.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from diffusers import ZImagePipeline
from PIL import Image

from storage.errors import ResourceExhausted

STEPS = 8
"""Distilled for 8. One forward each since diffusers 0.39; before that 9 gave 8.

Source: https://github.com/huggingface/diffusers/pull/13730
"""

GUIDANCE = 0.0
"""Distilled without classifier-free guidance: anything else costs twice and degrades the image."""

SIDE_STEP_PX = 16
"""The pipeline draws sides in multiples of this: the VAE's factor 8, times patches of 2."""

# What an allocator says that has no exception class of its own: CUDA's libraries and Apple's GPU,
# the CPU on Linux and macOS, the CPU on Windows, cuBLAS.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


class TurboPipeline:
    """Z-Image-Turbo, or any model of the same classes, loaded once per process.

    The real one: 6 B parameters, 19.1 GB of weights in bfloat16. Draws one image at a time; two
    threads may not call it at once, because the scheduler keeps its place between steps.

    Source: `components_manager.md` of diffusers 0.42.
    """

    def __init__(self, pipeline: ZImagePipeline, *, model: str, device: str, dtype: str) -> None:
        self.model = model
        self.device = device
        self.dtype = dtype
        self._pipeline = pipeline

    def __call__(
        self,
        prompt: str,
        *,
        width: int,
        height: int,
        seed: int,
        on_step: Callable[[int, int], None],
        steps: int = STEPS,
    ) -> Image.Image:
        """Draw `prompt` and return an RGB image, 8 bit, of exactly `width` x `height` pixels.

        The same prompt, size and seed give the same pixels on the same machine. A side that is no
        multiple of 16 is drawn at the next one, and the middle is kept. The pipeline reads no
        more than the first 512 tokens of a prompt.

        `on_step` is called after each denoising step with the steps done and the steps in all; a
        GPU may still have that step in its queue. What `on_step` raises ends the drawing and comes
        out of here; the next image is not affected.

        Raises:
            ResourceExhausted: out of memory. What was held for this image is given back.
        """
        try:
            image = self._draw(
                prompt, _rounded_up(width), _rounded_up(height), seed, steps, on_step
            )
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            # The frames of the traceback still hold this image's tensors; without this the cache
            # would have nothing to give back while the error is on its way up.
            traceback.clear_frames(error.__traceback__)
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
            raise ResourceExhausted from error
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    @torch.inference_mode()
    def _draw(
        self,
        prompt: str,
        width: int,
        height: int,
        seed: int,
        steps: int,
        on_step: Callable[[int, int], None],
    ) -> Image.Image:
        def step_ended(_: Any, index: int, __: Any, ___: dict[str, Any]) -> dict[str, Any]:
            on_step(index + 1, steps)
            return {}  # nothing to replace

        drawn = self._pipeline(
            prompt=[prompt],  # a new list each time: the pipeline overwrites it in place
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            # On the CPU wherever the drawing is, so that a seed means the same noise everywhere.
            generator=torch.Generator("cpu").manual_seed(seed),
            callback_on_step_end=step_ended,
            callback_on_step_end_tensor_inputs=[],
        )
        image: Image.Image = drawn.images[0]
        return image


def _rounded_up(side_px: int) -> int:
    return -(-side_px // SIDE_STEP_PX) * SIDE_STEP_PX


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY
    )
