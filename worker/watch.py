"""A GPU that hangs: no step ends any more, and no exception comes out either.

Nothing in this process can end such a step, so the process exits, and its supervisor starts it
again with a fresh GPU context.
"""

import threading
import time
from collections.abc import Callable

POLLS_PER_TIMEOUT = 10
POLL_MAX_S = 1.0


class Watch:
    """Calls `on_hang`, once and from a thread of its own, when a drawing makes no step in time."""

    def __init__(self, timeout_s: float, on_hang: Callable[[], None]) -> None:
        self._timeout_s = timeout_s
        self._on_hang = on_hang
        self._last_step: float | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look_until_closed, name="watch", daemon=True)
        self._thread.start()

    def step(self) -> None:
        """A drawing began, or a step of it ended."""
        self._last_step = time.monotonic()

    def rest(self) -> None:
        """Nothing is being drawn."""
        self._last_step = None

    def close(self) -> None:
        self._closed.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _look_until_closed(self) -> None:
        while not self._closed.wait(min(POLL_MAX_S, self._timeout_s / POLLS_PER_TIMEOUT)):
            last = self._last_step
            if last is not None and time.monotonic() - last > self._timeout_s:
                self._on_hang()
                return
