"""The service as real processes on servers of its own, which can be killed, paused and cut off."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from deploy import orphans, reach, servers
from deploy.servers import Server

ROOT = Path(__file__).parent.parent


class Outage:
    """A real server that can be away in several ways, and comes back at the same address."""

    def __init__(self, server: Server, log: Path) -> None:
        self.server = server
        self._log = log
        self._start()

    def kill(self, by: signal.Signals = signal.SIGKILL) -> None:
        """From now on it refuses."""
        self._child.send_signal(by)
        self._child.wait()

    def restart(self) -> None:
        self._start()
        self.wait()

    def wait(self) -> None:
        servers.wait_until_ready(self.server, self._log, lambda: self._child.poll() is None)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In this block it takes connections and is silent, with all of its processes."""
        stopped = [self._child.pid, *_children(self._child.pid)]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in stopped:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def stop(self) -> None:
        self.kill(self.server.stop_signal)

    def _start(self) -> None:
        account = pwd.getpwnam(self.server.user) if self.server.user else None
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                self.server.argv,
                env=servers.inherited_environment() | dict(self.server.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=account.pw_uid if account else None,
                group=account.pw_gid if account else None,
                extra_groups=[] if account else None,
            )


def _children(pid: int) -> list[int]:
    """PostgreSQL's, each of which is in a session of its own."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Wire:
    """A TCP address that leads to a server; `gate` sees what goes there, and may cut it off."""

    def __init__(self, to: tuple[str, int] | str) -> None:
        self._to = to
        self.gate: Callable[[bytes], bytes] | None = None
        """Looks at what a client sends. Raises LookupError to let it pass; or returns what is
        answered in place of the server, before the line is cut."""
        self.delivers_before_cutting = False
        """Whether the server hears also what it must not answer."""
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            family = socket.AF_UNIX if isinstance(self._to, str) else socket.AF_INET
            with socket.socket(family, socket.SOCK_STREAM) as server:
                server.connect(self._to)
                back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                back.start()
                while data := client.recv(65536):
                    if self.gate is not None:
                        with suppress(LookupError):
                            answer = self.gate(data)
                            client.sendall(answer)
                            client.shutdown(socket.SHUT_RDWR)
                            if self.delivers_before_cutting:
                                server.sendall(data)
                                back.join(1)
                            return
                    server.sendall(data)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


class Service:
    """The three servers, and API, worker and courier that reach them."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self._stack = ExitStack()
        started = [
            servers.postgres(folder / "postgres"),  # which keeps what it committed when killed
            servers.valkey(folder / "valkey", reach.free_port()),
            servers.s3(folder / "s3", reach.free_port()),
        ]
        self.folder = folder
        self.postgres, self.valkey, self.s3 = (
            Outage(server, folder / f"{server.name}.log") for server in started
        )
        for each in (self.postgres, self.valkey, self.s3):
            self._stack.callback(each.stop)
        pids = [each._child.pid for each in (self.postgres, self.valkey, self.s3)]
        self._stack.enter_context(orphans.signalled_after_us(*pids, by=signal.SIGINT))
        for each in (self.postgres, self.valkey, self.s3):
            each.wait()
        known = {k: v for server in started for k, v in server.settings.items()}
        sockets = known["ZIMAGE_DATABASE_URL"].partition("host=")[2].partition("&")[0]
        self.database_wire = Wire(f"{sockets}/.s.PGSQL.5432")
        store = urlsplit(known["ZIMAGE_S3_ENDPOINT_URL"])
        self.store_wire = Wire((str(store.hostname), int(store.port or 0)))
        self.port = reach.free_port()
        database = f"127.0.0.1:{self.database_wire.port}"
        self.env = known | {
            "ZIMAGE_DATABASE_URL": f"postgresql+psycopg://postgres@{database}/zimage",
            "ZIMAGE_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.store_wire.port}",
            "ZIMAGE_PORT": str(self.port),
            **settings,
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, program: str) -> str:
        """What a Python program prints that has the settings of the service."""
        argv = [sys.executable, "-c", program]
        return subprocess.check_output(argv, env=os.environ | self.env, cwd=ROOT, text=True)

    def start(self, name: str, *module: str, **env: str) -> None:
        child = subprocess.Popen(
            [sys.executable, "-m", *module], env=os.environ | self.env | env, cwd=ROOT
        )
        self.processes[name] = child
        self._stack.callback(child.wait)
        self._stack.callback(child.kill)

    def alive(self) -> Mapping[str, bool]:
        return {name: child.poll() is None for name, child in self.processes.items()}

    def empty_valkey(self) -> None:
        for path in (self.folder / "valkey").glob("appendonlydir"):
            shutil.rmtree(path)

    def close(self) -> None:
        self._stack.close()
        self.database_wire.close()
        self.store_wire.close()


def remove_bucket() -> None:
    """Take the image store's bucket away, which must be empty: nobody but a test asks for that."""
    import boto3

    from storage.settings import settings

    secret = settings.s3_secret_access_key
    boto3.client(
        "s3",
        endpoint_url=str(settings.s3_endpoint_url),
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key_id,
        aws_secret_access_key=None if secret is None else secret.get_secret_value(),
    ).delete_bucket(Bucket=settings.s3_bucket)
