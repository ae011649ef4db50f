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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from typing import Any

import orjson
from sqlalchemy import (
    CTE,
    ColumnElement,
    Executable,
    bindparam,
    func,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningUpdate

from storage import deliveries, fairness, idempotency, ledger, reads
from storage.database import driver_of, from_now
from storage.errors import (
    IdempotencyConflict,
    NotPending,
    ServiceError,
    TaskEnded,
    TaskNotFound,
    WorkerLost,
)
from storage.idempotency import Mark
from storage.models import ImageFormat, Task, TaskStatus
from storage.settings import settings

MODEL = "z-image-turbo"
"""The one model that is sold, as every vendor spells it."""

SEED_MAX = 2**31 - 1
ID_PREFIX = "task-unified-"
STEPS = 8
"""Denoising steps: what the model was distilled for. One forward each since diffusers 0.39; before
that 9 gave 8. Source: https://github.com/huggingface/diffusers/pull/13730
"""
MEASURED_TASKS = 20
ENDED_MAX = 1000
"""Ended tasks among which MEASURED_TASKS completed ones are looked for."""
WAITING_COUNT_MAX = 10_000
LIST_MAX = 10_000
"""Tasks that a list counts, and how deep it can be paged."""
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
    steps: int = STEPS
    aspect_ratio: str | None = None
    callback_url: str | None = None
    model: str = MODEL
    prompt_extend: bool = False
    strict_moderation: bool = False
    allow_downscale: bool = False

    @property
    def price(self) -> Decimal:
        """Credits that it costs."""
        factor = settings.prompt_extend_price_factor if self.prompt_extend else 1
        return settings.price_credits * factor


@dataclass(frozen=True, slots=True)
class Submission:
    """A request for one or more images, all or none, with who makes it and what an image costs."""

    account_id: str
    api_key_id: str | None
    images: tuple[ImageRequest, ...]
    dialect: str
    price: Decimal
    request_id: str | None = None
    mark: Mark | None = None
    """By what it is known again; None where it cannot come twice."""
    deadline_s: float | None = None
    """Seconds after which the tasks are cancelled if they have not ended."""
    head_start: bool = False
    """Whether the caller holds the line until the images are there."""


@dataclass(frozen=True, slots=True)
class Submitted:
    """The tasks of a submission, in the order of its images."""

    tasks: list[Task]
    replayed: bool = False
    """Whether they were submitted before, by an earlier copy of the same request."""


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A prompt as a language model rewrote it, and what that took, in tokens of that model."""

    text: str
    reasoning: str
    input_tokens: int
    output_tokens: int
    """Those of the reasoning included."""
    reasoning_tokens: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker's right to a task: the fencing token is the number of the claim."""

    task_id: str
    attempt: int


def new_id(now: datetime) -> str:
    """The one public form of a task id: unix seconds and 8 random lower-case alphanumerics."""
    number = secrets.randbelow(len(_ID_ALPHABET) ** 8)
    tail = ""
    for _ in range(8):
        number, digit = divmod(number, len(_ID_ALPHABET))
        tail += _ID_ALPHABET[digit]
    return f"{ID_PREFIX}{int(now.timestamp())}-{tail}"


def is_id(text: str) -> bool:
    """Whether `text` has the form of a task id."""
    return _ID.fullmatch(text) is not None


Outcome = Submitted | ServiceError


def submit_many(session: Session, submissions: Sequence[Submission]) -> list[Outcome]:
    """Reserve and insert a batch: each submission gets its own tasks or its own error."""
    outcomes: dict[int, Outcome] = {}
    rest = dict(enumerate(submissions))
    while rest:
        # A key that is twice in a batch comes again once its first request is remembered, and a
        # re-send once all that it may repeat is.
        ahead = [i for i, s in rest.items() if s.mark is None or not s.mark.resend] or list(rest)
        first_uses = {_use(index, rest[index]): index for index in reversed(ahead)}
        now = sorted(first_uses.values())
        outcomes |= zip(now, _submit(session, [rest.pop(index) for index in now]), strict=True)
    return [outcomes[index] for index in range(len(submissions))]


def _use(index: int, submission: Submission) -> tuple[object, object]:
    """Equal for two submissions only if they use the same idempotency key."""
    mark = submission.mark
    if mark is None or mark.key is None:
        return None, index
    return submission.account_id, mark.key


def _submit(session: Session, submissions: Sequence[Submission]) -> list[Outcome]:
    locked = ledger.lock(session, {submission.account_id for submission in submissions})
    known = idempotency.known(
        session, [(s.account_id, s.mark) for s in submissions if s.mark is not None], locked.now
    )
    admitted = [_admit(session, submission, locked, known) for submission in submissions]
    rows: list[dict[str, Any]] = []
    for submission, hold in zip(submissions, admitted, strict=True):
        if isinstance(hold, ledger.Hold):
            rows += _rows(submission, hold, locked.now)
    inserted = iter(_insert(session, rows, locked))
    outcomes: list[Outcome] = []
    remembered = []
    for submission, outcome in zip(submissions, admitted, strict=True):
        if isinstance(outcome, ledger.Hold):
            outcome = Submitted([next(inserted) for _ in submission.images])
            if submission.mark is not None:
                remembered.append((submission.account_id, submission.mark, outcome.tasks))
        outcomes.append(outcome)
    idempotency.remember(session, remembered)
    return outcomes


def _admit(
    session: Session, submission: Submission, locked: ledger.Locked, known: idempotency.Known
) -> Outcome | ledger.Hold:
    """What this submission has been before, or else the hold of its credits, or why not."""
    if submission.mark is not None:
        try:
            first = idempotency.first_of(session, submission.account_id, submission.mark, known)
        except IdempotencyConflict as conflict:
            return conflict
        if first is not None:
            return Submitted(first, replayed=True)
    costs = [fairness.cost(image.width, image.height) for image in submission.images]
    return ledger.reserve(locked, submission.account_id, submission.price, costs)


_NEW = (
    "id, account_id, api_key_id, dialect, request_id, model, prompt, width, height, aspect_ratio,"
    " seed, seed_given, steps, image_format, callback_url, prompt_extend, strict_moderation,"
    " allow_downscale, price, user_group, fair_tag, deadline_at, status, progress, attempt, losses,"
    " created_at"
)
"""The columns of a new task, which `_row` has as well; in all others it has nothing."""
_INSERT = (
    f"WITH {ledger.HOLD} INSERT INTO tasks ({_NEW}) SELECT {_NEW}"  # noqa: S608 - names of ours
    " FROM json_populate_recordset(NULL::tasks, %(rows)s::json)"
)


def _insert(session: Session, rows: list[dict[str, Any]], locked: ledger.Locked) -> list[Task]:
    """The tasks as they were inserted: nothing of a new one is the database's choice.

    As JSON they are one parameter of one statement, however many they are.
    """
    if rows:
        written = {"rows": orjson.dumps(rows, default=str).decode()}
        driver_of(session).execute(_INSERT, written | ledger.held(locked))
    return [_as_loaded(row) for row in rows]


def _as_loaded(row: Mapping[str, Any]) -> Task:
    """A task as it is in the database. `Task(**row)` would note each value as a change to write."""
    task: Task = Task.__mapper__.class_manager.new_instance()
    vars(task).update(
        row, status=TaskStatus(row["status"]), image_format=ImageFormat(row["image_format"])
    )
    return task


def _rows(submission: Submission, hold: ledger.Hold, now: datetime) -> list[dict[str, Any]]:
    head_start = fairness.HEAD_START if submission.head_start else 0.0
    return [
        _row(submission, image, hold.user_group, tag - head_start, now)
        for image, tag in zip(submission.images, hold.fair_tags, strict=True)
    ]


def _row(
    submission: Submission, request: ImageRequest, user_group: str, fair_tag: float, now: datetime
) -> dict[str, Any]:
    deadline_s = submission.deadline_s
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
        "steps": request.steps,
        "image_format": request.image_format,
        "callback_url": request.callback_url,
        "prompt_extend": request.prompt_extend,
        "strict_moderation": request.strict_moderation,
        "allow_downscale": request.allow_downscale,
        "price": submission.price,
        "user_group": user_group,
        "fair_tag": fair_tag,
        "deadline_at": None if deadline_s is None else now + timedelta(seconds=deadline_s),
        "status": TaskStatus.PENDING,
        "progress": 0,
        "attempt": 0,
        "losses": 0,
        "created_at": now,
    }


def claim_next(session: Session, worker: str, *, rewriting: bool = True) -> Task | None:
    """Give `worker` the waiting task whose turn it is; None where nothing waits.

    Guard and write are one statement, and what others are claiming is skipped. Without `rewriting`
    a task whose prompt must be rewritten first is passed over.
    """
    for everywhere in fairness.looks():
        for task in _claim(session, worker, _claiming_fairest(rewriting, everywhere), {}):
            fairness.tick(session, task.fair_tag)
            if not rewriting:
                fairness.passed_by()
            return task
    return None


def claim_alike(session: Session, worker: str, task: Task, limit: int) -> list[Task]:
    """Give `worker` at most `limit` waiting tasks that can be drawn together with `task`.

    Virtual time does not move: whoever is drawn along costs those before it almost nothing.
    """
    return _claim(session, worker, _claiming_alike(), fairness.alike_to(task, limit))


def _claim(
    session: Session, worker: str, claiming: ReturningUpdate[Task], chosen: dict[str, float]
) -> list[Task]:
    claimed = session.scalars(claiming, {"claimed_by": worker} | chosen)
    return sorted(claimed, key=lambda task: (task.fair_tag, task.id))


# Built once: to build such a statement takes longer than to run it.
@lru_cache
def _claiming_fairest(rewriting: bool, everywhere: bool) -> ReturningUpdate[Task]:
    return _claiming(fairness.fairest(rewriting=rewriting, everywhere=everywhere))


@lru_cache
def _claiming_alike() -> ReturningUpdate[Task]:
    return _claiming(fairness.alike())


def _claiming(chosen: CTE) -> ReturningUpdate[Task]:
    return (
        update(Task)
        .where(Task.id == chosen.c.id, Task.status.in_(BEFORE[TaskStatus.PROCESSING]))
        .values(
            status=TaskStatus.PROCESSING,
            attempt=Task.attempt + 1,
            worker=bindparam("claimed_by"),
            lease_until=from_now(settings.lease_s),
            started_at=func.clock_timestamp(),
        )
        .returning(Task)
        .execution_options(populate_existing=True, synchronize_session=False)
    )


def must_be_rewritten(task: Task) -> bool:
    """Whether its prompt waits for a language model."""
    return task.prompt_extend and task.rewritten_prompt is None


def claim_of(task: Task) -> Claim:
    return Claim(task.id, task.attempt)


_RENEW = text("""
    UPDATE tasks
       SET lease_until = clock_timestamp() + make_interval(secs => :lease_s),
           progress = greatest(tasks.progress, held.progress)
      FROM unnest(CAST(:ids AS text[]), CAST(:attempts AS int[]), CAST(:progress AS int[]))
           AS held(id, attempt, progress)
     WHERE tasks.id = held.id AND tasks.attempt = held.attempt AND tasks.status = 'processing'
    RETURNING tasks.id, tasks.attempt
""")


def renew(session: Session, progress: Mapping[Claim, int]) -> set[Claim]:
    """Prolong the leases and note the progress of each, in percent.

    Returns those that are still held; the others were cancelled, or their worker given up.
    """
    rows = session.execute(
        _RENEW,
        {
            "lease_s": settings.lease_s,
            "ids": [claim.task_id for claim in progress],
            "attempts": [claim.attempt for claim in progress],
            "progress": list(progress.values()),
        },
    )
    return {Claim(*row) for row in rows}


def note_rewrite(session: Session, claim: Claim, rewrite: Rewrite) -> bool:
    """Keep what a prompt was rewritten to, so that nobody does it again. False: not theirs."""
    held = session.execute(
        update(Task)
        .where(
            Task.id == claim.task_id,
            Task.attempt == claim.attempt,
            Task.status == TaskStatus.PROCESSING,
        )
        .values(
            rewritten_prompt=rewrite.text,
            reasoning=rewrite.reasoning,
            rewrite_input_tokens=rewrite.input_tokens,
            rewrite_output_tokens=rewrite.output_tokens,
            rewrite_reasoning_tokens=rewrite.reasoning_tokens,
        )
        .returning(Task.id)
        .execution_options(synchronize_session=False)
    )
    return held.first() is not None


def complete(
    session: Session,
    claim: Claim,
    *,
    image_key: str,
    image_sha256: str,
    image_size_bytes: int,
    image_width: int,
    image_height: int,
    image_url: str,
    expires_at: datetime,
    prompt_tokens: int,
    prompt_tokens_read: int,
) -> Task | None:
    """The image is stored: charge the task. None: the claim is no longer valid."""
    return _advance(
        session,
        TaskStatus.COMPLETED,
        _HELD,
        _of(claim),
        progress=100,
        image_key=image_key,
        image_sha256=image_sha256,
        image_size_bytes=image_size_bytes,
        image_width=image_width,
        image_height=image_height,
        image_url=image_url,
        image_expires_at=expires_at,
        prompt_tokens=prompt_tokens,
        prompt_tokens_read=prompt_tokens_read,
    )


def fail(session: Session, claim: Claim, error: ServiceError) -> Task | None:
    """The task cannot be drawn: release its credits. None: the claim is no longer valid."""
    return _fail(session, error, _HELD, _of(claim))


def hand_back(session: Session, claim: Claim) -> Task | None:
    """Let another worker draw it: this one is stopping. None: the claim is no longer valid."""
    return _advance(session, TaskStatus.PENDING, _HELD, _of(claim), progress=0)


def lose(session: Session, claim: Claim, error: ServiceError) -> Task | None:
    """What went wrong was not the task's fault: try again, but fail with `error` the last time.

    None: the claim is no longer valid.
    """
    return _lose(session, error, _HELD, _of(claim))


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
    return _lose(session, WorkerLost(), _HELD + _LEASE_OVER, _of(claim))


def cancel(
    session: Session, task_id: str, *, account_id: str | None = None, only_pending: bool = False
) -> Task:
    """End a task that nobody wants any more; its worker notices at its next step.

    Raises:
        TaskNotFound: there is none, or it is not of `account_id`.
        TaskEnded: it was first.
        NotPending: it is being drawn, and `only_pending` asks to leave it then.
    """
    where = _NAMED
    where += () if account_id is None else _OWNED
    where += _WAITING if only_pending else ()
    of = {"of_task": task_id, "of_account": account_id}
    task = _advance(session, TaskStatus.CANCELLED, where, of)
    if task is None:
        owned = () if account_id is None else (Task.account_id == account_id,)
        status = session.scalar(select(Task.status).where(Task.id == task_id, *owned))
        if status is None:
            raise TaskNotFound
        raise TaskEnded if status.is_terminal else NotPending
    return task


def overdue(session: Session, limit: int) -> list[str]:
    """The ids of at most `limit` unfinished tasks whose deadline is over, the oldest first."""
    rows = session.scalars(
        select(Task.id)
        .where(
            # As the partial index says it.
            text("status IN ('pending', 'processing') AND deadline_at IS NOT NULL"),
            Task.deadline_at < func.clock_timestamp(),
        )
        .order_by(Task.deadline_at)
        .limit(limit)
    )
    return list(rows)


@dataclass(frozen=True, slots=True)
class State:
    """A task as it is now; `place` is the number of tasks before it, None once it has left."""

    task: Task
    place: int | None

    def key(self) -> tuple[object, ...]:
        """Differs where there is news."""
        return self.task.status, self.task.progress, self.place


# The ids as one text: psycopg makes an array of a list one by one. None has a comma in it.
_BY_IDS = (
    f"SELECT {', '.join(Task.__table__.c.keys())},"  # noqa: S608 - names of ours
    f" CASE WHEN status = 'pending' THEN {fairness.PLACE} END AS place FROM tasks AS task"
    " WHERE id = ANY(string_to_array(%(ids)s, ',')) AND erased_at IS NULL"
)


async def find_many(asked: Sequence[tuple[str, str]]) -> dict[tuple[str, str], State]:
    """Tasks by (account id, task id); one that is another account's, or erased, is not found."""
    which = await fairness.marks.marked(at_most=WAITING_COUNT_MAX)
    which["ids"] = ",".join([task_id for _, task_id in asked])
    found = {}
    for row in await reads.rows(_BY_IDS, which):
        place = row.pop("place")
        found[row["account_id"], row["id"]] = State(_as_loaded(row), place)
    return {key: found[key] for key in asked if key in found}


def measured(session: Session) -> tuple[float | None, int]:
    """How long the last tasks took to draw and store, mean in seconds, and how many wait now.

    None where none of the last ENDED_MAX that ended was completed and not erased since. Counts no
    further than WAITING_COUNT_MAX.
    """
    ended = (
        select(
            Task.status, Task.finished_at, (Task.finished_at - Task.started_at).label("duration")
        )
        # As the partial index says it: what waits is not in it, however much that is.
        .where(text("erased_at IS NULL AND finished_at IS NOT NULL"))
        .order_by(Task.finished_at.desc())
        .limit(ENDED_MAX)
        .subquery()
    )
    last = (
        select(ended.c.duration)
        .where(ended.c.status == TaskStatus.COMPLETED)
        .order_by(ended.c.finished_at.desc())
        .limit(MEASURED_TASKS)
        .subquery()
    )
    mean_s = session.scalar(select(func.extract("epoch", func.avg(last.c.duration))))
    waiting = fairness.waiting(session, at_most=WAITING_COUNT_MAX)
    return None if mean_s is None else float(mean_s), waiting


@dataclass(frozen=True, slots=True)
class Filter:
    """Which tasks of an account a list shows."""

    account_id: str
    statuses: Collection[TaskStatus] | None = None
    model: str | None = None
    task_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None


def page(session: Session, which: Filter, *, offset: int, limit: int) -> tuple[list[Task], int]:
    """A page of an account's tasks, newest first, and how many there are: at most LIST_MAX.

    Erased ones are not among them.
    """
    query = select(Task).where(Task.account_id == which.account_id, Task.erased_at.is_(None))
    if which.statuses is not None:
        query = query.where(Task.status.in_(which.statuses))
    if which.model is not None:
        query = query.where(Task.model == which.model)
    if which.task_id is not None:
        query = query.where(Task.id == which.task_id)
    if which.since is not None:
        query = query.where(Task.created_at >= which.since)
    if which.until is not None:
        query = query.where(Task.created_at < which.until)
    counted = query.with_only_columns(Task.id).limit(LIST_MAX).subquery()
    total = session.scalar(select(func.count()).select_from(counted)) or 0
    newest_first = query.order_by(Task.created_at.desc(), Task.id.desc())
    return list(session.scalars(newest_first.offset(offset).limit(limit))), total


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


Conditions = tuple[ColumnElement[bool], ...]

# What a move may ask of its task beside where it may come from. Made once, as the statements are:
# to make one takes several times as long as to run it.
_NAMED: Conditions = (Task.id == bindparam("of_task"),)
_HELD: Conditions = (
    *_NAMED,
    Task.attempt == bindparam("of_attempt"),
    Task.status == TaskStatus.PROCESSING,
)
_LEASE_OVER: Conditions = (Task.lease_until < func.clock_timestamp(),)
_OWNED: Conditions = (Task.account_id == bindparam("of_account"),)
_WAITING: Conditions = (Task.status == TaskStatus.PENDING,)
_LOST_ONCE_MORE = Task.losses + 1
_MAY_BE_LOST: Conditions = (settings.losses_max > _LOST_ONCE_MORE,)


def _of(claim: Claim) -> dict[str, Any]:
    return {"of_task": claim.task_id, "of_attempt": claim.attempt}


def _lose(
    session: Session, error: ServiceError, where: Conditions, of: dict[str, Any]
) -> Task | None:
    again = _advance(
        session, TaskStatus.PENDING, where + _MAY_BE_LOST, of, progress=0, losses=_LOST_ONCE_MORE
    )
    return again or _fail(session, error, where, of, losses=_LOST_ONCE_MORE)


def _fail(
    session: Session, error: ServiceError, where: Conditions, of: dict[str, Any], **values: Any
) -> Task | None:
    return _advance(
        session,
        TaskStatus.FAILED,
        where,
        of,
        error_code=type(error).__name__,
        error_message=str(error),
        **values,
    )


def _advance(
    session: Session, to: TaskStatus, where: Conditions, of: dict[str, Any], **values: Any
) -> Task | None:
    """Move the task that meets `where` to `to` if it may go there, else leave it: None.

    `of` are the parameters of `where`. Guard and write are one statement: of two racing callers
    exactly one gets the task.
    """
    said = {name: value for name, value in values.items() if isinstance(value, ColumnElement)}
    given = {f"new_{name}": value for name, value in values.items() if name not in said}
    move = _move(to, where, tuple(said.items()), tuple(name for name in values if name not in said))
    task: Task | None = session.scalar(move, of | given)
    if to is TaskStatus.PENDING:
        fairness.passed_by()
    return task


@lru_cache
def _move(
    to: TaskStatus,
    where: Conditions,
    said: tuple[tuple[str, ColumnElement[Any]], ...],
    given: tuple[str, ...],
) -> Executable:
    """The statement that moves a task, and gives it.

    What ends it moves its credits and owes its callback as well: no end can forget either, and
    the account, which many tasks may share, is locked for no round trip.
    """
    values = dict(said) | {name: bindparam(f"new_{name}") for name in given}
    if to.is_terminal:
        values["finished_at"] = func.clock_timestamp()
    moved = (
        update(Task)
        .where(Task.status.in_(BEFORE[to]), *where)
        .values(status=to, lease_until=None, **values)
        .returning(Task)
        .cte("moved")
    )
    statement = select(*moved.c)
    if to.is_terminal:
        settle = ledger.settle if to is TaskStatus.COMPLETED else ledger.release
        statement = statement.add_cte(*settle(moved), *deliveries.owe(moved))
    return select(Task).from_statement(statement).execution_options(populate_existing=True)
