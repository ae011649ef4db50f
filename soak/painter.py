"""`python -m soak.painter`: a worker whose pipeline takes a few milliseconds.

Everything but the drawing is the real worker. Each image is one colour that its seed gives, so that
whoever looks at it knows whose it is.
"""

import argparse
import os
import time

from PIL import Image

from benchmarks.sleeper import Unbatched
from soak.colours import colour_of
from storage.logs import configure
from worker import generate, moderation
from worker.drawing import Drawing, Picture
from worker.settings import settings
from worker.stages import Worker


class Painter(Unbatched):
    """Takes `step_s` seconds for a step."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    def _drawn(self, drawing: Drawing) -> Picture | BaseException:
        for done in range(1, drawing.steps + 1):
            time.sleep(self._step_s)
            try:
                drawing.on_step(done)
            except Exception as error:
                return error
        size, colour = (drawing.width, drawing.height), colour_of(drawing.seed)
        return lambda: Image.new("RGB", size, colour)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m soak.painter", description=__doc__)
    default = os.environ.get("SOAK_STEP_S", "0.0005")
    parser.add_argument("--step-s", type=float, default=float(default), help=f"default {default}")
    asked = parser.parse_args()
    configure("worker")
    worker = Worker(
        f"painter-{os.getpid()}",
        Painter(asked.step_s),
        moderation=moderation.of_settings(settings, device="cpu"),
    )
    generate.serve(worker, lambda: {"device": "none", "model": "painter"})


if __name__ == "__main__":
    main()
