"""Keeps the claims of this process alive from one thread, and learns which of them are lost.

Whoever draws only leaves a number behind, so a slow database never slows a step. A cancelled task
is heard of at once by way of Redis, and without Redis at the next renewal.
"""

import threading
import time
from collections.abc import Iterable

import structlog
from redis.exceptions import RedisError

from storage import events, tasks
from storage.database import transaction
from storage.errors import GenerationTimeout, ServiceUnavailable
from storage.models import Task
from storage.settings import settings

RENEWALS_PER_LEASE = 4
"""A lease is renewed this often before it would end, so that some renewals may fail."""
PROGRESS_S = 0.5
"""Progress is written no more often: whoever watches sees no difference, the database does."""
LISTEN_AGAIN_S = 1

logger = structlog.get_logger()


class ClaimLost(Exception):
    """The task was cancelled, or this worker was given up for dead."""


class HandBack(Exception):
    """This worker is stopping: another one shall have the task."""


class Held:
    """A claimed task in the hands of this process, whatever stage it is in."""

    def __init__(self, task: Task, leases: "Leases") -> None:
        self.claim = tasks.claim_of(task)
        self.progress = 0
        """In percent."""
        self.told = 0
        self.lost = False
        self.handed_back = False
        self._leases = leases
        self._deadline: float | None = None

    def begin(self) -> None:
        """The drawing begins, and may take `task_timeout_s`. Raises: what `check` raises."""
        self.check()
        self._deadline = time.monotonic() + settings.task_timeout_s

    def step(self, done: int, steps: int) -> None:
        """Note that `done` of `steps` steps are done. Raises: what `check` raises."""
        # The last hundredth is the storing.
        self.progress = max(self.progress, min(99, 100 * done // steps))
        self._leases.moved()
        self.check()

    def check(self) -> None:
        """Raises: ClaimLost; HandBack; GenerationTimeout, it has been drawn for too long."""
        if self.lost:
            raise ClaimLost
        if self.handed_back:
            raise HandBack
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise GenerationTimeout


class Leases:
    """What this process holds. Its two threads run from the first claim until `close`."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}
        self._changed = threading.Condition()
        self._moved = False
        self._urgent = False
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._renew_until_stopped, name="leases"),
            threading.Thread(target=self._hear_until_stopped, name="cancels", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def hold(self, task: Task) -> Held:
        held = Held(task, self)
        with self._changed:
            self._held[held.claim.task_id] = held
        return held

    def release(self, held: Held) -> None:
        with self._changed:
            if self._held.get(held.claim.task_id) is held:
                del self._held[held.claim.task_id]

    def moved(self) -> None:
        """Some progress was made."""
        if not self._moved:
            with self._changed:
                self._moved = True
                self._changed.notify_all()

    def close(self) -> None:
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()
        # The other one ends by itself, as soon as it looks up from Redis.
        self._threads[0].join()

    def _renew_until_stopped(self) -> None:
        last = 0.0
        while self._wait_until_due(last):
            last = time.monotonic()
            with self._changed:
                self._moved = self._urgent = False
                held = list(self._held.values())
            if held:
                self._renew(held)

    def _wait_until_due(self, last: float) -> bool:
        """Wait for the next renewal; False: there is none."""
        with self._changed:
            while not (self._stopped.is_set() or self._urgent):
                interval_s = PROGRESS_S if self._moved else settings.lease_s / RENEWALS_PER_LEASE
                left_s = last + interval_s - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
        return not self._stopped.is_set()

    def _renew(self, held: Iterable[Held]) -> None:
        progress = {each.claim: each.progress for each in held}
        try:
            with transaction() as session:
                still = tasks.renew(session, progress)
        except ServiceUnavailable:
            # Going on is safe: if the lease runs out meanwhile, the claim's number stops us.
            logger.warning("tasks.not_renewed", tasks=len(progress))
            return
        except Exception:  # a bug must not end this thread, and every lease with it
            logger.exception("tasks.not_renewed", tasks=len(progress))
            return
        for each in held:
            if each.claim not in still:
                each.lost = True
            elif progress[each.claim] > each.told:
                each.told = progress[each.claim]
                events.publish_progress(each.claim.task_id)

    def _hear_until_stopped(self) -> None:
        while not self._stopped.is_set():
            try:
                for task_id in events.cancelled(self._stopped):
                    # Not believed but looked up: the row is the truth.
                    with self._changed:
                        if task_id in self._held:
                            self._urgent = True
                            self._changed.notify_all()
            except RedisError as error:
                logger.warning("worker.does_not_hear_cancels", error=str(error))
                self._stopped.wait(LISTEN_AGAIN_S)
