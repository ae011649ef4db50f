"""What a benchmark runs on: the real servers with fsync on, API processes, accounts, and wrk.

wrk is a program of its own (https://github.com/wg/wrk; `apt install wrk`), so that what measures
costs little beside what is measured.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import httpx
import psutil

from deploy import reach, servers

READY_S = 60
CREDITS = Decimal(10**11)

WRK = """
local requests, next = {}, 0
for line in io.lines(os.getenv("BENCH_REQUESTS")) do requests[#requests + 1] = line end
for n, line in ipairs(requests) do
  local method, path, key, body = line:match("([^\\t]*)\\t([^\\t]*)\\t([^\\t]*)\\t(.*)")
  local headers = {["Content-Type"] = "application/json"}
  if key ~= "" then headers["Authorization"] = "Bearer " .. key end
  requests[n] = {method, path, headers, body ~= "" and body or nil}
end
local pause_ms = tonumber(os.getenv("BENCH_PAUSE_MS"))
function init()
  for n, r in ipairs(requests) do requests[n] = wrk.format(r[1], r[2], r[3], r[4]) end
end
function request() next = next % #requests + 1; return requests[next] end
if pause_ms > 0 then
  function delay() return math.random(0, 2 * pause_ms) end
end
function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '\\n{"requests": %d, "took_us": %d, "p50_us": %d, "p99_us": %d, "failed": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@dataclass(frozen=True, slots=True)
class Request:
    """One of the requests that wrk sends in turn."""

    method: str
    path: str
    key: str = ""
    body: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk measured."""

    per_s: float
    p50_ms: float
    p99_ms: float
    requests: int


@dataclass(frozen=True, slots=True)
class Account:
    id: str
    key_id: str
    key: str


@contextmanager
def running() -> Iterator[Path]:
    """The servers, migrated, with this process' environment naming them; yields their folder.

    To be entered before anything of `storage` is imported.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zimage-bench-")))
        folder.chmod(0o755)  # PostgreSQL may have to run as another user
        os.environ.update(stack.enter_context(servers.running(folder, durable=True)))
        subprocess.run([sys.executable, "-m", "api", "prepare"], check=True)
        yield folder


def accounts(number: int, *, requests_per_minute: int | None = 10**9) -> list[Account]:
    """Accounts with credits and a key each, whose limits are counted but never reached."""
    from storage import accounts, ledger
    from storage.database import transaction

    made = []
    with transaction() as session:
        for n in range(number):
            account = accounts.create(session, f"benchmark {n}", unfinished_max=None)
            ledger.grant(session, account.id, CREDITS, actor="benchmark")
            key, secret = accounts.issue_key(
                session, account.id, requests_per_minute=requests_per_minute
            )
            made.append(Account(account.id, key.id, secret))
    return made


@contextmanager
def process(*argv: str, **settings: str) -> Iterator[psutil.Process]:
    """`python -m ARGV` with `ZIMAGE_<name>` settings, its log into nowhere; stopped at the end."""
    env = os.environ | {f"ZIMAGE_{name.upper()}": value for name, value in settings.items()}
    child = subprocess.Popen(
        [sys.executable, "-m", *argv], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield psutil.Process(child.pid)
    finally:
        child.terminate()
        child.wait(60)


@contextmanager
def api(**settings: str) -> Iterator[tuple[str, psutil.Process]]:
    """One API process: its URL, and the process."""
    port = reach.free_port()
    defaults = {"backlog_max": str(10**9), "reads_per_second": str(10**6)}
    with process("api", "serve", **(defaults | settings | {"port": str(port)})) as child:
        url = f"http://127.0.0.1:{port}"
        wait_until_answered(f"{url}/ready")
        yield url, child


def wait_until_answered(url: str) -> None:
    """Return once `url` answers with 200."""
    until = time.monotonic() + READY_S
    while True:
        try:
            httpx.get(url, timeout=READY_S).raise_for_status()
        except httpx.HTTPError:
            if time.monotonic() > until:
                raise
        else:
            return
        time.sleep(0.01)


def load(
    url: str,
    requests: Sequence[Request],
    *,
    seconds: float,
    connections: int = 32,
    pause_ms: float = 0.0,
) -> Load:
    """Have wrk send `requests` in turn, each connection one at a time, pausing between.

    Raises: SystemExit: there is no wrk, or an answer was not one of success.
    """
    program = shutil.which("wrk")
    if program is None:
        raise SystemExit("The load comes from wrk, which is not installed: apt install wrk")
    with tempfile.TemporaryDirectory(prefix="zimage-wrk-") as folder:
        script, lines = Path(folder, "script.lua"), Path(folder, "requests")
        script.write_text(WRK)
        lines.write_text("".join(f"{r.method}\t{r.path}\t{r.key}\t{r.body}\n" for r in requests))
        ran = subprocess.run(
            [
                program,
                "-t1",
                f"-c{connections}",
                f"-d{seconds:g}s",
                "--timeout",
                "30s",
                "-s",
                str(script),
                url,
            ],
            env=os.environ | {"BENCH_REQUESTS": str(lines), "BENCH_PAUSE_MS": f"{pause_ms:g}"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    found = json.loads(ran.stdout.splitlines()[-1])
    if found["failed"]:
        raise SystemExit(f"{found['failed']} of {found['requests']} requests failed: {url}")
    return Load(
        found["requests"] / found["took_us"] * 1e6,
        found["p50_us"] / 1000,
        found["p99_us"] / 1000,
        found["requests"],
    )


def cpu_s(process: psutil.Process) -> float:
    """CPU time of a process and its children so far."""
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)
