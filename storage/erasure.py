"""What a customer wrote and got is erased: some time after the end of its task, or when they ask.

ended ──► erased, its image still to be deleted ──► nothing left      the customer asks
  └───────────────────────────────────────────────► nothing left      its time is over

The row stays, for bills and statistics: who, when, how large, how long, for how much, and how it
ended. Customers are told that there is no such task. The database refuses an erased row that holds
anything. What is in use is not erased: an unfinished task, a callback that is still owed.
"""

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import (
    ARRAY,
    CollectionAggregate,
    ColumnElement,
    Text,
    any_,
    delete,
    func,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.orm import Session

from storage import ledger
from storage.database import from_now
from storage.errors import TaskInUse, TaskNotFound
from storage.models import Delivery, DeliveryAttempt, DeliveryState, RememberedRequest, Task
from storage.settings import settings

_NOTHING: dict[str, Any] = {
    "prompt": "",
    "rewritten_prompt": None,
    "reasoning": None,
    "aspect_ratio": None,
    "seed": 0,
    "callback_url": None,
    "request_id": None,
    "image_url": None,
    "image_sha256": None,
    "error_message": None,
}
"""What the columns hold that a customer can have written or got; the constraint says the same."""


def erase_due(session: Session, limit: int) -> int:
    """Erase at most `limit` tasks whose time is over, the oldest first; returns how many.

    Their images are too old to be there, whatever the row says: no image outlives its task's data.
    What somebody else has locked is left for the next look, so this waits for nobody.
    """
    age_s = max(settings.task_data_ttl_s, settings.image_ttl_s)
    owed = select(Delivery.id).where(
        Delivery.task_id == Task.id, Delivery.state == DeliveryState.WAITING
    )
    due = session.scalars(
        select(Task.id)
        .where(
            text("erased_at IS NULL AND finished_at IS NOT NULL"),  # as the partial index says it
            Task.finished_at < from_now(-age_s),
            ~owed.exists(),
        )
        .order_by(Task.finished_at)
        .limit(limit)
        .with_for_update(skip_locked=True, key_share=True)
    ).all()
    free = set(due) - _in_use(session, due)
    _erase(session, free, image_key=None)
    return len(free)


def erase(session: Session, task_id: str, account_id: str) -> str | None:
    """Erase a task because its owner asks. Returns the key of its image if that must be deleted.

    Once more changes nothing.

    Raises:
        TaskNotFound: there is none, or it is not of `account_id`.
        TaskInUse: it has not ended, or its callback is still owed.
    """
    task = session.scalar(
        select(Task)
        .where(Task.id == task_id, Task.account_id == account_id)
        .with_for_update(key_share=True)
    )
    if task is None:
        raise TaskNotFound
    if task.erased_at is not None:
        return task.image_key
    if not task.status.is_terminal:
        raise TaskInUse
    delivery = session.scalar(select(Delivery).where(Delivery.task_id == task_id).with_for_update())
    if delivery is not None and delivery.state is DeliveryState.WAITING:
        raise TaskInUse("The callback of this task is still owed: delete it a minute later")
    # Under this lock a request is recognised and answered from its tasks.
    ledger.lock(session, {account_id})
    # An empty key is what a downgrade has left of one.
    _erase(session, [task_id], image_key=func.nullif(Task.image_key, ""))
    return task.image_key or None


def images_to_delete(session: Session, limit: int) -> dict[str, str]:
    """The keys of at most `limit` images that their owners wanted deleted, by task."""
    rows = session.execute(
        select(Task.id, Task.image_key)
        .where(text("erased_at IS NOT NULL AND image_key IS NOT NULL"))
        .order_by(Task.id)
        .limit(limit)
    )
    return {task_id: key for task_id, key in rows if key is not None}


def note_deleted(session: Session, deleted: Mapping[str, str]) -> None:
    """The images of these erased tasks are no longer there."""
    session.execute(
        update(Task)
        .where(Task.id == _any(deleted), Task.erased_at.is_not(None))
        .values(image_key=None)
        .execution_options(synchronize_session=False)
    )


def _in_use(session: Session, task_ids: Collection[str]) -> set[str]:
    """Tasks of which a callback, or a request that became them, is locked by somebody else.

    Whatever is not is locked now.
    """
    used: set[str] = set()
    told = select(Delivery.task_id).where(Delivery.task_id == _any(task_ids))
    ended = told.where(Delivery.state != DeliveryState.WAITING)
    used |= set(session.scalars(told))
    used -= set(session.scalars(ended.with_for_update(skip_locked=True)))
    asked = select(RememberedRequest.id, RememberedRequest.task_ids).where(_made(task_ids))
    known = {row.id: row.task_ids for row in session.execute(asked)}
    for row in session.execute(asked.with_for_update(skip_locked=True)):
        known.pop(row.id, None)
    return used.union(*known.values())


def _erase(
    session: Session, task_ids: Collection[str], *, image_key: ColumnElement[str] | None
) -> None:
    if not task_ids:
        return
    told = select(Delivery.id).where(Delivery.task_id == _any(task_ids))
    # A request of which one task is gone can no longer be answered as it was: it goes as a whole.
    for gone in (
        delete(DeliveryAttempt).where(DeliveryAttempt.delivery_id.in_(told)),
        delete(Delivery).where(Delivery.task_id == _any(task_ids)),
        delete(RememberedRequest).where(_made(task_ids)),
    ):
        session.execute(gone.execution_options(synchronize_session=False))
    now = func.clock_timestamp()
    session.execute(
        update(Task)
        .where(Task.id == _any(task_ids))
        .values(
            **_NOTHING,
            image_key=image_key,
            image_expires_at=func.least(Task.image_expires_at, now),
            erased_at=now,
        )
        .execution_options(synchronize_session=False)
    )


def _made(task_ids: Collection[str]) -> ColumnElement[bool]:
    """The requests that became any of these tasks."""
    return RememberedRequest.task_ids.bool_op("&&")(_texts(task_ids))


def _any(ids: Collection[str]) -> CollectionAggregate[Any]:
    return any_(_texts(ids))


def _texts(ids: Collection[str]) -> ColumnElement[Any]:
    """One parameter, however many they are."""
    return literal(list(ids), ARRAY(Text))
