"""How much waits in the whole service: over a limit nothing more is taken, before it is reserved.

Counted anew every LOOK_S, and in between by what this process admits itself. So several processes
together may pass the limit by what the others admit within LOOK_S, and a place that a worker frees
is sold up to LOOK_S later.
"""

import threading
import time

from sqlalchemy.orm import Session

from storage import fairness
from storage.errors import BacklogFull
from storage.settings import settings

LOOK_S = 1.0
"""How old a count may be: one that is bounded by the limit, over an index of what waits."""


class Backlog:
    """The places that are left, as this process knows it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._left = 0
        self._looked_at = float("-inf")

    def look(self, session: Session) -> None:
        """Count what waits, unless that was done a moment ago."""
        if time.monotonic() - self._looked_at < LOOK_S:
            return
        left = self._most - fairness.waiting(session, at_most=self._most)
        with self._lock:
            self._left = left
            self._looked_at = time.monotonic()

    def refusal(self, tasks: int) -> BacklogFull | None:
        """Why a request for so many tasks is not taken, as of the last look."""
        return BacklogFull() if tasks > self._left else None

    def take(self, tasks: int) -> None:
        """So many more wait."""
        with self._lock:
            self._left -= tasks


backlog = Backlog(settings.backlog_max)
