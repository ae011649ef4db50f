"""A real TCP server that does whatever a test says to whoever connects."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Behaviour = Callable[[socket.socket], None]


class HostileServer:
    """Where it listens, and what it saw."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.connections = 0
        self.finished = threading.Event()
        """Set when the other side has closed a connection that was kept open to the end."""


@contextmanager
def listening(
    host: str, behave: Behaviour, *, port: int = 0, tls: ssl.SSLContext | None = None
) -> Iterator[HostileServer]:
    """Serve until the end; `behave` gets the connection, after the request where it is in TLS."""
    listener = socket.create_server((host, port), family=_family(host))
    server = HostileServer(host, listener.getsockname()[1])
    threads: list[threading.Thread] = []

    def serve(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(10)
            try:
                if tls is not None:
                    connection = tls.wrap_socket(connection, server_side=True)
                    _read_request(connection)
                behave(connection)
                while connection.recv(65536):
                    pass
            except OSError:
                pass
            finally:
                connection.close()
        server.finished.set()

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            server.connections += 1
            threads.append(threading.Thread(target=serve, args=(connection,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield server
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in (accepting, *threads):
            thread.join()


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _read_request(connection: socket.socket) -> None:
    """All of it: a connection that is closed with something unread is reset."""
    with connection.makefile("rb") as request:
        length = 0
        while (line := request.readline()).strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        request.read(length)
