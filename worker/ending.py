"""How a task leaves a worker: stored and charged, failed, or given back. Safe to be said twice."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

import structlog
from PIL.Image import Image
from sqlalchemy.orm import Session

from storage import events, objects, queue, tasks
from storage.database import transaction
from storage.errors import (
    GenerationFailed,
    ServiceError,
    ServiceUnavailable,
    StorageUnavailable,
    WorkerLost,
)
from storage.models import Task, TaskStatus
from storage.objects import Stored
from worker.drawing import Reading
from worker.finishing import About, encode
from worker.leases import ClaimLost, HandBack, Held
from worker.settings import settings

SETTLE_TIMEOUT_S = 30
"""How long a drawn and stored image waits for a database that is away."""
AGAIN_S = 0.5
"""Between two tries to store or settle."""

logger = structlog.get_logger()


class Job:
    """A claimed task on its way through the stages."""

    def __init__(self, task: Task, held: Held) -> None:
        self.task = task
        self.held = held
        self.prompt = task.rewritten_prompt or task.prompt
        self.reading = Reading((), 0)
        self.width, self.height = task.width, task.height

    def bound(self) -> Any:
        """A context in which every line of the log names the task."""
        return structlog.contextvars.bound_contextvars(
            task_id=self.task.id, request_id=self.task.request_id
        )


def complete(job: Job, image: Image) -> Task | None:
    """Store `image` and charge for it. None: the claim is no longer valid.

    Raises: StorageUnavailable; ServiceUnavailable; what `Held.check` raises.
    """
    job.held.check()
    task = job.task
    about = About(
        task_id=task.id,
        model=task.model,
        seed=task.seed,
        steps=task.steps,
        prompt=job.prompt,
        made_at=datetime.now(UTC),
    )
    stored = _stored(job, encode(image, task.image_format, about))
    url, expires_at = objects.url(stored.key)
    return _end(
        partial(
            tasks.complete,
            claim=job.held.claim,
            image_key=stored.key,
            image_sha256=stored.sha256,
            image_size_bytes=stored.size_bytes,
            image_width=image.width,
            image_height=image.height,
            image_url=url,
            expires_at=expires_at,
            prompt_tokens=job.reading.given,
            prompt_tokens_read=len(job.reading.tokens),
        )
    )


def badly(job: Job, error: BaseException) -> None:
    """End a task because of `error`, in words for the customer, uncharged."""
    claim = job.held.claim
    match error:
        case ClaimLost():
            logger.warning("task.claim_lost")
        case HandBack():
            hand_back(job)
        case StorageUnavailable():
            logger.warning("task.not_stored", error=str(error.__cause__))
            _end(partial(tasks.lose, claim=claim, error=error))
        case ServiceUnavailable():
            lose(job)
        case ServiceError():
            _end(partial(tasks.fail, claim=claim, error=error))
        case _:
            # A bug: the customer is told no more than that, the log keeps the traceback.
            logger.error("task.bug", exc_info=error)
            _end(partial(tasks.fail, claim=claim, error=GenerationFailed()))


def hand_back(job: Job) -> None:
    """Let another worker draw it."""
    _end(partial(tasks.hand_back, claim=job.held.claim))


def lose(job: Job) -> None:
    """Let another worker draw it, unless it was lost too often already."""
    _end(partial(tasks.lose, claim=job.held.claim, error=WorkerLost()))


def _stored(job: Job, data: bytes) -> Stored:
    """Put an image into the store, and wait for one that is away for `store_timeout_s`.

    Raises: StorageUnavailable; what `Held.check` raises.
    """
    until = time.monotonic() + settings.store_timeout_s
    while True:
        try:
            return objects.put(data, job.task.image_format)
        except StorageUnavailable as error:
            if time.monotonic() > until:
                raise
            logger.warning("task.stored_later", error=str(error.__cause__))
        time.sleep(AGAIN_S)
        job.held.check()


def _end(transition: Callable[[Session], Task | None]) -> Task | None:
    """Status, credits and the callback's row move in one commit; then whoever waits is told.

    None: the claim is no longer valid. Raises: ServiceUnavailable.
    """
    task = _settled(transition)
    if task is None:
        logger.warning("task.claim_lost")
        return None
    events.publish(task)
    logger.info("task.ended", status=task.status, error=task.error_code)
    if task.status is TaskStatus.PENDING:
        queue.ring(1)
    return task


def _settled(transition: Callable[[Session], Task | None]) -> Task | None:
    """Raises: ServiceUnavailable, the database was away for SETTLE_TIMEOUT_S."""
    until = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        try:
            with transaction() as session:
                return transition(session)
        except ServiceUnavailable:
            # Done twice it changes nothing: the claim's number is used up by the first time.
            if time.monotonic() > until:
                raise
        time.sleep(AGAIN_S)
