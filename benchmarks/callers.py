"""Customers who wait for their images, in a process of their own: plain sockets, no HTTP library.

`python -m benchmarks.callers PORT SECONDS KEY...` prints what they saw as a line of JSON: the time
of each life in milliseconds. There is one caller for each key; each submits, holds the line until
its image is there, reads the task, and begins again.
"""

import asyncio
import json
import sys
import time
from asyncio import StreamReader, StreamWriter
from typing import Any, Self

HOST = "127.0.0.1"
CREATE = "/v1/images/generations"
WAIT = "Prefer: wait=60\r\n"
SMALL = {"model": "z-image-turbo", "prompt": "a red fox in the snow", "size": "376x376"}


class Caller:
    """One connection that is kept, and one request at a time on it."""

    def __init__(self, key: str, reader: StreamReader, writer: StreamWriter) -> None:
        self._key, self._reader, self._writer = key, reader, writer

    @classmethod
    async def connect(cls, port: int, key: str) -> Self:
        return cls(key, *await asyncio.open_connection(HOST, port))

    async def create(self, *, wait: bool = False, **fields: str) -> dict[str, Any]:
        return await self._ask("POST", CREATE, WAIT if wait else "", SMALL | fields)

    async def read(self, task_id: str, *, wait: bool = False) -> dict[str, Any]:
        return await self._ask("GET", f"/v1/tasks/{task_id}", WAIT if wait else "", None)

    async def _ask(
        self, method: str, path: str, headers: str, fields: dict[str, str] | None
    ) -> dict[str, Any]:
        """Raises: SystemExit: the answer is not one of success."""
        body = b"" if fields is None else json.dumps(fields).encode()
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nAuthorization: Bearer {self._key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        )
        self._writer.write(head.encode() + body)
        answered = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        length = int(answered.partition(b"content-length:")[2].partition(b"\r\n")[0])
        answer = await self._reader.readexactly(length)
        if not answered.startswith(b"http/1.1 20"):
            raise SystemExit(f"{path}: {answer.decode()}")
        task: dict[str, Any] = json.loads(answer)
        return task


async def main(port: int, seconds: float, keys: list[str]) -> list[float]:
    """How long each life took that ended within `seconds`, in milliseconds."""
    lives_ms: list[float] = []
    until = time.monotonic() + seconds

    async def live(key: str) -> None:
        caller = await Caller.connect(port, key)
        while (began := time.monotonic()) < until:
            task = await caller.create(wait=True)
            task = await caller.read(task["id"])
            if task["status"] != "completed":
                raise SystemExit(f"A task is {task['status']}")
            if time.monotonic() < until:
                lives_ms.append((time.monotonic() - began) * 1000)

    await asyncio.gather(*map(live, keys))
    return lives_ms


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))))
