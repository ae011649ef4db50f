"""A GPU that hangs: no step ends any more, and no exception comes out either.

Nothing in this process can end such a step, so the process exits, and its supervisor starts it
again with a fresh GPU context.
"""

import threading
import time
from collections.abc import Callable, Hashable

POLLS_PER_TIMEOUT = 10
POLL_MAX_S = 1.0


class Watch:
    """Calls `on_hang`, once and from a thread of its own, when something makes no step in time.

    It is told what hangs. Several things may be under way, each known by a key.
    """

    def __init__(self, timeout_s: float, on_hang: Callable[[set[Hashable]], None]) -> None:
        self._timeout_s = timeout_s
        self._on_hang = on_hang
        self._last_steps: dict[Hashable, float] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look_until_closed, name="watch", daemon=True)
        self._thread.start()

    def step(self, key: Hashable) -> None:
        """It began, or came a step further."""
        self._last_steps[key] = time.monotonic()

    def rest(self, key: Hashable) -> None:
        """It ended, or waits for something that may take its time."""
        self._last_steps.pop(key, None)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _look_until_closed(self) -> None:
        while not self._closed.wait(min(POLL_MAX_S, self._timeout_s / POLLS_PER_TIMEOUT)):
            before = time.monotonic() - self._timeout_s
            hung = {key for key, last in list(self._last_steps.items()) if last < before}
            if hung:
                self._on_hang(hung)
                return
