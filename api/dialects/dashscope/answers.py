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
    message = {
        "content": [{"image": link}, {"text": task.rewritten_prompt or task.prompt}],
        "reasoning_content": task.reasoning or "",
        "role": "assistant",
    }
    width, height = _drawn_size(task)
    return {
        "output": {"choices": [{"finish_reason": "stop", "message": message}]},
        "usage": {"height": height, "image_count": 1, "width": width} | _tokens(task) | _ours(task),
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
    usage = {"image_count": 1} | _ours(task)
    width, height = _drawn_size(task)
    if task.dialect != SYNTHESIS or task.downscaled:
        usage["size"] = f"{width}*{height}"
    if task.dialect != SYNTHESIS or task.prompt_extend:
        usage |= _tokens(task)
    rendered = _result(task) if task.dialect == SYNTHESIS else _choice(task)
    return {"output": output | rendered, "usage": usage}


def _result(task: Task) -> dict[str, Any]:
    """What a completed task adds to `output`, as their older models say it."""
    result = {
        "orig_prompt": task.prompt,
        "actual_prompt": task.rewritten_prompt or task.prompt,
        "url": task.image_url,
    }
    if task.prompt_extend:
        result["reasoning_content"] = task.reasoning or ""
    return {"results": [result]}


def _choice(task: Task) -> dict[str, Any]:
    """What a completed task adds to `output`, as their newer models say it."""
    content = [{"image": task.image_url, "type": "image"}]
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if task.prompt_extend:
        content.append({"text": task.rewritten_prompt, "type": "text"})
        message["reasoning_content"] = task.reasoning or ""
    return {"finished": True, "choices": [{"finish_reason": "stop", "message": message}]}


def _tokens(task: Task) -> dict[str, Any]:
    """Of the rewriting; zero without one, as they document it."""
    read, written = task.rewrite_input_tokens or 0, task.rewrite_output_tokens or 0
    tokens: dict[str, Any] = {
        "input_tokens": read,
        "output_tokens": written,
        "total_tokens": read + written,
    }
    if task.prompt_extend:
        tokens["output_tokens_details"] = {"reasoning_tokens": task.rewrite_reasoning_tokens or 0}
    return tokens


def _drawn_size(task: Task) -> tuple[int, int]:
    """Of the file; tasks of the first version have only what was asked for, which was the same."""
    return task.image_width or task.width, task.image_height or task.height


def _ours(task: Task) -> dict[str, Any]:
    """What became of the order, which DashScope's format has no words for."""
    ours: dict[str, Any] = {}
    if task.downscaled:
        ours["downscaled"] = True
    if task.prompt_tokens is not None:
        ours["prompt_tokens"] = task.prompt_tokens
        ours["prompt_tokens_read"] = task.prompt_tokens_read
    return ours


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
