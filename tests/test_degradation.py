"""What happens while PostgreSQL, Redis or the image store is away: docs/degradation.md, row by row.

Real servers are killed (they refuse) and paused (they hang). Every request has a client that waits
for BOUND_S and no longer: one that hangs fails its test.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from storage import backlog, driver, silence
from storage.database import transaction
from storage.driver import ANSWER_S, CONNECT_TIMEOUT_S
from storage.errors import ServiceUnavailable
from storage.silence import Silence, Silent
from tests.conftest import case
from tests.outages import Service

BOUND_S = ANSWER_S + CONNECT_TIMEOUT_S + 9
"""What is promised, and what a busy machine takes."""
BACKLOG_MAX = 8
LEASE_S = 1

MODEL = {"model": "z-image-turbo"}
CHAT = {**MODEL, "input": {"messages": [{"role": "user", "content": [{"text": "a cat"}]}]}}
CREATES: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "zimageturbo": ("/api/generate", {"prompt": "a cat", "aspect_ratio": "1:1"}, {}),
    "evolink": ("/v1/images/generations", {**MODEL, "prompt": "a cat"}, {}),
    "dashscope": (
        "/api/v1/services/aigc/image-generation/generation",
        CHAT,
        {"X-DashScope-Async": "enable"},
    ),
    "openai": ("/openai/v1/images/generations", {**MODEL, "prompt": "a cat"}, {}),
    "local": ("/v1/generate", {"prompt": "a cat", "width": 512, "height": 512}, {}),
}
HELD = ("openai", "local")
"""These hold the line until the image is there."""
NO_TASK = "task-unified-1757165031-uyujaw3d"
READS = (
    f"/api/status?task_id={NO_TASK}",
    f"/v1/tasks/{NO_TASK}",
    f"/v1/tasks/{NO_TASK}/events",
    "/v1/tasks",
    "/v1/credits",
    "/v1/callbacks",
    f"/api/v1/tasks/{NO_TASK}",
    "/admin/books",
)

PREPARE = """
from decimal import Decimal
import alembic.command
from alembic.config import Config
alembic.command.upgrade(Config(toml_file="pyproject.toml"), "head")
from storage import accounts, ledger, objects
from storage.database import transaction
objects.make_bucket()
with transaction() as session:
    account = accounts.create(session, "a customer")
    ledger.grant(session, account.id, Decimal(15000), actor="test")
    for admin, limit in ((False, 100000), (True, None)):
        _, secret = accounts.issue_key(
            session, account.id, admin=admin, requests_per_minute=limit
        )
        print(secret)
"""


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    folder = Path(tempfile.mkdtemp(prefix="zimage-outages-"))
    folder.chmod(0o755)
    service = Service(
        folder,
        ZIMAGE_LEASE_S=str(LEASE_S),
        ZIMAGE_LOSSES_MAX="100",
        ZIMAGE_STORE_TIMEOUT_S="60",
        ZIMAGE_BACKLOG_MAX=str(BACKLOG_MAX),
    )
    try:
        service.env["KEY"], service.env["ADMIN_KEY"] = service.run(PREPARE).split()[-2:]
        service.start("api", "api", "serve")
        service.start("worker", "benchmarks.sleeper", "--step-s", "0.002")
        service.start("courier", "api.courier")
        yield service
    finally:
        service.close()


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    """A customer with a rate limit, of a service that is well."""
    with httpx.Client(
        base_url=f"http://127.0.0.1:{service.port}",
        headers={"Authorization": f"Bearer {service.env['KEY']}"},
        timeout=BOUND_S,
    ) as http:
        until(lambda: well(http))
        yield http
        until(lambda: well(http))
        assert all(service.alive().values()), service.alive()
        books = http.get(
            "/admin/books", headers={"Authorization": f"Bearer {service.env['ADMIN_KEY']}"}
        ).json()
        assert books["balanced"], books


def well(http: httpx.Client) -> bool:
    try:
        ready = http.get("/ready").json()
        return bool(ready["ready"] and ready["workers"] and ready["tasks_waiting"] == 0)
    except httpx.TransportError:
        return False


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 100
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def create(http: httpx.Client, dialect: str, **headers: str) -> httpx.Response:
    path, body, own = CREATES[dialect]
    timeout_s = 60 if dialect in HELD else BOUND_S
    return http.post(path, json=body, headers=own | headers, timeout=timeout_s)


def submit(http: httpx.Client) -> str:
    """The id of a new task, which was accepted."""
    answer = create(http, "evolink")
    assert answer.status_code == 200, answer.text
    task_id: str = answer.json()["id"]
    return task_id


def status(http: httpx.Client, task_id: str) -> str:
    answer = http.get(f"/v1/tasks/{task_id}")
    return str(answer.json().get("status", answer.status_code))


def completed(http: httpx.Client, *task_ids: str) -> Callable[[], bool]:
    return lambda: all(status(http, task_id) == "completed" for task_id in task_ids)


def available(http: httpx.Client) -> Decimal:
    return Decimal(str(http.get("/v1/credits").json()["data"]["token"]["remaining_credits"]))


def all_at_once(*requests: Callable[[], httpx.Response]) -> list[httpx.Response]:
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: request(), requests))


def everything(service: Service, http: httpx.Client) -> list[httpx.Response]:
    """Every create and every read, at the same time."""
    admin = {"Authorization": f"Bearer {service.env['ADMIN_KEY']}"}
    creates = [lambda d=d: create(http, d) for d in CREATES]
    reads = [
        lambda p=p: http.get(p, headers=admin if p.startswith("/admin") else None) for p in READS
    ]
    return all_at_once(*creates, *reads, lambda: http.post(f"/v1/tasks/{NO_TASK}/cancel"))


def assert_refused(answers: list[httpx.Response]) -> None:
    for answer in answers:
        with case(f"{answer.request.method} {answer.request.url.path}"):
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()


# --- PostgreSQL -----------------------------------------------------------------------------------


def test_a_database_that_hangs_is_a_503_everywhere_and_then_all_goes_on(
    service: Service, http: httpx.Client
) -> None:
    held: list[httpx.Response] = []
    waiter = threading.Thread(target=lambda: held.append(create(http, "openai")))
    with service.postgres.paused():
        answers = everything(service, http)
        waiter.start()
        waiter.join()
        assert http.get("/health").status_code == 200
        assert http.get("/ready").json()["checks"]["database"] == "unreachable"

    assert_refused([*answers, *held])
    until(lambda: http.get("/v1/credits").status_code == 200)
    until(completed(http, submit(http)))


def test_a_database_that_is_killed_is_a_503_until_it_is_back(
    service: Service, http: httpx.Client
) -> None:
    submitted = [submit(http) for _ in range(3)]
    service.postgres.kill(signal.SIGQUIT)
    answers = everything(service, http)
    service.postgres.restart()

    assert_refused(answers)
    until(completed(http, *submitted, submit(http)))


def test_a_commit_of_which_nobody_knows_whether_it_happened_is_found_by_the_next_try(
    service: Service, http: httpx.Client
) -> None:
    before = available(http)
    cut = threading.Event()
    inserting = threading.local()

    def gate(data: bytes) -> bytes:
        if b"INSERT INTO tasks" in data or b"an unknown commit" in data:
            inserting.now = True
        if cut.is_set() or not getattr(inserting, "now", False) or b"COMMIT" not in data:
            raise LookupError
        cut.set()
        return b""

    body = {**MODEL, "prompt": "an unknown commit"}
    tries = []
    service.database_wire.delivers_before_cutting = True
    service.database_wire.gate = gate
    for _ in range(2):
        tries.append(
            http.post(
                "/v1/images/generations", json=body, headers={"Idempotency-Key": "unknown-commit"}
            )
        )
    service.database_wire.gate = None

    assert cut.is_set()
    assert_refused(tries[:1])
    assert tries[1].status_code == 200
    assert tries[1].headers["idempotency-replayed"] == "true"
    until(completed(http, tries[1].json()["id"]))
    assert before - available(http) == 15


# --- Redis ----------------------------------------------------------------------------------------


def test_while_redis_hangs_tasks_are_taken_drawn_and_told(
    service: Service, http: httpx.Client
) -> None:
    with service.valkey.paused():
        answers = all_at_once(*(lambda d=d: create(http, d) for d in CREATES))
        task_id = submit(http)
        until(completed(http, task_id))

    for answer in answers:
        with case(answer.request.url.path):
            assert answer.status_code == 200, answer.text


def test_a_redis_that_is_killed_and_comes_back_empty_loses_nothing(
    service: Service, http: httpx.Client
) -> None:
    service.valkey.kill()
    submitted = [submit(http) for _ in range(3)]
    service.empty_valkey()
    service.valkey.restart()

    until(completed(http, *submitted, submit(http)))


# --- The image store ------------------------------------------------------------------------------


def test_an_image_store_that_hangs_holds_tasks_up_and_no_worker_loses_its_lease(
    service: Service, http: httpx.Client
) -> None:
    before = available(http)
    with service.s3.paused():
        task_id = submit(http)
        until(lambda: status(http, task_id) == "processing")
        first = http.get(f"/v1/tasks/{task_id}").json()
        threading.Event().wait(3 * LEASE_S)  # there is no event where nothing is to happen
        assert status(http, task_id) == "processing"

    until(completed(http, task_id))
    assert first["id"] == task_id
    assert before - available(http) == 15


def test_an_image_store_that_fails_in_every_way_gets_the_image_in_the_end(
    service: Service, http: httpx.Client
) -> None:
    before = available(http)
    faults = [
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 507 Insufficient Storage\r\nContent-Length: 0\r\n\r\n",
        b"",  # cut off within the upload
    ]

    def gate(data: bytes) -> bytes:
        if not faults or not data.startswith(b"PUT"):
            raise LookupError
        return faults.pop(0)

    service.store_wire.gate = gate
    task_id = submit(http)
    until(completed(http, task_id))
    service.store_wire.gate = None

    assert faults == []
    assert before - available(http) == 15


def test_an_image_that_is_drawn_and_cannot_be_fetched_is_a_503_that_names_its_task(
    service: Service, http: httpx.Client
) -> None:
    key = {"Idempotency-Key": "fetch-me-again"}
    drawn = create(http, "local", **key)
    service.s3.kill()
    away = create(http, "local", **key)
    service.s3.restart()
    again = create(http, "local", **key)

    assert_refused([away])
    assert "task-unified-" in away.json()["detail"]
    assert again.json()["image"] == drawn.json()["image"]


# --- Too much -------------------------------------------------------------------------------------


def test_over_the_backlog_nothing_is_reserved_and_what_was_taken_is_still_answered(
    service: Service, http: httpx.Client
) -> None:
    # What the tests before have left is drawn first, or it would count.
    until(lambda: http.get("/ready").json()["tasks_waiting"] == 0)
    time.sleep(backlog.LOOK_S)  # a place that became free is sold so much later
    before = available(http)
    worker = service.processes["worker"]
    worker.send_signal(signal.SIGSTOP)
    taken = [
        create(http, "evolink", **{"Idempotency-Key": f"backlog-{n}"}) for n in range(BACKLOG_MAX)
    ]
    refused = [create(http, dialect) for dialect in CREATES]
    replayed = create(http, "evolink", **{"Idempotency-Key": "backlog-0"})
    held = before - available(http)
    worker.send_signal(signal.SIGCONT)

    assert [answer.status_code for answer in taken] == [200] * BACKLOG_MAX
    assert_refused(refused)
    assert "whole service" in refused[0].text
    assert replayed.json()["id"] == taken[0].json()["id"]
    assert held == 15 * BACKLOG_MAX
    until(lambda: create(http, "evolink").status_code == 200)


# --- What is the server's fault, and what is ours -------------------------------------------------

AWAY = {
    "08006": "the connection failed",
    "25006": "a standby, which only reads",
    "25P03": "idle in a transaction for too long",
    "40001": "serialization failure",
    "40P01": "deadlock",
    "53100": "disk full",
    "53200": "out of memory",
    "53300": "too many connections",
    "55P03": "lock not available",
    "57014": "statement timeout",
    "57P01": "shut down by its operator",
    "57P02": "crashed",
    "57P03": "in recovery mode",
    "58030": "the disk fails",
}


@pytest.mark.parametrize("code", AWAY)
def test_what_the_server_cannot_do_now_is_no_bug_of_ours(code: str) -> None:
    with pytest.raises(ServiceUnavailable), transaction() as session:
        session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{code}'; END $$"))


@pytest.mark.parametrize("code", ["23505", "42P01", "22P02", "XX000"])
def test_a_bug_of_ours_is_not_said_to_be_the_servers(code: str) -> None:
    with pytest.raises(DBAPIError), transaction() as session:
        session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{code}'; END $$"))


def test_a_connection_that_was_cut_is_forgotten() -> None:
    with pytest.raises(ServiceUnavailable), transaction() as session:
        session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
    with transaction() as session:
        assert session.scalar(text("SELECT 1")) == 1


def test_a_slow_statement_of_a_server_that_lives_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "ANSWER_S", 0.1)
    with transaction() as session:
        assert session.scalar(text("SELECT 1 FROM pg_sleep(0.6)")) == 1


def test_a_statement_that_hangs_in_a_server_that_lives_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "ANSWER_S", 0.1)
    monkeypatch.setattr(driver, "GIVE_UP_S", 0.3)
    with pytest.raises(ServiceUnavailable) as refused, transaction() as session:
        session.execute(text("SELECT pg_sleep(20)"))
    assert "does not answer" in str(refused.value.__cause__)
    with transaction() as session:  # and nobody else is kept waiting for it
        assert session.scalar(text("SELECT 1")) == 1


def test_whoever_stands_still_in_a_transaction_loses_it() -> None:
    with transaction() as session:
        assert session.scalar(text("SHOW idle_in_transaction_session_timeout")) == "5s"
    with pytest.raises(ServiceUnavailable):
        stand_still()


def stand_still() -> None:
    with transaction() as session:
        session.execute(text("SET LOCAL idle_in_transaction_session_timeout = 20"))
        me: int = session.scalar(text("SELECT pg_backend_pid()"))
        until(lambda: not lives(me))
        session.execute(text("SELECT 1"))


def lives(backend: int) -> bool:
    with transaction() as session:
        query = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
        return bool(session.scalar(query, {"pid": backend}))


def test_one_asks_a_silent_server_and_the_others_do_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Silence()
    with pytest.raises(TimeoutError), server.asking(TimeoutError):
        raise TimeoutError
    with pytest.raises(Silent), server.asking():
        pass
    monkeypatch.setattr(silence, "PAUSE_S", 0)
    server.begins()
    # The pause is over: the first asks for all.
    with server.asking(), pytest.raises(Silent), server.asking():
        pass
    with server.asking(), server.asking():  # it has answered
        pass
