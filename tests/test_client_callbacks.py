"""A customer checks that a callback comes from the service, and has one told again."""

from __future__ import annotations

import base64
import json
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import trustme
from standardwebhooks import Webhook
from zimage import Client, InvalidSignature, NotFound, verify_callback

from storage import deliveries
from storage.database import transaction
from tests.test_client_service import SMALL, Run, client, environ, zimage

if TYPE_CHECKING:
    from tests.conftest import Work

__all__ = ["client", "environ", "zimage"]  # fixtures

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
OTHER = "whsec_" + base64.b64encode(bytes(32)).decode()
BODY = b'{"id":"task-unified-1757165031-uyujaw3d","status":"completed"}'
SIGNED = "v1,YJ+vL1mQ723Mdf4w3+31FIq/jMF6820MVv+ytTDuURI="
"""HMAC-SHA256 of BODY, computed apart from this code for this id and moment."""
HEADERS = {
    "Webhook-Id": "msg_example0001",
    "Webhook-Timestamp": "1757165041",
    "Webhook-Signature": SIGNED,
}
NOW_S = 1757165041.0


def signed(secret: str, body: bytes, at: datetime | None = None) -> dict[str, str]:
    """Headers as the reference library makes them."""
    at = at or datetime.now(UTC)
    return {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(secret).sign("msg_1", at, body.decode()),
    }


@pytest.mark.parametrize(
    "signatures",
    [SIGNED, f"v1,AAAA {SIGNED}", f"{SIGNED} v1,AAAA", f"v1a,AAAA {SIGNED}", f"nonsense {SIGNED}"],
)
def test_one_good_signature_among_several_is_enough(signatures: str) -> None:
    headers = HEADERS | {"Webhook-Signature": signatures}
    assert verify_callback(SECRET, headers, BODY, now_s=NOW_S) == "msg_example0001"
    assert verify_callback(SECRET.rstrip("="), headers, BODY, now_s=NOW_S)


@pytest.mark.parametrize(
    ("changed", "body", "secret", "complaint"),
    [
        ({}, BODY + b" ", SECRET, "no signature matches"),
        ({}, BODY, OTHER, "no signature matches"),
        ({"Webhook-Id": "msg_2"}, BODY, SECRET, "no signature matches"),
        ({"Webhook-Timestamp": "1757165042"}, BODY, SECRET, "no signature matches"),
        ({"Webhook-Timestamp": "1757164740"}, BODY, SECRET, "301 s old"),
        ({"Webhook-Timestamp": "1757165342"}, BODY, SECRET, "301 s ahead"),
        ({"Webhook-Timestamp": "yesterday"}, BODY, SECRET, "not unix seconds"),
        ({"Webhook-Signature": SIGNED[3:]}, BODY, SECRET, "no signature matches"),
        ({"Webhook-Signature": SIGNED.replace("v1,", "v1a,")}, BODY, SECRET, "no signature"),
        ({"Webhook-Signature": "v1,Ä"}, BODY, SECRET, "no signature matches"),
        ({}, BODY, "whsec_!", "the secret is not"),
    ],
)
def test_what_was_not_signed_just_now_with_this_secret_is_refused(
    changed: dict[str, str], body: bytes, secret: str, complaint: str
) -> None:
    with pytest.raises(InvalidSignature, match=complaint):
        verify_callback(secret, HEADERS | changed, body, now_s=NOW_S)


def test_a_missing_header_is_named() -> None:
    for name in HEADERS:
        headers = {other: value for other, value in HEADERS.items() if other != name}
        with pytest.raises(InvalidSignature, match=name.lower()):
            verify_callback(SECRET, headers, BODY, now_s=NOW_S)


@contextmanager
def receiver(environ: dict[str, str], *more: str) -> Iterator[tuple[str, list[str]]]:
    """`zimage callbacks verify` at work: where it listens, and at the end what it printed."""
    arguments = ["callbacks", "verify", "--port", "0", *more]
    with subprocess.Popen(
        [sys.executable, "-m", "zimage", *arguments],
        env=environ | {"ZIMAGE_CALLBACK_SECRET": SECRET},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        printed: list[str] = []
        yield process.stdout.readline().split()[-1], printed
        process.send_signal(signal.SIGINT)
        printed += process.stdout.read().splitlines()
        assert process.wait() == 130


def test_the_receiver_says_of_each_callback_whether_it_is_genuine(environ: dict[str, str]) -> None:
    old = datetime.now(UTC) - timedelta(seconds=400)
    with receiver(environ) as (url, printed), httpx.Client(verify=False) as http:
        sent = [
            (signed(SECRET, BODY), BODY),
            (signed(SECRET, BODY), BODY),
            (signed(OTHER, BODY), BODY),
            (signed(SECRET, BODY, old), BODY),
            (signed(SECRET, b"\x1b[2J"), b"\x1b[2J"),
            ({}, BODY),
        ]
        answers = [http.post(url, headers=h, content=b).status_code for h, b in sent]
    assert answers == [204, 204, 400, 400, 204, 400]
    assert printed == [
        "ok msg_1 task-unified-1757165031-uyujaw3d completed",
        "ok again msg_1 task-unified-1757165031-uyujaw3d completed",
        "refused: no signature matches: another secret, or a changed body",
        f"refused: it is {printed[3].split()[3]} s old, more than 300 s",
        "ok again msg_1 (not a task)",
        "refused: the header webhook-id is missing",
    ]


def test_the_receiver_answers_https(environ: dict[str, str], tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    trusting = ssl.create_default_context(cadata=authority.cert_pem.bytes().decode())
    with (
        receiver(environ, "--cert", str(cert), "--key", str(key)) as (url, printed),
        httpx.Client(verify=trusting) as http,
    ):
        assert url.startswith("https://")
        answer = http.post(url, headers=signed(SECRET, BODY), content=BODY)
        assert answer.status_code == 204
    assert len(printed) == 1


def test_callbacks_are_listed_and_told_again(client: Client, zimage: Run, work: Work) -> None:
    created = client.create("a cat", size=SMALL, callback_url="https://127.0.0.2:9/told")
    assert client.callbacks() == []
    work()
    (callback,) = client.callbacks(task_id=created.id)
    assert (callback.state, callback.url) == ("waiting", "https://127.0.0.2:9/told")
    now = datetime.now(UTC)
    assert client.callbacks(since=now + timedelta(minutes=1)) == []
    assert client.callbacks(until=now + timedelta(minutes=1)) == [callback]
    listed = zimage("callbacks", "list", "--task", created.id, "--since", "2026-01-01")
    assert listed.stdout.splitlines()[1].split("\t")[:3] == [callback.id, created.id, "waiting"]
    said = json.loads(zimage("callbacks", "list", "--json").stdout)
    assert [line["id"] for line in said] == [callback.id]

    with transaction() as session:
        (attempt,) = deliveries.claim_due(session, limit=1, except_accounts=())
    assert attempt.delivery.id == callback.id
    assert client.redeliver(callback.id).state == "waiting"
    assert callback.id in zimage("callbacks", "redeliver", callback.id).stdout
    with pytest.raises(NotFound):
        client.redeliver("msg_nobodys")
