"""What whoever keeps it running looks at: health, readiness, request ids, documentation."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import jsonschema
import pytest
from structlog.testing import capture_logs

from storage import queue
from storage.logs import Behind
from storage.models import Task

if TYPE_CHECKING:
    from tests.conftest import Customer, NewCustomer

    Submit = Callable[..., Task]

ROOT = Path(__file__).parent.parent
CAT = {"prompt": "a cat", "aspect_ratio": "1:1"}


@contextmanager
def process(**changed: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    """`python -m api serve` with other variables, and a client of it once it listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serving = subprocess.Popen(
        [sys.executable, "-m", "api", "serve"],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"ZIMAGE_PORT": str(port)} | changed,
        text=True,
    )
    assert serving.stdout is not None
    try:
        for line in serving.stdout:
            if "Uvicorn running" in line:
                break
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, verify=False) as http:
            yield http, serving
    finally:
        serving.terminate()
        serving.communicate(timeout=30)


def closed_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


# --- Health and readiness -------------------------------------------------------------------------


def test_health_says_plainly_that_this_is_the_demo_model(anyone: httpx.Client) -> None:
    answer = anyone.get("/health")

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body == {"status": "ok", "model": "demo", "notice": body["notice"]}
    assert "demo model" in body["notice"]
    assert "coloured shapes and simple scenes" in body["notice"]
    assert "nothing else" in body["notice"]
    assert "ZIMAGE_MODEL" in body["notice"]


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_a_load_balancer_may_ask_with_head(anyone: httpx.Client, path: str) -> None:
    answer = anyone.head(path)

    assert (answer.status_code, answer.content) == (200, b"")


def test_ready_says_what_it_looked_at_and_what_waits(
    anyone: httpx.Client, customer: Customer, submit: Submit
) -> None:
    for _ in range(3):
        submit(customer)
    for name, state in (("a", "drawing"), ("b", "idle"), ("c", "idle")):
        queue.announce(name, {"state": state, "model": "swordfish"})

    answer = anyone.get("/ready")

    assert answer.status_code == 200
    assert answer.json() == {
        "ready": True,
        "checks": {"database": "ok", "redis": "ok", "s3": "ok"},
        "tasks_waiting": 3,
        "jobs_waiting": 3,
        "workers": 3,
        "workers_by_state": {"drawing": 1, "idle": 2},
    }


def test_ready_tells_tasks_from_their_jobs(
    anyone: httpx.Client, customer: Customer, submit: Submit
) -> None:
    submit(customer)
    queue.connection.flushdb()

    body = anyone.get("/ready").json()

    assert (body["tasks_waiting"], body["jobs_waiting"]) == (1, 0)
    assert (body["workers"], body["workers_by_state"]) == (0, {})


def test_without_redis_it_lives_and_sells_but_is_not_ready(
    customer: Customer, operator: Customer
) -> None:
    with process(ZIMAGE_REDIS_URL=f"redis://127.0.0.1:{closed_port()}/0") as (http, _):
        health = http.get("/health")
        ready = http.get("/ready")
        limited = operator.http.post(f"/admin/accounts/{customer.id}/keys", json={}).json()["key"]
        sold = http.post("/api/generate", json=CAT, headers={"Authorization": f"Bearer {limited}"})
        listed = http.get("/admin/workers", headers={"Authorization": f"Bearer {operator.key}"})

    assert health.status_code == 200
    assert ready.status_code == 503
    assert ready.json() == {
        "ready": False,
        "checks": {"database": "ok", "redis": "unreachable", "s3": "ok"},
        "tasks_waiting": 0,
        "jobs_waiting": None,
        "workers": None,
        "workers_by_state": None,
    }
    assert listed.status_code == 503
    assert sold.status_code == 200
    assert customer.task(sold.json()["data"]["task_id"]).account_id == customer.id


def test_without_anything_it_still_lives_and_says_so_in_every_form(customer: Customer) -> None:
    nowhere = closed_port()
    key = {"Authorization": f"Bearer {customer.key}"}
    with process(
        ZIMAGE_DATABASE_URL=f"postgresql+psycopg://u:p@127.0.0.1:{nowhere}/zimage",
        ZIMAGE_REDIS_URL=f"redis://127.0.0.1:{nowhere}/0",
        ZIMAGE_S3_ENDPOINT_URL=f"http://127.0.0.1:{nowhere}",
    ) as (http, _):
        health = http.get("/health")
        ready = http.get("/ready")
        zimageturbo = http.post("/api/generate", json=CAT, headers=key)
        evolink = http.get("/v1/tasks/task-unified-1757165031-uyujaw3d", headers=key)
        admin = http.get("/admin/books", headers=key)

    assert health.status_code == 200
    assert ready.status_code == 503
    assert set(ready.json()["checks"].values()) == {"unreachable"}
    assert zimageturbo.json() == {
        "code": 503,
        "message": "The service cannot answer at the moment, please try again later.",
        "data": None,
    }
    assert evolink.json()["error"]["code"] == "service_unavailable"
    assert evolink.json()["error"]["type"] == "api_error"
    assert admin.json()["status"] == 503
    for answer in (zimageturbo, evolink, admin):
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1


def test_a_stopped_server_finishes_and_goes(customer: Customer, operator: Customer) -> None:
    path = f"/admin/accounts/{customer.id}/keys"
    limited = operator.http.post(path, json={}).json()["key"]
    with process() as (http, serving):
        answer = http.post(
            "/api/generate", json=CAT, headers={"Authorization": f"Bearer {limited}"}
        )
        assert answer.status_code == 200
        serving.terminate()
        said, _ = serving.communicate(timeout=30)

    lines = [json.loads(line) for line in said.splitlines()]
    assert serving.returncode == -signal.SIGTERM  # as it was told, after all was done
    assert lines[-1]["event"].startswith("Finished server process")
    assert not [line for line in lines if line.get("level") in ("error", "critical")]


def test_every_line_of_the_log_is_json_with_the_ids_to_follow(customer: Customer) -> None:
    with process() as (http, serving):
        answer = http.post(
            "/api/generate",
            json=CAT,
            headers={"Authorization": f"Bearer {customer.key}", "X-Request-ID": "follow-me"},
        )
        serving.terminate()
        said, _ = serving.communicate(timeout=30)

    lines = [json.loads(line) for line in said.splitlines()]
    mine = {line["event"]: line for line in lines if line.get("request_id") == "follow-me"}
    assert mine["task.submitted"]["task_id"] == answer.json()["data"]["task_id"]
    assert mine["request"]["status"] == 200
    assert {line["process"] for line in lines} == {"api"}
    assert customer.key not in said


# --- Request ids ----------------------------------------------------------------------------------

ASKED = {
    "a page": ("GET", "/health"),
    "a success": ("GET", "/openapi.json"),
    "nothing there": ("GET", "/nowhere"),
    "a wrong method": ("POST", "/health"),
    "one dialect": ("GET", "/api/status"),
    "one dialect, unknown path": ("GET", "/api/nowhere"),
    "one dialect, wrong method": ("GET", "/api/generate"),
    "the other": ("GET", "/v1/tasks/x"),
    "the operators'": ("GET", "/admin/books"),
}


@pytest.mark.parametrize("name", ASKED)
def test_every_answer_has_the_id_of_its_request(anyone: httpx.Client, name: str) -> None:
    method, path = ASKED[name]

    given = anyone.request(method, path, headers={"X-Request-ID": "Order-7.a_b"})
    made = [anyone.request(method, path).headers["x-request-id"] for _ in range(2)]

    assert given.headers.get_list("x-request-id") == ["Order-7.a_b"]
    assert all(re.fullmatch(r"req_[0-9a-f]{24}", each) for each in made)
    assert made[0] != made[1]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("x", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("a b", False),
        ('a"b', False),
        ("<script>", False),
        ("../x", False),
        ("é", False),
    ],
)
def test_an_id_is_kept_if_it_is_harmless(anyone: httpx.Client, sent: str, *, kept: bool) -> None:
    answer = anyone.get("/health", headers=[(b"X-Request-ID", sent.encode())])

    found = answer.headers["x-request-id"]
    assert found == sent if kept else re.fullmatch(r"req_[0-9a-f]{24}", found)


def test_the_id_follows_the_task(customer: Customer) -> None:
    answer = customer.http.post("/api/generate", json=CAT, headers={"X-Request-ID": "follow-me"})

    assert customer.task(answer.json()["data"]["task_id"]).request_id == "follow-me"


def test_a_request_is_logged_with_what_became_of_it(anyone: httpx.Client) -> None:
    with capture_logs() as logs:
        anyone.get("/nowhere?secret=swordfish", headers={"Authorization": "Bearer swordfish"})
        anyone.get("/health")  # its answer comes after the other's line was written

    line = next(log for log in logs if log["path"] == "/nowhere")
    assert {**line, "ms": 0.0} == {
        "event": "request",
        "log_level": "info",
        "method": "GET",
        "path": "/nowhere",
        "status": 404,
        "ms": 0.0,
    }
    assert "swordfish" not in str(logs)


# --- Documentation --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document(server: str) -> dict[str, Any]:
    with httpx.Client(verify=False) as http:
        answer = http.get(f"{server}/openapi.json")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with its references followed; of several, the first."""
    while True:
        if "anyOf" in schema:
            schema = schema["anyOf"][0]
        elif "$ref" in schema:
            schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        else:
            return schema


def test_the_documentation_is_a_page(anyone: httpx.Client) -> None:
    answer = anyone.get("/docs")

    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "/openapi.json" in answer.text


def test_the_documentation_needs_nothing_from_elsewhere(anyone: httpx.Client) -> None:
    page = anyone.get("/docs").text
    parts = re.findall(r'(?:src|href)="([^"]+)"', page)

    assert any(part.endswith(".js") for part in parts)
    assert any(part.endswith(".css") for part in parts)
    for part in parts:
        assert part.startswith("/"), part
        assert anyone.get(part).status_code == 200


def test_every_operation_is_under_the_tag_of_its_dialect(document: dict[str, Any]) -> None:
    tags = {
        path: (operation["tags"], bool(operation["summary"]))
        for _, path, operation in operations(document)
    }

    def tag(path: str) -> str:
        kinds = {
            "/admin/": "admin",
            "/openai/v1/": "openai",
            "/api/v1/": "dashscope",
            "/api/": "zimageturbo",
            "/v1/generate": "local",
            "/v1/": "evolink",
        }
        return next((kinds[start] for start in kinds if path.startswith(start)), "operating")

    assert tags == {path: ([tag(path)], True) for path in tags}
    assert {tag["name"] for tag in document["tags"]} == {name for [name], _ in tags.values()}
    assert all(tag["description"] for tag in document["tags"])


def test_every_operation_but_the_operating_ones_is_documented_to_need_a_key(
    document: dict[str, Any],
) -> None:
    for method, path, operation in operations(document):
        assert ("security" in operation) == (path not in ("/health", "/ready")), (method, path)


def test_no_answer_is_documented_that_is_never_given(document: dict[str, Any]) -> None:
    assert "422" not in {
        status for _, _, operation in operations(document) for status in operation["responses"]
    }


def test_the_limits_of_each_field_are_documented(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    zimageturbo = schemas["GenerateRequest"]["properties"]
    evolink = schemas["GenerationRequest"]["properties"]

    assert zimageturbo["prompt"]["maxLength"] == 1000
    assert zimageturbo["aspect_ratio"]["enum"] == ["1:1", "4:3", "3:4", "16:9", "9:16"]
    seed = zimageturbo["seed"]["anyOf"][0]
    assert (seed["minimum"], seed["maximum"]) == (-1, 2147483647)
    assert evolink["prompt"]["maxLength"] == 2000
    seed = evolink["seed"]["anyOf"][0]
    assert (seed["minimum"], seed["maximum"]) == (1, 2147483647)
    assert evolink["callback_url"]["anyOf"][0]["maxLength"] == 2048


@pytest.mark.usefixtures("drawing")
def test_the_example_of_each_body_is_one_that_works(
    document: dict[str, Any], new_customer: NewCustomer, operator: Customer
) -> None:
    tried = set()
    for method, path, operation in operations(document):
        if "requestBody" not in operation:
            continue
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        schema = resolved(document, schema)
        example = schema["example"]
        jsonschema.validate(example, schema | {"components": document["components"]})

        customer = new_customer()
        asker = operator if path.startswith("/admin") else customer
        answer = asker.http.request(
            method, path.format(account_id=customer.id, key_id=customer.key_id), json=example
        )

        documented = [status for status in operation["responses"] if status.startswith("2")]
        assert [str(answer.status_code)] == documented, (method, path, answer.text)
        tried.add(path)

    assert {"/api/generate", "/v1/images/generations", "/admin/accounts"} <= tried


def test_lines_that_are_written_behind_come_whole_and_in_order() -> None:
    file = io.StringIO()
    behind = Behind(file)

    def write(thread: int) -> None:
        for number in range(500):
            behind.write(f"{thread} {number}\n")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    behind.drain()

    lines = [line.split() for line in file.getvalue().splitlines()]
    assert len(lines) == 2000
    for thread in range(4):
        assert [int(n) for t, n in lines if t == str(thread)] == list(range(500))


def test_a_log_that_nobody_reads_any_more_stops_nobody() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    behind = Behind(Broken())
    behind.write("a line\n")
    behind.drain()
    behind.write("and another\n")
    behind.drain()

    assert not behind._lines
