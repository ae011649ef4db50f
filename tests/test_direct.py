"""Routes that are called directly are those that FastAPI would have called."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from api import metrics
from api.app import Edge, create_app
from api.dialects.routing import BODY_MAX_BYTES
from api.direct import Direct
from tests.conftest import Customer

CREATE = "/v1/images/generations"


def indexed() -> tuple[Direct, Callable[[str, str], dict[str, Any]]]:
    """The index, and what asks FastAPI behind it for a method and a path."""
    app = create_app()
    edge = app.middleware_stack
    assert isinstance(edge, Edge)
    index = edge._app
    assert isinstance(index, Direct)
    return index, partial(ask, app, index._app)


def ask(app: Any, layers: Any, method: str, path: str) -> dict[str, Any]:
    """What becomes of the scope of a request without a key."""
    scope: dict[str, Any] = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [],
        "state": {"request_id": "req_1"},
        "app": app,
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            scope["answered"] = message["status"]

    asyncio.run(layers(scope, receive, send))
    return scope


def test_the_index_finds_the_route_that_fastapi_finds() -> None:
    index, fastapi = indexed()
    asked = [*index._fixed]
    for (method, _), shapes in index._by_shape.items():
        asked += [(method, route.path) for _, _, route in shapes]
    assert ("POST", CREATE) in asked
    assert ("GET", "/v1/tasks/{task_id}") in asked

    for method, path in asked:
        word = path.replace("{", "").replace("}", "")
        found = index.find(method, word)
        assert found is not None
        dialect, route, _ = found
        scope = fastapi(method, word)
        assert (scope["route"].path, scope["answered"]) == (route.path, 401), (method, word)
        assert metrics._dialect(scope) == dialect


def test_what_the_index_does_not_know_goes_the_usual_way() -> None:
    index, _ = indexed()

    for method, path in (
        ("PUT", CREATE),
        ("GET", CREATE),
        ("GET", "/v1/tasks/"),
        ("GET", "/v1/tasks/a/b"),
        ("GET", "/v1/tasks"),  # has parameters in its query, which FastAPI reads
        ("GET", "/nowhere"),
    ):
        assert index.find(method, path) is None, (method, path)


def test_a_body_is_read_as_fastapi_reads_it(customer: Customer) -> None:
    def refused(content: bytes, content_type: str | None) -> str:
        headers = {} if content_type is None else {"Content-Type": content_type}
        answer = customer.http.post(CREATE, content=content, headers=headers)
        assert answer.status_code in (400, 413), answer.text
        message: str = answer.json()["error"]["message"]
        return message.removeprefix("Invalid request parameters: ")

    good = b'{"model": "z-image-turbo", "prompt": "a cat"}'
    json = "application/json"
    assert refused(b"", json) == "body: Field required"
    assert refused(b"{", json).startswith("The body is not JSON: ")
    assert "must be JSON" in refused(good, "text/plain")
    assert "must be JSON" in refused(good, None)
    assert refused(b'{"prompt": "\xff"}', json) == "There was an error parsing the body"
    assert str(BODY_MAX_BYTES) in refused(b" " * (BODY_MAX_BYTES + 1), json)
    for content_type in (json, "application/json; charset=utf-8", "application/vnd.api+json"):
        answer = customer.http.post(CREATE, content=good, headers={"Content-Type": content_type})
        assert answer.status_code == 200, answer.text
