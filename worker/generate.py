"""RQ's side of a worker: what a job does, and when the next one is wanted.

RQ has no say about a task: a job is over as soon as its task is claimed. The row and its lease
decide what becomes of it.
"""

from collections.abc import Callable
from typing import Any

from rq import SimpleWorker
from rq.serializers import JSONSerializer

from storage import queue
from worker.announce import Announcer
from worker.stages import Worker

RQ_TTL_S = 30
"""Bounds how long RQ waits for a job before it looks around, and how long it believes in us."""
LOOK_UP_S = 5.0
"""How often the loop looks up while the GPU has enough to do."""

_worker: Worker | None = None


class JobLoop(SimpleWorker):
    """RQ's loop, in this process and without RQ's remote commands.

    Who may stop a worker is up to its machine, and ending their thread costs every stop a second.
    """

    def subscribe(self) -> None:
        """Listen for no commands."""

    def dequeue_job_and_maintain_ttl(self, *args: Any, **kwargs: Any) -> Any:
        """Leave the next bell to others for as long as this GPU has enough to do."""
        while not _employed().wait_until_wanted(LOOK_UP_S):
            pass
        return super().dequeue_job_and_maintain_ttl(*args, **kwargs)


def employ(worker: Worker) -> None:
    """Let `worker` do the jobs of this process. RQ names a function, so it has to be found."""
    global _worker
    _worker = worker


def run() -> None:
    """Claim the task whose turn it is. Run once too often, it finds nothing."""
    _employed().take()


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
        loop.work(logging_level="WARNING")
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
