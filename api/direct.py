"""Plain routes, found and called without FastAPI's machinery, which costs more than all the rest.

FastAPI reads each route's signature, and documents it. What most customers call asks for no more
than the request, the caller, a body and words of the path: such a route is called directly, and
found by a look into an index instead of a walk through all the routers. What the index does not
know goes the usual way. A refusal is the one that FastAPI gives.
"""

import email.message
import json
import re
from collections.abc import Callable, Coroutine, Sequence
from inspect import iscoroutinefunction
from typing import Any

from fastapi import APIRouter, Request
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from api.auth import bearer, caller_of

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class DirectRoute(APIRoute):
    """A route that knows its handler, so that it can be called without being routed to."""

    direct: Handler | None = None
    """None where only FastAPI knows how to call it."""


def handler(route: APIRoute) -> Handler | None:
    """What FastAPI's own handler does for a plain route; None for any other.

    It wants the body in `request.state.body`, and raises what FastAPI's raises.
    """
    wanted = route.dependant
    endpoint = wanted.call
    if (
        endpoint is None
        or not iscoroutinefunction(endpoint)
        or wanted.query_params
        or wanted.header_params
        or wanted.cookie_params
        or len(wanted.body_params) > 1
        or any(param.field_info.annotation is not str for param in wanted.path_params)
        or any(param.field_info.metadata for param in wanted.path_params)
        or any(each.call not in (caller_of, bearer) for each in wanted.dependencies)
        or _more_than_request(wanted)
    ):
        return None
    callers = [each.name for each in wanted.dependencies if each.call is caller_of and each.name]
    words = [param.name for param in wanted.path_params]
    read: Callable[[Request], Any] | None = None
    name = ""
    for param in wanted.body_params:
        model = param.field_info.annotation
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return None
        name, read = param.name, _reader(model)

    async def handle(request: Request) -> Response:
        arguments: dict[str, Any] = {word: request.path_params[word] for word in words}
        if wanted.request_param_name:
            arguments[wanted.request_param_name] = request
        for each in callers:
            arguments[each] = request.state.caller
        if read is not None:
            arguments[name] = read(request)
        response: Response = await endpoint(**arguments)
        return response

    return handle


def _more_than_request(wanted: Dependant) -> bool:
    return any(
        (
            wanted.websocket_param_name,
            wanted.http_connection_param_name,
            wanted.response_param_name,
            wanted.background_tasks_param_name,
            wanted.security_scopes_param_name,
        )
    )


def _reader(model: type[BaseModel]) -> Callable[[Request], BaseModel]:
    adapter = TypeAdapter(model)

    def read(request: Request) -> BaseModel:
        """Raises: RequestValidationError, HTTPException."""
        body = _parsed(request)
        if body is None:
            missing = {"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}
            raise RequestValidationError([missing])
        try:
            return adapter.validate_python(body, from_attributes=True)
        except ValidationError as error:
            faults = error.errors(include_url=False)
            raise RequestValidationError(
                [{**fault, "loc": ("body", *fault["loc"])} for fault in faults]
            ) from error

    return read


def _parsed(request: Request) -> Any:
    """The body as JSON, or as it came where it was not said to be that; None without one."""
    body: bytes = request.state.body
    if not body:
        return None
    if not _says_json(request.headers.get("content-type", "")):
        return body
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        fault = {
            "type": "json_invalid",
            "loc": ("body", error.pos),
            "msg": "JSON decode error",
            "input": {},
            "ctx": {"error": error.msg},
        }
        raise RequestValidationError([fault]) from error
    except Exception as error:
        raise HTTPException(400, "There was an error parsing the body") from error


def _says_json(content_type: str) -> bool:
    if content_type == "application/json":
        return True
    message = email.message.Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    is_json = subtype == "json" or subtype.endswith("+json")
    return bool(content_type) and message.get_content_maintype() == "application" and is_json


class Direct:
    """Calls the plain routes of `routers`, each with the name of its dialect, by an index."""

    def __init__(self, app: ASGIApp, routers: Sequence[tuple[str, APIRouter]]) -> None:
        self._app = app
        self._fixed: dict[tuple[str, str], tuple[str, DirectRoute]] = {}
        self._by_shape: dict[tuple[str, int], list[tuple[re.Pattern[str], str, DirectRoute]]] = {}
        for dialect, router in routers:
            for route in router.routes:
                if isinstance(route, DirectRoute) and route.direct is not None:
                    self._add(dialect, route)

    def _add(self, dialect: str, route: DirectRoute) -> None:
        for method in route.methods or ():
            if not route.param_convertors:
                self._fixed.setdefault((method, route.path), (dialect, route))
            elif ":" not in route.path:  # a convertor's words may have slashes in them
                shape = method, route.path.count("/")
                found = self._by_shape.setdefault(shape, [])
                found.append((route.path_regex, dialect, route))

    def find(self, method: str, path: str) -> tuple[str, DirectRoute, dict[str, str]] | None:
        """The dialect, the route, and the words of the path."""
        fixed = self._fixed.get((method, path))
        if fixed is not None:
            return *fixed, {}
        for pattern, dialect, route in self._by_shape.get((method, path.count("/")), ()):
            match = pattern.match(path)
            if match is not None:
                return dialect, route, match.groupdict()
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = None
        if scope["type"] == "http" and not scope.get("root_path"):
            found = self.find(scope["method"], scope["path"])
        if found is None or found[1].direct is None:
            await self._app(scope, receive, send)
            return
        scope["dialect"], scope["route"], scope["path_params"] = found
        response = await found[1].direct(Request(scope, receive, send))
        await response(scope, receive, send)
