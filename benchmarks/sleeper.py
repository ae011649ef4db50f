"""`python -m benchmarks.sleeper`: a worker whose pipeline only sleeps, as a GPU looks to the CPU.

Everything but the drawing is the real worker. With `--trace FILE` it writes when each drawing's
first step began and its last one ended, by the machine's monotonic clock.
"""

import argparse
import json
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from PIL import Image

from storage.logs import configure
from worker import generate, moderation
from worker.drawing import Drawing, Picture, Reading
from worker.settings import settings
from worker.stages import Worker


class Unbatched(ABC):
    """What a pipeline is that draws one image after the other, and reads a prompt byte by byte."""

    def read(self, prompt: str) -> Reading:
        tokens = tuple(prompt.encode())
        return Reading(tokens, len(tokens))

    def batch_max(self, width: int, height: int, steps: int) -> int:
        return 1

    def draw(self, drawings: Sequence[Drawing]) -> list[Picture | BaseException]:
        return [self._drawn(drawing) for drawing in drawings]

    @abstractmethod
    def _drawn(self, drawing: Drawing) -> Picture | BaseException:
        """Return the image, or why there is none."""


class Sleeper(Unbatched):
    """Takes `step_s` seconds for a step, whatever the batch, and gives noise.

    Where a step takes no time it gives black, whose file is no work either. With `hang_at` it
    never ends that step.
    """

    def __init__(
        self, step_s: float, *, hang_at: int | None = None, trace: TextIO | None = None
    ) -> None:
        self._step_s = step_s
        self._hang_at = hang_at
        self._trace = trace

    def _drawn(self, drawing: Drawing) -> Picture | BaseException:
        began = time.monotonic()
        for done in range(1, drawing.steps + 1):
            if done == self._hang_at:
                threading.Event().wait()
            time.sleep(self._step_s)
            try:
                drawing.on_step(done)
            except Exception as error:
                return error
        if self._trace is not None:
            line = {"seed": drawing.seed, "began": began, "ended": time.monotonic()}
            print(json.dumps(line), file=self._trace, flush=True)
        size = drawing.width, drawing.height
        if not self._step_s:
            return lambda: Image.new("RGB", size)
        return lambda: Image.effect_noise(size, 60).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sleeper", description=__doc__)
    parser.add_argument("--step-s", type=float, default=0.075)
    parser.add_argument("--hang-at", type=int)
    parser.add_argument("--trace", type=Path)
    asked = parser.parse_args()
    configure("worker")
    trace = None if asked.trace is None else asked.trace.open("a")
    worker = Worker(
        f"sleeper-{os.getpid()}",
        Sleeper(asked.step_s, hang_at=asked.hang_at, trace=trace),
        moderation=moderation.of_settings(settings, device="cpu"),
    )
    generate.serve(worker, lambda: {"device": "none", "model": "sleeper"})


if __name__ == "__main__":
    main()
