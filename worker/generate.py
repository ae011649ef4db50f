"""The job: claim the task whose turn it is, draw it, store it, settle it.

No transaction is open while the GPU draws or the network uploads. Every end is accounted for: a
task that this process leaves unfinished is found by the repairs when its lease runs out.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import structlog
from PIL.Image import Image
from rq import SimpleWorker
from rq.timeouts import JobTimeoutException
from sqlalchemy.orm import Session

from storage import events, objects, queue, tasks
from storage.database import transaction
from storage.errors import (
    GenerationFailed,
    GenerationTimeout,
    ServiceError,
    ServiceUnavailable,
    StorageUnavailable,
)
from storage.models import Task, TaskStatus
from storage.objects import Stored
from storage.settings import settings
from storage.tasks import Claim
from worker.finishing import encode

RENEWALS_PER_LEASE = 4
"""A lease is renewed this often before it would end, so that some renewals may fail."""

logger = structlog.get_logger()


class Pipeline(Protocol):
    def __call__(
        self,
        prompt: str,
        *,
        width: int,
        height: int,
        seed: int,
        steps: int,
        on_step: Callable[[int, int], None],
    ) -> Image:
        """Draw `prompt` in so many `steps` and return `width` x `height` pixels, RGB, 8 bit.

        `on_step` is called after each step with the number done and the number of all; what it
        raises ends the drawing.

        Raises:
            ServiceError: the image cannot be drawn, in words for the customer.
        """
        ...


class ClaimLost(Exception):
    """The task was cancelled, or this worker was given up for dead."""


class Worker:
    """This process: its name and its pipeline, loaded once and used for every job."""

    def __init__(self, name: str, pipeline: Pipeline) -> None:
        self.name = name
        self.pipeline = pipeline


class JobLoop(SimpleWorker):
    """RQ's loop, in this process and without RQ's remote commands.

    Who may stop a worker is up to its machine, and ending their thread costs every stop a second.
    """

    def subscribe(self) -> None:
        """Listen for no commands."""


_worker: Worker | None = None


def employ(worker: Worker) -> None:
    """Let `worker` do the jobs of this process. RQ names a function, so it has to be found."""
    global _worker
    _worker = worker


def run() -> None:
    """Draw, store and settle the task whose turn it is. Run once too often, it finds nothing."""
    if _worker is None:
        raise RuntimeError("This process has no pipeline: start it with `python -m worker`")
    with transaction() as session:
        task = tasks.claim_next(session, _worker.name)
    if task is None:
        return
    claim = tasks.claim_of(task)
    with structlog.contextvars.bound_contextvars(task_id=task.id, request_id=task.request_id):
        logger.info("task.claimed", attempt=task.attempt)
        events.publish(task)
        _work(task, claim, _worker.pipeline)


def _work(task: Task, claim: Claim, pipeline: Pipeline) -> None:
    try:
        stored = _draw_and_store(task, claim, pipeline)
        url, expires_at = objects.url(stored.key)
    except ClaimLost:
        logger.warning("task.claim_lost")
    except StorageUnavailable as error:
        logger.warning("task.not_stored", error=str(error.__cause__))
        _end(partial(tasks.lose, claim=claim, error=error))
    except ServiceError as error:
        _end(partial(tasks.fail, claim=claim, error=error))
    except JobTimeoutException:  # the pipeline took no step for so long that RQ's limit came first
        _end(partial(tasks.fail, claim=claim, error=GenerationTimeout()))
        raise
    except Exception:
        # A bug: the customer is told no more than that, rq and the log keep the traceback.
        _end(partial(tasks.fail, claim=claim, error=GenerationFailed()))
        raise
    except BaseException:  # this process is being stopped
        _end(partial(tasks.hand_back, claim=claim))
        raise
    else:
        _end(
            partial(
                tasks.complete,
                claim=claim,
                image_key=stored.key,
                image_sha256=stored.sha256,
                image_size_bytes=stored.size_bytes,
                image_url=url,
                expires_at=expires_at,
                image_width=task.width,
                image_height=task.height,
                prompt_tokens=0,
                prompt_tokens_read=0,
            )
        )


def _draw_and_store(task: Task, claim: Claim, pipeline: Pipeline) -> Stored:
    """Raises: ClaimLost, ServiceError."""
    with Lease(claim) as lease:
        image = pipeline(
            task.prompt,
            width=task.width,
            height=task.height,
            seed=task.seed,
            steps=task.steps,
            on_step=lease.step,
        )
        lease.check()
        return objects.put(encode(image, task.image_format), task.image_format)


def _end(transition: Callable[[Session], Task | None]) -> None:
    """Status, credits and the callback's row move in one commit; then whoever waits is told."""
    with transaction() as session:
        task = transition(session)
    if task is None:
        logger.warning("task.claim_lost")
        return
    logger.info("task.ended", status=task.status, error=task.error_code)
    events.publish(task)
    if task.status is TaskStatus.PENDING:
        queue.ring(1)


class Lease:
    """Keeps a claim alive from a thread of its own while the task is drawn and stored.

    The drawing thread only leaves a number behind, so a slow database never slows a step.
    """

    def __init__(self, claim: Claim) -> None:
        self._claim = claim
        self._progress = 0
        self._moved = threading.Event()
        self._stopped = False
        self._lost = False
        self._deadline = time.monotonic() + settings.task_timeout_s
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped = True
        self._moved.set()
        self._thread.join()

    def step(self, done: int, steps: int) -> None:
        """Note that `done` of `steps` steps are done. Raises: what `check` raises."""
        # The last hundredth is the storing.
        self._progress = min(99, 100 * done // steps)
        self._moved.set()
        self.check()

    def check(self) -> None:
        """Raises: ClaimLost; GenerationTimeout, the task has been drawn for too long."""
        if self._lost:
            raise ClaimLost
        if time.monotonic() > self._deadline:
            raise GenerationTimeout

    def _renew_until_stopped(self) -> None:
        told = 0
        while True:
            self._moved.wait(settings.lease_s / RENEWALS_PER_LEASE)
            self._moved.clear()
            if self._stopped:
                return
            progress = self._progress
            try:
                with transaction() as session:
                    held = tasks.renew(session, {self._claim: progress})
            except ServiceUnavailable:
                # Going on is safe: if the lease runs out meanwhile, the claim's number stops us.
                logger.warning("task.not_renewed", task_id=self._claim.task_id)
                continue
            if not held:
                self._lost = True
                return
            if progress > told:
                told = progress
                events.publish_progress(self._claim.task_id)
