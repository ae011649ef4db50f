"""RQ's side of a worker: what a job does, and when the next one is wanted.

RQ has no say about a task: a job is over as soon as its task is claimed. The row and its lease
decide what becomes of it.
"""

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import structlog
from redis.exceptions import RedisError
from rq import Queue, SimpleWorker
from rq.exceptions import StopRequested
from rq.serializers import JSONSerializer
from rq.worker import WorkerStatus

from storage import queue
from storage.errors import ServiceUnavailable
from worker.announce import Announcer
from worker.stages import Worker

RQ_TTL_S = 30
"""How long RQ believes in us."""
BELL_S = 2
"""Bounds how long RQ waits for a job before it looks around, and so, with the time for an answer,
how late a Redis that hangs is noticed."""
AWAY_LOOK_S = 1.0
"""While Redis is away the rows are looked at this often, by each worker that has nothing to do, and
while the database is away bells are heard this often."""
LOOK_UP_S = 5.0
"""How often the loop looks up while the GPU has enough to do."""

_worker: Worker | None = None

logger = structlog.get_logger()


class BellAway(Exception):
    """Redis is away. Nothing of Redis' own, which RQ would wait or quit for."""


class Bells(Queue):
    """The queue as a worker waits at it."""

    @classmethod
    def dequeue_any(cls, *args: Any, **kwargs: Any) -> Any:
        """Raises: BellAway."""
        try:
            queue.count()  # which one that hangs does not tell: sooner found than by waiting
            return super().dequeue_any(*args, **kwargs)
        except RedisError as error:
            raise BellAway(str(error)) from error


def _unless_away(tell: Callable[..., Any]) -> Callable[..., Any]:
    """What RQ notes in Redis about itself, for whoever looks: not worth ending for."""

    @wraps(tell)
    def told(*args: Any, **kwargs: Any) -> Any:
        try:
            with queue.asking():
                return tell(*args, **kwargs)
        except RedisError as error:
            logger.warning("worker.not_noted_in_redis", error=str(error))

    return told


class JobLoop(SimpleWorker):
    """RQ's loop, in this process and without RQ's remote commands.

    Who may stop a worker is up to its machine, and ending their thread costs every stop a second.
    Without Redis RQ would quit, or wait for up to a minute; this goes on by looking at the rows.
    """

    queue_class = Bells
    dequeue_timeout = BELL_S
    connection_timeout = BELL_S + queue.ANSWER_TIMEOUT_S

    register_birth = _unless_away(SimpleWorker.register_birth)
    register_death = _unless_away(SimpleWorker.register_death)
    heartbeat = _unless_away(SimpleWorker.heartbeat)
    run_maintenance_tasks = _unless_away(SimpleWorker.run_maintenance_tasks)
    set_state = _unless_away(SimpleWorker.set_state)
    set_shutdown_requested_date = _unless_away(SimpleWorker.set_shutdown_requested_date)

    def execute_job(self, *args: Any, **kwargs: Any) -> None:
        """Do a job. What is lost without Redis is a bell, or the note that it was heard."""
        try:
            super().execute_job(*args, **kwargs)
        except RedisError as error:
            logger.warning("worker.redis_away", error=str(error))
            self._state = WorkerStatus.IDLE

    def subscribe(self) -> None:
        """Listen for no commands."""

    def check_for_suspension(self, burst: bool) -> None:
        """Not by way of Redis."""

    def dequeue_job_and_maintain_ttl(self, *args: Any, **kwargs: Any) -> Any:
        """Leave the next bell to others for as long as this GPU has enough to do."""
        while True:
            _wait_until_wanted()
            try:
                return super().dequeue_job_and_maintain_ttl(*args, **kwargs)
            except BellAway as error:
                logger.warning("worker.redis_away", error=str(error))
                self._work_without_bells()
                logger.info("worker.redis_is_back")

    def _work_without_bells(self) -> None:
        """Look at the rows until Redis answers and nothing waits."""
        while True:
            _wait_until_wanted()
            if self._took_one():
                continue
            try:
                queue.count()
            except RedisError:
                time.sleep(AWAY_LOOK_S)
            else:
                return

    def _took_one(self) -> bool:
        # As in a job: a signal must not come between a claim and its keeping.
        self._state = WorkerStatus.BUSY
        try:
            return _employed().take()
        except ServiceUnavailable:
            logger.warning("worker.database_away")
            return False
        finally:
            self._state = WorkerStatus.IDLE
            if self._stop_requested:
                raise StopRequested


def _wait_until_wanted() -> None:
    while not _employed().wait_until_wanted(LOOK_UP_S):
        pass


def employ(worker: Worker) -> None:
    """Let `worker` do the jobs of this process. RQ names a function, so it has to be found."""
    global _worker
    _worker = worker


def run() -> None:
    """Claim the task whose turn it is. Run once too often, it finds nothing."""
    try:
        _employed().take()
    except ServiceUnavailable:
        # The bell is used up; the repairs ring again for what waits.
        logger.warning("worker.database_away")
        time.sleep(AWAY_LOOK_S)


def serve(worker: Worker, about: Callable[[], dict[str, object]]) -> None:
    """Take jobs until a signal says stop; then finish what was claimed, or hand it back at another.

    `about` is what is announced of this process beside what the worker itself knows.
    """
    employ(worker)
    announcer = Announcer(worker.name, lambda: worker.facts() | about())
    announcer.start()
    loop = JobLoop(
        [queue.NAME],
        name=worker.name,
        # A client of its own: RQ sets a socket timeout on it that suits its blocking wait.
        connection=queue.connect(),
        serializer=JSONSerializer,
        worker_ttl=RQ_TTL_S,
    )
    try:
        try:
            loop.work(logging_level="WARNING")
        except Exception:
            # The threads of this process would keep it from ending, and so from a new beginning.
            logger.exception("worker.failed")
        worker.stop()
        worker.close()
    except SystemExit:  # the second signal
        worker.hand_back()
        worker.close()
    announcer.stop()


def _employed() -> Worker:
    if _worker is None:
        raise RuntimeError("This process has no pipeline: start it with `python -m worker`")
    return _worker
