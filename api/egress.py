"""Whom the service may call: public addresses over HTTPS, and what an operator allows beside them.

A name is resolved once and connected to by the address that was checked, so nothing can change in
between. Source of the rules: EvoLink's API manual, callback_url (HTTPS, 2048 characters, no private
address); everything refused beyond private IPv4 ranges is our choice.
"""

import socket
import ssl
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import httpcore
import httpx

from api.settings import settings
from storage.errors import InvalidRequest

URL_MAX_CHARACTERS = 2048
PORT_MAX = 65535
RESOLVE_TIMEOUT_S = 3
RESOLVERS = anyio.CapacityLimiter(64)
"""Look-ups at a time; slow name servers of some customers must not stop those of others."""

_NAT64 = IPv6Network("64:ff9b::/96")
_NAT64_LOCAL = IPv6Network("64:ff9b:1::/48")

Address = IPv4Address | IPv6Address


class ForbiddenAddress(Exception):
    """A name leads to an address that must not be called."""


def is_callable(address: Address) -> bool:
    """Whether callbacks may reach `address`."""
    if any(address in network for network in settings.callback_allowed_networks):
        return True
    if isinstance(address, IPv6Address):
        # Forms of IPv6 that carry an IPv4 address are judged by that one.
        if address.ipv4_mapped is not None:
            return is_callable(address.ipv4_mapped)
        if address in _NAT64:
            return is_callable(IPv4Address(int(address) & 0xFFFFFFFF))
        if address.sixtofour is not None or address.teredo is not None or address in _NAT64_LOCAL:
            return False
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


async def check_callback_url(url: str) -> None:
    """Refuse at submission what could never be called.

    A name that cannot be resolved now is let through: every attempt checks again.

    Raises:
        InvalidRequest: not an HTTPS URL of at most URL_MAX_CHARACTERS, or not a public address.
    """
    host, port = parse(url)
    try:
        with anyio.fail_after(RESOLVE_TIMEOUT_S):
            await resolve(host, port)
    except ForbiddenAddress as error:
        raise InvalidRequest(f"callback_url: {error}", param="callback_url") from None
    except (OSError, TimeoutError):
        return


def parse(url: str) -> tuple[str, int]:
    """Host and port of a callback URL. Raises: InvalidRequest."""
    fault = None
    host, port = "", 443
    try:
        parts = httpx.URL(url)
        host, port = parts.raw_host.decode("ascii"), parts.port or 443
        if len(url) > URL_MAX_CHARACTERS:
            fault = f"must have at most {URL_MAX_CHARACTERS} characters"
        elif parts.scheme != "https":
            fault = "must begin with https://"
        elif parts.userinfo or "@" in urlsplit(url).netloc:
            fault = "must not carry a user name or password"
        elif not host:
            fault = "must name a host"
        elif not 0 < port <= PORT_MAX:
            fault = f"must have a port of at most {PORT_MAX}"
    except (httpx.InvalidURL, ValueError):
        fault = "is not a URL"
    if fault is not None:
        raise InvalidRequest(f"callback_url: {fault}", param="callback_url")
    return host, port


async def resolve(host: str, port: int) -> list[Address]:
    """The addresses of `host`, all of which may be called.

    Raises:
        ForbiddenAddress: one of them may not; a name that mixes is not trusted at all.
        OSError: the name cannot be resolved.
    """
    found = await anyio.to_thread.run_sync(
        lambda: socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM),
        limiter=RESOLVERS,
        abandon_on_cancel=True,
    )
    addresses = [ip_address(str(info[4][0]).partition("%")[0]) for info in found]
    if not addresses or not all(map(is_callable, addresses)):
        raise ForbiddenAddress(f"{host} is not a public address")
    return addresses


class PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connects to addresses that `resolve` allows, and to nothing else."""

    def __init__(self) -> None:
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception = httpcore.ConnectError("no address")
        for address in dict.fromkeys(await resolve(host, port)):
            try:
                return await self._network.connect_tcp(
                    str(address), port, timeout, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure


def client() -> httpcore.AsyncConnectionPool:
    """A client for callbacks: public network only, no redirects, no proxies, no kept connections.

    Connections are not kept, so that every attempt resolves and checks anew.
    """
    trust = ssl.create_default_context()
    if settings.callback_ca_file is not None:
        trust.load_verify_locations(settings.callback_ca_file)
    return httpcore.AsyncConnectionPool(
        ssl_context=trust,
        network_backend=PublicNetwork(),
        max_connections=None,
        max_keepalive_connections=0,
    )
