"""Each error in EvoLink's envelope: `{"error": {code, message, type, param?}}`.

Creates and queries differ in some words. Sources: EvoLink's OpenAPI document of z-image-turbo (2.4)
and its page "Get task detail"; `idempotency_conflict` is a code that its own client knows.
"""

from typing import Any

from starlette.responses import Response

from api.answers import JSON
from api.dialects import routing
from storage import errors

Row = tuple[int, str, str, str | None]
"""HTTP status, `code`, `type`, and the message where EvoLink's differs from ours."""

INVALID, API = "invalid_request_error", "api_error"
_ALWAYS: dict[type[errors.ServiceError], Row] = {
    errors.PathNotFound: (404, "not_found", INVALID, None),
    errors.MethodNotAllowed: (405, "method_not_allowed", INVALID, None),
    errors.PayloadTooLarge: (413, "request_too_large", INVALID, None),
    errors.AccountSuspended: (403, "user_disabled", INVALID, None),
    errors.ServiceUnavailable: (503, "service_unavailable", API, None),
}
CREATE_ERRORS: dict[type[errors.ServiceError], Row] = _ALWAYS | {
    errors.InvalidRequest: (400, "invalid_request", INVALID, "Invalid request parameters: {}"),
    errors.Unauthenticated: (
        401,
        "unauthorized",
        "authentication_error",
        "Invalid or expired token",
    ),
    errors.InsufficientCredits: (402, "insufficient_quota", "insufficient_quota", None),
    errors.ModelAccessDenied: (403, "model_access_denied", INVALID, None),
    errors.RateLimited: (
        429,
        "rate_limit_exceeded",
        "rate_limit_error",
        "Too many requests, please try again later",
    ),
    errors.TooManyUnfinished: (429, "rate_limit_exceeded", "rate_limit_error", None),
    errors.BacklogFull: (503, "service_unavailable", API, None),
    errors.IdempotencyConflict: (409, "idempotency_conflict", INVALID, None),
    errors.InternalError: (500, "internal_error", API, "Internal server error"),
}
QUERY_ERRORS: dict[type[errors.ServiceError], Row] = _ALWAYS | {
    errors.InvalidRequest: (400, "invalid_request", INVALID, "Invalid request parameters: {}"),
    errors.InvalidTaskId: (
        400,
        "invalid_task_id",
        INVALID,
        "Invalid task ID format, must start with 'task-unified-'",
    ),
    errors.Unauthenticated: (
        401,
        "unauthorized",
        "authentication_error",
        "Authentication required",
    ),
    errors.InsufficientCredits: (402, "quota_exceeded", "insufficient_quota", None),
    errors.ModelAccessDenied: (
        403,
        "permission_denied",
        INVALID,
        "You don't have permission to access this task",
    ),
    errors.TaskNotFound: (
        404,
        "task_not_found",
        INVALID,
        "The requested task could not be found",
    ),
    errors.DeliveryNotFound: (404, "callback_not_found", INVALID, None),
    errors.TaskEnded: (409, "task_already_ended", INVALID, None),
    errors.TaskInUse: (409, "task_in_use", INVALID, None),
    errors.RateLimited: (429, "rate_limit_exceeded", "evo_api_error", "Rate limit exceeded"),
    errors.InternalError: (500, "internal_error", API, "Failed to retrieve task status"),
}


def _renderer(table: dict[type[errors.ServiceError], Row]) -> routing.RenderError:
    def render_error(error: errors.ServiceError) -> Response:
        row = table.get(type(error), table[errors.InternalError])
        status, code, kind, message = row
        text = str(error) if message is None else message.format(error)
        body: dict[str, Any] = {"code": code, "message": text, "type": kind}
        if isinstance(error, errors.InvalidTaskId):
            body["param"] = "task_id"
        elif error.param is not None:
            body["param"] = error.param
        return JSON({"error": body}, status, error.headers)

    return render_error


render_create_error = _renderer(CREATE_ERRORS)
render_query_error = _renderer(QUERY_ERRORS)
