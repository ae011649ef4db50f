"""The customer's side of the Z-Image-Turbo service: `Client`, `AsyncClient` and the command."""

from zimage.answers import (
    Credits,
    Image,
    Quote,
    Task,
    TaskError,
    TaskPage,
    TaskSummary,
)
from zimage.async_client import AsyncClient
from zimage.callbacks import Callback, CallbackAttempt
from zimage.client import Client
from zimage.errors import (
    Conflict,
    ImageExpired,
    InsufficientCredits,
    IntegrityError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RateLimited,
    ServiceUnavailable,
    TaskFailed,
    Timeout,
    Unauthenticated,
    Unreachable,
    ZImageError,
)
from zimage.retries import Retries
from zimage.signatures import InvalidSignature, verify_callback

__all__ = [
    "AsyncClient",
    "Callback",
    "CallbackAttempt",
    "Client",
    "Conflict",
    "Credits",
    "Image",
    "ImageExpired",
    "InsufficientCredits",
    "IntegrityError",
    "InvalidRequest",
    "InvalidSignature",
    "NotFound",
    "PermissionDenied",
    "Quote",
    "RateLimited",
    "Retries",
    "ServiceUnavailable",
    "Task",
    "TaskError",
    "TaskFailed",
    "TaskPage",
    "TaskSummary",
    "Timeout",
    "Unauthenticated",
    "Unreachable",
    "ZImageError",
    "verify_callback",
]
