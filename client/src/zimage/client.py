"""The client for threads: `zimage.operations`, each done before it returns."""

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

import httpx

from zimage import files
from zimage.answers import Task
from zimage.errors import Unreachable
from zimage.operations import Operations
from zimage.steps import Close, Course, Head, Open, Pause, Read, Request, Show, Step, Steps
from zimage.wiring import Settings, head_of, signature_of, unreachable

P = ParamSpec("P")
T = TypeVar("T")


class _Wire:
    """Does the steps of one operation, in the thread that asks for it."""

    def __init__(self, client: "Client") -> None:
        self._client = client
        self._response: httpx.Response | None = None
        self._chunks: Iterator[bytes] = iter(())

    def perform(self, step: Step) -> object:
        match step:
            case Open(request):
                return self._open(request)
            case Read():
                return self._read()
            case Close():
                self.close()
            case Pause(seconds):
                time.sleep(seconds)
        return None

    def _open(self, request: Request) -> Head | Unreachable:
        self.close()
        built = self._client.http.build_request(**self._client.arguments(request))
        try:
            response = self._client.http.send(
                built, stream=True, follow_redirects=not request.with_key
            )
        except httpx.RequestError as error:
            return unreachable(error)
        self._response, self._chunks = response, response.iter_bytes()
        return head_of(response)

    def _read(self) -> bytes | Unreachable:
        try:
            return next(self._chunks, b"")
        except httpx.RequestError as error:
            return unreachable(error)

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def _blocking(
    operation: Callable[Concatenate[Operations, P], Steps[T]],
) -> Callable[Concatenate["Client", P], T]:
    @functools.wraps(operation)
    def run(client: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return client.run(operation(client.operations, *args, **kwargs))

    run.__signature__ = signature_of(operation)  # type: ignore[attr-defined]
    return run


class Client(Settings):
    """The service, for a thread or many; use it in a `with` or close it."""

    create = _blocking(Operations.create)
    quote = _blocking(Operations.quote)
    get = _blocking(Operations.get)
    list = _blocking(Operations.list_tasks)
    batch = _blocking(Operations.batch)
    cancel = _blocking(Operations.cancel)
    credits = _blocking(Operations.credits)
    wait = _blocking(Operations.wait)
    download = _blocking(Operations.download)
    generate = _blocking(Operations.generate)
    callbacks = _blocking(Operations.callbacks)
    redeliver = _blocking(Operations.redeliver)

    @functools.cached_property
    def http(self) -> httpx.Client:
        return httpx.Client(**self.options)

    def events(self, task_id: str) -> Iterator[Task]:
        """The task as it is now, then each change of it, until it has ended."""
        wire, course = _Wire(self), Course(self.operations.events(task_id))
        try:
            while course.step is not None:
                if isinstance(course.step, Show):
                    yield course.step.task
                course.advance(wire.perform(course.step))
        finally:
            wire.close()

    def save(self, task: Task, path: str | Path) -> Path:
        """`download` to a file, which is there whole or not at all."""
        return files.write_whole(Path(path), self.download(task))

    def run(self, steps: Steps[T]) -> T:
        """Do an operation of `zimage.operations`."""
        wire, course = _Wire(self), Course(steps)
        try:
            while course.step is not None:
                course.advance(wire.perform(course.step))
        finally:
            wire.close()
        return course.result

    def close(self) -> None:
        self.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
