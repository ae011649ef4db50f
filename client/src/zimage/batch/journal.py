"""What a batch has begun and finished, in its output folder: lines of JSON, only ever added to.

Each line is on the disk before the next step is taken, so a batch that is killed goes on where it
was. A task that was submitted but not yet noted is found again by its idempotency key, which the
same row gets again.

pending ──► created ──► saved
   ▲            ├────► failed    next attempt, next key: it was not charged
   └────────────┘────► lost      charged, but its image is gone: drawn again only when asked
"""

import hashlib
import json
import os
import sys
import uuid
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zimage.batch.rows import Row
from zimage.errors import InvalidRequest

NAME = "zimage-journal.jsonl"


@dataclass(frozen=True, slots=True)
class Saved:
    """A finished image: `sha256` in hex, `seconds` from its submission to its file."""

    task_id: str
    sha256: str
    seed: int | None
    credits: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a row has come; `attempt` counts from 1, `mark` is its copy's watermark."""

    attempt: int = 1
    task_id: str | None = None
    saved: Saved | None = None
    lost: str | None = None
    mark: str | None = None


class Journal(AbstractContextManager["Journal"]):
    """The journal of one output folder, for one process at a time."""

    def __init__(self, folder: Path, base_url: str) -> None:
        """Open or begin it. Raises: InvalidRequest, OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / NAME
        self._file = self._path.open("a+b")
        try:
            _lock(self._file.fileno(), folder)
            self._run, self._rows = "", dict[tuple[str, str], Progress]()
            self._read(base_url)
        except BaseException:
            self._file.close()
            raise

    def progress(self, row: Row) -> Progress:
        return self._rows.get((row.key, row.content), Progress())

    def idempotency_key(self, row: Row) -> str:
        """The same for the same run, row, content and attempt."""
        parts = [self._run, row.key, row.content, self.progress(row).attempt]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def created(self, row: Row, task_id: str) -> None:
        self._note(row, "created", task_id=task_id)

    def saved(self, row: Row, saved: Saved) -> None:
        fields = {name: getattr(saved, name) for name in Saved.__slots__}
        self._note(row, "saved", **fields)

    def failed(self, row: Row) -> None:
        self._note(row, "failed")

    def lost(self, row: Row, why: str) -> None:
        self._note(row, "lost", why=why)

    def redrawn(self, row: Row) -> None:
        """A lost image is wanted again, at its price."""
        self._note(row, "redrawn")

    def marked(self, row: Row, mark: str) -> None:
        self._note(row, "marked", mark=mark)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _note(self, row: Row, event: str, **fields: Any) -> None:
        line = {"event": event, "key": row.key, "content": row.content, **fields}
        self._append(line)
        self._take(line)

    def _append(self, line: dict[str, Any]) -> None:
        # Not in another thread: whatever is cancelled, a step and its line stay together.
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _take(self, line: dict[str, Any]) -> None:
        row = line["key"], line["content"]
        known = self._rows.get(row, Progress())
        match line["event"]:
            case "created":
                known = replace(known, task_id=line["task_id"])
            case "saved":
                known = replace(known, saved=Saved(*(line[name] for name in Saved.__slots__)))
            case "failed" | "redrawn":
                known = Progress(attempt=known.attempt + 1)
            case "lost":
                known = replace(known, saved=None, lost=line["why"])
            case "marked":
                known = replace(known, mark=line["mark"])
        self._rows[row] = known

    def _read(self, base_url: str) -> None:
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:  # killed while it wrote: that step was not taken
            self._file.truncate(len(whole))
        if not whole:
            head = {"event": "run", "run": uuid.uuid4().hex, "base_url": base_url}
            self._append(head)
            lines: Iterable[Any] = [head]
        else:
            lines = map(json.loads, whole.splitlines())
        try:
            head, *rest = lines
            self._run, begun_at = head["run"], head["base_url"]
            for line in rest:
                self._take(line)
        except (ValueError, LookupError, TypeError) as error:
            raise InvalidRequest(f"{self._path} is not a journal: {error!r}") from None
        if begun_at != base_url:
            raise InvalidRequest(
                f"{self._path.parent} belongs to a batch at {begun_at};"
                " go on there with --base-url, or choose another folder"
            )


def _lock(handle: int, folder: Path) -> None:
    """Raises: InvalidRequest, if another process is at work in `folder`."""
    if sys.platform == "win32":
        return  # two batches would still share their keys and pay once
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InvalidRequest(f"Another batch is at work in {folder}") from None
