"""What a caller may ask of any create, in the same words in every dialect: our extension.

Prefer: wait=n     hold the answer until the task has ended, but at most n seconds (RFC 7240)
Cancel-After: 90s  cancel what has not ended by then, uncharged (as Replicate's header)
dry_run=true       say what it would cost and submit nothing; in the query or in the body
"""

import json
import re
from dataclasses import dataclass

from fastapi import Request

from storage.errors import InvalidRequest

WAIT_MAX_S = 60
"""What is asked for beyond it is held for this long."""
CANCEL_AFTER_MAX_S = 24 * 3600
_WAIT = re.compile(r"(?:^|,)\s*wait=([0-9]{1,6})\s*(?:$|[,;])", re.IGNORECASE)
_PERIOD = re.compile(r"([0-9]{1,6})(s|m|h|)")
_UNIT_S = {"": 1, "s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, slots=True)
class Preferences:
    """Each is None or false where nothing was asked for."""

    wait_s: int | None
    cancel_after_s: int | None
    dry_run: bool


def read(request: Request, body: bytes) -> Preferences:
    """Raises: InvalidRequest."""
    return Preferences(read_wait(request), _cancel_after_s(request), _dry_run(request, body))


def read_wait(request: Request) -> int | None:
    """Seconds for which the caller prefers to wait. What cannot be read is no preference."""
    wait = _WAIT.search(request.headers.get("Prefer", ""))
    return None if wait is None else min(int(wait[1]), WAIT_MAX_S)


def _cancel_after_s(request: Request) -> int | None:
    sent = request.headers.get("Cancel-After")
    if sent is None:
        return None
    period = _PERIOD.fullmatch(sent.strip())
    seconds = 0 if period is None else int(period[1]) * _UNIT_S[period[2]]
    if not 1 <= seconds <= CANCEL_AFTER_MAX_S:
        raise InvalidRequest(
            "Cancel-After: must be seconds, or a number with s, m or h, of 1 s to 24 h in all",
            param="Cancel-After",
        )
    return seconds


def _dry_run(request: Request, body: bytes) -> bool:
    asked = request.query_params.get("dry_run")
    if asked is not None:
        if asked not in ("true", "false"):
            raise InvalidRequest("dry_run: must be true or false", param="dry_run")
        return asked == "true"
    if b"dry_run" not in body:
        return False
    parsed = json.loads(body)  # as FastAPI has read it
    # DashScope's library puts what it does not know among the parameters.
    places = [parsed, parsed.get("parameters")] if isinstance(parsed, dict) else []
    for place in places:
        wanted = place.get("dry_run") if isinstance(place, dict) else None
        if not isinstance(wanted, bool | None):
            raise InvalidRequest("dry_run: must be true or false", param="dry_run")
        if wanted:
            return True
    return False
