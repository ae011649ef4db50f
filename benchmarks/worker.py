"""`python -m benchmarks.worker`: what a worker adds to the time of its GPU.

The whole service on this machine: its servers, the API, the courier, and one worker process.

1. Throughput with a backlog, as a ratio to a bare loop over the same pipeline that throws the
   pixels away: the demo model at 512 x 512, where both share the machine's cores, and a pipeline
   that only sleeps, as a GPU looks to the CPU. Loop and service take turns.
2. Latency on an idle worker: from the commit of a submission to the first step, and from the last
   step to the callback as its receiver hears it.
3. What waits how long beside a backlog of one account: callers that hold the line, and another
   account's that do not; and how the backlog moves meanwhile.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from functools import partial
from pathlib import Path

import trustme
import uvicorn

from deploy import reach, servers

ROUNDS = 3
IMAGES = 40
"""In a round of the throughput."""
UNCOUNTED = 3
"""Images before that, while the worker is still opening its connections."""
SIDE_PX = 512
SLEEP_STEP_S = 0.075
"""Eight of them are 0.6 s: what the model takes on a data-centre GPU at 1024 x 1024."""
LATENCIES = 200
BACKLOG = 1000
QUICK_STEP_S = 0.0025
PROBES = 40
PROMPT = "a red fox in the snow, number {}"
RECEIVER = "127.0.0.2"


def main() -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zimage-bench-")))
        folder.chmod(0o755)  # PostgreSQL may have to run as another user
        os.environ.update(stack.enter_context(servers.running(folder, durable=True)))
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(folder / "ca.pem"))
        os.environ.update(
            ZIMAGE_PORT=str(reach.free_port()),
            ZIMAGE_CALLBACK_ALLOWED_NETWORKS=f'["{RECEIVER}/32"]',
            ZIMAGE_CALLBACK_CA_FILE=str(folder / "ca.pem"),
            OMP_WAIT_POLICY="passive",
        )
        subprocess.run([sys.executable, "-m", "api", "prepare"], check=True)
        heard = stack.enter_context(_receiver(authority))
        stack.enter_context(_process("api", "serve"))
        stack.enter_context(_process("api.courier"))
        _throughput("demo model", ["worker"], _bare_demo())
        _throughput("sleeping pipeline", ["benchmarks.sleeper"], _bare_sleeper())
        _latency(folder / "trace", heard)
        _fairness()


# --- 1. Throughput ------------------------------------------------------------------------------


def _throughput(name: str, worker: list[str], bare: Callable[[int], float]) -> None:
    ratios, loops, services = [], [], []
    for _ in range(ROUNDS):
        loops.append(bare(IMAGES))
        services.append(_through_the_service(worker))
        ratios.append(services[-1] / loops[-1])
    print(
        f"{name}, {SIDE_PX} x {SIDE_PX}: bare loop {statistics.median(loops):.3f} images/s, "
        f"service {statistics.median(services):.3f}, "
        f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )


def _through_the_service(worker: list[str]) -> float:
    """Images per second from a backlog, by when each is charged."""
    account = _account()
    ids = [_submit(account, number) for number in range(UNCOUNTED + IMAGES)]
    with _process(*worker):
        _until(lambda: _unfinished(account) == 0)
    ends = sorted(task.finished_at.timestamp() for task in _tasks(ids))
    rate: float = IMAGES / (ends[-1] - ends[UNCOUNTED - 1])
    return rate


def _bare_demo() -> Callable[[int], float]:
    """A process for each round, as the worker is one: they must not disturb each other."""
    program = (
        "import sys\n"
        "from benchmarks.worker import bare_loop\n"
        "from worker import loading\n"
        "pipeline = loading.load('demo', device='cpu', dtype='auto')\n"
        "print(bare_loop(pipeline, int(sys.argv[1])))\n"
    )

    def run(images: int) -> float:
        command = [sys.executable, "-c", program, str(images)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return float(done.stdout.split()[-1])

    return run


def _bare_sleeper() -> Callable[[int], float]:
    from benchmarks.sleeper import Sleeper

    return lambda images: bare_loop(Sleeper(SLEEP_STEP_S), images)


def bare_loop(pipeline: object, images: int) -> float:
    """Images per second that `pipeline` draws one after the other for nobody."""
    from storage.tasks import STEPS
    from worker.drawing import Drawing

    def draw(number: int) -> None:
        reading = pipeline.read(PROMPT.format(number))  # type: ignore[attr-defined]
        pipeline.draw(  # type: ignore[attr-defined]
            [Drawing(reading, SIDE_PX, SIDE_PX, number + 1, STEPS, lambda done: None)]
        )

    draw(0)
    started = time.perf_counter()
    for number in range(images):
        draw(number + 1)
    return images / (time.perf_counter() - started)


# --- 2. Latency ---------------------------------------------------------------------------------


def _latency(trace: Path, heard: dict[str, float]) -> None:
    account = _account()
    callback = f"https://{RECEIVER}:{heard['port']:.0f}/told"
    committed: dict[int, float] = {}
    told: dict[int, float] = {}
    with _process("benchmarks.sleeper", "--step-s", "0.005", "--trace", str(trace)):
        for seed in range(1, LATENCIES + 2):
            task_id = _submit(account, seed, seed=seed, callback=callback)
            committed[seed] = _last_commit[0]
            _until(partial(heard.__contains__, task_id), poll_s=0.001)
            told[seed] = heard[task_id]
    lines = {line["seed"]: line for line in map(json.loads, trace.read_text().splitlines())}
    # The first one finds connections that are not open yet.
    seeds = range(2, LATENCIES + 2)
    _quantiles("commit to first step", [lines[seed]["began"] - committed[seed] for seed in seeds])
    _quantiles("last step to callback", [told[seed] - lines[seed]["ended"] for seed in seeds])


def _quantiles(name: str, times_s: Sequence[float]) -> None:
    ranked = sorted(times_s)
    p50, p99 = ranked[len(ranked) // 2], ranked[int(len(ranked) * 0.99)]
    print(f"{name}: p50 {p50 * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms, of {len(ranked)}")


@contextmanager
def _receiver(authority: trustme.CA) -> Iterator[dict[str, float]]:
    """An HTTPS server for callbacks: task ids to when they were heard of."""
    heard: dict[str, float] = {}

    async def app(scope: dict[str, object], receive: object, send: object) -> None:
        body = b""
        while True:
            message = await receive()  # type: ignore[operator]
            body += message["body"]
            if not message.get("more_body"):
                break
        heard[json.loads(body)["id"]] = time.monotonic()
        await send({"type": "http.response.start", "status": 204, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b""})  # type: ignore[operator]

    config = uvicorn.Config(
        app, host=RECEIVER, port=0, lifespan="off", log_config=None, access_log=False
    )
    config.load()
    import ssl

    config.ssl = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(RECEIVER).configure_cert(config.ssl)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    _until(lambda: server.started)
    heard["port"] = float(server.servers[0].sockets[0].getsockname()[1])
    yield heard
    server.should_exit = True
    thread.join()


# --- 3. Fairness --------------------------------------------------------------------------------


def _fairness() -> None:
    crowd = _account()
    backlog = [_submit(crowd, number) for number in range(BACKLOG)]
    others = {"held callers": True, "another account": False}
    found: dict[str, list[str]] = {name: [] for name in others}
    accounts = {name: _account() for name in others}
    with _process("benchmarks.sleeper", "--step-s", str(QUICK_STEP_S)):
        _until(lambda: _unfinished(crowd) < BACKLOG - 10)
        for number in range(PROBES):
            for name, head_start in others.items():
                found[name].append(_submit(accounts[name], number, head_start=head_start))
            _until(lambda: all(_unfinished(account) == 0 for account in accounts.values()))
        meanwhile = BACKLOG - _unfinished(crowd)
        _until(lambda: _unfinished(crowd) == 0)
    order = sorted(
        _tasks(backlog + [task_id for ids in found.values() for task_id in ids]),
        key=lambda task: task.started_at,
    )
    places = {task.id: place for place, task in enumerate(order)}
    starts = [task.started_at for task in order]
    print(f"beside a backlog of {BACKLOG} images of {8 * QUICK_STEP_S * 1000:.0f} ms each:")
    for name, ids in found.items():
        rows = _tasks(ids)
        waits = [(task.started_at - task.created_at).total_seconds() for task in rows]
        ahead = [
            places[task.id] - sum(start < task.created_at for start in starts) for task in rows
        ]
        _quantiles(f"  {name} wait", waits)
        print(f"  {name}: at most {max(ahead)} images were begun before theirs")
    crowd_rows = _tasks(backlog)
    gaps = [
        (after.started_at - before.started_at).total_seconds()
        for before, after in zip(
            sorted(crowd_rows, key=lambda task: task.started_at),
            sorted(crowd_rows, key=lambda task: task.started_at)[1:],
            strict=False,
        )
    ]
    print(
        f"  the backlog: {meanwhile} drawn meanwhile, {len(crowd_rows)} in the end, "
        f"never longer than {max(gaps):.2f} s between two"
    )


# --- What all of them need ----------------------------------------------------------------------

_last_commit = [0.0]


def _account() -> tuple[str, str]:
    from storage import accounts, ledger
    from storage.database import transaction

    with transaction() as session:
        account = accounts.create(session, "benchmark", unfinished_max=100_000)
        ledger.grant(session, account.id, Decimal(10**6), actor="benchmark")
        key, _ = accounts.issue_key(session, account.id, requests_per_minute=None)
        return account.id, key.id


def _submit(
    account: tuple[str, str],
    number: int,
    *,
    seed: int | None = None,
    callback: str | None = None,
    head_start: bool = False,
) -> str:
    from storage import queue, tasks
    from storage.database import transaction
    from storage.models import ImageFormat

    image = tasks.ImageRequest(
        PROMPT.format(number), SIDE_PX, SIDE_PX, ImageFormat.PNG, seed, callback_url=callback
    )
    submission = tasks.Submission(*account, (image,), "evolink", image.price, head_start=head_start)
    with transaction() as session:
        (outcome,) = tasks.submit_many(session, [submission])
    _last_commit[0] = time.monotonic()
    queue.ring(1)
    assert isinstance(outcome, tasks.Submitted), outcome
    return outcome.tasks[0].id


def _tasks(ids: Sequence[str]) -> list:  # type: ignore[type-arg]
    from sqlalchemy import select

    from storage.database import transaction
    from storage.models import Task

    with transaction() as session:
        return list(session.scalars(select(Task).where(Task.id.in_(ids))))


def _unfinished(account: tuple[str, str]) -> int:
    from storage import accounts
    from storage.database import transaction

    with transaction() as session:
        return accounts.get(session, account[0]).unfinished


def _until(true: Callable[[], bool], poll_s: float = 0.2, limit_s: float = 300) -> None:
    until = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > until:
            raise SystemExit("It takes too long")
        time.sleep(poll_s)


@contextmanager
def _process(*module: str) -> Iterator[None]:
    child = subprocess.Popen([sys.executable, "-m", *module], stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        child.terminate()
        child.wait(90)


if __name__ == "__main__":
    main()
