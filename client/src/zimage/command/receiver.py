"""A small server that says of each callback whether its signature holds."""

import json
import ssl
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from zimage.signatures import InvalidSignature, read_secret, verify_callback

BODY_MAX_BYTES = 1024 * 1024
SILENCE_MAX_S = 10.0
"""A sender that says nothing for longer is hung up on."""


class Receiver(ThreadingHTTPServer):
    """Answers 204 to a callback whose signature holds and 400 to any other, and prints a line."""

    def __init__(self, address: tuple[str, int], secret: str) -> None:
        super().__init__(address, _Handler)
        self.secret = secret
        self.seen: set[str] = set()


class _Handler(BaseHTTPRequestHandler):
    server: Receiver
    timeout = SILENCE_MAX_S

    def do_POST(self) -> None:
        length = self.headers.get("content-length", "")
        if not length.isdigit() or int(length) > BODY_MAX_BYTES:
            return self._end(400, f"refused: no length, or more than {BODY_MAX_BYTES} bytes")
        body = self.rfile.read(int(length))
        headers = dict(self.headers.items())
        try:
            message_id = verify_callback(self.server.secret, headers, body)
        except InvalidSignature as error:
            return self._end(400, f"refused: {error.message}")
        again = "again " if message_id in self.server.seen else ""
        self.server.seen.add(message_id)
        return self._end(204, f"ok {again}{message_id} {_told(body)}")

    def _end(self, status: int, line: str) -> None:
        # What a stranger sent must not move the cursor of this terminal.
        print("".join(c if c.isprintable() else "?" for c in line), flush=True)
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """One line for each delivery is enough."""


def receive(host: str, port: int, secret: str, cert: str | None, key: str | None) -> None:
    """Serve until Ctrl-C; HTTPS with the PEM files `cert` and `key`.

    Raises: InvalidSignature, if `secret` is none; OSError.
    """
    read_secret(secret)
    with Receiver((host, port), secret) as server:
        if cert is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(cert, key)
            # Each handshake in its own thread: a silent stranger stops nobody else.
            server.socket = context.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        scheme = "http" if cert is None else "https"
        print(f"listening at {scheme}://{host}:{server.server_port}/", flush=True)
        server.serve_forever()


def _told(body: bytes) -> str:
    try:
        task = json.loads(body)
        return f"{task['id']} {task['status']}"
    except (ValueError, LookupError, TypeError):
        return "(not a task)"
