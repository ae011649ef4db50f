"""Server-sent events from bytes, in whatever pieces they arrive.

Source: the HTML standard, section 9.2 "Server-sent events".
"""

from collections.abc import Iterator
from dataclasses import dataclass

from zimage.errors import ServiceUnavailable

EVENT_MAX_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    data: bytes


class EventStream:
    """Remembers what of an event has come so far."""

    def __init__(self) -> None:
        self._rest = b""
        self._name = ""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that `chunk` completes. Raises: ServiceUnavailable, if one has no end."""
        self._rest += chunk
        if len(self._rest) + sum(map(len, self._data)) > EVENT_MAX_BYTES:
            raise ServiceUnavailable(f"An event is longer than {EVENT_MAX_BYTES} bytes")
        # A CR at the end may be the first half of a CR LF.
        held = b"\r" if self._rest.endswith(b"\r") else b""
        text = self._rest.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *lines, rest = text.split(b"\n")
        self._rest = rest + held
        for line in lines:
            event = self._take(line)
            if event is not None:
                yield event

    def _take(self, line: bytes) -> Event | None:
        if not line:
            event = Event(self._name or "message", b"\n".join(self._data)) if self._data else None
            self._name, self._data = "", []
            return event
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"event":
            self._name = value.decode(errors="replace")
        elif name == b"data":
            self._data.append(value)
        return None  # a comment has no name; ids and retry times are not needed here
