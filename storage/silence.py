"""A server that hangs is asked by one caller at a time, and by nobody for a moment after that.

A server that refuses costs its callers nothing. One that takes a connection and is silent costs
each of them the whole time they wait, so the first who waited in vain speaks for all.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

PAUSE_S = 1.0
"""After silence nobody asks for this long; then one does, and the others wait for what it hears."""


class Silent(Exception):
    """The server did not answer whoever asked last; nobody asks it now."""


class Silence:
    """What this process knows of one server. Any number of threads may ask at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: float | None = None
        """The end of the pause after the last silence; None where it has answered since."""
        self._one_asks = False

    @property
    def paused(self) -> bool:
        """Whether it was silent a moment ago."""
        until = self._until
        return until is not None and time.monotonic() < until

    @contextmanager
    def asking(self, *silence: type[BaseException]) -> Iterator[None]:
        """Ask the server in this block; one of `silence` that leaves it says that it was silent.

        Raises: Silent, at once.
        """
        before = self._admitted()
        try:
            yield
        except silence:
            self.begins()
            raise
        finally:
            if before is not None:
                self._asked(before)

    def begins(self) -> None:
        """The server did not answer in time."""
        with self._lock:
            self._until = time.monotonic() + PAUSE_S

    def _admitted(self) -> float | None:
        """The end of the pause that was, for one who asks for all. Raises: Silent."""
        with self._lock:
            if self._until is None:
                return None
            if self._one_asks or time.monotonic() < self._until:
                raise Silent
            self._one_asks = True
            return self._until

    def _asked(self, before: float) -> None:
        """Whoever asked for all has its answer, be it an error, unless it was silent again."""
        with self._lock:
            self._one_asks = False
            if self._until == before:
                self._until = None
