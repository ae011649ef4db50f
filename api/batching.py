"""What arrives while a batch is worked on becomes the next batch: one commit, one query for many.

Nobody waits for a batch to fill: a lone request is worked on at once, and the busier the service
is, the more requests share a round trip and a disk flush.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from inspect import iscoroutinefunction
from typing import Any, Generic, TypeVar

from storage import queue, tasks
from storage.database import transaction
from storage.driver import on_loop
from storage.errors import ServiceError, ServiceUnavailable, TaskNotFound
from storage.tasks import State

BATCH_MAX = 256
"""Requests in one batch: bounds the size of a statement, and how long it locks its accounts."""
WAITING_MAX = 10_000
"""Requests that may wait for their batch; one more is refused rather than kept waiting."""

In = TypeVar("In")
Out = TypeVar("Out")


Outcomes = Sequence[Out | ServiceError]
Work = Callable[[Sequence[In]], Outcomes[Out] | Awaitable[Outcomes[Out]]]


class Batcher(Generic[In, Out]):
    """Gathers single requests into batches; each caller gets its own answer or its own error.

    `work` takes a batch and returns one outcome for each item, in order: an answer, or the error
    to raise. A plain function has a thread of its own; either kind works on one batch at a time.
    """

    def __init__(self, work: Work[In, Out]) -> None:
        self._work = work if iscoroutinefunction(work) else _in_thread(work)
        self._waiting: deque[tuple[In, asyncio.Future[Out]]] = deque()
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
        try:
            outcomes: Sequence[Out | Exception] = await self._work([item for item, _ in batch])
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


def _in_thread(work: Callable[[Any], Any]) -> Callable[[Any], Awaitable[Any]]:
    thread = ThreadPoolExecutor(1)

    async def work_there(batch: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(thread, work, batch)

    return work_there


async def submit(batch: Sequence[tasks.Submission]) -> list[tasks.Outcome]:
    """Reserve, insert and enqueue a batch; each submission gets its own tasks or its own error."""
    outcomes = await on_loop(_commit, batch)
    fresh = (made for made in outcomes if isinstance(made, tasks.Submitted) and not made.replayed)
    times = sum(len(made.tasks) for made in fresh)
    if times and not queue.is_full():
        await asyncio.to_thread(queue.ring, times)
    return outcomes


def _commit(batch: Sequence[tasks.Submission]) -> list[tasks.Outcome]:
    with transaction() as session:
        return tasks.submit_many(session, batch)


async def find(batch: Sequence[tuple[str, str]]) -> list[State | ServiceError]:
    """The tasks of a batch of (account id, task id)."""
    found = await tasks.find_many(batch)
    return [found.get(asked) or TaskNotFound() for asked in batch]
