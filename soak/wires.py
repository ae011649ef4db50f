"""Wires between the service and its servers, which can be cut, slowed and made to lie.

The service believes that a wire is its server. PostgreSQL's can be cut in the middle of a commit,
before it reached the server or after it was done, so that nobody knows whether it happened. The
image store's can refuse, crawl, break half-way, or answer as an overloaded or broken store does.
"""

import asyncio
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

CHUNK_BYTES = 64 * 1024
COMMIT = b"COMMIT\x00"
"""How a commit ends in PostgreSQL's simple query message, as psycopg sends it."""
CRAWL_S = 1.0
"""How long each chunk takes on a wire that crawls."""

Cut = Literal["before", "after"]
StoreFault = Literal["refuse", "crawl", "break_upload", "break_answer", "overloaded", "broken"]

ANSWERS: dict[StoreFault, tuple[str, str]] = {
    "overloaded": ("503 Slow Down", "SlowDown"),
    "broken": ("500 Internal Server Error", "InternalError"),
}

Look = Callable[[bytes], Awaitable[bytes | None]]
"""What becomes of a chunk on its way; None cuts the wire."""


class Wire:
    """Passes bytes on in both directions; subclasses look at them on the way."""

    def __init__(self) -> None:
        self._connections: dict[StreamWriter, StreamWriter] = {}

    async def dial(self) -> tuple[StreamReader, StreamWriter]:
        """The server's end. Raises: OSError."""
        raise NotImplementedError

    def looks(self, to_client: StreamWriter) -> tuple[Look, Look]:
        """What looks at the requests and at the answers of a new connection."""
        raise NotImplementedError

    def cut_all(self) -> None:
        """End every connection at once."""
        for ends in list(self._connections.items()):
            for end in ends:
                end.transport.abort()

    async def serve(self, client: StreamReader, to_client: StreamWriter) -> None:
        """One connection of a client, until either side ends it."""
        try:
            server, to_server = await self.dial()
        except OSError:
            to_client.transport.abort()
            return
        self._connections[to_client] = to_server
        on_request, on_answer = self.looks(to_client)
        ways = {
            asyncio.create_task(_pass(client, to_server, on_request)),
            asyncio.create_task(_pass(server, to_client, on_answer)),
        }
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            del self._connections[to_client]
            to_server.transport.abort()
            # What was said to the client still has to reach it.
            to_client.close()


async def _pass(reader: StreamReader, writer: StreamWriter, look: Look) -> None:
    with suppress(OSError):
        while chunk := await reader.read(CHUNK_BYTES):
            passed = await look(chunk)
            if passed is None:
                writer.transport.abort()
                return
            writer.write(passed)
            await writer.drain()


class PostgresWire(Wire):
    """Can cut the next commits that come by, whoever's they are."""

    def __init__(self, server: Path) -> None:
        super().__init__()
        self.server = server
        self._armed: list[Cut] = []
        self.commits_cut = 0

    async def open(self, path: Path) -> None:
        """Listen on the Unix socket `path`."""
        await asyncio.start_unix_server(self.serve, path)

    async def dial(self) -> tuple[StreamReader, StreamWriter]:
        return await asyncio.open_unix_connection(self.server)

    def cut_next_commit(self, when: Cut) -> None:
        self._armed.append(when)

    def looks(self, to_client: StreamWriter) -> tuple[Look, Look]:
        swallowing = False

        async def on_request(chunk: bytes) -> bytes | None:
            nonlocal swallowing
            if self._armed and COMMIT in chunk:
                self.commits_cut += 1
                if self._armed.pop(0) == "before":
                    to_client.transport.abort()
                    return None
                swallowing = True
            return chunk

        async def on_answer(chunk: bytes) -> bytes | None:
            # The server has committed; its answer never arrives.
            return None if swallowing else chunk

        return on_request, on_answer


class StoreWire(Wire):
    """An image store that has one fault at a time, or none."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port
        self._listener: asyncio.Server | None = None
        self._at = ("127.0.0.1", 0)
        self.fault: StoreFault | None = None

    async def open(self, port: int) -> None:
        """Listen on `port` of the loopback address."""
        self._at = ("127.0.0.1", port)
        self._listener = await asyncio.start_server(self.serve, *self._at)

    async def have(self, fault: StoreFault | None) -> None:
        """Have this fault from now on, and no other."""
        if fault == "refuse" and self._listener is not None:
            self._listener.close()
            self._listener = None
            self.cut_all()
        elif fault != "refuse" and self._listener is None:
            await self.open(self._at[1])
        self.fault = fault

    async def dial(self) -> tuple[StreamReader, StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._port)

    def looks(self, to_client: StreamWriter) -> tuple[Look, Look]:
        async def on_request(chunk: bytes) -> bytes | None:
            if self.fault == "crawl":
                await asyncio.sleep(CRAWL_S)
            if self.fault == "break_upload" and len(chunk) > 1:
                to_client.transport.abort()
                return None
            if self.fault in ANSWERS:
                to_client.write(_error(*ANSWERS[self.fault]))
                await to_client.drain()
                to_client.close()
                return None
            return chunk

        async def on_answer(chunk: bytes) -> bytes | None:
            # The store has done it; whoever asked does not learn of it.
            return None if self.fault == "break_answer" else chunk

        return on_request, on_answer


def _error(status: str, code: str) -> bytes:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code></Error>'
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    ).encode()
