"""By what a create is known when it comes a second time: its key, or what it asks for.

A key is the caller's; the same key with another request is refused. The header is that of the
IETF's draft (draft-ietf-httpapi-idempotency-key-header-07), quoted or not; EvoLink's is unquoted.
"""

import hashlib
import json
import re

from fastapi import Request

from storage.accounts import Credential
from storage.errors import InvalidRequest
from storage.idempotency import Mark

HEADER = "Idempotency-Key"
KEY_MAX_CHARACTERS = 255
"""As Stripe's; EvoLink's own client sends 16 to 96."""
_KEY = re.compile(rf"[\x21-\x7e]{{1,{KEY_MAX_CHARACTERS}}}")
RETRY_AFTER_MAX_S = 120
"""For how long the OpenAI library at most waits before it re-sends."""
READ_TIMEOUT_S = 600
"""The OpenAI library's own, where it does not say another; openai 3.52.0."""
READ_TIMEOUT_MAX_S = 3600
RESENDS_MAX = 20
"""Nobody re-sends more often, whatever the header says."""


def read_key(request: Request) -> str | None:
    """The key of this request. Raises: InvalidRequest."""
    sent = request.headers.get(HEADER)
    if sent is None:
        return None
    key = sent[1:-1] if len(sent) > 1 and sent[0] == sent[-1] == '"' else sent
    if _KEY.fullmatch(key) is None:
        raise InvalidRequest(
            f"{HEADER}: must be 1 to {KEY_MAX_CHARACTERS} visible ASCII characters", param=HEADER
        )
    return key


def mark(request: Request, body: bytes, caller: Credential) -> Mark | None:
    """By what this request is known again; None if it will not come twice.

    Raises: InvalidRequest.
    """
    key = read_key(request)
    if key is not None:
        return Mark(_fingerprint(request, body), key=key)
    # The OpenAI library counts its re-sends, and sends no key: openai 3.52.0, measured.
    sends = request.headers.get("x-stainless-retry-count", "")
    if re.fullmatch(r"[0-9]{1,3}", sends) is None:
        return None
    return Mark(
        _fingerprint(request, body, str(caller.key_id)),
        resend=min(int(sends), RESENDS_MAX),
        resend_window_s=_read_timeout_s(request) + RETRY_AFTER_MAX_S,
    )


def _read_timeout_s(request: Request) -> float:
    try:
        timeout_s = float(request.headers.get("x-stainless-read-timeout", ""))
    except ValueError:
        return READ_TIMEOUT_S
    return timeout_s if 0 < timeout_s <= READ_TIMEOUT_MAX_S else READ_TIMEOUT_S


def _fingerprint(request: Request, body: bytes, *more: str) -> bytes:
    """The same for the same JSON, however its members are ordered and spaced."""
    # Read as FastAPI has read it, who takes more for JSON than orjson does.
    canonical = json.dumps(json.loads(body), sort_keys=True)
    parts = [part.encode() for part in (request.url.path, *more, canonical)]
    return hashlib.sha256(b"\0".join(parts)).digest()
