"""Draw the rows that are not drawn yet, N at a time, and never pay for one twice."""

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from zimage.answers import Task
from zimage.async_client import AsyncClient
from zimage.batch.journal import Journal, Saved
from zimage.batch.results import COMPLETED, FAILED, LOST, UNFINISHED, Outcome
from zimage.batch.rows import Row
from zimage.batch.watermark import Watermark
from zimage.errors import (
    ImageExpired,
    InsufficientCredits,
    NotFound,
    TaskFailed,
    Unauthenticated,
    ZImageError,
)
from zimage.files import write_whole

MARKED = "watermarked"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a batch is to do; `wait_s` is for one image, from its submission."""

    rows: list[Row]
    folder: Path
    concurrency: int
    wait_s: float
    watermark: Watermark | None = None
    redraw_lost: bool = False


class Batch:
    """The work on a plan; `outcomes` is whole at any moment, also after Ctrl-C."""

    def __init__(
        self, plan: Plan, client: AsyncClient, journal: Journal, on_end: Callable[[Outcome], None]
    ) -> None:
        self._plan, self._client, self._journal, self._on_end = plan, client, journal, on_end
        self._ended: dict[str, Outcome] = {}
        self._refusal: ZImageError | None = None

    @property
    def outcomes(self) -> list[Outcome]:
        """In the order of the rows."""
        return [
            self._ended.get(row.key)
            or Outcome(row, UNFINISHED, task_id=self._journal.progress(row).task_id)
            for row in self._plan.rows
        ]

    async def run(self) -> None:
        """Bring every row to an end. Never raises for what one of them meets."""
        rows = iter(self._plan.rows)
        async with asyncio.TaskGroup() as group:
            for _ in range(self._plan.concurrency):
                group.create_task(self._take(rows))

    async def _take(self, rows: Iterator[Row]) -> None:
        for row in rows:
            try:
                outcome = await self._bring_to_end(row)
            except (ZImageError, OSError) as error:
                outcome = self._failure(row, error)
            self._ended[row.key] = outcome
            self._on_end(outcome)

    async def _bring_to_end(self, row: Row) -> Outcome:
        progress = self._journal.progress(row)
        if progress.lost is not None:
            if not self._plan.redraw_lost:
                return Outcome(row, LOST, progress.task_id, error=progress.lost)
            self._journal.redrawn(row)
        path = self._plan.folder / f"{row.key}.png"
        saved = progress.saved
        data = None if saved is None else await asyncio.to_thread(_sound, path, saved)
        if saved is None or data is None:
            began = time.monotonic()
            task = await self._ended_task(row)
            data = await self._client.download(task)
            await asyncio.to_thread(write_whole, path, data)
            saved = _saved(task, data, time.monotonic() - began)
            self._journal.saved(row, saved)
        if self._plan.watermark is not None:
            path = await self._mark(row, data, self._plan.watermark)
        return Outcome(
            row, COMPLETED, saved.task_id, saved.seed, path, saved.credits, saved.seconds
        )

    async def _ended_task(self, row: Row) -> Task:
        """The row's completed task, submitted if it was not yet. Raises: TaskFailed and others."""
        task_id = self._journal.progress(row).task_id
        if task_id is None:
            if self._refusal is not None:
                raise self._refusal
            created = await self._client.create(
                row.prompt,
                size=row.size,
                seed=row.seed,
                idempotency_key=self._journal.idempotency_key(row),
            )
            self._journal.created(row, task_id := created.id)
        return await self._client.wait(task_id, self._plan.wait_s)

    async def _mark(self, row: Row, data: bytes, watermark: Watermark) -> Path:
        path = self._plan.folder / MARKED / f"{row.key}.png"
        # The journal knows whose copy it is, the disk whether it is still there.
        if self._journal.progress(row).mark != watermark.digest or not path.exists():
            marked = await asyncio.to_thread(watermark.apply, data)
            await asyncio.to_thread(write_whole, path, marked)
            self._journal.marked(row, watermark.digest)
        return path

    def _failure(self, row: Row, error: ZImageError | OSError) -> Outcome:
        task_id = self._journal.progress(row).task_id
        text = error.line if isinstance(error, ZImageError) else str(error)
        if isinstance(error, TaskFailed):
            self._journal.failed(row)
        elif task_id is not None and isinstance(error, ImageExpired | NotFound):
            text = f"{text}; draw it again, at its price, with --redraw-lost"
            self._journal.lost(row, text)
            return Outcome(row, LOST, task_id, error=text)
        elif isinstance(error, InsufficientCredits | Unauthenticated):
            # The rows after it would be refused as well: they are not even sent.
            self._refusal = error
        return Outcome(row, FAILED, task_id, error=text)


def _sound(path: Path, saved: Saved) -> bytes | None:
    """The image at `path`, if it is there and the one that was saved."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return data if hashlib.sha256(data).hexdigest() == saved.sha256 else None


def _saved(task: Task, data: bytes, seconds: float) -> Saved:
    return Saved(
        task_id=task.id,
        sha256=hashlib.sha256(data).hexdigest(),
        seed=task.seed,
        credits=None if task.credits_used is None else str(task.credits_used),
        seconds=round(seconds, 3),
    )
