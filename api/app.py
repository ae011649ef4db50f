"""The HTTP application: the dialects, the operators' routes, and what all answers share."""

import random
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
import structlog
from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from redis.exceptions import RedisError
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import admin, batching, metrics, security_headers
from api.answers import JSON, Problem
from api.auth import Admission
from api.batching import Batcher
from api.dialects import dashscope, evolink, local, openai, zimageturbo
from api.direct import Direct
from api.settings import settings
from api.waiting import Waiting
from storage import fairness, objects, queue
from storage.database import transaction
from storage.errors import ServiceUnavailable, StorageUnavailable
from storage.settings import settings as storage_settings

CHECK_TIMEOUT_S = 4
"""How long `/ready` waits for a server before it calls it away."""
DEPTH_MAX = 100_000
"""`/ready` counts waiting tasks no further."""

PROBES = ("/health", "/ready")
"""Asked every few seconds by whatever watches: only bad news of them is logged."""

DEMO_NOTICE = (
    "This is the built-in demo model: about eight million parameters, trained on drawn shapes. It "
    "draws coloured shapes and simple scenes, asked for in English or Chinese, such as 'a red star "
    "on a blue background', and nothing else. "
    "Set ZIMAGE_MODEL=Tongyi-MAI/Z-Image-Turbo for real images."
)
EXPOSED = (
    "Idempotency-Replayed",
    "Preference-Applied",
    "RateLimit",
    "RateLimit-Policy",
    "Retry-After",
    "X-Request-ID",
)
"""Headers of ours that a page in a browser may read."""
_ids = random.Random(secrets.randbits(128))  # noqa: S311 - no secret
"""What names requests: the system's randomness would cost each a system call."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

TAGS = [
    {"name": "zimageturbo", "description": "zimageturbo.ai's format. Images are JPEG."},
    {"name": "dashscope", "description": "Alibaba DashScope's format. Images are PNG."},
    {"name": "evolink", "description": "EvoLink's format, with callbacks. Images are PNG."},
    {"name": "local", "description": "A local container's format: the image in the answer."},
    {"name": "openai", "description": "The OpenAI Images API, for its own libraries."},
    {"name": "admin", "description": "For operators: needs an admin key."},
    {"name": "operating", "description": "For whoever keeps it running. Needs no key."},
]

logger = structlog.get_logger()


def create_app() -> FastAPI:
    app = FastAPIOffline(  # whose `/docs` carries its script itself, for machines without internet
        title="Z-Image-Turbo service",
        description="Several vendors' formats at once: change the base URL, keep the client.",
        openapi_tags=TAGS,
        redirect_slashes=False,
        lifespan=_until_stopped,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # `/metrics` is ours
    )
    app.state.admission = Admission()
    app.state.submissions = Batcher(batching.submit)
    app.state.reads = Batcher(batching.find)
    app.state.waiting = Waiting(app.state.reads)

    for path, look, summary in (
        ("/health", health, "The process lives"),
        ("/ready", ready, "The service can work"),
    ):
        app.add_api_route(path, look, tags=["operating"], summary=summary)
        # Some load balancers ask with HEAD.
        app.add_api_route(path, look, methods=["HEAD"], include_in_schema=False)
    # The more particular prefix first: what one dialect leaves open is 404 in that dialect.
    found = [("admin", router) for router in admin.routers()]
    for dialect in (local, evolink, dashscope, zimageturbo, openai):
        found += [(dialect.NAME, router) for router in dialect.routers()]
    for name, router in found:
        app.include_router(router, tags=[name])
    count = metrics.mount(app)
    app.add_exception_handler(404, _nothing_here)
    app.add_exception_handler(405, _nothing_here)
    app.add_exception_handler(Exception, _failed)
    # Around FastAPI's own layers, and not within them: most requests need none of those.
    edge: ASGIApp = Direct(app.build_middleware_stack(), found)
    if settings.cors_origins:
        edge = CORSMiddleware(
            edge,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    app.middleware_stack = Edge(edge, count)
    return app


@asynccontextmanager
async def _until_stopped(app: FastAPI) -> AsyncIterator[None]:
    yield
    await app.state.waiting.close()


async def health() -> Response:
    """Says nothing about the servers behind it: that is `/ready`."""
    answer: dict[str, Any] = {"status": "ok", "model": storage_settings.model}
    if storage_settings.model == "demo":
        answer["notice"] = DEMO_NOTICE
    return JSON(answer)


async def ready() -> Response:
    """503 unless the database, Redis and the image store answer.

    Workers are counted, also by what they do, but not required: a task may be submitted while none
    is there.
    """
    looks: dict[str, Callable[[], Any]] = {
        "database": _look_at_database,
        "redis": _look_at_redis,
        "s3": objects.check,
    }
    found: dict[str, Any] = {}

    async def look(name: str) -> None:
        try:
            with anyio.fail_after(CHECK_TIMEOUT_S):
                found[name] = await anyio.to_thread.run_sync(looks[name], abandon_on_cancel=True)
        except (ServiceUnavailable, StorageUnavailable, RedisError, TimeoutError):
            found[name] = False

    async with anyio.create_task_group() as group:
        for name in looks:
            group.start_soon(look, name)
    checks = {name: found[name] is not False for name in looks}
    answer = {
        "ready": all(checks.values()),
        "checks": {name: "ok" if fine else "unreachable" for name, fine in checks.items()},
        "tasks_waiting": found["database"] if checks["database"] else None,
        "jobs_waiting": found["redis"][0] if checks["redis"] else None,
        "workers": found["redis"][1].total() if checks["redis"] else None,
        "workers_by_state": found["redis"][1] if checks["redis"] else None,
    }
    return JSON(answer, 200 if answer["ready"] else 503)


def _look_at_database() -> int:
    with transaction() as session:
        return fairness.waiting(session, at_most=DEPTH_MAX)


def _look_at_redis() -> tuple[int, Counter[str]]:
    """Jobs that wait, and how many workers there are in each state."""
    found = queue.worker_facts()
    return queue.count(), Counter(str(facts.get("state") or "unknown") for facts in found)


async def _nothing_here(request: Request, error: Exception) -> Response:
    """404 and 405 outside every dialect."""
    status: int = getattr(error, "status_code", 404)
    headers = getattr(error, "headers", None)
    title = "Method Not Allowed" if status == 405 else "Not Found"
    return Problem({"title": title, "status": status}, status, headers)


def _internal_error() -> Response:
    return Problem({"title": "Internal Server Error", "status": 500}, 500)


async def _failed(request: Request, error: Exception) -> Response:
    """What FastAPI answers where nobody caught `error`, which it raises again: for the log."""
    return _internal_error()


class Edge:
    """What all requests have in common, around everything else.

    Gives every request an id, every answer the header `X-Request-ID`, the log a line and the
    metrics a count. An id that the caller sends is kept if it is of a harmless form. What nobody
    caught ends here, as a 500 that says nothing and a traceback in the log.
    """

    def __init__(self, app: ASGIApp, count: metrics.Count) -> None:
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", ()))
                headers.append((b"x-request-id", request_id.encode()))
                message["headers"] = security_headers.added_to(headers, scope["path"])
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request.failed", path=scope["path"])
            if status == 0:
                await _internal_error()(scope, receive, send_with_id)
        finally:
            took_s = time.perf_counter() - started
            self._count(scope, status or 500, took_s)
            if scope["path"] not in PROBES or status >= 400:
                logger.info(
                    "request",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    ms=round(took_s * 1000, 1),
                )


def _request_id(scope: MutableMapping[str, Any]) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            sent = value.decode("latin-1")
            if _REQUEST_ID.fullmatch(sent):
                return str(sent)
    return f"req_{_ids.getrandbits(96):024x}"
