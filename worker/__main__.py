"""`python -m worker`: load the pipeline once, then take jobs in this process until told to stop.

The first SIGTERM or SIGINT lets the task at hand be finished, the second hands it back.
"""

import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable

import structlog
from redis.exceptions import RedisError
from rq.serializers import JSONSerializer

from storage import objects, queue
from storage.errors import StorageUnavailable
from storage.logs import configure
from storage.settings import settings as storage_settings
from worker.settings import settings

RQ_TTL_S = 30
"""Bounds how long RQ waits for a job before it looks around, and how long it believes in us."""

logger = structlog.get_logger()


def main() -> int:
    configure("worker")
    name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"
    try:
        objects.check()
    except objects.TemporaryCredentials as error:
        sys.exit(str(error))
    except StorageUnavailable as error:
        logger.warning("worker.image_store_away", error=str(error.__cause__))

    # Imported only now: torch takes seconds, and a broken setting should not wait for it.
    from worker import generate, loading

    try:
        pipeline = loading.load(
            storage_settings.model,
            device=settings.device,
            dtype=settings.dtype,
            cache_dir=settings.data_dir / "models",
        )
    except loading.ModelUnavailable as error:
        sys.exit(str(error))
    logger.info(
        "worker.loaded", model=pipeline.model, device=pipeline.device, dtype=str(pipeline.dtype)
    )
    if pipeline.model == loading.DEMO:
        logger.warning(
            "worker.demo_model", notice="random weights: it draws texture, not the prompt"
        )

    generate.employ(generate.Worker(name, pipeline))
    stopped = threading.Event()
    announcer = threading.Thread(target=_announce, args=(name, stopped), daemon=True)
    announcer.start()
    # A client of its own: RQ sets a socket timeout on it that suits its blocking wait.
    connection = queue.connect()
    worker = generate.JobLoop(
        [queue.NAME],
        name=name,
        connection=connection,
        serializer=JSONSerializer,
        worker_ttl=RQ_TTL_S,
    )
    worker.work(logging_level="WARNING")
    stopped.set()
    announcer.join(queue.ANSWER_TIMEOUT_S)
    logger.info("worker.stopped")
    return 0


def _announce(name: str, stopped: threading.Event) -> None:
    """Tell every few seconds that this worker is there."""
    while not stopped.is_set():
        _tell(queue.announce, name)
        stopped.wait(queue.ANNOUNCE_S)
    _tell(queue.withdraw, name)


def _tell(tell: Callable[[str], None], name: str) -> None:
    try:
        tell(name)
    except RedisError as error:
        logger.warning("worker.not_announced", error=str(error))


if __name__ == "__main__":
    sys.exit(main())
