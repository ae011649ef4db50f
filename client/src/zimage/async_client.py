"""The client for event loops: `zimage.operations`, each to be awaited."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import httpx

from zimage import files
from zimage.answers import Task
from zimage.errors import Unreachable
from zimage.operations import Operations
from zimage.steps import Close, Course, Head, Open, Pause, Read, Request, Show, Step, Steps
from zimage.wiring import Settings, head_of, signature_of, unreachable

P = ParamSpec("P")
T = TypeVar("T")


class _AsyncWire:
    """Does the steps of one operation, in the event loop that asks for it."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client
        self._response: httpx.Response | None = None
        self._chunks: AsyncIterator[bytes]

    async def perform(self, step: Step) -> object:
        match step:
            case Open(request):
                return await self._open(request)
            case Read():
                return await self._read()
            case Close():
                await self.aclose()
            case Pause(seconds):
                await asyncio.sleep(seconds)
        return None

    async def _open(self, request: Request) -> Head | Unreachable:
        await self.aclose()
        built = self._client.http.build_request(**self._client.arguments(request))
        try:
            response = await self._client.http.send(
                built, stream=True, follow_redirects=not request.with_key
            )
        except httpx.RequestError as error:
            return unreachable(error)
        self._response, self._chunks = response, response.aiter_bytes()
        return head_of(response)

    async def _read(self) -> bytes | Unreachable:
        try:
            return await anext(self._chunks, b"")
        except httpx.RequestError as error:
            return unreachable(error)

    async def aclose(self) -> None:
        if self._response is not None:
            await self._response.aclose()
            self._response = None


def _awaitable(
    operation: Callable[Concatenate[Operations, P], Steps[T]],
) -> Callable[Concatenate["AsyncClient", P], Coroutine[Any, Any, T]]:
    @functools.wraps(operation)
    async def run(client: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await client.run(operation(client.operations, *args, **kwargs))

    run.__signature__ = signature_of(operation)  # type: ignore[attr-defined]
    return run


class AsyncClient(Settings):
    """The service, for one event loop; use it in an `async with` or close it."""

    create = _awaitable(Operations.create)
    quote = _awaitable(Operations.quote)
    get = _awaitable(Operations.get)
    list = _awaitable(Operations.list_tasks)
    batch = _awaitable(Operations.batch)
    cancel = _awaitable(Operations.cancel)
    credits = _awaitable(Operations.credits)
    wait = _awaitable(Operations.wait)
    download = _awaitable(Operations.download)
    generate = _awaitable(Operations.generate)
    callbacks = _awaitable(Operations.callbacks)
    redeliver = _awaitable(Operations.redeliver)

    @functools.cached_property
    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(**self.options)

    async def events(self, task_id: str) -> AsyncIterator[Task]:
        """The task as it is now, then each change of it, until it has ended."""
        wire, course = _AsyncWire(self), Course(self.operations.events(task_id))
        try:
            while course.step is not None:
                if isinstance(course.step, Show):
                    yield course.step.task
                course.advance(await wire.perform(course.step))
        finally:
            await wire.aclose()

    async def save(self, task: Task, path: str | Path) -> Path:
        """`download` to a file, which is there whole or not at all."""
        data = await self.download(task)
        return await asyncio.to_thread(files.write_whole, Path(path), data)

    async def run(self, steps: Steps[T]) -> T:
        """Do an operation of `zimage.operations`."""
        wire, course = _AsyncWire(self), Course(steps)
        try:
            while course.step is not None:
                course.advance(await wire.perform(course.step))
        finally:
            await wire.aclose()
        return course.result

    async def aclose(self) -> None:
        await self.http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()
