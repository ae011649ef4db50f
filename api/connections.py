"""How much, how slowly and how ambiguously a connection may speak before anything of ours listens.

uvicorn bounds neither the head of a request nor the time that it or the body takes, so that one
client with many connections, each a byte a second, would keep out all others. And it reads some
requests otherwise than a proxy before us may have, so that the end of one is the beginning of
another's (request smuggling, RFC 9112 section 11.2): those are refused here.
"""

import asyncio
from collections import defaultdict
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from api import security_headers
from api.settings import settings

HEAD_TIMEOUT_S = 20
"""From the connection, or from the first byte of a further request, to the end of the head."""
BODY_TIMEOUT_S = 60
"""From the end of the head to the end of the body: the longest body at 7 kB/s."""
HEAD_BYTES_MAX = 32 * 1024
"""Of the address and all headers, trailers included."""
HEADERS_MAX = 100
RETRY_S = 5

REASONS = {400: "Bad Request", 431: "Request Header Fields Too Large", 503: "Service Unavailable"}


class HeadTooLarge(Exception):
    """The head of a request is larger than HEAD_BYTES_MAX, or has more than HEADERS_MAX headers."""


class Ambiguous(Exception):
    """Where this request ends, or whom it is for, can be read in more than one way."""


class Corked:
    """A transport that sends together what is written in one turn of the loop: uvicorn writes the
    head and the body of an answer one by one, and each costs a system call and a packet."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._held: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self._send)
        self._held.append(data)

    def close(self) -> None:
        self._send()
        self._transport.close()

    def _send(self) -> None:
        if self._held:
            held, self._held = self._held, []
            self._transport.write(b"".join(held))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds: what breaks one is told so, if it can be, and hung up on."""

    head_timeout_s: float = HEAD_TIMEOUT_S
    body_timeout_s: float = BODY_TIMEOUT_S
    connections_max: int = settings.connections_max

    _deadline: float | None = None
    """When it is hung up, by the clock of the loop."""
    _timer: asyncio.TimerHandle | None = None
    _in_head = True
    _head_bytes = 0
    _unparsed_bytes = 0
    """Of a head that has not ended: a name or value is not counted before it has."""
    _fields = 0
    _deaf = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Corked(transport, self.loop))  # type: ignore[arg-type]
        if len(self.connections) > self.connections_max:
            self._refuse(503)
        else:
            self._hang_up_in(self.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf or self.transport.is_closing():
            return
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._hang_up_in(self.head_timeout_s)  # line ends before a request begin none
        was_in_head = self._in_head
        super().data_received(data)
        if was_in_head and self._in_head:
            self._unparsed_bytes += len(data)
            if self._unparsed_bytes > HEAD_BYTES_MAX:
                self._refuse(431)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = self._unparsed_bytes = self._fields = 0
        self._hang_up_in(self.head_timeout_s)

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1
        self._count(len(name) + len(value))
        # A trailer would be taken for a header that no proxy has looked at. None means anything.
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._ambiguous():
            raise Ambiguous
        self._hang_up_in(self.body_timeout_s)
        super().on_headers_complete()
        if self.parser.should_upgrade():
            # The parser leaves off here; it would take what follows for another request.
            self._deaf = True
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        self._stop_clock()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(431 if self._too_large() else 400)

    def _ambiguous(self) -> bool:
        """What llhttp lets pass, which refuses the rest: `tests/test_doors.py` has them all."""
        version = self.parser.get_http_version()
        fields: dict[bytes, list[bytes]] = defaultdict(list)
        for name, value in self.headers:
            fields[name].append(value.lower())
        codings = fields[b"transfer-encoding"]
        has_body = bool(codings) or fields[b"content-length"] not in ([], [b"0"])
        return (
            version not in ("1.0", "1.1")
            or codings not in ([], [b"chunked"])
            or (version == "1.0" and bool(codings))
            or len(fields[b"host"]) > 1
            or (version == "1.1" and not fields[b"host"])
            or (self.parser.should_upgrade() and has_body)
        )

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._too_large():
            raise HeadTooLarge

    def _too_large(self) -> bool:
        return self._head_bytes > HEAD_BYTES_MAX or self._fields > HEADERS_MAX

    def _refuse(self, status: int) -> None:
        """Hang up, with a word where it cannot be taken for the answer to an earlier request."""
        cycle = self.cycle
        if (
            cycle is None
            or cycle.response_complete
            or (self._alone() and not cycle.response_started)
        ):
            headers = {
                **security_headers.ALWAYS,
                **security_headers.DATA,
                "Content-Length": "0",
                "Connection": "close",
            }
            if status == 503:
                headers["Retry-After"] = str(RETRY_S)
            lines = [f"HTTP/1.1 {status} {REASONS[status]}", *map(": ".join, headers.items())]
            self.transport.write("\r\n".join((*lines, "", "")).encode())
        self._stop_clock()
        self.transport.close()

    def _alone(self) -> bool:
        """Whether the request whose body is being read is the only one that has no answer."""
        return self.cycle.more_body and not self.pipeline

    def _hang_up_in(self, seconds: float) -> None:
        """Set the deadline. The timer is left to ring before it, and then set anew: a timer for
        each head and each body would cost more than to parse them."""
        self._deadline = self.loop.time() + seconds
        if self._timer is not None and self._timer.when() > self._deadline:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self.loop.call_at(self._deadline, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if self.loop.time() < self._deadline:
            self._timer = self.loop.call_at(self._deadline, self._ring)
        else:
            self.transport.abort()

    def _stop_clock(self) -> None:
        self._deadline = None
