"""Addresses on this machine, and whether a database, a Redis or an S3 server answers at one."""

import socket
from typing import Any
from urllib.parse import urlsplit

import psycopg

from deploy.errors import CannotStart

TIMEOUT_S = 5
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  compared with, not bound


def check_postgres(url: str) -> None:
    """Raises CannotStart: no database answers at `url`, which is SQLAlchemy's form of it."""
    try:
        connect_postgres(url.replace("postgresql+psycopg:", "postgresql:", 1)).close()
    except psycopg.Error as error:
        raise CannotStart(f"The database cannot be reached: {first_line(error)}") from error


def check_redis(url: str) -> None:
    """Raises CannotStart: no Redis answers at `url`."""
    import redis  # takes a while to load, in which its server can start

    try:
        with redis.Redis.from_url(
            url, socket_connect_timeout=TIMEOUT_S, socket_timeout=TIMEOUT_S
        ) as client:
            client.ping()
    except (redis.RedisError, OSError, ValueError) as error:
        raise CannotStart(f"Redis cannot be reached: {first_line(error)}") from error


def check_s3(endpoint: str) -> None:
    """Raises CannotStart: nobody listens at `endpoint`; whether the keys fit is seen on use."""
    parts = urlsplit(endpoint)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    try:
        socket.create_connection((parts.hostname or "", port), TIMEOUT_S).close()
    except OSError as error:
        raise CannotStart(f"The S3 server at {endpoint} cannot be reached: {error}") from error


def check_free(host: str, port: int, setting: str) -> None:
    """Raises CannotStart: a program of ours could not listen at `port`, which `setting` names."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except socket.gaierror as error:
        raise CannotStart(f"ZIMAGE_HOST is not an address: {host}") from error
    except OSError as error:
        raise CannotStart(
            f"Cannot listen on {host} port {port} ({error.strerror}); "
            f"stop what uses it or choose another with {setting}"
        ) from error


def connect_postgres(url: str = "", **parameters: Any) -> psycopg.Connection:
    return psycopg.connect(url, autocommit=True, connect_timeout=TIMEOUT_S, **parameters)


def free_port() -> int:
    """A port of loopback that nobody had a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def connectable(host: str) -> str:
    """Where to connect to what listens at `host`: a wildcard is not an address to go to."""
    return WILDCARDS.get(host, host)


def is_wildcard(host: str) -> bool:
    return host in WILDCARDS


def http_address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
