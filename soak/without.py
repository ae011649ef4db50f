"""The service with one guard taken away, in the process that calls one of `GUARDS`.

What the checker does not notice without the guard, it would not notice with it either. The
database's own invariants are taken away as well, by `soak.faults`: they would refuse what the
guard lets through.

fencing   a transition asks neither whose claim it is nor whether the task is still being drawn
charge    a task may be charged twice: no unique entry, and an end that may come again
lease     a claim never runs out
delivery  a callback is owed in a commit of its own, after the one that ends its task
repair    nothing that a crash left behind is looked for
"""

from collections.abc import Callable

from sqlalchemy import CTE, select, text
from sqlalchemy.orm import Session

from storage import deliveries, events, repair, tasks
from storage.database import transaction
from storage.models import Task, TaskStatus
from storage.tasks import Claim


def _whoever_claims() -> None:
    """No worker is told that it has lost a claim, and none is asked whose it is."""
    tasks._HELD = tasks._NAMED
    asked = str(tasks._RENEW)
    tasks._RENEW = text(
        asked.replace("tasks.attempt = held.attempt AND", "").replace(
            "RETURNING tasks.id, tasks.attempt", "RETURNING tasks.id, held.attempt"
        )
    )


def fencing() -> None:
    _whoever_claims()
    tasks.BEFORE.update(dict.fromkeys(tasks.BEFORE, tuple(TaskStatus)))
    tasks.BEFORE[TaskStatus.PROCESSING] = (TaskStatus.PENDING,)


def charge() -> None:
    _whoever_claims()
    tasks.BEFORE[TaskStatus.COMPLETED] = (TaskStatus.PROCESSING, TaskStatus.COMPLETED)


def lease() -> None:
    def never(session: Session, limit: int) -> list[Claim]:
        return []

    tasks.expired = never


def delivery() -> None:
    owe, publish = deliveries.owe, events.publish

    def later(ended: CTE) -> list[CTE]:
        return []

    def in_a_commit_of_its_own(task: Task) -> None:
        if task.status.is_terminal:
            ended = select(Task).where(Task.id == task.id).cte("ended")
            with transaction() as session:
                session.execute(select(ended.c.id).add_cte(*owe(ended)))
        publish(task)

    deliveries.owe = later
    events.publish = in_a_commit_of_its_own


def no_repair() -> None:
    for name in ("lost_workers", "lost_jobs", "missed_deadlines"):
        setattr(repair, name, lambda: 0)


GUARDS: dict[str, Callable[[], None]] = {
    "fencing": fencing,
    "charge": charge,
    "lease": lease,
    "delivery": delivery,
    "repair": no_repair,
}
