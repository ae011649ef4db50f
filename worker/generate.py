"""RQ's side of a worker: what a job does, and when the next one is wanted.

RQ has no say about a task: a job is over as soon as its task is claimed. The row and its lease
decide what becomes of it. So of all that RQ notes of a job only a failure is noted: the rest would
be eight round trips to Redis for each image, for nobody.
"""

import time
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any

import structlog
from redis.exceptions import RedisError
from rq import Queue, SimpleWorker
from rq.exceptions import StopRequested
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.timeouts import JobTimeoutException
from rq.worker import WorkerStatus

from storage import queue
from storage.errors import ServiceUnavailable
from storage.queue import JOB_TIMEOUT_S
from worker.announce import Announcer
from worker.stages import Worker

RQ_TTL_S = 30
"""How long RQ believes in us."""
HEARTBEAT_S = 10
"""How often RQ is told to, at most."""
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


class Bell(Job):
    """A job that is not read: all say the same."""

    @classmethod
    def fetch(cls, id: str, *args: Any, **kwargs: Any) -> "Bell":  # noqa: A002 - RQ's name
        return cls(id, *args, **kwargs)


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

    job_class = Bell
    queue_class = Bells
    dequeue_timeout = BELL_S
    connection_timeout = BELL_S + queue.ANSWER_TIMEOUT_S

    register_birth = _unless_away(SimpleWorker.register_birth)
    register_death = _unless_away(SimpleWorker.register_death)
    run_maintenance_tasks = _unless_away(SimpleWorker.run_maintenance_tasks)
    set_shutdown_requested_date = _unless_away(SimpleWorker.set_shutdown_requested_date)

    _beat_at = float("-inf")
    _beat = _unless_away(SimpleWorker.heartbeat)

    def heartbeat(self, *args: Any, **kwargs: Any) -> None:
        """Let RQ go on believing in us."""
        if time.monotonic() - self._beat_at >= HEARTBEAT_S:
            self._beat_at = time.monotonic()
            self._beat(*args, **kwargs)

    def set_state(self, state: str, *args: Any, **kwargs: Any) -> None:
        """For the signals of this process; others see what we announce."""
        self._state = state

    def execute_job(self, job: Job, queue: Queue) -> None:
        """Do what a bell asks for. What is lost without Redis is a bell, or that it was heard."""
        # From here on a signal must not come between a claim and its keeping.
        self._state = WorkerStatus.BUSY
        try:
            try:
                with self.death_penalty_class(JOB_TIMEOUT_S, JobTimeoutException, job_id=job.id):
                    run()
            except Exception:  # a bug, or the time limit
                self._keep_failed(job, queue, traceback.format_exc())
            else:
                self._forget(job, queue)
        except RedisError as error:
            logger.warning("worker.redis_away", error=str(error))
        finally:
            self._state = WorkerStatus.IDLE

    def _forget(self, job: Job, queue: Queue) -> None:
        with self.connection.pipeline(transaction=False) as both:
            both.lrem(queue.intermediate_queue_key, 1, job.id)
            both.unlink(job.key)
            both.execute()

    def _keep_failed(self, bell: Job, queue: Queue, error: str) -> None:
        """Note it as RQ does, for who asks RQ what went wrong."""
        logger.error("worker.job_failed", error=error)
        job = Job.fetch(bell.id, self.connection, self.serializer)
        self.prepare_execution(job)
        self.prepare_job_execution(job, remove_from_intermediate_queue=True)
        self.handle_job_failure(job, queue, exc_string=error)

    def subscribe(self) -> None:
        """Listen for no commands."""

    def check_for_suspension(self, burst: bool) -> None:
        """Not by way of Redis."""

    def dequeue_job_and_maintain_ttl(self, *args: Any, **kwargs: Any) -> Any:
        """Leave the next bell to others for as long as this GPU has enough to do."""
        while True:
            _wait_until_wanted()
            try:
                # More may wait than bells are kept.
                if _no_bell_is_left() and self._took_one():
                    continue
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


def _no_bell_is_left() -> bool:
    """Raises: BellAway."""
    try:
        return queue.count() == 0
    except RedisError as error:
        raise BellAway(str(error)) from error


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
