"""Whom the service may call: public addresses over HTTPS, and what an operator allows beside them.

A name is resolved once and connected to by the address that was checked, so nothing can change in
between. Source of the rules: EvoLink's API manual, callback_url (HTTPS, 2048 characters, no private
address); everything refused beyond private IPv4 ranges is our choice. Any port may be called: the
receiver must prove by its certificate that it is the host of the URL.
"""

import asyncio
import ssl
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address
from urllib.parse import urlsplit

import anyio
import dns.asyncresolver
import dns.exception
import dns.nameserver
import dns.rdatatype
import dns.resolver
import httpcore

from api.bounded_stream import BoundedStream, NetworkStream
from api.callback_url import URL_MAX_CHARACTERS, Address, parse
from api.settings import settings
from storage.errors import InvalidRequest

__all__ = ["URL_MAX_CHARACTERS", "check_callback_url", "client", "is_callable", "parse", "resolve"]

RESOLVE_TIMEOUT_S = 3
NAME_SERVER_TIMEOUT_S = 1
"""Then the next one is asked."""
ADDRESSES_MAX = 64
"""A name with more of them is refused, since each must be checked."""
CONNECT_TIMEOUT_S = 3
"""Then the next address is tried."""
ANSWER_MAX_BYTES = 64 * 1024
"""What is read from one receiver, TLS and its certificates among it; an answer's body is not."""

# What Python's `is_global` lets through, in 3.11 or later. Source: IANA's registries of special-
# purpose addresses (read 2026-11), and Azure's documentation for its WireServer.
_NOT_PUBLIC_IPV4 = (
    IPv4Network("192.0.0.0/24"),  # protocol assignments; Oracle's metadata among them
    IPv4Network("192.88.99.0/24"),  # 6to4 relays, withdrawn
    IPv4Network("168.63.129.16/32"),  # what every virtual machine in Azure can reach
)
_PUBLIC_IPV6 = IPv6Network("2000::/3")
"""All that was ever given out."""
_NOT_PUBLIC_IPV6 = (
    IPv6Network("2001::/23"),  # protocol assignments: Teredo, benchmarking, ORCHID
    IPv6Network("2001:db8::/32"),  # documentation
    IPv6Network("2002::/16"),  # 6to4: leads to any IPv4 address
    IPv6Network("3fff::/20"),  # documentation
)
_NAT64 = IPv6Network("64:ff9b::/96")


class ForbiddenAddress(Exception):
    """A name leads to an address that must not be called."""


class UnknownName(Exception):
    """A name cannot be resolved, for now at least."""


def is_callable(address: Address) -> bool:
    """Whether callbacks may reach `address`."""
    if any(address in network for network in settings.callback_allowed_networks):
        return True
    if isinstance(address, IPv4Address):
        special = address.is_multicast or address.is_reserved or not address.is_global
        return not special and not any(address in network for network in _NOT_PUBLIC_IPV4)
    # Forms of IPv6 that lead to an IPv4 address are judged by that one.
    if address.ipv4_mapped is not None:
        return is_callable(address.ipv4_mapped)
    if address in _NAT64:
        return is_callable(IPv4Address(int(address) & 0xFFFFFFFF))
    return address in _PUBLIC_IPV6 and not any(address in network for network in _NOT_PUBLIC_IPV6)


async def check_callback_url(url: str) -> None:
    """Refuse at submission what could never be called.

    A name that cannot be resolved now is let through: every attempt checks again.

    Raises:
        InvalidRequest: not an HTTPS URL of at most URL_MAX_CHARACTERS, or not a public address.
    """
    receiver = parse(url)
    try:
        await resolve(receiver.host)
    except ForbiddenAddress as error:
        raise InvalidRequest(f"callback_url: {error}", param="callback_url") from None
    except UnknownName:
        return


async def resolve(host: str, *, timeout_s: float = RESOLVE_TIMEOUT_S) -> list[Address]:
    """The addresses of `host`, in the form of `parse`; all of them may be called. IPv4 first.

    Raises:
        ForbiddenAddress: one of them may not, and a name that mixes is not trusted at all; or they
            are more than ADDRESSES_MAX.
        UnknownName: the name cannot be resolved within `timeout_s`.
    """
    addresses = _known(host) or await _look_up(host, timeout_s)
    if len(addresses) > ADDRESSES_MAX:
        raise ForbiddenAddress(f"{host} has more than {ADDRESSES_MAX} addresses")
    if not all(map(is_callable, addresses)):
        raise ForbiddenAddress(f"{host} is not a public address")
    return addresses


def _known(host: str) -> list[Address]:
    """What needs no look-up: an address, and this machine (RFC 6761, 6.3)."""
    if host.rpartition(".")[2] == "localhost":
        return [ip_address("127.0.0.1")]
    try:
        return [ip_address(host)]
    except ValueError:
        return []


async def _look_up(host: str, timeout_s: float) -> list[Address]:
    """Both kinds of address at once; one that fails leaves the other."""
    try:
        resolver = _resolver()
        resolver.timeout = min(NAME_SERVER_TIMEOUT_S, timeout_s)
        answers = await asyncio.gather(
            _query(resolver, host, dns.rdatatype.A, timeout_s),
            _query(resolver, host, dns.rdatatype.AAAA, timeout_s),
        )
    except (dns.resolver.NoResolverConfiguration, OSError):
        raise UnknownName(host) from None
    addresses = list(dict.fromkeys(answers[0] + answers[1]))
    if not addresses:
        raise UnknownName(host)
    return addresses


async def _query(
    resolver: dns.asyncresolver.Resolver,
    host: str,
    kind: dns.rdatatype.RdataType,
    timeout_s: float,
) -> list[Address]:
    try:
        # The resolver's own time is the machine's clock, which may be set; ours is not.
        async with asyncio.timeout(timeout_s):
            answer = await resolver.resolve(f"{host}.", kind, lifetime=timeout_s, search=False)
    except (dns.exception.DNSException, OSError):
        return []
    return [ip_address(record.address) for record in answer]


def _resolver() -> dns.asyncresolver.Resolver:
    """The operator's name servers, or the machine's, whose file is read again each time."""
    if not settings.callback_nameservers:
        return dns.asyncresolver.Resolver()
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers = [
        dns.nameserver.Do53Nameserver(server.hostname or "", server.port or 53)
        for server in (urlsplit(f"//{text}") for text in settings.callback_nameservers)
    ]
    return resolver


class PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connects to addresses that `resolve` allows, and to nothing else."""

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        for address in await resolve(host):
            try:
                with anyio.fail_after(CONNECT_TIMEOUT_S):
                    stream = await anyio.connect_tcp(str(address), port)
            except OSError:
                continue
            return NetworkStream(BoundedStream(stream, ANSWER_MAX_BYTES))
        raise httpcore.ConnectError


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
