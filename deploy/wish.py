"""Whether we are asked to stop, and whether once more."""

import os
import signal
import sys

from deploy.terminal import say


class Stopped(Exception):
    """Somebody asked us to stop."""


class Wish:
    """Whether we are to stop: by Ctrl-C, a signal, or because what we were started from has gone.

    The terminal and make are looked at, because neither reliably tells: make passes on SIGTERM
    alone, and a terminal that closes tells the first process of its session, which may be make.
    """

    def __init__(self) -> None:
        self._times = 0
        self._make = os.getppid() if "MAKELEVEL" in os.environ else None
        self._watched = sys.stdout.isatty()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                self._watched = False  # nohup
            else:
                signal.signal(number, self._ask)

    def _ask(self, *_: object) -> None:
        self._times += 1

    def check(self) -> None:
        """Raises Stopped, having said so."""
        gone = self._watched and not sys.stdout.isatty()
        if self._times or gone or self._make not in (None, os.getppid()):
            say("Stopping. The worker finishes its task first; Ctrl-C again stops it at once.")
            raise Stopped

    def in_haste(self) -> bool:
        """Whether we were asked twice."""
        return self._times > 1
