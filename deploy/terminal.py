"""What the person in front of `make up` sees: our own lines, and the app's log as it grows."""

import os
import sys
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path


def say(line: str) -> None:
    """Print a line, or nothing once the terminal has gone: that is no reason to fail."""
    try:
        print(line, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Follower:
    """Shows what is written to log files from now on, each line behind the name of its file."""

    def __init__(self, logs: Mapping[str, Path]) -> None:
        self._width = max(map(len, logs))
        self._tails = {name: _Tail(path) for name, path in logs.items()}

    def show(self) -> None:
        for name, tail in self._tails.items():
            for line in tail.lines():
                say(f"{name:<{self._width}} | {line}")

    def close(self) -> None:
        for tail in self._tails.values():
            tail.close()


class _Tail:
    """New lines of a file that is renamed and begun anew when it is full."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rest = b""
        self._file: BufferedReader | None = None
        if path.exists():
            self._file = path.open("rb")
            self._file.seek(0, os.SEEK_END)

    def lines(self) -> Iterator[str]:
        yield from self._written()
        try:
            if self._file and os.fstat(self._file.fileno()).st_ino == self._path.stat().st_ino:
                return
            begun = self._path.open("rb")
        except FileNotFoundError:
            return
        yield from self._written()  # what was added to the old one before it was renamed
        self.close()
        self._file = begun
        yield from self._written()

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _written(self) -> Iterator[str]:
        if self._file:
            *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
