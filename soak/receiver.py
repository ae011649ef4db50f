"""A customer's HTTPS server that callbacks are sent to, which does what the URL's first part says.

ok answers at once; slow after a while; late after the service has given up waiting; fail always
with 500; flaky twice with 503 and then well; cut reads the request and hangs up; moved redirects.
While it is `gone`, nobody listens. It remembers every request that it read to its end.
"""

import asyncio
import json
import ssl
import time
from asyncio import StreamReader, StreamWriter
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from standardwebhooks import Webhook

MODES = ("ok", "slow", "fail", "flaky", "cut", "moved", "late")
SLOW_S = 2.0
LATE_S = 10.8
FLAKY_TIMES = 2
REASONS = {200: "OK", 302: "Found", 500: "Internal Server Error", 503: "Service Unavailable"}


@dataclass(frozen=True, slots=True)
class Heard:
    """One attempt as the receiver saw it."""

    message_id: str
    mode: str
    task_id: str
    status: str
    """Of the task, as the callback says it."""
    answered: int | None
    """What the receiver meant to answer; None where it hung up."""
    at_s: float = field(default_factory=time.monotonic)


class Receiver:
    """Listens at `host` and `port` with TLS. `secrets` are those that a signature may be of."""

    def __init__(self, host: str, port: int, context: ssl.SSLContext) -> None:
        self._host, self._port, self._context = host, port, context
        self._server: asyncio.Server | None = None
        self.secrets: list[str] = []
        self.heard: list[Heard] = []
        self.faults: list[str] = []
        """What no callback may be: unsigned, or not understood."""
        self._times: defaultdict[str, int] = defaultdict(int)

    def url(self, mode: str, name: str) -> str:
        return f"https://{self._host}:{self._port}/{mode}/{name}"

    async def open(self) -> None:
        self._server = await asyncio.start_server(
            self._serve, self._host, self._port, ssl=self._context
        )

    async def go(self) -> None:
        """Listen no longer."""
        if self._server is not None:
            self._server.close()
            self._server = None

    async def come_back(self) -> None:
        if self._server is None:
            await self.open()

    async def _serve(self, reader: StreamReader, writer: StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            request, *lines = head.decode().split("\r\n")
            headers = {
                name.lower(): value.strip()
                for name, _, value in (line.partition(":") for line in lines if line)
            }
            body = await reader.readexactly(int(headers["content-length"]))
            status = await self._answer(request.split()[1], headers, body)
            if status is not None:
                writer.write(
                    f"HTTP/1.1 {status} {REASONS[status]}\r\nLocation: https://127.0.0.1/\r\n"
                    "Content-Length: 0\r\nConnection: close\r\n\r\n".encode()
                )
                await writer.drain()
        writer.close()

    async def _answer(self, path: str, headers: dict[str, str], body: bytes) -> int | None:
        told = self._understood(path, headers, body)
        mode = path.split("/")[1]
        message_id = headers.get("webhook-id", "")
        self._times[message_id] += 1
        status: int | None = 200
        match mode:
            case "slow":
                await asyncio.sleep(SLOW_S)
            case "late":
                await asyncio.sleep(LATE_S)
            case "fail":
                status = 500
            case "moved":
                status = 302
            case "cut":
                status = None
            case "flaky" if self._times[message_id] <= FLAKY_TIMES:
                status = 503
        if told:
            self.heard.append(
                Heard(message_id, mode, str(told["id"]), evolink_status(told), status)
            )
        return status

    def _understood(self, path: str, headers: dict[str, str], body: bytes) -> dict[str, Any]:
        for secret in self.secrets:
            with suppress(Exception):
                Webhook(secret).verify(body, headers)
                told: dict[str, Any] = json.loads(body)
                return told
        self.faults.append(f"a callback to {path} has no good signature")
        return {}


def evolink_status(task: Any) -> str:
    """EvoLink has no status for what was cancelled, but a code."""
    code = (task.get("error") or {}).get("code")
    return "cancelled" if code == "request_cancelled" else str(task["status"])
