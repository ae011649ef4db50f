"""What the service answers, as values."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from zimage import files
from zimage.errors import ServiceUnavailable

JSONObject = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TaskError:
    """Why a task has no image."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Task:
    """One request for one image, as the service described it at some moment.

    `status` is `pending`, `processing`, `completed` or `failed`; a cancelled task is `failed` with
    the code `request_cancelled`. `queue_position` counts the tasks ahead, `estimated_s` is seconds
    to the end; both are None once they no longer apply. `sha256` is hex.
    """

    id: str
    status: str
    progress: int
    model: str
    created_at: datetime
    can_cancel: bool
    queue_position: int | None = None
    estimated_s: int | None = None
    credits_reserved: Decimal | None = None
    credits_used: Decimal | None = None
    image_url: str | None = None
    seed: int | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    expired: bool = False
    error: TaskError | None = None
    replayed: bool = False
    """The create was not the first with its idempotency key: this is the first one's task."""
    raw: JSONObject = field(default_factory=dict, repr=False, compare=False)

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed")

    @property
    def completed(self) -> bool:
        return self.status == "completed"

    @property
    def cancelled(self) -> bool:
        return self.error is not None and self.error.code == "request_cancelled"


@dataclass(frozen=True, slots=True)
class Image:
    """A finished task and the bytes of its PNG."""

    task: Task
    data: bytes = field(repr=False)

    def save(self, path: str | Path) -> Path:
        """Write the image to `path`: whole or not at all. Parent folders are made."""
        return files.write_whole(Path(path), self.data)


@dataclass(frozen=True, slots=True)
class TaskSummary:
    """A line of the list of tasks; `duration_s` is seconds from creation to end."""

    id: str
    status: str
    model: str
    progress: int
    created_at: datetime
    duration_s: float | None
    has_results: bool
    has_error: bool
    credits_used: Decimal | None


@dataclass(frozen=True, slots=True)
class TaskPage:
    """A page of the list, newest first; `total` counts all pages, `number` begins at 1."""

    tasks: list[TaskSummary]
    total: int
    number: int
    size: int
    raw: JSONObject = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Credits:
    """What can still be spent and what was: by the account, and by this key if it is limited."""

    remaining: Decimal
    used: Decimal
    key_remaining: Decimal | None
    key_used: Decimal
    raw: JSONObject = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Quote:
    """What an image would cost now; nothing was submitted."""

    credits: Decimal
    available: Decimal
    affordable: bool
    estimated_s: int | None
    raw: JSONObject = field(repr=False, compare=False)


def read(body: bytes, form: Callable[[JSONObject], T]) -> T:
    """What `body` says, read by `form`; fractions stay exact. Raises: ServiceUnavailable."""
    try:
        return form(json.loads(body, parse_float=Decimal))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ServiceUnavailable(
            f"This is not an answer of the service; is the base URL right? ({error!r})"
        ) from error


def read_task(said: JSONObject) -> Task:
    """A task from the answer to create, get or cancel, or from an event."""
    info, usage = said.get("task_info") or {}, said.get("usage") or {}
    results = said.get("result_data") or []
    result = results[0] if isinstance(results, list) and results else {}
    links = said.get("results") or [result.get("image_url")]
    error = said.get("error")
    return Task(
        id=said["id"],
        status=said["status"],
        progress=said.get("progress") or 0,
        model=said.get("model") or "",
        created_at=datetime.fromtimestamp(int(said.get("created") or 0), UTC),
        can_cancel=bool(info.get("can_cancel")),
        queue_position=info.get("queue_position"),
        estimated_s=info.get("estimated_time"),
        credits_reserved=_decimal(usage.get("credits_reserved")),
        credits_used=_decimal(usage.get("credits_used")),
        image_url=links[0],
        seed=result.get("seed"),
        sha256=result.get("sha256"),
        size_bytes=result.get("size_bytes"),
        expired=bool(said.get("results_expired")),
        error=TaskError(str(error.get("code")), str(error.get("message"))) if error else None,
        raw=said,
    )


def read_task_page(said: JSONObject) -> TaskPage:
    return TaskPage(
        tasks=[_read_summary(line) for line in said["data"]],
        total=said["total"],
        number=said["page"],
        size=said["page_size"],
        raw=said,
    )


def _read_summary(line: JSONObject) -> TaskSummary:
    duration = line.get("duration")
    return TaskSummary(
        id=line["id"],
        status=line["status"],
        model=line.get("model") or "",
        progress=line.get("progress") or 0,
        created_at=datetime.fromtimestamp(int(line.get("created_at") or 0), UTC),
        duration_s=None if duration is None else float(duration),
        has_results=bool(line.get("has_results")),
        has_error=bool(line.get("has_error")),
        credits_used=_decimal(line.get("credits_used")),
    )


def read_credits(said: JSONObject) -> Credits:
    user, token = said["data"]["user"], said["data"]["token"]
    return Credits(
        remaining=Decimal(user["remaining_credits"]),
        used=Decimal(user["used_credits"]),
        key_remaining=(
            None if token.get("unlimited_credits") else _decimal(token.get("remaining_credits"))
        ),
        key_used=Decimal(token.get("used_credits") or 0),
        raw=said,
    )


def read_quote(said: JSONObject) -> Quote:
    return Quote(
        credits=Decimal(said["usage"]["credits_reserved"]),
        available=Decimal(said["balance"]["available"]),
        affordable=bool(said["affordable"]),
        estimated_s=said.get("estimated_time"),
        raw=said,
    )


def _decimal(value: object) -> Decimal | None:
    return None if value is None else Decimal(str(value))
