"""How each stack is started beside the others: its API, its two workers, its accounts.

All use the same three servers: the peers have databases, a Redis database and a bucket of their
own. Their packages are in an environment of their own, so that nothing of ours speeds them up.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from benchmarks import stage
from benchmarks.figures import say
from deploy import reach

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".bench" / "peers"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
ACCOUNTS = 32
WORKERS = 2
WORKER = {
    "rq": ("rq.cli", "worker", "--quiet", "--worker-class", "rq.SimpleWorker", "peers"),
    "celery": (
        *("celery", "-A", "benchmarks.peers.jobs:celery_app"),
        "worker",
        "--pool=solo",
        "-l",
        "ERROR",
    ),
}
STOP_S = 30


@dataclass(frozen=True, slots=True)
class Stack:
    name: str
    keys: list[str]
    """One per account."""
    peer: dict[str, str] | None = None
    """The environment of a peer's processes; None is ours."""


def installed() -> Path:
    """The interpreter of the peers' environment, which is made where it is not or is another."""
    wanted, found = REQUIREMENTS.read_text(), VENV / "requirements.txt"
    python = VENV / "bin" / "python"
    if not found.exists() or found.read_text() != wanted:
        say("Installing the peers into .bench; this may take a minute.")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(REQUIREMENTS)], check=True, stdout=sys.stderr)
        found.write_text(wanted)
    return python


def ours() -> Stack:
    return Stack("ours", [account.key for account in stage.accounts(ACCOUNTS)])


def peer(queue: str, redis_db: int) -> Stack:
    """Prepare the peer whose queue is `rq` or `celery`; within `stage.running`."""
    database = f"peers_{queue}"
    ours_url = os.environ["ZIMAGE_DATABASE_URL"].replace("+psycopg:", ":", 1)
    with psycopg.connect(ours_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {database}")
    redis_url = f"{os.environ['ZIMAGE_REDIS_URL'].rpartition('/')[0]}/{redis_db}"
    env = os.environ | {
        "PEER_QUEUE": queue,
        "PEER_DATABASE_URL": ours_url.replace("@/zimage?", f"@/{database}?", 1),
        "PEER_REDIS_URL": redis_url,
        "RQ_REDIS_URL": redis_url,  # for RQ's own command, which would show it as an argument
    }
    prepare = [str(installed()), "-m", "benchmarks.peers.prepare", str(ACCOUNTS)]
    ran = subprocess.run(prepare, env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Stack(queue, json.loads(ran.stdout), env)


@contextmanager
def api(stack: Stack) -> Iterator[int]:
    """One API process; yields its port."""
    if stack.peer is None:
        with stage.api() as (url, _):
            yield int(url.rpartition(":")[2])
        return
    port = reach.free_port()
    served = ("uvicorn", "benchmarks.peers.app:app", "--port", str(port), "--log-level", "warning")
    with _process(*served, "--loop", "uvloop", "--http", "httptools", env=stack.peer):
        stage.wait_until_answered(f"http://127.0.0.1:{port}/ready")
        yield port


@contextmanager
def workers(stack: Stack) -> Iterator[None]:
    """Two worker processes, none of which forks for a job: a model is loaded once."""
    with ExitStack() as running:
        for _ in range(WORKERS):
            if stack.peer is None:
                running.enter_context(stage.process("benchmarks.sleeper", "--step-s", "0"))
            else:
                running.enter_context(_process(*WORKER[stack.name], env=stack.peer))
        yield


@contextmanager
def _process(*argv: str, env: dict[str, str]) -> Iterator[None]:
    child = subprocess.Popen(
        [str(installed()), "-m", *argv],
        env=env,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,  # and what went wrong is shown
    )
    try:
        yield
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(STOP_S)
