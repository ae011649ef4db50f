"""Every error reaches the client in its dialect, and every bug the log; no client sees a trace."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.responses import Response
from structlog.testing import capture_logs

from api import admin
from api.app import Edge, create_app
from api.dialects import dashscope, evolink, local, openai, routing, zimageturbo
from storage import errors
from storage.errors import ServiceError
from tests.conftest import case

if TYPE_CHECKING:
    from tests.conftest import Customer

Render = Callable[[ServiceError], Response]


def all_errors(base: type[ServiceError] = ServiceError) -> list[type[ServiceError]]:
    """Every subclass, and theirs."""
    return [each for sub in base.__subclasses__() for each in (sub, *all_errors(sub))]


def example(kind: type[ServiceError]) -> ServiceError:
    """One as it is raised."""
    if kind is errors.MethodNotAllowed:
        return errors.MethodNotAllowed("POST")
    if kind is errors.ModelAccessDenied:
        return errors.ModelAccessDenied("z-image-turbo")
    if kind is errors.RateLimited:
        return errors.RateLimited(7)
    return kind()


TASK_FAILURES = {
    errors.ContentRefused,
    errors.GenerationFailed,
    errors.GenerationTimeout,
    errors.ResourceExhausted,
    errors.RewriteFailed,
    errors.StorageUnavailable,
    errors.WorkerLost,
}
"""These end a task and are kept on it."""

HELD = TASK_FAILURES | {errors.TaskCancelled}
"""Only a dialect that holds the line until the image is there answers a request with these."""

OPERATORS = {
    errors.AccountNotFound,
    errors.AdminOnly,
    errors.KeyNotFound,
    errors.WouldOverdraw,
    errors.WouldOverflow,
}
"""These can only be met under `/admin`."""

CALLBACKS = {errors.DeliveryNotFound, errors.TaskInUse}
"""These can only be met where callbacks are asked for, and tasks deleted, which is under EvoLink's
prefix."""

PENDING_ONLY = {errors.NotPending}
"""These can only be met where a task that is being drawn cannot be cancelled."""

TABLES: dict[str, tuple[Mapping[type[ServiceError], Any], Render, set[type[ServiceError]]]] = {
    "zimageturbo": (
        zimageturbo.ERRORS,
        zimageturbo.render_error,
        OPERATORS | HELD | CALLBACKS | PENDING_ONLY,
    ),
    "evolink create": (
        evolink.CREATE_ERRORS,
        evolink.render_create_error,
        OPERATORS
        | HELD
        | CALLBACKS
        | PENDING_ONLY
        | {errors.InvalidTaskId, errors.TaskEnded, errors.TaskNotFound},
    ),
    "evolink query": (
        evolink.QUERY_ERRORS,
        evolink.render_query_error,
        OPERATORS
        | HELD
        | PENDING_ONLY
        | {errors.BacklogFull, errors.IdempotencyConflict, errors.TooManyUnfinished},
    ),
    "dashscope": (
        dashscope.ERRORS,
        dashscope.render_error,
        OPERATORS | CALLBACKS | {errors.InvalidTaskId},
    ),
    "local": (
        local.ERRORS,
        local.render_error,
        OPERATORS | CALLBACKS | PENDING_ONLY | {errors.InvalidTaskId, errors.TaskEnded},
    ),
    "openai": (
        openai.ERRORS,
        openai.render_error,
        OPERATORS | CALLBACKS | PENDING_ONLY | {errors.InvalidTaskId, errors.TaskEnded},
    ),
    "admin": (
        admin.ERRORS,
        admin.render_error,
        HELD
        | CALLBACKS
        | PENDING_ONLY
        | {
            errors.InsufficientCredits,
            errors.InvalidTaskId,
            errors.ModelAccessDenied,
            errors.TooManyUnfinished,
            errors.BacklogFull,
        },
    ),
}
"""For each dialect its table, what renders it, and the errors that it cannot meet."""


@pytest.mark.parametrize("dialect", TABLES)
def test_a_dialect_has_a_row_for_each_error_that_it_can_meet(dialect: str) -> None:
    table, _, never = TABLES[dialect]

    assert set(all_errors()) - never == set(table)


def test_each_error_that_ends_a_task_has_its_word() -> None:
    words = {kind.__name__ for kind in TASK_FAILURES}
    assert words == set(evolink.TASK_ERRORS) == set(dashscope.TASK_ERRORS)


def test_each_error_says_something_to_the_customer() -> None:
    for kind in all_errors():
        message = str(example(kind))
        assert message, kind
        assert "\n" not in message, kind
        assert message != kind.__name__, kind


def answers() -> Iterator[tuple[str, type[ServiceError], Response]]:
    for dialect, (table, render, _) in TABLES.items():
        for kind in table:
            yield dialect, kind, render(example(kind))


def test_status_and_envelope_of_each_answer_agree() -> None:
    for dialect, kind, answer in answers():
        body = json.loads(bytes(answer.body))
        if dialect == "zimageturbo":
            assert body["code"] == answer.status_code, kind
        elif dialect == "admin":
            assert body["status"] == answer.status_code, kind
        elif dialect == "dashscope":
            assert list(body) == ["request_id", "code", "message"], kind
        elif dialect == "local":
            assert list(body) == ["detail"], kind
        else:
            assert list(body) == ["error"], kind


def test_429_and_503_always_say_when_to_come_back() -> None:
    for dialect, kind, answer in answers():
        expected = answer.status_code in (429, 503)
        assert ("retry-after" in answer.headers) == expected, (dialect, kind)


def test_405_always_says_which_method_is_right() -> None:
    for dialect, kind, answer in answers():
        assert ("allow" in answer.headers) == (answer.status_code == 405), (dialect, kind)


def test_401_always_says_how_to_show_a_key() -> None:
    for dialect, kind, answer in answers():
        expected = answer.status_code == 401
        assert ("www-authenticate" in answer.headers) == expected, (dialect, kind)


def test_an_error_without_a_row_is_a_500_in_every_dialect() -> None:
    class Unheard(ServiceError):
        """Nobody has thought of this one."""

    for dialect, (_, render, _) in TABLES.items():
        assert render(Unheard()).status_code == 500, dialect


# --- Bugs -----------------------------------------------------------------------------------------

SECRET = "the database's password is swordfish"


@contextmanager
def serving(app: FastAPI) -> Iterator[httpx.Client]:
    """A client of `app` behind a real socket."""
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", verify=False) as http:
            yield http
    finally:
        server.should_exit = True
        thread.join()


BUGS: dict[str, tuple[Render, str, dict[str, Any]]] = {
    "zimageturbo": (
        zimageturbo.render_error,
        "application/json",
        {"code": 500, "message": "Internal server error.", "data": None},
    ),
    "evolink create": (
        evolink.render_create_error,
        "application/json",
        {
            "error": {
                "code": "internal_error",
                "message": "Internal server error",
                "type": "api_error",
            }
        },
    ),
    "evolink query": (
        evolink.render_query_error,
        "application/json",
        {
            "error": {
                "code": "internal_error",
                "message": "Failed to retrieve task status",
                "type": "api_error",
            }
        },
    ),
    "dashscope": (
        dashscope.render_error,
        "application/json",
        {
            "request_id": "",
            "code": "InternalError",
            "message": "An internal error has occured, please try again later or contact service "
            "support.",
        },
    ),
    "local": (
        local.render_error,
        "application/json",
        {"detail": "Internal server error."},
    ),
    "openai": (
        openai.render_error,
        "application/json",
        {
            "error": {
                "message": "Internal server error.",
                "type": "api_error",
                "param": None,
                "code": "internal_error",
            }
        },
    ),
    "admin": (
        admin.render_error,
        "application/problem+json",
        {"title": "Internal Server Error", "status": 500, "detail": "Internal server error."},
    ),
}


@pytest.mark.parametrize("dialect", BUGS)
def test_a_bug_in_a_route_is_the_dialects_500_and_the_logs_traceback(dialect: str) -> None:
    render, content_type, body = BUGS[dialect]
    router = routing.dialect_router(render)

    @router.get("/broken")
    def broken() -> None:
        raise RuntimeError(SECRET)

    app = FastAPI()
    app.include_router(router)
    with capture_logs() as logs, serving(app) as http:
        answer = http.get("/broken")

    assert answer.status_code == 500
    assert answer.headers["content-type"] == content_type
    assert answer.json() == body
    assert [log for log in logs if log.get("exc_info")] == [
        {"event": "request.failed", "path": "/broken", "exc_info": True, "log_level": "error"}
    ]


def test_a_bug_outside_every_dialect_is_a_500_that_says_nothing() -> None:
    app = create_app()

    def broken() -> None:
        raise RuntimeError(SECRET)

    app.add_api_route("/broken", broken)
    with capture_logs() as logs, serving(app) as http:
        answer = http.get("/broken", headers={"X-Request-ID": "mine"})

    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == "mine"
    assert answer.json() == {"title": "Internal Server Error", "status": 500}
    assert [log["path"] for log in logs if log.get("exc_info")] == ["/broken"]


def test_a_bug_after_the_first_byte_breaks_the_answer_off() -> None:
    async def half(scope: Any, receive: Any, send: Any) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-length", b"10")],
            }
        )
        await send({"type": "http.response.body", "body": b"12345", "more_body": True})
        raise RuntimeError(SECRET)

    app = FastAPI()
    app.mount("/", half)
    app.middleware_stack = Edge(app.build_middleware_stack(), lambda scope, status, took_s: None)
    with (
        capture_logs() as logs,
        serving(app) as http,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        http.get("/")

    assert [log["event"] for log in logs if log.get("exc_info")] == ["request.failed"]


# --- Whatever is asked ----------------------------------------------------------------------------


def test_no_answer_to_an_error_is_anything_but_json(
    customer: Customer, anyone: httpx.Client
) -> None:
    for path in (
        "/",
        "/favicon.ico",
        "/nowhere",
        "/health/",
        "/api",
        "/api/x",
        "/api/generate",
        "/api/status",
        "/api/status?task_id=x",
        "/api/v1/x",
        "/api/v1/services/aigc/multimodal-generation/generation",
        "/v1",
        "/v1/generate",
        "/v1/generate/x",
        "/v1/x",
        "/v1/images/generations",
        "/v1/tasks/x",
        "/v1/tasks/task-unified-1-x",
        "/admin",
        "/admin/x",
        "/admin/accounts",
        "/admin/accounts/x",
        "/%2e%2e/%00",
    ):
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
            for client in (customer.http, anyone):
                with case(f"{method} {path}"):
                    answer = client.request(method, path)

                    assert 400 <= answer.status_code < 500
                    problem = path.startswith("/admin") or not path.startswith(("/api/", "/v1/"))
                    kind = "application/problem+json" if problem else "application/json"
                    assert answer.headers["content-type"] == kind
                    assert isinstance(answer.json(), dict)


def test_an_error_outside_every_dialect_is_problem_details(anyone: httpx.Client) -> None:
    assert anyone.get("/nowhere").json() == {"title": "Not Found", "status": 404}
    wrong = anyone.post("/health")
    assert wrong.json() == {"title": "Method Not Allowed", "status": 405}
    assert wrong.headers["allow"] == "GET"
