"""How much waits in the whole service: over a limit nothing more is taken, before it is reserved.

Counted anew every LOOK_S, and in between by what this process admits itself. So several processes
together may pass the limit by what the others admit within LOOK_S, and a place that a worker frees
is sold up to LOOK_S later. Where counting takes long, it is done less often.
"""

import threading
import time

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from storage import fairness
from storage.errors import BacklogFull
from storage.models import Account, Task
from storage.settings import settings

LOOK_S = 1.0
"""How old a count may be: one that is bounded by the limit, over an index of what waits."""
COUNTED_MAX = 10_000
"""Tasks that are counted one by one; more are added up from what the accounts have, which costs the
same however many wait: a million, counted, held up every submission for half a second."""
LOOK_SHARE = 0.01
"""Of a process' time that counting may take."""
LOOK_MAX_S = 10.0
"""How old a count may be at most, however long it took."""


class Backlog:
    """The places that are left, as this process knows it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._left = 0
        self._next_look_at = float("-inf")

    def look(self, session: Session) -> None:
        """Count what waits, unless that was done a moment ago."""
        began = time.monotonic()
        if began < self._next_look_at:
            return
        left = self._most - _waiting(session, self._most)
        now = time.monotonic()
        with self._lock:
            self._left = left
            self._next_look_at = now + min(LOOK_MAX_S, max(LOOK_S, (now - began) / LOOK_SHARE))

    def refusal(self, tasks: int) -> BacklogFull | None:
        """Why a request for so many tasks is not taken, as of the last look."""
        return BacklogFull() if tasks > self._left else None

    def take(self, tasks: int) -> None:
        """So many more wait."""
        with self._lock:
            self._left -= tasks


def _waiting(session: Session, at_most: int) -> int:
    counted = fairness.waiting(session, at_most=min(at_most, COUNTED_MAX))
    if counted < COUNTED_MAX:
        return counted
    unfinished = select(func.coalesce(func.sum(Account.unfinished), 0)).scalar_subquery()
    # The literal, not a parameter, is what lets a generic plan use the partial index.
    begun = select(func.count()).select_from(Task).where(Task.status == text("'processing'"))
    return session.scalar(select(unfinished - begun.scalar_subquery())) or 0


backlog = Backlog(settings.backlog_max)
