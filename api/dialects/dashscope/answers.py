"""What DashScope's format answers: an image at once, a task, a list of tasks.

Every answer is 200 and has a `request_id`, the one of `X-Request-ID`. A top-level `message` is a
failure to those who read this format, so no success has one.
"""

import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import structlog
from starlette.responses import Response

from api.answers import JSON
from storage.models import Task, TaskStatus
from storage.settings import settings

NAME = "dashscope"
SYNTHESIS = "dashscope-synthesis"
"""On a task: it answers in `results`, as their older models do, and not in `choices`."""

STATUSES = {
    TaskStatus.PENDING: "PENDING",
    TaskStatus.PROCESSING: "RUNNING",
    TaskStatus.COMPLETED: "SUCCEEDED",
    TaskStatus.FAILED: "FAILED",
    TaskStatus.CANCELLED: "CANCELED",
}
UNKNOWN = "UNKNOWN"

TASK_ERRORS = {
    "ContentRefused": "DataInspectionFailed",
    "GenerationFailed": "InternalError.Algo",
    "GenerationTimeout": "InternalError.Timeout",
    "ResourceExhausted": "InternalError.Algo",
    "RewriteFailed": "RewriteFailed",
    "StorageUnavailable": "InternalError.Upload",
    "WorkerLost": "SystemError",
}
"""`code` of a failed task, by the class that ended it."""

ZONE = timezone(timedelta(hours=8))
"""Of times that are written without one."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
REGION = "self-hosted"


def answer(body: dict[str, Any]) -> Response:
    return JSON({"request_id": request_id()} | body)


def request_id() -> str:
    """Of the request that is being answered."""
    found: str = structlog.contextvars.get_contextvars().get("request_id", "")
    return found


def render_drawn(task: Task, link: str) -> dict[str, Any]:
    """The answer to a synchronous create with messages."""
    content = [{"image": link}, {"text": task.prompt}]
    message = {"content": content, "reasoning_content": "", "role": "assistant"}
    return {
        "output": {"choices": [{"finish_reason": "stop", "message": message}]},
        "usage": {
            "height": task.height,
            "image_count": 1,
            "input_tokens": 0,
            "output_tokens": 0,
            "total_tokens": 0,
            "width": task.width,
        },
    }


def render_created(task: Task) -> dict[str, Any]:
    """The answer to an asynchronous create."""
    return {"output": {"task_status": STATUSES[task.status], "task_id": task.id}}


def render_task(task: Task) -> dict[str, Any]:
    """The answer to a task query. A failed task too is 200 and says why inside `output`."""
    if _forgotten(task):
        return render_unknown(task.id)
    output: dict[str, Any] = {"task_id": task.id, "task_status": STATUSES[task.status]}
    for name, moment in (
        ("submit_time", task.created_at),
        ("scheduled_time", task.started_at),
        ("end_time", task.finished_at),
    ):
        if moment is not None:
            output[name] = _written(moment)
    completed = task.status is TaskStatus.COMPLETED
    failed = task.status is TaskStatus.FAILED
    if task.dialect == SYNTHESIS:
        output["task_metrics"] = {"TOTAL": 1, "SUCCEEDED": int(completed), "FAILED": int(failed)}
    if failed:
        output["code"] = TASK_ERRORS.get(task.error_code or "", "InternalError")
        output["message"] = task.error_message
    if not completed:
        return {"output": output}
    if task.dialect == SYNTHESIS:
        result = {"orig_prompt": task.prompt, "actual_prompt": task.prompt, "url": task.image_url}
        return {"output": output | {"results": [result]}, "usage": {"image_count": 1}}
    message = {"role": "assistant", "content": [{"image": task.image_url, "type": "image"}]}
    return {
        "output": output
        | {"finished": True, "choices": [{"finish_reason": "stop", "message": message}]},
        "usage": {
            "size": f"{task.width}*{task.height}",
            "total_tokens": 0,
            "image_count": 1,
            "output_tokens": 0,
            "input_tokens": 0,
        },
    }


def render_unknown(task_id: str) -> dict[str, Any]:
    """The answer to a query of a task that is not there, or not any more."""
    return {"output": {"task_id": task_id, "task_status": UNKNOWN}}


def render_page(rows: Sequence[Task], total: int, page_no: int, page_size: int) -> dict[str, Any]:
    """The answer to a list."""
    return {
        "total": total,
        "data": [_row(task) for task in rows],
        "total_page": math.ceil(total / page_size),
        "page_no": page_no,
        "page_size": page_size,
    }


def _row(task: Task) -> dict[str, Any]:
    path = (
        "text2image:image-synthesis" if task.dialect == SYNTHESIS else "image-generation:generation"
    )
    row = {
        "api_key_id": task.api_key_id,
        "caller_parent_id": task.account_id,
        "caller_uid": task.account_id,
        "gmt_create": _epoch_ms(task.created_at),
        "model_name": task.model,
        "region": REGION,
        "request_id": task.request_id,
        "status": STATUSES[task.status],
        "task_id": task.id,
        "user_api_unique_key": f"apikey:v1:aigc:{path}:{task.model}",
    }
    if task.started_at is not None:
        row["start_time"] = _epoch_ms(task.started_at)
    if task.finished_at is not None:
        row["end_time"] = _epoch_ms(task.finished_at)
    return row


def _forgotten(task: Task) -> bool:
    if task.finished_at is None:
        return False
    if task.status is TaskStatus.COMPLETED and task.image_expired:
        return True
    return task.finished_at + timedelta(seconds=settings.image_ttl_s) <= datetime.now(UTC)


def _written(moment: datetime) -> str:
    return moment.astimezone(ZONE).replace(tzinfo=None).isoformat(" ", "milliseconds")


def _epoch_ms(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(milliseconds=1)
