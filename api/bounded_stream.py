"""A connection to somebody who is not trusted: it hands over so many bytes and then fails.

The bytes are counted on the wire, those of TLS among them. httpcore bounds the head of an answer,
but not how many interim answers come before it.
"""

import ssl
from collections.abc import Callable, Mapping
from typing import Any

import anyio
import anyio.abc
import httpcore
from anyio.streams.tls import TLSAttribute, TLSStream


class AnswerTooLong(Exception):
    """More bytes came than may."""


class BoundedStream(anyio.abc.ByteStream):
    """`stream`, of which at most `bytes_max` can be received."""

    def __init__(self, stream: anyio.abc.ByteStream, bytes_max: int) -> None:
        self._stream = stream
        self._left = bytes_max

    async def receive(self, max_bytes: int = 65536) -> bytes:
        if self._left == 0:
            raise AnswerTooLong
        received = await self._stream.receive(min(max_bytes, self._left))
        self._left -= len(received)
        return received

    async def send(self, item: bytes) -> None:
        await self._stream.send(item)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return self._stream.extra_attributes


class NetworkStream(httpcore.AsyncNetworkStream):
    """`stream` as httpcore wants it. Timeouts are the caller's, of the whole exchange."""

    def __init__(self, stream: anyio.abc.ByteStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        try:
            return await self._stream.receive(max_bytes)
        except anyio.EndOfStream:
            return b""
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise httpcore.ReadError from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        try:
            await self._stream.send(buffer)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise httpcore.WriteError from error

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface
    ) -> httpcore.AsyncNetworkStream:
        """Raises: SSLError, with the reason; httpcore's own would hide it."""
        try:
            stream = await TLSStream.wrap(
                self._stream,
                ssl_context=ssl_context,
                hostname=server_hostname,
                standard_compatible=False,
            )
        except (anyio.BrokenResourceError, anyio.EndOfStream) as error:
            await anyio.aclose_forcefully(self._stream)
            raise httpcore.ConnectError from error
        except BaseException:
            # A handshake that is given up leaves nothing behind: httpcore does not know of it yet.
            await anyio.aclose_forcefully(self._stream)
            raise
        return NetworkStream(stream)

    def get_extra_info(self, info: str) -> Any:
        if info == "ssl_object":
            return self._stream.extra(TLSAttribute.ssl_object, None)  # noqa: S610 - AnyIO's
        return None
