"""What EvoLink's format answers: a task, a list of them, and an account's credits."""

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from storage.errors import TaskCancelled
from storage.models import (
    Account,
    ApiKey,
    Delivery,
    DeliveryAttempt,
    DeliveryState,
    Task,
    TaskStatus,
)

STATUSES = {
    TaskStatus.PENDING: "pending",
    TaskStatus.PROCESSING: "processing",
    TaskStatus.COMPLETED: "completed",
    TaskStatus.FAILED: "failed",
    TaskStatus.CANCELLED: "failed",
}

TASK_ERRORS = {
    "ContentRefused": "content_policy_violation",
    "GenerationFailed": "service_error",
    "GenerationTimeout": "generation_timeout",
    "ResourceExhausted": "resource_exhausted",
    "RewriteFailed": "service_error",
    "StorageUnavailable": "service_unavailable",
    "WorkerLost": "service_error",
}
"""`error.code` of a failed task, by the class that ended it."""

LISTED = {
    "pending": [TaskStatus.PENDING],
    "processing": [TaskStatus.PENDING, TaskStatus.PROCESSING],
    "completed": [TaskStatus.COMPLETED],
    "failed": [TaskStatus.FAILED, TaskStatus.CANCELLED],
    "cancelled": [TaskStatus.CANCELLED],
}
"""What a list shows for each status that may be asked for; `processing` has what is queued."""


def _common(task: Task) -> dict[str, Any]:
    return {
        "created": int(task.created_at.timestamp()),
        "id": task.id,
        "model": task.model,
        "object": "image.generation.task",
        "progress": task.progress,
        "status": STATUSES[task.status],
        "type": "image",
    }


def render_created(task: Task, estimated_s: float) -> dict[str, Any]:
    """The answer to a create."""
    return _common(task) | {
        "task_info": {"can_cancel": True, "estimated_time": math.ceil(estimated_s)},
        "usage": {
            "billing_rule": "per_call",
            "credits_reserved": task.price,
            "user_group": task.user_group,
        },
    }


def render_task(task: Task) -> dict[str, Any]:
    """The answer to a task query, and the body of the callback."""
    answer = _common(task) | {"task_info": {"can_cancel": not task.status.is_terminal}}
    if task.status is TaskStatus.COMPLETED:
        links = [] if task.image_expired else [task.image_url]
        answer["results"] = links
        answer["result_data"] = [_render_image(task, link) for link in links]
        answer["usage"] = {"billing_rule": "per_call", "credits_used": task.price}
        if task.prompt_tokens is not None:
            answer["usage"]["prompt_tokens"] = task.prompt_tokens
            answer["usage"]["prompt_tokens_read"] = task.prompt_tokens_read
        if not links:
            answer["results_expired"] = True
    elif task.status is TaskStatus.FAILED:
        code = TASK_ERRORS.get(task.error_code or "", "unknown_error")
        answer["error"] = {"code": code, "message": task.error_message, "type": "task_error"}
    elif task.status is TaskStatus.CANCELLED:
        answer["error"] = {
            "code": "request_cancelled",
            "message": str(TaskCancelled()),
            "type": "task_error",
        }
    return answer


def _render_image(task: Task, link: str | None) -> dict[str, Any]:
    image = {
        "image_url": link,
        "seed": task.seed,
        "sha256": task.image_sha256,
        "size_bytes": task.image_size_bytes,
        "width": task.image_width or task.width,
        "height": task.image_height or task.height,
    }
    return image | ({"downscaled": True} if task.downscaled else {})


def render_unfinished(task: Task, place: int | None, estimated_s: float) -> dict[str, Any]:
    """`render_task` with what can be expected: how many tasks are before it, and seconds."""
    answer = render_task(task)
    if place is not None:
        answer["task_info"]["queue_position"] = place
    answer["task_info"]["estimated_time"] = math.ceil(estimated_s)
    return answer


def render_row(task: Task) -> dict[str, Any]:
    """A task in a list, which has no links."""
    completed = task.status is TaskStatus.COMPLETED
    links = 1 if completed and not task.image_expired else 0
    row = {
        "id": task.id,
        "model": task.model,
        "type": "image",
        "status": STATUSES[task.status],
        "progress": task.progress,
        "created_at": int(task.created_at.timestamp()),
        "has_results": links > 0,
        "result_count": links,
        "has_error": STATUSES[task.status] == "failed",
        "credits_used": task.price if completed else 0,
    }
    if task.started_at is not None and task.finished_at is not None:
        row["duration"] = round((task.finished_at - task.started_at).total_seconds(), 3)
    return row


def render_credits(account: Account, key: ApiKey, spent: Decimal) -> dict[str, Any]:
    """What can be spent, and what was. A key has no limit of its own beside the account's."""
    left = account.balance - account.reserved
    return {
        "data": {
            "token": {
                "remaining_credits": left,
                "unlimited_credits": True,
                "used_credits": key.used_credits,
            },
            "user": {"remaining_credits": left, "used_credits": spent},
        },
        "message": "",
        "success": True,
    }


def render_delivery(delivery: Delivery, attempts: Sequence[DeliveryAttempt]) -> dict[str, Any]:
    """A callback with its attempts, the first one first."""
    waits = delivery.state is DeliveryState.WAITING
    return {
        "id": delivery.id,
        "task_id": delivery.task_id,
        "url": delivery.url,
        "state": delivery.state,
        "attempts": [
            {"at": attempt.ended_at, "status": attempt.status, "error": attempt.error}
            for attempt in attempts
        ],
        "created_at": delivery.created_at,
        "delivered_at": delivery.delivered_at,
        "next_attempt_at": delivery.next_attempt_at if waits else None,
    }
