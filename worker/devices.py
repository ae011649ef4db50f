"""Which devices draw, and a process for each where there are several.

The parent of several draws nothing: it keeps one child `python -m worker --devices NAME` for every
device, starts one that fails again, passes on what it is told, and ends when all have ended.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from types import FrameType

import structlog

AGAIN_S = 1
AGAIN_MAX_S = 30
STAYS_UP_S = 60
"""Who lived for this long did not fail at the start, and is started again without delay."""

STOPS = (signal.SIGTERM, signal.SIGINT)
WAIT_S = 1.0
"""A signal that came at the wrong moment goes unheard no longer than this."""
PR_SET_PDEATHSIG = 1
"""Source: linux/prctl.h."""

Command = Callable[[str], Sequence[str]]
"""The command line of the process that draws on a device."""

logger = structlog.get_logger()


def resolve_devices(asked: str) -> list[str]:
    """Return the devices that `ZIMAGE_DEVICE` or `--devices` asks for; each gets a process.

    `all` is every CUDA device, or else the one that there is. `auto` is one device, which is
    chosen when the model is loaded. Names with commas between them are taken as they are, and a
    name that comes twice gets two processes.

    Raises:
        SystemExit: a list has an empty name in it, or `all` or `auto` beside others.
    """
    if asked == "all":
        # Imported only here, because it takes seconds. Counting makes no context on a GPU.
        import torch

        return every_device(
            cuda_devices=torch.cuda.device_count(), mps=torch.backends.mps.is_available()
        )
    names = [name.strip() for name in asked.split(",")]
    if not all(names) or (len(names) > 1 and {"all", "auto"} & {*names}):
        raise SystemExit(
            f"The devices {asked!r} are no list such as 'cuda:0,cuda:1', 'all', 'auto'"
        )
    return names


def every_device(*, cuda_devices: int, mps: bool) -> list[str]:
    return [f"cuda:{index}" for index in range(cuda_devices)] or ["mps" if mps else "cpu"]


def worker_command(device: str) -> Sequence[str]:
    return (sys.executable, "-m", "worker", "--devices", device)


def run_all(devices: Sequence[str], command: Command = worker_command) -> int:
    """Run a child for every device until all have ended; return the worst exit code.

    SIGTERM and SIGINT are passed on each time they come, and after the first nothing is started
    again. If every child ends in failure by itself at its start, the fault is no device's, a wrong
    setting say: then we end too, and who started us hears of it. On Linux the children are told to
    stop when we are killed. Call it from the main thread.
    """
    arrived: SimpleQueue[int] = SimpleQueue()
    children = [Child(device, command(device)) for device in devices]
    with _signals_into(arrived):
        while not all(child.has_ended for child in children):
            for child in children:
                child.start_if_due()
            due = [child.due_at for child in children if child.due_at is not None]
            # Python hears a signal that comes just before it begins to wait when the wait ends.
            until = min([time.monotonic() + WAIT_S, *due])
            try:
                number = arrived.get(timeout=max(0, until - time.monotonic()))
            except Empty:
                continue
            if number in STOPS:
                logger.info("worker.stopping_children", signal=signal.Signals(number).name)
                for child in children:
                    child.stop(number)
            for child in children:
                child.look()
            if all(child.fails_at_start for child in children):
                logger.error("worker.every_child_fails")
                for child in children:
                    child.stop(signal.SIGTERM)
    return max(child.exit_code for child in children)


class Backoff:
    """How long to wait before a process is started again: 1, 2, 4 s and so on, up to 30."""

    def __init__(self) -> None:
        self.short_lives = 0
        """How many there were in a row."""

    def after(self, lived_s: float) -> int:
        """Return how many seconds to wait after a life of `lived_s` that ended in failure."""
        self.short_lives = 0 if lived_s >= STAYS_UP_S else self.short_lives + 1
        return min(AGAIN_MAX_S, AGAIN_S << max(0, self.short_lives - 1))


class Child:
    """The process of one device, over all its lives."""

    def __init__(self, device: str, argv: Sequence[str]) -> None:
        self.due_at: float | None = time.monotonic()
        """When it is to be started; None: it runs, or is not to be started again."""
        self.exit_code = 0
        """Of the last life; 128 and more for a signal, as shells count."""
        self._device = device
        self._argv = argv
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._stopping = False
        self._backoff = Backoff()

    @property
    def has_ended(self) -> bool:
        return self._process is None and self.due_at is None

    @property
    def fails_at_start(self) -> bool:
        """It decided to end soon after its last start, and has not lived long since."""
        lived_s = time.monotonic() - self._started_at if self._process else 0
        decided = 0 < self.exit_code < 128
        return decided and self._backoff.short_lives > 0 and lived_s < STAYS_UP_S

    def start_if_due(self) -> None:
        if self.due_at is None or time.monotonic() < self.due_at:
            return
        self.due_at = None
        self._started_at = time.monotonic()
        self._process = subprocess.Popen(  # noqa: S603  the command is our own
            self._argv,
            stdin=subprocess.DEVNULL,
            # A Ctrl-C is for us: it would count twice if it came from the terminal as well.
            start_new_session=True,
            preexec_fn=_told_when_we_end(),
        )
        logger.info("worker.child_started", device=self._device, pid=self._process.pid)

    def stop(self, number: int) -> None:
        self._stopping = True
        self.due_at = None
        if self._process is not None:
            self._process.send_signal(number)  # does nothing once it has ended

    def look(self) -> None:
        """See whether it has ended, and when it is to be started again."""
        if self._process is None or (code := self._process.poll()) is None:
            return
        self._process = None
        self.exit_code = code if code >= 0 else 128 - code
        if code and not self._stopping:
            again_in_s = self._backoff.after(time.monotonic() - self._started_at)
            self.due_at = time.monotonic() + again_in_s
            logger.error(
                "worker.child_failed", device=self._device, code=code, again_in_s=again_in_s
            )
        else:
            logger.info("worker.child_ended", device=self._device, code=code)


@contextmanager
def _signals_into(arrived: SimpleQueue[int]) -> Iterator[None]:
    """Have a child's end and our own stop put into `arrived`, which may be done at any moment."""

    def put(number: int, _: FrameType | None) -> None:
        arrived.put(number)

    before = {number: signal.signal(number, put) for number in (*STOPS, signal.SIGCHLD)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _told_when_we_end() -> Callable[[], None] | None:
    """Return what a new process shall do first, so that it gets SIGTERM when we end; None: nothing.

    Only Linux can. Elsewhere a killed parent leaves its children at work, which loses no task.
    """
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def tell() -> None:
        prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
        if os.getppid() != parent:  # we had ended before it could ask
            os.kill(os.getpid(), signal.SIGTERM)

    return tell
