"""The bytes of an image, and whether they are the ones that were made."""

import hashlib

from zimage.answers import Task, read, read_task
from zimage.errors import (
    ImageExpired,
    IntegrityError,
    NotFound,
    PermissionDenied,
    ServiceUnavailable,
    TaskFailed,
)
from zimage.exchange import exchange
from zimage.retries import Retries
from zimage.steps import Request, Steps

IMAGE_MAX_BYTES = 64 * 1024 * 1024
"""Of an image whose size the service does not tell; 2048 x 2048 uncompressed is a quarter of it."""
DOWNLOADS_MAX = 2


def download(task: Task, retries: Retries) -> Steps[bytes]:
    """The image of a completed task, checked.

    Raises:
        TaskFailed: it has none.
        ImageExpired: it is no longer kept.
        IntegrityError: its bytes have another length or SHA-256 than the service told, twice.
    """
    for downloads_left in reversed(range(DOWNLOADS_MAX)):
        try:
            return (yield from fetch(_url_of(task), retries, task.sha256, task.size_bytes))
        except IntegrityError:
            if not downloads_left:
                raise
        except (NotFound, PermissionDenied):
            # A link may end before its image does, and the service knows which of them has.
            if not downloads_left:
                raise
            answer = yield from exchange(Request("GET", f"/v1/tasks/{task.id}"), retries)
            task = read(answer.body, read_task)
    raise AssertionError  # the last download returns or raises


def fetch(
    url: str, retries: Retries, sha256: str | None = None, size_bytes: int | None = None
) -> Steps[bytes]:
    """What lies at `url`, which is not told the key. Raises: IntegrityError."""
    # The bytes as they are stored: a packed answer would have another length.
    headers = {"Accept": "image/png, image/*", "Accept-Encoding": "identity"}
    request = Request("GET", url, headers=headers, with_key=False)
    try:
        answer = yield from exchange(request, retries, body_max=size_bytes or IMAGE_MAX_BYTES)
    except ServiceUnavailable as error:
        if error.status is None and size_bytes is not None:
            raise IntegrityError(f"The image is longer than {size_bytes} bytes") from None
        raise
    data = answer.body
    if size_bytes is not None and len(data) != size_bytes:
        raise IntegrityError(f"The image is {len(data)} bytes long, not {size_bytes}")
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256.lower():
        raise IntegrityError("The image has another SHA-256 than the service told")
    return data


def completed(task: Task) -> Task:
    """The task itself. Raises: TaskFailed, if it ended without an image."""
    if task.error is not None:
        raise TaskFailed(f"{task.error.message} (task {task.id})", code=task.error.code)
    return task


def _url_of(task: Task) -> str:
    if completed(task).expired:
        raise ImageExpired(
            f"The image of {task.id} is kept for a limited time, 24 hours by default, which is over"
        )
    if task.image_url is None:
        # No TaskFailed: whoever draws it again because of that would pay again.
        raise ServiceUnavailable(f"{task.id} is {task.status}, and no image of it is told")
    return task.image_url
