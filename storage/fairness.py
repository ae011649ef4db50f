"""Which waiting task is next: start-time fair queueing between accounts, decided at the claim.

Every task carries a tag in virtual time. An account's tags follow each other at a distance of
cost / weight, beginning no earlier than the virtual time at which it submits; a free worker takes
the smallest tag. So a thousand tasks of one customer lie far apart in virtual time, and another
customer's single task falls between the next two of them.

Source: Goyal, Vin, Cheng, "Start-time Fair Queuing", SIGCOMM 1996.
"""

import time
from typing import Any

from sqlalchemy import CTE, ColumnElement, Select, bindparam, func, or_, select, text
from sqlalchemy.orm import Session

from storage import reads
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


BEHIND = HEAD_START + 1.0
"""How far behind virtual time a task may wait that was never passed by: one that was put forward,
or that was submitted while the clock moved."""
EVERYWHERE_S = 1.0
"""How often each process looks also behind that, for what came back or was passed by. The index
keeps what was claimed until PostgreSQL vacuums it, and that may be hundreds of thousands: whoever
looked from the very beginning would wade through all of them every time."""

_looked_everywhere_at = float("-inf")


def looks() -> tuple[bool, ...]:
    """Where to look for the next task, until one is found: True is everywhere."""
    global _looked_everywhere_at
    if time.monotonic() - _looked_everywhere_at < EVERYWHERE_S:
        return False, True
    _looked_everywhere_at = time.monotonic()
    return (True,)


def passed_by() -> None:
    """A task may wait behind virtual time: this process looks everywhere the next time."""
    global _looked_everywhere_at
    _looked_everywhere_at = float("-inf")


ALIKE_WINDOW = 64
"""How far down the order is looked for tasks that can be drawn together with the first one."""


def fairest(*, rewriting: bool = True, everywhere: bool = True) -> CTE:
    """The id of the waiting task whose turn it is, locked for the caller.

    What another worker has locked is skipped: it is being claimed. Without `rewriting` a task
    whose prompt must be rewritten first is skipped as well, and unless it is to look `everywhere`
    one that waits further than BEHIND behind virtual time.
    """
    query = _waiting_in_order()
    if not everywhere:
        query = query.where(
            Task.fair_tag >= select(FairClock.virtual_now - BEHIND).scalar_subquery()
        )
    if not rewriting:
        query = query.where(~_must_be_rewritten())
    return query.limit(1).with_for_update(skip_locked=True).cte("fairest")


def alike() -> CTE:
    """The ids of at most `:alike_max` waiting tasks of the size and steps of a task, locked; what
    it is like is said by `alike_to`.

    From the first ALIKE_WINDOW after it only, so that a common size does not pass a rare one by for
    long.
    """
    after = _waiting_in_order().where(Task.fair_tag >= bindparam("alike_fair_tag"))
    window = after.limit(ALIKE_WINDOW).subquery()
    return (
        select(Task.id)
        .where(
            Task.id.in_(select(window.c.id)),
            Task.status == text("'pending'"),
            Task.width == bindparam("alike_width"),
            Task.height == bindparam("alike_height"),
            Task.steps == bindparam("alike_steps"),
            ~_must_be_rewritten(),
        )
        .order_by(Task.fair_tag, Task.id)
        .limit(bindparam("alike_max"))
        .with_for_update(skip_locked=True)
        .cte("alike")
    )


def alike_to(task: Task, limit: int) -> dict[str, float]:
    """The parameters of `alike`."""
    return {
        "alike_fair_tag": task.fair_tag,
        "alike_width": task.width,
        "alike_height": task.height,
        "alike_steps": task.steps,
        "alike_max": limit,
    }


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
    session.execute(_TICK, {"tag": tag})


_TICK = text("UPDATE fair_clock SET virtual_now = :tag WHERE virtual_now < :tag")


def waiting(session: Session, at_most: int) -> int:
    """How many tasks wait, counted no further than `at_most`."""
    some = select(Task.id).where(Task.status == text("'pending'")).limit(at_most).subquery()
    return session.scalar(select(func.count()).select_from(some)) or 0


NEAR = 100
"""Places that are counted anew for everyone who asks; and how far apart the marks are."""
MARKS_S = 1.0
"""How old the marks may be."""

PLACE = """
    (SELECT CASE WHEN near.tasks < %(near)s THEN near.tasks
            ELSE greatest(%(near)s, mark.before + (
                SELECT count(*)
                  FROM (SELECT 1 FROM tasks
                         WHERE status = 'pending' AND (fair_tag, id) < (task.fair_tag, task.id)
                           AND (fair_tag, id) >= (mark.tag, mark.id)
                         LIMIT %(at_most)s - mark.before) AS after_mark)) END
       FROM (SELECT count(*) AS tasks
               FROM (SELECT 1 FROM tasks
                      WHERE status = 'pending' AND (fair_tag, id) < (task.fair_tag, task.id)
                        AND fair_tag >= (SELECT virtual_now - %(behind)s FROM fair_clock)
                      LIMIT %(near)s) AS first) AS near,
            LATERAL (SELECT least(n * %(near)s, %(at_most)s)::int AS before, tag, id
                       FROM unnest(%(mark_tags)s::float8[], %(mark_ids)s::text[])
                            WITH ORDINALITY AS marked(tag, id, n)
                      WHERE near.tasks = %(near)s AND (tag, id) <= (task.fair_tag, task.id)
                      UNION ALL SELECT 0, '-infinity', ''
                      ORDER BY before DESC LIMIT 1) AS mark)
"""
"""How many tasks wait before the row `task`, which waits itself; its parameters are `marked`'s.

Fewer than NEAR are counted; more are as the marks know it. What came back and waits far behind
virtual time is not counted, and is itself the next.
"""

_MARKS = """
    SELECT fair_tag, id
      FROM (SELECT fair_tag, id, row_number() OVER (ORDER BY fair_tag, id) AS number
              FROM tasks
             WHERE status = 'pending'
               AND fair_tag >= (SELECT virtual_now - %(behind)s FROM fair_clock)
             ORDER BY fair_tag, id LIMIT %(at_most)s + 1) AS first
     WHERE number %% %(near)s = 1 AND number > 1
     ORDER BY number
"""


class Marks:
    """Every NEAR-th of the first tasks of the order, as they were at most MARKS_S ago.

    Counted from the nearest of them a place costs the same however deep it is, and is off by no
    more than what left or came before the mark since then.
    """

    def __init__(self) -> None:
        self._tags = self._ids = "{}"
        self._looked_at = float("-inf")

    async def marked(self, at_most: int) -> dict[str, Any]:
        """The parameters of `PLACE`, which counts no further than `at_most`."""
        bounds = {"near": min(NEAR, at_most), "at_most": at_most, "behind": BEHIND}
        if time.monotonic() - self._looked_at > MARKS_S:
            self._looked_at = time.monotonic()  # before the look, so that one of many takes it
            marks = await reads.rows(_MARKS, bounds)
            self._tags = f"{{{','.join(repr(row['fair_tag']) for row in marks)}}}"
            self._ids = f"{{{','.join(row['id'] for row in marks)}}}"
        return bounds | {"mark_tags": self._tags, "mark_ids": self._ids}


marks = Marks()
