"""What every front door does the same way: let in, bound the body, and fail in its own dialect.

A failure is rendered by the router that it happened in, malformed bodies, wrong methods and
unknown paths included, so nothing has to guess the dialect afterwards.
"""

from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import structlog
from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Message

from api.auth import Admit, bearer
from api.batching import Batcher
from storage import tasks
from storage.accounts import Credential
from storage.errors import (
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    ModelAccessDenied,
    PathNotFound,
    PayloadTooLarge,
    ServiceError,
    TaskNotFound,
)
from storage.models import Task
from storage.settings import settings
from storage.tasks import ImageRequest, Submission

BODY_MAX_BYTES = 64 * 1024
"""The longest prompt, in four-byte characters escaped as \\uXXXX pairs, is a third of this."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")

RenderError = Callable[[ServiceError], Response]
Handler = Callable[[Request], Coroutine[Any, Any, Response]]

logger = structlog.get_logger()


def dialect_router(render_error: RenderError, admit: Admit | None = None) -> APIRouter:
    """A router whose every failure is rendered by `render_error`.

    `admit` decides who comes in, before the body is read: a stranger cannot make us parse.
    """

    class DialectRoute(APIRoute):
        def get_route_handler(self) -> Handler:
            handle = super().get_route_handler()

            async def handle_in_dialect(request: Request) -> Response:
                try:
                    if admit is not None:
                        request.state.caller = await admit(request)
                    return await handle(await _with_bounded_body(request))
                except RequestValidationError as error:
                    return render_error(_first_fault(error))
                except HTTPException as error:  # a body that is not JSON in some uncommon way
                    return render_error(InvalidRequest(str(error.detail)))
                except ServiceError as error:
                    return render_error(error)
                except Exception:
                    logger.exception("request.failed", path=request.url.path)
                    return render_error(InternalError())

            return handle_in_dialect

    return APIRouter(
        route_class=DialectRoute,
        redirect_slashes=False,
        dependencies=[] if admit is None else [Depends(bearer)],
        responses={"4XX": {"description": "Refused, in the form of this dialect"}},
    )


def close(routers: Sequence[APIRouter], prefix: str, render_error: RenderError) -> APIRouter:
    """A router for all that `routers` leave open under `prefix`: 405 and 404 in their dialect."""
    rest = dialect_router(render_error)
    answered: dict[str, set[str]] = defaultdict(set)
    for route in (route for router in routers for route in router.routes):
        if isinstance(route, APIRoute):
            answered[route.path] |= route.methods or set()

    def refuse(allow: str) -> Callable[[], None]:
        def method_not_allowed() -> None:
            raise MethodNotAllowed(allow)

        return method_not_allowed

    for path, methods in answered.items():
        others = sorted(set(METHODS) - methods)
        rest.add_api_route(
            path, refuse(", ".join(sorted(methods))), methods=others, include_in_schema=False
        )

    def path_not_found() -> None:
        raise PathNotFound

    rest.add_api_route(
        prefix + "/{path:path}", path_not_found, methods=list(METHODS), include_in_schema=False
    )
    return rest


async def _with_bounded_body(request: Request) -> Request:
    """The request with its body read. Raises: PayloadTooLarge."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_MAX_BYTES:
            raise PayloadTooLarge(f"The request body is longer than {BODY_MAX_BYTES} bytes")

    async def receive() -> Message:
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return Request(request.scope, receive)


def _first_fault(error: RequestValidationError) -> InvalidRequest:
    fault = error.errors()[0]
    if fault["type"] == "json_invalid":
        return InvalidRequest(f"The body is not JSON: {fault['ctx']['error']}")
    if isinstance(fault["input"], bytes):  # never read as JSON: it was not said to be
        return InvalidRequest("The body must be JSON, with Content-Type: application/json")
    where = [str(part) for part in fault["loc"][1:]]
    what = fault["msg"].removeprefix("Value error, ")
    if not where:
        return InvalidRequest(f"body: {what}")
    return InvalidRequest(f"{'.'.join(where)}: {what}", param=where[0])


def example(answer: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """What `/docs` shows of a successful answer."""
    return {200: {"content": {"application/json": {"example": answer}}}}


def drawable(prompt: str) -> str:
    """A prompt that can be drawn, for pydantic. Raises: ValueError."""
    if not prompt.strip():
        raise ValueError("must not be empty")
    if "\0" in prompt:
        raise ValueError("must not contain the NUL character")
    return prompt


async def submit(request: Request, caller: Credential, image: ImageRequest, dialect: str) -> Task:
    """Submit `image` for `caller`.

    Raises: ModelAccessDenied, and what `storage.ledger.reserve_many` says.
    """
    if not caller.may_use(image.model):
        raise ModelAccessDenied(image.model)
    submissions: Batcher[Submission, Task] = request.app.state.submissions
    task = await submissions.add(
        Submission(
            account_id=caller.account_id,
            api_key_id=caller.key_id,
            request=image,
            dialect=dialect,
            price=settings.price_credits,
            request_id=request.state.request_id,
        )
    )
    logger.info("task.submitted", task_id=task.id, account_id=task.account_id, dialect=dialect)
    return task


async def find(request: Request, caller: Credential, task_id: str) -> Task:
    """The caller's own task. Raises: TaskNotFound, ModelAccessDenied."""
    if not tasks.is_id(task_id):
        raise TaskNotFound
    reads: Batcher[tuple[str, str], Task] = request.app.state.reads
    task = await reads.add((caller.account_id, task_id))
    if not caller.may_use(task.model):
        raise ModelAccessDenied(task.model)
    return task
