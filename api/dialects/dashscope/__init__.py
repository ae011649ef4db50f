"""Alibaba's DashScope (Model Studio) API for `z-image-turbo`, as its own Python SDK speaks it.

Sources: Alibaba's page "Z-Image API reference" for the synchronous call; its pages "Text-to-image
V2", "Manage asynchronous tasks" and "Error codes" for the rest (help.aliyun.com/zh/model-studio);
what its package `dashscope` 2.0.2 sends and reads, run against a socket; read 2026-11.

Theirs and easily overlooked: what a prompt has beyond 800 characters is cut off without a word, the
default size is upright (1024*1536), and an unknown or forgotten task is 200 with `UNKNOWN`.

Our choice, where they are silent: for z-image only the synchronous call is documented, so the
asynchronous one is that of their Wan models; `negative_prompt` and `watermark` do nothing; null is
a parameter that was not sent; a side has at most 8192 pixels; times without a zone are UTC+8; a
task's `code` is one of their 500s; 405 and 409 borrow the nearest of their codes; a list shows the
tasks of every dialect that were created in its window, each in the one region `self-hosted`.

Of a prompt that was rewritten (`prompt_extend: true`) a task says the same as the synchronous call:
the new text and `reasoning_content` on its message, or on its result of the older form; the tokens
in `usage`, those of the reasoning included in `output_tokens`.

Ours as well: `parameters.allow_downscale`, and in `usage` `downscaled: true` beside the image's own
pixels where they are fewer than were asked for; how many tokens the drawn prompt has and how many
of them were read, beside DashScope's own fields, which count the rewriting.
"""

from fastapi import APIRouter

from api.dialects import routing
from api.dialects.dashscope import routes
from api.dialects.dashscope.answers import NAME, TASK_ERRORS
from api.dialects.dashscope.refusals import ERRORS, render_error

__all__ = ["ERRORS", "NAME", "TASK_ERRORS", "render_error", "routers"]


def routers() -> list[APIRouter]:
    answered = [routes.create_router, routes.task_router]
    return [*answered, routing.close(answered, "/api/v1", render_error)]
