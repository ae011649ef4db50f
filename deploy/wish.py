"""Whether we are asked to stop, and whether once more."""

import os
import signal


class Stopped(Exception):
    """Somebody asked us to stop."""


class Wish:
    """Whether we are to stop: by Ctrl-C, a signal, a closed terminal, or because make has gone."""

    def __init__(self) -> None:
        self._times = 0
        self._make = os.getppid() if "MAKELEVEL" in os.environ else None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self._times += 1

    def check(self) -> None:
        """Raises Stopped."""
        if self._times or self._make not in (None, os.getppid()):
            raise Stopped

    def in_haste(self) -> bool:
        return self._times > 1
