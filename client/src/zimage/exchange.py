"""One request and its whole answer, sent again where that can help."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

from zimage import errors
from zimage.errors import ServiceUnavailable, Unreachable, ZImageError
from zimage.retries import RETRIED_STATUSES, Retries
from zimage.steps import Close, Head, Open, Pause, Read, Request, Steps

ANSWER_MAX_BYTES = 8 * 1024 * 1024
"""Of everything that is not an image; a page of tasks is a hundredth of it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """`headers` have lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def exchange(
    request: Request, retries: Retries, *, body_max: int = ANSWER_MAX_BYTES
) -> Steps[Answer]:
    """Send `request` until it is answered with success, or no retry can help.

    Raises: what `errors.of_answer` makes of the last answer; Unreachable.
    """
    for retries_done in count():
        failure: ZImageError
        try:
            answer = yield from _once(request, body_max)
        except Unreachable as error:
            failure, worth_retrying = error, True
        else:
            if 200 <= answer.status < 300:
                return answer
            failure = errors.of_answer(answer.status, answer.headers, answer.body)
            worth_retrying = answer.status in RETRIED_STATUSES
        pause_s = retries.pause_s(retries_done, failure.retry_after_s)
        if not worth_retrying or pause_s is None:
            raise failure
        yield Pause(pause_s)
    raise AssertionError  # count() does not end


def _once(request: Request, body_max: int) -> Steps[Answer]:
    head: Head = yield Open(request)
    body = yield from read_rest(body_max)
    return Answer(head.status, head.headers, body)


def read_rest(body_max: int) -> Steps[bytes]:
    """The rest of the opened answer. Raises: ServiceUnavailable, if it is over `body_max` bytes."""
    body = bytearray()
    while chunk := (yield Read()):
        body += chunk
        if len(body) > body_max:
            yield Close()
            raise ServiceUnavailable(f"The answer is longer than {body_max} bytes")
    yield Close()
    return bytes(body)
