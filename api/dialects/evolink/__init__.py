"""EvoLink's image API, and under the same prefix and in the same words what we add to it.

Sources: EvoLink's OpenAPI document of z-image-turbo, its pages "Get task detail", "Error codes" and
"Get credits" (docs.evolink.ai), and what its own client sends and reads, which is all there is for
the list, the batch and idempotency (github.com/EvoLinkAI/evolink-mcp); read 2026-11.

Our choice, where they are silent: what exactly is wrong follows the message of a 400; null is an
optional field that was not sent; the pixels of the ratios and the default size; 404 for another
account's task, whose existence is nobody's business; a cancelled task is `failed` with
`request_cancelled`, which stays inside the documented status words; the drawn seed, the file's
checksum and its pixels in `result_data`; `allow_downscale` in the request, and `downscaled` in
`result_data` where a smaller image was drawn; in `usage` how many tokens the prompt has and how
many of them were read; `results` is empty once the image has expired, and `results_expired` says
so; lists count no further than 10 000; a key has no credits of its own, so `token` shows the
account's; 409 for `idempotency_conflict`; and everything in `ours`.
"""

from fastapi import APIRouter

from api.dialects import routing
from api.dialects.evolink import ours, routes
from api.dialects.evolink.answers import TASK_ERRORS, render_task
from api.dialects.evolink.refusals import (
    CREATE_ERRORS,
    QUERY_ERRORS,
    render_create_error,
    render_query_error,
)
from api.dialects.evolink.routes import NAME

__all__ = [
    "CREATE_ERRORS",
    "NAME",
    "QUERY_ERRORS",
    "TASK_ERRORS",
    "render_create_error",
    "render_query_error",
    "render_task",
    "routers",
]


def routers() -> list[APIRouter]:
    answered = [routes.create_router, routes.query_router, ours.router]
    return [*answered, routing.close(answered, "/v1", render_query_error)]
