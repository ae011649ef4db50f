"""Whatever URL a customer names, nobody inside is called, and nobody outside holds the courier."""

from __future__ import annotations

import asyncio
import functools
import gzip
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_network
from typing import TYPE_CHECKING

import httpcore
import httpx
import pytest
import trustme
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from api import callbacks, egress
from api.callback_url import URL_MAX_CHARACTERS, parse
from api.courier import Courier
from api.settings import settings
from storage import deliveries
from storage.database import transaction
from storage.errors import InvalidRequest
from storage.models import Delivery, DeliveryState
from tests import conftest
from tests.conftest import RECEIVER_HOST, assert_untouched, case, names
from tests.hostile_server import Behaviour, HostileServer, listening
from tests.test_callbacks import Receiver, couriers, delivery_of, receiving, wait_until

if TYPE_CHECKING:
    from storage.deliveries import Attempt
    from tests.conftest import Customer
    from tests.test_callbacks import Submit

INSIDE = "127.0.0.1"
"""Where nobody may be called: what a private network is in production."""
PUBLIC = "93.184.216.34"


@pytest.fixture(autouse=True)
def _zone() -> Iterator[None]:
    names.zone.update(
        {
            "good.example": [RECEIVER_HOST],
            "alias.example": ["other.example.", "good.example.", RECEIVER_HOST],
            "xn--bcher-kva.example": [RECEIVER_HOST],
            "private.example": ["10.0.0.1"],
            "private-v6.example": ["fd00::1"],
            "mixed.example": [PUBLIC, "192.168.1.1"],
            "mixed-kinds.example": [PUBLIC, "::1"],
            "mapped.example": ["::ffff:10.0.0.1"],
            "nat64.example": ["64:ff9b::a00:1"],
            "6to4.example": ["2002:a00:1::1"],
            "metadata.example": ["169.254.169.254"],
            "unspecified.example": ["0.0.0.0"],
            "alias-inside.example": ["inside.example.", "127.0.0.1"],
            "thousand.example": [f"93.184.{n // 250}.{n % 250}" for n in range(1000)],
        }
    )
    yield
    names.zone.clear()
    names.asked.clear()


# --- Refused at submission ------------------------------------------------------------------------

NOT_PUBLIC = "is not a public address"
FOUR_NUMBERS = "four decimal numbers"
NO_NAME = "is not a host name that can be looked up"
UNSAFE = "spaces, control characters or backslashes"
USER = "user name or password"

REFUSED: dict[str, tuple[str, str]] = {
    # Private and special IPv4
    "10/8": ("https://10.0.0.1/", NOT_PUBLIC),
    "172.16/12, its first": ("https://172.16.0.0/", NOT_PUBLIC),
    "172.16/12, its last": ("https://172.31.255.255/", NOT_PUBLIC),
    "192.168/16": ("https://192.168.1.1/", NOT_PUBLIC),
    "loopback": ("https://127.0.0.1/", NOT_PUBLIC),
    "loopback beside the allowed": ("https://127.0.0.3/", NOT_PUBLIC),
    "the last of loopback": ("https://127.255.255.254/", NOT_PUBLIC),
    "loopback on another port": ("https://127.0.0.1:5432/", NOT_PUBLIC),
    "link-local": ("https://169.254.0.1/", NOT_PUBLIC),
    "carrier-grade NAT, its first": ("https://100.64.0.0/", NOT_PUBLIC),
    "carrier-grade NAT, its last": ("https://100.127.255.255/", NOT_PUBLIC),
    "multicast": ("https://224.0.0.1/", NOT_PUBLIC),
    "multicast, its last": ("https://239.255.255.255/", NOT_PUBLIC),
    "unspecified": ("https://0.0.0.0/", NOT_PUBLIC),
    "this network": ("https://0.1.2.3/", NOT_PUBLIC),
    "broadcast": ("https://255.255.255.255/", NOT_PUBLIC),
    "reserved": ("https://240.0.0.1/", NOT_PUBLIC),
    "documentation 1": ("https://192.0.2.1/", NOT_PUBLIC),
    "documentation 2": ("https://198.51.100.1/", NOT_PUBLIC),
    "documentation 3": ("https://203.0.113.1/", NOT_PUBLIC),
    "benchmarking": ("https://198.18.0.1/", NOT_PUBLIC),
    "benchmarking, its last": ("https://198.19.255.255/", NOT_PUBLIC),
    "protocol assignments": ("https://192.0.0.8/", NOT_PUBLIC),
    "6to4 relays": ("https://192.88.99.1/", NOT_PUBLIC),
    # Metadata of clouds
    "metadata of AWS, GCP, Azure": ("https://169.254.169.254/latest/meta-data/", NOT_PUBLIC),
    "metadata of ECS": ("https://169.254.170.2/v2/credentials", NOT_PUBLIC),
    "metadata of Alibaba": ("https://100.100.100.200/", NOT_PUBLIC),
    "metadata of Oracle": ("https://192.0.0.192/", NOT_PUBLIC),
    "WireServer of Azure": ("https://168.63.129.16/", NOT_PUBLIC),
    "metadata of AWS in IPv6": ("https://[fd00:ec2::254]/", NOT_PUBLIC),
    "metadata of GCP in IPv6": ("https://[fd20:ce::254]/", NOT_PUBLIC),
    # Special IPv6
    "::1": ("https://[::1]/", NOT_PUBLIC),
    "::1, written out": ("https://[0000:0000:0000:0000:0000:0000:0000:0001]/", NOT_PUBLIC),
    "::": ("https://[::]/", NOT_PUBLIC),
    "unique local fc00": ("https://[fc00::1]/", NOT_PUBLIC),
    "unique local fd00": ("https://[fdff:ffff::1]/", NOT_PUBLIC),
    "link-local IPv6": ("https://[fe80::1]/", NOT_PUBLIC),
    "link-local with a zone": ("https://[fe80::1%25eth0]/", "zone"),
    "link-local with a bare zone": ("https://[fe80::1%eth0]/", "zone"),
    "loopback with a zone": ("https://[::1%25lo]/", "zone"),
    "site-local": ("https://[fec0::1]/", NOT_PUBLIC),
    "multicast IPv6": ("https://[ff02::1]/", NOT_PUBLIC),
    "multicast IPv6, global": ("https://[ff0e::1]/", NOT_PUBLIC),
    "documentation IPv6": ("https://[2001:db8::1]/", NOT_PUBLIC),
    "documentation IPv6, new": ("https://[3fff::1]/", NOT_PUBLIC),
    "benchmarking IPv6": ("https://[2001:2::1]/", NOT_PUBLIC),
    "ORCHID": ("https://[2001:20::1]/", NOT_PUBLIC),
    "discard": ("https://[100::1]/", NOT_PUBLIC),
    "segment routing": ("https://[5f00::1]/", NOT_PUBLIC),
    "never given out": ("https://[4000::1]/", NOT_PUBLIC),
    # IPv4 in IPv6
    "mapped": ("https://[::ffff:10.0.0.1]/", NOT_PUBLIC),
    "mapped, in hexadecimal": ("https://[::ffff:7f00:1]/", NOT_PUBLIC),
    "mapped metadata": ("https://[::ffff:169.254.169.254]/", NOT_PUBLIC),
    "compatible": ("https://[::127.0.0.1]/", NOT_PUBLIC),
    "compatible, public": (f"https://[::{PUBLIC}]/", NOT_PUBLIC),
    "translated": ("https://[::ffff:0:127.0.0.1]/", NOT_PUBLIC),
    "NAT64": ("https://[64:ff9b::10.0.0.1]/", NOT_PUBLIC),
    "NAT64 to loopback": ("https://[64:ff9b::7f00:1]/", NOT_PUBLIC),
    "NAT64, local": (f"https://[64:ff9b:1::{PUBLIC}]/", NOT_PUBLIC),
    "6to4": ("https://[2002:a00:1::1]/", NOT_PUBLIC),
    "6to4 of a public address": ("https://[2002:5db8:d822::1]/", NOT_PUBLIC),
    "Teredo": ("https://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/", NOT_PUBLIC),
    # Other forms of IPv4
    "decimal": ("https://2130706433/", FOUR_NUMBERS),
    "decimal, over 32 bits": ("https://4294967297/", FOUR_NUMBERS),
    "hexadecimal": ("https://0x7f000001/", FOUR_NUMBERS),
    "hexadecimal parts": ("https://0x7f.0x0.0x0.0x1/", FOUR_NUMBERS),
    "hexadecimal, short": ("https://0x7f.1/", FOUR_NUMBERS),
    "hexadecimal in capitals": ("https://0X7F.1/", FOUR_NUMBERS),
    "octal": ("https://0177.0.0.1/", FOUR_NUMBERS),
    "octal at the end": ("https://127.0.0.01/", FOUR_NUMBERS),
    "octal number": ("https://017700000001/", FOUR_NUMBERS),
    "short, of two": ("https://127.1/", FOUR_NUMBERS),
    "short, of three": ("https://127.0.1/", FOUR_NUMBERS),
    "zero": ("https://0/", FOUR_NUMBERS),
    "a part too large": ("https://127.0.0.256/", FOUR_NUMBERS),
    "five parts": ("https://1.127.0.0.1/", FOUR_NUMBERS),
    "an empty hexadecimal": ("https://127.0.0.0x/", FOUR_NUMBERS),
    # Trailing dots, empty labels
    "loopback with a dot": ("https://127.0.0.1./", NOT_PUBLIC),
    "a number with a dot": ("https://2130706433./", FOUR_NUMBERS),
    "localhost with a dot": ("https://localhost./", NOT_PUBLIC),
    "two dots at the end": ("https://good.example../", NO_NAME),
    "two dots inside": ("https://a..b/", NO_NAME),
    "a dot alone": ("https://./", NO_NAME),
    # Names of this machine
    "localhost": ("https://localhost/", NOT_PUBLIC),
    "localhost in capitals": ("https://LOCALHOST/", NOT_PUBLIC),
    "a name under localhost": ("https://public.localhost/", NOT_PUBLIC),
    # Look-alikes
    "full-width digits": ("https://１２７.０.０.１/", NOT_PUBLIC),
    "circled digits": ("https://①②⑦.⓪.⓪.①/", NOT_PUBLIC),
    "full-width number": ("https://２１３０７０６４３３/", FOUR_NUMBERS),
    "ideographic dots": ("https://127。0。0。1/", NOT_PUBLIC),
    "circled letters": ("https://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/", NOT_PUBLIC),
    "mathematical letters": ("https://𝐥𝐨𝐜𝐚𝐥𝐡𝐨𝐬𝐭/", NOT_PUBLIC),
    "a soft hyphen": ("https://local\u00adhost/", NOT_PUBLIC),
    "a zero-width space": ("https://local\u200bhost/", NOT_PUBLIC),
    "text that runs to the left": ("https://\u202e1.0.0.721/", NO_NAME),
    "a full-width slash": ("https://good.example／.private.example/", NO_NAME),
    "a full-width colon": ("https://127.0.0.1：443/", NO_NAME),
    "a full-width at": ("https://good.example＠127.0.0.1/", NO_NAME),
    "percent-encoded": ("https://%31%32%37.0.0.1/", FOUR_NUMBERS),
    "a percent-encoded dot": ("https://127%2e0%2e0%2e1/", NO_NAME),
    "a percent-encoded NUL": ("https://good.example%00.private.example/", NO_NAME),
    # Who is who
    "a user": ("https://good.example@127.0.0.1/", USER),
    "a user and a password": (f"https://user:secret@{PUBLIC}/", USER),
    "an empty user": (f"https://@{PUBLIC}/", USER),
    "two users": (f"https://a@b@{PUBLIC}/", USER),
    "a backslash": (f"https://{PUBLIC}\\@127.0.0.1/", UNSAFE),
    "a backslash before the path": (f"https://127.0.0.1\\.{PUBLIC}/", UNSAFE),
    "a tab": ("https://127.0.0\t.1/", UNSAFE),
    "a line's end in the host": (f"https://{PUBLIC}\r\nHost: inside/", UNSAFE),
    "a line's end in the path": (f"https://{PUBLIC}/ HTTP/1.1\r\nHost: inside", UNSAFE),
    "NUL": (f"https://{PUBLIC}\0.private.example/", UNSAFE),
    "a space before": (" https://127.0.0.1/", UNSAFE),
    "a space in the host": ("https://exa mple.com/", UNSAFE),
    "two ports": (f"https://{PUBLIC}:443:80/", "is not a URL"),
    "text after brackets": ("https://[::1].good.example/", "is not a URL"),
    "text before brackets": ("https://good.example[::1]/", "is not a URL"),
    "an open bracket": ("https://[::1/", "is not a URL"),
    "brackets in brackets": ("https://[[::1]]/", "is not a URL"),
    "an address of the future": ("https://[v1.fe80]/", "is not an IPv6 address"),
    "empty brackets": ("https://[]/", "is not an IPv6 address"),
    "IPv4 in brackets": ("https://[127.0.0.1]/", "is not an IPv6 address"),
    # Ports
    "port 0": (f"https://{PUBLIC}:0/", "port from 1"),
    "port 65536": (f"https://{PUBLIC}:65536/", "port from 1"),
    "port 443 and 2 to the 16th": (f"https://{PUBLIC}:65979/", "port from 1"),
    "a port of six digits": (f"https://{PUBLIC}:000443/", "is not a URL"),
    "a negative port": (f"https://{PUBLIC}:-1/", "is not a URL"),
    "a port in full-width digits": (f"https://{PUBLIC}:４４３/", "is not a URL"),
    "a port by name": (f"https://{PUBLIC}:https/", "is not a URL"),
    # Schemes and forms
    "http": (f"http://{PUBLIC}/", "https://"),
    "file": ("file:///etc/passwd", "https://"),
    "gopher": ("gopher://127.0.0.1:6379/_FLUSHALL", "https://"),
    "ftp": (f"ftp://{PUBLIC}/", "https://"),
    "a script": ("javascript:alert(1)", "https://"),
    "data": ("data:text/plain,x", "https://"),
    "a nested scheme": (f"url:https://{PUBLIC}/", "https://"),
    "no slashes": (f"https:{PUBLIC}/", "https://"),
    "one slash": (f"https:/{PUBLIC}/", "https://"),
    "no scheme": (f"//{PUBLIC}/", "https://"),
    "empty": ("", "https://"),
    "no host": ("https://", "must name a host"),
    "a path alone": ("https:///told", "must name a host"),
    "a port alone": ("https://:443/", "must name a host"),
    # Lengths
    "a long URL": (f"https://{PUBLIC}/".ljust(URL_MAX_CHARACTERS + 1, "x"), "at most"),
    "a long label": (f"https://{'a' * 64}.example/", NO_NAME),
    "a long name": (f"https://{'a.' * 130}example/", NO_NAME),
    "a long IDN label": (f"https://{'ü' * 64}.example/", NO_NAME),
    # Names whose addresses must not be called
    "a name of a private address": ("https://private.example/", NOT_PUBLIC),
    "a name of a private IPv6 address": ("https://private-v6.example/", NOT_PUBLIC),
    "a name of a public and a private address": ("https://mixed.example/", NOT_PUBLIC),
    "a name of public IPv4 and private IPv6": ("https://mixed-kinds.example/", NOT_PUBLIC),
    "a name of a mapped address": ("https://mapped.example/", NOT_PUBLIC),
    "a name of a NAT64 address": ("https://nat64.example/", NOT_PUBLIC),
    "a name of a 6to4 address": ("https://6to4.example/", NOT_PUBLIC),
    "a name of the metadata": ("https://metadata.example/", NOT_PUBLIC),
    "a name of no address": ("https://unspecified.example/", NOT_PUBLIC),
    "an alias of a name inside": ("https://alias-inside.example/", NOT_PUBLIC),
    "a thousand addresses": ("https://thousand.example/", "more than 64 addresses"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_at_submission(name: str) -> None:
    url, fault = REFUSED[name]

    with pytest.raises(InvalidRequest, match="callback_url: ") as refused:
        asyncio.run(egress.check_callback_url(url))
    assert fault in str(refused.value)


def test_the_customer_is_told_what_is_wrong_and_nothing_is_reserved(customer: Customer) -> None:
    for name, (url, fault) in REFUSED.items():
        with case(name):
            body = {"model": "z-image-turbo", "prompt": "a cat", "callback_url": url}
            answer = customer.http.post("/v1/images/generations", json=body)

            assert answer.status_code == 400
            error = answer.json()["error"]
            assert (error["code"], error["param"]) == ("invalid_request", "callback_url")
            assert fault in error["message"]
    assert_untouched(customer)


# --- Contained at delivery ------------------------------------------------------------------------

TIMEOUT_S = 2
OK = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture(scope="module")
def attempts() -> list[Attempt]:
    """The one that `attempt` makes for all tests: to try it takes no database."""
    return []


@pytest.fixture
def attempt(attempts: list[Attempt], request: pytest.FixtureRequest) -> Attempt:
    """A callback that is due."""
    if attempts:
        return attempts[0]
    customer: Customer = request.getfixturevalue("customer")
    submit: Submit = request.getfixturevalue("submit")
    task = submit(customer, callback_url="https://good.example/told")
    customer.http.post(f"/v1/tasks/{task.id}/cancel")
    with transaction() as session:
        attempts += deliveries.claim_due(session, limit=1, except_accounts=[])
    return attempts[0]


@functools.cache
def client() -> httpcore.AsyncConnectionPool:
    """The courier's, which keeps no connection; to read the system's certificates takes time."""
    return egress.client()


def tell(attempt: Attempt, url: str) -> callbacks.Outcome:
    """Try it once, to `url`, as the courier does."""
    outcome = asyncio.run(callbacks.deliver(client(), to(attempt, url)))
    assert_says_nothing_of_the_inside(outcome)
    return outcome


def to(attempt: Attempt, url: str) -> Attempt:
    return replace(attempt, delivery=Delivery(id=attempt.delivery.id, url=url))


def assert_says_nothing_of_the_inside(outcome: callbacks.Outcome) -> None:
    for inside in ("127.0.0.1", "10.0.0.1", "Errno", names.address, "SSH"):
        assert inside not in (outcome.error or "")


def certificate(authority: trustme.CA, *subjects: str, expired: bool = False) -> ssl.SSLContext:
    before = datetime.now(UTC) - timedelta(days=1) if expired else None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*subjects, not_after=before).configure_cert(context)
    return context


@contextmanager
def hostile(behave: Behaviour) -> Iterator[HostileServer]:
    """In TLS, as good.example."""
    tls = certificate(conftest.authority, "good.example")
    with listening(RECEIVER_HOST, behave, tls=tls) as server:
        yield server


def sends(*parts: bytes, then_closes: bool = True) -> Behaviour:
    def behave(connection: socket.socket) -> None:
        for part in parts:
            connection.sendall(part)
        if then_closes:
            connection.close()

    return behave


def repeats(head: bytes, part: bytes, *, every_s: float = 0) -> Behaviour:
    def behave(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(part)
            if every_s:
                time.sleep(every_s)

    return behave


LATE = f"no answer within {TIMEOUT_S} s"
TOO_LONG = f"no answer within {egress.ANSWER_MAX_BYTES} bytes"
NOT_HTTP = "not an HTTP answer"

CONTAINED: dict[str, tuple[Behaviour, str]] = {
    "a status line that does not end": (repeats(b"HTTP/1.1 200 ", b"O" * 4096), TOO_LONG),
    "a head that does not end": (repeats(OK, b"a: " + b"b" * 1000 + b"\r\n"), TOO_LONG),
    "a header that does not end": (repeats(OK + b"a: ", b"b" * 4096), TOO_LONG),
    "interim answers that do not end": (
        repeats(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
        TOO_LONG,
    ),
    "a head that breaks off": (sends(OK, b"a: b\r\n"), NOT_HTTP),
    "no answer": (sends(), NOT_HTTP),
    "another protocol": (sends(b"SSH-2.0-OpenSSH_9.6\r\n"), NOT_HTTP),
    "HTTP/0.9": (sends(b"<h1>200</h1>"), NOT_HTTP),
    "HTTP/2": (sends(b"\x00\x00\x12\x04\x00\x00\x00\x00\x00"), NOT_HTTP),
    "two lengths": (sends(OK, b"content-length: 1\r\ncontent-length: 2\r\n\r\n"), NOT_HTTP),
    "NUL in a header": (sends(OK, b"a: \0\r\n\r\n"), NOT_HTTP),
    "a status of four digits": (sends(b"HTTP/1.1 2000 OK\r\n\r\n"), NOT_HTTP),
    "another protocol from now on": (
        sends(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n"),
        NOT_HTTP,
    ),
    "an error with a body that does not end": (
        repeats(b"HTTP/1.1 500 No\r\n\r\n", b"x" * 4096),
        "answered 500",
    ),
}


@pytest.mark.parametrize("name", CONTAINED)
def test_an_answer_that_is_none_is_a_failure_within_the_bounds(attempt: Attempt, name: str) -> None:
    behave, error = CONTAINED[name]
    with hostile(behave) as server:
        outcome = tell(attempt, f"https://good.example:{server.port}/told")

        assert outcome.error == error
        assert not outcome.final
        assert server.finished.wait(10), "the connection was left open"


SLOW: dict[str, Behaviour] = {
    "silence": lambda _: None,
    "a head of a byte now and then": repeats(b"", b"H", every_s=0.1),
    "a head that does not end": repeats(OK, b"a: b\r\n", every_s=0.1),
    "interim answers": repeats(b"", b"HTTP/1.1 103 Early Hints\r\n\r\n", every_s=0.1),
    "a status and no end of the head": sends(OK, then_closes=False),
}


def test_a_slow_answer_ends_with_the_attempts_time_and_its_connection_is_closed(
    attempt: Attempt,
) -> None:
    with ExitStack() as stack:
        servers = {name: stack.enter_context(hostile(behave)) for name, behave in SLOW.items()}
        servers["silence before TLS"] = stack.enter_context(
            listening(RECEIVER_HOST, lambda _: None)
        )
        servers["half a record of TLS"] = stack.enter_context(
            listening(RECEIVER_HOST, sends(b"\x16\x03\x03\x10", then_closes=False))
        )

        async def tell_all() -> dict[str, tuple[callbacks.Outcome, bool]]:
            outcomes = await asyncio.gather(
                *(
                    callbacks.deliver(
                        client(),
                        to(attempt, f"https://good.example:{server.port}/"),
                        timeout_s=TIMEOUT_S,
                    )
                    for server in servers.values()
                )
            )
            # While the loop runs, since its end closes whatever it has.
            closed = [
                await asyncio.to_thread(server.finished.wait, 10) for server in servers.values()
            ]
            return dict(zip(servers, zip(outcomes, closed, strict=True), strict=True))

        for name, (outcome, closed) in asyncio.run(tell_all()).items():
            with case(name):
                assert outcome == callbacks.Outcome(error=LATE)
                assert closed, "the connection was left open"


BOMB = gzip.compress(bytes(10_000_000))
UNREAD: dict[str, Behaviour] = {
    "a body that does not end": repeats(OK + b"\r\n", b"x" * 4096),
    "a body of a byte now and then": repeats(OK + b"content-length: 99\r\n\r\n", b"x", every_s=0.1),
    "a body that never comes": sends(OK, b"content-length: 99999999999\r\n\r\n", then_closes=False),
    "chunks that do not end": repeats(OK + b"transfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
    "a compressed bomb": sends(
        OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(BOMB), BOMB
    ),
    "204 after an interim answer": sends(
        b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n"
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_2xx_status_counts_and_its_body_is_not_read(attempt: Attempt, name: str) -> None:
    with hostile(UNREAD[name]) as server:
        outcome = tell(attempt, f"https://good.example:{server.port}/told")

        assert outcome.error is None
        assert server.finished.wait(10)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_inside_is_not_followed(attempt: Attempt, status: int) -> None:
    with listening(INSIDE, lambda _: None) as inside:
        head = f"HTTP/1.1 {status} Moved\r\nlocation: https://{INSIDE}:{inside.port}/\r\n\r\n"
        with hostile(sends(head.encode())) as server:
            outcome = tell(attempt, f"https://good.example:{server.port}/told")

        assert (outcome.status, outcome.error) == (status, f"answered {status}")
        assert inside.connections == 0


@pytest.mark.parametrize(
    ("behave", "error"),
    [
        (sends(b"HTTP/1.1 200 OK\r\n\r\n", then_closes=False), "no TLS connection"),
        (sends(b"220 mail.example ESMTP\r\n", then_closes=False), "no TLS connection"),
        (sends(), "no connection"),
        (repeats(b"", b"\x16\x03\x03\x00\x01"), "no TLS connection"),
    ],
    ids=["HTTP without TLS", "another protocol", "closed at once", "broken records"],
)
def test_a_receiver_without_tls_is_told_nothing(
    attempt: Attempt, behave: Behaviour, error: str
) -> None:
    with listening(RECEIVER_HOST, behave) as server:
        outcome = tell(attempt, f"https://good.example:{server.port}/told")

        assert outcome.error == error
        assert server.finished.wait(10), "the connection was left open"


@pytest.mark.parametrize(
    ("url", "tls", "reason"),
    [
        ("https://good.example", ["evil.example"], "Hostname mismatch"),
        ("https://good.example", ["*.good.example"], "Hostname mismatch"),
        ("https://good.example", [RECEIVER_HOST], "Hostname mismatch"),
        (f"https://{RECEIVER_HOST}", ["good.example"], "IP address mismatch"),
    ],
    ids=["another name", "a name below", "its address", "a name for an address"],
)
def test_a_certificate_of_somebody_else_is_refused(
    attempt: Attempt, url: str, tls: list[str], reason: str
) -> None:
    context = certificate(conftest.authority, *tls)
    with listening(RECEIVER_HOST, sends(OK, b"\r\n"), tls=context) as server:
        outcome = tell(attempt, f"{url}:{server.port}/")

    assert outcome.error is not None
    assert outcome.error.startswith(f"the certificate is not trusted: {reason}")


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        (certificate(trustme.CA(), "good.example"), "unable to get local issuer"),
        (certificate(conftest.authority, "good.example", expired=True), "has expired"),
    ],
    ids=["a stranger's authority", "expired"],
)
def test_a_certificate_that_is_worth_nothing_is_refused(
    attempt: Attempt, context: ssl.SSLContext, reason: str
) -> None:
    with listening(RECEIVER_HOST, sends(OK, b"\r\n"), tls=context) as server:
        outcome = tell(attempt, f"https://good.example:{server.port}/")

    assert reason in (outcome.error or "")


# --- Names ----------------------------------------------------------------------------------------


def moving(first: str, then: str) -> Callable[[int], list[str]]:
    """A name of one address when it is first asked for, and of another ever after."""
    return lambda time: [first] if time == 1 else [then]


def test_a_name_that_moves_inside_after_submission_is_refused_at_the_attempt(
    customer: Customer, receiver: Receiver
) -> None:
    names.zone["moving.example"] = moving(RECEIVER_HOST, INSIDE)
    with listening(INSIDE, lambda _: None) as inside, couriers(1):
        url = f"https://moving.example:{inside.port}/told"
        body = {"model": "z-image-turbo", "prompt": "a cat", "callback_url": url}
        task = customer.http.post("/v1/images/generations", json=body).json()
        customer.http.post(f"/v1/tasks/{task['id']}/cancel")
        told = customer.task(task["id"])
        wait_until(lambda: delivery_of(told).state is DeliveryState.GAVE_UP)

        assert delivery_of(told).last_error == "moving.example is not a public address"
        assert delivery_of(told).attempts == 1
        assert inside.connections == 0


def test_a_name_that_moves_inside_after_the_check_is_called_where_it_was_checked(
    attempt: Attempt, receiver: Receiver
) -> None:
    names.zone["moving.example"] = moving(RECEIVER_HOST, INSIDE)
    port = parse(receiver.url).port
    with listening(INSIDE, lambda _: None, port=port) as inside:
        outcome = tell(attempt, f"https://moving.example:{port}/told")

        assert outcome == callbacks.Outcome(200)
        assert inside.connections == 0
    assert names.asked["moving.example", "A"] == 1
    assert names.asked["moving.example", "AAAA"] == 1


@pytest.mark.parametrize(
    "says",
    [[INSIDE], [RECEIVER_HOST, INSIDE], [RECEIVER_HOST, "::1"], ["x.example.", INSIDE]],
    ids=["inside", "one of two", "IPv6", "by alias"],
)
def test_a_name_that_leads_inside_is_never_called(attempt: Attempt, says: list[str]) -> None:
    names.zone["inside.example"] = says
    with listening(INSIDE, lambda _: None) as inside:
        outcome = tell(attempt, f"https://inside.example:{inside.port}/")

        assert outcome == callbacks.Outcome(
            error="inside.example is not a public address", final=True
        )
        assert inside.connections == 0


def resolve(host: str, *, timeout_s: float = 3) -> list[str]:
    return [str(each) for each in asyncio.run(egress.resolve(host, timeout_s=timeout_s))]


@pytest.mark.parametrize(
    "says",
    [None, [], ["loop.example.", "unknown.example."], ["nobody.example."]],
    ids=["silence", "nothing", "a loop", "an alias of nobody"],
)
def test_a_name_without_addresses_is_unknown_and_may_be_tried_again(
    attempt: Attempt, says: list[str] | None
) -> None:
    names.zone["unknown.example"] = says

    with pytest.raises(egress.UnknownName):
        resolve("unknown.example", timeout_s=0.2)
    if says is not None:
        outcome = tell(attempt, "https://unknown.example/")
        assert outcome == callbacks.Outcome(error="the host name cannot be resolved")
        asyncio.run(egress.check_callback_url("https://unknown.example/"))


def test_a_name_has_so_many_addresses_and_no_more() -> None:
    public = [f"93.184.216.{n}" for n in range(egress.ADDRESSES_MAX + 1)]
    names.zone["many.example"] = public[: egress.ADDRESSES_MAX]
    assert sorted(resolve("many.example")) == sorted(public[: egress.ADDRESSES_MAX])

    names.zone["many.example"] = public
    with pytest.raises(egress.ForbiddenAddress, match="more than 64 addresses"):
        resolve("many.example")


def test_a_name_server_that_answers_one_kind_only_is_enough() -> None:
    names.zone["half.example"] = lambda _: [PUBLIC]
    assert resolve("half.example") == [PUBLIC]
    names.zone["half.example"] = lambda _: ["2606:2800:220:1::1"]
    assert resolve("half.example") == ["2606:2800:220:1::1"]


# --- The good ones --------------------------------------------------------------------------------

SUBJECTS = ("good.example", "alias.example", "xn--bcher-kva.example", RECEIVER_HOST)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """As every good name, and as moving.example."""
    with receiving(conftest.authority, *SUBJECTS, "moving.example", "::ffff:127.0.0.2") as receiver:
        yield receiver


GOOD: dict[str, tuple[str, str, str]] = {
    "a name": ("https://good.example:{port}/told", "good.example", "/told"),
    "capitals": ("HTTPS://GOOD.Example:{port}/Told", "good.example", "/Told"),
    "a dot at the end": ("https://good.example.:{port}/", "good.example", "/"),
    "no path": ("https://good.example:{port}", "good.example", "/"),
    "a query alone": ("https://good.example:{port}?a=1", "good.example", "/?a=1"),
    "a query": ("https://good.example:{port}/t?a=1&b=%20+", "good.example", "/t?a=1&b=%20+"),
    "a URL in the query": (
        "https://good.example:{port}/?u=https://a@127.0.0.1/",
        "good.example",
        "/?u=https://a@127.0.0.1/",
    ),
    "an at in the path": ("https://good.example:{port}/@me", "good.example", "/@me"),
    "a fragment": ("https://good.example:{port}/t#@127.0.0.1/", "good.example", "/t"),
    "a path beyond ASCII": ("https://good.example:{port}/ü", "good.example", "/%C3%BC"),
    "quotes": ('https://good.example:{port}/"<>', "good.example", "/%22%3C%3E"),
    "dots in the path": ("https://good.example:{port}/a/../b", "good.example", "/a/../b"),
    "an alias": ("https://alias.example:{port}/", "alias.example", "/"),
    "IDN": ("https://bücher.example:{port}/", "xn--bcher-kva.example", "/"),
    "IDN in capitals": ("https://BÜCHER.example:{port}/", "xn--bcher-kva.example", "/"),
    "IDN, encoded": ("https://xn--bcher-kva.example:{port}/", "xn--bcher-kva.example", "/"),
    "full-width letters": ("https://ｇｏｏｄ.example:{port}/", "good.example", "/"),
    "IPv4": ("https://127.0.0.2:{port}/", "127.0.0.2", "/"),
    "IPv4 mapped": ("https://[::ffff:127.0.0.2]:{port}/", "[::ffff:7f00:2]", "/"),
    "the longest": ("https://good.example:{port}/{longest}", "good.example", "/{longest}"),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_url_is_told_under_its_own_name(
    attempt: Attempt, receiver: Receiver, name: str
) -> None:
    url, host, target = GOOD[name]
    port = parse(receiver.url).port
    longest = "x" * (URL_MAX_CHARACTERS - len(f"https://good.example:{port}/"))
    url, target = (each.format(port=port, longest=longest) for each in (url, target))
    asyncio.run(egress.check_callback_url(url))

    assert tell(attempt, url) == callbacks.Outcome(200)
    (heard,) = receiver.heard
    assert heard.path == target
    assert heard.headers["host"] == f"{host}:{port}"


def test_the_receiver_is_asked_in_tls_for_the_name_of_the_url(attempt: Attempt) -> None:
    asked: list[str | None] = []
    context = certificate(conftest.authority, "xn--bcher-kva.example")
    context.sni_callback = lambda _, name, __: asked.append(name)
    with listening(RECEIVER_HOST, sends(OK, b"\r\n"), tls=context) as server:
        assert tell(attempt, f"https://Bücher.example.:{server.port}/").error is None

    assert asked == ["xn--bcher-kva.example"]


def allow(monkeypatch: pytest.MonkeyPatch, network: str) -> None:
    """As if the service had been started with this setting; settings do not change."""
    networks = [ip_network(network)]
    monkeypatch.setitem(vars(settings), "callback_allowed_networks", networks)


def test_a_receiver_is_told_over_ipv6(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    context = certificate(conftest.authority, "six.example")
    names.zone["six.example"] = ["::1"]
    allow(monkeypatch, "::1/128")
    try:
        with listening("::1", sends(OK, b"\r\n"), tls=context) as server:
            assert tell(attempt, f"https://six.example:{server.port}/") == callbacks.Outcome(200)
    except OSError:
        pytest.skip("this machine has no IPv6")


def test_the_next_address_is_tried_when_one_is_dead(
    attempt: Attempt, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    names.zone["good.example"] = ["127.0.0.77", RECEIVER_HOST]
    allow(monkeypatch, "127.0.0.0/8")

    assert tell(attempt, receiver.url.replace(RECEIVER_HOST, "good.example")).status == 200


def test_proxies_of_the_environment_are_ignored(
    attempt: Attempt, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(INSIDE, lambda _: None) as proxy:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://{INSIDE}:{proxy.port}")
        client.cache_clear()

        assert tell(attempt, receiver.url) == callbacks.Outcome(200)
        assert proxy.connections == 0


def test_an_error_of_ours_uses_up_an_attempt(customer: Customer, submit: Submit) -> None:
    class Broken(httpcore.AsyncNetworkBackend):
        async def connect_tcp(self, *_: object, **__: object) -> httpcore.AsyncNetworkStream:
            raise RuntimeError("a bug")

    async def deliver() -> None:
        courier = Courier()
        courier._client = httpcore.AsyncConnectionPool(network_backend=Broken())
        running = asyncio.create_task(courier.run())
        tried = lambda: delivery_of(task).attempts > 0  # noqa: E731
        await asyncio.to_thread(wait_until, tried)
        courier.stop()
        await running

    task = submit(customer, callback_url="https://good.example/told")
    customer.http.post(f"/v1/tasks/{task.id}/cancel")
    asyncio.run(deliver())

    assert delivery_of(task).last_error == "the service could not try it"


# --- Any URL --------------------------------------------------------------------------------------

WORDS = (
    "https:// HTTPS:// http:// // good.example 127.0.0.1 [::1] [ ] @ : :443 :0 / \\ ? # % %25 . .. "
    "0x7f 0177 1 。 １ ß ü xn-- xn--a - _ :: \t \n \0 \u200d \ud800"
)
PIECES = st.sampled_from(WORDS.split(" "))
URLS = st.one_of(
    st.text(st.characters(exclude_categories=())),
    st.lists(PIECES).map("".join),
    st.lists(PIECES).map(lambda pieces: "https://" + "".join(pieces)),
    st.text(st.characters(exclude_categories=())).map(lambda text: f"https://{text}/"),
)


@given(URLS)
@example("https://xn--a/")
@example("https://xn--zz.example:1/")
@example("https://faß.de/")
@example("https://[::ffff:1.2.3.4]:1")
@hypothesis_settings(max_examples=200, deadline=None, database=None)
def test_whoever_is_checked_is_connected_to_whatever_the_url(url: str) -> None:
    try:
        receiver = parse(url)
    except InvalidRequest:
        return

    assert connected_to(receiver.url) == (receiver.host, receiver.port)
    plain = f"https://{receiver.authority}{receiver.target}"
    assert parse(plain) == receiver
    # And two readers that are not ours find the same host in it.
    assert httpx.URL(plain).raw_host == httpcore.URL(plain).host == receiver.host.encode()


def connected_to(url: httpcore.URL) -> tuple[str, int]:
    """Whom httpcore asks its network for."""
    asked: list[tuple[str, int]] = []

    class Network(httpcore.AsyncNetworkBackend):
        async def connect_tcp(
            self, host: str, port: int, *_: object, **__: object
        ) -> httpcore.AsyncNetworkStream:
            asked.append((host, port))
            raise httpcore.ConnectError

    async def ask() -> None:
        async with httpcore.AsyncConnectionPool(network_backend=Network()) as client:
            with pytest.raises(httpcore.ConnectError):
                await client.request("POST", url)

    asyncio.run(ask())
    (only,) = asked
    return only
