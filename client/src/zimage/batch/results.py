"""What came of each row, as CSV."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from zimage.batch.rows import Row
from zimage.files import write_whole

COLUMNS = (
    *("row", "prompt", "size", "seed", "status", "task_id", "file", "credits", "seconds", "error"),
)

COMPLETED, FAILED, LOST, UNFINISHED = "completed", "failed", "lost", "unfinished"


@dataclass(frozen=True, slots=True)
class Outcome:
    """`seed` is the one that was drawn with, `seconds` from submission to file."""

    row: Row
    status: str
    task_id: str | None = None
    seed: int | None = None
    file: Path | None = None
    credits: str | None = None
    seconds: float | None = None
    error: str | None = None


def write_results(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Replace the file at `path`; the columns are `COLUMNS`."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for outcome in outcomes:
        row = outcome.row
        writer.writerow(
            [
                row.key,
                row.prompt,
                row.size,
                row.seed if outcome.seed is None else outcome.seed,
                outcome.status,
                outcome.task_id,
                outcome.file,
                outcome.credits,
                None if outcome.seconds is None else f"{outcome.seconds:.1f}",
                outcome.error,
            ]
        )
    # With a BOM, spreadsheets read it as UTF-8.
    write_whole(path, text.getvalue().encode("utf-8-sig"))
