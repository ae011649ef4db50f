"""`python -m benchmarks.demo`: how soon the demo model is loaded, how long it draws, its size.

Loading counts from when the libraries are imported. An image is drawn as a worker draws it, from
the prompt's tokens to its pixels; the median of several after one that is not counted.
"""

import os
import statistics
import time

# No server is called, but whoever imports a setting reads those of the servers too.
os.environ.setdefault("ZIMAGE_DATABASE_URL", "postgresql+psycopg://nobody@nowhere.invalid/none")
os.environ.setdefault("ZIMAGE_REDIS_URL", "redis://nowhere.invalid")

from benchmarks.figures import Figure, say, tell
from worker import loading
from worker.demo import WEIGHTS
from worker.drawing import Drawing
from worker.pipeline import TurboPipeline

LOADS, IMAGES = 3, 5
LOAD_GOAL_S, IMAGE_GOAL_S, SIZE_GOAL_MB = 2.0, 3.0, 20.0
SIZES = ((512, 512), (768, 768), (1024, 1024), (1536, 1536))
PROMPT = "a red star on a blue background"


def main() -> None:
    loads = []
    for _ in range(LOADS):
        began = time.monotonic()
        pipeline = loading.load(loading.DEMO, device="cpu", dtype="auto")
        loads.append(time.monotonic() - began)
    tell(Figure("demo model, load after import", max(loads), LOAD_GOAL_S, "s", at_most=True))
    for size in SIZES:
        seconds = sorted(_seconds(pipeline, size, seed) for seed in range(IMAGES + 1))
        say(f"{size[0]} x {size[1]}: {seconds[0]:.2f} to {seconds[-1]:.2f} s")
        if size == (1024, 1024):
            median = statistics.median(seconds[:-1])
            tell(
                Figure("demo model, 1024 x 1024, 8 steps", median, IMAGE_GOAL_S, "s", at_most=True)
            )
    megabytes = sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) / 1e6
    tell(Figure("demo model, all its files", megabytes, SIZE_GOAL_MB, "MB", at_most=True))


def _seconds(pipeline: TurboPipeline, size: tuple[int, int], seed: int) -> float:
    began = time.monotonic()
    drawing = Drawing(pipeline.read(PROMPT), *size, seed, 8, on_step=lambda _: None)
    (picture,) = pipeline.draw([drawing])
    assert not isinstance(picture, BaseException)
    picture()
    return time.monotonic() - began


if __name__ == "__main__":
    main()
