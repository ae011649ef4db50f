"""What a callback URL says, read once: whoever checks and whoever connects use the same reading.

Two readers of one URL can disagree on its host; that is how checks are passed by. So the host that
`parse` returns is in one plain form, and nothing else is ever looked up, connected to, asked for in
TLS or sent as `Host`. What has no such form is refused: user names, numbers that some programs take
for IPv4 addresses, zones, control characters, backslashes.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import quote

import httpcore
import idna

from storage.errors import InvalidRequest

URL_MAX_CHARACTERS = 2048
"""Source: EvoLink's API manual, callback_url."""
HOST_MAX_CHARACTERS = 253
PORT_MAX = 65535
HTTPS_PORT = 443

Address = IPv4Address | IPv6Address

_URL = re.compile(r"https://(?P<authority>[^/?#]*)(?P<rest>[^#]*)(?:#.*)?", re.IGNORECASE)
_AUTHORITY = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]*)(?::(?P<port>[0-9]{0,5}))?")
_UNSAFE = re.compile(r"[\x00-\x20\x7f-\xa0\\]")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_AS_IT_IS = "!#$%&'()*+,/:;=?@[]~"
"""What stays in a path or query beside letters and digits; the rest is percent-encoded."""


class _Fault(ValueError):
    """What is wrong with a URL, in words for the customer."""


@dataclass(frozen=True, slots=True)
class Receiver:
    """Where a callback goes. `host` is an ASCII name in lower case, or an address, unbracketed."""

    host: str
    port: int
    target: str
    """Path and query, in printable ASCII."""

    @property
    def address(self) -> Address | None:
        """The host, if it is an address."""
        try:
            return ip_address(self.host)
        except ValueError:
            return None

    @property
    def authority(self) -> str:
        """As in the header `Host`."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == HTTPS_PORT else f"{host}:{self.port}"

    @property
    def url(self) -> httpcore.URL:
        return httpcore.URL(scheme="https", host=self.host, port=self.port, target=self.target)


def parse(url: str) -> Receiver:
    """Read a callback URL. Raises: InvalidRequest, which says what is wrong with it."""
    try:
        return _read(url)
    except _Fault as fault:
        raise InvalidRequest(f"callback_url: {fault}", param="callback_url") from None


def _read(url: str) -> Receiver:
    if len(url) > URL_MAX_CHARACTERS:
        raise _Fault(f"must have at most {URL_MAX_CHARACTERS} characters")
    if _UNSAFE.search(url):
        raise _Fault("must not contain spaces, control characters or backslashes")
    parts = _URL.fullmatch(url)
    if parts is None:
        raise _Fault("must begin with https://")
    if "@" in parts["authority"]:
        raise _Fault("must not carry a user name or password")
    authority = _AUTHORITY.fullmatch(parts["authority"])
    if authority is None:
        raise _Fault("is not a URL")
    port = int(authority["port"] or HTTPS_PORT)
    if not 0 < port <= PORT_MAX:
        raise _Fault(f"must have a port from 1 to {PORT_MAX}")
    rest = parts["rest"]
    try:
        target = quote(rest if rest.startswith("/") else f"/{rest}", safe=_AS_IT_IS)
    except UnicodeEncodeError:  # half of a surrogate pair
        raise _Fault("is not a URL") from None
    return Receiver(_host(authority["host"]), port, target)


def _host(text: str) -> str:
    if not text:
        raise _Fault("must name a host")
    if text.startswith("["):
        return _ipv6(text[1:-1])
    try:
        # As browsers read it: full-width digits, circled letters and other dots become plain ones,
        # and what is plain then is judged.
        host = text.lower() if text.isascii() else idna.encode(text, uts46=True).decode("ascii")
    except UnicodeError:
        raise _Fault("is not a host name that can be looked up") from None
    host = host.removesuffix(".")
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        return _ipv4(host)
    if len(host) > HOST_MAX_CHARACTERS or not all(map(_LABEL.fullmatch, labels)):
        raise _Fault("is not a host name that can be looked up")
    return host


def _ipv4(text: str) -> str:
    """Four decimal numbers; 127.1, 0177.0.0.1, 0x7f000001 and 2130706433 are others' forms."""
    try:
        return str(IPv4Address(text))
    except ValueError:
        raise _Fault("must write an IPv4 address as four decimal numbers") from None


def _ipv6(text: str) -> str:
    try:
        address = IPv6Address(text)
    except ValueError:
        raise _Fault("is not an IPv6 address") from None
    if address.scope_id is not None:
        raise _Fault("must not name a zone of this machine")
    return str(address)
