"""The customer's library when the service or the network misbehaves."""

from __future__ import annotations

import asyncio
import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from zimage import (
    AsyncClient,
    Client,
    Conflict,
    ImageExpired,
    InsufficientCredits,
    IntegrityError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RateLimited,
    Retries,
    ServiceUnavailable,
    TaskFailed,
    Timeout,
    Unauthenticated,
    Unreachable,
    ZImageError,
)
from zimage.errors import read_retry_after
from zimage.event_stream import Event, EventStream
from zimage.exchange import exchange
from zimage.steps import Course, Head, Open, Pause, Read, Request

QUICK = Retries(pause_min_s=0.001, pause_max_s=0.002)
PNG = b"\x89PNG a picture"
ID = "task-unified-1757165031-uyujaw3d"


@dataclass(frozen=True)
class Heard:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """What to answer; `dropped`: hang up where the answer, or the rest of its body, should come."""

    status: int = 200
    said: Any = b""
    headers: dict[str, str] = field(default_factory=dict)
    dropped: bool = False


@pytest.fixture(autouse=True)
def _empty() -> None:
    """The service is not asked here, so its database is not emptied either."""


@pytest.fixture(autouse=True)
def _books_balance() -> None:
    """Nor are its books looked at."""


Answer = Callable[[Heard], Reply]


@dataclass
class Double:
    """A real HTTP server that answers what a test tells it to."""

    url: str
    answer: Answer
    heard: list[Heard] = field(default_factory=list)


@contextmanager
def answering(answer: Answer | list[Reply]) -> Iterator[Double]:
    """Answer with a function, or with one reply after the other, the last one for ever."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            headers = {name.lower(): value for name, value in self.headers.items()}
            heard = Heard(self.command, self.path, headers, self.rfile.read(length))
            double.heard.append(heard)
            self.close_connection = True
            reply = double.answer(heard)
            body = reply.said if isinstance(reply.said, bytes) else json.dumps(reply.said).encode()
            if reply.dropped and not body:
                return
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body) + reply.dropped))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 (named by http.server)

        def log_message(self, *_: object) -> None:
            pass

    replies = iter(answer) if isinstance(answer, list) else None
    last = Reply(599)

    def next_reply(_: Heard) -> Reply:
        nonlocal last
        last = next(replies or iter(()), last)
        return last

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    double = Double(url, next_reply if isinstance(answer, list) else answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield double
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def task(status: str = "pending", **more: object) -> dict[str, Any]:
    """A task as the service answers it."""
    return {
        "created": 1757165031,
        "id": ID,
        "model": "z-image-turbo",
        "object": "image.generation.task",
        "progress": 100 if status == "completed" else 0,
        "status": status,
        "type": "image",
        "task_info": {"can_cancel": status == "pending"},
        **more,
    }


def finished(url: str, data: bytes = PNG) -> dict[str, Any]:
    result = {
        "image_url": url,
        "seed": 7,
        "sha256": hashlib.sha256(data).hexdigest(),
        "size_bytes": len(data),
    }
    return task("completed", results=[url], result_data=[result], usage={"credits_used": 15})


def refusal(status: int, code: str = "no", **headers: str) -> Reply:
    said = {"error": {"code": code, "message": "Not now", "type": "t"}}
    return Reply(status, said, {"X-Request-ID": "req-1", **headers})


Ask = Callable[[str, Callable[[Any], Any]], Any]


@pytest.fixture(params=["thread", "loop"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Ask the server at a URL, once with each client."""

    def in_thread(url: str, what: Callable[[Any], Any]) -> Any:
        with Client("zk_test", url, retries=QUICK, verify=False) as client:
            return what(client)

    def in_loop(url: str, what: Callable[[Any], Any]) -> Any:
        async def run() -> Any:
            async with AsyncClient("zk_test", url, retries=QUICK, verify=False) as client:
                return await what(client)

        return asyncio.run(run())

    return in_thread if request.param == "thread" else in_loop


def test_a_create_is_sent_again_under_one_key_until_it_is_answered(ask: Ask) -> None:
    replies = [refusal(503), Reply(dropped=True), refusal(500), Reply(200, task())]
    with answering(replies) as double:
        created = ask(double.url, lambda client: client.create("a cat"))
    assert created.id == ID
    assert len(double.heard) == 4
    assert len({heard.headers["idempotency-key"] for heard in double.heard}) == 1
    assert json.loads(double.heard[3].body) == {"model": "z-image-turbo", "prompt": "a cat"}


def test_two_creates_have_two_keys_and_a_given_key_is_kept(ask: Ask) -> None:
    with answering([Reply(200, task())]) as double:
        ask(double.url, lambda client: client.create("a cat"))
        ask(double.url, lambda client: client.create("a cat"))
        ask(double.url, lambda client: client.create("a cat", idempotency_key="mine"))
    keys = [heard.headers["idempotency-key"] for heard in double.heard]
    assert len(set(keys)) == 3
    assert keys[2] == "mine"


def test_retries_end(ask: Ask) -> None:
    with answering([refusal(502)]) as double, pytest.raises(ServiceUnavailable) as raised:
        ask(double.url, lambda client: client.get(ID))
    assert len(double.heard) == 1 + QUICK.retries_max
    assert raised.value.status == 502


def test_nobody_there_is_said_without_a_traceback_of_the_http_library(ask: Ask) -> None:
    with answering([]) as double:
        pass
    with pytest.raises(Unreachable, match=double.url):
        ask(double.url, lambda client: client.get(ID))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequest),
        (401, Unauthenticated),
        (402, InsufficientCredits),
        (403, PermissionDenied),
        (404, NotFound),
        (409, Conflict),
        (413, InvalidRequest),
    ],
)
def test_a_refusal_is_not_sent_again(ask: Ask, status: int, kind: type[ZImageError]) -> None:
    with answering([refusal(status, "why")]) as double, pytest.raises(kind) as raised:
        ask(double.url, lambda client: client.create("a cat"))
    assert len(double.heard) == 1
    said = raised.value
    assert (said.status, said.code, said.message, said.request_id) == (
        status,
        "why",
        "Not now",
        "req-1",
    )
    assert said.line == f"why: Not now (HTTP {status}, request req-1)"


def test_a_pause_that_is_too_long_is_told_instead_of_waited_for(ask: Ask) -> None:
    replies = [refusal(429, **{"Retry-After": "3600"})]
    with answering(replies) as double, pytest.raises(RateLimited) as raised:
        ask(double.url, lambda client: client.get(ID))
    assert len(double.heard) == 1
    assert raised.value.retry_after_s == 3600


def pauses(retry_after: str | None, retries: Retries) -> list[float]:
    """How long a client would pause between the requests it makes, done without a network."""
    headers = {} if retry_after is None else {"retry-after": retry_after}
    course, seconds = Course(exchange(Request("GET", "/x"), retries)), []
    outcomes = {Open: Head(429, headers), Read: b""}
    with suppress(RateLimited):
        while course.step is not None:
            if isinstance(course.step, Pause):
                seconds.append(course.step.seconds)
            course.advance(outcomes.get(type(course.step)))
    return seconds


def test_pauses_grow_at_random_within_their_bounds() -> None:
    many = [pauses(None, Retries(retries_max=6)) for _ in range(200)]
    for bound_s, drawn in zip([1, 2, 4, 8, 8, 8], zip(*many, strict=True), strict=True):
        assert 0.5 <= min(drawn) < max(drawn) <= bound_s
        assert max(drawn) > bound_s * 0.75


def test_what_the_service_asks_for_is_the_least_pause() -> None:
    for drawn in pauses("7", Retries()):
        assert drawn >= 7.5
    assert len(pauses("7", Retries())) == 4


def test_retry_after_is_seconds_or_a_date() -> None:
    now = datetime(2026, 11, 21, 10, 0, 0, tzinfo=UTC)
    assert read_retry_after("5", now) == 5
    assert read_retry_after("Sat, 21 Nov 2026 10:00:30 GMT", now) == 30
    assert read_retry_after("Sat, 21 Nov 2026 09:00:00 GMT", now) == 0
    assert read_retry_after("soon", now) is None
    assert read_retry_after("-1", now) is None


def test_a_page_of_a_proxy_is_no_answer(ask: Ask) -> None:
    for said in (b"<html>Welcome</html>", [1], {"hello": "world"}):
        with answering([Reply(200, said)]) as double, pytest.raises(ServiceUnavailable):
            ask(double.url, lambda client: client.get(ID))
    with answering([Reply(200, task())]) as double, pytest.raises(ServiceUnavailable):
        ask(double.url, lambda client: client.list())


def serve(states: list[Any], image: list[bytes], events: Reply | None = None) -> Answer:
    """A service whose task goes through `states`, and whose image is each of `image` in turn."""

    def answer(heard: Heard) -> Reply:
        host = heard.headers["host"]
        if heard.path.startswith("/image"):
            return Reply(200, image.pop(0) if len(image) > 1 else image[0])
        if heard.path.endswith("/events"):
            return events or refusal(404)
        state = states.pop(0) if len(states) > 1 else states[0]
        return Reply(200, state(f"http://{host}/image.png") if callable(state) else state)

    return answer


def test_an_image_with_wrong_bytes_is_fetched_again(ask: Ask) -> None:
    with answering(serve([task(), finished], [b"wrong bytes!!!", PNG])) as double:
        image = ask(double.url, lambda client: client.generate("a cat"))
    assert image.data == PNG
    assert image.task.seed == 7
    assert [heard.path for heard in double.heard].count("/image.png") == 2


@pytest.mark.parametrize("wrong", [b"wrong bytes!!!", PNG[:-1], PNG + b"and more", b""])
def test_an_image_that_stays_wrong_is_an_error(ask: Ask, wrong: bytes) -> None:
    with (
        answering(serve([task(), finished], [wrong])) as double,
        pytest.raises(IntegrityError),
    ):
        ask(double.url, lambda client: client.generate("a cat"))
    assert [heard.path for heard in double.heard].count("/image.png") == 2


@pytest.mark.parametrize(("told", "wrong"), [("sha256", b"another pictur"), ("size_bytes", b"")])
def test_one_of_length_and_digest_is_enough(ask: Ask, told: str, wrong: bytes) -> None:
    def state(url: str) -> dict[str, Any]:
        ended = finished(url)
        (result,) = ended["result_data"]
        ended["result_data"] = [{"image_url": url, told: result[told]}]
        return ended

    with answering(serve([state], [wrong])) as double, pytest.raises(IntegrityError):
        ask(double.url, lambda client: client.generate("a cat"))
    with answering(serve([state], [PNG])) as double:
        assert ask(double.url, lambda client: client.generate("a cat")).data == PNG


def test_the_key_is_shown_to_the_service_and_not_to_whoever_keeps_the_image(ask: Ask) -> None:
    with answering(serve([task(), finished], [PNG])) as double:
        ask(double.url, lambda client: client.generate("a cat"))
    for heard in double.heard:
        expected = None if heard.path == "/image.png" else "Bearer zk_test"
        assert heard.headers.get("authorization") == expected


def test_a_link_that_has_ended_is_asked_for_anew(ask: Ask) -> None:
    def answer(heard: Heard) -> Reply:
        if heard.path.startswith("/v1/"):
            return Reply(200, finished(f"http://{heard.headers['host']}/new.png"))
        return Reply(200, PNG) if heard.path == "/new.png" else Reply(403, b"<Error/>")

    with answering(answer) as double:
        old = finished(f"{double.url}/old.png")

        def download(client: Any) -> Any:
            from zimage.answers import read_task

            return client.download(read_task(old))

        assert ask(double.url, download) == PNG


def test_an_expired_image_is_said_to_be(ask: Ask) -> None:
    gone = task("completed", results=[], result_data=[], results_expired=True)
    with answering([Reply(200, gone)]) as double, pytest.raises(ImageExpired):
        ask(double.url, lambda client: client.generate("a cat"))


def test_a_completed_task_without_an_image_has_not_failed(ask: Ask) -> None:
    paid = task("completed", results=[])
    with answering([Reply(200, paid)]) as double, pytest.raises(ServiceUnavailable):
        ask(double.url, lambda client: client.generate("a cat"))


def test_a_failed_task_is_an_error_with_its_reason(ask: Ask) -> None:
    failed = task("failed", error={"code": "service_error", "message": "No", "type": "task_error"})
    with (
        answering(serve([task(), failed], [PNG])) as double,
        pytest.raises(TaskFailed) as raised,
    ):
        ask(double.url, lambda client: client.generate("a cat"))
    assert raised.value.code == "service_error"


def stream(*states: dict[str, Any], cut: bool = False) -> Reply:
    events = "".join(f"event: task\nid: 1\ndata: {json.dumps(state)}\n\n" for state in states)
    said = f": ping\n\n{events}".encode()
    return Reply(200, said, {"Content-Type": "text/event-stream"}, dropped=cut)


def test_events_are_followed_to_the_end_without_asking(ask: Ask) -> None:
    states = [task(), task("processing"), finished("http://x/y")]
    with answering(serve([task()], [PNG], stream(*states))) as double:
        ended = ask(double.url, lambda client: client.wait(ID))
    assert ended.completed
    assert [heard.path for heard in double.heard] == [f"/v1/tasks/{ID}/events"]


@pytest.mark.parametrize(
    "events",
    [
        stream(task(), cut=True),
        stream(task()),
        stream({"not": "a task"}),
        Reply(200, b"data: x" * 200_000, {"Content-Type": "text/event-stream"}),
        Reply(200, task("processing")),
        Reply(dropped=True),
        refusal(404),
        refusal(503),
    ],
)
def test_where_events_break_off_the_task_is_asked_for(ask: Ask, events: Reply) -> None:
    with answering(serve([finished("http://x/y")], [PNG], events)) as double:
        assert ask(double.url, lambda client: client.wait(ID)).completed
    assert [heard.path for heard in double.heard] == [f"/v1/tasks/{ID}/events", f"/v1/tasks/{ID}"]


def test_each_state_is_shown_once() -> None:
    states = [task(), task("processing")]
    replies = serve([task("processing"), finished("http://x/y")], [PNG], stream(*states, cut=True))
    with answering(replies) as double, Client("k", double.url, retries=QUICK) as client:
        shown = [state.status for state in client.events(ID)]
    assert shown == ["pending", "processing", "completed"]


def test_each_state_is_shown_once_in_an_event_loop() -> None:
    async def run(url: str) -> list[str]:
        async with AsyncClient("k", url, retries=QUICK) as client:
            return [state.status async for state in client.events(ID)]

    with answering(serve([task()], [PNG], stream(task(), finished("http://x/y")))) as double:
        assert asyncio.run(run(double.url)) == ["pending", "completed"]


def test_waiting_ends_and_the_task_does_not(ask: Ask) -> None:
    with answering(serve([task()], [PNG])) as double, pytest.raises(Timeout, match="pending"):
        ask(double.url, lambda client: client.wait(ID, timeout_s=0.02))
    assert {heard.method for heard in double.heard} == {"GET"}


def test_an_unknown_task_is_not_waited_for(ask: Ask) -> None:
    with answering([refusal(404, "task_not_found")]) as double, pytest.raises(NotFound):
        ask(double.url, lambda client: client.wait(ID))


def test_events_are_read_in_whatever_pieces_they_come() -> None:
    said = (
        b": hello\r\n\r\nevent: task\r\ndata: one\r\ndata:two\r\n\r\n"
        b"id: 7\nretry: 5\nevent: task\ndata: \xe7\x8c\xab\n\nevent: empty\n\ndata: x\r\rdata: cut"
    )
    expected = [
        Event("task", b"one\ntwo"),
        Event("task", b"\xe7\x8c\xab"),
        Event("message", b"x"),
    ]
    for size in range(1, len(said) + 1):
        parser = EventStream()
        pieces = [said[start : start + size] for start in range(0, len(said), size)]
        assert [event for piece in pieces for event in parser.feed(piece)] == expected


def test_a_cancellation_whose_answer_was_lost_is_a_cancellation(ask: Ask) -> None:
    cancelled = task("failed", error={"code": "request_cancelled", "message": "Cancelled"})
    replies = [Reply(dropped=True), refusal(409, "task_already_ended"), Reply(200, cancelled)]
    with answering(replies) as double:
        assert ask(double.url, lambda client: client.cancel(ID)).cancelled
    with answering([refusal(409), Reply(200, finished("x"))]) as double, pytest.raises(Conflict):
        ask(double.url, lambda client: client.cancel(ID))


@pytest.mark.parametrize("wrong", ["../credits", "a/b", "a?b", ""])
def test_an_id_cannot_become_another_route(ask: Ask, wrong: str) -> None:
    with answering([Reply(200, task())]) as double, pytest.raises(InvalidRequest):
        ask(double.url, lambda client: client.get(wrong))
    assert not double.heard


def test_callbacks_are_listed_across_pages(ask: Ask) -> None:
    def line(number: int) -> dict[str, Any]:
        return {
            "id": f"msg_{number}",
            "task_id": ID,
            "url": "https://example.com",
            "state": "gave_up",
            "attempts": [{"at": "2026-11-21T10:00:00Z", "status": 500, "error": None}],
            "created_at": "2026-11-21T10:00:00Z",
            "delivered_at": None,
            "next_attempt_at": None,
        }

    pages = [
        Reply(200, {"data": [line(1), line(2)], "next_cursor": "more"}),
        Reply(200, {"data": [line(3)], "next_cursor": None}),
    ]
    since = datetime(2026, 11, 21, tzinfo=UTC)
    with answering(pages) as double:
        found = ask(double.url, lambda client: client.callbacks(task_id=ID, since=since))
    assert [callback.id for callback in found] == ["msg_1", "msg_2", "msg_3"]
    assert found[0].attempts[0].status == 500
    assert "since=2026-11-21T00%3A00%3A00%2B00%3A00" in double.heard[0].path
    assert "cursor=more" in double.heard[1].path


def test_many_ids_are_asked_for_in_several_looks(ask: Ask) -> None:
    def answer(heard: Heard) -> Reply:
        return Reply(200, {"data": [task() for _ in json.loads(heard.body)["task_ids"]]})

    with answering(answer) as double:
        assert len(ask(double.url, lambda client: client.batch([ID] * 120))) == 120
    assert len(double.heard) == 3
