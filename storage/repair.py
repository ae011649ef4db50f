"""What a crash left behind, found by looking at the state; the courier runs it every few seconds,
in as many copies as there are.

A lost job     more tasks pending than jobs waiting    the bell is rung for the difference, up to
                                                       as many jobs as are kept
A lost worker  processing, its lease run out           pending again; after the last time failed
A deadline     unfinished, its deadline over           cancelled, uncharged
An old image   in the bucket longer than its URL lives deleted, known to a task or not
An old task    ended longer ago than its data live     erased
A deleted one  erased, its image still in the bucket   deleted from there as well
"""

from collections.abc import Mapping
from datetime import timedelta

import structlog
from redis.exceptions import RedisError

from storage import erasure, events, fairness, idempotency, objects, queue, tasks
from storage.database import transaction
from storage.errors import StorageUnavailable, TaskEnded
from storage.models import TaskStatus
from storage.settings import settings

LOSSES_MAX = 500
"""Lost tasks that one look takes care of."""
OVERDUE_MAX = 500
"""Tasks that one look cancels because of their deadlines."""
FORGOTTEN_MAX = 10_000
"""Remembered requests that one look forgets."""
ERASED_MAX = 500
"""Tasks that are erased in one transaction: it holds their rows, so it must be short."""
ERASURES_MAX = 200
"""Such transactions in one look."""
IMAGE_GRACE_S = 60
"""An image outlives its URL by this much, for downloads that began in its last second."""

logger = structlog.get_logger()


def lost_workers() -> int:
    """Take the tasks of dead workers from them. Returns how many."""
    with transaction() as session:
        claims = tasks.expired(session, LOSSES_MAX)
    taken = 0
    for claim in claims:
        # One by one: ending a task locks its account, and two repairs must not wait crosswise.
        with transaction() as session:
            task = tasks.give_up(session, claim)
        if task is None:
            continue
        taken += 1
        logger.warning("task.worker_lost", task_id=task.id, worker=task.worker, status=task.status)
        events.publish(task)
        if task.status is TaskStatus.PENDING:
            queue.ring(1)
    return taken


def lost_jobs() -> int:
    """Ring for tasks that wait without a job, as far as jobs are kept. Returns how many were rung.

    A job that rings for nothing is harmless, so two copies may count the same difference.
    """
    try:
        jobs = queue.count()
    except RedisError as error:
        logger.warning("repair.queue_unreachable", error=str(error))
        return 0
    with transaction() as session:
        waiting = fairness.waiting(session, at_most=queue.BELLS_MAX)
    missing = waiting - jobs
    if missing > 0:
        if waiting < queue.BELLS_MAX:  # otherwise not all that wait ever had one
            logger.warning("queue.jobs_lost", times=missing)
        queue.ring(missing)
    return max(0, missing)


def missed_deadlines() -> int:
    """Cancel what was not wanted any later than now. Returns how many."""
    with transaction() as session:
        task_ids = tasks.overdue(session, OVERDUE_MAX)
    cancelled = 0
    for task_id in task_ids:
        try:
            with transaction() as session:
                task = tasks.cancel(session, task_id)
        except TaskEnded:
            continue
        cancelled += 1
        logger.info("task.deadline_missed", task_id=task.id)
        events.publish(task)
    return cancelled


def old_requests() -> int:
    """Forget requests that nobody may repeat any more. Returns how many."""
    with transaction() as session:
        return idempotency.forget(session, FORGOTTEN_MAX)


def old_images() -> int:
    """Delete images whose time is over. Returns how many."""
    try:
        deleted = objects.delete_older_than(timedelta(seconds=settings.image_ttl_s + IMAGE_GRACE_S))
    except StorageUnavailable as error:
        logger.warning("repair.images_unreachable", error=str(error.__cause__))
        return 0
    if deleted:
        logger.info("images.deleted", images=deleted)
    return deleted


def old_tasks() -> int:
    """Erase what was in tasks whose time is over. Returns how many."""
    erased = 0
    for _ in range(ERASURES_MAX):
        with transaction() as session:
            now = erasure.erase_due(session, ERASED_MAX)
        erased += now
        if now < ERASED_MAX:
            break
    if erased:
        logger.info("tasks.erased", tasks=erased)
    return erased


def unwanted_images() -> int:
    """Delete the images of tasks that their owners had erased. Returns how many."""
    with transaction() as session:
        images = erasure.images_to_delete(session, objects.DELETE_MAX)
    return delete_images(images)


def delete_images(images: Mapping[str, str]) -> int:
    """Delete the images of erased tasks, keys by task. Returns how many.

    What cannot be deleted now stays noted on its task, for `unwanted_images`.
    """
    if not images:
        return 0
    try:
        left = objects.delete(list(images.values()))
    except StorageUnavailable as error:
        logger.warning("repair.images_unreachable", error=str(error.__cause__))
        return 0
    if left:
        logger.warning("repair.images_not_deleted", images=len(left))
    deleted = {task_id: key for task_id, key in images.items() if key not in left}
    with transaction() as session:
        erasure.note_deleted(session, deleted)
    return len(deleted)
