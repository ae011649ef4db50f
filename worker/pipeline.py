"""Prompts in, images out: the model's parts, put to work."""

import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
import torch
from diffusers import ZImagePipeline

from storage.errors import ResourceExhausted
from storage.tasks import STEPS
from worker.ahead import Pace, picture_of
from worker.canvas import CELL_PX, Canvas, enlarge, fitted
from worker.drawing import SIDE_STEP_PX, Drawing, Picture, Reading
from worker.memory import Ladder, Offload, let_go, measure_mb, rungs
from worker.reading import Reader

GUIDANCE = 0.0
"""Distilled without classifier-free guidance: anything else costs twice and degrades the image."""

BATCH_GAIN_MIN = 0.05
"""A larger batch must save this share of the time per image: it also makes its first image wait."""

WARM_UP_PROMPT = "a red fox in the snow"

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Timing:
    """What the warm-up measured."""

    size: tuple[int, int]
    """Width and height in pixels."""
    batch: int
    seconds_per_image: float


class TurboPipeline:
    """Z-Image-Turbo, or any model of the same classes, loaded once per process.

    The real one: 6 B parameters, 19.1 GB of weights in bfloat16. Two threads may not draw at once,
    because the scheduler keeps its place between steps; any thread may read prompts meanwhile.

    Source: `components_manager.md` of diffusers 0.42.
    """

    def __init__(
        self,
        pipeline: ZImagePipeline,
        *,
        model: str,
        device: str,
        dtype: str,
        prompt_tokens_max: int = 512,
        embedding_cache_mb: int = 64,
        offload: Offload = "none",
        canvas: Canvas | None = None,
    ) -> None:
        """Take over `pipeline`, whose weights are where `device` and `offload` say.

        `canvas` is of a model that draws at its own scale (`worker/canvas.py`).

        Raises:
            ValueError: the model does not bear prompts of `prompt_tokens_max` tokens.
        """
        self.model = model
        self.device = device
        self.dtype = dtype
        self.batch_limits: dict[tuple[int, int], int] = {}
        """Images drawn together at most, by width and height. What is not here is drawn alone."""
        self.weights_lock = threading.RLock()
        """Held while the weights move between devices. Whoever else computes with the text encoder
        holds it meanwhile."""
        self._pipeline = pipeline
        self._canvas = canvas
        self._weights_move = offload != "none"
        self._reader = Reader(
            pipeline, device=device, tokens_max=prompt_tokens_max, cache_mb=embedding_cache_mb
        )
        self._ladder = Ladder(
            pipeline,
            device=device,
            rungs=rungs(device, offload),
            weights_lock=self.weights_lock,
            free_caches=self._reader.forget,
        )

    @property
    def text_encoder(self) -> Any:
        """A Qwen3Model, or a Qwen3ForCausalLM that can also write."""
        return self._pipeline.text_encoder

    @property
    def tokenizer(self) -> Any:
        """Several threads use it: never ask it to truncate or to pad."""
        return self._pipeline.tokenizer

    def read(self, prompt: str) -> Reading:
        """Return `prompt` in tokens, cut where `ZImagePipeline` cuts. Any thread may call it."""
        return self._reader.read(prompt)

    def batch_max(self, width: int, height: int, steps: int) -> int:
        """How many images of this size it pays to draw together, as the warm-up measured it."""
        return self.batch_limits.get((width, height), 1)

    def memory_mb(self) -> dict[str, int]:
        """The device's memory in MiB: `used` by this process now, its `peak`, and the `total`."""
        return measure_mb(self.device)

    def draw(self, drawings: Sequence[Drawing]) -> list[Picture | BaseException]:
        """Draw images of one size and number of steps together; each ends on its own.

        The same prompt, size and seed give the same image on the same machine. Drawn in a batch the
        numbers are added up in another order: in float32 on a CPU, with prompts of 20 to 300
        tokens, one value in ten thousand differed, by 1 of 255.

        A side that is no multiple of 16 is drawn at the next one, and the middle is kept. A model
        with a canvas draws all of it at its own scale, and only its decoder knows the size.

        A batch that does not fit into memory is drawn one by one; an image that does not fit alone
        is drawn in less and less memory (`worker/memory.py`), and is a `ResourceExhausted` if that
        does not help either.
        """
        sheets = [_Sheet(drawing) for drawing in drawings]
        with self._weights_held():
            if len(sheets) > 1 and self._ladder.attempt(partial(self._denoise, sheets)):
                size = drawings[0].width, drawings[0].height
                self.batch_limits[size] = min(self.batch_max(*size, STEPS), len(sheets) - 1)
                logger.warning("pipeline.out_of_memory", rung="batch", images=len(sheets))
            for sheet in sheets:
                try:
                    self._ladder.climb(partial(self._finish, sheet))
                except ResourceExhausted as error:
                    sheet.result = error
        return [sheet.result for sheet in sheets if sheet.result is not None]

    def warm_up(self, sizes: Sequence[tuple[int, int]], batch_max: int) -> list[Timing]:
        """Draw each size (width, height in pixels) once, and find out how many pay together.

        Where `batch_max` is more than 1, batches of 1, 2, 4 … are timed up to it or until memory
        runs out, and the limit of the size is set. Returns what was measured.
        """
        timings = []
        for size in sizes:
            measured = []
            for batch in [2**n for n in range(batch_max.bit_length())]:
                # The first one chooses kernels and takes memory.
                if self._seconds(size, batch) is None or batch_max == 1:
                    break
                seconds = self._seconds(size, batch)
                if seconds is None:
                    break
                measured.append(Timing(size, batch, seconds / batch))
            if measured:
                self.batch_limits[size] = best_batch(measured)
            timings += measured
        return timings

    def _seconds(self, size: tuple[int, int], batch: int) -> float | None:
        """How long a batch takes until its pixels are there; None if memory runs out."""
        reading = self.read(WARM_UP_PROMPT)
        sheets = [
            _Sheet(Drawing(reading, *size, seed, STEPS, on_step=lambda _: None))
            for seed in range(batch)
        ]

        def paint() -> None:
            self._denoise(sheets)
            for sheet in sheets:
                self._finish(sheet)

        began = time.monotonic()
        with self._weights_held():
            if self._ladder.attempt(paint):
                return None
        for sheet in sheets:
            if callable(sheet.result):
                sheet.result()
        return time.monotonic() - began

    def _weights_held(self) -> AbstractContextManager[Any]:
        return self.weights_lock if self._weights_move else nullcontext()

    def _finish(self, sheet: "_Sheet") -> None:
        """Do what is left to do of one image; nothing if it has its result."""
        if sheet.result is None and sheet.latents is None:
            self._denoise([sheet])
        if sheet.result is None:
            self._decode(sheet)

    @torch.no_grad()
    def _denoise(self, sheets: "Sequence[_Sheet]") -> None:
        """Turn noise into latents, or into what `on_step` raised, for all of them together."""
        first = sheets[0].drawing
        width, height = self._scale(first)
        drawn = list(sheets)
        pace = Pace(self.device)

        def step_ended(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pace.step_queued()
            kept = []
            for place, sheet in enumerate(drawn):
                try:
                    sheet.drawing.on_step(index + 1)
                except BaseException as error:
                    sheet.result = error
                else:
                    kept.append(place)
            if len(kept) == len(drawn):
                return {}  # nothing to replace
            drawn[:] = [drawn[place] for place in kept]
            if not drawn:
                raise _NobodyWaits
            return {
                "latents": tensors["latents"][kept],
                "prompt_embeds": [tensors["prompt_embeds"][place] for place in kept],
            }

        try:
            latents = self._pipeline(
                prompt_embeds=[self._reader.embed(one.drawing.reading.tokens) for one in sheets],
                width=width,
                height=height,
                num_inference_steps=first.steps,
                guidance_scale=GUIDANCE,
                # On the CPU wherever the drawing is, so that a seed means the same noise
                # everywhere; one for each, so that it means the same in every batch.
                generator=[torch.Generator("cpu").manual_seed(one.drawing.seed) for one in sheets],
                callback_on_step_end=step_ended,
                callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
                output_type="latent",
            ).images
        except BaseException as error:
            # The pipeline does this only at its regular end; without it a model that was moved to
            # the device stays there, beside the next one.
            self._pipeline.maybe_free_model_hooks()
            if not isinstance(error, _NobodyWaits):
                raise
        else:
            for sheet, one in zip(drawn, latents.split(1), strict=True):
                sheet.latents = one
        for sheet in sheets:
            if isinstance(sheet.result, BaseException):
                let_go(sheet.result)

    def _scale(self, drawing: Drawing) -> tuple[int, int]:
        """Width and height in pixels at which the transformer draws it."""
        if self._canvas is None:
            return _rounded_up(drawing.width), _rounded_up(drawing.height)
        grid = self._canvas.nearest(drawing.width, drawing.height)
        return grid.columns * CELL_PX, grid.rows * CELL_PX

    @torch.no_grad()
    def _decode(self, sheet: "_Sheet") -> None:
        """Turn one image's latents into 8-bit pixels, on the device, and do not wait for them."""
        vae, drawing = self._pipeline.vae, sheet.drawing
        width, height = _rounded_up(drawing.width), _rounded_up(drawing.height)
        latents = sheet.latents
        if self._canvas is not None:
            latents = enlarge(latents, width, height)
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        values = fitted(vae.decode(latents, return_dict=False)[0], width, height)
        self._pipeline.maybe_free_model_hooks()
        left = (width - drawing.width) // 2
        top = (height - drawing.height) // 2
        values = values[..., top : top + drawing.height, left : left + drawing.width]
        # What diffusers does on the CPU, to the bit: denormalise in the VAE's precision, then
        # float32, then the nearest integer, halves to the even one.
        values = self._pipeline.image_processor.postprocess(values, output_type="pt")
        pixels = (values[0].permute(1, 2, 0).float() * 255).round().to(torch.uint8)
        sheet.result = picture_of(pixels.contiguous())


def best_batch(measured: Sequence[Timing]) -> int:
    """The largest batch that saves enough over the next smaller one that does."""
    best, *larger = measured
    for timing in larger:
        if timing.seconds_per_image <= best.seconds_per_image * (1 - BATCH_GAIN_MIN):
            best = timing
    return best.batch


class _Sheet:
    """A drawing on its way from noise through latents to a picture, or to what ended it.

    Latents stay when memory runs out in the decoder, so that only that is done again.
    """

    def __init__(self, drawing: Drawing) -> None:
        self.drawing = drawing
        self.latents: Any = None
        self.result: Picture | BaseException | None = None


class _NobodyWaits(Exception):
    """Every drawing of the batch has ended."""


def _rounded_up(side_px: int) -> int:
    return -(-side_px // SIDE_STEP_PX) * SIDE_STEP_PX
