"""What every front door does the same way: let in, bound the body, and fail in its own dialect.

A failure is rendered by the router that it happened in, malformed bodies, wrong methods and
unknown paths included, so nothing has to guess the dialect afterwards.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import orjson
import structlog
from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message

from api.auth import Admit, bearer
from api.direct import DirectRoute, Handler
from api.direct import handler as direct_handler
from api.orders import CallerGone
from storage.errors import (
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    PathNotFound,
    PayloadTooLarge,
    ServiceError,
)
from storage.tasks import LIST_MAX

BODY_MAX_BYTES = 400 * 1024
"""The longest prompt of any dialect, OpenAI's of 32 000 characters, is 384 000 bytes where each
character is escaped as a pair of \\uXXXX; the rest is for the other fields."""
METHODS = (
    *("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"),
    "QUERY",  # draft-ietf-httpbis-safe-method-w-body
)

CALLER_GONE = 499
"""What the log says where nobody is left to be answered; nginx's number for it."""

RenderError = Callable[[ServiceError], Response]
logger = structlog.get_logger()


def dialect_router(render_error: RenderError, admit: Admit | None = None) -> APIRouter:
    """A router whose every failure is rendered by `render_error`.

    `admit` decides who comes in, before the body is read: a stranger cannot make us parse.
    """

    class DialectRoute(DirectRoute):
        def get_route_handler(self) -> Handler:
            direct = direct_handler(self)
            handle = super().get_route_handler() if direct is None else direct

            async def answer(request: Request) -> Response:
                try:
                    if admit is not None:
                        request.state.caller = await admit(request)
                    request.state.body = await _bounded_body(request)
                    return await handle(_unread(request) if direct is None else request)
                except RequestValidationError as error:
                    return render_error(_first_fault(error))
                except HTTPException as error:  # a body that is not JSON in some uncommon way
                    return render_error(InvalidRequest(str(error.detail)))
                except ServiceError as error:
                    return render_error(error)
                except RecursionError:  # FastAPI could just read it, and who reads it again not
                    return render_error(InvalidRequest("The body is nested too deeply"))
                except (CallerGone, ClientDisconnect):  # while it was answered, while it asked
                    return Response(status_code=CALLER_GONE)
                except Exception:
                    logger.exception("request.failed", path=request.url.path)
                    return render_error(InternalError())

            async def handle_in_dialect(request: Request) -> Response:
                # What whoever works on the request has to say beside the dialect's own body.
                request.state.headers = {}
                response = await answer(request)
                response.headers.update(request.state.headers)
                return response

            if direct is not None:
                self.direct = handle_in_dialect
            return handle_in_dialect

    return APIRouter(
        route_class=DialectRoute,
        redirect_slashes=False,
        dependencies=[] if admit is None else [Depends(bearer)],
        responses=_failures(render_error),
    )


def _failures(render_error: RenderError) -> dict[int | str, dict[str, Any]]:
    """What the documentation says of failures: the envelope that `render_error` writes."""
    answer = render_error(InternalError())
    content = {str(answer.media_type): {"schema": _schema(orjson.loads(answer.body))}}
    return {
        "4XX": {"description": "Refused, in the form of this dialect", "content": content},
        "5XX": {"description": "Failed, in the form of this dialect", "content": content},
    }


def _schema(example: Any) -> dict[str, Any]:
    """The JSON Schema of what has the form of `example`; what is null in it may be anything."""
    match example:
        case dict():
            fields = {name: _schema(value) for name, value in example.items()}
            return {"type": "object", "properties": fields, "required": list(fields)}
        case str():
            return {"type": "string"}
        case int():
            return {"type": "integer"}
        case _:
            return {}


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

    # Paths without a parameter first: `/v1/tasks/batch` has the form of `/v1/tasks/{task_id}`.
    for path, methods in sorted(answered.items(), key=lambda item: "{" in item[0]):
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


async def _bounded_body(request: Request) -> bytes:
    """Raises: PayloadTooLarge, ClientDisconnect."""
    body = bytearray()
    more = True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > BODY_MAX_BYTES:
            raise PayloadTooLarge(f"The request body is longer than {BODY_MAX_BYTES} bytes")

    return bytes(body)


def _unread(request: Request) -> Request:
    """The request as FastAPI wants it: with a body that can still be read."""
    unread = [request.state.body]

    async def receive() -> Message:
        """The body, once, and then that the caller hung up."""
        if unread:
            return {"type": "http.request", "body": unread.pop(), "more_body": False}
        return await request.receive()

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
    missing = fault["type"] == "missing"
    return InvalidRequest(f"{'.'.join(where)}: {what}", param=where[0], missing=missing)


def example(answer: dict[str, Any], *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """What `/docs` shows of a successful answer, which `streams` where that is asked for."""
    content: dict[str, Any] = {"application/json": {"example": answer}}
    if streams:
        content["text/event-stream"] = {}
    return {200: {"content": content}}


def offset(page: int, page_size: int, param: str) -> int:
    """How many tasks of a list come before `page`. Raises: InvalidRequest: `param` is too deep."""
    before = (page - 1) * page_size
    if before >= LIST_MAX:
        raise InvalidRequest(f"{param}: lists end after {LIST_MAX} tasks", param=param)
    return before


def drawable(prompt: str) -> str:
    """A prompt that can be drawn, for pydantic. Raises: ValueError."""
    if not prompt.strip():
        raise ValueError("must not be empty")
    if "\0" in prompt:
        raise ValueError("must not contain the NUL character")
    return writable(prompt)


def writable(text: str) -> str:
    """A text that can be kept, and repeated in an answer, for pydantic. Raises: ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half of an escaped pair, which no database takes
        raise ValueError("must be valid Unicode") from None
    return text
