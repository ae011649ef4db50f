"""An order for images, placed through any front door: submitted, waited for, quoted, cancelled.

place  submits and returns at once, or after `Prefer: wait`: for the dialects that poll.
draw   submits and holds the line until the images are there: for the dialects that do not. Whoever
       hangs up, or waits in vain, does not pay: what has not ended is then cancelled.
"""

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import anyio
import anyio.to_thread
import structlog
from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from api import estimate, idempotency, preferences
from api.batching import Batcher
from api.preferences import Preferences
from api.waiting import Waiting
from storage import accounts, errors, events, objects, tasks
from storage.accounts import Credential
from storage.database import transaction
from storage.errors import (
    GenerationTimeout,
    ModelAccessDenied,
    ServiceUnavailable,
    StorageUnavailable,
    TaskCancelled,
    TaskEnded,
    TaskNotFound,
)
from storage.models import Account, Task, TaskStatus
from storage.tasks import ImageRequest, State, Submission, Submitted

DEADLINE_MARGIN_S = 5
"""A held caller's tasks are cancelled by the repairs this long after the caller should have been
answered: only if the process that held the line is gone."""

FETCHES = anyio.CapacityLimiter(16)
"""Images that are fetched from the store at a time: each is held in memory as a whole."""

FETCH_TIMEOUT_S = 20
"""How long a caller waits for the image store: for its turn, and for all of the bytes."""

logger = structlog.get_logger()


class CallerGone(Exception):
    """The caller hung up before there was an answer."""


@dataclass(frozen=True, slots=True)
class Quote:
    """What an order would cost; nothing was submitted."""

    model: str
    images: int
    price: Decimal
    user_group: str
    available: Decimal
    estimated_s: float

    def render(self) -> dict[str, object]:
        """The same in every dialect, inside its envelope."""
        total = self.price * self.images
        return {
            "object": "image.generation.quote",
            "model": self.model,
            "estimated_time": round(self.estimated_s, 1),
            "usage": {
                "billing_rule": "per_call",
                "credits_reserved": total,
                "images": self.images,
                "user_group": self.user_group,
            },
            "balance": {"available": self.available},
            "affordable": self.available >= total,
        }


async def place(
    request: Request, caller: Credential, images: Sequence[ImageRequest], dialect: str
) -> list[Task] | Quote:
    """Submit `images`, all or none. With `Prefer: wait` they may have ended when it returns.

    Raises: InvalidRequest, ModelAccessDenied, IdempotencyConflict, and what
        `storage.ledger.reserve` says.
    """
    asked = preferences.read(request, request.state.body)
    if asked.dry_run:
        return await _quote(caller, images)
    submitted = await _submit(request, caller, images, dialect, asked)
    return await _as_preferred(request, caller, submitted.tasks, asked.wait_s)


async def draw(
    request: Request,
    caller: Credential,
    images: Sequence[ImageRequest],
    dialect: str,
    *,
    timeout_s: float,
    resends: bool = False,
) -> list[Task] | Quote:
    """Submit `images`, all or none, and return the tasks when all have ended; `image_of` reads it.

    `resends` says that a caller who hangs up comes again, so its tasks are left to be drawn.

    Raises: what `place` raises; GenerationTimeout, they have not ended after `timeout_s`;
        ServiceUnavailable, this process is about to end; CallerGone.
    """
    asked = preferences.read(request, request.state.body)
    if asked.dry_run:
        return await _quote(caller, images)
    submitted = await _submit(request, caller, images, dialect, asked, timeout_s)
    waiting: Waiting = request.app.state.waiting
    ids = [task.id for task in submitted.tasks]
    comes_again = resends or idempotency.read_key(request) is not None
    try:
        found = await _held(request, waiting.until_ended(caller.account_id, ids, timeout_s))
        if all(task.status.is_terminal for task in found):
            return found
        raise ServiceUnavailable if waiting.stopping else GenerationTimeout
    except (CallerGone, ServiceUnavailable):
        if not comes_again:
            await _abandon(waiting, caller, ids)
        raise
    except GenerationTimeout:
        await _abandon(waiting, caller, ids)
        raise


async def _held(request: Request, answer: Coroutine[Any, Any, list[Task]]) -> list[Task]:
    """What `answer` returns. Raises: CallerGone, the caller hung up before."""
    answered, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answered, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answered.done():
            raise CallerGone
        return await answered
    finally:
        for future in (answered, gone):
            future.cancel()
        await asyncio.gather(answered, gone, return_exceptions=True)


def image_of(task: Task) -> str:
    """The URL of a task's image.

    Raises: what ended the task without one; TaskNotFound, the image has expired.
    """
    if task.status is TaskStatus.CANCELLED:
        raise TaskCancelled
    if task.status is TaskStatus.FAILED:
        raise errors.of_task(task.error_code, task.error_message)
    if task.image_expired or task.image_url is None:
        raise TaskNotFound("The image has expired and was deleted.")
    return task.image_url


async def bytes_of(task: Task) -> bytes:
    """The file of a task's image. Raises: what `image_of` raises; ServiceUnavailable."""
    image_of(task)
    try:
        with anyio.fail_after(FETCH_TIMEOUT_S):
            return await anyio.to_thread.run_sync(
                objects.get, task.image_key or "", limiter=FETCHES, abandon_on_cancel=True
            )
    except (StorageUnavailable, TimeoutError) as error:
        # Not as it is said of a task that ends by it: this one is drawn and paid for.
        raise ServiceUnavailable(
            f"The image of task {task.id} is drawn, but cannot be fetched at the moment"
        ) from error
    except FileNotFoundError:
        raise TaskNotFound("The image has expired and was deleted.") from None


async def find(request: Request, caller: Credential, task_id: str) -> Task:
    """The caller's own task; with `Prefer: wait`, when it has ended.

    Raises: TaskNotFound, ModelAccessDenied.
    """
    return (await find_state(request, caller, task_id)).task


async def find_state(request: Request, caller: Credential, task_id: str) -> State:
    """As `find`, with its place in the queue. Raises: TaskNotFound, ModelAccessDenied."""
    state = await find_now(request, caller, task_id)
    wait_s = preferences.read_wait(request)
    if wait_s is None:
        return state
    (task,) = await _as_preferred(request, caller, [state.task], wait_s)
    return (
        State(task, None) if task.status.is_terminal else await find_now(request, caller, task_id)
    )


async def find_now(request: Request, caller: Credential, task_id: str) -> State:
    """The caller's own task as it is. Raises: TaskNotFound, ModelAccessDenied."""
    if not tasks.is_id(task_id):
        raise TaskNotFound
    reads: Batcher[tuple[str, str], State] = request.app.state.reads
    state = await reads.add((caller.account_id, task_id))
    if not caller.may_use(state.task.model):
        raise ModelAccessDenied(state.task.model)
    return state


async def cancel(
    request: Request, caller: Credential, task_id: str, *, only_pending: bool = False
) -> Task:
    """Cancel the caller's own task.

    Raises: TaskNotFound, ModelAccessDenied, TaskEnded, NotPending.
    """
    await find_now(request, caller, task_id)
    return await run_in_threadpool(_cancel, task_id, caller.account_id, only_pending)


async def _submit(
    request: Request,
    caller: Credential,
    images: Sequence[ImageRequest],
    dialect: str,
    asked: Preferences,
    held_s: float | None = None,
) -> Submitted:
    _check_models(caller, images)
    deadlines_s = [asked.cancel_after_s, None if held_s is None else held_s + DEADLINE_MARGIN_S]
    submissions: Batcher[Submission, Submitted] = request.app.state.submissions
    submitted = await submissions.add(
        Submission(
            account_id=caller.account_id,
            api_key_id=caller.key_id,
            images=tuple(images),
            dialect=dialect,
            price=images[0].price,
            request_id=request.state.request_id,
            mark=idempotency.mark(request, request.state.body, caller),
            deadline_s=min((s for s in deadlines_s if s is not None), default=None),
            head_start=held_s is not None,
        )
    )
    if submitted.replayed:
        request.state.headers["idempotency-replayed"] = "true"
    for task in submitted.tasks:
        event = "task.replayed" if submitted.replayed else "task.submitted"
        logger.info(event, task_id=task.id, account_id=task.account_id, dialect=dialect)
    return submitted


async def _as_preferred(
    request: Request, caller: Credential, found: list[Task], wait_s: int | None
) -> list[Task]:
    if wait_s is None:
        return found
    request.state.headers["Preference-Applied"] = f"wait={wait_s}"
    waiting: Waiting = request.app.state.waiting
    with suppress(ServiceUnavailable):  # they are submitted: whoever asked must hear of them
        return await waiting.until_ended(caller.account_id, [task.id for task in found], wait_s)
    return found


async def _quote(caller: Credential, images: Sequence[ImageRequest]) -> Quote:
    _check_models(caller, images)
    account = await run_in_threadpool(_account, caller.account_id)
    return Quote(
        model=images[0].model,
        images=len(images),
        price=images[0].price,
        user_group=account.user_group,
        available=account.balance - account.reserved,
        estimated_s=await estimate.seconds_to_end(),
    )


def _check_models(caller: Credential, images: Sequence[ImageRequest]) -> None:
    """Raises: ModelAccessDenied."""
    for model in {image.model for image in images}:
        if not caller.may_use(model):
            raise ModelAccessDenied(model)


def _account(account_id: str) -> Account:
    with transaction() as session:
        return accounts.get(session, account_id)


async def _gone(request: Request) -> None:
    """Return when the caller hangs up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _abandon(waiting: Waiting, caller: Credential, task_ids: Sequence[str]) -> None:
    """Cancel what has not ended, unless somebody else waits for it: a re-send that was quicker."""
    for task_id in task_ids:
        if waiting.is_watched(task_id):
            continue
        with suppress(TaskEnded, ServiceUnavailable):  # the deadline does it later
            await run_in_threadpool(_cancel, task_id, caller.account_id, False)
            logger.info("task.abandoned", task_id=task_id)


def _cancel(task_id: str, account_id: str, only_pending: bool) -> Task:
    with transaction() as session:
        task = tasks.cancel(session, task_id, account_id=account_id, only_pending=only_pending)
    events.publish(task)
    return task
