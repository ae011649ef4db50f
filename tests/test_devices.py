"""One process for every device: kept running, told what its parent is told, never left alone."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy import plan, settings
from worker import devices
from worker.devices import Backoff, every_device, resolve_devices

ROOT = Path(__file__).parent.parent

PARENT = """
import sys
import structlog
from worker import devices

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

def command(device):
    return sys.executable, "-c", sys.argv[1], device

sys.exit(devices.run_all(sys.argv[2:], command))
"""

# Each line is one write, so that two children's do not mix; they wait for signals that are held
# back, so that none comes between a look and a wait.
SAYS_WHAT_IT_HEARS = """
import os, signal, sys

signals = {signal.SIGTERM, signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
os.write(1, f"{sys.argv[1]} {os.getpid()}\\n".encode())
number = None
while number != signal.SIGINT:
    number = signal.sigwait(signals)
    os.write(1, f"{sys.argv[1]} {number.name}\\n".encode())
sys.exit({"one": 0, "two": 3}[sys.argv[1]])
"""

ENDS_WHEN_TOLD = """
import os, signal, sys

signals = {signal.SIGTERM, signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
os.write(1, f"{sys.argv[1]} {os.getpid()}\\n".encode())
signal.sigwait(signals)
"""

FAILS = """
import os, sys

os.write(1, f"{sys.argv[1]} runs\\n".encode())
sys.exit({"one": 4, "two": 2}[sys.argv[1]])
"""


class Parent:
    """A process that runs `run_all`, and what its children print."""

    def __init__(self, code: str, *names: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT, code, *names],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )

    def lines(self, count: int) -> set[str]:
        """The next lines; fewer, if all who could write one have ended."""
        assert self.process.stdout is not None
        return {line.strip() for line in itertools.islice(self.process.stdout, count)}

    def children(self) -> dict[str, psutil.Process]:
        """By name, as soon as both have said that they are there."""
        words = [line.split() for line in self.lines(2)]
        return {name: psutil.Process(int(pid)) for name, pid in words}


@pytest.fixture
def parent() -> Iterator[Callable[..., Parent]]:
    parents: list[Parent] = []

    def start(code: str, *names: str) -> Parent:
        parents.append(Parent(code, *names))
        return parents[-1]

    yield start
    for each in parents:
        each.process.send_signal(signal.SIGINT)  # which ends both kinds of children
        each.process.communicate()


# --- Which -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("auto", ["auto"]),
        ("cuda:1", ["cuda:1"]),
        ("cuda:0, cuda:2", ["cuda:0", "cuda:2"]),
        ("cpu,cpu", ["cpu", "cpu"]),
    ],
)
def test_devices_are_named_by_a_list(asked: str, found: list[str]) -> None:
    assert resolve_devices(asked) == found


@pytest.mark.parametrize("asked", ["", "cuda:0,", "cuda:0,,cpu", "all,cpu", "auto,auto"])
def test_a_list_that_means_nothing_is_refused_in_one_sentence(asked: str) -> None:
    with pytest.raises(SystemExit, match=r"^The devices .* are no list such as"):
        resolve_devices(asked)


def test_all_is_every_gpu_or_else_the_one_device_that_there_is() -> None:
    assert every_device(cuda_devices=3, mps=False) == ["cuda:0", "cuda:1", "cuda:2"]
    assert every_device(cuda_devices=0, mps=True) == ["mps"]
    assert every_device(cuda_devices=0, mps=False) == ["cpu"]


def test_a_child_is_this_worker_on_one_device() -> None:
    assert devices.worker_command("cuda:1") == (
        sys.executable,
        "-m",
        "worker",
        "--devices",
        "cuda:1",
    )


@pytest.mark.parametrize(("named", "used"), [(None, "all"), ("", "all"), ("cuda:1", "cuda:1")])
def test_make_up_draws_on_every_device_unless_some_are_named(
    named: str | None, used: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ZIMAGE_DEVICE", raising=False)
    if named is not None:
        monkeypatch.setenv("ZIMAGE_DEVICE", named)

    assert plan.environment(settings.load(), tmp_path, ())["ZIMAGE_DEVICE"] == used


# --- Kept running ------------------------------------------------------------------------------


def test_the_wait_doubles_up_to_half_a_minute_and_a_minute_of_life_ends_it() -> None:
    backoff = Backoff()

    assert [backoff.after(1) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert [backoff.after(60), backoff.after(1), backoff.after(1)] == [1, 1, 2]


def test_a_child_that_is_killed_is_started_again_and_the_other_one_stays(
    parent: Callable[..., Parent],
) -> None:
    started = parent(ENDS_WHEN_TOLD, "one", "two")
    children = started.children()
    children["one"].kill()
    name, pid = started.lines(1).pop().split()

    assert name == "one"
    assert int(pid) != children["one"].pid
    assert children["two"].is_running()

    started.process.terminate()
    assert started.process.wait() == 0
    assert not psutil.pid_exists(int(pid))


def test_a_child_that_ends_well_is_not_started_again(parent: Callable[..., Parent]) -> None:
    started = parent(ENDS_WHEN_TOLD, "one", "two")
    for child in started.children().values():
        child.terminate()

    assert started.lines(1) == set()  # nobody runs, so the output ends
    assert started.process.wait() == 0


def test_if_every_child_fails_at_its_start_whoever_started_us_hears_of_it(
    parent: Callable[..., Parent],
) -> None:
    started = parent(FAILS, "one", "two")

    assert started.lines(2) == {"one runs", "two runs"}
    assert started.process.wait() == 4


# --- Told what we are told ---------------------------------------------------------------------


def test_both_signals_are_passed_on_and_the_worst_exit_code_is_ours(
    parent: Callable[..., Parent],
) -> None:
    started = parent(SAYS_WHAT_IT_HEARS, "one", "two")
    started.children()
    started.process.send_signal(signal.SIGTERM)
    assert started.lines(2) == {"one SIGTERM", "two SIGTERM"}
    started.process.send_signal(signal.SIGINT)
    assert started.lines(2) == {"one SIGINT", "two SIGINT"}

    assert started.lines(1) == set()  # none was started again, although one failed
    assert started.process.wait() == 3


def test_a_signal_of_the_terminal_reaches_each_child_once(parent: Callable[..., Parent]) -> None:
    started = parent(ENDS_WHEN_TOLD, "one", "two")
    children = started.children()

    assert all(
        os.getpgid(child.pid) != os.getpgid(started.process.pid) for child in children.values()
    )


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process of its parent's end"
)
def test_when_the_parent_is_killed_its_children_are_told_to_stop(
    parent: Callable[..., Parent],
) -> None:
    started = parent(ENDS_WHEN_TOLD, "one", "two")
    children = started.children()
    started.process.kill()

    assert started.lines(1) == set()  # all that held the output have ended
    _, alive = psutil.wait_procs(list(children.values()), 20)
    assert alive == []
