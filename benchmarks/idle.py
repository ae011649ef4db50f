"""`python -m benchmarks.idle`: the memory of an API process that does nothing, and how soon after
`make up` the service answers.

The memory is looked at after one request of each kind, since what they need is loaded by then. The
service comes up on a data folder of its own: first empty, so that the database is made and
migrated, then with what the run before has left.
"""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks import stage
from benchmarks.figures import Figure, say, tell
from deploy import reach

DASHSCOPE = "/api/v1/services/aigc/image-generation/generation"

ROOT = Path(__file__).parent.parent
GOAL_MB, GOAL_S = 120, 5
FOLDERS = 2
"""Each is started twice."""
START_S, STOP_S = 60, 60
QUIET_S = 1.0
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds since the command was typed."""

    ready_s: float
    worker_s: float
    """Until a worker had loaded its model too."""
    welcome_s: float


def main() -> None:
    with stage.running():
        _memory()
    first, again = [], []
    for _ in range(FOLDERS):
        folder = Path(tempfile.mkdtemp(prefix="zimage-up-"))
        folder.chmod(0o755)  # PostgreSQL may have to run as another user
        try:
            env = _environment(folder)
            first.append(_start(env))
            again.append(_start(env))
        finally:
            shutil.rmtree(folder)
    _tell_starts("with an empty data folder", first)
    _tell_starts("once more", again)


def _memory() -> None:
    (account,) = stage.accounts(1)
    admin_key = _admin_key(account.id)
    rss_mb, own_mb, detail = _used(account.key, admin_key, "benchmarks.alone", "api")
    developing_mb, _, _ = _used(account.key, admin_key, "api")
    tell(
        Figure(
            "memory of an idle API process",
            round(rss_mb, 1),
            GOAL_MB,
            "MB",
            at_most=True,
            detail=f"RSS after one request of each kind, of which {own_mb:.0f} MB are its own; "
            f"{detail}; {developing_mb:.0f} MB with the libraries of development installed",
        )
    )


def _used(key: str, admin_key: str, *module: str) -> tuple[float, float, str]:
    """RSS and USS of `python -m MODULE serve` after one request of each kind, and what is more."""
    port = str(reach.free_port())
    with (
        stage.process(*module, "serve", port=port) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START_S) as http,
    ):
        stage.wait_until_answered(f"http://127.0.0.1:{port}/ready")
        ready_mb = process.memory_info().rss / 1e6
        _ask_each_kind(http, key, admin_key)
        time.sleep(QUIET_S)
        used = process.memory_full_info()
        threads = process.num_threads()
        for path in ("/v1/callbacks/secret", "/docs", "/openapi.json"):
            http.get(path, headers={"Authorization": f"Bearer {key}"}).raise_for_status()
        more_mb = process.memory_info().rss / 1e6
    return (
        used.rss / 1e6,
        used.uss / 1e6,
        f"{ready_mb:.0f} MB when it was ready, {more_mb:.0f} MB once a callback secret and the "
        f"documentation were read; {threads} threads",
    )


def _admin_key(account_id: str) -> str:
    from storage import accounts
    from storage.database import transaction

    with transaction() as session:
        _, secret = accounts.issue_key(session, account_id, admin=True)
    return secret


def _ask_each_kind(http: httpx.Client, key: str, admin_key: str) -> None:
    """What customers, operators and watchers ask, in every format."""
    http.headers["Authorization"] = f"Bearer {key}"
    prompt = "a red fox in the snow"
    evolink = {"model": "z-image-turbo", "prompt": prompt}
    messages = [{"role": "user", "content": [{"text": prompt}]}]
    dashscope = {"model": "z-image-turbo", "input": {"messages": messages}}
    background = {"X-DashScope-Async": "enable"}
    made = http.post("/v1/images/generations", json=evolink)
    task_id = made.raise_for_status().json()["id"]
    told = {**evolink, "callback_url": "https://192.0.2.1/hook"}
    answers = [
        http.get(f"/v1/tasks/{task_id}"),
        http.get(f"/v1/tasks/{task_id}", headers={"Prefer": "wait=1"}),
        http.get("/v1/tasks"),
        http.post(f"/v1/tasks/{task_id}/cancel"),
        http.get(f"/v1/tasks/{task_id}/events"),  # which has ended
        http.get("/v1/credits"),
        http.get("/v1/callbacks"),
        http.post("/api/generate", json={"prompt": prompt, "aspect_ratio": "1:1"}),
        http.post(DASHSCOPE, json=dashscope, headers=background),
        http.get("/api/v1/tasks/"),
        http.post("/v1/generate?dry_run=true", json={"prompt": prompt}),
        http.post("/openai/v1/images/generations?dry_run=true", json={"prompt": prompt}),
        http.get("/openai/v1/models"),
        http.get("/admin/accounts", headers={"Authorization": f"Bearer {admin_key}"}),
        http.get("/metrics"),
        http.get("/health"),
    ]
    for answer in answers:
        answer.raise_for_status()
    for refused in (http.post("/v1/images/generations", json=told), http.get("/nowhere")):
        assert refused.is_client_error, refused.text


def _environment(folder: Path) -> dict[str, str]:
    """As in a new shell, with ports that are free."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("ZIMAGE_")},
        "ZIMAGE_PORT": str(reach.free_port()),
        "ZIMAGE_S3_PORT": str(reach.free_port()),
        "ZIMAGE_DATA_DIR": str(folder / "data"),
    }


def _start(env: dict[str, str]) -> Start:
    """What `make up` runs, until its welcome; then it is stopped. Raises: SystemExit: it failed."""
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "deploy.local"], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            url = f"http://127.0.0.1:{env['ZIMAGE_PORT']}/ready"
            ready_s = _seconds_until(url, began, process, workers=0)
            worker_s = _seconds_until(url, began, process, workers=1)
            assert process.stdout is not None
            for line in process.stdout:
                if "Try it" in line:
                    break
            welcome_s = time.monotonic() - began
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=STOP_S)
    if process.returncode:
        raise SystemExit(f"make up ended with {process.returncode}")
    start = Start(ready_s, worker_s, welcome_s)
    say(f"{start}")
    return start


def _seconds_until(
    url: str, began: float, process: "subprocess.Popen[str]", *, workers: int
) -> float:
    """Until `url` says that the service is ready and has so many workers."""
    while process.poll() is None and time.monotonic() < began + START_S:
        with suppress(httpx.HTTPError):
            answer = httpx.get(url, timeout=START_S, trust_env=False)
            if answer.is_success and answer.json()["workers"] >= workers:
                return time.monotonic() - began
        time.sleep(POLL_S)
    raise SystemExit("make up did not become ready")


def _tell_starts(which: str, starts: list[Start]) -> None:
    ready_s = [start.ready_s for start in starts]
    detail = ", ".join(
        f"{start.ready_s:.1f} s, with a worker {start.worker_s:.1f} s" for start in starts
    )
    tell(
        Figure(
            f"`make up` {which}, until it is ready",
            round(statistics.median(ready_s), 2),
            GOAL_S,
            "s",
            at_most=True,
            detail=f"median; {detail}",
        )
    )


if __name__ == "__main__":
    main()
