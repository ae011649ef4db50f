"""Draws while the system refuses memory, in a process of its own: `test_memory.py` runs it.

Prints one line of JSON: what became of each drawing, and what the log said meanwhile.
"""

import hashlib
import json
import resource
from pathlib import Path
from typing import Any

from structlog.testing import capture_logs

from tests import random_model
from worker.drawing import Drawing
from worker.pipeline import TurboPipeline

LARGE = (2048, 512)
"""The small model's decoder takes more than 260 MB for it, and in tiles of 512 x 512 less than 100:
how much differs by 10 MB from process to process, and the limit is far from both."""
TILES_FIT_MB = 180
NOTHING_FITS_MB = 15
SMALL = (576, 64)
"""Would be drawn in two tiles, and so look different, if the pipeline still did that."""


def main() -> None:
    model = random_model.assemble(0)
    model.set_progress_bar_config(disable=True)
    pipeline = TurboPipeline(model, model="random", device="cpu", dtype="float32")

    def draw(size: tuple[int, int]) -> dict[str, Any]:
        steps: list[int] = []
        with capture_logs() as logs:
            [result] = pipeline.draw([Drawing(pipeline.read("a fox"), *size, 1, 1, steps.append)])
        told = {"steps": steps, "rungs": [line["rung"] for line in logs]}
        if isinstance(result, BaseException):
            return told | {"failed": type(result).__name__}
        picture = result()
        return told | {
            "size": picture.size,
            "sha256": hashlib.sha256(picture.tobytes()).hexdigest(),
        }

    before = draw(SMALL)  # libraries and threads take what they keep
    limit(TILES_FIT_MB)
    tiled = draw(LARGE)
    limit(NOTHING_FITS_MB)
    exhausted = draw(LARGE)
    limit(None)
    after = draw(SMALL)
    print(json.dumps({"before": before, "tiled": tiled, "exhausted": exhausted, "after": after}))


def limit(more_mb: int | None) -> None:
    """Let the system refuse what exceeds this process as it is by so much; None: nothing."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = hard
    if more_mb is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        soft = pages * resource.getpagesize() + more_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    main()
