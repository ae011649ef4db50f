"""`python -m benchmarks.expiry`: what erasing a million old tasks costs those who work beside it.

Servers of its own, on this machine. A million ended tasks, every tenth with a callback that was
told, are made by SQL. Then creates, claims and status reads go on one by one, each in a transaction
of its own and each on a connection of its own: first alone, then beside the repair that erases the
million in the batches that the courier uses. Who waits for a lock is looked at all the while.
"""

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from uuid import uuid4

from sqlalchemy import Engine, text

from deploy import servers

TASKS = int(os.environ.get("BENCH_TASKS", "1000000"))
IMAGES = 5000
"""Old files in the bucket, for the listing."""
ALONE_S = 20
PAUSE_S = 0.005
"""Between two of a kind, so that the machine is busy but not full."""
LOOK_S = 0.02

Latencies = dict[str, list[float]]

FILL = """
    INSERT INTO tasks (id, account_id, api_key_id, dialect, request_id, model, prompt, width,
                       height, aspect_ratio, seed, seed_given, steps, image_format, callback_url,
                       price, user_group, fair_tag, status, progress, attempt, losses, worker,
                       image_key, image_url, image_expires_at, image_sha256, image_size_bytes,
                       image_width, image_height, error_code, error_message, created_at,
                       started_at, finished_at)
    SELECT format('task-unified-%s-%s', 1700000000 + n / 12, lpad(to_hex(n), 8, '0')),
           :account_id, :key_id, 'evolink', 'req_' || md5(n::text), 'z-image-turbo',
           repeat('a red fox in the snow ', 6), 1024, 1024, '1:1', n, false, 8, 'png',
           CASE WHEN n % 10 = 0 THEN 'https://example.com/hook' END, 15, 'default', n,
           CASE WHEN n % 20 = 1 THEN 'failed' ELSE 'completed' END, 100, 1, 0, 'gpu-1',
           CASE WHEN n % 20 <> 1 THEN 'images/20200101T00/' || md5(n::text) || '.png' END,
           CASE WHEN n % 20 <> 1 THEN 'https://images.example.com/zimage/images/20200101T00/'
                                      || repeat(md5(n::text), 12) END,
           ended, md5(n::text) || md5(n::text), 1500000, 1024, 1024,
           CASE WHEN n % 20 = 1 THEN 'WorkerLost' END, CASE WHEN n % 20 = 1 THEN 'It was lost' END,
           ended - interval '9 s', ended - interval '4 s', ended
      FROM (SELECT n, now() - interval '2 days' - n * interval '86 ms' AS ended
              FROM generate_series(CAST(:first AS int), :last) AS n) AS made
"""
TOLD = """
    INSERT INTO deliveries (id, task_id, account_id, url, state, attempts, claim, delivered_at)
    SELECT 'msg_' || md5(id), id, account_id, callback_url, 'delivered', 1, 1, finished_at
      FROM tasks WHERE callback_url IS NOT NULL
"""
TRIED = "INSERT INTO delivery_attempts (delivery_id, status) SELECT id, 200 FROM deliveries"
WAITING = """
    SELECT coalesce(max(extract(epoch FROM clock_timestamp() - waitstart)), 0)::float
      FROM pg_locks WHERE NOT granted AND waitstart IS NOT NULL
"""


def main() -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zimage-bench-")))
        folder.chmod(0o755)  # PostgreSQL may have to run as another user
        os.environ.update(stack.enter_context(servers.running(folder, durable=True)))
        subprocess.run([sys.executable, "-m", "api", "prepare"], check=True)
        _measure()


def _measure() -> None:
    from storage import accounts, ledger, repair
    from storage.database import engine, transaction

    with transaction() as session:
        account = accounts.create(session, "benchmark", unfinished_max=None)
        ledger.grant(session, account.id, Decimal(10**9), actor="benchmark")
        key, _ = accounts.issue_key(session, account.id, requests_per_minute=None)
    took_s = _fill(engine, account.id, key.id)
    print(f"{TASKS} ended tasks, {TASKS // 10} callbacks: made in {took_s:.0f} s", flush=True)

    alone: Latencies = {}
    with _traffic(account.id, key.id, alone):
        time.sleep(ALONE_S)
    _report("alone", alone)

    beside: Latencies = {}
    waits_s = [0.0]
    batches_s: list[float] = []
    began = time.perf_counter()
    with _traffic(account.id, key.id, beside), _watched(engine, waits_s):
        while (erased := _timed_look(repair.old_tasks, batches_s, repair.ERASED_MAX)) > 0:
            print(f"  {erased} erased, {time.perf_counter() - began:.0f} s", flush=True)
    total_s = time.perf_counter() - began
    _report("beside", beside)
    batches_s.sort()
    print(
        f"batches of {repair.ERASED_MAX}: mean {sum(batches_s) / len(batches_s) * 1000:.0f} ms; "
        f"in all {total_s:.0f} s, {TASKS / total_s:.0f} tasks/s"
    )
    print(f"longest wait for a lock, of anybody: {max(waits_s) * 1000:.0f} ms")
    with engine.connect() as connection:
        left = connection.scalar(
            text("SELECT count(*) FROM tasks WHERE erased_at IS NULL AND finished_at IS NOT NULL")
        )
        assert left == 0, left
    _images()


def _timed_look(look: Callable[[], int], batches_s: list[float], batch: int) -> int:
    began = time.perf_counter()
    erased = look()
    batches = max(1, erased // batch)
    batches_s.extend([(time.perf_counter() - began) / batches] * (batches if erased else 0))
    return erased


def _fill(engine: Engine, account_id: str, key_id: str) -> float:
    began = time.perf_counter()
    names = {"account_id": account_id, "key_id": key_id}
    for first in range(0, TASKS, 100_000):
        last = min(first + 100_000, TASKS) - 1
        with engine.begin() as connection:
            # Tasks that ended and were never charged: the database would refuse them.
            connection.execute(text("SET LOCAL session_replication_role = replica"))
            connection.execute(text("SET LOCAL statement_timeout = 0"))
            connection.execute(text(FILL), names | {"first": first, "last": last})
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in ("SET statement_timeout = 0", TOLD, TRIED, "ANALYZE", "CHECKPOINT"):
            connection.execute(text(statement))
        connection.invalidate()
    return time.perf_counter() - began


@contextmanager
def _traffic(account_id: str, key_id: str, latencies: Latencies) -> Iterator[None]:
    """Creates, claims and reads, until the block ends."""
    from storage import tasks
    from storage.database import transaction
    from storage.models import ImageFormat
    from storage.tasks import Filter, ImageRequest, Submission

    image = ImageRequest("a cat", 1024, 1024, ImageFormat.PNG)
    made: list[str] = []
    loop = asyncio.new_event_loop()

    def create() -> None:
        with transaction() as session:
            order = Submission(account_id, key_id, (image,), "evolink", Decimal(15))
            (outcome,) = tasks.submit_many(session, [order])
        if isinstance(outcome, Exception):
            raise outcome
        made.append(outcome.tasks[0].id)

    def claim() -> None:
        with transaction() as session:
            tasks.claim_next(session, "benchmark")

    def read() -> None:
        loop.run_until_complete(tasks.find_many([(account_id, made[-1] if made else str(uuid4()))]))

    def page() -> None:
        with transaction() as session:
            tasks.page(session, Filter(account_id), offset=0, limit=20)

    stopping = threading.Event()

    def repeat(name: str, work: Callable[[], None]) -> None:
        while not stopping.is_set():
            began = time.perf_counter()
            work()
            latencies.setdefault(name, []).append(time.perf_counter() - began)
            time.sleep(PAUSE_S)

    works = {"create": create, "claim": claim, "read": read, "list": page}
    threads = [threading.Thread(target=repeat, args=each) for each in works.items()]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
        loop.close()


@contextmanager
def _watched(engine: Engine, waits_s: list[float]) -> Iterator[None]:
    """Note how long whoever waits for a lock has waited, until the block ends."""
    stopping = threading.Event()

    def look() -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            while not stopping.wait(LOOK_S):
                waits_s.append(connection.scalar(text(WAITING)) or 0.0)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def _images() -> None:
    """The listing of the bucket, over several pages."""
    from concurrent.futures import ThreadPoolExecutor

    from storage import objects
    from storage.models import ImageFormat

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: objects.put(b"x", ImageFormat.PNG), range(IMAGES)))
    began = time.perf_counter()
    deleted = objects.delete_older_than(timedelta(0))
    assert deleted == IMAGES, deleted
    print(f"{IMAGES} old images listed and deleted in {time.perf_counter() - began:.1f} s")


def _report(name: str, latencies: Latencies) -> None:
    for kind, found in sorted(latencies.items()):
        found.sort()
        p50, p99 = (found[int(len(found) * share)] * 1000 for share in (0.5, 0.99))
        print(
            f"{name:>6} {kind:>6}: p50 {p50:6.1f} ms  p99 {p99:6.1f} ms"
            f"  longest {found[-1] * 1000:6.0f} ms  of {len(found)}"
        )


if __name__ == "__main__":
    main()
