"""What comes in by a socket: bounded, read in one way only, and refused where the key is wrong."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn
from sqlalchemy import event

from api.app import create_app
from api.auth import Admission
from api.connections import HEAD_BYTES_MAX, HEADERS_MAX, BoundedProtocol
from api.dialects.routing import BODY_MAX_BYTES
from storage import accounts, reads
from storage.database import engine, transaction
from tests.conftest import case

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from tests.conftest import Customer, NewCustomer

PATIENCE_S = 20
"""After which a connection that should have ended is said to be held for ever."""
BELIEVED_S = 1.0
READ = "/api/status?task_id=task-unified-1757165031-uyujaw3d"
WRONG = {"Authorization": "Bearer zk_wrong"}


@contextmanager
def served(
    app: ASGIApp, protocol: type[BoundedProtocol] = BoundedProtocol, *, proxies: str = "127.0.0.1"
) -> Iterator[int]:
    """`app` as `python -m api serve` serves it; yields the port."""
    config = uvicorn.Config(
        app,
        port=0,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        forwarded_allow_ips=proxies,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def refused_within_a_second(http: httpx.Client, since: float) -> int:
    """The first refusal; no request that begins BELIEVED_S after `since` may be let in."""
    while True:
        begun = time.monotonic()
        status = http.get(READ).status_code
        if status in (401, 403):
            return status
        assert begun - since < BELIEVED_S, "a key that had ended was still let in"


# --- Keys -----------------------------------------------------------------------------------------


def test_what_ends_a_key_is_in_force_within_a_second_on_every_api_process(
    new_customer: NewCustomer,
) -> None:
    """Three copies of the application: each remembers keys for itself, as three processes do."""
    revoked, suspended = new_customer(), new_customer()
    with ExitStack() as stack:
        clients = []
        for _ in range(3):
            base = f"http://127.0.0.1:{stack.enter_context(served(create_app()))}"
            for customer in (revoked, suspended):
                headers = {"Authorization": f"Bearer {customer.key}"}
                http = httpx.Client(base_url=base, headers=headers, verify=False, timeout=30)
                clients.append(stack.enter_context(http))
        assert {http.get(READ).status_code for http in clients} == {404}  # known, and remembered

        with transaction() as session:
            accounts.revoke_key(session, revoked.key_id)
            accounts.change(session, suspended.id, suspended=True)
        since = time.monotonic()
        refused = [0] * len(clients)

        def ask(number: int) -> None:
            refused[number] = refused_within_a_second(clients[number], since)

        asking = [threading.Thread(target=ask, args=(number,)) for number in range(len(clients))]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()

    assert refused == [401, 403] * 3


def test_only_the_digest_of_a_key_reaches_the_database(
    new_customer: NewCustomer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that how long a comparison takes says nothing about any key."""
    customer = new_customer()
    asked: list[object] = []

    def note(*call: Any) -> None:
        values = call[3].values() if isinstance(call[3], dict) else call[3]
        asked.extend(getattr(value, "obj", value) for value in (call[2], *values))

    async def rows(statement: str, parameters: Any, read: Any = reads.rows) -> Any:
        values = parameters.values() if isinstance(parameters, dict) else parameters
        asked.append(statement)
        for value in values:
            asked.extend(value if isinstance(value, list) else [value])
        return await read(statement, parameters)

    monkeypatch.setattr(reads, "rows", rows)
    event.listen(engine, "before_cursor_execute", note)
    try:
        assert customer.http.get(READ).status_code == 404
        wrong = {"Authorization": "Bearer zk_wrong-but-looked-for"}
        assert customer.http.get(READ, headers=wrong).status_code == 401
    finally:
        event.remove(engine, "before_cursor_execute", note)

    for secret in (customer.key, "zk_wrong-but-looked-for"):
        assert accounts.digest(secret) in asked
        assert not any(secret in repr(value) for value in asked)


# --- Wrong keys -----------------------------------------------------------------------------------

WRONG_MAX = 3


@pytest.fixture
def strict() -> Iterator[str]:
    """The service with room for WRONG_MAX wrong keys a minute from an address, behind a proxy."""
    app = create_app()
    app.state.admission = Admission(auth_failures_per_minute=WRONG_MAX)
    with served(app) as port:
        yield f"http://127.0.0.1:{port}"


def shown(base: str, headers: dict[str, str], *, by: str = "127.0.0.1") -> list[int]:
    """What is answered to a key that is shown WRONG_MAX + 2 times on behalf of `by`."""
    headers = headers | {"X-Forwarded-For": by}
    with httpx.Client(base_url=base, headers=headers, verify=False) as http:
        return [http.get(READ).status_code for _ in range(WRONG_MAX + 2)]


def test_wrong_keys_are_answered_to_the_limit_and_no_further(strict: str) -> None:
    assert shown(strict, WRONG) == [401] * WRONG_MAX + [429] * 2


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:ffff:ffff:ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
    ],
)
def test_an_address_is_one_of_ipv4_and_a_64_of_ipv6(
    strict: str, first: str, second: str, together: bool
) -> None:
    shown(strict, WRONG, by=first)

    assert shown(strict, WRONG, by=second)[0] == (429 if together else 401)


def test_nobody_can_choose_an_address_for_himself(strict: str) -> None:
    assert shown(strict, WRONG, by="192.0.2.1")[-1] == 429

    assert shown(strict, WRONG, by="192.0.2.2, 192.0.2.1")[0] == 429  # our proxy adds at the end
    app = create_app()
    app.state.admission = Admission(auth_failures_per_minute=WRONG_MAX)
    with served(app, proxies="192.0.2.77") as port:  # and here we are none
        assert shown(f"http://127.0.0.1:{port}", WRONG, by="192.0.2.1")[-1] == 429
        assert shown(f"http://127.0.0.1:{port}", WRONG, by="192.0.2.2")[0] == 429


def test_nobody_is_locked_out_by_the_wrong_keys_of_others(
    strict: str, customer: Customer, new_customer: NewCustomer
) -> None:
    assert shown(strict, {"Authorization": f"Bearer {customer.key}"}) == [404] * (WRONG_MAX + 2)
    assert shown(strict, WRONG)[-1] == 429

    for each in (customer, new_customer()):  # one that is remembered, and one that is not
        assert set(shown(strict, {"Authorization": f"Bearer {each.key}"})) == {404}
    assert shown(strict, {}) == [401] * (WRONG_MAX + 2)  # none was shown, so none is wrong


def test_one_wrong_key_too_many_is_429_in_every_dialect(strict: str) -> None:
    shown(strict, WRONG)

    for method, path in [
        ("POST", "/api/generate"),
        ("GET", READ),
        ("POST", "/v1/images/generations"),
        ("GET", "/v1/tasks/x"),
        ("GET", "/v1/callbacks"),
        ("POST", "/api/v1/services/aigc/multimodal-generation/generation"),
        ("GET", "/api/v1/tasks/x"),
        ("POST", "/openai/v1/images/generations"),
        ("POST", "/v1/generate"),
        ("GET", "/admin/books"),
    ]:
        with case(f"{method} {path}"):
            answer = httpx.request(method, strict + path, headers=WRONG, verify=False)
            assert answer.status_code == 429
            assert 1 <= int(answer.headers["retry-after"]) <= 60


# --- Raw requests ---------------------------------------------------------------------------------


class Recorder:
    """Notes what it was asked for: method, path, and the body, None where that broke off."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str, bytes | None]] = []
        self.headers: list[tuple[bytes, bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body: bytes | None = b""
        more = True
        while more:
            message = await receive()
            more = message.get("more_body", False)
            body = body + message["body"] if "body" in message and body is not None else None
        self.headers = scope["headers"]
        self.heard.append((scope["method"], scope["path"], body))
        start = {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-length", b"0")],
        }
        await send(start)
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture(scope="module")
def recorder() -> Iterator[tuple[Recorder, int]]:
    app = Recorder()
    with served(app) as port:
        yield app, port


def exchanged(port: int, *parts: bytes) -> list[int]:
    """The statuses that are answered until the connection is closed, by the other side."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        heard = b""
        try:
            for part in parts:
                connection.sendall(part)
            while piece := connection.recv(65536):
                heard += piece
        except (ConnectionResetError, BrokenPipeError):
            pass
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", heard)]


ONE = "POST /one HTTP/1.1\r\nHost: a\r\n"
TWO = "GET /two HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
CHUNKED = "Transfer-Encoding: chunked\r\n"
NONE = "\r\n0\r\n\r\n"
"""A chunked body of no bytes, after the last header."""
GET = "GET /one HTTP/1.1\r\nHost: a\r\n"

REFUSED = {
    "a length and chunks": ONE + "Content-Length: 5\r\n" + CHUNKED + NONE + TWO,
    "chunks and a length": ONE + CHUNKED + "Content-Length: 5\r\n" + NONE + TWO,
    "two lengths": ONE + "Content-Length: 0\r\nContent-Length: 5\r\n\r\n" + TWO,
    "the same length twice": ONE + "Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello" + TWO,
    "a list of lengths": ONE + "Content-Length: 5, 5\r\n\r\nhello" + TWO,
    "a length with a sign": ONE + "Content-Length: +5\r\n\r\nhello" + TWO,
    "a negative length": ONE + "Content-Length: -5\r\n\r\nhello" + TWO,
    "a hexadecimal length": ONE + "Content-Length: 0x5\r\n\r\nhello" + TWO,
    "a length beyond all numbers": ONE + f"Content-Length: {10**23}\r\n\r\nhello" + TWO,
    "an unknown coding": ONE + "Transfer-Encoding: xchunked\r\n" + NONE + TWO,
    "a coding that changes nothing": ONE + "Transfer-Encoding: identity\r\n" + NONE + TWO,
    "a coding that is not undone": ONE + "Transfer-Encoding: gzip, chunked\r\n" + NONE + TWO,
    "chunks that are not last": ONE + "Transfer-Encoding: chunked, gzip\r\n" + NONE + TWO,
    "codings in two headers": ONE + "Transfer-Encoding: identity\r\n" + CHUNKED + NONE + TWO,
    "chunks twice": ONE + CHUNKED + CHUNKED + NONE + TWO,
    "a space before the colon": ONE + "Transfer-Encoding : chunked\r\n" + NONE + TWO,
    "a tab that is none": ONE + "Transfer-Encoding: \vchunked\r\n" + NONE + TWO,
    "a folded header": ONE + "X-A: b\r\n c\r\n\r\n" + TWO,
    "a folded coding": ONE + "Transfer-Encoding:\r\n chunked\r\n" + NONE + TWO,
    "a folded length": ONE + "Content-Length: 5\r\n 0\r\n\r\nhello" + TWO,
    "bare line feeds": (ONE + "\r\n").replace("\r\n", "\n") + TWO,
    "a bare line feed in the head": ONE + "X-A: b\nContent-Length: 5\r\n\r\n" + TWO,
    "a bare line feed at its end": ONE + "Content-Length: 0\r\n\n" + TWO,
    "a bare carriage return": ONE + "X-A: b\rContent-Length: 5\r\n\r\n" + TWO,
    "a zero byte": ONE + "X-A: b\0c\r\n\r\n" + TWO,
    "a space in a name": ONE + "X A: b\r\n\r\n" + TWO,
    "a space before the first header": "POST /one HTTP/1.1\r\n Host: a\r\n\r\n" + TWO,
    "a header without a colon": ONE + "Content-Length\r\n\r\n" + TWO,
    "no version": "GET /one\r\n\r\n" + TWO,
    "a version that is none": "GET /one HTTP/1.2\r\nHost: a\r\n\r\n" + TWO,
    "a version that needs another form": "GET /one HTTP/2.0\r\nHost: a\r\n\r\n" + TWO,
    "chunks before there were any": "POST /one HTTP/1.0\r\n" + CHUNKED + NONE + TWO,
    "two hosts": "GET /one HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" + TWO,
    "no host": "GET /one HTTP/1.1\r\n\r\n" + TWO,
    "a space in the address": "GET /one /two HTTP/1.1\r\nHost: a\r\n\r\n" + TWO,
    "another protocol, and a body": (
        ONE + "Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 5\r\n\r\nhello" + TWO
    ),
    "a tunnel": "CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n" + TWO,
    "a header too many": GET + "A: b\r\n" * HEADERS_MAX + "\r\n" + TWO,
    "a header that is too long": GET + f"A: {'b' * HEAD_BYTES_MAX}\r\n\r\n" + TWO,
    "a header that does not end": GET + f"A: {'b' * 2 * HEAD_BYTES_MAX}",
    "an address that is too long": f"GET /{'b' * HEAD_BYTES_MAX} HTTP/1.1\r\nHost: a\r\n\r\n" + TWO,
}

BROKEN_OFF = {
    "a line feed in a chunk's extension": "5;a\nhello\r\n0\r\n\r\n",
    "line feeds around chunks": "5\nhello\n0\n\n",
    "a size with a prefix": "0x5\r\nhello\r\n0\r\n\r\n",
    "a negative size": "-5\r\nhello\r\n0\r\n\r\n",
    "a space after the size": "5 \r\nhello\r\n0\r\n\r\n",
    "a chunk that is longer than it says": "5\r\nhello!\r\n0\r\n\r\n",
    "a size beyond all numbers": f"{'f' * 17}\r\nhello\r\n0\r\n\r\n",
    "a trailer too many": "0\r\n" + "A: b\r\n" * HEADERS_MAX,
}
"""Bodies in chunks that are not."""

READ_ONCE: dict[str, tuple[str, Sequence[tuple[str, str, bytes]]]] = {
    "a request in the body of another": (
        GET + f"Content-Length: {len(TWO)}\r\nConnection: close\r\n\r\n" + TWO,
        [("GET", "/one", TWO.encode())],
    ),
    "a chunk's extension": (
        ONE + CHUNKED + "Connection: close\r\n\r\n5;a=b\r\nhello\r\n0\r\n\r\n" + TWO,
        [("POST", "/one", b"hello")],
    ),
    "one after the last": (GET + "Connection: close\r\n\r\n" + TWO, [("GET", "/one", b"")]),
    "two in a row": (GET + "\r\n" + TWO, [("GET", "/one", b""), ("GET", "/two", b"")]),
    "another protocol": (
        GET + "Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + TWO,
        [("GET", "/one", b"")],
    ),
}


def test_what_can_be_read_in_two_ways_is_refused(recorder: tuple[Recorder, int]) -> None:
    app, port = recorder
    for name, request in REFUSED.items():
        with case(name):
            app.heard.clear()
            (status,) = exchanged(port, request.encode())
            assert status in (400, 431)
            assert app.heard == []


def test_a_body_that_breaks_off_is_no_body(recorder: tuple[Recorder, int]) -> None:
    app, port = recorder
    for name, body in BROKEN_OFF.items():
        with case(name):
            app.heard.clear()
            (status,) = exchanged(port, (ONE + CHUNKED + "\r\n" + body + TWO).encode())
            assert status in (400, 431)
            wait_until(lambda: bool(app.heard))
            assert app.heard == [("POST", "/one", None)]


def test_what_can_be_read_is_read_once(recorder: tuple[Recorder, int]) -> None:
    app, port = recorder
    for name, (request, heard) in READ_ONCE.items():
        with case(name):
            app.heard.clear()
            assert exchanged(port, request.encode()) == [200] * len(heard)
            assert app.heard == heard


def test_as_many_headers_as_are_allowed_are_heard(recorder: tuple[Recorder, int]) -> None:
    app, port = recorder
    head = GET + "Connection: close\r\n" + "A: b\r\n" * (HEADERS_MAX - 2)

    assert exchanged(port, f"{head}\r\n".encode()) == [200]
    assert len(app.headers) == HEADERS_MAX


def test_a_trailer_is_not_taken_for_a_header(recorder: tuple[Recorder, int]) -> None:
    """A proxy that sets X-Forwarded-For looks at headers."""
    app, port = recorder
    head = ONE + CHUNKED + "Connection: close\r\n\r\n"

    assert exchanged(port, f"{head}0\r\nX-Forwarded-For: 192.0.2.1\r\n\r\n".encode()) == [200]
    assert b"x-forwarded-for" not in dict(app.headers)


def test_what_follows_another_protocol_is_not_heard(recorder: tuple[Recorder, int]) -> None:
    app, port = recorder
    app.heard.clear()
    upgrade = (GET + "Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n").encode()

    assert exchanged(port, upgrade, TWO.encode()) == [200]
    assert app.heard == [("GET", "/one", b"")]


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until
        time.sleep(0.005)


# --- Slow and many --------------------------------------------------------------------------------


class Impatient(BoundedProtocol):
    head_timeout_s = 0.2
    body_timeout_s = 0.2


def test_a_client_that_dawdles_is_hung_up_on() -> None:
    """Whether the application listens (it waits for the body) or has answered already."""
    app = create_app()
    with served(app, Impatient) as port:
        for name, begun, dripped in [
            ("nothing", b"", b""),
            ("line ends", b"", b"\r\n"),
            ("the head", GET.encode(), b"A: b\r\n"),
            ("a body that is waited for", body_of(b"", "/v1/nothing"), b" "),
            ("a body that nobody wants any more", body_of(b"zk_wrong", "/api/generate"), b" "),
        ]:
            with case(name):
                dawdle(port, begun, dripped)


def body_of(key: bytes, path: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n"
    return head.encode() + b"Authorization: Bearer " + key + b"\r\n\r\n"


def dawdle(port: int, begun: bytes, dripped: bytes) -> None:
    """Return when the other side has hung up; meanwhile send a little, again and again."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        connection.sendall(begun)
        connection.settimeout(0.02)
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            try:
                if not connection.recv(65536):
                    return
            except TimeoutError:
                pass
            except ConnectionResetError:
                return
            try:
                connection.sendall(dripped)
            except (BrokenPipeError, ConnectionResetError):
                return
    raise AssertionError("it was held for ever")


def test_one_connection_too_many_is_told_to_come_back() -> None:
    class Small(BoundedProtocol):
        connections_max = 2

    with served(Recorder(), Small) as port, ExitStack() as stack:
        for _ in range(2):
            held = stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE_S))
            held.sendall((GET + "\r\n").encode())
            assert held.recv(100).startswith(b"HTTP/1.1 200")

        assert exchanged(port) == [503]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_is_read_to_its_limit_and_no_further(
    chunked: bool, customer: Customer, server: str
) -> None:
    def body(size: int) -> Iterator[bytes]:
        yield b" " * size

    for size, status in ((BODY_MAX_BYTES, 400), (BODY_MAX_BYTES + 1, 413)):
        content = body(size) if chunked else b" " * size
        answer = customer.http.post("/v1/images/generations", content=content)
        assert answer.status_code == status, answer.text


# --- What every answer says -----------------------------------------------------------------------


def test_every_answer_tells_browsers_what_not_to_do(
    strict: str, customer: Customer, operator: Customer
) -> None:
    with httpx.Client(base_url=strict, verify=False) as http:
        answers = {
            "a success": http.get("/health"),
            "nothing there": http.get("/nothing"),
            "no key": http.get(READ),
            "a customer's data": http.get("/v1/credits", headers=bearer(customer)),
            "an operator's": http.get("/admin/accounts", headers=bearer(operator)),
            "a wrong method": http.put("/v1/credits"),
            "the document": http.get("/openapi.json"),
        }
        pages = [http.get(path) for path in ("/docs", "/redoc")]
        script = http.get("/static-offline-docs/swagger-ui-bundle.js")

    for name, answer in answers.items():
        with case(name):
            policy = answer.headers["content-security-policy"]
            assert policy == "default-src 'none'; frame-ancestors 'none'"
            assert answer.headers["cache-control"] == "no-store"
    for answer in (*answers.values(), *pages, script):
        with case(str(answer.url)):
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
            assert "server" not in answer.headers
    for page in pages:
        policy = page.headers["content-security-policy"]
        assert page.status_code == 200
        assert "frame-ancestors 'none'" in policy
        assert "script-src 'self' 'unsafe-inline'" in policy
        for source in re.findall(r"(?:src|href)=\"([^\"]+)\"", page.text):
            assert source.startswith(("/", "data:")), source


def test_what_is_refused_by_the_socket_says_the_same(recorder: tuple[Recorder, int]) -> None:
    _, port = recorder
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        refusal = connection.makefile("rb").read().lower()

    assert b"x-content-type-options: nosniff\r\n" in refusal
    assert b"cache-control: no-store\r\n" in refusal
    assert b"\r\nserver:" not in refusal


def bearer(customer: Customer) -> dict[str, str]:
    return {"Authorization": f"Bearer {customer.key}"}
