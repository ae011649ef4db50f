"""Each error in DashScope's envelope: `{request_id, code, message}`.

Source: Alibaba's page "Error codes" (help.aliyun.com/zh/model-studio/error-code, read 2026-11), the
spelling of "occured" included. Our words stand where they say more than theirs.
"""

from starlette.responses import Response

from api.answers import JSON
from api.dialects.dashscope.answers import TASK_ERRORS, request_id
from storage import errors

Row = tuple[int, str, str | None]
"""HTTP status, `code`, and the message where DashScope's differs from ours."""

NOT_CANCELLED = "Failed to cancel the task, please confirm if the task is in PENDING status."

ERRORS: dict[type[errors.ServiceError], Row] = {
    errors.InvalidRequest: (400, "InvalidParameter", None),
    errors.InsufficientCredits: (
        400,
        "Arrearage",
        "Access denied, please make sure your account is in good standing.",
    ),
    errors.ContentRefused: (400, TASK_ERRORS["ContentRefused"], None),
    errors.TaskEnded: (400, "UnsupportedOperation", NOT_CANCELLED),
    errors.NotPending: (400, "UnsupportedOperation", NOT_CANCELLED),
    errors.TaskCancelled: (400, "UnsupportedOperation", None),
    errors.Unauthenticated: (401, "InvalidApiKey", "Invalid API-key provided."),
    errors.AccountSuspended: (403, "AccessDenied", None),
    errors.ModelAccessDenied: (403, "Model.AccessDenied", "Model access denied."),
    errors.PathNotFound: (404, "NotFound", "Not found!"),
    errors.TaskNotFound: (404, "NotFound", None),
    errors.MethodNotAllowed: (405, "UnsupportedOperation", None),
    errors.IdempotencyConflict: (409, "InvalidParameter", None),
    errors.PayloadTooLarge: (413, "BadRequest.TooLarge", "Payload Too Large."),
    errors.RateLimited: (
        429,
        "Throttling.RateQuota",
        "Requests rate limit exceeded, please try again later.",
    ),
    errors.TooManyUnfinished: (429, "Throttling.Concurrency", None),
    errors.InternalError: (
        500,
        "InternalError",
        "An internal error has occured, please try again later or contact service support.",
    ),
    errors.GenerationFailed: (500, TASK_ERRORS["GenerationFailed"], None),
    errors.GenerationTimeout: (500, "RequestTimeOut", None),
    errors.ResourceExhausted: (500, TASK_ERRORS["ResourceExhausted"], None),
    errors.RewriteFailed: (500, TASK_ERRORS["RewriteFailed"], None),
    errors.StorageUnavailable: (500, TASK_ERRORS["StorageUnavailable"], None),
    errors.WorkerLost: (500, TASK_ERRORS["WorkerLost"], None),
    errors.BacklogFull: (503, "ModelUnavailable", None),
    errors.ServiceUnavailable: (
        503,
        "ModelUnavailable",
        "Model is unavailable, please try again later.",
    ),
}
MISSING: dict[str | None, Row] = {
    "input": (
        400,
        "BadRequest.EmptyInput",
        "Required input parameter missing from request. {}",
    ),
    "model": (
        400,
        "BadRequest.EmptyModel",
        'Required parameter "model" missing from request.',
    ),
}
"""By the parameter that was not sent."""
UNKNOWN_MODEL: Row = (404, "ModelNotFound", "Model can not be found. {}")


def render_error(error: errors.ServiceError) -> Response:
    status, code, message = _row(error)
    text = str(error) if message is None else message.format(error)
    body = {"request_id": request_id(), "code": code, "message": text}
    return JSON(body, status, error.headers)


def _row(error: errors.ServiceError) -> Row:
    if isinstance(error, errors.InvalidRequest):
        if error.missing and error.param in MISSING:
            return MISSING[error.param]
        if error.param == "model":
            return UNKNOWN_MODEL
    return ERRORS.get(type(error), ERRORS[errors.InternalError])
