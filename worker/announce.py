"""Tells every few seconds that this worker is there, and what it is doing."""

import threading
from collections.abc import Callable

import structlog
from redis.exceptions import RedisError

from storage import queue

logger = structlog.get_logger()


class Announcer:
    """A thread that announces `facts()` under `name` from `start` until `stop`."""

    def __init__(self, name: str, facts: Callable[[], dict[str, object]]) -> None:
        self._name = name
        self._facts = facts
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._announce, name="announcing", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(queue.ANSWER_TIMEOUT_S)

    def _announce(self) -> None:
        while not self._stopped.is_set():
            self._tell(lambda: queue.announce(self._name, self._facts()))
            self._stopped.wait(queue.ANNOUNCE_S)
        self._tell(lambda: queue.withdraw(self._name))

    def _tell(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        except RedisError as error:
            logger.warning("worker.not_announced", error=str(error))
        except Exception:  # nothing that is only to be seen may end what makes it seen
            logger.exception("worker.not_announced")
