"""One API process and one worker on servers of their own, and all that they have written so far.

The settings are read when the first module of the service is imported, so nothing of it is imported
here before the servers run.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx

from deploy import reach, servers

CALLBACK = "https://127.0.0.2/done"
"""May be called, and has no name that would be looked up; there is no courier to call it."""
CREDITS = 10**9
"""So many that nothing is refused for want of them."""
STEP_S = 0.0
START_TIMEOUT_S = 60
SETTLE_TIMEOUT_S = 60
PASSING = ("zimage:limit:", "zimage:workers", "rq:")
"""How the keys in Redis begin that come and go with time or with workers. A bell too many is no
work, and one for work would have its row."""
COUNTED = "SELECT '{table}', count(*), coalesce(sum({row}), 0) FROM {table}"
CHANGED = "xmin::text::bigint"
"""The transaction that wrote a row last, so its sum changes with every insert and update."""
BUT_LAST_USED = "hashtextextended((to_jsonb(api_keys) - 'last_used_at')::text, 0)::numeric"
"""That a key was used is noted whatever was asked with it."""


@dataclass(frozen=True)
class Target:
    """The service before a fuzzer, with a customer and an operator who have no limits."""

    url: str
    customer: str
    operator: str
    """Keys."""
    log: Callable[[], str]
    """All that the processes have said so far."""
    names: dict[str, str]
    """What stands for `{task_id}` and the like in a path or a query."""

    def key(self, path: str) -> str:
        """The key that a request of `path` shows."""
        return self.operator if path.startswith("/admin") else self.customer


@contextmanager
def running(step_s: float = STEP_S) -> Iterator[Target]:
    """The real servers, the API and a worker that only sleeps, until the block ends."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zimage-soak-")))
        folder.chmod(0o755)  # PostgreSQL may have to run as another user
        os.environ.update(stack.enter_context(servers.running(folder, durable=False)))
        port = reach.free_port()
        os.environ.update(
            ZIMAGE_HOST="127.0.0.1",
            ZIMAGE_PORT=str(port),
            ZIMAGE_CALLBACK_ALLOWED_NETWORKS='["127.0.0.2/32"]',
            ZIMAGE_AUTH_FAILURES_PER_MINUTE=str(10**6),  # a fuzzer shows many keys that are none
        )
        subprocess.run([sys.executable, "-m", "api", "prepare"], check=True)
        log = folder / "log"
        for module in (["api", "serve"], ["benchmarks.sleeper", "--step-s", str(step_s)]):
            stack.enter_context(_process([sys.executable, "-m", *module], log))
        url = f"http://127.0.0.1:{port}"
        _until_ready(url)
        customer, operator = make_key(), make_key(admin=True)
        yield Target(url, customer, operator, log.read_text, make_names(url, customer, operator))


@contextmanager
def _process(argv: list[str], log: Path) -> Iterator[None]:
    with log.open("ab") as file, subprocess.Popen(argv, stdout=file, stderr=file) as process:
        try:
            yield
        finally:
            process.terminate()
            process.wait(60)


def _until_ready(url: str) -> None:
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        try:
            if httpx.get(f"{url}/ready").json()["workers"]:
                return
        except (httpx.HTTPError, ValueError, KeyError):
            pass
        time.sleep(0.1)
    raise SystemExit("The service did not become ready")


def make_key(*, admin: bool = False) -> str:
    """A key of a new account that has more credits than can be spent, and no limits."""
    from storage import accounts, ledger
    from storage.database import transaction

    with transaction() as session:
        account = accounts.create(session, "soak", unfinished_max=None)
        ledger.grant(session, account.id, Decimal(CREDITS), actor="soak")
        _, key = accounts.issue_key(session, account.id, requests_per_minute=None, admin=admin)
    return key


def make_names(url: str, customer: str, operator: str) -> dict[str, str]:
    """One of everything that has a name: a drawn task, and an account and a key to be spoiled."""
    create = {
        "model": "z-image-turbo",
        "prompt": "a cat",
        "size": "376x376",
        "callback_url": CALLBACK,
    }

    def ask(method: str, path: str, key: str, body: Any = None, **headers: str) -> Any:
        headers["Authorization"] = f"Bearer {key}"
        answer = httpx.request(method, url + path, json=body, headers=headers, timeout=60)
        return answer.raise_for_status().json()

    task = ask("POST", "/v1/images/generations", customer, create, Prefer="wait=30")
    account = ask("POST", "/admin/accounts", operator, {"name": "another"})
    key = ask("POST", f"/admin/accounts/{account['id']}/keys", operator, {})
    return {
        "account_id": account["id"],
        "delivery_id": ask("GET", "/v1/callbacks", customer)["data"][0]["id"],
        "key_id": key["id"],
        "model": "z-image-turbo",
        "task_id": task["id"],
    }


def document() -> dict[str, Any]:
    """What `/openapi.json` answers."""
    from api.app import create_app

    document: dict[str, Any] = create_app().openapi()
    return document


Written = dict[str, tuple[int, Decimal]]
"""Of each table how many rows it has, and a number that any change of one changes."""


def written() -> Written:
    """All that a request could leave behind, in the database and in Redis."""
    from sqlalchemy import text

    from storage import queue
    from storage.database import engine
    from storage.models import Base

    look = " UNION ALL ".join(
        COUNTED.format(table=table, row=BUT_LAST_USED if table == "api_keys" else CHANGED)
        for table in Base.metadata.tables
    )
    with engine.connect() as connection:
        found: Written = {
            name: (count, mark) for name, count, mark in connection.execute(text(look))
        }
    keys = [key.decode() for key in queue.connection.scan_iter(count=1000)]
    lasting = frozenset(key for key in keys if not key.startswith(PASSING))
    return found | {"redis": (len(lasting), Decimal(hash(lasting)))}


def settled() -> Written:
    """`written`, once every task has ended and nobody works on one."""
    from sqlalchemy import func, select

    from storage.database import engine
    from storage.models import Task, TaskStatus

    unfinished = select(func.count()).where(
        Task.status.in_([TaskStatus.PENDING, TaskStatus.PROCESSING])
    )
    until = time.monotonic() + SETTLE_TIMEOUT_S
    while time.monotonic() < until:
        with engine.connect() as connection:
            busy = connection.scalar(unfinished)
        if not busy:
            return written()
        time.sleep(0.01)
    raise TimeoutError("A task does not end")


def complaints(log: str) -> list[str]:
    """The lines of a log that say that something broke."""
    return [
        line
        for line in log.splitlines()
        if "Traceback" in line or '"level": "error"' in line or '"level":"error"' in line
    ]


def books_are_clean() -> bool:
    """What `check-books` says."""
    from storage import ledger
    from storage.database import transaction

    with transaction() as session:
        return ledger.check_books(session).balanced
