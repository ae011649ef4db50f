"""Everything that can go wrong for a customer, each with what the service said about it."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

MESSAGE_MAX_CHARACTERS = 500
"""Of a body that is not JSON, such as the page of a proxy."""


class ZImageError(Exception):
    """What the service refused, or could not do.

    `status` is the HTTP status, `code` the service's own word for it, `request_id` what to quote
    to whoever runs the service, `retry_after_s` how long it asked to be left alone. Each is None
    where it does not apply.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.request_id = request_id
        self.retry_after_s = retry_after_s

    @property
    def line(self) -> str:
        """All of it in one line, for a terminal or a log."""
        known = [
            f"HTTP {self.status}" if self.status else "",
            f"request {self.request_id}" if self.request_id else "",
        ]
        where = ", ".join(filter(None, known))
        text = f"{self.code}: {self.message}" if self.code else self.message
        return " ".join(f"{text} ({where})".split() if where else text.split())


class Unauthenticated(ZImageError):
    """The key is missing, wrong, expired or revoked."""


class InsufficientCredits(ZImageError):
    """Fewer credits are left than the image costs."""


class PermissionDenied(ZImageError):
    """The key or the account may not do this."""


class NotFound(ZImageError):
    """There is no such task, delivery or route for this account."""


class Conflict(ZImageError):
    """The task has already ended, or the idempotency key was used for another request."""


class RateLimited(ZImageError):
    """Too many requests or too many unfinished tasks; `retry_after_s` says how long to wait."""


class InvalidRequest(ZImageError):
    """The request breaks a rule; the message says which."""


class ServiceUnavailable(ZImageError):
    """The service failed, is overloaded, or answered something that is no answer of it."""


class Unreachable(ZImageError):
    """No connection, or no answer in time. Whether the request arrived is not known."""


class TaskFailed(ZImageError):
    """The task ended without an image and was not charged; `code` says why."""


class Timeout(ZImageError):
    """The task is still unfinished. It goes on, and is charged when it completes."""


class IntegrityError(ZImageError):
    """The image is not the one the service says it made, twice in a row."""


class ImageExpired(ZImageError):
    """The image was drawn and charged, but is no longer kept."""


BY_STATUS: dict[int, type[ZImageError]] = {
    401: Unauthenticated,
    402: InsufficientCredits,
    403: PermissionDenied,
    404: NotFound,
    408: ServiceUnavailable,
    409: Conflict,
    429: RateLimited,
}


def of_answer(status: int, headers: Mapping[str, str], body: bytes) -> ZImageError:
    """The error that an answer tells of; `headers` have lower-case names.

    Reads the envelopes `{"error": {"code", "message"}}`, `{"code", "message"}` and `{"detail"}`.
    """
    said = _read_object(body)
    inner = said.get("error")
    detail = inner if isinstance(inner, dict) else said
    message = detail.get("message") or detail.get("detail")
    code = detail.get("code")
    request_id = headers.get("x-request-id") or said.get("request_id")
    if not message:
        text = body.decode(errors="replace").strip()
        message = text[:MESSAGE_MAX_CHARACTERS] or f"The service answered {status}"
    kind = BY_STATUS.get(status, InvalidRequest if 400 <= status < 500 else ServiceUnavailable)
    return kind(
        str(message),
        status=status,
        code=None if code is None else str(code),
        request_id=None if request_id is None else str(request_id),
        retry_after_s=read_retry_after(headers.get("retry-after"), datetime.now(UTC)),
    )


def read_retry_after(value: str | None, now: datetime) -> float | None:
    """Seconds from `Retry-After`, which is whole seconds or an HTTP date; None if it is neither."""
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - now).total_seconds())


def _read_object(body: bytes) -> dict[str, object]:
    try:
        said = json.loads(body)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
