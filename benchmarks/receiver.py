"""Customers' HTTPS servers in a process of their own: they answer callbacks at once, or never.

All are one server at many names under `localhost`, which need no look-up; each connection is a new
one all the same, since the courier keeps none.
"""

import asyncio
import json
import os
import ssl
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import trustme

HOST = "127.0.0.1"
DOMAIN = "bench.localhost"
ANSWER = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Receiver:
    port: int
    _heard: Connection

    def url(self, number: int, *, hangs: bool = False) -> str:
        """Of the receiver with this number."""
        return f"https://r{number}.{DOMAIN}:{self.port}/{'hangs' if hangs else 'answers'}"

    def hear(self, timeout_s: float) -> tuple[str, float]:
        """The next callback that was answered: its task's id, and when all of it was there by the
        machine's monotonic clock. Raises: SystemExit, there is none within `timeout_s`."""
        if not self._heard.poll(timeout_s):
            raise SystemExit("A callback does not come")
        told: tuple[str, float] = self._heard.recv()
        return told


@contextmanager
def running(folder: Path) -> Iterator[Receiver]:
    """Receivers whom every courier that is started in this block may call, and trusts."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    certificate = folder / "receiver.pem"
    authority.issue_cert(f"*.{DOMAIN}").private_key_and_cert_chain_pem.write_to_path(
        str(certificate)
    )
    os.environ.update(
        ZIMAGE_CALLBACK_ALLOWED_NETWORKS=f'["{HOST}/32"]',
        ZIMAGE_CALLBACK_CA_FILE=str(folder / "ca.pem"),
    )
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_serve, args=(certificate, theirs), daemon=True)
    child.start()
    try:
        yield Receiver(ours.recv(), ours)
    finally:
        child.terminate()
        child.join()


def _serve(certificate: Path, told: Connection) -> None:
    asyncio.run(_serve_for_ever(certificate, told))


async def _serve_for_ever(certificate: Path, told: Connection) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    server = await asyncio.start_server(partial(_answer, told), HOST, 0, ssl=context, backlog=4096)
    told.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def _answer(told: Connection, reader: StreamReader, writer: StreamWriter) -> None:
    with suppress(OSError, asyncio.IncompleteReadError):
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        if head.startswith(b"post /hangs"):
            await reader.read()  # until the courier has had enough
        else:
            heard_at = time.monotonic()
            writer.write(ANSWER)
            await writer.drain()
            told.send((json.loads(body)["id"], heard_at))
    writer.close()
