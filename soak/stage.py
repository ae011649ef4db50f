"""The whole service as real processes on its embedded servers, each of which can be struck.

Whatever ends is started again after a moment, as every supervisor does. The service reaches
PostgreSQL and the image store by way of `soak.wires`; whoever checks goes to the servers directly.
"""

import asyncio
import os
import secrets
import shutil
import ssl
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trustme

from deploy import reach, servers
from deploy.servers import Server
from soak.children import Nursery, ServerChild, ServiceChild
from soak.receiver import Receiver
from soak.wires import PostgresWire, StoreWire

DISK_MB = 256
"""Of the image store, where this system lets us mount one of its own."""
RECEIVER_HOST = "127.0.0.2"
POSTGRES_SOCKET = ".s.PGSQL.5432"


@dataclass(frozen=True, slots=True)
class Cast:
    """How many processes of each kind there are."""

    apis: int = 3
    couriers: int = 2
    workers: int = 4


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where whoever checks finds the servers themselves."""

    database: str
    """libpq's form of it."""
    s3_endpoint: str
    s3_access_key_id: str
    s3_secret_access_key: str
    bucket: str


class Stage:
    """Servers, wires, receiver and processes in `folder`.

    `painter` is what a worker's process runs: a module, and what it imports late. `without` names
    the guard that the processes run without; see `soak.without`.
    """

    def __init__(
        self, folder: Path, cast: Cast, painter: Sequence[str], without: str | None
    ) -> None:
        self._folder = folder
        self._without = without
        worker, *self._imports = painter
        self.postgres = ServerChild(servers.postgres(folder / "postgres"), folder)
        self.valkey = ServerChild(servers.valkey(folder / "valkey", reach.free_port()), folder)
        self.store = ServerChild(servers.s3(folder / "s3", reach.free_port()), folder)
        self._own_disk = _can_mount()
        if self._own_disk:
            self.store.argv = _on_a_disk_of_its_own(self.store.argv, self._objects())
        self._store_endpoint = self.store.server.settings["ZIMAGE_S3_ENDPOINT_URL"]
        self._sockets = _sockets(self.postgres.server)
        self.postgres_wire = PostgresWire(self._sockets / POSTGRES_SOCKET)
        self.store_wire = StoreWire(int(self._store_endpoint.rpartition(":")[2]))
        self._store_wire_port = reach.free_port()
        self.receiver = self._receiver()
        self._nursery = Nursery()
        self._ports = [reach.free_port() for _ in range(cast.apis)]
        self.apis = [
            self._child(f"api-{number}", "api", "serve", ZIMAGE_PORT=str(port))
            for number, port in enumerate(self._ports)
        ]
        self.couriers = [self._child(f"courier-{n}", "api.courier") for n in range(cast.couriers)]
        self.workers = [self._child(f"worker-{n}", worker) for n in range(cast.workers)]

    @property
    def bases(self) -> list[str]:
        """Where the API processes answer."""
        return [f"http://127.0.0.1:{port}" for port in self._ports]

    @property
    def addresses(self) -> Addresses:
        store = self.store.server.settings
        return Addresses(
            database=f"host={self._sockets} port=5432 user=postgres dbname=zimage",
            s3_endpoint=self._store_endpoint,
            s3_access_key_id=store["ZIMAGE_S3_ACCESS_KEY_ID"],
            s3_secret_access_key=store["ZIMAGE_S3_SECRET_ACCESS_KEY"],
            bucket="zimage",
        )

    async def rise(self) -> None:
        """Start all of it. Raises: CannotStart."""
        for server in (self.postgres, self.valkey, self.store):
            await server.start()
            await server.ready()
        (self._folder / "wire").mkdir(mode=0o700)
        await self.postgres_wire.open(self._folder / "wire" / POSTGRES_SOCKET)
        await self.store_wire.open(self._store_wire_port)
        await self.receiver.open()
        await self._nursery.open(self._environment(), self._imports, self._without)
        await self.command("api", "prepare")
        for child in (*self.apis, *self.couriers, *self.workers):
            await child.start()

    async def command(self, *module: str) -> None:
        """Run `python -m module` to its end."""
        once = self._child("command", *module)
        once.pid = await once._start()
        await once._ended.wait()

    async def admin_key(self) -> str:
        """The key of a new operator."""
        path = self._folder / "credentials.env"
        await self.command("api", "demo-credentials", str(path))
        written = dict(line.split("=", 1) for line in path.read_text().split())
        return written["ZIMAGE_ADMIN_KEY"]

    async def fall(self) -> None:
        """Stop all of it, the service before its servers."""
        await asyncio.gather(*(c.end() for c in (*self.apis, *self.couriers, *self.workers)))
        await self._nursery.close()
        await asyncio.gather(
            *(c.end(c.server.stop_signal) for c in (self.postgres, self.valkey, self.store))
        )

    # --- What can be done to servers beside signals ---------------------------------------------

    async def forget_jobs(self) -> None:
        """Kill Valkey and take away what it had written down: it comes back empty."""
        await self.valkey.kill()
        shutil.rmtree(self._folder / "valkey" / "appendonlydir", ignore_errors=True)

    async def fill_disk(self) -> None:
        """Leave no room on the image store's disk, where it has one of its own."""
        if self._own_disk:
            await asyncio.to_thread(_fill, self._ballast())

    def empty_disk(self) -> None:
        self._ballast().unlink(missing_ok=True)

    def _objects(self) -> Path:
        return (self._folder / "s3" / "objects").absolute()

    def _ballast(self) -> Path:
        """Seen as the store's own process sees its disk."""
        return Path(f"/proc/{self.store.pid}/root{self._objects()}/ballast")

    # --- How it is put together -----------------------------------------------------------------

    def _child(self, name: str, *module: str, **env: str) -> ServiceChild:
        return ServiceChild(name, self._nursery, self._folder, *module, **env)

    def _receiver(self) -> Receiver:
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(self._folder / "ca.pem"))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(RECEIVER_HOST).configure_cert(context)
        return Receiver(RECEIVER_HOST, reach.free_port(), context)

    def _environment(self) -> dict[str, str]:
        wire = (self._folder / "wire").absolute()
        inherited = {
            name: value
            for name, value in servers.inherited_environment().items()
            if not name.startswith("ZIMAGE_")
        }
        for child in (self.postgres, self.valkey, self.store):
            inherited |= child.server.settings
        return inherited | {
            "ZIMAGE_DATABASE_URL": f"postgresql+psycopg://postgres@/zimage?host={wire}&port=5432",
            "ZIMAGE_S3_ENDPOINT_URL": f"http://127.0.0.1:{self._store_wire_port}",
            "ZIMAGE_S3_BUCKET": "zimage",
            "ZIMAGE_CALLBACK_ALLOWED_NETWORKS": f'["{RECEIVER_HOST}/32"]',
            "ZIMAGE_CALLBACK_CA_FILE": str(self._folder / "ca.pem"),
            "ZIMAGE_LEASE_S": "3",
            "ZIMAGE_STORE_TIMEOUT_S": "5",
            "ZIMAGE_SECRET_KEYS": secrets.token_hex(32),
            "ZIMAGE_READS_PER_SECOND": "1000",
            "OMP_WAIT_POLICY": "passive",
        }


def _sockets(postgres: Server) -> Path:
    """The folder of PostgreSQL's socket, from its URL."""
    url = postgres.settings["ZIMAGE_DATABASE_URL"]
    return Path(url.partition("host=")[2].partition("&")[0])


def _can_mount() -> bool:
    """Whether this system lets us give a process a disk of its own."""
    if shutil.which("unshare") is None:
        return False
    tried = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],  # noqa: S607
        capture_output=True,
        check=False,
    )
    return tried.returncode == 0


def _on_a_disk_of_its_own(argv: Sequence[str], folder: Path) -> list[str]:
    mount = f'mount -t tmpfs -o size={DISK_MB}m tmpfs "$0" && exec "$@"'
    return ["unshare", "-rm", "sh", "-c", mount, str(folder), *argv]


def _fill(ballast: Path) -> None:
    with suppress(OSError), ballast.open("wb") as file:
        for pages in (256, 1):  # the last free page as well
            with suppress(OSError):
                while True:
                    os.write(file.fileno(), b"\0" * 4096 * pages)
