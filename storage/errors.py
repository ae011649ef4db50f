"""Everything that a client can be told about, without a word about the wire.

A dialect turns these into its own status codes and envelopes. The first line of the docstring is
the message where the raiser has nothing more precise to say.
"""

import inspect
from collections.abc import Mapping


class ServiceError(Exception):
    """Something went wrong that the caller may know about."""

    retry_after_s: int | None = None
    """Seconds after which the same request may succeed; None where waiting does not help."""

    def __init__(self, message: str | None = None, *, param: str | None = None) -> None:
        super().__init__(message or (inspect.getdoc(type(self)) or "").partition("\n")[0])
        self.param = param

    @property
    def headers(self) -> dict[str, str]:
        """HTTP headers that every dialect sends with this error."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


# --- The request cannot be taken as it is -------------------------------------------------------


class InvalidRequest(ServiceError):
    """The request is not valid."""

    def __init__(
        self, message: str | None = None, *, param: str | None = None, missing: bool = False
    ) -> None:
        super().__init__(message, param=param)
        self.missing = missing
        """Whether what is wrong is that `param` was not sent."""


class InvalidTaskId(ServiceError):
    """This is not the form of a task id."""


class PayloadTooLarge(ServiceError):
    """The request body is too large."""


class PathNotFound(ServiceError):
    """There is nothing at this address."""


class MethodNotAllowed(ServiceError):
    """This address does not answer that method."""

    def __init__(self, allow: str) -> None:
        super().__init__(f"This address answers only {allow}")
        self.allow = allow

    @property
    def headers(self) -> dict[str, str]:
        return {"Allow": self.allow}


# --- The caller may not -------------------------------------------------------------------------


class Unauthenticated(ServiceError):
    """Invalid or expired API key."""

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class AccountSuspended(ServiceError):
    """This account is suspended. Please contact the operator."""


class ModelAccessDenied(ServiceError):
    """This key has no access to this model."""

    def __init__(self, model: str) -> None:
        super().__init__(f"Token does not have access to model: {model}")


class AdminOnly(ServiceError):
    """This key is not an operator's key."""


class InsufficientCredits(ServiceError):
    """Insufficient quota. Please top up your account."""


class RateLimited(ServiceError):
    """Too many requests, please try again later."""

    def __init__(self, retry_after_s: int, headers: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.retry_after_s = retry_after_s
        self._headers = dict(headers or {})

    @property
    def headers(self) -> dict[str, str]:
        return self._headers | super().headers


class TooManyUnfinished(ServiceError):
    """Too many unfinished tasks on this account, please wait for some to end."""

    retry_after_s = 5


class BacklogFull(ServiceError):
    """Too many tasks wait in the whole service at the moment, please try again later."""

    retry_after_s = 30


# --- What was asked for is not there, or not any more as expected --------------------------------


class TaskNotFound(ServiceError):
    """The requested task could not be found."""


class AccountNotFound(ServiceError):
    """There is no account with this id."""


class KeyNotFound(ServiceError):
    """There is no key with this id."""


class TaskEnded(ServiceError):
    """This task has already ended."""


class IdempotencyConflict(ServiceError):
    """This Idempotency-Key was already used for another request."""


class DeliveryNotFound(ServiceError):
    """There is no callback with this id."""


class TaskInUse(ServiceError):
    """Only a task that has ended can be deleted: cancel it first."""


class NotPending(ServiceError):
    """Only a task that still waits can be cancelled here."""


class WouldOverdraw(ServiceError):
    """The account has fewer credits than this would take away."""


class WouldOverflow(ServiceError):
    """The account would have more credits than can be kept."""


# --- We cannot, now -----------------------------------------------------------------------------


class ServiceUnavailable(ServiceError):
    """The service cannot answer at the moment, please try again later."""

    retry_after_s = 5


class InternalError(ServiceError):
    """Internal server error."""


# --- How a task can fail: the class name is kept on the task, the message is for the customer -----


class GenerationFailed(ServiceError):
    """The image could not be generated. You were not charged; please try again."""


class GenerationTimeout(ServiceError):
    """Drawing took too long and was stopped. You were not charged; please try again."""


class TaskCancelled(ServiceError):
    """The task was cancelled. You were not charged."""


class ResourceExhausted(ServiceError):
    """Not enough memory to draw this size. You were not charged; please try a smaller size."""


class ContentRefused(ServiceError):
    """The prompt or the image may contain inappropriate content. You were not charged."""


class RewriteFailed(ServiceError):
    """The prompt could not be rewritten. You were not charged; please try again."""


class StorageUnavailable(ServiceError):
    """The image could not be stored. You were not charged; please try again later."""


class WorkerLost(ServiceError):
    """Drawing was interrupted several times. You were not charged; please try again."""


def of_task(code: str | None, message: str | None) -> ServiceError:
    """What ended a failed task, from the name and the words that were kept on it."""
    kind = globals().get(code or "", GenerationFailed)
    return kind(message) if issubclass(kind, ServiceError) else GenerationFailed(message)
