"""Which waiting task is next: start-time fair queueing between accounts, decided at the claim.

Every task carries a tag in virtual time. An account's tags follow each other at a distance of
cost / weight, beginning no earlier than the virtual time at which it submits; a free worker takes
the smallest tag. So a thousand tasks of one customer lie far apart in virtual time, and another
customer's single task falls between the next two of them.

Source: Goyal, Vin, Cheng, "Start-time Fair Queuing", SIGCOMM 1996.
"""

from collections.abc import Sequence

from sqlalchemy import CTE, ColumnElement, Select, func, or_, select, text, update
from sqlalchemy.orm import Session

from storage.models import FairClock, Task
from storage.settings import settings

COST_UNIT_PX = 1024 * 1024
"""The area of the image that costs 1 in virtual time: a larger one takes the GPU for longer."""


def cost(width: int, height: int) -> float:
    """GPU time of a `width` x `height` pixel image, in images of 1024 x 1024."""
    return width * height / COST_UNIT_PX


HEAD_START = 1.0
"""Virtual time by which a task is put forward while its caller holds the line: one image of
1024 x 1024. It is no priority: an account's tags still follow each other at their full distance."""


def schedule(
    virtual_now: float, virtual_finish: float, cost: float, group: str
) -> tuple[float, float]:
    """The tag of an account's next task, and the account's new `virtual_finish`."""
    tag = max(virtual_now, virtual_finish)
    return tag, tag + cost / settings.group_weights.get(group, 1.0)


ALIKE_WINDOW = 64
"""How far down the order is looked for tasks that can be drawn together with the first one."""


def fairest(*, rewriting: bool = True) -> CTE:
    """The id of the waiting task whose turn it is, locked for the caller.

    What another worker has locked is skipped: it is being claimed. Without `rewriting` a task
    whose prompt must be rewritten first is skipped as well.
    """
    query = _waiting_in_order()
    if not rewriting:
        query = query.where(~_must_be_rewritten())
    return query.limit(1).with_for_update(skip_locked=True).cte("fairest")


def alike(task: Task, limit: int) -> CTE:
    """The ids of at most `limit` waiting tasks of the size and steps of `task`, locked.

    From the first ALIKE_WINDOW of the order only, so that a common size does not pass a rare one
    by for long.
    """
    window = _waiting_in_order().limit(ALIKE_WINDOW).subquery()
    return (
        select(Task.id)
        .where(
            Task.id.in_(select(window.c.id)),
            Task.status == text("'pending'"),
            Task.width == task.width,
            Task.height == task.height,
            Task.steps == task.steps,
            ~_must_be_rewritten(),
        )
        .order_by(Task.fair_tag, Task.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .cte("alike")
    )


def _waiting_in_order() -> Select[str]:
    return (
        select(Task.id)
        # The literal, not a parameter, is what lets a generic plan use the partial index.
        .where(
            Task.status == text("'pending'"),
            or_(Task.deadline_at.is_(None), Task.deadline_at > func.clock_timestamp()),
        )
        .order_by(Task.fair_tag, Task.id)
    )


def _must_be_rewritten() -> ColumnElement[bool]:
    return Task.prompt_extend & Task.rewritten_prompt.is_(None)


def tick(session: Session, tag: float) -> None:
    """Let virtual time reach `tag`, the tag of a task that was just claimed."""
    session.execute(update(FairClock).where(FairClock.virtual_now < tag).values(virtual_now=tag))


def waiting(session: Session, at_most: int) -> int:
    """How many tasks wait, counted no further than `at_most`."""
    some = select(Task.id).where(Task.status == text("'pending'")).limit(at_most).subquery()
    return session.scalar(select(func.count()).select_from(some)) or 0


_PLACES = text("""
    SELECT (SELECT count(*) FROM (SELECT 1 FROM tasks
                                   WHERE status = 'pending' AND (fair_tag, id) < (a.tag, a.id)
                                   LIMIT :at_most) AS before)
      FROM unnest(CAST(:tags AS float8[]), CAST(:ids AS text[])) WITH ORDINALITY AS a(tag, id, n)
     ORDER BY n
""")


def places(session: Session, asked: Sequence[tuple[float, str]], at_most: int) -> list[int]:
    """How many tasks wait before each (fair tag, id), counted no further than `at_most`."""
    tags, ids = [tag for tag, _ in asked], [task_id for _, task_id in asked]
    return list(session.scalars(_PLACES, {"tags": tags, "ids": ids, "at_most": at_most}))
