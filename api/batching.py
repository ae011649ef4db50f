"""What arrives while a batch is worked on becomes the next batch: one commit, one query for many.

Nobody waits for a batch to fill: a lone request is worked on at once, and the busier the service
is, the more requests share a round trip and a disk flush.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from storage import fairness, queue, tasks
from storage.database import look, transaction
from storage.errors import ServiceError, ServiceUnavailable, TaskNotFound
from storage.models import Task

BATCH_MAX = 256
"""Requests in one batch: bounds the size of a statement, and how long it locks its accounts."""
WAITING_MAX = 10_000
"""Requests that may wait for their batch; one more is refused rather than kept waiting."""

In = TypeVar("In")
Out = TypeVar("Out")


class Batcher(Generic[In, Out]):
    """Gathers single requests into batches; each caller gets its own answer or its own error.

    `work` takes a batch and returns one outcome for each item, in order: an answer, or the error
    to raise. It runs in a thread of its own, one batch at a time.
    """

    def __init__(self, work: Callable[[Sequence[In]], Sequence[Out | ServiceError]]) -> None:
        self._work = work
        self._waiting: deque[tuple[In, asyncio.Future[Out]]] = deque()
        self._thread = ThreadPoolExecutor(1)
        self._running: asyncio.Task[None] | None = None

    async def add(self, item: In) -> Out:
        """Have `item` worked on with what else is there, and return its answer.

        Raises:
            ServiceUnavailable: WAITING_MAX others wait already; and whatever `work` says.
        """
        if len(self._waiting) >= WAITING_MAX:
            raise ServiceUnavailable
        future: asyncio.Future[Out] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await future

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(BATCH_MAX, len(self._waiting)))]
                await self._answer(batch)
        finally:
            self._running = None

    async def _answer(self, batch: list[tuple[In, asyncio.Future[Out]]]) -> None:
        loop = asyncio.get_running_loop()
        items = [item for item, _ in batch]
        try:
            outcomes: Sequence[Out | Exception] = await loop.run_in_executor(
                self._thread, self._work, items
            )
        except ServiceError as error:  # true for all of them, as when the database is away
            outcomes = [error] * len(batch)
        except Exception as error:
            if len(batch) > 1:  # one of them is bad, and its neighbours must not suffer for it
                for entry in batch:
                    await self._answer([entry])
                return
            outcomes = [error]
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            if future.cancelled():  # the caller is gone; what was asked for is done all the same
                continue
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)


def submit(batch: Sequence[tasks.Submission]) -> list[tasks.Outcome]:
    """Reserve, insert and enqueue a batch; each submission gets its own tasks or its own error."""
    with transaction() as session:
        outcomes = tasks.submit_many(session, batch)
    fresh = (made for made in outcomes if isinstance(made, tasks.Submitted) and not made.replayed)
    queue.ring(sum(len(made.tasks) for made in fresh))
    return outcomes


def find(batch: Sequence[tuple[str, str]]) -> list[Task | ServiceError]:
    """The tasks of a batch of (account id, task id)."""
    with look() as database:
        found = tasks.find_many(database, batch)
    return [found.get(asked) or TaskNotFound() for asked in batch]


def places(batch: Sequence[tuple[float, str]]) -> list[int]:
    """How many tasks wait before each of a batch of (fair tag, id)."""
    with look() as database:
        return fairness.places(database, batch, at_most=tasks.WAITING_COUNT_MAX)
