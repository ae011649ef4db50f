"""The process that delivers callbacks and runs the repairs. Any number of copies may run.

Deliveries are rows. A copy takes what is due, tries each in a coroutine of its own, and notes the
outcome, so a receiver that hangs holds nothing but its coroutine.
"""

import asyncio
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence

import structlog
from redis.exceptions import RedisError

from api import callbacks, egress
from api.batching import Batcher
from storage import books, deliveries, events, repair
from storage.database import transaction
from storage.deliveries import Attempt, End
from storage.errors import ServiceUnavailable
from storage.logs import configure
from storage.models import DeliveryState
from storage.sealing import CannotUnseal

IN_FLIGHT_MAX = 1000
"""Attempts at a time in this process."""
ACCOUNT_IN_FLIGHT_MAX = 50
"""Attempts at a time for one account, about: at this number no more of its deliveries are taken."""
SILENT_S = 2.0
"""A receiver that says nothing for so long gets few attempts at a time, until it answers."""
SILENT_IN_FLIGHT_MAX = 2
SILENT_FOR_S = 60.0
"""After this it is believed in again."""
CLAIM_MAX = 50
LOOK_S = 1.0
"""How often to look for deliveries that no event told of."""
RECONNECT_S = 1.0
REPAIR_S = 2.0
BOOKS_S = 10.0
"""How often to ask whether the books are to be proved, which `storage.books` decides."""
IMAGES_S = 60.0
"""How often to look for images and requests whose time is over; a look lists the bucket's oldest
page."""

logger = structlog.get_logger()


class Courier:
    """Delivers until it is told to stop, then waits for the attempts that are under way."""

    def __init__(self) -> None:
        self._client = egress.client()
        self._in_flight: Counter[str] = Counter()
        self._to_receivers: Counter[str] = Counter()
        self._silent: dict[str, float] = {}
        """Receivers, by when they last were silent."""
        self._attempts: set[asyncio.Task[None]] = set()
        self._records = Batcher(_record)
        self._wake = asyncio.Event()
        self.stopping = asyncio.Event()

    def stop(self) -> None:
        self.stopping.set()
        self._wake.set()

    async def run(self) -> None:
        listener = asyncio.create_task(self._listen())
        others = [
            asyncio.create_task(self._every(REPAIR_S, repair.lost_workers)),
            asyncio.create_task(self._every(REPAIR_S, repair.lost_jobs)),
            asyncio.create_task(self._every(REPAIR_S, repair.missed_deadlines)),
            asyncio.create_task(self._every(BOOKS_S, books.watch)),
            asyncio.create_task(self._every(IMAGES_S, repair.old_images)),
            asyncio.create_task(self._every(IMAGES_S, repair.old_requests)),
            asyncio.create_task(self._every(IMAGES_S, repair.old_tasks)),
            asyncio.create_task(self._every(IMAGES_S, repair.unwanted_images)),
        ]
        while not self.stopping.is_set():
            self._wake.clear()
            try:
                limit = min(CLAIM_MAX, IN_FLIGHT_MAX - self._in_flight.total())
                busy = self._full(), self._hanging()
                taken = await asyncio.to_thread(self._claim, limit, *busy)
                for attempt in taken:
                    self._start(attempt)
                pause_s = 0.0
                if len(taken) < CLAIM_MAX:
                    pause_s = await asyncio.to_thread(self._pause, limit, *busy)
            except ServiceUnavailable:
                logger.warning("courier.database_away")
                pause_s = LOOK_S
            except Exception:
                logger.exception("courier.failed")
                pause_s = LOOK_S
            await self._sleep(pause_s)
        for task in others:
            task.cancel()
        await events.stop(listener)
        await asyncio.gather(*others, *self._attempts, return_exceptions=True)
        await self._client.aclose()

    def _full(self) -> list[str]:
        """Accounts that have as many attempts under way as they may."""
        return [a for a, attempts in self._in_flight.items() if attempts >= ACCOUNT_IN_FLIGHT_MAX]

    def _hanging(self) -> list[str]:
        """Receivers that are silent, and have as many attempts under way as such may."""
        before = time.monotonic() - SILENT_FOR_S
        self._silent = {r: at for r, at in self._silent.items() if at > before}
        return [r for r in self._silent if self._to_receivers[r] >= SILENT_IN_FLIGHT_MAX]

    def _claim(self, limit: int, accounts: list[str], receivers: list[str]) -> list[Attempt]:
        if limit <= 0:
            return []
        with transaction() as session:
            return deliveries.claim_due(
                session, limit=limit, except_accounts=accounts, except_receivers=receivers
            )

    def _pause(self, limit: int, accounts: list[str], receivers: list[str]) -> float:
        if limit <= 0:
            return LOOK_S  # an attempt that ends wakes us earlier
        with transaction() as session:
            due_s = deliveries.next_due_in_s(
                session, except_accounts=accounts, except_receivers=receivers
            )
        return LOOK_S if due_s is None else min(due_s, LOOK_S)

    def _start(self, attempt: Attempt) -> None:
        self._in_flight[attempt.delivery.account_id] += 1
        self._to_receivers[attempt.receiver] += 1
        task = asyncio.create_task(self._attempt(attempt))
        self._attempts.add(task)
        task.add_done_callback(self._attempts.discard)

    async def _attempt(self, attempt: Attempt) -> None:
        delivery = attempt.delivery
        try:
            outcome = await self._deliver(attempt)
            state = await self._records.add(
                End(delivery, outcome.status, outcome.error, outcome.final)
            )
            logger.info(
                "callback.attempted",
                delivery_id=delivery.id,
                task_id=delivery.task_id,
                request_id=attempt.task.request_id,
                status=outcome.status,
                error=outcome.error,
                state=state,
            )
        except ServiceUnavailable:
            # Nothing is noted, so it is due again when this claim's lease is over.
            logger.warning("courier.database_away", delivery_id=delivery.id)
        except CannotUnseal as error:
            # No attempt is used up until whoever runs us has set the right key.
            logger.critical("courier.cannot_sign", delivery_id=delivery.id, error=str(error))
        except Exception:
            logger.exception("callback.failed", delivery_id=delivery.id, task_id=delivery.task_id)
        finally:
            self._ended(attempt)

    def _ended(self, attempt: Attempt) -> None:
        """One attempt less is under way: look again where there was no room for more."""
        account, receiver = attempt.delivery.account_id, attempt.receiver
        if (
            self._in_flight.total() >= IN_FLIGHT_MAX
            or self._in_flight[account] >= ACCOUNT_IN_FLIGHT_MAX
            or receiver in self._silent
        ):
            self._wake.set()
        for counter, whose in ((self._in_flight, account), (self._to_receivers, receiver)):
            counter[whose] -= 1
            if not counter[whose]:
                del counter[whose]

    async def _deliver(self, attempt: Attempt) -> callbacks.Outcome:
        """An error of ours is an attempt that failed, so that it does not come back for ever."""
        loop = asyncio.get_running_loop()
        silence = loop.call_later(SILENT_S, self._is_silent, attempt.receiver)
        try:
            outcome = await callbacks.deliver(self._client, attempt)
            if outcome.status is not None:
                self._has_answered(attempt.receiver)
            return outcome
        except CannotUnseal:
            raise
        except Exception:
            logger.exception("callback.failed", delivery_id=attempt.delivery.id)
            return callbacks.Outcome(error="the service could not try it")
        finally:
            silence.cancel()

    def _has_answered(self, receiver: str) -> None:
        if self._silent.pop(receiver, None) is not None:
            self._wake.set()

    def _is_silent(self, receiver: str) -> None:
        self._silent[receiver] = time.monotonic()

    async def _listen(self) -> None:
        """Be woken by the end of a task that has a callback."""
        while True:
            try:
                async for event in events.listen():
                    if event.callback and event.ended:
                        self._wake.set()
            except (RedisError, OSError):
                logger.warning("courier.redis_away")
            await asyncio.sleep(RECONNECT_S)

    async def _every(self, pause_s: float, work: Callable[[], object]) -> None:
        while True:
            try:
                await asyncio.to_thread(work)
            except ServiceUnavailable:
                logger.warning("courier.database_away")
            except Exception:
                logger.exception("courier.repair_failed")
            await asyncio.sleep(pause_s)

    async def _sleep(self, pause_s: float) -> None:
        try:
            async with asyncio.timeout(pause_s):
                await self._wake.wait()
        except TimeoutError:
            pass


def _record(ends: Sequence[End]) -> list[DeliveryState | None]:
    """What many attempts that ended at once became, in one commit."""
    with transaction() as session:
        return deliveries.record_many(session, ends)


async def main() -> None:
    # An attempt may hold two sockets while it looks up a name, and the usual limit is 1024.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    courier = Courier()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, courier.stop)
    logger.info("courier.started")
    await courier.run()
    logger.info("courier.stopped")


if __name__ == "__main__":
    configure("courier")
    asyncio.run(main())
