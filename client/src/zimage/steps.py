"""What has to happen on the wire, said and not done: the library's logic needs no I/O.

An operation is a generator of steps. Whoever runs it does each step, in a thread or in an event
loop, and sends back how it went; a connection that fails is thrown into it as `Unreachable`.
"""

import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from zimage.answers import Task
from zimage.errors import InvalidRequest, Unreachable


@dataclass(frozen=True, slots=True)
class Request:
    """`url` is absolute, or a path under the base URL; `body` becomes JSON if it is not None.

    Only a request `with_key` shows the key; only others follow redirects.
    """

    method: str
    url: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    with_key: bool = True
    read_timeout_s: float | None = None
    """Longest silence of the service; None: the client's own."""

    def content(self) -> bytes | None:
        """The body in UTF-8, all letters as they are. Raises: InvalidRequest."""
        if self.body is None:
            return None
        try:
            return json.dumps(self.body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InvalidRequest("The request holds text that is not valid Unicode") from None


@dataclass(frozen=True, slots=True)
class Open:
    """Send a request and read the head of its answer. Gives: Head."""

    request: Request


@dataclass(frozen=True, slots=True)
class Read:
    """Read what comes next of the opened answer. Gives: bytes, none at its end."""


@dataclass(frozen=True, slots=True)
class Close:
    """Have done with the opened answer, read or not."""


@dataclass(frozen=True, slots=True)
class Pause:
    seconds: float


@dataclass(frozen=True, slots=True)
class Show:
    """Tell whoever is watching how the task stands."""

    task: Task


Step = Open | Read | Close | Pause | Show

T = TypeVar("T")
Steps = Generator[Step, Any, T]
"""An operation that ends with a `T`."""


@dataclass(frozen=True, slots=True)
class Head:
    """`headers` have lower-case names."""

    status: int
    headers: Mapping[str, str]


class Course(Generic[T]):
    """An operation under way: `step` is what to do next, None at the end, and then `result`."""

    result: T

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps
        self.step: Step | None = None
        self.advance(None)

    def advance(self, outcome: object) -> None:
        """Go on after the step was done; `outcome` is what it gave, or the Unreachable it met."""
        try:
            if isinstance(outcome, Unreachable):
                self.step = self._steps.throw(outcome)
            else:
                self.step = self._steps.send(outcome)
        except StopIteration as end:
            self.step, self.result = None, end.value
