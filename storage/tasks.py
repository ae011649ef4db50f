"""The life of a task. No other module changes a task's status.

pending ◄──► processing ──► completed    charged
   │             ├────────► failed       not charged
   └─────────────┴────────► cancelled    not charged

A task goes back from processing to pending when its worker hands it back or is lost. Every claim
has a number; whoever holds an older one can change nothing.
"""

import re
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import ColumnElement, func, insert, select, text, tuple_, update
from sqlalchemy.orm import Session

from storage import deliveries, fairness, ledger
from storage.database import from_now
from storage.errors import ServiceError, TaskEnded, TaskNotFound, WorkerLost
from storage.models import ImageFormat, Task, TaskStatus
from storage.settings import settings

MODEL = "z-image-turbo"
"""The one model that is sold, as every vendor spells it."""

SEED_MAX = 2**31 - 1
ID_PREFIX = "task-unified-"
MEASURED_TASKS = 20
WAITING_COUNT_MAX = 10_000
_ID_ALPHABET = string.ascii_lowercase + string.digits

_ID = re.compile(ID_PREFIX + r"[0-9]{1,12}-[a-z0-9]{8}")

BEFORE = {
    TaskStatus.PENDING: (TaskStatus.PROCESSING,),
    TaskStatus.PROCESSING: (TaskStatus.PENDING,),
    TaskStatus.COMPLETED: (TaskStatus.PROCESSING,),
    TaskStatus.FAILED: (TaskStatus.PROCESSING,),
    TaskStatus.CANCELLED: (TaskStatus.PENDING, TaskStatus.PROCESSING),
}
"""For each status, the statuses a task may come from."""


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """What a customer asked for, whatever the dialect. Sizes in pixels; `seed` None is random."""

    prompt: str
    width: int
    height: int
    image_format: ImageFormat
    seed: int | None = None
    aspect_ratio: str | None = None
    callback_url: str | None = None
    model: str = MODEL


@dataclass(frozen=True, slots=True)
class Submission:
    """A request with who makes it and what it costs."""

    account_id: str
    api_key_id: str
    request: ImageRequest
    dialect: str
    price: Decimal
    request_id: str | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker's right to a task: the fencing token is the number of the claim."""

    task_id: str
    attempt: int


def new_id(now: datetime) -> str:
    """The one public form of a task id: unix seconds and 8 random lower-case alphanumerics."""
    tail = "".join(secrets.choice(_ID_ALPHABET) for _ in range(8))
    return f"{ID_PREFIX}{int(now.timestamp())}-{tail}"


def is_id(text: str) -> bool:
    """Whether `text` has the form of a task id."""
    return _ID.fullmatch(text) is not None


def submit_many(session: Session, submissions: Sequence[Submission]) -> list[Task | ServiceError]:
    """Reserve and insert a batch: each submission gets its own task or its own error."""
    asks = [
        ledger.Ask(s.account_id, s.price, fairness.cost(s.request.width, s.request.height))
        for s in submissions
    ]
    outcomes = ledger.reserve_many(session, asks)
    now = datetime.now(UTC)
    taken = [
        _row(submission, hold, now)
        for submission, hold in zip(submissions, outcomes, strict=True)
        if isinstance(hold, ledger.Hold)
    ]
    if not taken:
        return [outcome for outcome in outcomes if isinstance(outcome, ServiceError)]
    inserted = iter(
        session.scalars(insert(Task).returning(Task, sort_by_parameter_order=True), taken)
    )
    return [o if isinstance(o, ServiceError) else next(inserted) for o in outcomes]


def _row(submission: Submission, hold: ledger.Hold, now: datetime) -> dict[str, Any]:
    request = submission.request
    return {
        "id": new_id(now),
        "account_id": submission.account_id,
        "api_key_id": submission.api_key_id,
        "dialect": submission.dialect,
        "request_id": submission.request_id,
        "model": request.model,
        "prompt": request.prompt,
        "width": request.width,
        "height": request.height,
        "aspect_ratio": request.aspect_ratio,
        # Chosen here, so that a task that is drawn twice is the same picture twice.
        "seed": secrets.randbelow(SEED_MAX) + 1 if request.seed is None else request.seed,
        "seed_given": request.seed is not None,
        "image_format": request.image_format,
        "callback_url": request.callback_url,
        "price": submission.price,
        "user_group": hold.user_group,
        "fair_tag": hold.fair_tag,
        "created_at": now,
    }


def claim_next(session: Session, worker: str) -> Task | None:
    """Give `worker` the waiting task whose turn it is; None where nothing waits.

    Guard and write are one statement, and what others are claiming is skipped.
    """
    fairest = fairness.fairest(limit=1)
    task = session.scalar(
        update(Task)
        .where(Task.id == fairest.c.id, Task.status.in_(BEFORE[TaskStatus.PROCESSING]))
        .values(
            status=TaskStatus.PROCESSING,
            attempt=Task.attempt + 1,
            worker=worker,
            lease_until=from_now(settings.lease_s),
            started_at=func.clock_timestamp(),
        )
        .returning(Task)
        .execution_options(populate_existing=True)
    )
    if task is not None:
        fairness.tick(session, task.fair_tag)
    return task


def claim_of(task: Task) -> Claim:
    return Claim(task.id, task.attempt)


def renew(session: Session, claim: Claim, progress: int) -> bool:
    """Prolong the lease and note the progress in percent. False: the task is no longer theirs."""
    held = session.execute(
        update(Task)
        .where(*_held(claim))
        .values(
            lease_until=from_now(settings.lease_s), progress=func.greatest(Task.progress, progress)
        )
        .returning(Task.id)
        .execution_options(synchronize_session=False)
    )
    return held.first() is not None


def complete(
    session: Session, claim: Claim, *, image_key: str, image_url: str, expires_at: datetime
) -> Task | None:
    """The image is stored: charge the task. None: the claim is no longer valid."""
    return _advance(
        session,
        TaskStatus.COMPLETED,
        *_held(claim),
        progress=100,
        image_key=image_key,
        image_url=image_url,
        image_expires_at=expires_at,
    )


def fail(session: Session, claim: Claim, error: ServiceError) -> Task | None:
    """The task cannot be drawn: release its credits. None: the claim is no longer valid."""
    return _fail(session, error, *_held(claim))


def hand_back(session: Session, claim: Claim) -> Task | None:
    """Let another worker draw it: this one is stopping. None: the claim is no longer valid."""
    return _advance(session, TaskStatus.PENDING, *_held(claim), progress=0)


def lose(session: Session, claim: Claim, error: ServiceError) -> Task | None:
    """What went wrong was not the task's fault: try again, but fail with `error` the last time.

    None: the claim is no longer valid.
    """
    return _lose(session, error, *_held(claim))


def expired(session: Session, limit: int) -> list[Claim]:
    """At most `limit` claims whose lease ran out, the oldest first."""
    rows = session.execute(
        select(Task.id, Task.attempt)
        .where(Task.status == text("'processing'"), Task.lease_until < func.clock_timestamp())
        .order_by(Task.lease_until)
        .limit(limit)
    )
    return [Claim(*row) for row in rows]


def give_up(session: Session, claim: Claim) -> Task | None:
    """Take a task from a worker whose lease ran out: pending again, or failed the last time.

    None: the worker was heard of after all, or another repair was first.
    """
    return _lose(session, WorkerLost(), *_held(claim), Task.lease_until < func.clock_timestamp())


def cancel(session: Session, task_id: str, *, account_id: str | None = None) -> Task:
    """End a task that nobody wants any more; its worker notices at its next renewal.

    Raises:
        TaskNotFound: there is none, or it is not of `account_id`.
        TaskEnded: it was first.
    """
    owned = () if account_id is None else (Task.account_id == account_id,)
    task = _advance(session, TaskStatus.CANCELLED, Task.id == task_id, *owned)
    if task is None:
        if session.scalar(select(Task.id).where(Task.id == task_id, *owned)) is None:
            raise TaskNotFound
        raise TaskEnded
    return task


def find_many(session: Session, asked: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Task]:
    """Tasks by (account id, task id); an id of another account is not found."""
    rows = session.scalars(select(Task).where(Task.id.in_([task_id for _, task_id in asked])))
    found = {(task.account_id, task.id): task for task in rows}
    return {key: found[key] for key in asked if key in found}


def measured(session: Session) -> tuple[float | None, int]:
    """How long the last tasks took to draw and store, mean in seconds, and how many wait now.

    None where nothing was completed yet. Counts no further than WAITING_COUNT_MAX.
    """
    last = (
        select((Task.finished_at - Task.started_at).label("duration"))
        .where(Task.status == TaskStatus.COMPLETED)
        .order_by(Task.created_at.desc(), Task.id.desc())
        .limit(MEASURED_TASKS)
        .subquery()
    )
    mean_s = session.scalar(select(func.extract("epoch", func.avg(last.c.duration))))
    waiting = fairness.waiting(session, at_most=WAITING_COUNT_MAX)
    return None if mean_s is None else float(mean_s), waiting


def newest(
    session: Session,
    *,
    account_id: str | None,
    status: TaskStatus | None,
    before: tuple[datetime, str] | None,
    limit: int,
) -> list[Task]:
    """Tasks of one account or of all, newest first, older than (created_at, id) `before`."""
    query = select(Task).order_by(Task.created_at.desc(), Task.id.desc()).limit(limit)
    if account_id is not None:
        query = query.where(Task.account_id == account_id)
    if status is not None:
        query = query.where(Task.status == status)
    if before is not None:
        query = query.where(tuple_(Task.created_at, Task.id) < before)
    return list(session.scalars(query))


def _lose(session: Session, error: ServiceError, *where: ColumnElement[bool]) -> Task | None:
    again = _advance(
        session,
        TaskStatus.PENDING,
        *where,
        Task.losses + 1 < settings.losses_max,
        progress=0,
        losses=Task.losses + 1,
    )
    return again or _fail(session, error, *where, losses=Task.losses + 1)


def _fail(
    session: Session, error: ServiceError, *where: ColumnElement[bool], **values: Any
) -> Task | None:
    return _advance(
        session,
        TaskStatus.FAILED,
        *where,
        error_code=type(error).__name__,
        error_message=str(error),
        **values,
    )


def _advance(
    session: Session, to: TaskStatus, *where: ColumnElement[bool], **values: Any
) -> Task | None:
    """Move the task that meets `where` to `to` if it may go there, else leave it: None.

    Guard and write are one statement: of two racing callers exactly one gets the task. Whoever
    ends it moves its credits and owes its callback here, so that no end can forget either.
    """
    if to.is_terminal:
        values["finished_at"] = func.clock_timestamp()
    task = session.scalar(
        update(Task)
        .where(Task.status.in_(BEFORE[to]), *where)
        .values(status=to, lease_until=None, **values)
        .returning(Task)
        .execution_options(populate_existing=True)
    )
    if task is not None and to.is_terminal:
        (ledger.settle if to is TaskStatus.COMPLETED else ledger.release)(session, task)
        deliveries.owe(session, task)
    return task


def _held(claim: Claim) -> tuple[ColumnElement[bool], ...]:
    return (
        Task.id == claim.task_id,
        Task.attempt == claim.attempt,
        Task.status == TaskStatus.PROCESSING,
    )
