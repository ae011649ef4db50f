"""Who waits for which task in this process, and the one ear that hears for all of them.

Waiting costs a coroutine and no thread. An event in Redis wakes exactly those whose task moved;
what they then read is gathered into one query. A look without an event is taken only every LOOK_S,
for an event that was lost, or every AWAY_LOOK_S while Redis is away.
"""

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog
from redis.exceptions import RedisError

from api.batching import Batcher
from storage import events
from storage.errors import ServiceUnavailable
from storage.models import Task
from storage.tasks import State

LOOK_S = 15.0
AWAY_LOOK_S = 1.0
RECONNECT_S = 1.0
QUEUE_LOOK_S = 1.0
"""How often at most a place in the queue is told anew, since every claim moves all that wait."""
PING_S = 10.0
"""After how long of silence the next look says at least that it is there: proxies end streams that
are silent for longer than a minute."""
WATCHES_MAX = 20_000
"""Callers that may wait in one process; one more is refused."""

logger = structlog.get_logger()


@dataclass(eq=False, slots=True)
class Watch:
    """One caller that waits."""

    ended_only: bool
    """Whether it wants to hear of the end only, not of each step."""
    in_queue: bool = False
    """Whether it wants to hear that the queue moved."""
    moved: asyncio.Event = field(default_factory=asyncio.Event)


class Waiting:
    def __init__(self, reads: Batcher[tuple[str, str], State]) -> None:
        self._reads = reads
        self._watches: defaultdict[str, set[Watch]] = defaultdict(set)
        self._count = 0
        self._ear: asyncio.Task[None] | None = None
        self._hears = False
        self._queue_moved: asyncio.TimerHandle | None = None
        self.stopping = False
        """Whether this process is about to end, and nobody may wait any longer."""

    async def until_ended(
        self, account_id: str, task_ids: Sequence[str], timeout_s: float
    ) -> list[Task]:
        """The tasks when all have ended; or, after `timeout_s` or when we stop, as they then are.

        Raises: TaskNotFound, ServiceUnavailable.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        found: dict[str, Task] = {}
        with self._watch(task_ids, ended_only=True) as watch:
            while True:
                unfinished = [
                    task_id
                    for task_id in task_ids
                    if task_id not in found or not found[task_id].status.is_terminal
                ]
                watch.moved.clear()
                try:
                    looks = (self._reads.add((account_id, task_id)) for task_id in unfinished)
                    found |= {state.task.id: state.task for state in await asyncio.gather(*looks)}
                except ServiceUnavailable:
                    if len(found) < len(task_ids) or loop.time() >= until:
                        raise
                if all(task.status.is_terminal for task in found.values()):
                    break
                if self.stopping or not await self._moved(watch, until):
                    break
        return [found[task_id] for task_id in task_ids]

    async def states(self, account_id: str, task_id: str) -> AsyncGenerator[State | None, None]:
        """The task as it is now and after each change, until it has ended or we stop.

        None now and then when nothing changes. Raises: TaskNotFound.
        """
        told: tuple[object, ...] = ()
        spoke_at = time.monotonic()
        with self._watch([task_id], ended_only=False) as watch:
            while True:
                watch.moved.clear()
                state = await self._look(account_id, task_id)
                now = told if state is None else state.key()
                if now != told or time.monotonic() - spoke_at >= PING_S:
                    spoke_at = time.monotonic()
                    yield None if now == told else state
                    told = now
                if self.stopping or (state is not None and state.task.status.is_terminal):
                    return
                watch.in_queue = state is not None and state.place is not None
                await self._moved(watch, math.inf)

    async def _look(self, account_id: str, task_id: str) -> State | None:
        """None while the database is away: whoever waits goes on waiting."""
        try:
            return await self._reads.add((account_id, task_id))
        except ServiceUnavailable:
            return None

    def is_watched(self, task_id: str) -> bool:
        """Whether somebody here waits for this task."""
        return task_id in self._watches

    def stop(self) -> None:
        """Let everybody go who waits: this process is about to end."""
        self.stopping = True
        self._wake_all()

    async def close(self) -> None:
        if self._ear is not None:
            await events.stop(self._ear)

    @contextmanager
    def _watch(self, task_ids: Sequence[str], *, ended_only: bool) -> Iterator[Watch]:
        if self._count >= WATCHES_MAX:
            raise ServiceUnavailable
        if self._ear is None:
            self._ear = asyncio.create_task(self._listen())
        watch = Watch(ended_only)
        self._count += 1
        for task_id in task_ids:
            self._watches[task_id].add(watch)
        try:
            yield watch
        finally:
            self._count -= 1
            for task_id in task_ids:
                self._watches[task_id].discard(watch)
                if not self._watches[task_id]:
                    del self._watches[task_id]

    async def _moved(self, watch: Watch, until: float) -> bool:
        """Wait for an event, or for the time of a look without one. False: `until` is over."""
        left_s = until - asyncio.get_running_loop().time()
        if left_s <= 0:
            return False
        try:
            async with asyncio.timeout(min(left_s, LOOK_S if self._hears else AWAY_LOOK_S)):
                await watch.moved.wait()
        except TimeoutError:
            return asyncio.get_running_loop().time() < until
        return True

    async def _listen(self) -> None:
        while True:
            try:
                async for event in events.listen():
                    self._hears = True
                    if event.task_id is None:
                        self._wake_all()  # whatever they waited for may have passed unheard
                        continue
                    for watch in self._watches.get(event.task_id, ()):
                        if event.ended or not watch.ended_only:
                            watch.moved.set()
                    if event.started and self._queue_moved is None:
                        loop = asyncio.get_running_loop()
                        self._queue_moved = loop.call_later(QUEUE_LOOK_S, self._wake_queue)
            except (RedisError, OSError) as error:
                logger.warning("waiting.redis_away", error=str(error))
            except Exception:
                logger.exception("waiting.failed")
            self._hears = False
            self._wake_all()
            await asyncio.sleep(RECONNECT_S)

    def _wake_all(self) -> None:
        for watches in self._watches.values():
            for watch in watches:
                watch.moved.set()

    def _wake_queue(self) -> None:
        self._queue_moved = None
        for watches in self._watches.values():
            for watch in watches:
                if watch.in_queue:
                    watch.moved.set()
