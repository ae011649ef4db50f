"""Whether a callback comes from the service: Standard Webhooks 1.0.0, symmetric."""

import base64
import binascii
import hmac
import time
from collections.abc import Mapping

from zimage.errors import ZImageError

TOLERANCE_S = 300
"""Between the sender's clock and ours, and for how long a recorded callback could be played back.
Source: what the reference libraries allow."""
PREFIX = "whsec_"


class InvalidSignature(ZImageError):
    """The callback was not signed with this secret just now; the message says what is wrong."""


def verify_callback(
    secret: str, headers: Mapping[str, str], body: bytes, *, now_s: float | None = None
) -> str:
    """The `webhook-id` of a callback whose signature holds: the same id is the same message.

    `secret` is `whsec_…`; `headers` may be written in any case; `body` is what came, byte by byte;
    `now_s` is unix seconds, None for the clock's.

    Raises:
        InvalidSignature: a header is missing, the time is off, or no signature matches.
    """
    named = {name.lower(): value for name, value in headers.items()}
    try:
        message_id = named["webhook-id"]
        timestamp = named["webhook-timestamp"]
        signatures = named["webhook-signature"]
    except KeyError as missing:
        raise InvalidSignature(f"the header {missing.args[0]} is missing") from None
    if not (timestamp.isascii() and timestamp.isdigit()):
        raise InvalidSignature("webhook-timestamp is not unix seconds")
    age_s = (time.time() if now_s is None else now_s) - int(timestamp)
    if abs(age_s) > TOLERANCE_S:
        when = "old" if age_s > 0 else "ahead of this clock"
        raise InvalidSignature(f"it is {abs(age_s):.0f} s {when}, more than {TOLERANCE_S} s")
    signed = f"{message_id}.{timestamp}.".encode() + body
    expected = base64.b64encode(hmac.digest(read_secret(secret), signed, "sha256"))
    for signature in signatures.split(" "):
        version, _, value = signature.partition(",")
        if version == "v1" and hmac.compare_digest(value.encode(), expected):
            return message_id
    raise InvalidSignature("no signature matches: another secret, or a changed body")


def read_secret(secret: str) -> bytes:
    """The key that `secret` stands for. Raises: InvalidSignature."""
    encoded = secret.strip().removeprefix(PREFIX)
    try:
        return base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidSignature(f"the secret is not {PREFIX} and Base64") from None
