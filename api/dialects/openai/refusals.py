"""Each error in OpenAI's envelope, `{"error": {message, type, param, code}}`, and what is re-sent.

The library re-sends by itself what was answered with 409, 429 or 500 and above, twice unless it is
told otherwise, and leaves it where `x-should-retry: false` says so.
"""

from typing import Any, NamedTuple

from starlette.responses import Response

from api.answers import JSON
from storage import errors


class Row(NamedTuple):
    """How an error is answered."""

    status: int
    code: str
    type: str = "invalid_request_error"
    futile: bool = False
    """Whether the library would re-send it, and should not: nothing will have changed."""


AUTHENTICATION, QUOTA = "authentication_error", "insufficient_quota"
RATE, API = "rate_limit_error", "api_error"

ERRORS: dict[type[errors.ServiceError], Row] = {
    errors.InvalidRequest: Row(400, "invalid_value"),
    errors.ContentRefused: Row(400, "content_policy_violation"),
    errors.Unauthenticated: Row(401, "invalid_api_key", AUTHENTICATION),
    errors.InsufficientCredits: Row(402, "insufficient_quota", QUOTA),
    errors.AccountSuspended: Row(403, "account_suspended"),
    errors.ModelAccessDenied: Row(403, "model_access_denied"),
    errors.PathNotFound: Row(404, "not_found"),
    errors.TaskNotFound: Row(404, "image_expired"),
    errors.MethodNotAllowed: Row(405, "method_not_allowed"),
    # Somebody wanted it so.
    errors.TaskCancelled: Row(409, "request_cancelled", futile=True),
    errors.PayloadTooLarge: Row(413, "request_too_large"),
    # Not 409, which the library would send again.
    errors.IdempotencyConflict: Row(422, "idempotency_conflict"),
    errors.RateLimited: Row(429, "rate_limit_exceeded", RATE),
    errors.TooManyUnfinished: Row(429, "too_many_unfinished", RATE),
    errors.BacklogFull: Row(503, "backlog_full", API),
    errors.InternalError: Row(500, "internal_error", API),
    errors.GenerationFailed: Row(500, "generation_failed", API),
    # The same size needs the same memory.
    errors.ResourceExhausted: Row(500, "resource_exhausted", API, futile=True),
    errors.RewriteFailed: Row(500, "rewrite_failed", API),
    errors.StorageUnavailable: Row(500, "storage_unavailable", API),
    # It was tried several times already, and may be what the workers die of.
    errors.WorkerLost: Row(500, "worker_lost", API, futile=True),
    errors.ServiceUnavailable: Row(503, "service_unavailable", API),
    # Whoever has waited for so long should decide themselves.
    errors.GenerationTimeout: Row(504, "generation_timeout", API, futile=True),
}


def describe(error: errors.ServiceError) -> dict[str, Any]:
    """The value of `error`, in an answer, in an event and among `failures`."""
    row = _row(error)
    return {"message": str(error), "type": row.type, "param": error.param, "code": row.code}


def render_error(error: errors.ServiceError) -> Response:
    row = _row(error)
    headers = error.headers | ({"x-should-retry": "false"} if row.futile else {})
    return JSON({"error": describe(error)}, row.status, headers)


def model_not_found(model: str) -> errors.PathNotFound:
    named = model.encode(errors="replace").decode()  # half of an escaped pair cannot be answered
    return errors.PathNotFound(
        f"The model `{named}` does not exist or you do not have access to it.", param="model"
    )


def _row(error: errors.ServiceError) -> Row:
    row = ERRORS.get(type(error), ERRORS[errors.InternalError])
    if isinstance(error, errors.InvalidRequest) and error.missing:
        return row._replace(code="missing_required_parameter")
    if isinstance(error, errors.PathNotFound) and error.param == "model":
        return row._replace(code="model_not_found")
    return row
